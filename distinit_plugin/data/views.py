"""Raw views → what networks eat: moved to the device once, normalised there."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from distinit_plugin.constants import constant
from distinit_plugin.data.flow import LiveFlow
from distinit_plugin.types import ViewSpec

_MAX_CODE = 255.0


def finish_views(
    views: Mapping[str, Tensor],
    specs: Mapping[str, ViewSpec],
    device: torch.device | str,
    *,
    dtype: torch.dtype = torch.float32,
    memory_format: torch.memory_format = torch.contiguous_format,
    flow: LiveFlow | None = None,
) -> dict[str, Tensor]:
    """Move and normalise the views of a batch.

    Each distinct uint8 tensor travels to the device once, and networks that agree in pixels, mean and standard
    deviation share one result: nobody may write into it.

    Args:
        views: ``ViewSpec.pixels`` → uint8 (B,C,T,H,W), or ``ViewSpec.pairs`` → uint8 (B,6,T·stack,H,W).
        specs: The caller's name of each view (``student/rgb``, ``IMAGENET/rgb``) → what it must be.
        device: Where to.
        dtype: Of the result; the arithmetic is fp32.
        memory_format: ``torch.channels_last_3d`` or contiguous.
        flow: Computes flow from pairs, on the device.

    Returns:
        The caller's name → (value / 255 − mean) / std, (B,C,T,H,W).

    Raises:
        KeyError: A spec whose pixels the batch does not hold, and cannot be computed.
    """
    moved: dict[str, Tensor] = {}
    finished: dict[tuple[str, tuple[float, ...], tuple[float, ...]], Tensor] = {}
    result: dict[str, Tensor] = {}
    for name, spec in specs.items():
        if spec.pixels not in moved:
            if spec.pixels in views:
                raw = views[spec.pixels].to(device, non_blocking=True)
            elif spec.pairs in views and flow is not None:
                raw = flow(views[spec.pairs].to(device, non_blocking=True), spec.stack)
            else:
                raise KeyError(f"view '{name}' needs {spec.pixels}, the batch holds {sorted(views)}")
            # The memory format is changed while the values are still bytes: a quarter of the traffic.
            moved[spec.pixels] = raw.contiguous(memory_format=memory_format)
        identity = (spec.pixels, tuple(spec.mean), tuple(spec.std))
        if identity not in finished:
            finished[identity] = _normalise(moved[spec.pixels], spec, dtype)
        result[name] = finished[identity]
    return result


def _normalise(raw: Tensor, spec: ViewSpec, dtype: torch.dtype) -> Tensor:
    """(B,C,T,H,W) uint8 → normalised."""
    channels = raw.shape[1]
    assert len(spec.mean) == len(spec.std) == channels, (spec, raw.shape)
    shape = (1, channels, 1, 1, 1)
    mean, std = (constant(values, raw.device).view(shape) for values in (spec.mean, spec.std))
    values = raw.to(torch.float32)
    return values.sub_(mean * _MAX_CODE).div_(std * _MAX_CODE).to(dtype)
