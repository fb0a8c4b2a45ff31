"""What the tests of cached targets share: jobs over a grid, live and cached."""

from pathlib import Path
from typing import Any

import torch
from flows import Difference, settings
from small_jobs import CLASSES, SIZE, bright_or_dark, brightness_teacher, labelled, merged, small_cfg
from videos import write_video

from distinit_plugin import InputSpec, build_network
from distinit_plugin.config.node import CfgNode
from distinit_plugin.jobs.caching import CachedPart, cache_targets
from distinit_plugin.jobs.corpus_check import read_corpus
from distinit_plugin.jobs.flow_extraction import extract_flow

EXACT = {"DETERMINISTIC": True, "PRECISION": "auto", "NUM_THREADS": 1}
GRID = {"CLIPS": 2, "CROPS": 1, "FRAMES": 2}
NAME = "TEACHER"


def write_world(folder: Path) -> Path:
    """``videos/train`` (4 small videos, one of them too short for a clip), ``videos/test`` (2), flow, two teachers."""
    for use, numbers in (("train", (0, 1)), ("test", (7,))):
        for name in CLASSES:
            (folder / "videos" / use / name).mkdir(parents=True)
            for number in numbers:
                frames = 3 if (name, number) == ("dark", 1) else 12
                pattern = bright_or_dark(name, number)
                write_video(folder / "videos" / use / name / f"video{number}.mp4", frames, 40, 56, pattern=pattern)
    flow = settings(size="native", codec="ffv1")
    done = extract_flow(read_corpus(str(folder / "videos")), folder / "flow", flow, backend=Difference.name)
    assert len(done.done) == 6
    write_image_teacher(folder / "image.pth")
    write_flow_teacher(folder / "flow.pth")
    return folder


def write_image_teacher(path: Path, width: int = 8) -> None:
    """A Res2D of depth 10 with 4 classes, whose answers differ from frame to frame and from crop to crop."""
    with torch.random.fork_rng():
        torch.manual_seed(7)
        network = build_network("Res2D", num_classes=4, input=InputSpec(), depth=10, width=width).eval()
        with torch.no_grad():
            levels = (torch.tensor([185.0, 45.0]) / 255 - 0.45) / 0.225
            frames = levels.view(2, 1, 1, 1, 1).expand(2, 3, 1, SIZE, SIZE)
            bright, dark = network({"rgb": frames}).features
            network.fc.weight.normal_().mul_(3 / (bright - dark).norm())
            network.fc.bias.copy_(-network.fc.weight @ ((bright + dark) / 2))
    torch.save(network.bare_state_dict(), path)


def write_flow_teacher(path: Path, seed: int = 3) -> None:
    """A narrow S3DG of flow with two classes, whose normalisation is that of noise: untrained, it would answer 0."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        clip = InputSpec(num_frames=4, modality="flow", mean=(0.5, 0.5), std=(0.5, 0.5))
        network = build_network("S3DG", num_classes=2, input=clip, width=8)
        torch.nn.init.normal_(network.fc.weight)
        for norm in network.modules():
            if isinstance(norm, torch.nn.BatchNorm3d):
                norm.momentum = 1.0
        with torch.no_grad():
            network.train()({"flow": torch.randn(4, 2, 8, 64, 64)})
    torch.save(network.bare_state_dict(), path)


def image_entry(world: Path, **keys: Any) -> dict[str, Any]:
    """A gated teacher of a random frame."""
    standard = {"FRAME_PICK": "random", "MAX_ENTROPY": 1.0}
    return brightness_teacher(world / "image.pth", **{**standard, **keys})


def flow_entry(world: Path, **keys: Any) -> dict[str, Any]:
    """A teacher of flow, compared with the student's own logits."""
    entry = {
        "ARCH": "S3DG",
        "WEIGHTS": str(world / "flow.pth"),
        "NUM_CLASSES": 2,
        "NETWORK": {"MODALITY": "flow", "WIDTH": 8},
        "MEAN": [0.5, 0.5],
        "STD": [0.5, 0.5],
        "CROP_SIZE": SIZE,
        "FRAME_PICK": "clip",
        "HEAD": "own",
        "LOSS": "mse",
        "CLASS_REDUCTION": "sum",
    }
    return {**entry, **keys}


def job(world: Path, output: Path, entry: dict[str, Any], **sections: Any) -> CfgNode:
    """A deterministic run of two steps over the grid (4 clips of each video): labels, a validation, one teacher."""
    base = {
        **labelled(world / "videos", TRAIN="train", VAL="test"),
        "DISTILL": {"TEACHERS": {NAME: entry}, "GRID": GRID},
        "RUNNER": {**EXACT, "CLIPS_PER_EPOCH": 8},
        "FLOW": {"BACKEND": Difference.name},
    }
    return small_cfg(world / "videos", output, **merged(base, sections))


def fill(cfg: CfgNode, folder: Path, **options: Any) -> list[CachedPart]:
    """Make the cache of a job's teacher."""
    return cache_targets(cfg, NAME, str(folder), **{"dtype": "float32", "shard_videos": 2, **options})
