"""TV-L1 of :mod:`distinit_plugin.flow.tvl1` as a back end."""

from __future__ import annotations

from dataclasses import astuple, fields
from typing import Any

from torch import Tensor

from distinit_plugin.errors import UserError, shown
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
        _check(self.settings)

    @property
    def identity(self) -> str:
        """See ``FlowBackend``."""
        names = (field.name for field in fields(self.settings))
        values = ", ".join(f"{name}={value}" for name, value in zip(names, astuple(self.settings), strict=True))
        return f"tvl1({values}) revision {REVISION}"

    def _compute(self, first: Tensor, second: Tensor) -> Tensor:
        return tvl1_flow(rgb_to_gray(first), rgb_to_gray(second), self.settings)


RANGES: dict[str, tuple[float, float]] = {
    "tau": (0.001, 0.25),
    "lambda_": (0.0001, 100),
    "theta": (0.001, 100),
    "scales": (1, 50),
    "warps": (1, 100),
    "epsilon": (0, 100),
    "inner_iterations": (1, 1000),
    "outer_iterations": (1, 1000),
    "scale_step": (0.1, 0.95),
}
"""Least and greatest values of the numbers; the dual variables' iteration converges for steps up to 0.25."""


def _check(settings: TVL1Settings) -> None:
    for name, (least, greatest) in RANGES.items():
        value, whole = getattr(settings, name), isinstance(getattr(TVL1Settings, name), int)
        kinds = (int,) if whole else (int, float)
        if isinstance(value, bool) or not isinstance(value, kinds) or not least <= value <= greatest:
            kind = "a whole number" if whole else "a number"
            raise UserError(f"tvl1: {name} is {shown(value)}; {kind} from {least:g} to {greatest:g} is allowed.")
    if not isinstance(settings.median, bool):
        raise UserError(f"tvl1: median is {shown(settings.median)}; True or False is allowed.")
