"""Which detections claim which ground-truth boxes, in which order: right and wrong, for frame-mAP."""

from __future__ import annotations

import heapq
import math
from operator import itemgetter
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from distinit_plugin.detection.tables import BoxTable
from distinit_plugin.detection.variants import Variant

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.floating[Any]]
Mask = npt.NDArray[np.bool_]

MIN_IOU = 0.5

_PAIRS_AT_ONCE = 1_000_000
"""Pairs of a detection and a ground-truth box that are compared at once."""

_KEYFRAMES_AT_ONCE = 2_000
"""Keyframes with equal scores whose rows are Python objects at once."""


class Rows(NamedTuple):
    """Rows of a table whose actions count."""

    keyframe: Ints  # (n,)
    action: Ints  # (n,) places among the counted actions
    boxes: Floats  # (n,4)
    scores: Floats  # (n,)

    def take(self, places: Ints | Mask) -> Rows:
        """Some of the rows."""
        return Rows(self.keyframe[places], self.action[places], self.boxes[places], self.scores[places])


def truth_order(rows: Rows, truth: BoxTable, counted: Mask, rules: Variant) -> Ints:
    """The order in which boxes of one keyframe and action stand; rows of one keyframe stand together."""
    if not rules.persons_sort:
        return np.argsort(rows.keyframe, kind="stable")
    persons = np.ones(len(counted)) if truth.persons is None else truth.persons.astype(np.float64)
    rows = rows._replace(scores=persons[counted])
    order = np.lexsort((-rows.scores, rows.keyframe))
    if rules.heaps:
        _settle_ties(order, rows, rows.keyframe[order], 0)
    return order


def claim_order(rows: Rows, first: Ints, rules: Variant) -> tuple[Ints, int]:
    """The detections that stay, keyframe after keyframe in the order in which they claim; how many do not."""
    rank = first[rows.keyframe]
    if not rules.sorts:
        return np.argsort(rank, kind="stable"), 0
    order = np.lexsort((-rows.scores, rank))
    rank = rank[order]
    if rules.heaps:
        _settle_ties(order, rows, rank, rules.capacity)
    if not rules.capacity:
        return order, 0
    stays = _places_within(rank) < rules.capacity
    return order[stays], int((~stays).sum())


def _places_within(groups: Ints) -> Ints:
    """(n,) the place of each row within its group, where equal groups stand together."""
    starts = np.flatnonzero(np.diff(groups, prepend=-1))
    return np.arange(len(groups)) - np.repeat(starts, np.diff(starts, append=len(groups)))


def _settle_ties(order: Ints, rows: Rows, keyframe: Ints, capacity: int) -> None:
    """Put keyframes in which scores are equal into the order that the official code gives them, in place.

    It feeds the rows of a keyframe to a heap of at most ``capacity`` entries, which decides both which of several equal
    scores stay and in which order they stand. Only equal scores among the first ``capacity`` + 1 matter.

    Args:
        order: (n,) places in ``rows``, by keyframe and falling score.
        rows: The rows.
        keyframe: (n,) what tells the keyframes of ``order`` apart.
        capacity: Entries of the heap; 0: no limit.
    """
    scores = rows.scores[order]
    tied = (keyframe[1:] == keyframe[:-1]) & (scores[1:] == scores[:-1])
    if capacity:
        tied &= _places_within(keyframe)[:-1] < capacity
    bounds = np.append(np.flatnonzero(np.diff(keyframe, prepend=-1)), len(keyframe))
    unsettled = np.unique(np.searchsorted(bounds, np.flatnonzero(tied), side="right") - 1)
    for some in np.array_split(unsettled, math.ceil(len(unsettled) / _KEYFRAMES_AT_ONCE)) if len(unsettled) else ():
        _settle(order, rows, bounds[some], bounds[some + 1], capacity)


def _settle(order: Ints, rows: Rows, starts: Ints, ends: Ints, capacity: int) -> None:
    """The same for the parts of ``order`` that keyframes with ties have."""
    sizes = ends - starts
    firsts = np.cumsum(sizes) - sizes
    spots = np.arange(int(sizes.sum())) + np.repeat(starts - firsts, sizes)
    keyframe = np.repeat(np.arange(len(sizes)), sizes)
    places = order[spots][np.lexsort((order[spots], keyframe))]  # each keyframe's rows in the table's order
    part = rows.take(places)
    columns = (part.scores, part.action, *part.boxes[:, [1, 0, 3, 2]].T)
    entries = list(zip(*(column.tolist() for column in columns), strict=True))
    numbers = places.tolist()
    for start, first, size in zip(starts.tolist(), firsts.tolist(), sizes.tolist(), strict=True):
        own = entries[first : first + size]
        heap = _heaped(own, capacity)
        heap.sort(key=itemgetter(0), reverse=True)
        place = dict(zip(own, numbers[first : first + size], strict=True))  # of equal rows, any serves
        order[start : start + len(heap)] = [place[entry] for entry in heap]


def _heaped(entries: list[tuple[Any, ...]], capacity: int) -> list[tuple[Any, ...]]:
    """The layout of a heap after entries came one by one, each pushing out the least when it is full and has less."""
    heap: list[tuple[Any, ...]] = []
    for entry in entries:
        if not capacity or len(heap) < capacity:
            heapq.heappush(heap, entry)
        elif entry[0] > heap[0][0]:
            heapq.heapreplace(heap, entry)
    return heap


def are_right(rows: Rows, target: Rows) -> Mask:
    """(n,) whether each detection, in the order in which they claim, claims a box first."""
    best = _best(rows, target)
    claims = np.flatnonzero(best >= 0)
    _, first = np.unique(best[claims], return_index=True)
    right = np.zeros(len(best), bool)
    right[claims[first]] = True
    return right


def _best(rows: Rows, target: Rows) -> Ints:
    """(n,) the box of its keyframe and action that each detection overlaps most; -1: none by at least ``MIN_IOU``."""
    actions = int(max(rows.action.max(initial=0), target.action.max(initial=0))) + 1
    by_group = np.argsort(target.keyframe * actions + target.action, kind="stable")
    groups, starts, sizes = np.unique(
        (target.keyframe * actions + target.action)[by_group], return_index=True, return_counts=True
    )
    best = np.full(len(rows.action), -1, np.int64)
    if not len(groups):
        return best
    wanted = rows.keyframe * actions + rows.action
    group = np.minimum(np.searchsorted(groups, wanted), len(groups) - 1)
    compared = np.flatnonzero(groups[group] == wanted)  # those with boxes to claim
    group = group[compared]
    ends = np.cumsum(sizes[group])
    start = 0
    while start < len(compared):
        past = ends[start - 1] if start else 0
        end = max(start + 1, int(np.searchsorted(ends, past + _PAIRS_AT_ONCE, side="right")))
        part = slice(start, end)
        size = sizes[group[part]]
        heads = np.cumsum(size) - size  # where the pairs of each detection begin
        offsets = np.arange(int(size.sum())) - np.repeat(heads, size)
        boxes = by_group[np.repeat(starts[group[part]], size) + offsets]
        overlaps = _iou(np.repeat(rows.boxes[compared[part]], size, axis=0), target.boxes[boxes])
        most = np.maximum.reduceat(overlaps, heads)
        reached = np.flatnonzero(overlaps == np.repeat(most, size))
        detection, first = np.unique(np.repeat(np.arange(len(size)), size)[reached], return_index=True)
        enough = most[detection] >= MIN_IOU
        best[compared[part][detection[enough]]] = boxes[reached[first[enough]]]
        start = end
    return best


def _iou(boxes: Floats, others: Floats) -> npt.NDArray[np.float64]:
    """(n,) intersection over union of row k of both; sides in the precision of the boxes, the rest in double."""
    sides = np.minimum(boxes[:, 2:], others[:, 2:]) - np.maximum(boxes[:, :2], others[:, :2])
    sides = np.maximum(sides.astype(np.float64), 0.0)
    common = sides[:, 1] * sides[:, 0]
    areas = _areas(boxes) + _areas(others)
    with np.errstate(invalid="ignore"):  # two boxes without area
        return common / (areas - common)


def _areas(boxes: Floats) -> Floats:
    return (boxes[:, 3] - boxes[:, 1]) * (boxes[:, 2] - boxes[:, 0])
