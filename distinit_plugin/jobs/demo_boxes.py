"""What a demonstration shows of a network that says what each person does."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from distinit_plugin import build
from distinit_plugin.data.keyframes import KeyframeDataset
from distinit_plugin.data.loader import build_batch_loader
from distinit_plugin.detection.drawing import Mark
from distinit_plugin.detection.files import read_boxes
from distinit_plugin.detection.joining import overlap, select
from distinit_plugin.detection.keyframes import Keyframes
from distinit_plugin.detection.keyframes import Moment as Instant
from distinit_plugin.detection.persons import build_detector
from distinit_plugin.detection.results import Selection
from distinit_plugin.detection.tables import BoxTable
from distinit_plugin.engine.detect import detect
from distinit_plugin.errors import UserError
from distinit_plugin.jobs.persons import KeyframeDetection, Reading
from distinit_plugin.jobs.session import Session
from distinit_plugin.jobs.trained import Trained
from distinit_plugin.types import Batch, SampleKey
from distinit_plugin.video.decode import open_video
from distinit_plugin.video.index import FrameIndex, IndexCache
from distinit_plugin.video.source import FrameSource

SAME_PERSON = 0.6
"""Boxes that overlap by more (intersection over union) are drawn as one person's."""


@dataclass(frozen=True)
class BoxSource:
    """Where the boxes come from that a network without proposals of its own is asked about.

    Attributes:
        file: Boxes in AVA's form, of a video of this name; empty: there is none.
        start: Time stamp of the first picture in that file, seconds.
        detector: Of persons, see ``detection.persons.build_detector``.
        weights: Its weights; empty: there is no detector.
        floor: Least score of a person.
    """

    file: str = ""
    start: float = 0.0
    detector: str = "fasterrcnn_resnet50_fpn"
    weights: str = ""
    floor: float = 0.7


class OneVideo:
    """A single video as a source of keyframes."""

    start = 0.0

    def __init__(self, path: str, start: float = 0.0) -> None:
        """``start``: time stamp of the first picture."""
        self._path = path
        self.start = start

    def path(self, name: str) -> str:
        """The video, whatever its name."""
        return self._path

    def has(self, name: str) -> bool:
        """It is there."""
        return True

    def open(self, name: str, second: float, *, cache: IndexCache | None, timeout: float | None) -> FrameSource:
        """See ``Sources``."""
        return open_video(self._path, cache=cache, timeout=timeout)


def instants(name: str, index: FrameIndex, every: float) -> list[Instant]:
    """Times at which a video is looked at: ``every`` so many seconds, and its last frame where that is far from one."""
    length = float(index.seconds[-1] - index.seconds[0])
    times = np.arange(0.0, length + 1e-6, every)
    if length - times[-1] > every / 2:
        times = np.append(times, length)
    return [Instant(name, float(second)) for second in times]


def detected(
    session: Session,
    trained: Trained,
    video: str,
    index: FrameIndex,
    boxes: BoxSource,
    *,
    every: float,
    floor: float,
    timeout: float,
) -> tuple[Keyframes, BoxTable]:
    """What persons do at moments of a video.

    Args:
        session: Where and how.
        trained: The network.
        video: A file or a folder of frames.
        index: Its frames.
        boxes: Where boxes come from, if the network does not find them.
        every: Seconds between moments; with a file of boxes its moments count.
        floor: Least score of an action.
        timeout: Seconds that the video may take for a moment.

    Returns:
        The moments, and rows of box × action.

    Raises:
        UserError: There are no boxes, or a file is wrong.
    """
    cfg, network = trained.cfg, trained.network()
    specs = dict(network.view_specs("test"))
    session.check_convolutions(network, specs)
    proposes = cfg.ROI.PROPOSALS != "given"
    if proposes:
        keyframes = Keyframes("video", instants(Path(video).stem, index, every), None, OneVideo(video))
    else:
        keyframes = _given(session, video, index, boxes, every, timeout)
    dataset = KeyframeDataset(
        keyframes,
        build.view_specs(network, {}, "test"),
        clip_spec=next(iter(specs.values())),
        split="test",
        seed=cfg.RNG_SEED,
        num_classes=cfg.MODEL.NUM_CLASSES,
        timeout=timeout,
    )
    found = detect(
        session.place(network),
        _batches(session, dataset, cfg.TEST.BATCH_SIZE),
        finish=session.finisher(specs),
        num_keyframes=len(keyframes),
        given=None if proposes else keyframes.boxes,
        selection=Selection(floor=floor, nms=cfg.ROI.NMS if proposes else 1.0),
        device=session.device,
        autocast=session.precision.autocast,
    )
    return keyframes, found.detections.table(keyframes.videos, keyframes.video, keyframes.seconds)


def _batches(session: Session, dataset: KeyframeDataset, size: int) -> Iterator[Batch]:
    """All keyframes in their order, with a progress bar."""
    keys = [SampleKey(0, number, number) for number in range(len(dataset))]
    loader = build_batch_loader(dataset, [keys[first : first + size] for first in range(0, len(keys), size)])
    with session.progress.work("looking", len(keys)) as advance:
        for number, batch in enumerate(loader, start=1):
            yield batch
            advance(min(number * size, len(keys)))


def _given(
    session: Session, video: str, index: FrameIndex, boxes: BoxSource, every: float, timeout: float
) -> Keyframes:
    """Moments with boxes of a file or a detector."""
    name = Path(video).stem
    if boxes.file:
        table = read_boxes(boxes.file)
        own = [place for place, known in enumerate(table.videos) if known == name]
        table = select(table, np.isin(table.video, own) & (table.scores >= boxes.floor))
        if not len(table):
            raise UserError(
                f"--boxes: {boxes.file} has no box of a video named '{name}' with a score of at least {boxes.floor:g}. "
                "Name another file, or lower --box-floor."
            )
        moments = [Instant(name, second) for second in np.unique(table.seconds).tolist()]
        return Keyframes(boxes.file, moments, table, OneVideo(video, boxes.start), has_actions=False)
    if not boxes.weights:
        raise UserError(
            "this network classifies boxes and does not find them: give boxes by --boxes FILE.csv, or a detector of "
            "persons by --detector-weights (COCO_V1, or a file)."
        )
    sources = OneVideo(video)
    detector = build_detector(boxes.detector, boxes.weights, device=session.device, floor=boxes.floor)
    empty = Keyframes("video", instants(name, index, every), None, sources)
    with session.progress.work("detecting", len(empty)) as advance:
        finder = KeyframeDetection(empty, detector, Reading(timeout=timeout))
        found = finder.run(name, range(len(empty)), [], advance)
    moments = [empty.moment(number) for number in range(len(empty))]
    return Keyframes("video", moments, found, sources, has_actions=False)


def marks_of(table: BoxTable, rows: npt.NDArray[np.int64], names: Sequence[str], top: int) -> tuple[Mark, ...]:
    """Persons with the best of their actions, the surest first.

    Rows whose boxes are nearly the same are of one person: per-class suppression keeps a box for each action.

    Args:
        table: Box × action.
        rows: Those of one moment.
        names: Name of each action, the first has number 1.
        top: Actions of a person, at most.
    """
    left = rows[np.argsort(-table.scores[rows], kind="stable")]
    marks = []
    while len(left):
        box = table.boxes[left[0]]
        own = overlap(np.repeat(box[None], len(left), axis=0), table.boxes[left]) >= SAME_PERSON
        own[0] = True
        actions: dict[int, float] = {}
        for row in left[own].tolist():
            actions.setdefault(int(table.actions[row]), float(table.scores[row]))
        shown = list(actions.items())[:top]
        lines = tuple(f"{names[action - 1]} {score:.2f}" for action, score in shown)
        x1, y1, x2, y2 = box.tolist()
        marks.append(Mark((x1, y1, x2, y2), lines, shown[0][0]))
        left = left[~own]
    return tuple(marks)
