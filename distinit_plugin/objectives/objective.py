"""Student, adapters and frozen teachers → the loss of a batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn

from distinit_plugin.errors import UserError
from distinit_plugin.losses import entropy, full_precision
from distinit_plugin.objectives.adapters import layer_output, no_classifier, tapped_layers
from distinit_plugin.objectives.boxes import BoxTerm
from distinit_plugin.objectives.terms import LABEL, STUDENT, Term, check_choice, check_terms
from distinit_plugin.types import BOXES, STORED, ModelOutput, Network, StepOutput

Gate = Literal["weight", "skip"]
GateMean = Literal["all", "kept"]


class Trainable(nn.Module):
    """Student and adapters: the one module that is wrapped (DDP, compile), stepped and saved."""

    def __init__(self, student: Network, terms: Sequence[Term], adapters: Mapping[str, nn.Module]) -> None:
        """``adapters``: term name → module; a term without one is compared as it is."""
        super().__init__()
        self.student = cast(nn.Module, student)
        self.adapters = nn.ModuleDict(dict(adapters))
        self._layers = {term.name: term.student_layer for term in terms}
        self._taps = tapped_layers(self._layers.values())

    def forward(
        self, views: Mapping[str, Tensor], boxes: Tensor | None = None
    ) -> tuple[ModelOutput, dict[str, Tensor]]:
        """Run on the student's own views.

        Args:
            views: Normalised, (B,C,T,H,W).
            boxes: (R,5) of a batch that has them, see ``types.BOXES``.

        Returns:
            The student's output, detached (it is only reported), and each term's prediction, (B,K), (B,K,T) or
            (B,K,T,H,W) on the student's grid, or (R,K) of boxes. So gradients come through predictions alone, which
            tells DDP what trains.
        """
        output: ModelOutput = self.student(views, boxes=boxes, taps=self._taps)
        predictions = {}
        for name, layer in self._layers.items():
            prediction = layer_output(output, layer, "the student")
            predictions[name] = self.adapters[name](prediction) if name in self.adapters else prediction
        taps = {name: tap.detach() for name, tap in output.taps.items()}
        logits, features, boxes, offsets = (
            None if x is None else x.detach() for x in (output.logits, output.features, output.boxes, output.offsets)
        )
        return ModelOutput(logits, features, taps, boxes=boxes, offsets=offsets), predictions

    def parameters_without_gradient(self, views: Mapping[str, Tensor]) -> list[str]:
        """Names of parameters that should train and that no term reaches: those after the last layer that is read.

        Args:
            views: Any views of the student's sizes. Runs on them in eval mode, so that nothing moves.
        """
        modes = {module: module.training for module in self.modules()}
        parameters = {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}
        try:
            with torch.enable_grad():
                _, predictions = self.eval()(views)
                total = torch.stack([prediction.float().sum() for prediction in predictions.values()]).sum()
                gradients = torch.autograd.grad(total, list(parameters.values()), allow_unused=True)
        finally:
            for module, training in modes.items():
                module.training = training
        return [name for name, gradient in zip(parameters, gradients, strict=True) if gradient is None]


@dataclass(frozen=True)
class Prepared:
    """A batch whose teachers have run.

    Attributes:
        views: The student's views, of the B' examples that it will see.
        targets: Term → what its prediction is compared with, (B',…), or annotated boxes.
        weights: Term → (B',), 1 for examples that count and 0 for others.
        labels: (B',) int64, or ``None``.
        counts: Term → number of examples that its mean is over, 0-d. Sum them over what makes one step.
        num_examples: B of the batch, 0-d; B' ≤ B.
        report: Means over the batch, 0-d: teachers' entropies and the kept fractions.
        boxes: (R,5) of a batch that has them, which go to the student.
    """

    views: dict[str, Tensor]
    targets: dict[str, Any]
    weights: dict[str, Tensor]
    labels: Tensor | None
    counts: dict[str, Tensor]
    num_examples: Tensor
    report: dict[str, Tensor]
    boxes: Tensor | None = None


def combine_counts(
    prepared: Sequence[Prepared], world_size: int = 1, all_reduce_sum: Callable[[Tensor], Tensor] | None = None
) -> dict[str, Tensor]:
    """What each micro-batch of one optimizer step divides by, so that the step's mean is exact.

    Gradients add up over micro-batches and are averaged over ranks (DDP), so a term's sum over this rank is divided by
    its count over all micro-batches and ranks (at least 1) divided by the number of ranks.

    Args:
        prepared: This rank's micro-batches of the step.
        world_size: Number of ranks.
        all_reduce_sum: Sums a tensor over ranks; ``None`` on one process.

    Returns:
        Term → 0-d tensor, for ``Objective.step``.
    """
    names = list(prepared[0].counts)
    total = torch.stack([torch.stack([item.counts[name] for name in names]) for item in prepared]).sum(0)
    if all_reduce_sum is not None:
        total = all_reduce_sum(total)
    return dict(zip(names, (total.clamp(min=1) / world_size).unbind(), strict=True))


def even_counts(prepared: Prepared, num_micro_batches: int) -> dict[str, Tensor]:
    """``combine_counts`` where every example counts and all micro-batches, on all ranks, are equally large."""
    return {name: count * num_micro_batches for name, count in prepared.counts.items()}


class Objective:
    """Student + terms + frozen teachers → the loss of a batch.

    In a plain PyTorch loop: ``objective(views, targets).loss.backward()``, with an optimizer over
    ``objective.trainable.parameters()``. Mixed precision is the caller's autocast region, which student and teachers
    share; losses leave it.
    """

    def __init__(
        self,
        student: Network,
        terms: Sequence[Term],
        teachers: Mapping[str, Network],
        adapters: Mapping[str, nn.Module],
        *,
        gate: str = "weight",
        gate_mean: str = "all",
    ) -> None:
        """Check that everything fits together, before any data is read.

        Args:
            student: The network to be trained.
            terms: At least one.
            teachers: Frozen networks by name; those that no term names never run.
            adapters: Term → module (``build_adapter``); a term without one compares the student's layer itself.
            gate: ``weight``: the student sees every example, gated ones have weight 0 (the paper). ``skip``: the
                student sees only examples that count in at least one term (its BN statistics see only those, too).
            gate_mean: The loss is the mean over ``all`` examples, or over the ``kept`` ones of each term.

        Raises:
            UserError: Something does not fit; the term is named.
        """
        check_choice("DISTILL.GATE", gate, get_args(Gate))
        check_choice("DISTILL.GATE_MEAN", gate_mean, get_args(GateMean))
        check_terms(student, terms, teachers, adapters)
        if gate == "skip" and any(isinstance(term, BoxTerm) for term in terms):
            raise UserError("DISTILL.GATE is 'skip', which leaves clips out but not their boxes. Use 'weight'.")
        self.terms = tuple(terms)
        used = {term.teacher for term in terms}
        self.teachers = {name: cast(nn.Module, teacher) for name, teacher in teachers.items() if name in used}
        self.trainable = Trainable(student, terms, adapters)
        self.gate = gate
        self.gate_mean = gate_mean
        self._forward: nn.Module = self.trainable
        self._teacher_taps = {
            name: tapped_layers(term.teacher_layer for term in terms if term.teacher == name) for name in self.teachers
        }

    @property
    def counts_vary(self) -> bool:
        """Whether the data decide what means are over, so that ``combine_counts`` needs all parts of a step."""
        gated = self.gate_mean == "kept" and any(term.max_entropy is not None for term in self.terms)
        return gated or any(term.counts_vary for term in self.terms)

    def warming_weights(self, position: float) -> dict[str, float]:
        """``weight/TERM`` → its factor at a position of the training, of the terms whose factor still rises there."""
        return {f"weight/{term.name}": term.weight_at(position) for term in self.terms if term.is_warming(position)}

    def wrap(self, wrapper: Callable[[nn.Module], nn.Module]) -> nn.Module:
        """Run the trainable through ``wrapper(trainable)`` (DDP, ``torch.compile``) from now on; returns that.

        ``trainable`` stays the bare module: the one for optimizers and checkpoints.
        """
        self._forward = wrapper(self._forward)
        return self._forward

    def __call__(self, views: Mapping[str, Tensor], targets: Mapping[str, Tensor]) -> StepOutput:
        """Loss of one batch that is a whole step by itself; arguments as in ``prepare``."""
        return self.step(self.prepare(views, targets))

    def prepare(self, views: Mapping[str, Tensor], targets: Mapping[str, Tensor]) -> Prepared:
        """Run the teachers and find out which examples count.

        Args:
            views: ``student/<view>`` and ``<TEACHER>/<view>`` → normalised (B,C,T,H,W).
            targets: ``label`` (B,) where the batch is labelled; ``boxes`` (R,5) and ``actions`` (R,K) where it is of
                keyframes; ``<TEACHER>`` in place of its views, where its outputs are stored.

        Raises:
            UserError: A term's targets or a network's views are missing.
        """
        student_views = _views_of(STUDENT, views)
        like = next(iter(student_views.values()))
        batch_size, device = len(like), like.device
        outputs = {name: self._run_teacher(name, views, targets) for name in self.teachers}
        term_targets: dict[str, Any] = {}
        weights: dict[str, Tensor] = {}
        report: dict[str, Tensor] = {}
        for term in self.terms:
            weights[term.name] = torch.ones(batch_size, device=device)
            if term.teacher is None:
                term_targets[term.name] = term.own_target(targets, batch_size)
                continue
            output = outputs[term.teacher]
            term_targets[term.name] = layer_output(output, term.teacher_layer, f"the teacher {term.teacher}")
            if output.logits is not None:
                entropies = entropy(output.logits, term.temperature)
                report[f"entropy/{term.name}"] = entropies.mean()
            if term.max_entropy is not None:
                if output.logits is None:
                    raise no_classifier(f"MAX_ENTROPY is set, but the teacher {term.teacher}")
                # "not ≥" and not "<": a NaN stays in the loss, where it is noticed.
                weights[term.name] = (~(entropies >= term.max_entropy)).to(torch.float32)
                report[f"kept/{term.name}"] = weights[term.name].mean()
        num_examples = torch.full((), float(batch_size), device=device)
        counts = {
            term.name: weights[term.name].sum()
            if self.gate_mean == "kept" and term.teacher is not None
            else term.count(term_targets[term.name], weights[term.name])
            for term in self.terms
        }
        prepared = Prepared(
            student_views,
            term_targets,
            weights,
            targets.get(LABEL),
            counts,
            num_examples,
            report,
            targets.get(BOXES),
        )
        return _without_skipped(prepared) if self.gate == "skip" else prepared

    def step(
        self, prepared: Prepared, counts: Mapping[str, Tensor] | None = None, position: float | None = None
    ) -> StepOutput:
        """Run the student and take the loss.

        Args:
            prepared: From ``prepare``.
            counts: From ``combine_counts`` when the batch is a part of a step; ``None``: it is a whole step on one
                rank.
            position: Where the training stands, in units of the schedule, for terms whose weight warms up; ``None``:
                every weight is the full one, so that validations can be compared.

        Returns:
            ``loss`` and ``terms`` (``loss/TERM``) are this batch's share: their sum over the micro-batches of a step,
            averaged over ranks, is the step's mean. ``report`` has ``entropy/TERM``, ``kept/TERM``, ``agreement/TERM``
            (fraction of examples whose prediction has the teacher's top class, among those that the student saw) and,
            with labels and a classifier, ``top1`` and ``top5`` (fractions of the same). ``normalizer`` is B.
            ``report_weights`` joins reports of several batches to exact means.
        """
        # Without gradients the ranks have nothing to exchange, and need not have equally many batches.
        forward = self._forward if torch.is_grad_enabled() else self.trainable
        output, predictions = forward(prepared.views, prepared.boxes)
        loss = torch.zeros((), device=prepared.num_examples.device)
        terms: dict[str, Tensor] = {}
        report, seen_report = dict(prepared.report), {}
        with torch.autocast(loss.device.type, enabled=False):
            for term in self.terms:
                prediction, target = predictions[term.name], prepared.targets[term.name]
                weighted = prepared.weights[term.name] * term.losses(prediction, target, output)
                count = prepared.counts[term.name].clamp(min=1) if counts is None else counts[term.name]
                part = weighted.sum() / count
                loss = loss + term.weight_at(position) * part
                terms[f"loss/{term.name}"] = part.detach()
                if term.teacher is not None and term.teacher_layer == "logits":
                    seen_report[f"agreement/{term.name}"] = topk_accuracy(
                        prediction, prepared.targets[term.name].argmax(1), 1
                    )
            if prepared.labels is not None and output.logits is not None:
                seen_report["top1"] = topk_accuracy(output.logits, prepared.labels, 1)
                seen_report["top5"] = topk_accuracy(output.logits, prepared.labels, 5)
        seen = torch.full_like(prepared.num_examples, len(next(iter(prepared.views.values()))))
        report_weights = dict.fromkeys(report, prepared.num_examples) | dict.fromkeys(seen_report, seen)
        return StepOutput(loss, terms, report | seen_report, prepared.num_examples, report_weights)

    def _run_teacher(self, name: str, views: Mapping[str, Tensor], targets: Mapping[str, Tensor]) -> ModelOutput:
        seen = {STORED: targets[name]} if name in targets else _views_of(name, views)
        with torch.no_grad():  # a frozen teacher runs in inference mode by itself and gives ordinary tensors
            output: ModelOutput = self.teachers[name](seen, taps=self._teacher_taps[name])
        return ModelOutput(
            logits=None if output.logits is None else full_precision(output.logits),
            features=None if output.features is None else full_precision(output.features),
            taps={layer: full_precision(output.taps[layer]) for layer in self._teacher_taps[name]},
        )


def topk_accuracy(logits: Tensor, labels: Tensor, k: int) -> Tensor:
    """Fraction of the examples whose label is among the k largest logits; with fewer than k classes, among all.

    Args:
        logits: (B,K), or (B,K,T): the mean over the T steps.
        labels: (B,) int64.
        k: At least 1.

    Returns:
        0-d fp32, detached.
    """
    top = logits.detach().topk(min(k, logits.shape[1]), dim=1).indices
    return (top == labels.view(-1, *[1] * (top.ndim - 1))).any(1).to(torch.float32).mean()


def _views_of(consumer: str, views: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``consumer/view`` → ``view``."""
    prefix = f"{consumer}/"
    found = {name.removeprefix(prefix): view for name, view in views.items() if name.startswith(prefix)}
    if not found:
        raise UserError(
            f"there is no view for '{consumer}': expected '{prefix}<view>', got {', '.join(views) or 'none'}."
        )
    return found


def _without_skipped(prepared: Prepared) -> Prepared:
    """Drop the examples that no term keeps; one stays, with weight 0, where all would go (ranks stay in step)."""
    kept = torch.stack(list(prepared.weights.values())).amax(0).nonzero().flatten()
    if len(kept) == len(next(iter(prepared.weights.values()))):
        return prepared
    if len(kept) == 0:
        kept = torch.zeros(1, dtype=torch.int64, device=kept.device)

    def select(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: tensor.index_select(0, kept) for name, tensor in tensors.items()}

    return Prepared(
        views=select(prepared.views),
        targets=select(prepared.targets),
        weights=select(prepared.weights),
        labels=None if prepared.labels is None else prepared.labels.index_select(0, kept),
        counts=prepared.counts,
        num_examples=prepared.num_examples,
        report=prepared.report,
    )
