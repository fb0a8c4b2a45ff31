"""Learning rate over time: PySlowFast's step and cosine policies with linear warm-up, and reduce-on-plateau.

Positions are in schedule units (epochs, fractions included, or steps). The formulas are those of PySlowFast's
``slowfast/utils/lr_policy.py``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from distinit_plugin.errors import UserError
from distinit_plugin.registry import near_matches

POLICIES = ("steps_with_relative_lrs", "cosine", "plateau")
UNITS = ("epoch", "step")


def steps_with_relative_lrs(position: float, *, base_lr: float, steps: Sequence[float], lrs: Sequence[float]) -> float:
    """``base_lr`` × the factor of the stage that the position is in.

    Args:
        position: At least 0.
        base_lr: Learning rate that the factors multiply.
        steps: Starts of the stages, increasing, the first 0; a stage includes its start.
        lrs: One factor per stage.
    """
    stage = sum(start <= position for start in steps) - 1
    return base_lr * lrs[stage]


def cosine(position: float, *, base_lr: float, end_lr: float, length: float) -> float:
    """The cosine: end + (base − end) · (1 + cos(π · position / length)) / 2; ``end_lr`` from ``length`` on.

    The cosine starts at position 0, under the warm-up, as PySlowFast's does by default.
    """
    done = min(position / length, 1.0)
    return end_lr + (base_lr - end_lr) * 0.5 * (math.cos(math.pi * done) + 1.0)


def linear_warmup(position: float, *, length: float, start_lr: float, end_lr: float) -> float:
    """Straight from ``start_lr`` at 0 to ``end_lr`` at ``length``."""
    return start_lr + position * (end_lr - start_lr) / length


class Plateau:
    """Lowers the learning rate by a factor when a metric has stopped falling (arXiv 1705.07750, section 2.5)."""

    def __init__(self, patience: int, factor: float) -> None:
        """Start without a best value.

        Args:
            patience: The learning rate drops at the end of this many epochs in a row without a new minimum.
            factor: What it is then multiplied by.
        """
        self.patience = patience
        self.factor = factor
        self.best = math.inf
        self.bad_epochs = 0
        self.drops = 0

    @property
    def scale(self) -> float:
        """What the base learning rate is multiplied by now."""
        return self.factor**self.drops

    def end_of_epoch(self, metric: float) -> None:
        """Note the metric of one more epoch; NaN is no improvement."""
        if metric < self.best:
            self.best = metric
            self.bad_epochs = 0
            return
        self.bad_epochs += 1
        if self.bad_epochs >= self.patience:
            self.drops += 1
            self.bad_epochs = 0

    def state_dict(self) -> dict[str, Any]:
        """Primitives only."""
        return {"best": self.best, "bad_epochs": self.bad_epochs, "drops": self.drops}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from ``state_dict``."""
        self.best = float(state["best"])
        self.bad_epochs = int(state["bad_epochs"])
        self.drops = int(state["drops"])


class Schedule:
    """Learning rate and length of a training."""

    def __init__(
        self,
        policy: str,
        *,
        base_lr: float,
        max_epoch: float,
        unit: str = "epoch",
        steps: Sequence[float] = (0,),
        lrs: Sequence[float] = (1.0,),
        cosine_end_lr: float = 0.0,
        warmup_epochs: float = 0.0,
        warmup_start_lr: float = 0.0,
        plateau_patience: int = 2,
        plateau_factor: float = 0.1,
    ) -> None:
        """Check everything before the training starts.

        Args:
            policy: One of ``POLICIES``.
            base_lr: Learning rate of the whole job, after warm-up.
            max_epoch: Length of the training, in units.
            unit: ``epoch`` or ``step``: what ``max_epoch``, ``steps`` and ``warmup_epochs`` count.
            steps: Starts of the stages of ``steps_with_relative_lrs``.
            lrs: Their factors.
            cosine_end_lr: Learning rate at the end of the cosine.
            warmup_epochs: Length of the linear warm-up, in units; 0: none. It ends at the policy's value there.
            warmup_start_lr: Learning rate at its start.
            plateau_patience: Epochs without a new minimum before the learning rate drops, whatever the unit.
            plateau_factor: By this factor.

        Raises:
            UserError: A value is out of range; the key is named.
        """
        self.policy = policy
        self.base_lr = base_lr
        self.max_epoch = max_epoch
        self.unit = unit
        self.steps = tuple(steps)
        self.lrs = tuple(lrs)
        self.cosine_end_lr = cosine_end_lr
        self.warmup_epochs = warmup_epochs
        self.warmup_start_lr = warmup_start_lr
        self.plateau = Plateau(plateau_patience, plateau_factor)
        self._check()

    def lr(self, step: int, steps_per_epoch: int) -> float:
        """Learning rate of an optimizer step.

        Args:
            step: 0-based number of the step in the whole training.
            steps_per_epoch: Optimizer steps that make an epoch.
        """
        position = self.position(step, steps_per_epoch)
        if position < self.warmup_epochs:
            return linear_warmup(
                position,
                length=self.warmup_epochs,
                start_lr=self.warmup_start_lr,
                end_lr=self._policy_lr(self.warmup_epochs),
            )
        return self._policy_lr(position)

    def position(self, step: int, steps_per_epoch: int) -> float:
        """Where a step (as in ``lr``) stands, in units of the schedule."""
        return step / steps_per_epoch if self.unit == "epoch" else float(step)

    def total_steps(self, steps_per_epoch: int) -> int:
        """Optimizer steps of the whole training; a part of a step counts as one."""
        length = self.max_epoch * steps_per_epoch if self.unit == "epoch" else self.max_epoch
        # 0.28 epochs of 100 steps are 28.000000000000004 in binary: not 28 steps and a part of one.
        return max(1, math.ceil(round(length, 6)))

    def end_of_epoch(self, metric: float) -> None:
        """Tell the plateau policy how the epoch went (lower is better); the others do not listen."""
        self.plateau.end_of_epoch(metric)

    def state_dict(self) -> dict[str, Any]:
        """What cannot be computed from the step: the plateau's memory."""
        return {"plateau": self.plateau.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from ``state_dict``."""
        self.plateau.load_state_dict(state["plateau"])

    def _policy_lr(self, position: float) -> float:
        if self.policy == "cosine":
            return cosine(position, base_lr=self.base_lr, end_lr=self.cosine_end_lr, length=self.max_epoch)
        if self.policy == "plateau":
            return self.base_lr * self.plateau.scale
        return steps_with_relative_lrs(position, base_lr=self.base_lr, steps=self.steps, lrs=self.lrs)

    def _check(self) -> None:
        if self.policy not in POLICIES:
            near = near_matches(self.policy, list(POLICIES))
            raise UserError(f"SOLVER.LR_POLICY is '{self.policy}'.{near} Allowed: {', '.join(POLICIES)}.")
        if self.unit not in UNITS:
            raise UserError(f"RUNNER.SCHEDULE_UNIT is '{self.unit}'. Allowed: {', '.join(UNITS)}.")
        if not (self.max_epoch > 0 and math.isfinite(self.max_epoch)):
            raise UserError(f"SOLVER.MAX_EPOCH is {self.max_epoch}; it must be above 0.")
        rates = {
            "SOLVER.BASE_LR": self.base_lr,
            "SOLVER.COSINE_END_LR": self.cosine_end_lr,
            "SOLVER.WARMUP_EPOCHS": self.warmup_epochs,
            "SOLVER.WARMUP_START_LR": self.warmup_start_lr,
        }
        for key, value in rates.items():
            if not (value >= 0 and math.isfinite(value)):
                raise UserError(f"{key} is {value}; it must be a finite number, at least 0.")
        if not self.plateau.patience >= 1:
            raise UserError(f"RUNNER.PLATEAU_PATIENCE is {self.plateau.patience}; it must be at least 1.")
        if not 0 < self.plateau.factor < 1:
            raise UserError(f"RUNNER.PLATEAU_FACTOR is {self.plateau.factor}; it must be between 0 and 1.")
        if self.policy == "steps_with_relative_lrs":
            self._check_stages()

    def _check_stages(self) -> None:
        if (
            not self.steps
            or self.steps[0] != 0
            or any(b <= a for a, b in zip(self.steps, self.steps[1:], strict=False))
        ):
            raise UserError(f"SOLVER.STEPS are {list(self.steps)}; they start with 0 and increase, like [0, 10, 20].")
        if len(self.lrs) != len(self.steps):
            raise UserError(
                f"SOLVER.LRS has {len(self.lrs)} entries and SOLVER.STEPS {len(self.steps)}; there is one factor per "
                "stage."
            )
        if not all(factor >= 0 and math.isfinite(factor) for factor in self.lrs):
            raise UserError(f"SOLVER.LRS are {list(self.lrs)}; factors are finite numbers, at least 0.")
