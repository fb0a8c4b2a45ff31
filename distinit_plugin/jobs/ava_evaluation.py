"""``distinit eval-ava``: files of boxes → frame-mAP, in words, as a table and as JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from distinit_plugin.detection.files import (
    holds_persons,
    read_detections,
    read_excluded,
    read_label_map,
    read_truth,
)
from distinit_plugin.detection.frame_map import FrameMap, frame_map
from distinit_plugin.detection.tables import BoxTable
from distinit_plugin.detection.variants import VARIANTS
from distinit_plugin.errors import UserError
from distinit_plugin.files import write_text


def evaluate_files(
    truth: str,
    detections: str,
    label_map: str,
    *,
    excluded: str = "",
    variants: Sequence[str] = ("official",),
    output: Path | None = None,
) -> dict[str, FrameMap]:
    """Evaluate a csv of detections and print the results.

    Args:
        truth: Ground truth, a csv of AVA's form.
        detections: Detections, a csv of AVA's form.
        label_map: The actions that count, as pbtxt.
        excluded: A csv of keyframes that do not count; empty: none.
        variants: Whose evaluator; the first one's APs are shown.
        output: A JSON file for the results.

    Returns:
        The result of each variant.

    Raises:
        UserError: A file cannot be read, or holds no ground truth of the label map's actions.
    """
    names = read_label_map(label_map)
    keyframes = read_excluded(excluded) if excluded else set()
    rows = read_truth(truth)
    found = read_detections(detections)
    results = {variant: frame_map(rows, found, names, variant=variant, excluded=keyframes) for variant in variants}
    first = results[variants[0]]
    if not first.counts.truth:
        raise UserError(
            f"{truth} has no row of an action of {label_map} on a keyframe that counts, so that there is no mAP. Name "
            "the label map of this ground truth."
        )
    print(_account(first, found, rows))
    print(f"\n{table(first)}\n")
    for variant, result in results.items():
        print(f"frame-mAP@0.5 ({variant}): {result.map:.6f} over {_evaluated(result)} actions")
        print(f"  {VARIANTS[variant].difference}")
    if output is not None:
        write_text(
            output, json.dumps({variant: to_dict(result) for variant, result in results.items()}, indent=1) + "\n"
        )
        print(f"wrote {output}")
    return results


def to_dict(result: FrameMap) -> dict[str, Any]:
    """A result for JSON; APs that are no numbers are ``null``."""

    def number(value: float) -> float | None:
        return None if math.isnan(value) else value

    return {
        "map": number(result.map),
        "ap": {name: number(value) for name, value in result.ap.items()},
        "truth": result.num_truth,
        "detections": result.num_detections,
        "counts": result.counts.to_dict(),
    }


def table(result: FrameMap) -> str:
    """The actions with ground truth, for the terminal."""
    width = max((len(name) for name in result.ap), default=0)
    lines = [f"{'action':<{width}}      AP   truth  detections"]
    for name, value in result.ap.items():
        if result.num_truth[name]:
            ap = f"{'–':>6}" if math.isnan(value) else f"{value:.4f}"
            lines.append(f"{name:<{width}}  {ap}  {result.num_truth[name]:6d}  {result.num_detections[name]:10d}")
    absent = [name for name in result.ap if not result.num_truth[name]]
    if absent:
        lines.append(f"{len(absent)} actions of the label map have no ground truth and do not count.")
    return "\n".join(lines)


def _evaluated(result: FrameMap) -> int:
    return sum(not math.isnan(value) for value in result.ap.values())


def _account(result: FrameMap, detections: BoxTable, truth: BoxTable) -> str:
    """What was counted, what was not and why, and what looks like a mistake."""
    counts = result.counts
    lines = [
        f"{counts.keyframes} keyframes, {counts.truth} of {len(truth)} rows of ground truth and {counts.detections} of "
        f"{len(detections)} detections count; {counts.right} detections are right."
    ]
    ignored = {
        "of actions that the label map lacks": counts.other_actions,
        "on keyframes that the ground truth does not name": counts.unknown_keyframes,
        "on excluded keyframes": counts.excluded,
        "beyond the highest 50 of their keyframe": counts.beyond_capacity,
        "without a box of an area": counts.invalid,
    }
    lines += [f"ignored: {count} detections {reason}" for reason, count in ignored.items() if count]
    if not len(detections):
        lines.append("warning: there is no detection.")
    elif holds_persons(detections):
        lines.append(
            "warning: the scores are whole numbers and not all 1: is this ground truth, whose eighth column names "
            "persons? They were taken for scores."
        )
    outside = int((detections.boxes > 1.01).any(axis=1).sum())
    if 2 * outside > len(detections):
        lines.append(
            f"warning: {outside} of {len(detections)} boxes reach beyond the picture: are they in pixels? AVA's boxes "
            "are fractions of width and height, from 0 to 1."
        )
    if counts.unknown_keyframes > counts.detections:
        lines.append(
            "warning: most detections are on keyframes that the ground truth does not name: do both files write videos "
            "and seconds alike, and are they of the same split?"
        )
    return "\n".join(lines)
