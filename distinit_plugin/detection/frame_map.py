"""Frame-mAP at IoU 0.5: how well persons' boxes and actions are found in keyframes.

A detection is right when the ground-truth box *of its action* that it overlaps most has an intersection over union of
at least 0.5 with it and no earlier detection has claimed that box; the average precision (AP) of an action is the area
under the non-increasing envelope of its precision-recall curve; frame-mAP is the mean over actions that have ground
truth. Source of the rules: https://github.com/activitynet/ActivityNet, ``Evaluation/get_ava_performance.py``.

Detections of equal score: the official code puts them in the order of an unstable sort. Here they stand in a fixed one,
that of the same steps with a stable sort: of two keyframes, the one whose first counted row stands later in the table
comes first, and within one keyframe the row that claimed last.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from typing import NamedTuple

import numpy as np

from distinit_plugin.detection.claims import Floats, Ints, Mask, Rows, are_right, claim_order, truth_order
from distinit_plugin.detection.tables import BoxTable
from distinit_plugin.detection.variants import VARIANTS, Variant
from distinit_plugin.errors import UserError, shown


@dataclass(frozen=True)
class Counts:
    """What went into a result.

    Attributes:
        keyframes: Keyframes that the ground truth names and that are not excluded.
        truth: Ground-truth rows of actions in the label map, those that recall is relative to.
        detections: Detections that were judged right or wrong.
        right: Those that were right.
        other_actions: Detections that were ignored because the label map lacks their action.
        unknown_keyframes: Ignored because the ground truth does not name their keyframe.
        excluded: Ignored because their keyframe is excluded.
        beyond_capacity: Ignored because their keyframe has enough rows of higher scores.
        invalid: Ignored because x2 ≤ x1, y2 ≤ y1, or a number is not finite.
    """

    keyframes: int
    truth: int
    detections: int
    right: int
    other_actions: int
    unknown_keyframes: int
    excluded: int
    beyond_capacity: int
    invalid: int

    def to_dict(self) -> dict[str, int]:
        """By name, for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class FrameMap:
    """The result.

    Attributes:
        map: Mean of the APs that are numbers; NaN where there is none.
        ap: AP by the action's name, in the order of its numbers; NaN: no ground truth (or left out by the variant).
        num_truth: Ground-truth rows of each action.
        num_detections: Detections of each action that were judged.
        counts: What went in.
    """

    map: float
    ap: dict[str, float]
    num_truth: dict[str, int]
    num_detections: dict[str, int]
    counts: Counts


def frame_map(
    truth: BoxTable,
    detections: BoxTable,
    label_map: Mapping[int, str],
    *,
    variant: str = "official",
    excluded: Collection[tuple[str, float]] = (),
) -> FrameMap:
    """Frame-mAP of detections.

    Args:
        truth: Ground truth; its keyframes without boxes are evaluated, too.
        detections: Rows of box, action and score, in any order.
        label_map: The actions that count, by number.
        variant: ``official``, ``pyslowfast`` or ``mmaction2``.
        excluded: Keyframes (video, second) that are left out. (The official code has no such list any more: it is given
            ground truth without them.)

    Raises:
        UserError: An unknown variant.
    """
    if variant not in VARIANTS:
        raise UserError(f"frame-mAP has no variant {shown(variant)}; there are {', '.join(VARIANTS)}.")
    rules = VARIANTS[variant]
    ids = np.array(sorted(label_map), np.int64)
    keyframes = _number_keyframes(truth, detections, excluded, rules)
    counted = np.isin(truth.actions, ids)
    of_counted = keyframes.truth[counted]
    target = _rows(truth, keyframes.truth, ids, counted)
    target = target.take(truth_order(target, truth, counted, rules))
    is_evaluated: Mask = ~keyframes.marked(keyframes.excluded)
    is_known = keyframes.marked(*([of_counted] if rules.rows_make_keyframes else [keyframes.truth, keyframes.empty]))
    inside = is_evaluated[target.keyframe]
    num_truth = np.bincount(target.action[inside | rules.excluded_stay], minlength=len(ids))

    named = np.isin(detections.actions, ids)
    first = keyframes.first_places(of_counted if rules.rows_make_keyframes else keyframes.detections[named])
    rows, ignored = _kept(detections, keyframes, ids, named, is_known | rules.unknown_count, is_evaluated)
    order, beyond = claim_order(rows, first, rules)
    rows, target = _rounded(rows.take(order), rules), _rounded(target.take(inside), rules)
    valid = _valid(rows.boxes, rules)
    rows = rows.take(valid)
    right = are_right(rows, target)
    counts = Counts(
        keyframes=int((is_known & is_evaluated).sum()),
        truth=int(num_truth.sum()),
        detections=len(right),
        right=int(right.sum()),
        beyond_capacity=beyond,
        other_actions=ignored["other_actions"],
        unknown_keyframes=ignored["unknown_keyframes"],
        excluded=ignored["excluded"],
        invalid=ignored["invalid"] + int((~valid).sum()),
    )
    return _averaged(rows, right, num_truth, [label_map[int(action)] for action in ids], rules, counts)


class _Keyframes(NamedTuple):
    """Numbers of the keyframes that rows are of."""

    number: int  # there are so many
    truth: Ints  # of each row of ground truth
    empty: Ints  # of each keyframe without boxes
    detections: Ints
    excluded: Ints

    def marked(self, *keyframes: Ints) -> Mask:
        """(number,) whether each keyframe is among those given."""
        marks = np.zeros(self.number, bool)
        for some in keyframes:
            marks[some] = True
        return marks

    def first_places(self, keyframes: Ints) -> Ints:
        """(number,) the place at which each keyframe stands first."""
        first = np.full(self.number, len(keyframes), np.int64)
        distinct, places = np.unique(keyframes, return_index=True)
        first[distinct] = places
        return first


def _number_keyframes(
    truth: BoxTable, detections: BoxTable, excluded: Collection[tuple[str, float]], rules: Variant
) -> _Keyframes:
    """Give every keyframe a number; seconds are the same when they agree to six decimals."""
    names: dict[str, int] = {}

    def places(videos: Collection[str]) -> Ints:
        return np.array([names.setdefault(video, len(names)) for video in videos], np.int64)

    listed = sorted(excluded)
    of_truth, of_detections, of_excluded = (
        places(truth.videos),
        places(detections.videos),
        places([row[0] for row in listed]),
    )
    videos = [
        of_truth[truth.video],
        of_truth[truth.keyframes[:, 0].astype(np.int64)],
        of_detections[detections.video],
        of_excluded,
    ]
    seconds = [truth.seconds, truth.keyframes[:, 1], detections.seconds, np.array([row[1] for row in listed], float)]
    every = np.concatenate(seconds)
    stamps = (np.floor(every) if rules.whole_seconds else np.rint(every * 1e6)).astype(np.int64)
    distinct, codes = np.unique(stamps, return_inverse=True)
    distinct, numbers = np.unique(np.concatenate(videos) * len(distinct) + codes, return_inverse=True)
    parts = np.split(numbers.astype(np.int64), np.cumsum([len(part) for part in seconds])[:-1])
    return _Keyframes(len(distinct), *parts)


def _rows(table: BoxTable, keyframe: Ints, ids: Ints, chosen: Mask) -> Rows:
    """The chosen rows, whose actions are all among ``ids``."""
    action = np.searchsorted(ids, table.actions[chosen]).astype(np.int64)
    return Rows(keyframe[chosen], action, table.boxes[chosen], table.scores[chosen])


def _kept(
    detections: BoxTable, keyframes: _Keyframes, ids: Ints, named: Mask, is_known: Mask, is_evaluated: Mask
) -> tuple[Rows, dict[str, int]]:
    """The detections that may count, and how many do not, by reason."""
    inside = is_evaluated[keyframes.detections]
    known = is_known[keyframes.detections]
    finite = np.isfinite(detections.scores)
    ignored = {
        "other_actions": int((~named).sum()),
        "excluded": int((named & ~inside).sum()),
        "unknown_keyframes": int((named & inside & ~known).sum()),
        "invalid": int((named & inside & known & ~finite).sum()),
    }
    return _rows(detections, keyframes.detections, ids, named & inside & known & finite), ignored


def _valid(boxes: Floats, rules: Variant) -> Mask:
    """(n,) whether each detection is one."""
    start, end = boxes[:, :2], boxes[:, 2:]
    has_sides = (end >= start) if rules.flat_count else (end > start)
    return np.asarray((has_sides & np.isfinite(start) & np.isfinite(end)).all(axis=1))


def _rounded(rows: Rows, rules: Variant) -> Rows:
    """In the precision of the variant."""
    if not rules.single:
        return rows
    return rows._replace(boxes=rows.boxes.astype(np.float32), scores=rows.scores.astype(np.float32))


def _averaged(rows: Rows, right: Mask, num_truth: Ints, names: list[str], rules: Variant, counts: Counts) -> FrameMap:
    """AP of every action, and their mean."""
    by_action = np.argsort(rows.action, kind="stable")
    bounds = np.searchsorted(rows.action[by_action], np.arange(len(names) + 1))
    ap: dict[str, float] = {}
    for place, name in enumerate(names):
        own = by_action[bounds[place] : bounds[place + 1]]
        if not num_truth[place] or (not len(own) and not rules.undetected_count):
            ap[name] = math.nan
        else:
            ap[name] = average_precision(rows.scores[own], right[own], int(num_truth[place]))
    numbers = [value for value in ap.values() if not math.isnan(value)]
    return FrameMap(
        map=float(np.mean(numbers)) if numbers else math.nan,
        ap=ap,
        num_truth=dict(zip(names, num_truth.tolist(), strict=True)),
        num_detections=dict(zip(names, np.diff(bounds).tolist(), strict=True)),
        counts=counts,
    )


def average_precision(scores: Floats, right: Mask, num_truth: int) -> float:
    """Area under the non-increasing envelope of precision over recall (PASCAL VOC from 2010 on).

    Args:
        scores: (n,); of equal ones the later comes first.
        right: (n,) whether each detection is right.
        num_truth: What could have been found, at least 1.
    """
    hits = np.cumsum(right[np.argsort(scores, kind="stable")[::-1]])
    precision = np.maximum.accumulate((hits / np.arange(1, len(hits) + 1))[::-1])[::-1]
    recall = hits / num_truth
    steps = np.diff(recall, prepend=0.0)
    return float(np.sum(steps * precision))
