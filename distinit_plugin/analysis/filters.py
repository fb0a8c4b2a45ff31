"""The first filters of video networks over time (DistInit, arXiv 1901.09244, figures 3 and 4; Quo Vadis, figure 4).

The number beside each picture is the share of a kernel's energy that varies over time, Σ (w − w̄)² / Σ w², with w̄ the
mean of the kernel over its time steps: 0 for a kernel that image weights were repeated into, which a still clip drives
as any other; 1 for one that answers to nothing still.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from distinit_plugin.engine.figures import COLOURS, DPI, label, new_figure
from distinit_plugin.errors import UserError
from distinit_plugin.flow.colour import flow_to_colour
from distinit_plugin.registry import near_matches
from distinit_plugin.types import ViewSpec

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAX_SHOWN = 64
"""Filters of a layer that are drawn, the first ones; numbers are of all."""

_GAP, _BAR = 3, 1
_CELL, _NARROW, _WIDE = 3 / DPI, 3.6, 7.0
"""Inches of a weight, and of one network's column at least and at most."""

Pixels = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Filters:
    """The filters of one layer that sees pixels.

    Attributes:
        network: How pictures and tables call it.
        layer: Name of the convolution.
        kernels: (O,C,T,h,w) float64; of a convolution over a stack of flow frames, T is the stack.
        time_layer: Name of the convolution whose kernels reach over time: ``layer``, or of a factored stem the one
            behind it; empty where none does.
        time_kernels: (O',I,T',1,1) of a factored stem; ``None``: those of ``layer``.
    """

    network: str
    layer: str
    kernels: Tensor
    time_layer: str
    time_kernels: Tensor | None = None

    @property
    def shares(self) -> list[float]:
        """``temporal_share`` of each filter of ``time_layer``; empty where no kernel reaches over time."""
        if not self.time_layer:
            return []
        found: list[float] = temporal_share(self.kernels if self.time_kernels is None else self.time_kernels).tolist()
        return found


def temporal_share(kernels: Tensor) -> Tensor:
    """The share of each kernel's energy that varies over time.

    Args:
        kernels: (O,C,T,h,w).

    Returns:
        (O,) float64 in [0, 1]; 0 for a kernel of zeros.
    """
    kernels = kernels.detach().to("cpu", torch.float64)
    changing = (kernels - kernels.mean(dim=2, keepdim=True)).square().flatten(1).sum(1)
    energy = kernels.square().flatten(1).sum(1)
    return torch.where(energy > 0, changing / energy.clamp(min=torch.finfo(torch.float64).tiny), 0.0)


def first_filters(name: str, network: nn.Module, specs: Mapping[str, ViewSpec], layer: str = "") -> list[Filters]:
    """The filters that see pixels: the first convolution of each view.

    Args:
        name: Of the network, in pictures.
        network: With its weights.
        specs: The views that it is fed.
        layer: Another convolution by the name of its module instead.

    Raises:
        UserError: There is no such convolution.
    """
    convolutions = {
        path: module for path, module in network.named_modules() if isinstance(module, nn.Conv3d | nn.Conv2d)
    }
    if layer and layer not in convolutions:
        raise UserError(
            f"--layer {layer}: {name} has no such convolution.{near_matches(layer, list(convolutions))} Its "
            f"first ones: {', '.join(list(convolutions)[:8]) or 'none'}."
        )
    if layer:
        return [_filters(name, layer, convolutions, 1)]
    found = []
    for spec in specs.values():
        path = next((path for path, conv in convolutions.items() if conv.in_channels == spec.channels), None)
        if path is not None:
            found.append(_filters(name, path, convolutions, spec.stack))
    if not found:
        raise UserError(f"{name} has no convolution that sees pixels. Name a layer of it by --layer.")
    return found


def _filters(name: str, path: str, convolutions: Mapping[str, nn.Conv3d | nn.Conv2d], stack: int) -> Filters:
    kernels = _kernels(convolutions[path], stack)
    if kernels.shape[2] > 1:
        return Filters(name, path, kernels, path)
    following = list(convolutions)[list(convolutions).index(path) + 1 :][:1]
    for other in following:
        behind = convolutions[other]
        in_time = isinstance(behind, nn.Conv3d) and behind.kernel_size[0] > 1 and behind.kernel_size[1:] == (1, 1)
        if in_time and behind.in_channels == len(kernels):
            return Filters(name, path, kernels, other, _kernels(behind, 1))
    return Filters(name, path, kernels, "")


def _kernels(conv: nn.Conv3d | nn.Conv2d, stack: int) -> Tensor:
    weight = conv.weight.detach().to("cpu", torch.float64)
    if weight.ndim == 4:
        weight = weight.unsqueeze(2)
    if stack > 1 and weight.shape[2] == 1:  # channel 2k is u of frame k, 2k + 1 is v
        weight = weight.squeeze(2).unflatten(1, (stack, -1)).transpose(1, 2)
    return weight


# ------------------------------------------------------------------------------------------------------ numbers
def filter_numbers(filters: Sequence[Filters]) -> dict[str, Any]:
    """For JSON: each layer with its filters' shares and their mean."""
    return {
        "share": "of each kernel's energy that varies over time, 0 to 1",
        "layers": [
            {
                "network": found.network,
                "layer": found.layer,
                "kernels": list(found.kernels.shape),
                "time_layer": found.time_layer,
                "mean_share": _mean(found.shares),
                "shares": found.shares,
            }
            for found in filters
        ],
    }


def filter_rows(filters: Sequence[Filters]) -> list[list[Any]]:
    """For CSV: a row for each filter of a layer that reaches over time."""
    rows: list[list[Any]] = [["network", "layer", "filter", "temporal_share"]]
    for found in filters:
        rows += [[found.network, found.time_layer, number, share] for number, share in enumerate(found.shares)]
    return rows


def _mean(shares: Sequence[float]) -> float | None:
    return math.fsum(shares) / len(shares) if shares else None


# ------------------------------------------------------------------------------------------------------ picture
def draw_filters(filters: Sequence[Filters]) -> Figure:
    """Each layer's kernels as strips of time steps, side by side, over the shares of all of them."""
    mosaics = [_mosaic(found) for found in filters]
    widths = [min(max(_CELL * mosaic.shape[1], _NARROW), _WIDE) for mosaic in mosaics]
    heights = [width * mosaic.shape[0] / mosaic.shape[1] for width, mosaic in zip(widths, mosaics, strict=True)]
    highest = min(max(heights), 10.0)
    figure = new_figure(max(sum(widths), 5.0), highest + 4.2)
    grid = figure.add_gridspec(2, len(filters), height_ratios=[highest, 2.4], width_ratios=widths)
    for place, (found, mosaic) in enumerate(zip(filters, mosaics, strict=True)):
        axis = figure.add_subplot(grid[0, place])
        axis.set_anchor("N")
        axis.imshow(mosaic, interpolation="nearest")
        axis.set_title(_title(found), fontsize=9)
        axis.set_xticks([])
        axis.set_yticks([])
        axis.spines[:].set_visible(False)
        if found.kernels.shape[2] > 1:
            axis.set_xlabel("time steps from left to right; bar: share", fontsize=8, color="0.3")
    axis = figure.add_subplot(grid[1, :])
    axis.set_ylabel("share of\ntemporal variance")
    axis.set_xlabel("filters, sorted")
    axis.set_ylim(-0.03, 1.03)
    for place, found in enumerate(filters):
        shares = sorted(found.shares)
        axis.plot(
            np.linspace(0, 1, len(shares)) if len(shares) > 1 else [0.5] * len(shares),
            shares,
            color=COLOURS[place % len(COLOURS)],
            linestyle=("-", "--", ":")[place // len(COLOURS) % 3],
            marker="o",
            markersize=3,
            label=label(
                f"{found.network}, {found.time_layer}" if shares else f"{found.network}: no kernel over time", 80
            ),
        )
    axis.set_xticks([0, 1], ["lowest", "highest"])
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=1 if len(filters) < 3 else 2, frameon=False, fontsize=8)
    return figure


def _title(found: Filters) -> str:
    count, channels, *sizes = found.kernels.shape
    size = " × ".join(str(side) for side in sizes)
    shown = f"{MAX_SHOWN} of {count}" if count > MAX_SHOWN else str(count)
    mean = _mean(found.shares)
    line = "" if mean is None else f"\nmean share of temporal variance {mean:.3f}"
    where = "" if found.time_kernels is None else f" ({found.time_layer})"
    return f"{label(found.network)}\n{label(found.layer)}: {shown} filters, {channels} × {size}{line}{where}"


def _mosaic(found: Filters) -> Pixels:
    """(H,W,3) in [0, 1]: strips in a grid that is about as wide as high."""
    kernels = found.kernels[:MAX_SHOWN]
    count, _, num_steps, height, width = kernels.shape
    bars = found.shares if found.time_kernels is None else []
    strip_width = num_steps * (width + 1) - 1
    strip_height = height + (1 + _BAR if bars else 0)
    across = max(1, round(math.sqrt(count * (strip_height + _GAP) / (strip_width + _GAP))))
    across = min(across, count)
    down = -(-count // across)
    mosaic = np.ones((down * (strip_height + _GAP) - _GAP, across * (strip_width + _GAP) - _GAP, 3))
    for number, kernel in enumerate(kernels):
        top = number // across * (strip_height + _GAP)
        left = number % across * (strip_width + _GAP)
        for step, tile in enumerate(_tiles(kernel)):
            start = left + step * (width + 1)
            mosaic[top : top + height, start : start + width] = tile
        if bars:
            bar = mosaic[top + height + 1 : top + strip_height, left : left + strip_width]
            bar[:] = 0.88
            bar[:, : round(bars[number] * strip_width)] = 0.0
    return mosaic


def _tiles(kernel: Tensor) -> list[Pixels]:
    """One (h,w,3) picture a time step of (C,T,h,w), all on one scale: grey is 0."""
    largest = max(float(kernel.abs().max()), 1e-12)
    if len(kernel) == 2:
        colours = flow_to_colour(
            kernel.transpose(0, 1), max(float(torch.linalg.vector_norm(kernel, dim=0).max()), 1e-12)
        )
        return [picture.permute(1, 2, 0).double().numpy() / 255 for picture in colours]
    if len(kernel) != 3:
        kernel = kernel.mean(0, keepdim=True).expand(3, -1, -1, -1)
        largest = max(float(kernel.abs().max()), 1e-12)
    shown = (0.5 + kernel / (2 * largest)).permute(1, 2, 3, 0)
    return list(shown.numpy())
