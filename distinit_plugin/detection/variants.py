"""How three programs compute frame-mAP, where they differ.

Sources: https://github.com/activitynet/ActivityNet ``Evaluation/get_ava_performance.py``,
https://github.com/facebookresearch/SlowFast ``slowfast/utils/ava_eval_helper.py``,
https://github.com/open-mmlab/mmaction2 ``mmaction/evaluation/functional/ava_utils.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Variant:
    """How an evaluator settles what the definition of frame-mAP leaves open.

    Attributes:
        difference: What it does, for people.
        capacity: Rows kept for each keyframe, those of the highest scores; 0: all.
        sorts: Whether the detections of a keyframe claim boxes by falling score (else in the table's order).
        whole_seconds: Whether fractions of a second are cut off.
        unknown_count: Whether detections on keyframes without any ground truth count, as wrong.
        rows_make_keyframes: Whether only rows of counted actions make a keyframe known.
        excluded_stay: Whether ground truth of excluded keyframes stays in the number that recall is relative to.
        undetected_count: Whether an action with ground truth and without detections has AP 0 (else it is left out).
        heaps: Whether rows of equal score in a keyframe stand as a heap leaves them (else in the table's order).
        persons_sort: Whether ground truth stands by falling number of the person (it decides where a detection
            overlaps two boxes exactly alike).
        flat_count: Whether detections of boxes without area count, as wrong.
        single: Whether scores and boxes are rounded to single precision.
    """

    difference: str
    capacity: int = 0
    sorts: bool = True
    whole_seconds: bool = True
    unknown_count: bool = False
    rows_make_keyframes: bool = False
    excluded_stay: bool = False
    undetected_count: bool = True
    heaps: bool = False
    persons_sort: bool = False
    flat_count: bool = False
    single: bool = False


VARIANTS: Mapping[str, Variant] = {
    "official": Variant(
        "the 50 highest rows of a keyframe count; detections on keyframes that the ground truth does not name are "
        "ignored, on keyframes that it names without a counted action they are wrong",
        capacity=50,
        whole_seconds=False,
        heaps=True,
        persons_sort=True,
    ),
    "pyslowfast": Variant(
        "all rows of a keyframe count; they claim boxes in the order of the file, not of their scores; detections on "
        "keyframes without ground truth are wrong; fractions of a second are cut off",
        sorts=False,
        unknown_count=True,
    ),
    "mmaction2": Variant(
        "all rows of a keyframe count; only rows of counted actions make a keyframe known; ground truth of excluded "
        "keyframes stays in the recall; actions without detections are left out of the mean; boxes without area are "
        "wrong (it stops at x2 < x1, which is ignored here); fractions of a second are cut off; single precision",
        rows_make_keyframes=True,
        excluded_stay=True,
        undetected_count=False,
        persons_sort=True,
        flat_count=True,
        single=True,
    ),
}
