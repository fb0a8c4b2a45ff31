"""Terms, gates and exact means, on networks whose arithmetic is known."""

from __future__ import annotations

import pytest
import torch
from linear_networks import (
    LIMITS,
    LinearNetwork,
    frozen,
    gradients,
    make_views,
    rows,
    run_steps,
    teacher_logits,
    two_teachers,
)
from torch import Tensor, nn

from distinit_plugin.errors import UserError
from distinit_plugin.losses import build_loss, entropy
from distinit_plugin.objectives import Objective, Term, Trainable, build_adapter, match_grid
from distinit_plugin.types import Network


# ------------------------------------------------------------------------------------------------- value and gradient
@pytest.mark.parametrize("gate", ["weight", "skip"])
@pytest.mark.parametrize("gate_mean", ["all", "kept"])
def test_loss_and_gradient_equal_the_equations(gate, gate_mean):
    objective = two_teachers(gate, gate_mean)
    views = make_views(8)
    output = objective(views, {})
    output.loss.backward()
    found = gradients(objective)
    objective.trainable.zero_grad()

    logits = {name: teacher_logits(objective, name, views) for name in "AB"}
    kept = {name: entropy(logits[name]) < limit for name, limit in LIMITS.items()}
    assert all(0 < int(mask.sum()) < 8 for mask in kept.values())
    assert not torch.equal(kept["A"], kept["B"])
    features = objective.trainable.student({"rgb": views["student/rgb"]}).features
    heads = objective.trainable.adapters
    per_example = {
        "A": -(logits["A"].softmax(1) * heads["A"](features).log_softmax(1)).sum(1),
        "B": (heads["B"](features) - logits["B"]).square().mean(1),
    }
    parts = {
        name: loss[kept[name]].sum() / (8 if gate_mean == "all" else kept[name].sum())
        for name, loss in per_example.items()
    }
    expected = parts["A"] + 0.25 * parts["B"]
    expected.backward()
    torch.testing.assert_close(output.loss, expected)
    torch.testing.assert_close(output.terms, {f"loss/{name}": part.detach() for name, part in parts.items()})
    torch.testing.assert_close(found, gradients(objective))
    assert output.normalizer == 8


@pytest.mark.parametrize("gate", ["weight", "skip"])
@pytest.mark.parametrize("gate_mean", ["all", "kept"])
@pytest.mark.parametrize(("sizes", "ranks"), [([3, 3, 3], 1), ([2, 6, 1], 1), ([5, 4], 2), ([1, 2, 3, 3], 2)])
def test_accumulation_and_ranks_do_not_change_the_gradient(gate, gate_mean, sizes, ranks):
    objective = two_teachers(gate, gate_mean)
    views = make_views(9)
    loss, gradient = run_steps(objective, views, [9], 1)
    split_loss, split_gradient = run_steps(objective, views, sizes, ranks)
    torch.testing.assert_close(split_loss, loss)
    torch.testing.assert_close(split_gradient, gradient)
    assert all(value.abs().sum() > 0 for value in gradient.values())


def test_means_of_micro_batches_would_be_wrong():
    """Negative control of the test above: a mean of means weighs kept examples unequally."""
    objective = two_teachers("weight", "kept")
    views = make_views(9)
    _, gradient = run_steps(objective, views, [9], 1)
    objective.trainable.zero_grad()
    (sum(objective(rows(views, a, b), {}).loss for a, b in ((0, 2), (2, 8), (8, 9))) / 3).backward()
    difference = gradients(objective)["student.conv.weight"] - gradient["student.conv.weight"]
    assert difference.norm() > 0.05 * gradient["student.conv.weight"].norm()


def test_d3d_matches_own_logits_beside_an_action_loss():
    student, teacher = LinearNetwork(5), frozen(LinearNetwork(5, seed=1))
    terms = [
        Term("action", "logits", build_loss("cross_entropy")),
        Term("FLOW", "logits", build_loss("mse", class_reduction="sum"), weight=0.5, teacher="FLOW"),
    ]
    adapters = {"FLOW": build_adapter("own", student, "logits", teacher, "logits")}
    objective = Objective(student, terms, {"FLOW": teacher}, adapters)
    assert set(objective.trainable.state_dict()) == {f"student.{name}" for name in student.state_dict()}
    views, labels = make_views(4, ("student", "FLOW")), torch.tensor([0, 4, 2, 2])
    output = objective(views, {"label": labels})
    logits, wanted = student({"rgb": views["student/rgb"]}).logits, teacher({"rgb": views["FLOW/rgb"]}).logits
    action = nn.functional.cross_entropy(logits, labels)
    torch.testing.assert_close(output.loss, action + 0.5 * (logits - wanted).square().sum(1).mean())
    torch.testing.assert_close(output.report["top1"], (logits.argmax(1) == labels).float().mean())
    assert output.report["top5"] == 1
    torch.testing.assert_close(output.report["agreement/FLOW"], (logits.argmax(1) == wanted.argmax(1)).float().mean())


def test_top5_with_fewer_than_five_classes():
    objective = Objective(LinearNetwork(2), [Term("action", "logits", build_loss("cross_entropy"))], {}, {})
    assert objective(make_views(3), {"label": torch.tensor([0, 1, 1])}).report["top5"] == 1


@pytest.mark.parametrize("loss", ["cosine", "mse"])
def test_features_as_targets_give_gradients(loss):
    """Targets come from inference mode, whose tensors autograd refuses to save."""
    student, teacher = LinearNetwork(0), frozen(LinearNetwork(0, width=7, seed=1))
    adapters = {"DINO": build_adapter("linear", student, "features", teacher, "features")}
    term = Term("DINO", "features", build_loss(loss), teacher="DINO", teacher_layer="features")
    output = Objective(student, [term], {"DINO": teacher}, adapters)(make_views(4, ("student", "DINO")), {})
    output.loss.backward()
    assert student.conv.weight.grad.abs().sum() > 0
    assert set(output.report) == set()


def test_maps_are_compared_on_the_teachers_grid():
    student, teacher = LinearNetwork(0), frozen(LinearNetwork(5, width=2, seed=1))
    adapter = build_adapter("linear", student, "stage", teacher, "stage")
    term = Term("DENSE", "stage", build_loss("mse"), teacher="DENSE", teacher_layer="stage")
    objective = Objective(student, [term], {"DENSE": teacher}, {"DENSE": adapter})
    views = make_views(4, ("student", "DENSE"))
    output = objective(views, {})
    # 4 student frames against one teacher frame: the mean over time, by loops.
    student_map = adapter(student.conv(views["student/rgb"])).mean(2, keepdim=True)
    torch.testing.assert_close(output.loss, (student_map - teacher.conv(views["DENSE/rgb"])).square().mean())
    output.loss.backward()
    assert adapter.weight.grad.abs().sum() > 0


def test_match_grid_averages_in_time_and_coarser_space_and_interpolates_finer_space():
    clip = torch.arange(2 * 3 * 8 * 4 * 4, dtype=torch.float32).view(2, 3, 8, 4, 4)
    halves = match_grid(clip, torch.zeros(2, 5, 2, 2, 2))
    torch.testing.assert_close(halves[:, :, 0, 1, 0], clip[:, :, :4, 2:, :2].mean((2, 3, 4)))
    torch.testing.assert_close(halves[:, :, 1, 0, 1], clip[:, :, 4:, :2, 2:].mean((2, 3, 4)))
    finer = match_grid(clip, torch.zeros(2, 5, 8, 8, 8))
    expected = nn.functional.interpolate(clip.flatten(1, 2), size=(8, 8), mode="bilinear", align_corners=False)
    torch.testing.assert_close(finer.flatten(1, 2), expected)
    assert match_grid(clip, torch.zeros(2, 5, 8, 4, 4)) is clip
    assert match_grid(clip.flatten(1), torch.zeros(2, 5)).shape == (2, 384)
    head = nn.Conv3d(3, 5, 1)
    grid = torch.zeros(2, 5, 3, 7, 2)
    torch.testing.assert_close(match_grid(head(clip), grid), head(match_grid(clip, grid)), rtol=1e-4, atol=1e-3)


# ------------------------------------------------------------------------------------------------------------- running
def test_a_plain_loop_learns_the_teacher():
    torch.manual_seed(0)
    student, teacher = LinearNetwork(0), frozen(LinearNetwork(3, seed=1))
    adapters = {"A": build_adapter("linear", student, "features", teacher, "logits")}
    objective = Objective(student, [Term("A", "features", build_loss("kl"), teacher="A")], {"A": teacher}, adapters)
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    optimizer = torch.optim.Adam(objective.trainable.parameters(), lr=0.05)
    clips = make_views(32, ("student",))["student/rgb"]
    views = {"student/rgb": clips, "A/rgb": clips}
    losses = []
    for _ in range(60):
        output = objective(views, {})
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        losses.append(float(output.loss.detach()))
    assert losses[0] > 0.5
    assert losses[-1] < 0.05
    assert output.report["agreement/A"] > 0.9
    torch.testing.assert_close(dict(teacher.state_dict()), before, rtol=0, atol=0)
    assert not any(name.startswith(("teacher", "A.")) for name in objective.trainable.state_dict())


def test_mixed_precision_reaches_networks_but_not_losses():
    seen: dict[str, torch.dtype] = {}

    def spy(student: Tensor, target: Tensor) -> Tensor:
        seen.update(student=student.dtype, target=target.dtype, product=(target @ target.T).dtype)
        return build_loss("soft_cross_entropy")(student, target)

    student, teacher = LinearNetwork(0), frozen(LinearNetwork(5, seed=1))
    adapters = {"A": build_adapter("linear", student, "features", teacher, "logits")}
    objective = Objective(student, [Term("A", "features", spy, teacher="A")], {"A": teacher}, adapters)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = objective(make_views(4), {})
        output.loss.backward()
    assert seen["student"] == torch.bfloat16
    assert seen["target"] == seen["product"] == torch.float32
    assert output.loss.dtype == torch.float32
    assert student.conv.weight.grad.dtype == torch.float32


def test_the_wrapped_module_runs_and_the_bare_one_is_saved():
    """DDP on one process: every parameter gets its gradient through the wrap, or DDP stops at the second step."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        objective, plain = two_teachers("skip", limits=(0.0, 0.0)), two_teachers("skip")
        bare = objective.trainable
        wrapped = objective.wrap(nn.parallel.DistributedDataParallel)
        assert isinstance(wrapped, nn.parallel.DistributedDataParallel)
        assert objective.trainable is bare
        for _ in range(2):
            objective(make_views(4), {}).loss.backward()
        objective = two_teachers("skip")
        objective.wrap(nn.parallel.DistributedDataParallel)
        for each in (objective, plain):
            each(make_views(8), {}).loss.backward()
        torch.testing.assert_close(gradients(objective), gradients(plain))
    finally:
        torch.distributed.destroy_process_group()


def test_trainable_passes_boxes_and_taps():
    seen = {}

    class Spy(LinearNetwork):
        def forward(self, views, *, boxes=None, taps=()):
            seen.update(boxes=boxes, taps=tuple(taps))
            return super().forward(views, taps=taps)

    terms = [Term("A", "stage", build_loss("mse"), teacher="A"), Term("B", "stage", build_loss("mse"), teacher="B")]
    output, predictions = Trainable(Spy(0), terms, {})({"rgb": torch.zeros(1, 3, 1, 2, 2)}, torch.zeros(1, 4))
    assert seen["boxes"].shape == (1, 4)
    assert seen["taps"] == ("stage",)
    assert output.logits is None
    assert predictions["A"].shape == predictions["B"].shape == (1, 6, 1, 2, 2)


# -------------------------------------------------------------------------------------------------------------- errors
def objective_with(
    student: Network, teacher: Network | None = None, head: str = "", teachers=("A",), **term
) -> Objective:
    teacher = teacher or frozen(LinearNetwork(5, seed=1))
    values = {"name": "A", "student_layer": "features", "loss": build_loss("mse"), "teacher": "A", **term}
    adapters = {}
    if head:
        adapters["A"] = build_adapter(
            head, student, values["student_layer"], teacher, values.get("teacher_layer", "logits")
        )
    return Objective(student, [Term(**values)], dict.fromkeys(teachers, teacher), adapters)


MISFITS = {
    "the student has no classifier": lambda: objective_with(LinearNetwork(0), head="own", student_layer="logits"),
    "term 'A': the student has no classifier": lambda: objective_with(
        LinearNetwork(0), student_layer="logits", teacher=None
    ),
    "have size 7, the teacher's logits 5": lambda: objective_with(LinearNetwork(7), head="own", student_layer="logits"),
    "term 'A'.*HEAD own needs equal sizes": lambda: objective_with(LinearNetwork(7), student_layer="logits"),
    "Did you mean linear": lambda: objective_with(LinearNetwork(0), head="linaer"),
    "no layer named 'stag'. Did you mean stage": lambda: objective_with(
        LinearNetwork(0), head="linear", student_layer="stag"
    ),
    "the teacher has no layer named 'stages'": lambda: objective_with(
        LinearNetwork(0), head="linear", teacher_layer="stages"
    ),
    "one is a vector per clip, the other a map": lambda: objective_with(
        LinearNetwork(0), head="linear", teacher_layer="stage"
    ),
    "MAX_ENTROPY is set, but the teacher A has no classifier": lambda: objective_with(
        LinearNetwork(0), frozen(LinearNetwork(0)), teacher_layer="features", max_entropy=1.0
    ),
    "there is no teacher 'A'": lambda: objective_with(LinearNetwork(0), teachers=("AA", "IMAGENET")),
    "cannot be named 'student'": lambda: objective_with(LinearNetwork(0), head="linear", teachers=("A", "student")),
    "A is not frozen": lambda: objective_with(LinearNetwork(0), LinearNetwork(5), head="linear"),
    "teacher A is not frozen": lambda: objective_with(
        LinearNetwork(0), LinearNetwork(5).requires_grad_(False), head="linear"
    ),
    "LOSS_WEIGHT 0.0": lambda: objective_with(LinearNetwork(0), weight=0.0),
    "TEMPERATURE -1.0": lambda: objective_with(LinearNetwork(0), temperature=-1.0),
    "cannot be named 'a.b'": lambda: objective_with(LinearNetwork(0), teacher=None, name="a.b"),
    "no teacher to take it of": lambda: Term("action", "logits", build_loss("cross_entropy"), max_entropy=1.0),
    "nothing to train on": lambda: Objective(LinearNetwork(3), [], {}, {}),
    "same name": lambda: Objective(LinearNetwork(3), [Term("x", "logits", build_loss("mse"))] * 2, {}, {}),
    "'y', which is no term": lambda: Objective(
        LinearNetwork(3), [Term("x", "logits", build_loss("mse"))], {}, {"y": nn.Identity()}
    ),
    "DISTILL.GATE is 'drop'": lambda: two_teachers(gate="drop"),
    "Did you mean kept": lambda: two_teachers(gate_mean="keep"),
}


@pytest.mark.parametrize("message", MISFITS)
def test_what_does_not_fit_is_named_before_any_data(message):
    with pytest.raises(UserError, match=message):
        MISFITS[message]()


def test_missing_labels_and_views_are_named():
    objective = Objective(LinearNetwork(3), [Term("action", "logits", build_loss("cross_entropy"))], {}, {})
    with pytest.raises(UserError, match="the term 'action' needs labels and the batch has none"):
        objective(make_views(2), {})
    with pytest.raises(UserError, match="one label per example"):
        objective(make_views(2), {"label": torch.tensor([0])})
    with pytest.raises(UserError, match="no view for 'A': expected 'A/<view>', got student/rgb"):
        two_teachers()(make_views(2, ("student",)), {})


def test_labels_are_not_needed_where_no_term_reads_them():
    objective = two_teachers("skip")
    views = make_views(4)
    without, with_labels = objective(views, {}), objective(views, {"label": torch.tensor([0, 1, 2, 3])})
    torch.testing.assert_close(without.loss, with_labels.loss)
    assert "top1" not in with_labels.report  # the student has no classifier of its own
