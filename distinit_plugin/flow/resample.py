"""Resizing and warping with the interpolation of OpenCV's ``resize`` (linear) and ``remap`` (cubic)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def resize_linear(planes: Tensor, height: int, width: int, step: float | None = None) -> Tensor:
    """Two taps along each axis, without a low-pass; beyond the border the nearest pixel is repeated.

    Args:
        planes: (…,H,W), floating.
        height: Of the result.
        width: Of the result.
        step: Pixels of the input between neighbours of the result; by default the quotient of the sizes, which differs
            from a wanted 1.25 where sizes were rounded.

    Returns:
        (…,height,width).
    """
    for dim, size in ((-2, height), (-1, width)):
        length = planes.shape[dim]
        place = (torch.arange(size, device=planes.device, dtype=torch.float64) + 0.5) * (step or length / size) - 0.5
        place = place.clamp(0, length - 1)
        left = place.floor().long()
        weight = (place - left).to(planes.dtype)
        weight = weight[:, None] if dim == -2 else weight
        right = (left + 1).clamp(max=length - 1)
        planes = planes.index_select(dim, left).lerp(planes.index_select(dim, right), weight)
    return planes


def warp_cubic(planes: Tensor, flow: Tensor) -> Tensor:
    """``planes`` at x + u, y + v, cubic with a = −0.75; what lies beyond the border is 0.

    Args:
        planes: (N,C,H,W), floating.
        flow: (N,2,H,W), (u,v) in pixels.

    Returns:
        (N,C,H,W).
    """
    height, width = planes.shape[-2:]
    # grid_sample counts from −1 to 1. With sides that are powers of two, whole pixels have exact places there, so that
    # still pictures are warped to themselves; the zeros that are added are what lies beyond the border anyway.
    wide, high = (1 << (side - 1).bit_length() for side in (width, height))
    planes = F.pad(planes, (0, wide - width, 0, high - height))
    x = torch.arange(width, device=flow.device, dtype=flow.dtype)
    y = torch.arange(height, device=flow.device, dtype=flow.dtype)[:, None]
    places = ((x + flow[:, 0] + 0.5) * (2 / wide) - 1, (y + flow[:, 1] + 0.5) * (2 / high) - 1)
    return F.grid_sample(planes, torch.stack(places, dim=-1), mode="bicubic", padding_mode="zeros", align_corners=False)
