"""A small data set in AVA's form: real H.264 videos of drawn figures that do several things at once.

A figure's pose and what it carries can be seen in one frame; whether it climbs, descends or stays, and whether it
flashes, only in several. Its box is exactly what is drawn of it.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from PIL import Image

from distinit_plugin.demos.figures import MOVES, POSES, Figure, cast, draw
from distinit_plugin.demos.files import FPS, Progress, check_numbers, encode_h264, fill_folder, make_files
from distinit_plugin.files import write_text
from distinit_plugin.video.decode import open_video

ACTION_NAMES = (*POSES, *MOVES, "carry", "flash")
"""Names of the actions; the first has number 1."""

STILL_ACTIONS = (1, 2, 3, 7)
"""Actions that one frame tells."""

START = 900
"""Time stamp of the first picture."""

FIRST_SECOND = 902
"""The first annotated one."""

FRAME_RATE = 30
"""Extracted frames per second."""

LAYOUT_VERSION = 1  # raise it when the pictures change, so that folders made before are made again

_AFTER = 0.6  # seconds that a video goes on behind its last keyframe
_JITTER = 0.03  # standard deviation of predicted boxes, of their sides
_FALSE = 0.3  # share of keyframes with a predicted box where nobody is


@dataclass(frozen=True)
class PersonData:
    """Where the set is. The names of the files in ``annotations`` are the defaults of PySlowFast's AVA node.

    Attributes:
        folder: Root of all.
        videos: One ``NAME.mp4`` for each video, at 25 frames per second; its first picture has the time stamp 900.
        frames: Frames extracted at 30 per second from time stamp 900 on, ``NAME/NAME_000001.png`` and so on (with
            ``extract``; else an empty folder).
        frame_lists: ``train.csv`` and ``val.csv``, which list those.
        annotations: ``ava_train_v2.2.csv`` and ``ava_val_v2.2.csv`` (ground truth), ``ava_train_predicted_boxes.csv``
            and ``ava_val_predicted_boxes.csv`` (boxes and scores as of a detector, no actions),
            ``ava_val_excluded_timestamps_v2.2.csv`` (a second of the last video whose persons are not annotated), and
            the label map ``ava_action_list_v2.2_for_activitynet_2019.pbtxt``.
    """

    folder: Path
    videos: Path
    frames: Path
    frame_lists: Path
    annotations: Path

    def options(self, source: Literal["videos", "frames"] = "videos") -> list[str]:
        """``KEY VALUE`` pairs that make a configuration read the set."""
        places = ["AVA.ANNOTATION_DIR", str(self.annotations), "MODEL.NUM_CLASSES", str(len(ACTION_NAMES))]
        shown = {
            "KEYFRAMES.VIDEO_DIR": self.videos,
            "AVA.FRAME_DIR": self.frames,
            "AVA.FRAME_LIST_DIR": self.frame_lists,
        }
        for key, place in shown.items():
            places += [key, str(place) if key.startswith("KEYFRAMES") == (source == "videos") else ""]
        return [*places, "KEYFRAMES.VIDEO_START", str(START)]

    def names(self, split: Literal["train", "val"]) -> list[str]:
        """The videos of a split."""
        return sorted(path.stem for path in self.videos.glob(f"{split}_*.mp4"))


def make_persons(
    folder: str | os.PathLike[str],
    *,
    seed: int = 0,
    num_train: int = 32,
    num_test: int = 12,
    num_keyframes: int = 10,
    height: int = 96,
    width: int = 128,
    extract: bool = False,
    on_progress: Progress | None = None,
) -> PersonData:
    """Write the set, or return at once when the same one is there already.

    Every file is a pure function of the arguments.

    Args:
        folder: Where to write; made if missing. It must be empty or hold a set that this function made.
        seed: Seed of everything.
        num_train: Training videos.
        num_test: Validation (and test) videos.
        num_keyframes: Annotated seconds of each video: 902, 903, …
        height: Of the videos, even, pixels.
        width: Of the videos, even, pixels.
        extract: Also write the frames.
        on_progress: Called as ``on_progress(videos_done, videos_in_all)``.

    Raises:
        UserError: A number that makes no sense, a folder with other files, or PyAV without an H.264 encoder.
    """
    wanted = {
        "layout": LAYOUT_VERSION,
        "seed": seed,
        "num_train": num_train,
        "num_test": num_test,
        "num_keyframes": num_keyframes,
        "height": height,
        "width": width,
        "extract": int(extract),
    }
    check_numbers(wanted, {"seed": 0, "height": 32, "width": 48, "extract": 0})
    root = Path(folder)
    data = PersonData(root, *(root / name for name in ("videos", "frames", "frame_lists", "annotations")))
    scenes = [
        _scene(f"{split}_{number:04d}", [seed, place, number], num_keyframes, height, width)
        for place, (split, count) in enumerate((("train", num_train), ("val", num_test)))
        for number in range(count)
    ]

    def fill() -> None:
        make_files(partial(_film, data, (height, width), extract), scenes, on_progress)
        for split in ("train", "val"):
            own = [scene for scene in scenes if scene.name.startswith(split)]
            _annotate(data.annotations, split, own, height, width)
            if extract:
                _list_frames(data, split, own)
        write_text(data.annotations / "ava_action_list_v2.2_for_activitynet_2019.pbtxt", _label_map())

    fill_folder(root, wanted, ("videos", "frames", "frame_lists", "annotations"), fill)
    return data


class _Scene(NamedTuple):
    """One video."""

    name: str
    seed: list[int]
    seconds: range  # annotated ones
    figures: list[Figure]


def _scene(name: str, seed: list[int], num_keyframes: int, height: int, width: int) -> _Scene:
    seconds = range(FIRST_SECOND, FIRST_SECOND + num_keyframes)
    return _Scene(name, seed, seconds, cast(seconds, height, width, np.random.default_rng([*seed, 0])))


def _film(data: PersonData, size: tuple[int, int], extract: bool, scene: _Scene) -> None:
    """Draw, encode and perhaps extract one video."""
    times = START + np.arange(int((scene.seconds.stop - 1 + _AFTER - START) * FPS)) / FPS
    path = data.videos / f"{scene.name}.mp4"
    encode_h264(draw(scene.figures, times, *size, np.random.default_rng([*scene.seed, 1])), path)
    if extract:
        _extract(path, data.frames / scene.name)


def _extract(video: Path, folder: Path) -> None:
    """Write the frames of a video at ``FRAME_RATE``, without loss."""
    folder.mkdir()
    with open_video(video) as reader:
        frames = reader.read(reader.index.timeline(FRAME_RATE))
    for number, frame in enumerate(frames, start=1):
        Image.fromarray(frame).save(folder / f"{folder.name}_{number:06d}.png", compress_level=0)


def _list_frames(data: PersonData, split: str, scenes: list[_Scene]) -> None:
    rows = ["original_vido_id video_id frame_id path labels"]
    for place, scene in enumerate(scenes):
        paths = sorted((data.frames / scene.name).iterdir())
        rows += [f'{scene.name} {place} {number} {scene.name}/{path.name} ""' for number, path in enumerate(paths)]
    write_text(data.frame_lists / f"{split}.csv", "\n".join(rows) + "\n")


def _annotate(folder: Path, split: str, scenes: list[_Scene], height: int, width: int) -> None:
    """Ground truth and predicted boxes of a split, and of the validation what is excluded."""
    excluded = (scenes[-1].name, scenes[-1].seconds[-1]) if split == "val" else None
    truth, predicted = [], []
    for scene in scenes:
        rng = np.random.default_rng([*scene.seed, 2])
        for second in scene.seconds:
            moment = f"{scene.name},{second:04d}"
            for figure in scene.figures:
                if not figure.first <= second <= figure.last:
                    continue
                box = np.clip(np.array(figure.box(second)) / [width, height, width, height], 0, 1)
                if (scene.name, second) != excluded:
                    text = _text(box)
                    truth += [f"{moment},{text},{action},{figure.number}" for action in actions_of(figure, second)]
                sides = np.tile(box[2:] - box[:2], 2)
                found = np.clip(box + rng.normal(0, _JITTER, 4) * sides, 0, 1)
                predicted.append(f"{moment},{_text(found)},,{rng.uniform(0.91, 1):.6f}")
            if rng.random() < _FALSE:
                corner = rng.uniform(0, 0.6, 2)
                found = np.concatenate([corner, corner + rng.uniform(0.15, 0.4, 2)])
                predicted.append(f"{moment},{_text(found)},,{rng.uniform(0.2, 0.85):.6f}")
    write_text(folder / f"ava_{split}_v2.2.csv", "\n".join(truth) + "\n")
    write_text(folder / f"ava_{split}_predicted_boxes.csv", "\n".join(predicted) + "\n")
    if excluded:
        write_text(folder / "ava_val_excluded_timestamps_v2.2.csv", f"{excluded[0]},{excluded[1]:04d}\n")


def actions_of(figure: Figure, second: int) -> list[int]:
    """What a person does at one of its seconds: numbers of the label map, ascending."""
    names = [figure.pose, figure.moves[second - figure.first]]
    names += ["carry"] * figure.carries + ["flash"] * figure.flashes
    return sorted(1 + ACTION_NAMES.index(name) for name in names)


def _text(box: np.ndarray) -> str:
    return ",".join(f"{value:.3f}" for value in box)


def _label_map() -> str:
    items = enumerate(ACTION_NAMES, start=1)
    return "".join(f'item {{\n  name: "{name}"\n  id: {number}\n}}\n' for number, name in items)
