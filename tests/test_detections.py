"""Scores of boxes → detections of keyframes → rows of a table."""

import json
import math

import numpy as np
import pytest
import torch
from torch import nn

from distinit_plugin.detection.files import read_detections
from distinit_plugin.detection.frame_map import frame_map
from distinit_plugin.detection.matching import encode
from distinit_plugin.detection.results import Detections, Selection, select
from distinit_plugin.detection.tables import BoxTable
from distinit_plugin.engine.detect import BoxEvaluation, detect
from distinit_plugin.errors import UserError
from distinit_plugin.types import BOXES, BadVideo, ModelOutput, SampleKey, ViewRegion

APART = np.array([[0.0, 0.0, 0.4, 0.4], [0.0, 0.0, 0.4, 0.5], [0.5, 0.5, 1.0, 1.0]])


def listed(found):
    return [
        (int(action), round(float(score), 3), box.tolist())
        for action, score, box in zip(found.actions, found.scores, found.boxes, strict=True)
    ]


def test_each_action_of_each_box_is_a_row_the_best_first():
    scores = torch.tensor([[0.1, 0.9], [0.5, 0.2], [0.5, 0.0]])
    found = select(7, APART, scores, Selection())
    a, b, c = APART.tolist()
    assert listed(found) == [(2, 0.9, a), (1, 0.5, b), (1, 0.5, c), (2, 0.2, b), (1, 0.1, a), (2, 0.0, c)]
    assert set(found.keyframe.tolist()) == {7}
    assert listed(select(7, APART, scores, Selection(floor=0.2, most=3))) == listed(found)[:3]
    assert len(select(7, APART, scores, Selection(floor=0.2)).scores) == 4
    assert len(select(7, APART[:0], scores[:0], Selection(nms=0.5)).scores) == 0


def test_suppression_is_within_an_action():
    """The first two boxes overlap by 0.8: the worse one goes, but only where the other does the same."""
    scores = torch.tensor([[0.3, 0.9], [0.8, 0.2], [0.7, 0.6]])
    a, b, c = APART.tolist()
    kept = listed(select(0, APART, scores, Selection(nms=0.6)))
    assert kept == [(2, 0.9, a), (1, 0.8, b), (1, 0.7, c), (2, 0.6, c)]
    assert len(select(0, APART, scores, Selection(nms=0.85)).scores) == 6
    assert listed(select(0, APART, scores, Selection(nms=0.6, most=2))) == kept[:2]


def test_joined_rows_stand_by_keyframe():
    parts = [select(number, APART[:1], torch.tensor([[0.1, 0.2]]), Selection()) for number in (4, 1)]
    joined = Detections.joined(parts)
    assert joined.keyframe.tolist() == [1, 1, 4, 4]
    assert joined.actions.tolist() == [2, 1, 2, 1]
    assert len(Detections.joined([]).scores) == 0


# ------------------------------------------------------------------------------------------------------------ the loop
class Scorer(nn.Module):
    """Scores grow with the keyframe's number, which is what its view holds; proposes one box, or scores given ones."""

    def __init__(self, proposed=None, offsets=None, broken=False):
        super().__init__()
        self.proposed, self.offsets, self.broken = proposed, offsets, broken

    def forward(self, views, *, boxes=None, taps=()):
        numbers = views["rgb"].flatten()
        if self.proposed is not None:
            clips = torch.arange(len(numbers)).float()[:, None]
            boxes = torch.cat([clips, self.proposed.expand(len(numbers), 4)], 1)
        assert not self.training
        values = numbers[boxes[:, 0].long()] + boxes[:, 1] * 1e-3
        logits = torch.stack([values, -values], 1)
        offsets = None if self.offsets is None else self.offsets.expand(len(boxes), 4)
        return ModelOutput(logits * math.nan if self.broken else logits, None, {}, boxes=boxes, offsets=offsets)


REGION = ViewRegion(200, 400, 0, 0, 200, 400, False, 100, 200)


def batches(*numbers, counts=None, flip=False):
    """One batch for each tuple of keyframe numbers; given boxes are ``counts[number]`` each."""
    for group in numbers:
        held = [(row, place) for row, n in enumerate(group) for place in range((counts or {}).get(n, 0))]
        boxes = [[row, 10.0 * place, 5, 50, 60] for row, place in held]
        yield {
            "views": {},
            "keys": [SampleKey(0, number, number) for number in group],
            "paths": [],
            "targets": {BOXES: torch.tensor(boxes).reshape(-1, 5)},
            "bad": [],
            "regions": [REGION._replace(flip=flip)] * len(group),
        }


def finish(batch):
    return {"rgb": torch.tensor([float(key.index) for key in batch["keys"]])}


def run(network, read, *, number=6, given=None, **options):
    options = {"selection": Selection(), "gather_objects": lambda own: [own], **options}
    device = torch.device("cpu")
    return detect(network.train(), read, finish=finish, num_keyframes=number, given=given, device=device, **options)


def test_given_boxes_keep_the_fractions_of_their_file():
    """Not the pixels of the view, which are fp32; a keyframe without boxes has no rows and counts as seen."""
    file = {0: np.array([[0.1, 0.2, 1 / 3, 0.7], [0.123456789012, 0.2, 0.9, 1.0]]), 2: np.zeros((0, 4)), 3: APART[:1]}
    counts = {number: len(boxes) for number, boxes in file.items()}
    network = Scorer()
    found = run(network, batches((0, 2), (3,), counts=counts), given=file.__getitem__)
    assert network.training  # as it was before
    assert found.seen.tolist() == [True, False, True, True, False, False]
    assert found.detections.keyframe.tolist() == [0, 0, 0, 0, 3, 3]
    assert {tuple(box) for box in found.detections.boxes[:4]} == {tuple(box) for box in file[0]}
    assert found.detections.scores[-2] == pytest.approx(1 / (1 + math.exp(-3.0)))
    table = found.detections.table(("a", "b"), np.array([0, 0, 0, 1, 1, 1], np.int32), np.arange(902.0, 908))
    assert table.seconds.tolist() == [902.0] * 4 + [905.0] * 2
    assert table.video.tolist() == [0] * 4 + [1] * 2


@pytest.mark.parametrize("flip", [False, True])
def test_proposed_boxes_are_corrected_and_brought_back(flip):
    box, wanted = torch.tensor([[20.0, 10, 60, 50]]), torch.tensor([[22.0, 5, 80, 120]])
    network = Scorer(box, encode(box, wanted))
    found = run(network, batches((1,), flip=flip))
    # 200 × 100 pixels show all of the picture; what lies below it is cut off.
    sides = [0.6, 0.05, 0.89, 1.0] if flip else [0.11, 0.05, 0.4, 1.0]
    np.testing.assert_allclose(found.detections.boxes[0], sides, atol=1e-6)
    raw = run(Scorer(box), batches((1,), flip=flip))
    np.testing.assert_allclose(
        raw.detections.boxes[0], [0.7, 0.1, 0.9, 0.5] if flip else [0.1, 0.1, 0.3, 0.5], atol=1e-6
    )


def test_ranks_bring_their_keyframes_together_and_none_counts_twice():
    box = torch.tensor([[20.0, 10, 60, 50]])
    alone = run(Scorer(box), batches((0, 1), (2, 3), (4,)))
    kept = []
    run(Scorer(box), batches((1,), (3, 4)), gather_objects=lambda own: kept.append(own) or [own])
    both = run(Scorer(box), batches((0, 1), (2,)), gather_objects=lambda own: [own, *kept])
    for one, other in zip(alone.detections, both.detections, strict=True):
        np.testing.assert_array_equal(one, other)
    assert both.seen.tolist() == alone.seen.tolist() == [True] * 5 + [False]


def test_what_cannot_be_scored_is_said():
    nothing = [
        {"views": {}, "keys": [], "paths": [], "targets": {}, "bad": [BadVideo("a.mp4", "it ends")], "regions": []}
    ]
    with pytest.raises(UserError, match=r"none of the 6 keyframes could be read: a\.mp4: it ends"):
        run(Scorer(torch.zeros(1, 4)), nothing)
    with pytest.raises(UserError, match="not finite"):
        run(Scorer(torch.zeros(1, 4), broken=True), batches((1,)))


def test_results_are_written(tmp_path):
    rows = (np.array([0, 0], np.int32), np.array([902.0, 903.0]), APART[:2])
    actions, ones = np.array([1, 2], np.int32), np.ones(2)
    truth = BoxTable(("v",), *rows, actions, ones)
    table = BoxTable(("v",), *rows, actions, np.array([0.9, 0.8]))
    result = frame_map(truth, table, {1: "sit", 2: "stand", 3: "jump"})
    evaluation = BoxEvaluation(result, "official", table, 3, 2, 1, [BadVideo("w.mp4", "gone")])
    evaluation.write(tmp_path)
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["map"] == 1.0
    assert metrics["per_class"] == {"sit": 1.0, "stand": 1.0, "jump": None}
    assert (metrics["num_keyframes"], metrics["num_unread"]) == (2, 1)
    assert metrics["bad"] == [{"path": "w.mp4", "reason": "gone"}]
    again = read_detections(tmp_path / "detections.csv")
    np.testing.assert_array_equal(again.boxes, table.boxes)
    np.testing.assert_array_equal(again.scores, table.scores)
