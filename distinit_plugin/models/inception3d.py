"""The Inception trunk of I3D and S3D-G: units, Mixed blocks, end-points, padding.

Sources: J. Carreira and A. Zisserman, "Quo Vadis, Action Recognition?" (arXiv 1705.07750) figure 3, with
https://github.com/google-deepmind/kinetics-i3d; S. Xie et al., "Rethinking Spatiotemporal Feature Learning"
(arXiv 1712.04851), with TF-slim's ``nets/s3dg.py`` and ``nets/i3d_utils.py``.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import get_args

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from distinit_plugin.errors import UserError
from distinit_plugin.models.conv3d import Conv3d, TemporalPadding
from distinit_plugin.models.folding import Triple
from distinit_plugin.models.inception import (
    END_POINTS,
    MIXED,
    POOLS,
    SLIM_NAMES,
    STEM_CONVS,
    EndPoints,
    MixedChannels,
    Padding,
    scaled,
    shorthand,
)
from distinit_plugin.models.network import InputSpec, TrunkNetwork, check_choice
from distinit_plugin.models.padding import MaxPool3d, PoolPadding
from distinit_plugin.models.residual import check_width
from distinit_plugin.registry import near_matches
from distinit_plugin.types import LayerInfo, ModelOutput

BATCH_NORM_EPS = 1e-3
BATCH_NORM_MOMENTUM = 1 - 0.999  # both publications keep 0.999 of the running statistics per step

AVERAGED_FRAMES, AVERAGED_SIZE = 2, 7
"""The window of the last average, on maps: 2×7×7."""


STARTS = tuple(name for name in END_POINTS if name == "Conv2d_2c_3x3" or name in MIXED)
"""Where temporal kernels and gates can begin."""

NOWHERE = "none"


def starts_from(key: str, name: str) -> frozenset[str]:
    """The end-points from ``name`` (TF-slim's or the papers' name; ``none``) on, of those in :data:`STARTS`.

    Raises:
        UserError: It is not one of them.
    """
    if name == NOWHERE:
        return frozenset()
    for index, start in enumerate(STARTS):
        if name in (start, shorthand(start)):
            return frozenset(STARTS[index:])
    short = [shorthand(start) for start in STARTS]
    hint = near_matches(name, [*short, *STARTS, NOWHERE])
    raise UserError(f"{key} is {name!r}.{hint} Allowed: {', '.join(short)} (or TF-slim's names), {NOWHERE}.")


@dataclass(frozen=True)
class Layout:
    """The switches that all units of one network share.

    Attributes:
        padding: Of convolutions; ``same`` is TensorFlow's.
        pool_padding: Of the pools.
        temporal_padding: Of convolutions in time.
        affine_norm: Whether normalisation has a factor (gamma) besides its summand (beta).
        temporal_norm: Separable units: whether the temporal half is normalised too, instead of having a bias.
    """

    padding: Padding
    pool_padding: PoolPadding
    temporal_padding: TemporalPadding
    affine_norm: bool
    temporal_norm: bool = False

    def norm(self, channels: int) -> nn.BatchNorm3d:
        """Batch normalisation, without a factor unless it is affine."""
        norm = nn.BatchNorm3d(channels, eps=BATCH_NORM_EPS, momentum=BATCH_NORM_MOMENTUM)
        if not self.affine_norm:
            norm.register_parameter("weight", None)
        return norm

    def conv(
        self, in_channels: int, out_channels: int, kernel: Triple, stride: Triple, *, bias: bool = False
    ) -> Conv3d:
        """A convolution with an odd kernel; with stride 1 both paddings are the same half of the kernel."""
        depends_on_size = self.padding == "same" and any(s > 1 and k > 1 for k, s in zip(kernel, stride, strict=True))
        half = (kernel[0] // 2, kernel[1] // 2, kernel[2] // 2)
        return Conv3d(
            in_channels,
            out_channels,
            kernel,
            stride,
            (0, 0, 0) if depends_on_size else half,
            bias=bias,
            temporal_padding=self.temporal_padding,
            pads_same=depends_on_size,
        )

    def pool(self, kernel: Triple, stride: Triple) -> MaxPool3d:
        """A max-pool."""
        return MaxPool3d(kernel, stride, self.pool_padding)


class Unit(nn.Module):
    """Convolution → BN → ReLU, when separable followed by a temporal convolution → ReLU, when gated by a gate.

    (B,C,T,H,W) → (B,O,T',H',W'). The gate multiplies each channel by sigmoid(W · mean over T, H, W).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: Triple,
        layout: Layout,
        *,
        stride: Triple = (1, 1, 1),
        separable: bool = False,
        gated: bool = False,
    ) -> None:
        """Build; a kernel of one frame has nothing to separate."""
        super().__init__()
        separable = separable and kernel[0] > 1
        in_space, over_space = ((1, *kernel[1:]), (1, *stride[1:])) if separable else (kernel, stride)
        self.conv = layout.conv(in_channels, out_channels, in_space, over_space)
        self.bn = layout.norm(out_channels)
        self.temporal: Conv3d | None = None
        self.temporal_bn: nn.BatchNorm3d | None = None
        if separable:
            in_time, over_time = (kernel[0], 1, 1), (stride[0], 1, 1)
            bias = not layout.temporal_norm
            self.temporal = layout.conv(out_channels, out_channels, in_time, over_time, bias=bias)
            if layout.temporal_norm:
                self.temporal_bn = layout.norm(out_channels)
        self.gate = nn.Linear(out_channels, out_channels, bias=False) if gated else None

    def forward(self, x: Tensor) -> Tensor:
        """Run."""
        x = functional.relu(self.bn(self.conv(x)), inplace=True)
        if self.temporal is not None:
            x = self.temporal(x)
            if self.temporal_bn is not None:
                x = self.temporal_bn(x)
            x = functional.relu(x, inplace=True)
        if self.gate is not None:
            x = x * torch.sigmoid(self.gate(x.mean(dim=(2, 3, 4))))[:, :, None, None, None]
        return x


class MixedBlock(nn.Module):
    """Four branches joined: 1×1 · 1×1 → 3×3 · 1×1 → 3×3 · pool → 1×1; the last unit of each may be gated."""

    def __init__(
        self, in_channels: int, channels: MixedChannels, layout: Layout, *, frames: int, separable: bool, gated: bool
    ) -> None:
        """Build; ``frames`` is the temporal size of the 3×3 kernels."""
        super().__init__()
        one, three = (1, 1, 1), (frames, 3, 3)
        self.b0 = Unit(in_channels, channels.b0, one, layout, gated=gated)
        self.b1a = Unit(in_channels, channels.b1a, one, layout)
        self.b1b = Unit(channels.b1a, channels.b1b, three, layout, separable=separable, gated=gated)
        self.b2a = Unit(in_channels, channels.b2a, one, layout)
        self.b2b = Unit(channels.b2a, channels.b2b, three, layout, separable=separable, gated=gated)
        self.pool = layout.pool((3, 3, 3), (1, 1, 1))
        self.b3b = Unit(in_channels, channels.b3b, one, layout, gated=gated)

    def forward(self, x: Tensor) -> Tensor:
        """(B,C,T,H,W) → (B,O,T,H,W)."""
        return torch.cat([self.b0(x), self.b1b(self.b1a(x)), self.b2b(self.b2a(x)), self.b3b(self.pool(x))], dim=1)


class InceptionNetwork(TrunkNetwork):
    """Trunk, 2×7×7 average, dropout, ``fc`` at each position, logits averaged.

    Maps smaller than the average's window are averaged whole, so that any crop and any clip length can be run. On maps
    larger than 7×7 the average in space is that of the whole map, or, fully convolutional, of every 7×7 window.
    """

    def __init__(
        self,
        *,
        num_classes: int,
        input: InputSpec,
        layout: Layout,
        width: int,
        dropout: float,
        stem_frames: int,
        separable_stem: bool,
        separable: bool,
        temporal: Collection[str],
        gated: Collection[str],
        fully_convolutional: bool,
        last: str = END_POINTS[-1],
    ) -> None:
        """Assemble up to the end-point ``last``.

        ``temporal`` and ``gated`` are the end-points with temporal kernels and gates; all by TF-slim's names.
        """
        super().__init__(input)
        self.fully_convolutional = fully_convolutional
        layers: dict[str, LayerInfo] = {}
        channels, strides = input.channels, (1, 1)
        for end_point in END_POINTS[: END_POINTS.index(last) + 1]:
            name = self.own_name(end_point)
            stride: Triple = (1, 1, 1)
            frames = 3 if end_point in temporal else 1
            gate = end_point in gated
            if end_point in POOLS:
                kernel, stride = POOLS[end_point]
                self.add_module(name, layout.pool(kernel, stride))
            elif end_point in MIXED:
                mixed = MixedChannels(*(scaled(c, width) for c in MIXED[end_point]))
                block = MixedBlock(channels, mixed, layout, frames=frames, separable=separable, gated=gate)
                self.add_module(name, block)
                channels = mixed.out
            else:
                out = scaled(STEM_CONVS[end_point], width)
                first = end_point == "Conv2d_1a_7x7"
                size = int(end_point[-1])
                kernel, stride = ((stem_frames, 7, 7), (2, 2, 2)) if first else ((frames, size, size), (1, 1, 1))
                split = separable_stem if first else separable
                unit = Unit(channels, out, kernel, layout, stride=stride, separable=split, gated=gate)
                self.add_module(name, unit)
                channels = out
            strides = strides[0] * stride[0], strides[1] * stride[1]
            layers[name] = LayerInfo(channels, *strides)
        self._end_points = EndPoints(layers)
        self.finish(self._end_points, num_classes, dropout)

    @property
    def image_trunks(self) -> Mapping[str, str]:
        """The whole of a GoogLeNet, whose layers go by TF-slim's names."""
        return {"": "googlenet"}

    def initialize(self) -> None:
        """Truncated normal kernels of deviation :meth:`kernel_deviation`; temporal halves the identity; biases 0."""
        for module in self.modules():
            if not isinstance(module, Unit):
                continue
            kernels = [module.conv.weight] if module.gate is None else [module.conv.weight, module.gate.weight]
            for kernel in kernels:
                deviation = self.kernel_deviation(kernel)
                nn.init.trunc_normal_(kernel, 0.0, deviation, -2 * deviation, 2 * deviation)
            if module.temporal is not None:
                nn.init.dirac_(module.temporal.weight)
                if module.temporal.bias is not None:
                    nn.init.zeros_(module.temporal.bias)

    def kernel_deviation(self, kernel: Tensor) -> float:
        """Standard deviation (before truncation at twice it) from which a kernel is drawn."""
        return 0.01

    def run_trunk(self, x: Tensor, taps: Collection[str]) -> tuple[Tensor, dict[str, Tensor]]:
        """Taps are handed back under the names by which they were asked for."""
        self.check_taps(taps)
        own = {tap: self._end_points.own_name(tap) for tap in taps}
        x, kept = super().run_trunk(x, set(own.values()))
        return x, {tap: kept[name] for tap, name in own.items()}

    def forward(
        self, views: Mapping[str, Tensor], *, boxes: Tensor | None = None, taps: Collection[str] = ()
    ) -> ModelOutput:
        """Run on the clip (``rgb`` or ``flow``), normalised (B,C,T,H,W)."""
        feature_map, kept = self.run_trunk(views[self.input.modality], taps)
        positions = self.average_windows(feature_map)
        logits = self.classify(positions)
        return ModelOutput(None if logits is None else logits.mean(dim=1), positions.mean(dim=1), kept)

    def average_windows(self, feature_map: Tensor) -> Tensor:
        """(B,D,T,H,W) → (B,P,D): the averages over the windows of the last pool, one for each of its P positions."""
        if self.fully_convolutional:
            size = [min(AVERAGED_SIZE, extent) for extent in feature_map.shape[3:]]
            x = functional.avg_pool3d(feature_map, [1, *size], stride=1).flatten(3)
        else:
            x = feature_map.mean(dim=(3, 4)).unsqueeze(3)
        if x.shape[2] >= AVERAGED_FRAMES:
            x = (x[:, :, 1:] + x[:, :, :-1]) / AVERAGED_FRAMES
        return x.flatten(2).transpose(1, 2)


def end_point_named(key: str, name: str) -> str:
    """TF-slim's name of an end-point that is given by it or by the papers' name.

    Raises:
        UserError: There is none of that name.
    """
    if name in END_POINTS:
        return name
    if name in SLIM_NAMES:
        return SLIM_NAMES[name]
    hint = near_matches(name, [*SLIM_NAMES, *END_POINTS])
    raise UserError(f"{key} is {name!r}.{hint} Allowed: {', '.join(SLIM_NAMES)} (or TF-slim's names).")


def check_common(padding: str, temporal_padding: str, width: int) -> None:
    """Raise :class:`UserError` for a switch of both networks outside its range."""
    check_choice("NETWORK.PADDING", padding, get_args(Padding))
    check_choice("NETWORK.TEMPORAL_PADDING", temporal_padding, get_args(TemporalPadding))
    check_width(width)
