"""Flow as what a decoder predicts: magnitude and direction, on the grid of a feature map, in pixels of the input.

D3D (arXiv 1812.08249) §3.1 and §3.2. Shapes: flow (B,2,T,H,W), (u,v); polar (B,3,T,H,W), (mag, sin θ, cos θ), where θ
is the angle of (u,v), from u towards v. Values are pixels of the picture that the network sees, whatever the grid: a
motion of 4 pixels is 4 at 28×28 as it is at 224×224.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
import torch.nn.functional as functional
from torch import Tensor

from distinit_plugin.constants import constant
from distinit_plugin.errors import UserError
from distinit_plugin.flow.measures import end_point_differences

Alignment = Literal["center", "mean"]
"""Which flow stands for a slice of several frames, see ``flow_at_slices``."""

_TINY = 1e-12


def flow_to_polar(flow: Tensor) -> Tensor:
    """(u,v) → (mag, sin θ, cos θ) along dimension 1; where nothing moves θ has no value, and sine and cosine are 0."""
    magnitude = torch.linalg.vector_norm(flow, dim=1, keepdim=True)
    u, v = (flow / magnitude.clamp(min=_TINY)).split(1, dim=1)
    return torch.cat([magnitude, v, u], dim=1)


def polar_to_flow(polar: Tensor, *, unit_direction: bool = False) -> Tensor:
    """(mag, sin θ, cos θ) → (u,v) = mag · (cos θ, sin θ) along dimension 1.

    A prediction need not have a sine and a cosine whose squares add up to 1, nor a magnitude above 0. Taken as they are
    they estimate the mean flow: what minimises the loss of ``polar_loss`` is mag = E|f|, cos θ = E[u] / E|f|, so that
    mag · cos θ = E[u].

    Args:
        polar: (B,3,…).
        unit_direction: Scale the direction to length 1 and take a negative magnitude for 0.

    Returns:
        (B,2,…).
    """
    magnitude, sine, cosine = polar.split(1, dim=1)
    direction = torch.cat([cosine, sine], dim=1)
    if not unit_direction:
        return magnitude * direction
    length = torch.linalg.vector_norm(direction, dim=1, keepdim=True)
    return magnitude.clamp(min=0) * direction / length.clamp(min=_TINY)


def polar_loss(prediction: Tensor, flow: Tensor) -> Tensor:
    """D3D §3.1: (m̂ − m)² + m · [(ŝ − sin θ)² + (ĉ − cos θ)²], m and θ those of the target.

    The direction is weighted by the target's magnitude because it has no value where nothing moves. In float32 or
    better.

    Args:
        prediction: (B,3,T,H,W), (m̂, ŝ, ĉ).
        flow: (B,2,T,H,W), pixels.

    Returns:
        (B,T,H,W).
    """
    kind = torch.promote_types(torch.promote_types(prediction.dtype, flow.dtype), torch.float32)
    target = flow_to_polar(flow.to(kind))
    squares = (prediction.to(kind) - target).square()
    return squares[:, 0] + target[:, 0] * (squares[:, 1] + squares[:, 2])


def flow_at_slices(flow: Tensor, slices: int, alignment: str = "center") -> Tensor:
    """The flows of T frames at the T' slices of a feature map; the paper does not say which are meant.

    Slice i of T' covers the frames from i · T/T' to (i + 1) · T/T'. ``center``: the flow of the frame in its middle, of
    two the earlier one (where two frames make a slice, the frames 0, 2, 4, …): a flow that was measured, and of equal
    size at every depth of a network. ``mean``: the mean over the slice, in which motions that change cancel.

    Args:
        flow: (B,2,T,H,W); flow t leads from frame t to the next frame.
        slices: T', at most T.
        alignment: ``center`` or ``mean``.

    Returns:
        (B,2,T',H,W).

    Raises:
        UserError: No such alignment, or more slices than frames.
    """
    frames = flow.shape[2]
    if alignment not in get_args(Alignment):
        raise UserError(f"ALIGNMENT is '{alignment}'. Allowed: {', '.join(get_args(Alignment))}.")
    if not 0 < slices <= frames:
        raise UserError(
            f"flow of {frames} frames cannot be brought to {slices} slices: there must be at least as many."
        )
    if slices == frames:
        return flow
    if alignment == "mean":
        return functional.adaptive_avg_pool3d(flow, (slices, *flow.shape[3:]))
    middles = [((2 * number + 1) * frames - slices) // (2 * slices) for number in range(slices)]
    return flow.index_select(2, constant(middles, flow.device, torch.int64))


def flow_on_grid(flow: Tensor, grid: tuple[int, int, int], alignment: str = "center") -> Tensor:
    """Flow on the grid of a feature map: slices of ``flow_at_slices``, the mean of (u,v) over each cell.

    Args:
        flow: (B,2,T,H,W), pixels.
        grid: T', H', W', none larger than the flow's.
        alignment: As in ``flow_at_slices``.

    Returns:
        (B,2,T',H',W'), the same pixels.

    Raises:
        UserError: The flow is coarser than the grid.
    """
    slices, height, width = grid
    if height > flow.shape[3] or width > flow.shape[4]:
        raise UserError(
            f"flow of {flow.shape[3]}×{flow.shape[4]} pixels is coarser than the grid of {height}×{width} that it is "
            "compared on."
        )
    return functional.adaptive_avg_pool3d(flow_at_slices(flow, slices, alignment), (slices, height, width))


def enlarge_flow(flow: Tensor, size: tuple[int, int, int]) -> Tensor:
    """Flow of a feature map's grid for every frame and pixel: bilinear in space; each slice holds for all its frames.

    Args:
        flow: (B,2,T',H',W'), pixels.
        size: T, H, W.

    Returns:
        (B,2,T,H,W), the same pixels.
    """
    frames, height, width = size
    batch, channels, slices = flow.shape[:3]
    planes = flow.transpose(1, 2).flatten(0, 1)
    planes = functional.interpolate(planes, size=(height, width), mode="bilinear", align_corners=False)
    enlarged = planes.view(batch, slices, channels, height, width).transpose(1, 2)
    places = [frame * slices // frames for frame in range(frames)]
    if places == list(range(slices)):
        return enlarged
    return enlarged.index_select(2, constant(places, flow.device, torch.int64))


def codes_to_flow(view: Tensor, mean: tuple[float, ...], std: tuple[float, ...], bound: float) -> Tensor:
    """A normalised view of flow → pixels: code/255 = view · std + mean, and flow = (code/255 − 0.5) · 2 · bound.

    A code of no motion reads as ±bound/255 pixels, whichever way flow was rounded (see ``codes.Quantiser``).

    Args:
        view: (B,2,T,H,W), as a network of flow sees it.
        mean: Of u and v.
        std: Of u and v.
        bound: Pixels, of the codes.
    """
    kind, shape = torch.promote_types(view.dtype, torch.float32), (1, len(mean), 1, 1, 1)
    factor, summand = (constant(values, view.device, kind).view(shape) for values in (std, mean))
    return (view.to(kind) * factor + summand - 0.5) * (2 * bound)


def flow_to_view(flow: Tensor, mean: tuple[float, ...], std: tuple[float, ...], bound: float) -> Tensor:
    """Pixels → what a network of flow sees: cut off at ±bound, then ``codes_to_flow`` backwards, without rounding."""
    shape = (1, len(mean), 1, 1, 1)
    factor, summand = (constant(values, flow.device, flow.dtype).view(shape) for values in (std, mean))
    return (flow.clamp(-bound, bound) / (2 * bound) + 0.5 - summand) / factor


def flow_errors(flow: Tensor, reference: Tensor) -> Tensor:
    """End-point error of every cell, ‖flow − reference‖₂: (B,2,T,H,W) twice → (B,T,H,W), pixels."""
    return end_point_differences(flow.transpose(1, 2), reference.transpose(1, 2))
