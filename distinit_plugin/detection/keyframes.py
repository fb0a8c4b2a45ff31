"""Annotated moments of videos: which there are, the boxes of each, and what the person in a box does."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from distinit_plugin.detection.geometry import Boxes, clip_boxes, has_area
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
    def weights(self) -> tuple[float]:
        """The share of that corpus."""
        return (1.0,)

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
        _, first, box = np.unique(keys, axis=0, return_index=True, return_inverse=True)
        rank = np.empty(len(first), dtype=np.int64)
        order = np.lexsort((first, keyframe[first]))
        rank[order] = np.arange(len(first))
        box = rank[box.reshape(-1)]
        self._boxes = held.boxes[first[order]]
        self._starts = np.searchsorted(keyframe[first[order]], np.arange(len(self) + 1))
        pairs = np.unique(np.column_stack([box, held.actions])[held.actions != NO_ACTION], axis=0)
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


# ----------------------------------------------------------------------------------------------------- tables of boxes
def join(tables: Sequence[BoxTable]) -> BoxTable:
    """The rows of several tables, one after the other."""
    videos = tuple(sorted({video for table in tables for video in table.videos}))
    places = {video: place for place, video in enumerate(videos)}
    maps = [np.array([places[video] for video in table.videos], dtype=np.int32) for table in tables]
    empty = [table.keyframes.copy() for table in tables]
    for keyframes, places_of in zip(empty, maps, strict=True):
        keyframes[:, 0] = places_of[keyframes[:, 0].astype(np.int64)]
    return BoxTable(
        videos,
        _joined([new[table.video] for new, table in zip(maps, tables, strict=True)], np.int32),
        _joined([table.seconds for table in tables], np.float64),
        _joined([table.boxes for table in tables], np.float64, 4),
        _joined([table.actions for table in tables], np.int32),
        _joined([table.scores for table in tables], np.float64),
        _joined(empty, np.float64, 2),
    )


def _joined(parts: list[npt.NDArray[Any]], dtype: npt.DTypeLike, *width: int) -> npt.NDArray[Any]:
    return np.concatenate([np.zeros((0, *width), dtype), *parts]).astype(dtype, copy=False)


def select(table: BoxTable, rows: npt.NDArray[Any]) -> BoxTable:
    """Some rows of a table, by number or by mask; keyframes without boxes stay."""
    columns = (table.video, table.seconds, table.boxes, table.actions, table.scores)
    return BoxTable(table.videos, *(column[rows] for column in columns), table.keyframes)


def inside_frame(table: BoxTable) -> BoxTable:
    """The rows whose box is one, and of which something lies in the picture."""
    return select(table, has_area(table.boxes) & has_area(clip_boxes(table.boxes, 1.0, 1.0)))


def label_by_overlap(boxes: BoxTable, truth: BoxTable, least_iou: float) -> BoxTable:
    """Give boxes without actions those of the annotated box that overlaps most; boxes without such a one are left out.

    Args:
        boxes: Of a detector; rows with actions are kept as they are.
        truth: Annotated boxes.
        least_iou: Intersection over union that is enough, (0, 1].

    Returns:
        The rows of ``boxes`` that have actions, then one row for each action of the others.
    """
    both = join([boxes, truth])
    _, key = np.unique(np.column_stack([both.video, both.seconds]), axis=0, return_inverse=True)
    open_rows = np.flatnonzero(boxes.actions == NO_ACTION)
    known = len(boxes) + np.flatnonzero(truth.actions != NO_ACTION)
    known = known[np.argsort(key[known], kind="stable")]
    begin, end = (np.searchsorted(key[known], key[open_rows], side=side) for side in ("left", "right"))
    counts = end - begin
    open_rows, begin, counts = open_rows[counts > 0], begin[counts > 0], counts[counts > 0]
    firsts = np.cumsum(counts) - counts
    pair = np.repeat(np.arange(len(open_rows)), counts)
    partner = known[np.repeat(begin - firsts, counts) + np.arange(counts.sum())]
    iou = overlap(both.boxes[open_rows][pair], both.boxes[partner])
    best = np.maximum.reduceat(iou, firsts) if len(iou) else iou
    taken = (iou >= least_iou) & (iou == best[pair])
    found = select(boxes, open_rows[pair[taken]])
    labelled = replace(found, actions=both.actions[partner[taken]])
    return join([select(boxes, boxes.actions != NO_ACTION), labelled])


def overlap(first: Boxes, second: Boxes) -> npt.NDArray[np.float64]:
    """(n,) intersection over union of pairs of boxes (n,4)."""
    low, high = np.maximum(first[:, :2], second[:, :2]), np.minimum(first[:, 2:], second[:, 2:])
    common = np.clip(high - low, 0.0, None).prod(axis=1)
    areas = [(boxes[:, 2:] - boxes[:, :2]).prod(axis=1) for boxes in (first, second)]
    shares: npt.NDArray[np.float64] = common / np.maximum(areas[0] + areas[1] - common, np.finfo(np.float64).tiny)
    return shares
