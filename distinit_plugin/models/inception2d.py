"""The 2D Inception-v1 trunk with batch normalisation that the Quo Vadis baselines run on frames and stacks of flow.

Sources: C. Szegedy et al., "Going Deeper with Convolutions" (arXiv 1409.4842) table 1; S. Ioffe and C. Szegedy (arXiv
1502.03167) for the normalisation; J. Carreira and A. Zisserman, "Quo Vadis" (arXiv 1705.07750) §2. The third branch of
a block is 3×3, as in TF-slim's ``nets/inception_v1.py`` and torchvision's ``googlenet``, whose trunk this one equals
with ``padding="symmetric"`` and ``affine_norm``.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import get_args

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from distinit_plugin.models.inception import (
    END_POINTS,
    MIXED,
    POOLS,
    STEM_CONVS,
    EndPoints,
    MixedChannels,
    Padding,
    scaled,
)
from distinit_plugin.models.network import check_choice
from distinit_plugin.models.padding import same_padding
from distinit_plugin.models.residual import check_width
from distinit_plugin.types import LayerInfo

BATCH_NORM_EPS = 1e-3
BATCH_NORM_MOMENTUM = 0.1  # torchvision's; the papers do not say

KERNEL_DEVIATION = 0.01  # of the truncated normal from which TF-slim and torchvision draw kernels


class Unit(nn.Module):
    """Convolution without bias → BN → ReLU: (N,C,H,W) → (N,O,H',W')."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel: int, stride: int, padding: Padding, affine_norm: bool
    ) -> None:
        """Build; ``affine_norm``: the normalisation has a factor (gamma) besides its summand (beta)."""
        super().__init__()
        # With stride 1 both paddings are half of the kernel; with a stride TensorFlow's depends on the size.
        self._pads_same = padding == "same" and stride > 1
        half = 0 if self._pads_same else kernel // 2
        self.conv = nn.Conv2d(in_channels, out_channels, kernel, stride, half, bias=False)
        self.bn = nn.BatchNorm2d(out_channels, eps=BATCH_NORM_EPS, momentum=BATCH_NORM_MOMENTUM)
        if not affine_norm:
            self.bn.register_parameter("weight", None)

    def forward(self, x: Tensor) -> Tensor:
        """Run."""
        if self._pads_same:
            kernel, stride = self.conv.kernel_size[0], self.conv.stride[0]
            rows, columns = (same_padding(size, kernel, stride) for size in x.shape[2:])
            x = functional.pad(x, (*columns, *rows))
        return functional.relu(self.bn(self.conv(x)), inplace=True)


class StridedPool(nn.Module):
    """Max-pool with stride 2; ``same``: TensorFlow's padding, ``symmetric``: torchvision's, none, sizes rounded up."""

    def __init__(self, kernel: int, padding: Padding) -> None:
        """Build."""
        super().__init__()
        self.kernel, self.padding = kernel, padding

    def forward(self, x: Tensor) -> Tensor:
        """(N,C,H,W) → (N,C,H',W')."""
        # What SAME adds behind is what ceil_mode lets the last window reach over the edge.
        before = [same_padding(size, self.kernel, 2)[0] if self.padding == "same" else 0 for size in x.shape[2:]]
        kernel = [min(self.kernel, size + 2 * added) for size, added in zip(x.shape[2:], before, strict=True)]
        return functional.max_pool2d(x, kernel, 2, before, ceil_mode=True)


class MixedBlock(nn.Module):
    """Four branches joined: 1×1 · 1×1 → 3×3 · 1×1 → 3×3 · 3×3 max-pool → 1×1."""

    def __init__(self, in_channels: int, channels: MixedChannels, padding: Padding, affine_norm: bool) -> None:
        """Build."""
        super().__init__()

        def unit(inputs: int, outputs: int, kernel: int) -> Unit:
            return Unit(inputs, outputs, kernel, 1, padding, affine_norm)

        self.b0 = unit(in_channels, channels.b0, 1)
        self.b1a = unit(in_channels, channels.b1a, 1)
        self.b1b = unit(channels.b1a, channels.b1b, 3)
        self.b2a = unit(in_channels, channels.b2a, 1)
        self.b2b = unit(channels.b2a, channels.b2b, 3)
        self.b3b = unit(in_channels, channels.b3b, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(N,C,H,W) → (N,O,H,W)."""
        pooled = functional.max_pool2d(x, 3, 1, 1)
        return torch.cat([self.b0(x), self.b1b(self.b1a(x)), self.b2b(self.b2a(x)), self.b3b(pooled)], dim=1)


class InceptionTrunk2D(nn.Module):
    """From images, frames or stacks of flow to the map before the last average pool: 1024 channels at 1/32.

    Attributes:
        layers: TF-slim's end-points, in order; the papers' shorthand finds them, too.
        out_channels: Channels of the last one.
    """

    def __init__(self, in_channels: int, *, padding: str = "same", affine_norm: bool = False, width: int = 64) -> None:
        """Build.

        Args:
            in_channels: 3 for frames, 20 for ten stacked frames of flow.
            padding: ``same``: TensorFlow's, which pads the first convolution by 2 and 3; ``symmetric``: torchvision's,
                which pads it by 3 and 3.
            affine_norm: Whether normalisation has a factor.
            width: Channels of the first convolution; 64 in the papers. All layers scale with it.

        Raises:
            UserError: A switch outside its range.
        """
        super().__init__()
        check_choice("NETWORK.PADDING", padding, get_args(Padding))
        self.padding = padding
        check_width(width)
        chosen: Padding = "same" if padding == "same" else "symmetric"
        layers: dict[str, LayerInfo] = {}
        channels, stride = in_channels, 1
        for name in END_POINTS:
            if name in POOLS:
                self.add_module(name, StridedPool(POOLS[name][0][1], chosen))
                stride *= 2
            elif name in MIXED:
                mixed = MixedChannels(*(scaled(number, width) for number in MIXED[name]))
                self.add_module(name, MixedBlock(channels, mixed, chosen, affine_norm))
                channels = mixed.out
            else:
                out, step = scaled(STEM_CONVS[name], width), 2 if name == "Conv2d_1a_7x7" else 1
                self.add_module(name, Unit(channels, out, int(name[-1]), step, chosen, affine_norm))
                channels, stride = out, stride * step
            layers[name] = LayerInfo(channels, 1, stride)
        self.layers = EndPoints(layers)
        self.out_channels = channels
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.trunc_normal_(module.weight, 0.0, KERNEL_DEVIATION, -2 * KERNEL_DEVIATION, 2 * KERNEL_DEVIATION)

    def forward(self, x: Tensor) -> Tensor:
        """(N,C,H,W) → (N,1024,H/32,W/32)."""
        for name in END_POINTS:
            x = self.get_submodule(name)(x)
        return x

    def run_frames(self, clip: Tensor, taps: Collection[str] = ()) -> tuple[Tensor, dict[str, Tensor]]:
        """Each frame of a clip is an image.

        Args:
            clip: (B,C,T,H,W).
            taps: Names in :attr:`layers`, of either kind.

        Returns:
            The last map (B,1024,T,H/32,W/32) and the tapped ones, of the same kind, under the names that were given.
        """
        own = {tap: self.layers.own_name(tap) for tap in taps}
        wanted = set(own.values())
        batch_and_time = (clip.shape[0], clip.shape[2])
        kept: dict[str, Tensor] = {}
        x = clip.transpose(1, 2).flatten(0, 1)
        for name in END_POINTS:
            x = self.get_submodule(name)(x)
            if name in wanted:
                kept[name] = x.unflatten(0, batch_and_time).transpose(1, 2)
        return x.unflatten(0, batch_and_time).transpose(1, 2), {tap: kept[name] for tap, name in own.items()}
