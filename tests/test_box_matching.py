"""Boxes against boxes: matches, samples, offsets."""

import pytest
import torch

from distinit_plugin.detection.matching import BACKGROUND, Sampling, decode, encode, match, sample
from distinit_plugin.errors import UserError


def rows(*boxes):
    return torch.tensor(boxes, dtype=torch.float32)


def test_a_box_is_matched_with_the_best_of_its_own_clip():
    truth = rows([0, 0, 0, 10, 10], [0, 0, 0, 10, 8], [1, 20, 20, 30, 30])
    boxes = rows(
        [0, 0, 0, 10, 9],  # 0.9 with the first, 8/9 with the second
        [0, 0, 0, 10, 5],  # 0.5 with the first, 5/8 with the second
        [1, 0, 0, 10, 10],  # equal to the first, but of another clip
        [0, 20, 20, 30, 30],  # the same the other way round
        [1, 20, 20, 30, 25],  # exactly 0.5
        [1, 20, 20, 30, 24.9],
        [1, 40, 40, 40, 40],  # without area
    )
    assert match(boxes, truth, 0.5).tolist() == [0, 1, BACKGROUND, BACKGROUND, 2, BACKGROUND, BACKGROUND]
    assert match(boxes, truth[:0], 0.5).tolist() == [BACKGROUND] * 7
    assert match(boxes[:0], truth, 0.5).tolist() == []


def test_offsets_are_those_of_faster_rcnn():
    """Against the formulas of the paper, in float64: centre in units of the box, sides as logarithms."""
    box, target = (10.0, 20.0, 30.0, 60.0), (12.0, 16.0, 22.0, 96.0)
    x, y, w, h = 20.0, 40.0, 20.0, 40.0
    tx, ty, tw, th = 17.0, 56.0, 10.0, 80.0
    wanted = torch.tensor([(tx - x) / w, (ty - y) / h, tw / w, th / h], dtype=torch.float64)
    wanted = torch.cat([wanted[:2] * 10, wanted[2:].log() * 5])
    found = encode(torch.tensor([box], dtype=torch.float64), torch.tensor([target], dtype=torch.float64))
    torch.testing.assert_close(found[0], wanted)
    # Offsets of zero leave a box as it is, and decoding undoes encoding.
    boxes = torch.rand(50, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 50
    boxes[:, 2:] += boxes[:, :2] + 1
    torch.testing.assert_close(decode(boxes, torch.zeros_like(boxes)), boxes)
    others = boxes.flip(0)
    torch.testing.assert_close(decode(boxes, encode(boxes, others)), others)


def test_offsets_stay_finite():
    flat = torch.tensor([[5.0, 5.0, 5.0, 9.0], [0.0, 0.0, 1.0, 1.0]])
    assert torch.isfinite(encode(flat, flat.flip(0))).all()
    assert torch.isfinite(decode(flat, torch.full((2, 4), 1e4))).all()


def test_a_sample_has_its_share_of_each_clip():
    generator = torch.Generator().manual_seed(1)
    truth = rows([0, 0, 0, 10, 10], [2, 5, 5, 25, 25])
    near = truth.repeat_interleave(20, 0) + torch.nn.functional.pad(torch.rand(40, 4, generator=generator) / 5, (1, 0))
    far = rows([0, 50, 50, 60, 60], [1, 50, 50, 60, 60], [2, 50, 50, 60, 60]).repeat_interleave(30, 0)
    torch.manual_seed(3)
    chosen = sample(torch.cat([near, far]), truth, Sampling(16, 0.25), 3)
    found = match(chosen, truth, 0.5)
    for clip, positives in ((0, 4), (1, 0), (2, 4)):
        own = chosen[:, 0] == clip
        assert int(own.sum()) == 16
        assert int((found[own] != BACKGROUND).sum()) == positives
    torch.manual_seed(3)
    again = sample(torch.cat([near, far]), truth, Sampling(16, 0.25), 3)
    assert torch.equal(chosen, again)
    assert not torch.equal(chosen, sample(torch.cat([near, far]), truth, Sampling(16, 0.25), 3))


def test_annotated_boxes_are_among_the_sampled():
    """A keyframe whose proposals all miss still has something to learn; with few boxes all of them are taken."""
    truth = rows([0, 0, 0, 10, 10])
    chosen = sample(rows([0, 50, 50, 60, 60]), truth, Sampling(8, 0.25), 2)
    assert sorted(chosen[:, 1].tolist()) == [0.0, 50.0]
    assert sample(truth[:0], truth[:0], Sampling(8), 2).shape == (0, 5)


@pytest.mark.parametrize(
    ("values", "key"), [((0,), "SAMPLES"), ((4, 0.0), "POSITIVE_SHARE"), ((4, 0.5, 1.5), "MATCH_IOU")]
)
def test_impossible_samplings_are_refused(values, key):
    with pytest.raises(UserError, match=key):
        Sampling(*values)
