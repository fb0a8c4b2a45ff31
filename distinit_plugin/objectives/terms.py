"""A part of the loss, and whether the parts fit the networks."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from distinit_plugin.errors import UserError
from distinit_plugin.losses import Loss
from distinit_plugin.objectives.adapters import Match, check_equal_sizes, layer_size, layer_sizes, on_teachers_grid
from distinit_plugin.registry import near_matches
from distinit_plugin.types import ModelOutput, Network

LABEL = "label"
"""The key of ``targets`` that terms without a teacher are compared with; no teacher may have this name."""

STUDENT = "student"
"""Prefix of the student's views; no teacher may have this name."""


@dataclass(frozen=True)
class Term:
    """One part of the loss.

    Attributes:
        name: Names the term in logs, its adapter in checkpoints.
        student_layer: ``logits``, ``features`` or a layer of the student.
        loss: (prediction, target) → (B,), see ``losses.build_loss``.
        weight: Factor of this term, above 0. A term that is switched off is left out, with its adapter and teacher.
        teacher: Name of the teacher; ``None``: the target is the label.
        teacher_layer: ``logits``, ``features`` or a layer of the teacher.
        max_entropy: Nats. An example does not count when the entropy of the teacher's prediction, which is that of
            the logits averaged over frames, is at or above it. ``None``: every example counts.
        temperature: τ of the prediction whose entropy is taken.
        warmup: The factor rises on a straight line from 0 at the start of the training to ``weight`` at this position
            (in units of the schedule); 0: it is ``weight`` from the start.
        match: Brings prediction and target to one grid.
    """

    name: str
    student_layer: str
    loss: Loss
    weight: float = 1.0
    teacher: str | None = None
    teacher_layer: str = "logits"
    max_entropy: float | None = None
    temperature: float = 1.0
    warmup: float = 0.0
    match: Match = on_teachers_grid

    def __post_init__(self) -> None:
        """Check what can be checked without the networks.

        Raises:
            UserError: A value is out of range.
        """
        if not (self.weight > 0 and math.isfinite(self.weight)):
            raise UserError(
                f"the term '{self.name}' has LOSS_WEIGHT {self.weight}; it must be a finite number above 0 (a term "
                "that is switched off is left out)."
            )
        if not (self.warmup >= 0 and math.isfinite(self.warmup)):
            raise UserError(f"the term '{self.name}' has WARMUP {self.warmup}; it must be a finite number, at least 0.")
        if not (self.temperature > 0 and math.isfinite(self.temperature)):
            raise UserError(f"the term '{self.name}' has TEMPERATURE {self.temperature}; it must be above 0.")
        if self.max_entropy is not None and (self.teacher is None or math.isnan(self.max_entropy)):
            raise UserError(f"the term '{self.name}' has MAX_ENTROPY {self.max_entropy} but no teacher to take it of.")

    @property
    def counts_vary(self) -> bool:
        """Whether the data of a batch, and not its size alone, decide what the mean is over."""
        return False

    def check(self, student: Network) -> None:
        """Whether a student has what a term without a teacher reads.

        Raises:
            UserError: It has not.
        """
        layer_size(student, self.student_layer, "the student")

    def own_target(self, targets: Mapping[str, Tensor], batch_size: int) -> Any:
        """What a term without a teacher is compared with: here the labels (B,).

        Args:
            targets: Of the batch.
            batch_size: B.

        Raises:
            UserError: The batch has no such targets.
        """
        labels = targets.get(LABEL)
        if labels is None:
            raise UserError(
                f"the term '{self.name}' needs labels and the batch has none. Set LABELED True on every corpus (and "
                "see that its list holds labels), or leave the term out (ACTION.LOSS_WEIGHT 0)."
            )
        if labels.shape != (batch_size,):
            raise UserError(
                f"the term '{self.name}' needs one label per example, got {tuple(labels.shape)} for {batch_size}."
            )
        return labels

    def count(self, target: Any, weights: Tensor) -> Tensor:
        """What the mean is over, 0-d; examples that are gated count all the same.

        Args:
            target: From ``own_target``, or the teacher's.
            weights: (B,).
        """
        return torch.full((), float(len(weights)), device=weights.device)

    def losses(self, prediction: Tensor, target: Any, output: ModelOutput) -> Tensor:
        """The loss of each example, (B,).

        Args:
            prediction: The student's layer through its adapter.
            target: What it is compared with.
            output: The student's, detached.
        """
        return self.loss(*self.match(prediction, target))

    def is_warming(self, position: float | None) -> bool:
        """Whether the factor has not reached ``weight``; ``None`` stands for the end of the training."""
        return position is not None and position < self.warmup

    def weight_at(self, position: float | None) -> float:
        """The factor at a position of the training, in units of the schedule; ``None``: at its end."""
        if position is None or position >= self.warmup:
            return self.weight
        return self.weight * position / self.warmup


def check_choice(key: str, value: str, allowed: Collection[str]) -> None:
    """Raise :class:`UserError` when ``value`` is not one of ``allowed``."""
    if value not in allowed:
        raise UserError(f"{key} is '{value}'.{near_matches(value, list(allowed))} Allowed: {', '.join(allowed)}.")


def check_terms(
    student: Network, terms: Sequence[Term], teachers: Mapping[str, Network], adapters: Mapping[str, nn.Module]
) -> None:
    """Raise :class:`UserError` when terms, networks and adapters do not fit together."""
    names = [term.name for term in terms]
    if not terms:
        raise UserError("there is nothing to train on: name a teacher in DISTILL.TEACHERS or set ACTION.LOSS_WEIGHT.")
    if len(set(names)) < len(names):
        raise UserError(f"two terms have the same name: {', '.join(sorted(names))}.")
    for name in adapters:
        if name not in names:
            raise UserError(f"there is an adapter for '{name}', which is no term. Terms: {', '.join(names)}.")
    for name, teacher in teachers.items():
        _check_teacher(name, cast(nn.Module, teacher))
    for term in terms:
        if "." in term.name or not term.name or hasattr(nn.ModuleDict(), term.name):
            raise UserError(f"a term cannot be named '{term.name}': choose letters, digits and _, in capitals.")
        try:
            _check_term(term, student, teachers, adapters.get(term.name))
        except UserError as error:
            raise UserError(f"term '{term.name}': {error}") from error


def _check_term(term: Term, student: Network, teachers: Mapping[str, Network], adapter: nn.Module | None) -> None:
    if term.teacher is None:
        term.check(student)
        return
    if term.teacher not in teachers:
        near, known = near_matches(term.teacher, list(teachers)), ", ".join(teachers) or "none"
        raise UserError(f"there is no teacher '{term.teacher}'.{near} Known: {known}.")
    teacher = teachers[term.teacher]
    source, target = layer_sizes(student, term.student_layer, teacher, term.teacher_layer)
    if adapter is None or isinstance(adapter, nn.Identity):
        check_equal_sizes(term.student_layer, source, term.teacher_layer, target)
    if term.max_entropy is not None:
        layer_size(teacher, "logits", f"MAX_ENTROPY is set, but the teacher {term.teacher}")


def _check_teacher(name: str, teacher: nn.Module) -> None:
    if name == STUDENT:
        raise UserError(f"a teacher cannot be named '{STUDENT}': its views would be taken for the student's.")
    if name == LABEL:
        raise UserError(f"a teacher cannot be named '{LABEL}': its targets would be taken for the labels.")
    if teacher.training or any(parameter.requires_grad for parameter in teacher.parameters()):
        raise UserError(f"the teacher {name} is not frozen: call distinit_plugin.teachers.frozen.freeze on it first.")
