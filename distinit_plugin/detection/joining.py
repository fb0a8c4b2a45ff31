"""Tables of boxes put together: rows of several files, choices of rows, annotated actions for detected boxes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from distinit_plugin.detection.geometry import Boxes, clip_boxes, has_area
from distinit_plugin.detection.tables import NO_ACTION, BoxTable


def join(tables: Sequence[BoxTable]) -> BoxTable:
    """The rows of several tables, one after the other, without persons' numbers."""
    videos = tuple(sorted({video for table in tables for video in table.videos}))
    places = {video: place for place, video in enumerate(videos)}
    maps = [np.array([places[video] for video in table.videos], dtype=np.int32) for table in tables]
    empty = [table.keyframes.copy() for table in tables]
    for keyframes, places_of in zip(empty, maps, strict=True):
        keyframes[:, 0] = places_of[keyframes[:, 0].astype(np.int64)]
    return BoxTable(
        videos,
        _joined([places_of[table.video] for places_of, table in zip(maps, tables, strict=True)], np.int32),
        _joined([table.seconds for table in tables], np.float64),
        _joined([table.boxes for table in tables], np.float64, 4),
        _joined([table.actions for table in tables], np.int32),
        _joined([table.scores for table in tables], np.float64),
        _joined(empty, np.float64, 2),
    )


def _joined(parts: list[npt.NDArray[Any]], dtype: npt.DTypeLike, *width: int) -> npt.NDArray[Any]:
    return np.concatenate([np.zeros((0, *width), dtype), *parts]).astype(dtype, copy=False)


def select(table: BoxTable, rows: npt.NDArray[Any]) -> BoxTable:
    """Some rows of a table, by number or by mask, without persons' numbers; keyframes without boxes stay."""
    return BoxTable(
        table.videos,
        table.video[rows],
        table.seconds[rows],
        table.boxes[rows],
        table.actions[rows],
        table.scores[rows],
        table.keyframes,
    )


def unique_rows(rows: npt.NDArray[np.float64]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Distinct rows of (n,c), as ``np.unique`` over axis 0 sorts them, in a tenth of its time.

    Returns:
        The first row of each kind (m,), and the kind of each row (n,).
    """
    order = np.lexsort(rows.T[::-1])
    ordered = rows[order]
    begins = np.ones(len(rows), dtype=bool)
    begins[1:] = (ordered[1:] != ordered[:-1]).any(axis=1)
    kinds = np.empty(len(rows), dtype=np.int64)
    kinds[order] = np.cumsum(begins) - 1
    return order[begins], kinds


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
    _, key = unique_rows(np.column_stack([both.video, both.seconds]))
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
