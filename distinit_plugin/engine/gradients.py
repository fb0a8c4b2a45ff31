"""Gradients of one optimizer step: micro-batches, ranks and gates give the gradient of the whole batch, exactly."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from distinit_plugin.engine import distributed
from distinit_plugin.engine.evaluate import Finish
from distinit_plugin.engine.guard import FiniteGuard
from distinit_plugin.engine.precision import Precision
from distinit_plugin.objectives import Objective, Prepared, combine_counts, even_counts
from distinit_plugin.types import Batch, StepOutput

Note = Callable[[Mapping[str, Tensor], Tensor | Mapping[str, Tensor]], None]
"""Takes means by name, and the number of examples that they are over (of all, or by name)."""


class _MicroBatch(NamedTuple):
    """A part of a step whose teachers have run."""

    paths: list[str]
    prepared: Prepared


class StepGradients:
    """Adds up the gradients of the micro-batches of a step."""

    def __init__(
        self,
        objective: Objective,
        precision: Precision,
        *,
        finish: Finish,
        device: torch.device,
        guard: FiniteGuard,
        accumulate: int = 1,
        no_sync: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        """Put the parts together.

        Args:
            objective: On the device.
            precision: Autocast and scaler.
            finish: Makes the objective's views of a batch.
            device: Where the objective is.
            guard: Watches the losses.
            accumulate: Micro-batches per step, equally large on all ranks.
            no_sync: Context for all micro-batches of a step but the last (DDP's ``no_sync``).
        """
        self._objective = objective
        self._precision = precision
        self._finish = finish
        self._device = device
        self._guard = guard
        self._accumulate = accumulate
        self._no_sync = no_sync
        self._size: int | None = None

    def add(self, take: Callable[[], Batch], note: Note, step: int, position: float | None = None) -> None:
        """Take the micro-batches of one step and add their gradients to the parameters' own.

        They are taken, prepared and computed one after the other, so that memory does not grow with their number.
        Only where the data decide what the mean is over (the kept examples of a gate) all are prepared first: it must
        be known for the whole step, on all ranks, before the first backward.

        Args:
            take: Gives the next micro-batch.
            note: Gets the loss, terms and report.
            step: Number of the optimizer step in the run, for the guard.
            position: Of the step in units of the schedule, as in ``Objective.step``.

        Raises:
            TrainingError: A loss is not finite.
        """
        ahead = deque(self._prepare(take()) for _ in range(self._accumulate if self._objective.counts_vary else 0))
        counts = None
        if ahead:
            counts = combine_counts(
                [part.prepared for part in ahead], distributed.world_size(), distributed.all_reduce_sum
            )
        shares: dict[str, Tensor] = {}
        num_examples = torch.zeros((), device=self._device)
        for left in reversed(range(self._accumulate)):
            with self._no_sync() if left else nullcontext():
                output = self._compute(ahead.popleft() if ahead else self._prepare(take()), counts, step, position)
            for name, share in {"loss": output.loss, **output.terms}.items():
                shares[name] = shares[name] + share if name in shares else share
            num_examples = num_examples + output.normalizer
            note(output.report, output.report_weights)
        note(shares, num_examples)

    def _prepare(self, batch: Batch) -> _MicroBatch:
        """Run the teachers."""
        if not self._objective.counts_vary:  # the size of one then tells that of all
            size = self._size = self._size or len(batch["keys"])
            assert len(batch["keys"]) == size, f"micro-batches of {size} and {len(batch['keys'])} clips in one training"
        targets = {name: target.to(self._device, non_blocking=True) for name, target in batch["targets"].items()}
        with self._precision.autocast():
            return _MicroBatch(batch["paths"], self._objective.prepare(self._finish(batch), targets))

    def _compute(
        self, part: _MicroBatch, counts: Mapping[str, Tensor] | None, step: int, position: float | None
    ) -> StepOutput:
        """Run the student forward and backward; what comes back holds no graph."""
        if counts is None:
            counts = even_counts(part.prepared, self._accumulate)
        with self._precision.autocast():
            output = self._objective.step(part.prepared, counts, position)
        self._guard.watch(step, output.loss, output.terms, part.paths)
        self._precision.backward(output.loss)
        return output._replace(loss=output.loss.detach())
