"""A 3D convolution written as 2D convolutions.

PyTorch's bf16 ``conv3d`` returns wrong weight gradients on some CPUs (NaN or up to a third off) where ``conv2d`` is
right, and ``conv2d`` is often the faster kernel for factored convolutions. Weights keep their 5-D shape.

Shapes: x (B,C,T,H,W), weight (O, C/groups, kt, kh, kw), result (B,O,T',H',W').
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as functional
from torch import Tensor

Triple = tuple[int, int, int]

FOLDING_VERSION = 3
"""Raised when a formulation's speed or result changes, so that measurements of an older one are made anew."""


class ConvGeometry(NamedTuple):
    """How a convolution walks over its input; every triple is (T, H, W)."""

    stride: Triple
    padding: Triple
    dilation: Triple
    groups: int


def conv3d_as_conv2d(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: ConvGeometry) -> Tensor:
    """The value of ``conv3d`` computed by ``conv2d`` alone; any stride, zero padding, dilation and groups.

    A k×1×1 or 1×1×1 kernel runs over the (T, H·W) plane, a 1×k×k kernel over frames folded into the batch, and a full
    kernel is the sum over its temporal taps of such folded convolutions. In ``channels_last_3d`` both foldings are
    views, without copies, unless a k×1×1 kernel skips pixels.
    """
    kt, kh, kw = weight.shape[2:]
    if kh == kw == 1:
        return _over_time_plane(x, weight, bias, geometry)
    if kt == 1:
        return _over_folded_frames(x, weight[:, :, 0], bias, geometry)
    return _over_shifted_frames(x, weight, bias, geometry)


def _over_time_plane(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: ConvGeometry) -> Tensor:
    """k×1×1: one conv2d with a k×1 kernel on (B, C, T, H·W)."""
    (st, sh, sw), (pt, ph, pw) = geometry.stride, geometry.padding
    if ph or pw:
        x = functional.pad(x, (pw, pw, ph, ph))
    skipped = 1
    if weight.shape[2] == 1 and not pt:  # a pointwise kernel skips frames before it reads them
        skipped, st = st, 1
    x = _cut(x, slice(None, None, skipped), slice(None, None, sh), slice(None, None, sw))
    folded = x.movedim(1, -1).flatten(2, 3).movedim(-1, 1) if _channels_innermost(x) else x.flatten(3)
    y = functional.conv2d(folded, weight[..., 0], bias, (st, 1), (pt, 0), (geometry.dilation[0], 1), geometry.groups)
    if _channels_innermost(y):
        return y.movedim(1, -1).unflatten(2, x.shape[3:]).movedim(-1, 1)
    return y.unflatten(3, x.shape[3:])


def _over_folded_frames(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: ConvGeometry) -> Tensor:
    """1×k×k: one conv2d on (B·T, C, H, W); ``weight`` is 4-D."""
    if geometry.padding[0]:
        x = functional.pad(x, (0, 0, 0, 0, geometry.padding[0], geometry.padding[0]))
    return _conv_frames(_cut(x, slice(None, None, geometry.stride[0])), weight, bias, geometry)


def _conv_frames(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: ConvGeometry) -> Tensor:
    batch, _, frames = x.shape[:3]
    if _channels_innermost(x):
        folded = x.movedim(1, -1).flatten(0, 1).movedim(-1, 1)
    else:
        folded = x.transpose(1, 2).flatten(0, 1)
    y = functional.conv2d(
        folded, weight, bias, geometry.stride[1:], geometry.padding[1:], geometry.dilation[1:], geometry.groups
    )
    if _channels_innermost(y):
        return y.movedim(1, -1).unflatten(0, (batch, frames)).movedim(-1, 1)
    return y.unflatten(0, (batch, frames)).transpose(1, 2)


def _cut(x: Tensor, *slices: slice) -> Tensor:
    """Slices of time, height, width; see :func:`_channels_innermost`."""
    if _channels_innermost(x):
        return x.movedim(1, -1)[(slice(None), *slices)].movedim(-1, 1)
    return x[(slice(None), slice(None), *slices)]


def _channels_innermost(x: Tensor) -> bool:
    """Whether channels are neighbours in memory.

    Views of such a tensor are taken after its channels have been moved to the end, as its memory has them. Taken
    otherwise, dimensions of size 1 (one clip, one frame) get strides by which PyTorch no longer knows the tensor as
    channels last, gradients of slices come back in the other format, and every later layer runs in, or copies to, the
    slower one.
    """
    return x.stride(1) == 1 < x.shape[1]


def _over_shifted_frames(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: ConvGeometry) -> Tensor:
    """k×k×k: the sum over temporal taps; a tap skips the outputs for which it would read padding."""
    stride, padding, dilation = geometry.stride[0], geometry.padding[0], geometry.dilation[0]
    taps, frames = weight.shape[2], x.shape[2]
    out_frames = (frames + 2 * padding - dilation * (taps - 1) - 1) // stride + 1
    parts: list[tuple[int, Tensor]] = []
    middle = taps // 2  # comes first: with usual padding it skips nothing, and the others are added to it
    for tap in (middle, *range(middle), *range(middle + 1, taps)):
        offset = tap * dilation - padding  # output t reads input frame t * stride + offset
        first = max(0, -(offset // stride))
        last = min(out_frames - 1, (frames - 1 - offset) // stride)
        if last < first:
            continue
        seen = _cut(x, slice(first * stride + offset, last * stride + offset + 1, stride))
        parts.append((first, _conv_frames(seen, weight[:, :, tap], None, geometry)))
    if not parts:  # every tap reads padding everywhere: let the padding be real frames
        x = functional.pad(x, (0, 0, 0, 0, padding, padding))
        return _over_shifted_frames(x, weight, bias, geometry._replace(padding=(0, *geometry.padding[1:])))
    return _sum_parts(parts, out_frames, bias)


def _sum_parts(parts: list[tuple[int, Tensor]], out_frames: int, bias: Tensor | None) -> Tensor:
    """Add up results that each cover a run of the output frames, into the first one where that covers all."""
    start, total = parts[0]
    if total.shape[2] < out_frames:
        total = functional.pad(total, (0, 0, 0, 0, start, out_frames - start - total.shape[2]))
    for first, part in parts[1:]:
        total.narrow(2, first, part.shape[2]).add_(part)
    return total if bias is None else total + bias.to(total.dtype).view(-1, 1, 1, 1)


def repeat_edge_frames(x: Tensor, before: int, behind: int) -> Tensor:
    """Repeat the first and the last frame this often: padding in time that leaves a still video still."""
    if not before and not behind:
        return x
    return torch.cat([x[:, :, :1]] * before + [x] + [x[:, :, -1:]] * behind, dim=2)
