"""Values and gradients of the losses against float64 loops written from the papers' equations."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from distinit_plugin.errors import UserError
from distinit_plugin.losses import LOSSES, build_loss, entropy

Vector = list[float]
SHAPES = [(3, 5), (2, 4, 2, 3, 2)]


def softmax(logits: Vector, temperature: float) -> Vector:
    """DistInit equation 1, on logits already averaged over frames."""
    powers = [math.exp(logit / temperature) for logit in logits]
    return [power / sum(powers) for power in powers]


def soft_cross_entropy_loop(
    student: Vector, target: Vector, tau: float, temper: bool, scale: bool, subtract_entropy: bool
) -> tuple[float, Vector]:
    student_tau = tau if temper else 1.0
    y, f = softmax(target, tau), softmax(student, student_tau)
    factor = tau**2 if scale else 1.0
    value = -sum(y_k * math.log(f_k) for y_k, f_k in zip(y, f, strict=True))
    if subtract_entropy:
        value += sum(y_k * math.log(y_k) for y_k in y)
    return factor * value, [factor * (f_k - y_k) / student_tau for y_k, f_k in zip(y, f, strict=True)]


def mse_loop(student: Vector, target: Vector, reduction: str) -> tuple[float, Vector]:
    divisor = len(student) if reduction == "mean" else 1
    differences = [s - t for s, t in zip(student, target, strict=True)]
    return sum(d * d for d in differences) / divisor, [2 * d / divisor for d in differences]


def cosine_loop(student: Vector, target: Vector) -> tuple[float, Vector]:
    dot = sum(s * t for s, t in zip(student, target, strict=True))
    s_norm, t_norm = math.hypot(*student), math.hypot(*target)
    cos = dot / (s_norm * t_norm)
    gradient = [-(t / (s_norm * t_norm) - cos * s / s_norm**2) for s, t in zip(student, target, strict=True)]
    return 1 - cos, gradient


def cross_entropy_loop(student: Vector, label: int, smoothing: float) -> tuple[float, Vector]:
    f, size = softmax(student, 1.0), len(student)
    q = [(1 - smoothing) * (k == label) + smoothing / size for k in range(size)]
    value = -sum(q_k * math.log(f_k) for q_k, f_k in zip(q, f, strict=True))
    return value, [f_k - q_k for q_k, f_k in zip(q, f, strict=True)]


def over_positions(
    loop: Callable[[Vector, Vector], tuple[float, Vector]], student: Tensor, target: Tensor
) -> tuple[Tensor, Tensor]:
    """Run a loop at every position of (B,K,…): per-example means and their gradient."""
    flat_student, flat_target = (tensor.double().reshape(*tensor.shape[:2], -1) for tensor in (student, target))
    batch, _, positions = flat_student.shape
    values, gradient = torch.zeros(batch, dtype=torch.float64), torch.zeros_like(flat_student)
    for example in range(batch):
        for position in range(positions):
            value, gradients = loop(
                flat_student[example, :, position].tolist(), flat_target[example, :, position].tolist()
            )
            values[example] += value / positions
            gradient[example, :, position] = torch.tensor(gradients, dtype=torch.float64) / positions
    return values, gradient.view(student.shape)


def value_and_gradient(loss: Callable[[Tensor, Tensor], Tensor], student: Tensor, target: Tensor):
    student = student.clone().requires_grad_()
    values = loss(student, target)
    return values.detach(), torch.autograd.grad(values.sum(), student)[0]


def pair(shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(len(shape))
    return tuple(2 * torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))  # type: ignore


CASES = [
    (name, {"temperature": tau, "temper_student": temper, "scale_by_temperature": scale},
     partial(soft_cross_entropy_loop, tau=tau, temper=temper, scale=scale, subtract_entropy=name == "kl"))
    for name in ("soft_cross_entropy", "kl")
    for tau in (1.0, 0.5, 4.0)
    for temper in (False, True)
    for scale in (False, True)
]  # fmt: skip
CASES += [
    ("mse", {"class_reduction": reduction}, partial(mse_loop, reduction=reduction)) for reduction in ("mean", "sum")
]
CASES += [("cosine", {}, cosine_loop)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    ("name", "options", "loop"), CASES, ids=lambda value: str(value) if not callable(value) else ""
)
def test_value_and_gradient_equal_the_equations(name, options, loop, shape):
    student, target = pair(shape)
    values, gradient = value_and_gradient(build_loss(name, **options), student, target)
    expected_values, expected_gradient = over_positions(loop, student, target)
    torch.testing.assert_close(values, expected_values, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_equals_the_equation(shape, smoothing):
    student, _ = pair(shape)
    labels = torch.arange(shape[0]) % shape[1]
    values, gradient = value_and_gradient(build_loss("cross_entropy", label_smoothing=smoothing), student, labels)
    rows = [
        over_positions(
            lambda s, _, k=int(label): cross_entropy_loop(s, k, smoothing), student[i : i + 1], student[i : i + 1]
        )
        for i, label in enumerate(labels)
    ]
    torch.testing.assert_close(values, torch.cat([row[0] for row in rows]), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(gradient, torch.cat([row[1] for row in rows]), rtol=1e-10, atol=1e-12)


def test_gradient_of_soft_cross_entropy_is_the_softmax_difference():
    student, target = pair((3, 5))
    _, gradient = value_and_gradient(build_loss("soft_cross_entropy"), student, target)
    torch.testing.assert_close(gradient, student.softmax(1) - target.softmax(1))


def test_cross_entropy_is_soft_cross_entropy_of_a_certain_teacher():
    student, _ = pair((4, 5))
    labels = torch.tensor([0, 4, 2, 2])
    certain = 1e4 * torch.nn.functional.one_hot(labels, 5).double()
    torch.testing.assert_close(
        build_loss("cross_entropy")(student, labels), build_loss("soft_cross_entropy")(student, certain)
    )


def test_kl_vanishes_at_the_teacher_and_is_cross_entropy_minus_entropy():
    student, target = pair((3, 5))
    options = {"temperature": 3.0, "temper_student": True, "scale_by_temperature": True}
    torch.testing.assert_close(build_loss("kl", **options)(target, target), torch.zeros(3, dtype=torch.float64))
    difference = build_loss("soft_cross_entropy", **options)(student, target) - build_loss("kl", **options)(
        student, target
    )
    torch.testing.assert_close(difference, 9 * entropy(target, 3.0))


def test_entropy_in_nats():
    logits = torch.tensor([[0.0, 0.0, 0.0, 0.0], [1e5, 0.0, 0.0, 0.0], [math.log(3.0), 0.0, -math.inf, -math.inf]])
    certain = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    torch.testing.assert_close(entropy(logits), torch.tensor([math.log(4), 0.0, certain]))
    expected = [-sum(p * math.log(p) for p in softmax(row, 2.5)) for row in pair((3, 5))[0].tolist()]
    torch.testing.assert_close(entropy(pair((3, 5))[0], 2.5), torch.tensor(expected, dtype=torch.float64))


def test_entropy_of_a_map_is_the_mean_over_positions():
    logits, _ = pair((2, 4, 2, 3, 2))
    columns = torch.stack([entropy(logits.flatten(2)[..., i]) for i in range(12)], dim=1)
    torch.testing.assert_close(entropy(logits), columns.mean(1))


@pytest.mark.parametrize("name", ["soft_cross_entropy", "kl", "mse", "cosine"])
def test_half_precision_is_computed_in_fp32(name):
    student, target = (tensor.to(torch.bfloat16) for tensor in pair((3, 64)))
    loss = build_loss(name)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        values, _ = value_and_gradient(loss, student, target)
    assert values.dtype == torch.float32
    torch.testing.assert_close(values.double(), loss(student.double(), target.double()), rtol=1e-5, atol=1e-5)


def test_every_registered_loss_returns_one_value_per_example():
    for name, _ in LOSSES:
        student, target = pair((3, 5))
        if name == "flow_decoding":
            student, target = torch.rand(3, 3, 2, 4, 4), torch.rand(3, 2, 2, 4, 4)
        assert build_loss(name)(student, torch.tensor([0, 1, 2]) if name == "cross_entropy" else target).shape == (3,)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "soft_crossentropy"}, "Did you mean soft_cross_entropy"),
        ({"name": "mse", "temperature": 2.0}, "mse has no option TEMPERATURE"),
        ({"name": "cosine", "class_reduction": "sum"}, "Its options: none"),
        ({"name": "cross_entropy", "temper_student": True}, "no option TEMPER_STUDENT"),
        ({"name": "kl", "label_smoothing": 0.1}, "no option LABEL_SMOOTHING"),
        ({"name": "kl", "temperature": 0.0}, "TEMPERATURE is 0.0"),
        ({"name": "kl", "temperature": math.nan}, "TEMPERATURE is nan"),
        ({"name": "mse", "class_reduction": "max"}, "Allowed: mean, sum"),
        ({"name": "cross_entropy", "label_smoothing": 1.0}, "LABEL_SMOOTHING is 1.0"),
    ],
)
def test_bad_options_are_named(arguments, message):
    with pytest.raises(UserError, match=message):
        build_loss(**arguments)


@pytest.mark.parametrize("name", ["soft_cross_entropy", "kl", "mse", "cosine"])
@pytest.mark.parametrize("shape", [(3, 1), (1, 5), (3, 5, 1, 1, 1), (3,)])
def test_nothing_is_broadcast(name, shape):
    with pytest.raises(UserError, match="shapes must be equal"):
        build_loss(name)(torch.zeros(3, 5), torch.zeros(shape))


@pytest.mark.parametrize("labels", [[0, 5, 1], [0, -1, 1]])
def test_labels_outside_of_the_classes_are_named(labels):
    with pytest.raises(UserError, match="do not fit the student's 5 classes"):
        build_loss("cross_entropy")(torch.zeros(3, 5), torch.tensor(labels))


def test_cross_entropy_refuses_a_teacher():
    with pytest.raises(UserError, match="Use soft_cross_entropy"):
        build_loss("cross_entropy")(torch.zeros(3, 5), torch.zeros(3, 5))
