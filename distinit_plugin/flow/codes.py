"""Flow as 8-bit codes: how every stored flow is quantised, whatever file it is in.

A bound b and 256 codes: code c stands for the flow (c/255 − 0.5)·2b pixels. Two roundings are in use: to the nearest
code (denseflow, mmaction2: no motion becomes 128, which reads as b/255 px) and down (MediaPipe's graph, I3D: 127, which
reads as −b/255 px).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from torch import Tensor

Rounding = Literal["round", "floor"]

ROUNDINGS: tuple[Rounding, ...] = ("round", "floor")

DEFAULT_BOUND = 20.0
"""Pixels; what I3D, MediaPipe's graph and mmaction2 use."""

MIN_BOUND = 0.01
"""Pixels; no motion is so small that it would need less."""

MAX_BOUND = 4096.0
"""Pixels; beyond it a code would stand for more than 32 pixels."""

FloatArray = npt.NDArray[np.floating]
Codes = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Quantiser:
    """Flow in pixels ↔ codes.

    Attributes:
        bound: Largest |u| and |v| that has a code, pixels; what is beyond is clipped.
        rounding: ``round`` (to the nearest code: the error is at most bound/255) or ``floor`` (down: the error is
            below 2·bound/255).
    """

    bound: float = DEFAULT_BOUND
    rounding: Rounding = "round"

    def __post_init__(self) -> None:
        """Refuse what is no quantiser (ValueError)."""
        if not MIN_BOUND <= self.bound <= MAX_BOUND:  # false for NaN, too
            raise ValueError(
                f"a bound of {self.bound:g} px is not possible. Allowed: at least {MIN_BOUND:g}, at most {MAX_BOUND:g}"
            )
        if self.rounding not in ROUNDINGS:
            raise ValueError(f"there is no rounding '{self.rounding}'. Allowed: {', '.join(ROUNDINGS)}")

    @property
    def zero(self) -> int:
        """The code of no motion."""
        return 128 if self.rounding == "round" else 127

    @property
    def step(self) -> float:
        """Distance between two codes, pixels."""
        return 2 * self.bound / 255

    def encode(self, flow: FloatArray) -> Codes:
        """Flow in pixels, any shape → uint8 codes of that shape.

        Raises:
            ValueError: A value is not a number.
        """
        scaled = self._scaled(np.asarray(flow, dtype=np.float32))
        if np.isnan(scaled).any():
            raise ValueError("there are flow values that are not numbers")
        return (np.rint(scaled) if self.rounding == "round" else np.floor(scaled)).clip(0, 255).astype(np.uint8)

    def encode_tensor(self, flow: Tensor) -> Tensor:
        """As ``encode``, for tensors on any device. NaN is not looked for (that would wait for the device)."""
        scaled = self._scaled(flow.float())
        return (scaled.round() if self.rounding == "round" else scaled.floor()).clamp(0, 255).byte()

    def decode(self, codes: Codes) -> npt.NDArray[np.float32]:
        """Codes → flow, float32, pixels."""
        return _TABLE[codes] * np.float32(2 * self.bound)

    def decode_tensor(self, codes: Tensor) -> Tensor:
        """As ``decode``, for tensors on any device."""
        return (codes.float() / 255 - 0.5) * (2 * self.bound)

    def clipped(self, flow: FloatArray) -> int:
        """How many values are beyond the bound."""
        return int(np.count_nonzero(np.abs(flow) > self.bound))

    def _scaled(self, flow: Any) -> Any:
        """0 … 255 within the bound; in float32 both libraries give the same."""
        return (flow + self.bound) * (255 / (2 * self.bound))


_TABLE = np.arange(256, dtype=np.float32) / np.float32(255) - np.float32(0.5)
