"""Annotated moments of videos: which there are, the boxes of each, and what the person in a box does."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from distinit_plugin.detection.geometry import Boxes
from distinit_plugin.detection.joining import inside_frame, join, label_by_overlap, select, unique_rows
from distinit_plugin.detection.sources import Sources
from distinit_plugin.detection.tables import NO_ACTION, BoxTable
from distinit_plugin.errors import UserError
from distinit_plugin.video.records import VideoRecord, shorten

AVA_SECONDS = (902.0, 1798.0)
"""First and last time stamp that AVA annotates."""


class Moment(NamedTuple):
    """Names a keyframe."""

    video: str
    second: float


class Keyframes:
    """Keyframes with boxes, packed into arrays: nothing is copied when a worker process is forked.

    As a sequence of records it is one corpus: a keyframe's ``path`` is its video's.

    Attributes:
        name: How messages call it.
        videos: Names of the videos.
        video: (k,) int32: place in ``videos`` of each keyframe. Keyframes are sorted by it, then by time.
        seconds: (k,) float64 time stamps.
        sources: Where the pictures are.
        class_names: Name of each class, where a label map is given.
        has_boxes: There are boxes; otherwise the network has to find them.
        has_actions: The boxes come with actions.
        notes: Sentences for the log.
    """

    def __init__(
        self,
        name: str,
        moments: Sequence[Moment],
        table: BoxTable | None,
        sources: Sources,
        *,
        class_names: list[str] | None = None,
        has_actions: bool = True,
        notes: Iterable[str] = (),
    ) -> None:
        """Pack rows.

        Rows of a keyframe with equal boxes are one box that does several things (as in PySlowFast, which compares the
        text of a file, and unlike PyTorchVideo, which rounds to two decimals and so joins people).

        Args:
            name: How messages call it.
            moments: The keyframes, each once.
            table: Boxes, those of other keyframes included; ``None``: keyframes have none.
            sources: Where the pictures are.
            class_names: Name of each class.
            has_actions: Give the boxes' actions as well.
            notes: Sentences for the log.
        """
        self.name = name
        self.sources = sources
        self.class_names = class_names
        self.has_boxes = table is not None
        self.has_actions = has_actions and table is not None
        self.notes = list(notes)
        self.videos = tuple(sorted({moment.video for moment in moments}))
        places = {video: place for place, video in enumerate(self.videos)}
        order = sorted((places[moment.video], moment.second) for moment in moments)
        self.video = np.array([video for video, _ in order], dtype=np.int32)
        self.seconds = np.array([second for _, second in order], dtype=np.float64)
        self._pack(table)
        absent = [video for video in self.videos if not sources.has(video)]
        if self.videos and len(absent) == len(self.videos):
            raise UserError(
                f"{name}: there are no pictures of any of its {len(self.videos)} videos, for example none at "
                f"{sources.path(absent[0])}. Correct KEYFRAMES.VIDEO_DIR (or AVA.FRAME_DIR and AVA.FRAME_LIST_DIR)."
            )
        if absent:
            self.notes.append(
                f"{len(absent)} of {len(self.videos)} videos are annotated but have no pictures: "
                f"{shorten(absent)}. Their keyframes count as bad."
            )

    def __len__(self) -> int:
        return len(self.video)

    def __getitem__(self, index: int) -> VideoRecord:
        return VideoRecord(self.sources.path(self.moment(index).video), None)

    @property
    def sizes(self) -> tuple[int]:
        """Number of keyframes, as of a mixture of one corpus."""
        return (len(self),)

    @property
    def digests(self) -> tuple[str]:
        """Tells lists of keyframes, boxes and actions from one another, as ``Mixture.digests``."""
        digest = sha256(self.digest().encode())
        for values in (self._starts, self._boxes, self._action_starts, self._actions):
            digest.update(values.tobytes())
        return (digest.hexdigest()[:16],)

    def digest(self) -> str:
        """Tells lists of keyframes from one another."""
        digest = sha256("\n".join(self.videos).encode("utf-8", "surrogateescape"))
        digest.update(self.video.tobytes())
        digest.update(self.seconds.tobytes())
        return digest.hexdigest()[:16]

    @property
    def weights(self) -> tuple[float]:
        """The share of that corpus."""
        return (1.0,)

    @property
    def num_videos(self) -> int:
        """Number of videos that they are of."""
        return len(self.videos)

    @property
    def num_boxes(self) -> int:
        """Boxes of all keyframes."""
        return len(self._boxes)

    def locate(self, index: int) -> tuple[int, int]:
        """See ``Mixture.locate``: there is one corpus."""
        return 0, index

    def moment(self, index: int) -> Moment:
        """The video and the time stamp of a keyframe."""
        if not 0 <= index < len(self):
            raise IndexError(f"there are {len(self)} keyframes, there is no number {index}")
        return Moment(self.videos[self.video[index]], float(self.seconds[index]))

    def boxes(self, index: int) -> Boxes:
        """(n,4) the boxes of a keyframe as fractions of the picture, as its file has them."""
        return self._boxes[self._starts[index] : self._starts[index + 1]]

    def actions(self, index: int, num_classes: int) -> npt.NDArray[np.float32]:
        """(n, num_classes) what the person in each box does: 1 in column k for action k + 1."""
        first, last = self._starts[index], self._starts[index + 1]
        result = np.zeros((last - first, num_classes), dtype=np.float32)
        begin, end = self._action_starts[first], self._action_starts[last]
        rows = np.repeat(np.arange(last - first), np.diff(self._action_starts[first : last + 1]))
        result[rows, self._actions[begin:end] - 1] = 1.0
        return result

    def check_labels(self, num_classes: int) -> None:
        """Refuse actions that a classifier with ``num_classes`` outputs does not have.

        Raises:
            UserError: An action is not 1 … ``num_classes``; the first few are named.
        """
        wrong = np.flatnonzero((self._actions < 1) | (self._actions > num_classes))
        if not len(wrong):
            return
        boxes = np.searchsorted(self._action_starts, wrong, side="right") - 1
        moments = [self.moment(int(place)) for place in np.searchsorted(self._starts, boxes[:6], side="right") - 1]
        named = [
            f"{moment.video} at {moment.second:g} s has {self._actions[row]}"
            for moment, row in zip(moments, wrong, strict=False)
        ]
        raise UserError(
            f"{self.name}: {len(wrong)} actions do not fit MODEL.NUM_CLASSES {num_classes} (actions are 1 to "
            f"{num_classes}): {shorten(named, len(wrong))}. Set MODEL.NUM_CLASSES to at least "
            f"{int(self._actions.max())}, or correct the file."
        )

    def _pack(self, table: BoxTable | None) -> None:
        """Boxes by keyframe, and actions by box."""
        table = table or join([])
        keyframe = self._keyframes_of(table)
        held = select(table, keyframe >= 0)
        keyframe = keyframe[keyframe >= 0]
        # Boxes stay in the order of their first rows, which decides nothing but is easier to compare with the file.
        keys = np.column_stack([keyframe.astype(np.float64), held.boxes])
        first, box = unique_rows(keys)
        rank = np.empty(len(first), dtype=np.int64)
        order = np.lexsort((first, keyframe[first]))
        rank[order] = np.arange(len(first))
        box = rank[box]
        self._boxes = held.boxes[first[order]]
        self._starts = np.searchsorted(keyframe[first[order]], np.arange(len(self) + 1))
        pairs = np.column_stack([box, held.actions])[held.actions != NO_ACTION]
        pairs = pairs[unique_rows(pairs)[0]]
        self._actions = pairs[:, 1].astype(np.int32)
        self._action_starts = np.searchsorted(pairs[:, 0], np.arange(len(first) + 1))

    def _keyframes_of(self, table: BoxTable) -> npt.NDArray[np.int64]:
        """(n,) the keyframe of each row, −1: none."""
        places = {video: place for place, video in enumerate(self.videos)}
        video = np.array([places.get(name, -1) for name in table.videos] or [-1], dtype=np.int64)[table.video]
        result = np.full(len(table), -1, dtype=np.int64)
        bounds = np.searchsorted(self.video, np.arange(len(self.videos) + 1))
        for place in np.unique(video[video >= 0]):
            rows = np.flatnonzero(video == place)
            seconds = self.seconds[bounds[place] : bounds[place + 1]]
            found = np.minimum(np.searchsorted(seconds, table.seconds[rows]), len(seconds) - 1)
            result[rows] = np.where(seconds[found] == table.seconds[rows], found + bounds[place], -1)
        return result


@dataclass(frozen=True)
class Choice:
    """Which keyframes of some files are used.

    Attributes:
        first: The first time stamp, seconds.
        last: The last one.
        every: Only seconds that it divides; 0: all.
        excluded: (video, second) that are left out.
    """

    first: float = AVA_SECONDS[0]
    last: float = AVA_SECONDS[1]
    every: int = 0
    excluded: Collection[tuple[str, float]] = frozenset()

    def moments(self, table: BoxTable, *, empty: bool = False) -> list[Moment]:
        """The keyframes of a table's rows; with ``empty`` those without boxes, too."""
        stamps = np.column_stack([table.video.astype(np.float64), table.seconds])
        if empty:
            stamps = np.concatenate([stamps, table.keyframes])
        stamps = stamps[unique_rows(stamps)[0]]
        seconds = stamps[:, 1]
        kept = (seconds >= self.first) & (seconds <= self.last)
        if self.every:
            kept &= seconds % self.every == 0
        moments = (Moment(table.videos[int(video)], float(second)) for video, second in stamps[kept])
        return [moment for moment in moments if moment not in self.excluded]


def training_keyframes(
    name: str,
    truth: Sequence[BoxTable],
    predicted: Sequence[BoxTable],
    sources: Sources,
    *,
    choice: Choice,
    least_score: float,
    label_iou: float = 0.0,
    class_names: list[str] | None = None,
) -> Keyframes:
    """All keyframes with boxes: annotated and predicted ones together, as PySlowFast joins them.

    Args:
        name: How messages call the files.
        truth: Annotated boxes.
        predicted: Boxes of a detector, with or without actions.
        sources: Where the pictures are.
        choice: Which keyframes.
        least_score: Predicted boxes below this score are left out.
        label_iou: Predicted boxes without actions take those of the annotated box that they overlap by at least this
            much, and are left out where there is none; 0: they stay without actions.
        class_names: Name of each class.

    Raises:
        UserError: There is no box, or none is left.
    """
    known, found = join(truth), join(predicted)
    left = [f"{len(known)} annotated rows", f"{len(found)} predicted ones"]
    found = _confident(found, least_score, left)
    if label_iou:
        found = label_by_overlap(found, known, label_iou)
        left.append(f"{len(found)} with actions (KEYFRAMES.LABEL_IOU {label_iou:g})")
    table, notes = _inside(join([known, found]))
    moments = _some(name, choice.moments(table), choice, left)
    return Keyframes(name, moments, table, sources, class_names=class_names, notes=notes)


def evaluated_keyframes(
    name: str,
    table: BoxTable,
    sources: Sources,
    *,
    choice: Choice,
    boxes: Literal["predicted", "ground_truth", "none"],
    least_score: float = 0.0,
    class_names: list[str] | None = None,
) -> Keyframes:
    """The keyframes of a validation or test.

    Args:
        name: How messages call the file.
        table: Predicted boxes, or annotated ones.
        sources: Where the pictures are.
        choice: Which keyframes.
        boxes: ``predicted``: keyframes with boxes of at least ``least_score``. ``ground_truth``: with annotated boxes,
            which come with their actions. ``none``: all keyframes of the annotation, without their boxes.
        least_score: See ``boxes``.
        class_names: Name of each class.

    Raises:
        UserError: There is no box, or none is left.
    """
    left = [f"{len(table)} rows"]
    if boxes == "predicted":
        table = _confident(table, least_score, left)
    shown, notes = _inside(table)
    moments = choice.moments(table, empty=True) if boxes == "none" else choice.moments(shown)
    return Keyframes(
        name,
        _some(name, moments, choice, left),
        None if boxes == "none" else shown,
        sources,
        class_names=class_names,
        has_actions=boxes == "ground_truth",
        notes=notes,
    )


def _confident(table: BoxTable, least_score: float, left: list[str]) -> BoxTable:
    """The rows with enough score; their number is added to ``left``."""
    table = select(table, table.scores >= least_score)
    left.append(f"{len(table)} with a score of at least {least_score:g} (AVA.DETECTION_SCORE_THRESH)")
    return table


def _inside(table: BoxTable) -> tuple[BoxTable, list[str]]:
    """The rows whose boxes are in the picture, and a note on the others."""
    kept = inside_frame(table)
    lost = len(table) - len(kept)
    return kept, [f"{lost} of {len(table)} boxes are empty or outside the picture; they are left out."] * bool(lost)


def _some(name: str, moments: list[Moment], choice: Choice, left: list[str]) -> list[Moment]:
    """``moments``, unless there are none.

    Raises:
        UserError: There are none; ``left`` says what was there.
    """
    if moments:
        return moments
    every = f", divisible by {choice.every} (see AVA.FULL_TEST_ON_VAL)" if choice.every else ""
    raise UserError(
        f"{name}: no keyframe is left. Of it: {', '.join(left)}; used are boxes inside the picture at seconds "
        f"{choice.first:g} to {choice.last:g} (KEYFRAMES.SECONDS){every} that AVA.EXCLUSION_FILE does not name."
    )
