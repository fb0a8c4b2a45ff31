"""Objectives with gates, and logits over time."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from linear_networks import (
    LIMITS,
    LinearNetwork,
    StepNetwork,
    frozen,
    gradients,
    make_views,
    rows,
    run_steps,
    teacher_logits,
    two_teachers,
)
from torch import Tensor, nn

from distinit_plugin.engine.meters import MeanMeter
from distinit_plugin.losses import build_loss, entropy
from distinit_plugin.objectives import Objective, Term, build_adapter, combine_counts


# ------------------------------------------------------------------------------------------------- logits over time
def steps_and_teacher(gate: str = "weight", gate_mean: str = "all") -> Objective:
    """A student of five classes that answers at every frame, beside a gated teacher of its own logits."""
    student, teacher = StepNetwork(5), frozen(LinearNetwork(5, seed=1))
    terms = [
        Term("action", "logits", build_loss("cross_entropy")),
        Term("A", "logits", build_loss("soft_cross_entropy"), 0.5, teacher="A", max_entropy=LIMITS["A"]),
    ]
    adapters = {"A": build_adapter("own", student, "logits", teacher, "logits")}
    return Objective(student, terms, {"A": teacher}, adapters, gate=gate, gate_mean=gate_mean)


@pytest.mark.parametrize("gate_mean", ["all", "kept"])
def test_losses_act_at_every_time_step(gate_mean):
    objective = steps_and_teacher(gate_mean=gate_mean)
    views, labels = make_views(6), torch.tensor([0, 4, 2, 2, 1, 3])
    output = objective(views, {"label": labels})
    output.loss.backward()
    found = gradients(objective)
    objective.trainable.zero_grad()

    student = objective.trainable.student
    wanted = teacher_logits(objective, "A", views).softmax(1)
    kept = entropy(teacher_logits(objective, "A", views)) < LIMITS["A"]
    assert 0 < int(kept.sum()) < 6
    action, distilled, right, agreeing = 0.0, 0.0, 0, 0
    for example in range(6):
        for frame in range(4):
            pixels = views["student/rgb"][example, :, frame].double().mean((1, 2))
            state = student.conv.weight.double()[:, :, 0, 0, 0] @ pixels + student.conv.bias.double()
            log_probs = (student.fc.weight.double() @ state + student.fc.bias.double()).log_softmax(0)
            action = action - log_probs[labels[example]] / 4
            agreeing += int(log_probs.argmax() == wanted[example].argmax())
            if kept[example]:
                distilled = distilled - (wanted[example].double() * log_probs).sum() / 4
        right += int(log_probs.argmax() == labels[example])
    expected = action / 6 + 0.5 * distilled / (6 if gate_mean == "all" else int(kept.sum()))
    expected.backward()
    torch.testing.assert_close(output.loss.double(), expected)
    torch.testing.assert_close(found, gradients(objective))
    assert output.report["top1"] == pytest.approx(right / 6)  # of the last step
    assert output.report["agreement/A"] == pytest.approx(agreeing / 24)


def test_the_last_time_step_counts_in_evaluation():
    objective = steps_and_teacher()
    views, targets = make_views(6), {"label": torch.tensor([0, 4, 2, 2, 1, 3])}
    every_step = objective(views, targets).terms["loss/action"]
    objective.trainable.eval()
    last = objective(views, targets).terms["loss/action"]
    logits = objective.trainable.student({"rgb": views["student/rgb"]}).logits
    torch.testing.assert_close(last, nn.functional.cross_entropy(logits, targets["label"]))
    assert (every_step - last).abs() > 1e-3


@pytest.mark.parametrize("gate", ["weight", "skip"])
def test_micro_batches_of_time_steps_add_up(gate):
    def steps(sizes: list[int]) -> tuple[Tensor, dict[str, Tensor]]:
        objective = steps_and_teacher(gate, "kept")
        views, labels, start, prepared = make_views(9), torch.arange(9) % 5, 0, []
        for size in sizes:
            part = slice(start, start := start + size)
            prepared.append(objective.prepare(rows(views, part.start, part.stop), {"label": labels[part]}))
        counts = combine_counts(prepared)
        losses = [objective.step(item, counts).loss for item in prepared]
        torch.stack(losses).sum().backward()
        return torch.stack(losses).sum().detach(), gradients(objective)

    loss, gradient = steps([9])
    split_loss, split_gradient = steps([2, 6, 1])
    torch.testing.assert_close(split_loss, loss)
    torch.testing.assert_close(split_gradient, gradient)


# --------------------------------------------------------------------------------------------------------------- gates
def test_an_example_at_the_threshold_is_gated_and_all_of_it_is_reported():
    views = make_views(6)
    entropies = entropy(teacher_logits(two_teachers(), "A", views))
    limit = float(entropies.sort().values[3])
    objective = two_teachers(limits=(limit, None))
    prepared = objective.prepare(views, {})
    torch.testing.assert_close(prepared.weights["A"], (entropies < limit).float())
    assert prepared.weights["A"].sum() == 3
    torch.testing.assert_close(prepared.report["kept/A"], torch.tensor(0.5))
    torch.testing.assert_close(prepared.report["entropy/A"], entropies.mean())
    assert prepared.weights["B"].sum() == 6
    assert "kept/B" not in prepared.report


def test_skip_shows_the_student_only_what_a_term_keeps():
    views = make_views(8)
    objective = two_teachers("skip")
    objective(views, {})
    masks = [entropy(teacher_logits(objective, name, views)) < limit for name, limit in LIMITS.items()]
    seen = int((masks[0] | masks[1]).sum())
    assert 0 < seen < 8
    assert objective.trainable.student.batch_sizes == [seen]
    assert all(teacher.batch_sizes[0] == 8 for teacher in objective.teachers.values())
    whole = two_teachers("weight")
    whole(views, {})
    assert whole.trainable.student.batch_sizes == [8]


@pytest.mark.parametrize("sizes", [(8,), (3, 5), (5, 3)])
def test_reports_of_parts_join_to_the_report_of_the_whole(sizes):
    """Parts differ in how many examples the student sees; entropies are over all examples, agreements over those."""
    views = make_views(8)
    objective = two_teachers("skip")
    meter, edges = MeanMeter(), [sum(sizes[:i]) for i in range(len(sizes) + 1)]
    for a, b in pairwise(edges):
        output = objective(rows(views, a, b), {})
        assert output.report.keys() == output.report_weights.keys()
        meter.update(output.report, output.report_weights)
    logits = {name: teacher_logits(objective, name, views) for name in "AB"}
    kept = {name: entropy(logits[name]) < limit for name, limit in LIMITS.items()}
    seen = kept["A"] | kept["B"]
    for a, b in pairwise(edges):
        assert seen[a:b].any(), "a part without kept examples shows one all the same"
    features = objective.trainable.student({"rgb": views["student/rgb"]}).features
    means = meter.read()
    for name in "AB":
        agree = objective.trainable.adapters[name](features).argmax(1) == logits[name].argmax(1)
        assert means[f"agreement/{name}"] == pytest.approx(float(agree[seen].float().mean()))
        assert means[f"entropy/{name}"] == pytest.approx(float(entropy(logits[name]).mean()), rel=1e-5)
        assert means[f"kept/{name}"] == pytest.approx(float(kept[name].float().mean()))


def test_nothing_is_skipped_beside_a_term_without_a_gate():
    objective = two_teachers("skip", limits=(0.0, None))
    objective(make_views(8), {})
    assert objective.trainable.student.batch_sizes == [8]


@pytest.mark.parametrize("gate", ["weight", "skip"])
@pytest.mark.parametrize("gate_mean", ["all", "kept"])
def test_a_batch_without_kept_examples_gives_zero_gradients(gate, gate_mean):
    objective = two_teachers(gate, gate_mean, limits=(0.0, 0.0))
    output = objective(make_views(4), {})
    assert output.loss == 0
    assert output.loss.requires_grad
    output.loss.backward()
    assert all(not gradient.any() for gradient in gradients(objective).values())
    assert len(gradients(objective)) == 6
    assert objective.trainable.student.batch_sizes == [1 if gate == "skip" else 4]
    loss, gradient = run_steps(objective, make_views(4), [2, 2], 2)
    assert loss == 0
    assert all(not value.any() for value in gradient.values())


@pytest.mark.parametrize("gate", ["weight", "skip"])
def test_a_teacher_that_returns_nan_is_not_hidden_by_the_gate(gate):
    objective = two_teachers(gate)
    views = make_views(4)
    views["A/rgb"][1] = math.nan
    assert objective(views, {}).loss.isnan()


def test_the_gate_reads_the_prediction_at_the_terms_temperature():
    student, teacher = LinearNetwork(0), frozen(LinearNetwork(5, seed=1))
    adapters = {"A": build_adapter("linear", student, "features", teacher, "logits")}
    loss = build_loss("kl", temperature=4.0)
    objective = Objective(
        student, [Term("A", "features", loss, teacher="A", max_entropy=1.4, temperature=4.0)], {"A": teacher}, adapters
    )
    views = make_views(6)
    logits = teacher_logits(objective, "A", views)
    assert not torch.equal(entropy(logits, 4.0) < 1.4, entropy(logits) < 1.4)
    torch.testing.assert_close(objective.prepare(views, {}).weights["A"], (entropy(logits, 4.0) < 1.4).float())
