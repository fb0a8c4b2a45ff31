"""The terms of D3D: value and gradient against float64 loops written from the paper's equations 1 and 2.

L = L_a + λ · L_d; L_d is the squared error between layers before any softmax, of the student and of the frozen teacher.
"""

from __future__ import annotations

import math

import pytest
import torch
from linear_networks import LinearNetwork, frozen, gradients, make_views, run_steps
from torch import Tensor

from distinit_plugin.errors import UserError
from distinit_plugin.losses import NORMALIZE_EPS, build_loss
from distinit_plugin.objectives import Objective, Term, build_adapter

CLASSES, BATCH = 5, 4
LABELS = torch.tensor([0, 4, 2, 2])
LAMBDA = 0.5
NORMALIZATIONS = ("none", "variance", "standardize")
REDUCTIONS = ("mean", "sum")


# --------------------------------------------------------------------------------------- the equations, in plain Python
def standardized(column: list[float]) -> tuple[list[float], float]:
    mean = sum(column) / len(column)
    variance = sum((value - mean) ** 2 for value in column) / len(column)
    deviation = math.sqrt(variance + NORMALIZE_EPS)
    return [(value - mean) / deviation for value in column], deviation


def column_loop(student: list[float], target: list[float], reduction: str, normalize: str) -> tuple[float, list[float]]:
    """Squared error of the vectors of one position, and its gradient."""
    deviation = 1.0
    if normalize == "standardize":
        (student, deviation), (target, _) = standardized(student), standardized(target)
    size = len(student)
    divisor = size if reduction == "mean" else 1
    errors = [s - t for s, t in zip(student, target, strict=True)]
    slopes = [2 * error / divisor for error in errors]
    if normalize == "standardize":
        mean = sum(slopes) / size
        along = sum(slope * s for slope, s in zip(slopes, student, strict=True)) / size
        slopes = [(slope - mean - s * along) / deviation for slope, s in zip(slopes, student, strict=True)]
    return sum(error**2 for error in errors) / divisor, slopes


def distillation_loop(student: Tensor, target: Tensor, reduction: str, normalize: str) -> tuple[Tensor, Tensor]:
    """(B,K,…) → per example the mean over positions (B,), and its gradient."""
    s, t = (tensor.double().reshape(*tensor.shape[:2], -1) for tensor in (student, target))
    values, gradient = torch.zeros(len(s), dtype=torch.float64), torch.zeros_like(s)
    for example in range(len(s)):
        numbers = t[example].flatten().tolist()
        mean = sum(numbers) / len(numbers)
        variance = sum((number - mean) ** 2 for number in numbers) / len(numbers)
        scale = variance + NORMALIZE_EPS if normalize == "variance" else 1.0
        positions = s.shape[2]
        for place in range(positions):
            columns = s[example, :, place].tolist(), t[example, :, place].tolist()
            value, slopes = column_loop(*columns, reduction, normalize)
            values[example] += value / positions / scale
            gradient[example, :, place] = torch.tensor(slopes, dtype=torch.float64) / positions / scale
    return values, gradient.reshape(student.shape)


def action_loop(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy of each example and its gradient."""
    values, gradient = [], torch.zeros_like(logits)
    for example, label in enumerate(labels.tolist()):
        powers = [math.exp(logit) for logit in logits[example].tolist()]
        probs = [power / sum(powers) for power in powers]
        values.append(-math.log(probs[label]))
        gradient[example] = torch.tensor([p - (k == label) for k, p in enumerate(probs)], dtype=torch.float64)
    return torch.tensor(values, dtype=torch.float64), gradient


# ------------------------------------------------------------------------------------------------ the loss by itself
def pair(shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    student, target = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    return 2 * student + 0.3, 3 * target - 1.5


def loss_and_gradient(student: Tensor, target: Tensor, **options: str) -> tuple[Tensor, Tensor]:
    student = student.clone().requires_grad_()
    values = build_loss("mse", **options)(student, target)
    return values.detach(), torch.autograd.grad(values.sum(), student)[0]


@pytest.mark.parametrize("shape", [(3, 5), (2, 4, 3), (2, 4, 2, 3, 2)], ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("normalize", NORMALIZATIONS)
def test_the_distillation_loss_equals_the_loop(normalize, reduction, shape):
    student, target = pair(shape)
    found = loss_and_gradient(student, target, class_reduction=reduction, normalize=normalize)
    expected = distillation_loop(student, target, reduction, normalize)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    for other in set(NORMALIZATIONS) - {normalize}:  # the control: the others are other losses
        other_value, other_gradient = distillation_loop(student, target, reduction, other)
        assert not torch.allclose(found[0], other_value, rtol=0.05)
        assert not torch.allclose(found[1], other_gradient, rtol=0.05)


@pytest.mark.parametrize("normalize", NORMALIZATIONS)
def test_an_example_does_not_depend_on_its_batch(normalize):
    student, target = pair((3, 4, 2, 3, 2))
    together = loss_and_gradient(student, target, normalize=normalize)
    for example in range(3):
        rows = slice(example, example + 1)
        alone = loss_and_gradient(student[rows], target[rows], normalize=normalize)
        torch.testing.assert_close(alone, (together[0][rows], together[1][rows]), rtol=1e-12, atol=0)


def test_what_normalisation_is_for():
    """The teacher's scale (``variance``), or scale and offset of both sides (``standardize``), no longer count."""
    student, target = pair((3, 64))
    losses = {name: build_loss("mse", normalize=name) for name in NORMALIZATIONS}
    scaled = {name: loss(100 * student, 100 * target) / loss(student, target) for name, loss in losses.items()}
    torch.testing.assert_close(scaled["none"], torch.full_like(scaled["none"], 1e4))
    for name in ("variance", "standardize"):
        torch.testing.assert_close(scaled[name], torch.ones_like(scaled[name]), rtol=1e-4, atol=0)
    mean = target.mean(1, keepdim=True).expand_as(target)
    torch.testing.assert_close(losses["variance"](mean, target), torch.ones(3).double(), rtol=1e-4, atol=0)
    alike = losses["standardize"](7 * target + 2, target)
    assert alike.max() < 1e-8 < losses["variance"](7 * target + 2, target).min()


@pytest.mark.parametrize("normalize", NORMALIZATIONS)
def test_a_constant_target_is_finite(normalize):
    student, _ = pair((3, 5))
    values, gradient = loss_and_gradient(student, torch.full_like(student, 2.0), normalize=normalize)
    assert torch.isfinite(values).all()
    assert torch.isfinite(gradient).all()


def test_wrong_normalisation_is_named():
    with pytest.raises(UserError, match="Allowed: none, variance, standardize"):
        build_loss("mse", normalize="std")
    with pytest.raises(UserError, match="cosine has no option NORMALIZE"):
        build_loss("cosine", normalize="variance")


# -------------------------------------------------------------------------------------------- through the objective
def networks(teacher_width: int = 6, teacher_classes: int = CLASSES) -> tuple[LinearNetwork, LinearNetwork]:
    return LinearNetwork(CLASSES).double(), frozen(LinearNetwork(teacher_classes, width=teacher_width, seed=1).double())


def batch() -> dict[str, Tensor]:
    return {name: view.double() for name, view in make_views(BATCH, ("student", "FLOW")).items()}


def d3d(student, teacher, layer, *, head="own", action=True, weight=LAMBDA, warmup=0.0, **options) -> Objective:
    """An objective of one flow teacher, with or without the action term."""
    terms = [Term("action", "logits", build_loss("cross_entropy"))] if action else []
    loss = build_loss("mse", **options)
    terms.append(Term("FLOW", layer, loss, weight=weight, warmup=warmup, teacher="FLOW", teacher_layer=layer))
    torch.manual_seed(5)
    adapter = build_adapter(head, student, layer, teacher, layer)
    return Objective(student, terms, {"FLOW": teacher}, {"FLOW": adapter.double()})


def slopes_of_logits(student: LinearNetwork, clip: Tensor, slope: Tensor) -> dict[str, Tensor]:
    """Gradients of the student's parameters from that of its logits (B,K), by the chain rule."""
    pixels = clip.flatten(2).mean(2)  # the mean of a 1×1×1 convolution is the convolution of the mean
    features = pixels @ student.conv.weight.flatten(1).T + student.conv.bias
    return {
        "student.fc.weight": slope.T @ features,
        "student.fc.bias": slope.sum(0),
        **slopes_of_features(pixels, slope @ student.fc.weight),
    }


def slopes_of_features(pixels: Tensor, slope: Tensor) -> dict[str, Tensor]:
    return {
        "student.conv.weight": (slope.T @ pixels).view(*slope.shape[1:], pixels.shape[1], 1, 1, 1),
        "student.conv.bias": slope.sum(0),
    }


def added(*parts: dict[str, Tensor]) -> dict[str, Tensor]:
    names = {name for part in parts for name in part}
    return {name: sum(part[name] for part in parts if name in part) for name in names}


def check(objective: Objective, views, loss: Tensor, slopes: dict[str, Tensor], targets=None) -> None:
    """Loss and gradient of every parameter; those that no term reaches get none."""
    targets = {"label": LABELS} if targets is None else targets
    output = objective(views, targets)
    output.loss.backward()
    torch.testing.assert_close(output.loss.detach(), loss, rtol=1e-10, atol=1e-12)
    found = {name: p.grad for name, p in objective.trainable.named_parameters() if p.grad is not None}
    assert found.keys() == slopes.keys()
    with torch.no_grad():
        torch.testing.assert_close(found, {name: slopes[name] for name in found}, rtol=1e-9, atol=1e-11)
    # The control: half of λ more, and neither is equal.
    wrong = loss + 0.5 * LAMBDA * output.terms["loss/FLOW"]
    assert not torch.allclose(output.loss.detach(), wrong, rtol=1e-3)


@pytest.mark.parametrize("action", [True, False], ids=["action", "no action"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("normalize", NORMALIZATIONS)
@torch.no_grad()
def test_own_logits(normalize, reduction, action):
    """D3D itself, and its row "without action loss"."""
    student, teacher = networks()
    views = batch()
    logits, target = (
        net({"rgb": views[f"{name}/rgb"]}).logits for net, name in ((student, "student"), (teacher, "FLOW"))
    )
    distilled, slope = distillation_loop(logits, target, reduction, normalize)
    acted, action_slope = action_loop(logits, LABELS)
    loss = action * acted.mean() + LAMBDA * distilled.mean()
    slope = (action * action_slope + LAMBDA * slope) / BATCH
    slopes = slopes_of_logits(student, views["student/rgb"], slope)
    with torch.enable_grad():
        objective = d3d(student, teacher, "logits", action=action, class_reduction=reduction, normalize=normalize)
        check(objective, views, loss, slopes, {"label": LABELS} if action else {})
    assert not list(objective.trainable.adapters.parameters())


@pytest.mark.parametrize("normalize", NORMALIZATIONS)
@torch.no_grad()
def test_features_with_an_own_head(normalize):
    student, teacher = networks()
    views = batch()
    output = student({"rgb": views["student/rgb"]})
    target = teacher({"rgb": views["FLOW/rgb"]}).features
    distilled, slope = distillation_loop(output.features, target, "mean", normalize)
    acted, action_slope = action_loop(output.logits, LABELS)
    slopes = added(
        slopes_of_logits(student, views["student/rgb"], action_slope / BATCH),
        slopes_of_features(views["student/rgb"].flatten(2).mean(2), LAMBDA * slope / BATCH),
    )
    with torch.enable_grad():
        check(
            d3d(student, teacher, "features", normalize=normalize),
            views,
            acted.mean() + LAMBDA * distilled.mean(),
            slopes,
        )


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("normalize", NORMALIZATIONS)
@torch.no_grad()
def test_a_tapped_layer_through_a_linear_adapter(normalize, reduction):
    """As the rows 2C, 4C, 4F of table 6, with a teacher of other channels; λ is 100 there."""
    student, teacher = networks(teacher_width=3)
    views = batch()
    clip = views["student/rgb"]
    views["FLOW/rgb"] = views["FLOW/rgb"].expand(-1, -1, clip.shape[2], -1, -1).contiguous()
    with torch.enable_grad():
        objective = d3d(student, teacher, "stage", head="linear", class_reduction=reduction, normalize=normalize)
    adapter = objective.trainable.adapters["FLOW"]
    maps, target = student.conv(clip), teacher.conv(views["FLOW/rgb"])
    weight = adapter.weight.flatten(1)
    prediction = torch.einsum("dc,bcthw->bdthw", weight, maps) + adapter.bias.view(-1, 1, 1, 1)
    distilled, slope = distillation_loop(prediction, target, reduction, normalize)
    acted, action_slope = action_loop(student({"rgb": clip}).logits, LABELS)
    slope = LAMBDA * slope / BATCH
    below = torch.einsum("dc,bdthw->bcthw", weight, slope)
    tapped = {
        "adapters.FLOW.weight": torch.einsum("bdthw,bcthw->dc", slope, maps).view_as(adapter.weight),
        "adapters.FLOW.bias": slope.sum((0, 2, 3, 4)),
        "student.conv.weight": torch.einsum("bcthw,bithw->ci", below, clip).view_as(student.conv.weight),
        "student.conv.bias": below.sum((0, 2, 3, 4)),
    }
    slopes = added(tapped, slopes_of_logits(student, clip, action_slope / BATCH))
    with torch.enable_grad():
        check(objective, views, acted.mean() + LAMBDA * distilled.mean(), slopes)


def test_the_teacher_of_a_tapped_layer_is_not_a_tapped_student():
    """The control of the test above: where the two sides are swapped, the loss is the same and nothing trains."""
    student, teacher = networks()
    views = batch()
    swapped = {"student/rgb": views["student/rgb"], "FLOW/rgb": views["student/rgb"]}
    same = d3d(student, frozen(LinearNetwork(CLASSES).double()), "stage", action=False)(swapped, {})
    assert same.loss == 0
    other = d3d(student, teacher, "stage", action=False)(swapped, {})
    assert other.loss > 0
    other.loss.backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())


# ------------------------------------------------------------------------------------------------------- warm-up of λ
@pytest.mark.parametrize("position", [0.0, 1.0, 2.5, 4.0, 7.0])
def test_the_weight_rises_on_a_straight_line(position):
    student, teacher = networks()
    views = batch()
    objective = d3d(student, teacher, "logits", warmup=4.0, class_reduction="sum")
    prepared = objective.prepare(views, {"label": LABELS})
    output = objective.step(prepared, position=position)
    output.loss.backward()
    found = gradients(objective)
    factor = LAMBDA * min(position / 4, 1)
    expected = output.terms["loss/action"] + factor * output.terms["loss/FLOW"]
    torch.testing.assert_close(output.loss.detach(), expected, rtol=1e-12, atol=0)
    # The gradient is that of an objective whose λ is this factor (of none at all at the start).
    parts = [d3d(student, teacher, "logits", weight=weight, class_reduction="sum") for weight in (1.0, 2.0)]
    slopes = []
    for part in parts:
        part.trainable.zero_grad()
        part(views, {"label": LABELS}).loss.backward()
        slopes.append(gradients(part))
    for name, slope in found.items():  # both are linear in λ
        torch.testing.assert_close(slope, slopes[0][name] + (factor - 1) * (slopes[1][name] - slopes[0][name]))
    assert objective.warming_weights(position) == ({"weight/FLOW": factor} if position < 4 else {})


def test_without_a_position_the_weight_is_the_full_one():
    """So that validations can be compared with one another."""
    student, teacher = networks()
    views, targets = batch(), {"label": LABELS}
    full = d3d(student, teacher, "logits")(views, targets).loss
    warming = d3d(student, teacher, "logits", warmup=4.0)
    assert warming(views, targets).loss == full
    assert warming.step(warming.prepare(views, targets), position=1.0).loss != full


@pytest.mark.parametrize(("sizes", "ranks"), [([2, 2], 1), ([1, 2, 1], 1), ([2, 2], 2)])
def test_accumulation_and_ranks_do_not_change_a_warming_step(sizes, ranks):
    student, teacher = networks()
    objective = d3d(student, teacher, "logits", action=False, warmup=4.0)
    loss, gradient = run_steps(objective, batch(), [BATCH], 1, position=1.0)
    split_loss, split_gradient = run_steps(objective, batch(), sizes, ranks, position=1.0)
    torch.testing.assert_close(split_loss, loss)
    torch.testing.assert_close(split_gradient, gradient)
    assert loss < 0.3 * run_steps(objective, batch(), [BATCH], 1)[0]


def test_bad_warmup_is_named():
    with pytest.raises(UserError, match="WARMUP -1"):
        Term("FLOW", "logits", build_loss("mse"), teacher="FLOW", warmup=-1)
