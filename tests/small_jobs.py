"""Whole jobs in miniature: two classes of encoded videos, a teacher that knows them, tiny networks."""

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from videos import write_video

from distinit_plugin import InputSpec, build_network, load_cfg
from distinit_plugin.cli import main
from distinit_plugin.config.node import CfgNode
from distinit_plugin.engine.checkpoint import load_checkpoint
from distinit_plugin.engine.curves import read_curves

CLASSES = ("bright", "dark")  # sorted: labels 0 and 1
SIZE = 32  # pixels of crops
BATCH = 4


def bright_or_dark(name: str, seed: int) -> Callable[[int, int, int], np.ndarray]:
    """Frames of one video: a level of grey, a texture of its own, and a square that moves fast where it is bright."""
    rng = np.random.default_rng([CLASSES.index(name), seed])
    texture = rng.integers(0, 30, (8, 8, 3))
    level, speed = (170, 4) if name == "bright" else (30, 1)

    def frame(number: int, height: int, width: int) -> np.ndarray:
        rows, columns = np.arange(height) * 8 // height, np.arange(width) * 8 // width
        picture = (level + texture[rows][:, columns]).astype(np.uint8)
        left = (number * speed + 5 * seed) % (width - 8)
        picture[20:28, left : left + 8] = 120
        return picture

    return frame


def write_corpus(folder: Path, per_class: int, *, first: int = 0, frames: int = 12) -> Path:
    """``folder/bright/video0.mp4`` …: a corpus of FORMAT folder with two classes."""
    for name in CLASSES:
        (folder / name).mkdir(parents=True, exist_ok=True)
        for number in range(first, first + per_class):
            pattern = bright_or_dark(name, number)
            write_video(folder / name / f"video{number}.mp4", frames, 48, 64, pattern=pattern)
    return folder


def write_videos(folder: Path) -> Path:
    """``folder/train`` (12 videos) and ``folder/test`` (6 others)."""
    write_corpus(folder / "train", 6)
    write_corpus(folder / "test", 3, first=100)
    return folder


def write_teacher(path: Path, num_classes: int = 4, width: int = 8) -> Path:
    """A Res2D of depth 10 whose class 0 is certain for bright frames and excluded for dark ones.

    Its entropy is thus 0 nats on bright and log(K − 1) on dark frames: a gate between them keeps the bright half.
    """
    with torch.random.fork_rng():
        torch.manual_seed(7)
        network = build_network("Res2D", num_classes=num_classes, input=InputSpec(), depth=10, width=width).eval()
    levels = torch.tensor([185.0, 45.0]) / 255
    frames = ((levels - 0.45) / 0.225).view(2, 1, 1, 1, 1).expand(2, 3, 1, SIZE, SIZE)
    with torch.no_grad():
        bright, dark = network({"rgb": frames}).features
        direction = (bright - dark) / (bright - dark).square().sum()
        network.fc.weight.zero_()
        network.fc.bias.zero_()
        network.fc.weight[0] = 40 * direction  # +20 for bright, −20 for dark
        network.fc.bias[0] = -20 * ((bright + dark) @ direction)
    torch.save(network.bare_state_dict(), path)
    return path


def write_squares(folder: Path, num_frames: int, side: int) -> Path:
    """``folder/{train,test}/{class}``: four square videos to train on and two to test; ``folder/flow``: their TV-L1."""
    for use, numbers in (("train", (0, 1)), ("test", (2,))):
        for name in CLASSES:
            (folder / use / name).mkdir(parents=True)
            for number in numbers:
                pattern = bright_or_dark(name, number)
                write_video(folder / use / name / f"video{number}.mp4", num_frames, side, side, pattern=pattern)
    options = ["--backend", "tvl1", "--size", "native", "--workers", "1"]
    assert main(["extract-flow", str(folder), str(folder / "flow"), *options]) == 0
    return folder


def merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Nested dictionaries, the second over the first."""
    result = dict(base)
    for key, value in changes.items():
        old = result.get(key)
        result[key] = merged(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return result


def small_settings(videos: Path, output: Path, **sections: Any) -> dict[str, Any]:
    """The contents of a YAML file: an R(2+1)D of depth 10 and width 8 on 4 frames of 32²; ``sections`` over it."""
    base = {
        "OUTPUT_DIR": str(output),
        "LOG_PERIOD": 1,
        "DATA": {
            "NUM_FRAMES": 4,
            "SAMPLING_RATE": 2,
            "TRAIN_CROP_SIZE": SIZE,
            "TEST_CROP_SIZE": SIZE,
            "TRAIN_JITTER_SCALES": [36, 44],
        },
        "DATA_LOADER": {"NUM_WORKERS": 0},
        "MODEL": {"NUM_CLASSES": len(CLASSES)},
        "RESNET": {"DEPTH": 10},
        "NETWORK": {"WIDTH": 8},
        "TRAIN": {"BATCH_SIZE": BATCH},
        "TEST": {"ENABLE": False, "NUM_ENSEMBLE_VIEWS": 2},
        "CORPUS": {"TRAIN": {"VIDEOS": {"PATH": str(videos / "train")}}},
        "SOLVER": {"MAX_EPOCH": 1, "BASE_LR": 0.05},
        "RUNNER": {"PRECISION": "fp32", "CHECK_CONVOLUTIONS": False},
    }
    return merged(base, sections)


def small_cfg(videos: Path, output: Path, **sections: Any) -> CfgNode:
    """``small_settings`` written beside the run's folder and loaded as a user's file is."""
    output.parent.mkdir(parents=True, exist_ok=True)
    path = output.with_name(f"{output.name}.yaml")
    path.write_text(yaml.safe_dump(small_settings(videos, output, **sections)))
    cfg, warnings = load_cfg(path)
    assert not warnings
    return cfg


def labelled(videos: Path, **uses: str) -> dict[str, Any]:
    """``{"ACTION": …, "CORPUS": …}`` for training on labels; ``uses`` maps TRAIN, VAL, TEST to folders."""
    uses = uses or {"TRAIN": "train", "TEST": "test"}
    corpora = {use: {"VIDEOS": {"PATH": str(videos / name), "LABELED": True}} for use, name in uses.items()}
    return {"ACTION": {"LOSS_WEIGHT": 1.0}, "CORPUS": corpora}


def brightness_teacher(path: Path, **keys: Any) -> dict[str, Any]:
    """The entry of ``write_teacher``'s network below DISTILL.TEACHERS."""
    entry = {
        "ARCH": "Res2D",
        "WEIGHTS": str(path),
        "NUM_CLASSES": 4,
        "DEPTH": 10,
        "NETWORK": {"WIDTH": 8},
        "CROP_SIZE": SIZE,
        "MEAN": [0.45, 0.45, 0.45],
        "STD": [0.225, 0.225, 0.225],
    }
    return {**entry, **keys}


def only_read_curves(runs: Mapping[str, Path], output: Path) -> None:
    """In place of ``plot_curves``: a third of a small run is the drawing."""
    for run in runs.values():
        read_curves(run)


def checkpoint(output: Path, epoch: int = 1) -> Path:
    """The checkpoint after an epoch (counted from 1)."""
    return output / "checkpoints" / f"checkpoint_epoch_{epoch:05d}.pyth"


def state_of(output: Path, epoch: int = 1) -> dict[str, Any]:
    """Its contents."""
    return load_checkpoint(checkpoint(output, epoch))


def weights_of(output: Path, epoch: int = 1) -> dict[str, torch.Tensor]:
    """The student's weights in it."""
    return dict(state_of(output, epoch)["model_state"])


def differing(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> list[str]:
    """Names of the tensors that are not equal bit for bit."""
    assert one.keys() == other.keys()
    return [name for name in one if not torch.equal(one[name], other[name])]


def json_stats(output: Path, kind: str, file: str = "stdout.log") -> list[dict[str, Any]]:
    """The ``json_stats:`` lines of one ``_type`` (``train_iter_``, ``train_epoch``, ``val_epoch``)."""
    return [stats for stats in _all_stats(output / file) if stats.get("_type") == kind]


def _all_stats(path: Path) -> Iterator[dict[str, Any]]:
    for line in path.read_text().splitlines():
        _, found, text = line.partition("json_stats: ")
        if found:
            yield json.loads(text)
