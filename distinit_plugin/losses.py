"""Losses as arithmetic: (student, target) → one number per example, always in fp32 or better.

Shapes: student and a teacher's target are (B,K), (B,K,T) or (B,K,T,H,W); further dimensions after the second are
averaged per example. Labels are (B,) int64. Every loss returns (B,).

Equations are those of DistInit (arXiv 1901.09244): (1) the teacher's softmax with temperature τ, (2) the soft-target
cross-entropy. The mean of the logits over the picked frames in (1) is taken by the teacher.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as functional
from torch import Tensor

from distinit_plugin.errors import UserError
from distinit_plugin.flow.motion import polar_loss
from distinit_plugin.registry import LOSSES, lookup

Loss = Callable[[Tensor, Tensor], Tensor]
"""(student, target) → (B,)."""

ClassReduction = Literal["mean", "sum"]
Normalize = Literal["none", "variance", "standardize"]

NORMALIZE_EPS = 1e-5
"""Added to variances before they divide, as in PyTorch's normalisation layers: a constant vector becomes 0, not NaN."""


def full_precision(tensor: Tensor) -> Tensor:
    """The tensor in fp32, or in float64 where it is that already."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def per_example(values: Tensor) -> Tensor:
    """(B,…) → (B,): the mean over everything but the batch."""
    return values.flatten(1).mean(1) if values.ndim > 1 else values


@LOSSES.register()
def soft_cross_entropy(
    student: Tensor,
    target: Tensor,
    *,
    temperature: float = 1.0,
    temper_student: bool = False,
    scale_by_temperature: bool = False,
) -> Tensor:
    """Equation 2: −Σ_k y_k log f_k, with y = softmax(target / τ) (equation 1) and f = softmax(student).

    The gradient with respect to the student's logits is f − y.

    Args:
        student: Logits (B,K,…).
        target: The teacher's logits, of the same shape.
        temperature: τ > 0.
        temper_student: f = softmax(student / τ); the paper's equation 2 has no τ in f.
        scale_by_temperature: Multiply by τ², which keeps the size of the gradient when both sides are tempered
            (Hinton et al., arXiv 1503.02531, section 2).

    Returns:
        (B,), nats (times τ² when scaled).

    Raises:
        UserError: The shapes differ.
    """
    _check_same_shape("soft_cross_entropy", student, target)
    target_probs = functional.softmax(full_precision(target) / temperature, dim=1)
    student_log_probs = functional.log_softmax(
        full_precision(student) / (temperature if temper_student else 1.0), dim=1
    )
    loss = -(target_probs * student_log_probs).sum(1)
    return per_example(loss) * (temperature**2 if scale_by_temperature else 1.0)


@LOSSES.register()
def kl(
    student: Tensor,
    target: Tensor,
    *,
    temperature: float = 1.0,
    temper_student: bool = False,
    scale_by_temperature: bool = False,
) -> Tensor:
    """KL(y ‖ f): ``soft_cross_entropy`` minus the teacher's entropy. Same gradient; zero when the student is right.

    Arguments, result and errors are those of ``soft_cross_entropy``.
    """
    cross_entropy = soft_cross_entropy(student, target, temperature=temperature, temper_student=temper_student)
    loss = cross_entropy - entropy(target, temperature)
    return loss * (temperature**2 if scale_by_temperature else 1.0)


@LOSSES.register()
def mse(
    student: Tensor, target: Tensor, *, class_reduction: ClassReduction = "mean", normalize: Normalize = "none"
) -> Tensor:
    """Squared error of logits or features, mean_k or Σ_k (student_k − target_k)²: D3D's equation 2 (arXiv 1812.08249).

    The equation does not settle its own scale: it has N + 1 terms (i = 0 … N) for clips that are numbered 0 … N − 1,
    divides by N − 1, and does not say what becomes of the classes. Here it is the mean over clips, which the objective
    takes, and over classes the mean unless the squared norm as printed ("sum") is asked for. "sum" is K times as large
    (400 on Kinetics), so that a weight λ means something only together with this choice. The paper wants both losses of
    a similar scale (§5.6): a squared error per class is of the order of an action loss, one over 400 classes is not.

    Args:
        student: (B,K,…).
        target: Of the same shape.
        class_reduction: What happens over dimension 1; positions are always averaged.
        normalize: ``none``: the values as they are (the paper). ``variance``: the error is divided by the variance of
            the example's own target over dimension 1 and positions, plus ``NORMALIZE_EPS``; with "mean", a student that
            always gives the mean of the target then has a loss of 1, whatever the teacher's scale. ``standardize``: at
            each position both vectors are first brought to mean 0 and deviation 1 over dimension 1, by
            (x − mean) / √(variance + ``NORMALIZE_EPS``), so that the student is free in both. Variances are those
            of the numbers at hand (divided by their count). No example depends on the others of its batch.

    Raises:
        UserError: The shapes differ.
    """
    _check_same_shape("mse", student, target)
    student, target = full_precision(student), full_precision(target)
    if normalize == "standardize":
        student, target = _standardized(student), _standardized(target)
    squares = (student - target).square()
    errors = per_example(squares.sum(1) if class_reduction == "sum" else squares.mean(1))
    if normalize == "variance":
        errors = errors / (target.flatten(1).var(1, correction=0) + NORMALIZE_EPS)
    return errors


def _standardized(values: Tensor) -> Tensor:
    """Mean 0 and deviation 1 over dimension 1."""
    variance, mean = torch.var_mean(values, dim=1, correction=0, keepdim=True)
    return (values - mean) / (variance + NORMALIZE_EPS).sqrt()


@LOSSES.register()
def cosine(student: Tensor, target: Tensor) -> Tensor:
    """1 − cos(student, target) along dimension 1, in [0, 2].

    Args:
        student: Features (B,D,…).
        target: Of the same shape.

    Raises:
        UserError: The shapes differ.
    """
    _check_same_shape("cosine", student, target)
    return per_example(1 - functional.cosine_similarity(full_precision(student), full_precision(target), dim=1))


@LOSSES.register()
def cross_entropy(student: Tensor, target: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
    """−Σ_k q_k log f_k with q = (1 − ε)·[k = label] + ε/K and f = softmax(student).

    Args:
        student: Logits (B,K,…).
        target: Labels (B,), integers in [0, K); each holds for every position of its example.
        label_smoothing: ε in [0, 1).

    Returns:
        (B,), nats.

    Raises:
        UserError: The target is not a vector of labels, or a label is outside of [0, K).
    """
    if target.is_floating_point() or target.ndim != 1 or len(target) != len(student):
        raise UserError(
            f"the loss cross_entropy compares with labels of shape ({len(student)},), its target is "
            f"{_describe(target)}. Use soft_cross_entropy, kl, mse or cosine to match a teacher."
        )
    # On an accelerator the look would wait for the device at every step; there the kernel asserts.
    if (
        target.device.type == "cpu"
        and len(target)
        and not 0 <= int(target.min()) <= int(target.max()) < student.shape[1]
    ):
        raise UserError(
            f"labels {int(target.min())} … {int(target.max())} do not fit the student's {student.shape[1]} classes: "
            "labels start at 0 and end below MODEL.NUM_CLASSES."
        )
    labels = target.view(-1, *[1] * (student.ndim - 2)).expand(-1, *student.shape[2:])
    loss = functional.cross_entropy(full_precision(student), labels, reduction="none", label_smoothing=label_smoothing)
    return per_example(loss)


@LOSSES.register()
def bce(student: Tensor, target: Tensor) -> Tensor:
    """Binary cross-entropy of several actions at once: −mean_k (y_k ln p_k + (1 − y_k) ln(1 − p_k)), p = sigmoid.

    Args:
        student: Logits (R,K), a row for each box.
        target: 0 and 1, (R,K).

    Returns:
        (R,), nats.

    Raises:
        UserError: The shapes differ.
    """
    _check_same_shape("bce", student, target)
    return functional.binary_cross_entropy_with_logits(
        full_precision(student), full_precision(target), reduction="none"
    ).mean(1)


@LOSSES.register()
def flow_decoding(student: Tensor, target: Tensor) -> Tensor:
    """Squared error of decoded flow (D3D, arXiv 1812.08249 §3.1), see ``flow.motion.polar_loss``; mean over positions.

    Args:
        student: (mag, sin θ, cos θ), (B,3,T,H,W).
        target: Flow in pixels on the same grid, (B,2,T,H,W).

    Returns:
        (B,), square pixels for the magnitude and pixels for the direction.

    Raises:
        UserError: Other shapes.
    """
    if student.ndim != 5 or student.shape[1] != 3 or target.shape != (len(student), 2, *student.shape[2:]):
        raise UserError(
            f"the loss flow_decoding compares (mag, sin, cos) of shape (B,3,T,H,W) with flow (B,2,T,H,W), not "
            f"{_describe(student)} with {_describe(target)}. Use it with ARCH flow and a decoder as HEAD."
        )
    return per_example(polar_loss(student, target))


def entropy(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """−Σ_k y_k ln y_k of y = softmax(logits / τ), in nats; positions after dimension 1 are averaged.

    Args:
        logits: (B,K,…).
        temperature: τ > 0.

    Returns:
        (B,), between 0 and ln K.
    """
    log_probs = functional.log_softmax(full_precision(logits) / temperature, dim=1)
    # softmax gives an exact 0 where log_probs is very negative or −inf; xlogy keeps 0 · ln 0 = 0.
    probs = log_probs.exp()
    return per_example(-torch.special.xlogy(probs, probs).sum(1))


def build_loss(
    name: str,
    *,
    temperature: float = 1.0,
    temper_student: bool = False,
    scale_by_temperature: bool = False,
    class_reduction: str = "mean",
    normalize: str = "none",
    label_smoothing: float = 0.0,
) -> Loss:
    """A registered loss with its options bound: (student, target) → (B,).

    An option at its default is always accepted; another value only where the loss has that option.

    Raises:
        UserError: There is no such loss, it does not have an option that was set, or a value is out of range.
    """
    loss = lookup(LOSSES, name, "LOSS")
    if not (temperature > 0 and math.isfinite(temperature)):
        raise UserError(f"TEMPERATURE is {temperature}; it divides logits and must be a finite number above 0.")
    if class_reduction not in ("mean", "sum"):
        raise UserError(f"CLASS_REDUCTION is '{class_reduction}'. Allowed: mean, sum.")
    if normalize not in get_args(Normalize):
        raise UserError(f"NORMALIZE is '{normalize}'. Allowed: {', '.join(get_args(Normalize))}.")
    if not 0 <= label_smoothing < 1:
        raise UserError(f"LABEL_SMOOTHING is {label_smoothing}; it must be at least 0 and below 1.")
    options: dict[str, Any] = {
        "temperature": temperature,
        "temper_student": temper_student,
        "scale_by_temperature": scale_by_temperature,
        "class_reduction": class_reduction,
        "normalize": normalize,
        "label_smoothing": label_smoothing,
    }
    defaults = {key: parameter.default for key, parameter in inspect.signature(build_loss).parameters.items()}
    has = inspect.signature(loss).parameters
    for key, value in options.items():
        if key not in has and value != defaults[key]:
            used = ", ".join(key.upper() for key in options if key in has) or "none"
            raise UserError(
                f"the loss {name} has no option {key.upper()}, which is set to {value!r}. Its options: {used}. Leave "
                f"{key.upper()} at {defaults[key]!r} or choose another loss."
            )
    return partial(loss, **{key: value for key, value in options.items() if key in has})


def _check_same_shape(name: str, student: Tensor, target: Tensor) -> None:
    """Shapes must be equal: broadcasting would give a loss of the wrong thing without a word."""
    if student.ndim < 2 or student.shape != target.shape:
        raise UserError(
            f"the loss {name} compares the student's {_describe(student)} with a target of {_describe(target)}; the "
            "shapes must be equal. Check the term's HEAD, LAYER and the numbers of classes."
        )


def _describe(tensor: Tensor) -> str:
    return f"shape {tuple(tensor.shape)} ({str(tensor.dtype).removeprefix('torch.')})"
