"""Stops a run whose loss is no longer a number, without waiting for the device at every step."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from distinit_plugin.errors import UserError

_STATISTICS = ("running_mean", "running_var")

_ADVICE = (
    "If the same command ends like this again, the steps before spoilt the weights: remove checkpoints/resume.pyth to "
    "go on from the last whole epoch. Else try a lower SOLVER.BASE_LR, SOLVER.CLIP_GRAD_L2NORM 1.0, or "
    "RUNNER.PRECISION fp32 (with bf16, RUNNER.CHECK_CONVOLUTIONS True)."
)


class TrainingError(UserError):
    """The training cannot go on; what was saved before is good."""


class _Watched(NamedTuple):
    step: int
    loss: Tensor
    terms: dict[str, Tensor]
    paths: list[str]


class FiniteGuard:
    """Remembers the losses since the last check; one read from the device tells whether all are finite."""

    def __init__(self, *, every_step: bool) -> None:
        """``every_step``: check at once (CPU, where reading costs nothing); else only when ``check`` is called."""
        self._every_step = every_step
        self._watched: list[_Watched] = []

    def watch(self, step: int, loss: Tensor, terms: Mapping[str, Tensor], paths: Sequence[str]) -> None:
        """Note one micro-batch.

        Args:
            step: 0-based optimizer step of the run.
            loss: Scalar.
            terms: Its parts, scalars.
            paths: Files of the micro-batch.

        Raises:
            TrainingError: With ``every_step``, the loss is not finite.
        """
        self._watched.append(
            _Watched(step, loss.detach(), {name: term.detach() for name, term in terms.items()}, list(paths))
        )
        if self._every_step:
            self.check()

    def check(self) -> None:
        """Read all losses noted since the last check.

        Raises:
            TrainingError: One is not finite; the first is named with its step, terms and files.
        """
        if not self._watched:
            return
        finite = torch.isfinite(torch.stack([item.loss.float() for item in self._watched])).tolist()
        watched, self._watched = self._watched, []
        for item, good in zip(watched, finite, strict=True):
            if not good:
                raise TrainingError(_explain(item))


def check_weights(module: nn.Module) -> None:
    """Read from the device whether all parameters and the statistics of batch normalisation are finite.

    A step can spoil them although its loss was finite; only the next loss would tell. Other buffers are masks and the
    like, where infinity has a meaning.

    Raises:
        TrainingError: One is not; the first is named.
    """
    values = {
        name: tensor
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]
        if isinstance(tensor, nn.Parameter) or name.endswith(_STATISTICS)
    }
    if not values:
        return
    good = torch.stack([torch.isfinite(tensor.detach()).all() for tensor in values.values()]).tolist()
    if not all(good):
        name = next(name for name, finite in zip(values, good, strict=True) if not finite)
        raise TrainingError(
            f"{name} holds values that are not finite ({good.count(False)} tensors do), although the losses so far "
            f"were: this state is not saved. {_ADVICE}"
        )


def _explain(item: _Watched) -> str:
    values = {name: float(term) for name, term in item.terms.items()}
    terms = ", ".join(f"{name} = {value:.6g}" for name, value in values.items())
    guilty = [name for name, value in values.items() if not math.isfinite(value)]
    blame = f" (not finite: {', '.join(guilty)})" if guilty else ""
    files = "\n".join(f"  {path}" for path in item.paths)
    return (
        f"the loss is {float(item.loss)} at step {item.step + 1}; terms: {terms}{blame}. Nothing was saved after that. "
        f"{_ADVICE} Files of the batch:\n{files}"
    )
