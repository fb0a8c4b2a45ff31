"""TV-L1 of :mod:`distinit_plugin.flow.tvl1` as a back end."""

from __future__ import annotations

from dataclasses import astuple, fields
from typing import Any

from torch import Tensor

from distinit_plugin.errors import UserError
from distinit_plugin.flow.backends import FlowBackend, register_backend, rgb_to_gray
from distinit_plugin.flow.tvl1 import MIN_SIDE, TVL1Settings, tvl1_flow

REVISION = 1
"""Raised when the flow changes by more than rounding."""


@register_backend
class TVL1(FlowBackend):
    """Batched TV-L1 in torch, on the frames' device."""

    name = "tvl1"
    min_side = MIN_SIDE

    def __init__(self, **settings: Any) -> None:
        """Keep the parameters.

        Args:
            settings: Of ``TVL1Settings``.

        Raises:
            UserError: A parameter that does not exist or is out of range.
        """
        known = [field.name for field in fields(TVL1Settings)]
        unknown = sorted(set(settings) - set(known))
        if unknown:
            raise UserError(f"tvl1: there is no parameter {unknown[0]!r}. Known: {', '.join(known)}.")
        self.settings = TVL1Settings(**settings)

    @property
    def identity(self) -> str:
        """See ``FlowBackend``."""
        names = (field.name for field in fields(self.settings))
        values = ", ".join(f"{name}={value}" for name, value in zip(names, astuple(self.settings), strict=True))
        return f"tvl1({values}) revision {REVISION}"

    def _compute(self, first: Tensor, second: Tensor) -> Tensor:
        return tvl1_flow(rgb_to_gray(first), rgb_to_gray(second), self.settings)
