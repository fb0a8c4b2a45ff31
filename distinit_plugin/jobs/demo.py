"""A video with what a network says of it drawn on it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from rich.console import Console

from distinit_plugin.data.windows import SlidingWindows, Spacing
from distinit_plugin.detection.drawing import Mark, draw
from distinit_plugin.detection.files import read_label_map
from distinit_plugin.engine.features import row_type, rows_of
from distinit_plugin.engine.progress import ProgressView
from distinit_plugin.errors import UserError, VideoError
from distinit_plugin.jobs.demo_boxes import BoxSource, detected, marks_of
from distinit_plugin.jobs.extraction import check_windows, window_batches
from distinit_plugin.jobs.prediction import read_class_names
from distinit_plugin.jobs.session import Session, open_session
from distinit_plugin.jobs.testing import class_names_of
from distinit_plugin.jobs.trained import COMPUTING_KEYS, Trained, read_trained
from distinit_plugin.video.decode import open_video
from distinit_plugin.video.encode import write_mp4
from distinit_plugin.video.source import Frames, FrameSource

BOX_KEYS = ("RPN.WEIGHTS", "RPN.NUM_PROPOSALS", "ROI.NMS")
"""Keys of networks that find boxes which a user may set, too."""

_CLOCK_TOLERANCE = 1e-3
"""Seconds by which time stamps are rounded."""


class Moment(NamedTuple):
    """What is said of a moment of a video; it is shown until the next moment is nearer.

    Attributes:
        seconds: From the first frame of the video.
        marks: Boxes.
        caption: Words on the whole picture.
    """

    seconds: float
    marks: tuple[Mark, ...] = ()
    caption: tuple[str, ...] = ()


@dataclass(frozen=True)
class Shown:
    """What the classes of a demonstration look like.

    Attributes:
        top: Classes of a person, or of the video.
        floor: Least probability of a class that is shown.
        every: Seconds between moments.
    """

    top: int = 5
    floor: float = 0.0
    every: float = 1.0


@dataclass(frozen=True)
class DemoResult:
    """What was written.

    Attributes:
        output: The file.
        num_frames: Its frames: all of the video's.
        moments: What it shows.
    """

    output: Path
    num_frames: int
    moments: list[Moment]


def demo(
    video: str,
    output: Path,
    *,
    checkpoint: str,
    class_file: str = "",
    shown: Shown = Shown(),
    boxes: BoxSource = BoxSource(),  # noqa: B008 (frozen)
    timeout: float = 300.0,
    opts: Sequence[str] = (),
    console: Console | None = None,
) -> DemoResult:
    """Draw on every frame of a video what a trained network sees.

    Args:
        video: A file or a folder of frames.
        output: The ``.mp4`` to be.
        checkpoint: Of this program, or converted, with a classifier.
        class_file: Names of the classes: one per line, or AVA's label map (``.pbtxt``); empty: of the checkpoint.
        shown: What is drawn, and how often it changes.
        boxes: Where boxes come from, of a network that classifies boxes and does not find them.
        timeout: Seconds that the video may take to be indexed, and to give the next frame.
        opts: ``KEY VALUE …`` of the keys in :mod:`.trained` or :data:`BOX_KEYS` instead of what the checkpoint says.
        console: Where to print; the standard output when ``None``.

    Raises:
        UserError: The video, checkpoint or a file cannot be read, or the output cannot be written.
    """
    if output.suffix.lower() != ".mp4":
        raise UserError(f"{output}: the demonstration is written as .mp4. Name such a file.")
    trained = read_trained(checkpoint, opts, more_keys=(*BOX_KEYS, *COMPUTING_KEYS), boxes=True)
    if not trained.has_classifier:
        raise UserError(f"{checkpoint} has no classifier, so there is nothing to show. Fine-tune it on labels first.")
    names = class_names_of(_names(class_file, trained), trained.num_classes)
    with open_session(trained.cfg, log_to_folder=False, console=console) as session:
        try:
            with open_video(video, timeout=timeout) as source:
                _refuse_own_file(video, output)
                if trained.cfg.DETECTION.ENABLE:
                    moments = _persons(session, trained, video, source, names, shown, boxes, timeout)
                else:
                    moments = _classified(session, trained, source, names, shown)
            with open_video(video, timeout=timeout) as source:
                reach = shown.every / 2 if trained.cfg.DETECTION.ENABLE else math.inf
                count = draw_moments(source, output, moments, session.progress, reach=reach)
        except VideoError as error:
            raise UserError(f"{error}.") from error
    return DemoResult(output, count, moments)


def _names(class_file: str, trained: Trained) -> list[str]:
    """Names of the classes; of a label map that of number k at place k − 1."""
    if not class_file:
        return trained.class_names
    if Path(class_file).suffix.lower() != ".pbtxt":
        return read_class_names(class_file, trained.num_classes)
    known = read_label_map(class_file)
    return [known.get(number, str(number)) for number in range(1, trained.num_classes + 1)]


def _persons(
    session: Session,
    trained: Trained,
    video: str,
    source: FrameSource,
    names: Sequence[str],
    shown: Shown,
    boxes: BoxSource,
    timeout: float,
) -> list[Moment]:
    """Boxes of persons with what they do."""
    keyframes, table = detected(
        session, trained, video, source.index, boxes, every=shown.every, floor=shown.floor, timeout=timeout
    )
    start = keyframes.sources.start
    return [
        Moment(second - start, marks_of(table, np.flatnonzero(table.seconds == second), names, shown.top))
        for second in keyframes.seconds.tolist()
    ]


def _refuse_own_file(video: str, output: Path) -> None:
    if output.exists() and Path(video).exists() and output.samefile(video):
        raise UserError(f"{output} is the video itself. Name another file to write.")


def _classified(
    session: Session, trained: Trained, source: FrameSource, names: Sequence[str], shown: Shown
) -> list[Moment]:
    """The best classes of windows around moments of the video."""
    network = trained.network()
    check_windows(trained.path, network)
    specs = dict(network.view_specs("test"))
    session.check_convolutions(network, specs)
    module = session.place(network)
    spacing = Spacing(per_second=1 / shown.every)
    windows = SlidingWindows(source, specs, spacing, test_scale=trained.cfg.CORPUS.TEST_SCALE)
    moments = []
    with session.progress.work("looking", len(windows)) as advance:
        batches = window_batches(windows, trained.cfg.TEST.BATCH_SIZE, session.finisher(specs), advance)
        dtype = row_type({"logits": trained.num_classes})
        for rows in rows_of(module, batches, ["logits"], dtype, autocast=session.precision.autocast):
            for row in rows:
                middle = float(row["start"] + row["end"]) / 2
                moments.append(Moment(middle, caption=_best(_softmax(row["logits"]), names, shown)))
    return moments


def _softmax(logits: np.ndarray) -> np.ndarray:
    """(K,) → (K,) float64."""
    powers = np.exp(logits.astype(np.float64) - float(logits.max()))
    return np.asarray(powers / powers.sum())


def _best(probabilities: np.ndarray, names: Sequence[str], shown: Shown) -> tuple[str, ...]:
    """A line for each of the best classes."""
    best = np.argsort(-probabilities, kind="stable")[: shown.top]
    return tuple(f"{names[k]} {probabilities[k]:.2f}" for k in best if probabilities[k] >= shown.floor)


def draw_moments(
    source: FrameSource, output: Path, moments: Sequence[Moment], progress: ProgressView, *, reach: float = math.inf
) -> int:
    """Write every frame of a video at its own time, with the nearest of some moments drawn on it.

    Args:
        source: The video.
        output: The ``.mp4`` to be.
        moments: At least one, by increasing time.
        progress: Shows how far it is.
        reach: Seconds that a moment is shown before and after it, at most.

    Returns:
        The number of frames.

    Raises:
        UserError: The output cannot be written.
        VideoError: A frame cannot be decoded.
    """
    seconds = source.index.seconds - source.index.seconds[0]
    centres = np.array([moment.seconds for moment in moments])
    nearest = np.searchsorted((centres[1:] + centres[:-1]) / 2, seconds, side="right")

    def pictures() -> Iterator[tuple[float, Frames]]:
        with progress.work("drawing", len(seconds)) as advance:
            for number, frame in enumerate(source.stream(np.arange(len(seconds)))):
                moment = moments[nearest[number]]
                if abs(moment.seconds - seconds[number]) > reach + _CLOCK_TOLERANCE:
                    moment = Moment(moment.seconds)
                yield float(seconds[number]), draw(frame, moment.marks, moment.caption)
                advance(number + 1)

    return write_mp4(output, pictures())
