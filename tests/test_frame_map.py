"""Frame-mAP against what other people's evaluators gave for the sets in assets/frame_map, and against a plain loop.

``expected.json`` holds mAP and APs by set and program. ``plain``: as the program is. Where equal scores leave its
unstable sort a choice, there are also ``stable`` (the same program with a stable sort), and ``low`` and ``high`` (the
least and the largest that any order of equal scores gives). A program that refuses a set has no entry; the official one
has no list of excluded keyframes and was given ground truth without them. Programs: activitynet/ActivityNet at 82304fa,
facebookresearch/SlowFast at 287ec00, open-mmlab/mmaction2 at 4d6c934, with the names that NumPy has dropped put back.
"""

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from distinit_plugin.detection.claims import Rows, are_right
from distinit_plugin.detection.files import read_detections, read_excluded, read_label_map, read_truth
from distinit_plugin.detection.frame_map import average_precision, frame_map
from distinit_plugin.detection.tables import BoxTable
from distinit_plugin.detection.variants import VARIANTS
from distinit_plugin.errors import UserError

SETS = Path(__file__).parent / "assets" / "frame_map"
EXPECTED = json.loads((SETS / "expected.json").read_text())
CASES = [(name, variant) for name, variants in EXPECTED["sets"].items() for variant in variants]


def load(name):
    excluded = SETS / f"{name}.excluded.csv"
    return (
        read_truth(SETS / f"{name}.truth.csv"),
        read_detections(SETS / f"{name}.detections.csv"),
        read_label_map(SETS / "labels.pbtxt"),
        read_excluded(excluded) if excluded.exists() else set(),
    )


def values(result):
    """mAP and APs in the columns of ``expected.json``; NaN: none."""
    assert EXPECTED["columns"] == ["mAP", *result.ap]
    return np.array([result.map, *result.ap.values()])


def numbers(row):
    return np.array([math.nan if value is None else value for value in row])


def same(found, expected, tolerance=1e-9):
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance, equal_nan=True)


@pytest.mark.parametrize(("name", "variant"), CASES)
def test_as_the_other_program(name, variant):
    truth, detections, label_map, excluded = load(name)
    found = values(frame_map(truth, detections, label_map, variant=variant, excluded=excluded))
    expected = {order: numbers(row) for order, row in EXPECTED["sets"][name][variant].items()}
    if "stable" not in expected:
        same(found, expected["plain"])
        return
    same(found, expected["stable"])
    judged = ~np.isnan(found)
    assert (found[judged] >= expected["low"][judged] - 1e-12).all()
    assert (found[judged] <= expected["high"][judged] + 1e-12).all()
    assert (expected["low"][judged] < expected["high"][judged] - 1e-6).any()


def test_the_sets_hold_what_they_are_for():
    """Each situation changes the result of at least one set, so that the test above can tell."""
    exact = [name for name, variants in EXPECTED["sets"].items() if "stable" not in variants["official"]]
    assert len(exact) >= 10
    assert len(EXPECTED["sets"]) - len(exact) >= 6
    for first, second in itertools.combinations(VARIANTS, 2):
        apart = [
            name
            for name, variants in EXPECTED["sets"].items()
            if {first, second} <= set(variants) and variants[first]["plain"] != variants[second]["plain"]
        ]
        assert apart, (first, second)
    counts = {name: frame_map(*load(name)[:3], excluded=load(name)[3]).counts for name in EXPECTED["sets"]}
    assert counts["capacity"].beyond_capacity > 50
    assert counts["ties_between_actions"].beyond_capacity > 50
    assert counts["invalid"].invalid > 20
    assert counts["empty_keyframes"].unknown_keyframes > 10
    assert counts["other_actions"].other_actions > 10
    assert counts["excluded"].excluded > 10
    assert len(load("empty_keyframes")[0].keyframes) > 3


@pytest.mark.parametrize("rule", ["capacity", "heaps", "sorts", "unknown_count", "flat_count"])
def test_every_rule_is_needed(rule, monkeypatch):
    """The negative control: without a rule of the official code, sets come out differently."""
    official = VARIANTS["official"]
    changed = replace(official, **{rule: 0 if rule == "capacity" else not getattr(official, rule)})
    monkeypatch.setattr("distinit_plugin.detection.frame_map.VARIANTS", {"official": changed})
    different = 0
    for name, variants in EXPECTED["sets"].items():
        truth, detections, label_map, excluded = load(name)
        rows = variants["official"]
        found = values(frame_map(truth, detections, label_map, excluded=excluded))
        different += not np.allclose(found, numbers(rows.get("stable", rows["plain"])), atol=1e-9, equal_nan=True)
    assert different


def test_real_annotations(assets):
    """What the official code printed for simulated detections of four videos."""
    folder = assets / "ava"
    expected = json.loads((folder / "expected_shared.json").read_text())["shared_small"]["metrics"]
    truth, detections = read_truth(folder / "shared_small_gt.csv"), read_detections(folder / "shared_small_det.csv")
    label_map = read_label_map(folder / "ava_action_list_v2.1_for_activitynet_2018.pbtxt")
    result = frame_map(truth, detections, label_map)
    assert len(result.ap) == 60
    assert result.map == pytest.approx(expected["PascalBoxes_Precision/mAP@0.5IOU"], abs=1e-9)
    for name, ap in result.ap.items():
        other = expected[f"PascalBoxes_PerformanceByCategory/AP@0.5IOU/{name}"]
        assert (math.isnan(ap) and other is None) or ap == pytest.approx(other, abs=1e-9), name
    assert not math.isnan(frame_map(truth, detections, label_map, variant="pyslowfast").map)


# -------------------------------------------------------------------------------------------------------- small cases


def table(*rows, videos=("a", "b"), empty=()):
    """Rows of (video's place, second, box, action, score)."""
    return BoxTable(
        videos=videos,
        video=np.array([row[0] for row in rows], np.int32),
        seconds=np.array([row[1] for row in rows], np.float64),
        boxes=np.array([row[2] for row in rows], np.float64).reshape(-1, 4),
        actions=np.array([row[3] for row in rows], np.int32),
        scores=np.array([row[4] for row in rows], np.float64),
        keyframes=np.array(empty, np.float64).reshape(-1, 2),
    )


LEFT, RIGHT = (0.0, 0.0, 0.4, 1.0), (0.5, 0.0, 0.9, 1.0)
NAMES = {1: "sit", 2: "stand"}


def test_by_hand():
    """sit: right, wrong (claimed already), right: 1/2 · 1 + 1/2 · 2/3. stand has no detection: 0."""
    truth = table((0, 902, LEFT, 1, 1), (0, 902, RIGHT, 1, 1), (1, 902, LEFT, 2, 1))
    found = table((0, 902, LEFT, 1, 0.9), (0, 902, LEFT, 1, 0.8), (0, 902, RIGHT, 1, 0.7))
    result = frame_map(truth, found, NAMES)
    assert result.ap == pytest.approx({"sit": 1 / 2 + 1 / 2 * 2 / 3, "stand": 0.0})
    assert result.map == pytest.approx(5 / 12)
    assert (result.counts.keyframes, result.counts.truth, result.counts.right) == (2, 3, 2)
    assert result.num_truth == {"sit": 2, "stand": 1}
    assert result.num_detections == {"sit": 3, "stand": 0}
    left_out = frame_map(truth, found, NAMES, variant="mmaction2")
    assert math.isnan(left_out.ap["stand"])
    assert left_out.map == pytest.approx(5 / 6)


def test_videos_and_rows_may_stand_in_any_order_in_either_table():
    truth, detections, label_map, _ = load("distinct")
    place = {name: number for number, name in enumerate(reversed(detections.videos))}
    order = np.random.default_rng(0).permutation(len(detections))
    other = BoxTable(
        videos=tuple(place),
        video=np.array([place[detections.videos[number]] for number in detections.video[order]], np.int32),
        seconds=detections.seconds[order],
        boxes=detections.boxes[order],
        actions=detections.actions[order],
        scores=detections.scores[order],
    )
    for variant in ("official", "mmaction2"):
        expected = values(frame_map(truth, detections, label_map, variant=variant))
        same(values(frame_map(truth, other, label_map, variant=variant)), expected, 0)


def test_equal_scores_have_a_fixed_order_within_what_any_order_gives():
    """Of equal scores the keyframe that stands later comes first; every order is tried."""
    right = np.array([True, False, True, False, False])
    scores = np.array([0.5, 0.9, 0.5, 0.5, 0.2])
    tied = np.flatnonzero(scores == 0.5)
    every = set()
    for order in itertools.permutations(tied):
        moved = right.copy()
        moved[tied] = right[list(order)]
        every.add(average_precision(scores, moved, 2))
    assert len(every) > 1
    found = average_precision(scores, right, 2)
    assert min(every) <= found <= max(every)
    # 0.9 wrong; then places 3 (wrong), 2 (right), 0 (right)
    assert found == pytest.approx(1 / 2 * 2 / 4 + 1 / 2 * 2 / 4)
    assert {average_precision(scores, right, 2) for _ in range(5)} == {found}


def test_matches_a_plain_loop():
    """Without ties: claims one by one, from the definition."""
    truth, detections, label_map, _ = load("capacity")
    result = frame_map(truth, detections, label_map, variant="mmaction2")
    double = frame_map(truth, detections, label_map, variant="official")
    assert double.counts.beyond_capacity
    right, wrong = loop(truth, detections, label_map)
    assert (result.counts.right, result.counts.detections) == (right, right + wrong)


def loop(truth, detections, label_map):
    right = wrong = 0
    rows = [(*row, row[3]) for row in rows_of(truth)]
    claimed = set()
    known = {row[:2] for row in rows if row[3] in label_map}
    for video, second, box, action, _ in sorted(rows_of(detections), key=lambda row: -row[4]):
        if action not in label_map or (video, second) not in known:
            continue
        own = [place for place, row in enumerate(rows) if row[:2] == (video, second) and row[3] == action]
        overlaps = [iou(box, rows[place][2]) for place in own]
        best = own[int(np.argmax(overlaps))] if own else None
        if best is not None and max(overlaps) >= 0.5 and best not in claimed:
            claimed.add(best)
            right += 1
        else:
            wrong += 1
    return right, wrong


def rows_of(rows):
    for place in range(len(rows)):
        video, second = rows.videos[rows.video[place]], rows.seconds[place]
        yield video, second, tuple(rows.boxes[place]), rows.actions[place], rows.scores[place]


def iou(a, b):
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    common = max(width, 0) * max(height, 0)
    return common / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - common)


def test_pairs_in_blocks(monkeypatch):
    truth, detections, label_map, _ = load("everything")
    whole = frame_map(truth, detections, label_map)
    for pairs in (1, 7):
        monkeypatch.setattr("distinit_plugin.detection.claims._PAIRS_AT_ONCE", pairs)
        assert frame_map(truth, detections, label_map).ap == pytest.approx(whole.ap, abs=0, nan_ok=True)
    monkeypatch.setattr("distinit_plugin.detection.claims._KEYFRAMES_AT_ONCE", 2)
    assert frame_map(truth, detections, label_map).ap == pytest.approx(whole.ap, abs=0, nan_ok=True)


NOTHING = table(videos=())


@pytest.mark.parametrize("variant", VARIANTS)
def test_empty_tables(variant):
    truth, found = table((0, 902, LEFT, 1, 1)), table((0, 902, LEFT, 1, 0.5))
    assert frame_map(truth, found, NAMES, variant=variant).map == 1
    none = frame_map(truth, NOTHING, NAMES, variant=variant)
    assert none.map == 0 if VARIANTS[variant].undetected_count else math.isnan(none.map)
    assert math.isnan(frame_map(NOTHING, found, NAMES, variant=variant).map)
    assert math.isnan(frame_map(NOTHING, NOTHING, {}, variant=variant).map)
    assert math.isnan(frame_map(truth, found, NAMES, variant=variant, excluded={("a", 902.0)}).map) or (
        VARIANTS[variant].excluded_stay
    )


def test_what_is_no_number_is_left_out():
    """A network that diverged gives NaN: its rows do not count, and nothing crashes."""
    truth = table((0, 902, LEFT, 1, 1))
    bad = (math.nan, 0.0, 0.4, 1.0)
    found = table((0, 902, LEFT, 1, math.nan), (0, 902, bad, 1, 0.9), (0, 902, LEFT, 1, 0.1))
    for variant in VARIANTS:
        result = frame_map(truth, found, NAMES, variant=variant)
        assert result.map == 1
        assert result.counts.invalid == 2


def test_seconds_agree_to_six_decimals_or_are_cut():
    truth = table((0, 902.5, LEFT, 1, 1))
    found = table((0, 902.5000001, LEFT, 1, 0.9))
    far = table((0, 902.6, LEFT, 1, 0.9))
    assert frame_map(truth, found, NAMES).map == 1
    assert frame_map(truth, far, NAMES).counts.unknown_keyframes == 1
    assert frame_map(truth, far, NAMES, variant="pyslowfast").map == 1


def test_unknown_variant():
    with pytest.raises(UserError, match=r"'coco'.*official, pyslowfast, mmaction2"):
        frame_map(NOTHING, NOTHING, NAMES, variant="coco")


def test_first_claim_wins():
    def rows(*boxes):
        count = len(boxes)
        return Rows(np.zeros(count, np.int64), np.zeros(count, np.int64), np.array(boxes), np.ones(count))

    assert are_right(rows(LEFT, LEFT, RIGHT), rows(RIGHT, LEFT)).tolist() == [True, False, True]
    assert are_right(rows(LEFT), Rows(np.zeros(0, int), np.zeros(0, int), np.zeros((0, 4)), np.zeros(0))).tolist() == [
        False
    ]
