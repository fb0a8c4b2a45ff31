"""Terms, gates and exact means, on networks whose arithmetic is known."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from distinit_plugin.engine.meters import MeanMeter
from distinit_plugin.errors import UserError
from distinit_plugin.losses import build_loss, entropy
from distinit_plugin.objectives import Objective, Term, Trainable, build_adapter, combine_counts, match_grid
from distinit_plugin.types import LayerInfo, ModelOutput, Network

CHANNELS = 3
LIMITS = {"A": 0.35, "B": 0.1}  # nats; keeps some of the examples, not the same ones for both teachers


class LinearNetwork(nn.Module):
    """A 1×1×1 convolution, a mean and a classifier: no part of the result depends on other examples of the batch."""

    def __init__(self, num_classes: int, width: int = 6, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.conv = nn.Conv3d(CHANNELS, width, 1)
        self.fc = nn.Linear(width, num_classes) if num_classes else None
        self.feature_dim, self.num_classes = width, num_classes
        self.layers = {"stage": LayerInfo(width, 1, 1)}
        self.batch_sizes: list[int] = []
        for parameter in self.parameters():
            nn.init.normal_(parameter, generator=generator)

    def forward(
        self, views: Mapping[str, Tensor], *, boxes: Tensor | None = None, taps: Collection[str] = ()
    ) -> ModelOutput:
        self.batch_sizes.append(len(views["rgb"]))
        maps = self.conv(views["rgb"])
        features = maps.mean((2, 3, 4))
        return ModelOutput(None if self.fc is None else self.fc(features), features, dict.fromkeys(taps, maps))

    def view_specs(self, split: str) -> dict:
        return {}

    def reset_classifier(self, num_classes: int) -> None:
        raise NotImplementedError

    def bare_state_dict(self) -> dict[str, Tensor]:
        return dict(self.state_dict())


class StepNetwork(LinearNetwork):
    """Answers at every frame; the answer to the clip is the last one."""

    def forward(
        self, views: Mapping[str, Tensor], *, boxes: Tensor | None = None, taps: Collection[str] = ()
    ) -> ModelOutput:
        self.batch_sizes.append(len(views["rgb"]))
        states = self.conv(views["rgb"]).mean((3, 4)).transpose(1, 2)
        logits = self.fc(states)
        return ModelOutput(logits[:, -1], states[:, -1], {}, logits.transpose(1, 2) if self.training else None)


def frozen(network: LinearNetwork) -> LinearNetwork:
    return network.eval().requires_grad_(False)


def make_views(
    batch_size: int, consumers: Collection[str] = ("student", "A", "B"), seed: int = 10
) -> dict[str, Tensor]:
    """Noise of a random colour: 4 frames for the student, one for teachers."""
    generator = torch.Generator().manual_seed(seed)
    views = {}
    for name in consumers:
        frames = 4 if name == "student" else 1
        colour = torch.randn(batch_size, CHANNELS, 1, 1, 1, generator=generator)
        views[f"{name}/rgb"] = colour + torch.randn(batch_size, CHANNELS, frames, 5, 5, generator=generator)
    return views


def rows(tensors: Mapping[str, Tensor], start: int, stop: int) -> dict[str, Tensor]:
    return {name: tensor[start:stop] for name, tensor in tensors.items()}


def two_teachers(
    gate: str = "weight", gate_mean: str = "all", limits: tuple = tuple(LIMITS.values()), **arguments
) -> Objective:
    """DistInit with two teachers, a new head each, and a gate each."""
    torch.manual_seed(0)
    student = LinearNetwork(0)
    teachers = {"A": frozen(LinearNetwork(5, seed=1)), "B": frozen(LinearNetwork(4, seed=2))}
    adapters = {
        name: build_adapter("linear", student, "features", teacher, "logits") for name, teacher in teachers.items()
    }
    losses = {"A": build_loss("soft_cross_entropy"), "B": build_loss("mse")}
    terms = [
        Term(name, "features", losses[name], weight, teacher=name, max_entropy=limit)
        for name, weight, limit in zip("AB", (1.0, 0.25), limits, strict=True)
    ]
    return Objective(student, terms, teachers, adapters, gate=gate, gate_mean=gate_mean, **arguments)


def gradients(objective: Objective) -> dict[str, Tensor]:
    return {name: parameter.grad.clone() for name, parameter in objective.trainable.named_parameters()}


def teacher_logits(objective: Objective, name: str, views: Mapping[str, Tensor]) -> Tensor:
    return objective.teachers[name]({"rgb": views[f"{name}/rgb"]}).logits


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


def run_steps(objective: Objective, views: Mapping[str, Tensor], sizes: list[int], ranks: int) -> tuple[Tensor, dict]:
    """One optimizer step from micro-batches of some sizes, dealt to ranks in turn, as a trainer under DDP does it."""
    edges = [sum(sizes[:i]) for i in range(len(sizes) + 1)]
    prepared = [objective.prepare(rows(views, a, b), {}) for a, b in pairwise(edges)]
    by_rank = [prepared[rank::ranks] for rank in range(ranks)]
    own_sums = [
        torch.stack([sum(item.counts[term.name] for item in items) for term in objective.terms]) for items in by_rank
    ]
    total = torch.zeros(())
    objective.trainable.zero_grad()
    for items in by_rank:
        counts = combine_counts(items, ranks, lambda _: sum(own_sums) if ranks > 1 else own_sums[0])
        for item in items:
            loss = objective.step(item, counts).loss / ranks  # DDP averages gradients over ranks
            loss.backward()
            total = total + loss.detach()
    return total, gradients(objective)


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
