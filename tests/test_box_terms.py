"""Losses of boxes as terms: values and gradients, exact means over what makes a step."""

from types import MappingProxyType

import pytest
import torch
from torch import nn

from distinit_plugin.errors import UserError
from distinit_plugin.losses import build_loss
from distinit_plugin.objectives import (
    Objective,
    action_term,
    combine_counts,
    offset_term,
    proposal_term,
)
from distinit_plugin.types import ACTIONS, BOXES, ModelOutput, ViewSpec


class BoxNetwork(nn.Module):
    """Rows of logits and offsets that are parameters, so that gradients are at hand."""

    layers = MappingProxyType({})
    feature_dim = 4

    def __init__(self, rows, num_classes, boxes=None):
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        self.logits = nn.Parameter(torch.randn(rows, num_classes, generator=generator, dtype=torch.float64))
        self.offsets = nn.Parameter(torch.randn(rows, 4, generator=generator, dtype=torch.float64))
        self.boxes, self.num_classes = boxes, num_classes

    def view_specs(self, split):
        return {"rgb": ViewSpec()}

    def forward(self, views, *, boxes=None, taps=()):
        seen = boxes if self.boxes is None else self.boxes
        kept = {tap: views["rgb"].sum((1, 2, 3, 4)) for tap in taps}
        count = len(seen)
        return ModelOutput(self.logits[:count], None, kept, boxes=seen, offsets=self.offsets[:count])


def objective_of(network, *terms):
    return Objective(network, terms, {}, {})


def views(clips):
    return {"student/rgb": torch.ones(clips, 3, 1, 2, 2)}


def bce_by_hand(logits, targets):
    probs = 1 / (1 + (-logits).exp())
    return -(targets * probs.log() + (1 - targets) * (1 - probs).log()).mean(1)


def truth(counts, classes=3, seed=0):
    """Boxes (R,5) and actions (R,K): so many in each clip."""
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(sum(counts), 2, generator=generator, dtype=torch.float64) * 20
    clips = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    boxes = torch.cat([clips[:, None].double(), corner, corner + 10], 1)
    actions = (torch.rand(sum(counts), classes, generator=generator) < 0.5).double()
    return {BOXES: boxes, ACTIONS: actions}


def test_the_loss_of_given_boxes_is_the_mean_over_boxes():
    targets = truth([2, 0, 3])
    network = BoxNetwork(5, 3)
    output = objective_of(network, action_term(build_loss("bce"), 2.0))(views(3), targets)
    rows = bce_by_hand(network.logits.detach(), targets[ACTIONS])
    torch.testing.assert_close(output.loss.detach().double(), 2 * rows.mean())
    torch.testing.assert_close(output.terms["loss/action"].double(), rows.mean())
    output.loss.backward()
    wanted = 2 * (network.logits.detach().sigmoid() - targets[ACTIONS]) / targets[ACTIONS].numel()
    torch.testing.assert_close(network.logits.grad, wanted)
    assert network.offsets.grad is None


def test_micro_batches_of_few_and_many_boxes_give_the_mean_over_all():
    """The mean is over boxes: a clip of one box does not weigh as much as one of five."""
    whole = truth([1, 5])
    parts = [
        {BOXES: whole[BOXES][:1], ACTIONS: whole[ACTIONS][:1]},
        {BOXES: whole[BOXES][1:] - torch.tensor([1.0, 0, 0, 0, 0]), ACTIONS: whole[ACTIONS][1:]},
    ]
    network = BoxNetwork(6, 3)
    objective = objective_of(network, action_term(build_loss("bce"), 1.0))
    assert objective.counts_vary
    objective(views(2), whole).loss.backward()
    wanted, network.logits.grad = network.logits.grad.clone(), None
    prepared = [objective.prepare(views(1), part) for part in parts]
    counts = combine_counts(prepared)
    objective.step(prepared[0], counts).loss.backward()
    shifted = BoxNetwork(6, 3)
    shifted.logits = nn.Parameter(network.logits.detach()[1:])
    other = objective_of(shifted, action_term(build_loss("bce"), 1.0))
    other.step(prepared[1], counts).loss.backward()
    torch.testing.assert_close(torch.cat([network.logits.grad[:1], shifted.logits.grad]), wanted)
    # The control: a mean of means is something else.
    alone = objective_of(shifted, action_term(build_loss("bce"), 0.5))
    shifted.logits.grad = None
    alone.step(prepared[1]).loss.backward()
    assert not torch.allclose(shifted.logits.grad, wanted[1:])


def test_a_step_without_any_box_has_a_loss_of_zero_and_gradients():
    network = BoxNetwork(0, 3)
    output = objective_of(network, action_term(build_loss("bce"), 1.0))(views(2), truth([0, 0]))
    output.loss.backward()
    assert output.loss == 0
    assert network.logits.grad is not None


def test_proposals_take_the_actions_of_the_box_that_they_overlap():
    targets = {
        BOXES: torch.tensor([[0, 0, 0, 10, 10], [1, 20, 20, 40, 40]], dtype=torch.float64),
        ACTIONS: torch.tensor([[1.0, 0, 1], [0, 1, 1]], dtype=torch.float64),
    }
    seen = torch.tensor(
        [[0, 0, 0, 10, 9], [0, 50, 50, 60, 60], [1, 0, 0, 10, 10], [1, 20, 22, 40, 40]], dtype=torch.float64
    )
    network = BoxNetwork(4, 3, boxes=seen)
    terms = (action_term(build_loss("bce"), 1.0, samples=8), offset_term(3.0, samples=8, iou=0.5))
    objective = objective_of(network, *terms)
    assert not objective.counts_vary
    output = objective(views(2), targets)
    actions = torch.tensor([[1.0, 0, 1], [0, 0, 0], [0, 0, 0], [0, 1, 1]], dtype=torch.float64)
    of_actions = bce_by_hand(network.logits.detach(), actions).sum() / 16
    torch.testing.assert_close(output.terms["loss/action"].double(), of_actions)
    # Offsets, by the formulas: only rows 0 and 3 are of persons.
    wanted = torch.tensor(
        [
            [0, (5 - 4.5) / 9 * 10, 0, torch.log(torch.tensor(10 / 9)) * 5],
            [0, (30 - 31) / 18 * 10, 0, torch.log(torch.tensor(20 / 18)) * 5],
        ],
        dtype=torch.float64,
    )
    apart = (network.offsets.detach()[[0, 3]] - wanted).abs()
    smooth = torch.where(apart < 1, apart.square() / 2, apart - 0.5).sum() / 16
    torch.testing.assert_close(output.terms["loss/box"].double(), smooth, rtol=1e-5, atol=1e-6)
    output.loss.backward()
    assert network.offsets.grad[[1, 2]].abs().sum() == 0
    assert network.offsets.grad[[0, 3]].abs().min() > 0
    expected = (network.logits.detach().sigmoid() - actions) / 3 / 16
    torch.testing.assert_close(network.logits.grad, expected)


def test_the_loss_of_an_rpn_is_the_mean_over_clips():
    clips = views(2)
    clips["student/rgb"][1] *= 3
    output = objective_of(BoxNetwork(0, 3), proposal_term("proposal_loss", 2.0))(clips, truth([0, 0]))
    torch.testing.assert_close(output.loss, torch.tensor(2 * 12 * (1 + 3) / 2.0))


def test_what_is_missing_or_does_not_fit_is_said():
    network = BoxNetwork(2, 3)
    objective = objective_of(network, action_term(build_loss("bce"), 1.0))
    with pytest.raises(UserError, match="needs annotated boxes"):
        objective.prepare(views(2), {})
    with pytest.raises(UserError, match=r"5 actions, the network has 3: set MODEL\.NUM_CLASSES"):
        objective(views(2), truth([1, 1], classes=5))
    with pytest.raises(UserError, match="GATE is 'skip'"):
        Objective(network, [action_term(build_loss("bce"), 1.0)], {}, {}, gate="skip")
