"""One interface for everything that computes optical flow between two frames.

The conventions, which every back end keeps: flow is forward (``first`` at (x, y) looks like ``second`` at
(x + u, y + v)), in pixels of the frames as given (resize first, then compute), the channels are (u, v), and a pair's
flow depends on the two frames alone: neither on the other pairs of the call nor on earlier calls.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor

from distinit_plugin.errors import UserError, shown
from distinit_plugin.registry import FLOW_BACKENDS, lookup

MAX_SIDE = 2**14
"""Pixels; more is a mistake."""


class FlowBackend(ABC):
    """Optical flow of pairs of frames."""

    name: ClassVar[str]
    """As registered."""

    min_side: ClassVar[int]
    """Of a frame, pixels."""

    @property
    @abstractmethod
    def identity(self) -> str:
        """What a store records: the name, every parameter, and the version of what computes. Equal text, equal flow."""

    @abstractmethod
    def _compute(self, first: Tensor, second: Tensor) -> Tensor:
        """``__call__`` for at least one pair that was looked at."""

    @torch.no_grad()
    def __call__(self, first: Tensor, second: Tensor) -> Tensor:
        """Flow from ``first`` to ``second``.

        Args:
            first: (N,3,H,W), uint8 RGB.
            second: Likewise, on the same device.

        Returns:
            (N,2,H,W), float32, (u,v) in pixels, on the device of ``first``.

        Raises:
            UserError: Frames that are no such pairs, or too small or too large for this back end.
        """
        self._check(first, second)
        if not len(first):
            return torch.zeros(0, 2, *first.shape[-2:], device=first.device)
        return self._compute(first, second)

    def _check(self, first: Tensor, second: Tensor) -> None:
        for frames in (first, second):
            if frames.ndim != 4 or frames.shape[1] != 3 or frames.dtype != torch.uint8:
                raise UserError(
                    f"flow is computed from RGB frames (N,3,H,W) of type uint8, not from {tuple(frames.shape)} of type "
                    f"{str(frames.dtype).removeprefix('torch.')}."
                )
        if first.shape != second.shape or first.device != second.device:
            raise UserError(
                f"flow needs pairs of frames of one size on one device, not {tuple(first.shape)} on {first.device} and "
                f"{tuple(second.shape)} on {second.device}."
            )
        height, width = first.shape[-2:]
        if not self.min_side <= min(height, width) <= max(height, width) <= MAX_SIDE:
            raise UserError(
                f"{self.name}: frames of {height}×{width} pixels; sides of {self.min_side} to {MAX_SIDE} pixels are "
                "allowed. Resize the frames, or choose another back end."
            )


def register_backend(backend: type[FlowBackend]) -> type[FlowBackend]:
    """Put a class into ``FLOW_BACKENDS`` under its ``name``."""
    FLOW_BACKENDS._do_register(backend.name, backend)
    return backend


def build_flow_backend(name: str, where: str = "flow back end", **options: Any) -> FlowBackend:
    """A back end by its name.

    Args:
        name: In ``FLOW_BACKENDS``.
        where: What the name was given as, for errors.
        options: The constructor's arguments.

    Raises:
        UserError: No such back end, an option that it does not have, or a package that is missing.
    """
    backend = lookup(FLOW_BACKENDS, name, where)
    try:
        built: FlowBackend = backend(**options)
    except TypeError as error:
        raise UserError(f"{where}: {name} does not take these options: {shown(options)} ({error}).") from error
    return built


def rgb_to_gray(frames: Tensor) -> Tensor:
    """The grey values of OpenCV's ``cvtColor``, to the bit: Rec. 601 luma in integers of 1/32768, rounded.

    Args:
        frames: (N,3,H,W), uint8 RGB.

    Returns:
        (N,H,W), uint8.
    """
    red, green, blue = frames.to(torch.int32).unbind(1)
    return ((9798 * red + 19235 * green + 3735 * blue + 16384) >> 15).to(torch.uint8)
