"""Boxes of persons on keyframes, made by a detector: one csv in AVA's form, resumable by video."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from distinit_plugin.data.keyframes import KeyframeDataset
from distinit_plugin.data.loader import build_batch_loader
from distinit_plugin.detection.files import read_boxes, write_rows
from distinit_plugin.detection.geometry import clip_boxes, has_area, to_fractions
from distinit_plugin.detection.joining import join
from distinit_plugin.detection.keyframes import Keyframes, Moment
from distinit_plugin.detection.persons import DETECTRON2, Found, PersonDetector, build_detector
from distinit_plugin.detection.sources import Sources
from distinit_plugin.detection.tables import NO_ACTION, BoxTable
from distinit_plugin.engine.progress import Advance, ProgressView, open_progress
from distinit_plugin.errors import UserError
from distinit_plugin.files import writing_alone
from distinit_plugin.flow.writing import check_device
from distinit_plugin.jobs.extraction import SETTINGS_FILE, settle
from distinit_plugin.jobs.places import Place, listed_moments, moments_between, moments_of
from distinit_plugin.types import BadVideo, Batch, SampleKey, ViewSpec
from distinit_plugin.weights.sources import weights_digest

logger = logging.getLogger(__name__)

PARTS = ".parts"
"""After the name of the output: the folder of what is done, a file for each video, until all is."""


@dataclass
class Detection:
    """What became of the videos.

    Attributes:
        num_boxes: Rows of the csv.
        num_keyframes: Looked at, in this call and before.
        done: Videos of this call.
        skipped: Videos that were done before.
        bad: Keyframes that could not be read.
    """

    num_boxes: int = 0
    num_keyframes: int = 0
    done: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    bad: list[BadVideo] = field(default_factory=list)


@dataclass(frozen=True)
class Reading:
    """How keyframes are read.

    Attributes:
        short_side: Of the pictures that the detector gets, pixels.
        batch_size: Pictures at a time.
        num_workers: Decoding processes.
        timeout: Seconds that a file may take for one keyframe.
    """

    short_side: int = 800
    batch_size: int = 4
    num_workers: int = 0
    timeout: float | None = 60.0


def detect_persons(
    sources: Sources,
    moments: Sequence[Moment],
    detector: PersonDetector,
    output: Path,
    *,
    settings: Mapping[str, str],
    reading: Reading,
    progress: ProgressView,
) -> Detection:
    """Find persons on keyframes.

    A video is done when its part lies beside the output; another call leaves it out. When all videos are done, the
    parts are joined to the output and removed.

    Args:
        sources: Where the pictures are.
        moments: The keyframes.
        detector: Finds persons.
        output: The csv to be: video, second, box as fractions of the picture, -1, score.
        settings: What the boxes depend on, in words; parts that were made otherwise are refused.
        reading: How keyframes are read.
        progress: Shows how far it is.

    Raises:
        UserError: There are no pictures, the output cannot be written, or parts of other settings are there.
    """
    keyframes = Keyframes("keyframes", moments, None, sources)
    if not len(keyframes):
        raise UserError("there are no keyframes to look at. Name others by --keyframes or --seconds.")
    for note in keyframes.notes:
        logger.warning("%s", note)
    parts = Path(f"{output}{PARTS}")
    if parts.is_dir() and any(parts.iterdir()) and not (parts / SETTINGS_FILE).is_file():
        raise UserError(f"{parts} is there and holds other things, but it is where parts of {output} go. Name another.")
    settle(parts, {**settings, "keyframes": keyframes.digest()}, "boxes")
    job = KeyframeDetection(keyframes, detector, reading)
    result = Detection(num_keyframes=len(keyframes))
    with writing_alone(parts, "boxes"):
        with progress.work("detecting", len(keyframes)) as advance:
            _fill(parts, job, result, advance)
        finished = sorted([*result.done, *result.skipped])
        tables = [read_boxes(path) for path in map(parts.joinpath, map(part_name, finished)) if path.stat().st_size]
        joined = join(tables)  # an empty part is of a video without persons
        write_rows(output, joined)
        result.num_boxes = len(joined)
        if len(finished) == len(keyframes.videos):
            shutil.rmtree(parts, ignore_errors=True)
    return result


def _fill(parts: Path, job: KeyframeDetection, result: Detection, advance: Advance) -> None:
    """Make the parts that are missing."""
    keyframes = job.keyframes
    for video, group in groupby(range(len(keyframes)), key=lambda number: keyframes.moment(number).video):
        indices = list(group)
        part = parts / part_name(video)
        if part.is_file():
            result.skipped.append(video)
            advance(indices[-1] + 1)
            continue
        table = job.run(video, indices, result.bad, advance)
        if table is not None:
            write_rows(part, table)
            result.done.append(video)


class Finder(NamedTuple):
    """The detector.

    Attributes:
        arch: See ``detection.persons.build_detector``.
        weights: Likewise; empty: the published ones.
        floor: Least score of a person.
        most: Persons of a keyframe, at most.
        device: Where; empty: a GPU if there is one.
    """

    arch: str = "fasterrcnn_resnet50_fpn"
    weights: str = ""
    floor: float = 0.5
    most: int = 100
    device: str = ""

    def place(self) -> torch.device:
        """Where it runs.

        Raises:
            UserError: There is no such device.
        """
        device = self.device or ("cuda" if torch.cuda.is_available() else "cpu")
        check_device(device)
        return torch.device(device)

    def build(self, short_side: int) -> tuple[PersonDetector, dict[str, str]]:
        """The detector, and what its boxes depend on.

        Raises:
            UserError: There is no such detector or device, or its weights cannot be read.
        """
        zoo = self.arch.startswith(DETECTRON2)
        weights = self.weights or ("" if zoo else "DEFAULT")
        detector = build_detector(
            self.arch, weights, device=self.place(), floor=self.floor, most=self.most, short_side=short_side
        )
        return detector, {
            "detector": self.arch,
            "weights": weights if zoo else weights_digest(f"torchvision/{self.arch}", weights)[:16],
            "floor": str(self.floor),
            "most": str(self.most),
            "short side": str(short_side),
        }


def detect_from_folder(
    place: Place,
    output: Path,
    finder: Finder,
    *,
    keyframe_files: Sequence[str] = (),
    seconds: Sequence[int] | None = None,
    reading: Reading,
    console: Console | None = None,
) -> Detection:
    """Find persons on keyframes of a folder of videos, or of frames; see ``detect_persons``.

    Args:
        place: Where the pictures are.
        output: The csv to be.
        finder: The detector.
        keyframe_files: Ground truth, or rows of video and second: the keyframes.
        seconds: Without such files: first and last of the whole seconds that are looked at; ``None``: all there are.
        reading: How keyframes are read.
        console: Where to print; the standard output when ``None``.

    Raises:
        UserError: Anything that the user can put right.
    """
    finder.place()  # before anything that takes long
    sources, names = place.open()
    bad: list[BadVideo] = []
    if keyframe_files:
        moments = listed_moments(keyframe_files)
    elif seconds is not None:
        moments = moments_between(names, seconds[0], seconds[1])
    else:
        moments, bad = moments_of(sources, names, timeout=reading.timeout)
    detector, settings = finder.build(reading.short_side)
    progress = open_progress(console or Console(), enabled=True, main=True)
    settings["start"] = str(place.start)
    result = detect_persons(sources, moments, detector, output, settings=settings, reading=reading, progress=progress)
    result.bad += bad
    return result


class KeyframeDetection:
    """A detector on keyframes, one video at a time.

    Attributes:
        keyframes: All of them.
    """

    def __init__(self, keyframes: Keyframes, detector: PersonDetector, reading: Reading) -> None:
        """See ``detect_persons``."""
        spec = ViewSpec(num_frames=1, crop_size=reading.short_side, crop="whole")
        self._dataset = KeyframeDataset(
            keyframes,
            {"student/rgb": spec},
            clip_spec=spec,
            split="test",
            seed=0,
            num_classes=1,
            timeout=reading.timeout,
        )
        self._view = spec.pixels
        self._detector = detector
        self._reading = reading
        self.keyframes = keyframes

    def run(self, video: str, indices: Sequence[int], bad: list[BadVideo], advance: Advance) -> BoxTable | None:
        """The persons of one video.

        Args:
            video: Its name.
            indices: Numbers of its keyframes, one after the other.
            bad: Gets those that cannot be read; they are left out.
            advance: Told the number of the keyframe after the last one that is done.

        Returns:
            Its rows; ``None``: none of its keyframes can be read.
        """
        keys = [SampleKey(0, index, index) for index in indices]
        size = self._reading.batch_size
        batches = [keys[start : start + size] for start in range(0, len(keys), size)]
        loader = build_batch_loader(self._dataset, batches, num_workers=self._reading.num_workers)
        seconds: list[float] = []
        boxes: list[np.ndarray] = []
        scores: list[np.ndarray] = []
        read = 0
        for own, batch in zip(batches, loader, strict=True):
            bad += batch["bad"]
            read += len(batch["keys"])
            for key, fractions, chances in self._look(batch):
                seconds += [self.keyframes.moment(key.index).second] * len(fractions)
                boxes.append(fractions)
                scores.append(chances)
            advance(own[-1].index + 1)
        if not read:
            return None
        count = len(seconds)
        return BoxTable(
            (video,),
            np.zeros(count, dtype=np.int32),
            np.array(seconds, dtype=np.float64),
            np.concatenate([np.zeros((0, 4)), *boxes]),
            np.full(count, NO_ACTION, dtype=np.int32),
            np.concatenate([np.zeros(0), *scores]),
        )

    def _look(self, batch: Batch) -> Iterator[tuple[SampleKey, np.ndarray, np.ndarray]]:
        """Keyframe, boxes as fractions of the picture, and scores."""
        if not batch["keys"]:
            return
        pictures: list[Tensor] = [picture[:, 0] for picture in batch["views"][self._view]]
        found: list[Found] = self._detector(pictures)
        for key, region, persons in zip(batch["keys"], batch["regions"], found, strict=True):
            fractions = clip_boxes(to_fractions(persons.boxes.double().numpy(), region), 1.0, 1.0)
            kept = has_area(fractions)
            yield key, fractions[kept], persons.scores.double().numpy()[kept]


def part_name(video: str) -> str:
    """The file of a video's boxes below the folder of parts."""
    return f"{sha256(os.fsencode(video)).hexdigest()[:16]}.csv"
