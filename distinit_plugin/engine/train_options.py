"""What goes into the training loop and what comes out of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True)
class TrainOptions:
    """What a user may choose about the loop.

    Attributes:
        accumulate: Micro-batches per optimizer step.
        log_period: Optimizer steps between two log lines.
        eval_period: Epochs between validations; the last epoch is always validated.
        checkpoint_period: Epochs between checkpoints; the last epoch is always saved.
        clip_value: Clip each gradient entry to ± this; 0: off.
        clip_norm: Clip the global gradient norm to this; 0: off.
        frozen_trunk: Modules without trainable parameters stay in eval mode (BN statistics included).
        frozen_norm: Batch normalisation keeps the statistics that it has.
        corpus_size: Videos of the training corpora, for ``max_bad_fraction``.
        max_bad_fraction: The run stops when more of the corpus than this is bad.
    """

    accumulate: int = 1
    log_period: int = 10
    eval_period: int = 1
    checkpoint_period: int = 1
    clip_value: float = 0.0
    clip_norm: float = 0.0
    frozen_trunk: bool = False
    frozen_norm: bool = False
    corpus_size: int = 0
    max_bad_fraction: float = 1.0


@dataclass(frozen=True)
class TrainResult:
    """How a training ended.

    Attributes:
        epochs: Epochs done.
        steps: Optimizer steps done.
        train: Means over the last epoch.
        validation: The last validation; empty without one.
        best: ``{"name", "value", "epoch"}`` of the best validation; empty without one.
        seconds: Wall time of this process in ``train``.
        wait_share: Fraction of the training time spent waiting for data.
    """

    epochs: int
    steps: int
    train: dict[str, float]
    validation: dict[str, float]
    best: dict[str, Any]
    seconds: float
    wait_share: float


class ScalarWriter(Protocol):
    """The part of TensorBoard's ``SummaryWriter`` that is used."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> None:
        """Note a value."""
        ...

    def close(self) -> None:
        """Write everything out."""
        ...
