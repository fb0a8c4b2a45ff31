"""Number formats: mixed precision, denormals, memory format."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from distinit_plugin.engine.optim import clip_gradients
from distinit_plugin.errors import SAME_ON_ALL_RANKS, UserError
from distinit_plugin.registry import near_matches

logger = logging.getLogger(__name__)

PrecisionName = Literal["fp32", "bf16", "fp16"]

_AUTOCAST_DTYPES: dict[PrecisionName, torch.dtype] = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Choice(NamedTuple):
    """A precision and why it was chosen, for the log."""

    name: PrecisionName
    reason: str


def choose_precision(option: str, device: torch.device, *, has_bf16: bool, deterministic: bool = False) -> Choice:
    """Turn ``RUNNER.PRECISION`` into a precision.

    Args:
        option: ``auto``, ``fp32``, ``bf16`` or ``fp16``.
        device: Where the training runs.
        has_bf16: The hardware computes in bf16 (``models.hardware.hardware_has_bf16``).
        deterministic: Exact reproduction is asked for, which is fp32's.

    Raises:
        UserError: There is no such option, or it contradicts ``deterministic``.
    """
    names = get_args(PrecisionName)
    if option not in ("auto", *names):
        near = near_matches(option, ["auto", *names])
        raise UserError(f"RUNNER.PRECISION is '{option}'.{near} Allowed: auto, {', '.join(names)}.")
    if option == "auto":
        if deterministic:
            return Choice("fp32", "RUNNER.DETERMINISTIC asks for exact reproduction")
        if has_bf16:
            return Choice("bf16", f"the {device.type} computes in bf16")
        return Choice("fp32", f"the {device.type} has no bf16 arithmetic")
    if deterministic and option != "fp32":
        raise UserError(
            f"RUNNER.DETERMINISTIC needs fp32 and RUNNER.PRECISION is {option}: set RUNNER.PRECISION auto or fp32."
        )
    name: PrecisionName = "fp32" if option == "fp32" else "bf16" if option == "bf16" else "fp16"
    emulated = (name == "bf16" and not has_bf16) or (name == "fp16" and device.type == "cpu")
    note = f"; this {device.type} has no fast {name} arithmetic, expect it to be slow" if emulated else ""
    return Choice(name, f"set in RUNNER.PRECISION{note}")


class Precision:
    """Autocast, the gradient scaler that fp16 needs, and the steps that go through it."""

    def __init__(self, name: PrecisionName, device: torch.device) -> None:
        """``name`` from ``choose_precision``; the scaler passes everything through outside of fp16."""
        self.name = name
        self.device = device
        self.scaler = torch.amp.GradScaler(device.type, enabled=name == "fp16")

    def autocast(self) -> AbstractContextManager[Any]:
        """The context of forward passes; a new one at every call."""
        if self.name == "fp32":
            return nullcontext()
        return torch.autocast(self.device.type, dtype=_AUTOCAST_DTYPES[self.name])

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of ``loss`` (scaled, in fp16) to the parameters."""
        self.scaler.scale(loss).backward()

    def step(self, optimizer: torch.optim.Optimizer, clip_value: float = 0.0, clip_norm: float = 0.0) -> Tensor:
        """Clip the gradients and update the parameters.

        In fp16 gradients are unscaled first; a step whose gradients are not finite is left out and the scale lowered.

        Args:
            optimizer: Its gradients are complete.
            clip_value: See ``clip_gradients``.
            clip_norm: See ``clip_gradients``.

        Returns:
            The global norm of the gradients before clipping, 0-d; not finite when the step was left out.
        """
        self.scaler.unscale_(optimizer)
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        norm = clip_gradients(parameters, clip_value, clip_norm)
        self.scaler.step(optimizer)
        self.scaler.update()
        return norm

    def state_dict(self) -> dict[str, Any]:
        """The scaler's state; empty outside of fp16."""
        return self.scaler.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from ``state_dict``; a state of another precision has no meaning here and is passed over."""
        if self.scaler.is_enabled() and state:
            self.scaler.load_state_dict(dict(state))


def set_flush_denormals(enabled: bool) -> bool:
    """Treat denormal floats as zero on the CPU, where they can make a step several times slower.

    The setting belongs to a thread and is inherited by threads that it starts, so this must be called before the first
    parallel operation: threads that are already running keep what they have (torch 2.15 does not reach them).

    Returns:
        Whether every thread flushes denormals now.
    """
    supported = torch.set_flush_denormal(enabled)
    # Enough elements for every thread to get some: one that does not flush leaves its part above zero.
    tiny = torch.full(((1 << 15) * max(2, torch.get_num_threads()),), 1e-40)
    flushed = bool((tiny * 0.5 == 0).all())
    if enabled and not supported:
        logger.warning(
            "this CPU cannot flush denormals: training may be several times slower near zero", extra=SAME_ON_ALL_RANKS
        )
    elif enabled and not flushed:
        logger.warning(
            "some CPU threads were running already and do not flush denormals: set this before any work",
            extra=SAME_ON_ALL_RANKS,
        )
    return flushed


def choose_memory_format(option: str, precision: PrecisionName) -> torch.memory_format:
    """Turn ``RUNNER.CHANNELS_LAST`` into the memory format of 5-D tensors.

    ``auto`` takes ``channels_last_3d`` in bf16 and fp16: CUDA's tensor-core kernels want channels innermost, and on a
    CPU with AVX-512 bf16 every network tried is faster with it (R(2+1)D-18 1.5 times). In fp32 it takes the contiguous
    format (on an AVX2 CPU factored convolutions are 1.2 times faster in it).

    Args:
        option: ``auto``, ``on`` or ``off``.
        precision: Chosen precision.

    Raises:
        UserError: There is no such option.
    """
    if option not in ("auto", "on", "off"):
        raise UserError(f"RUNNER.CHANNELS_LAST is '{option}'. Allowed: auto, on, off.")
    faster = precision != "fp32"
    return torch.channels_last_3d if option == "on" or (option == "auto" and faster) else torch.contiguous_format
