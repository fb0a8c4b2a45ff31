"""R(2+1)D: every 3×3×3 convolution split into a spatial and a temporal one.

Sources: D. Tran et al. (arXiv 1711.11248); VMZ ``c2/lib/models/r3d_model.py`` and ``video_model.py:66``. Keys are
torchvision's ``r2plus1d_18``.
"""

from __future__ import annotations

from typing import cast

from torch import nn

from distinit_plugin.models.conv3d import TemporalPadding
from distinit_plugin.models.network import InputSpec
from distinit_plugin.models.residual import NO_FACTORS, ConvShape, Layout, ResidualNetwork, Variant, check_switches
from distinit_plugin.registry import MODELS

STEM_MID_CHANNELS = 45  # at width 64; DistInit figure 4 shows these 45 spatial filters


@MODELS.register()
class R2Plus1D(ResidualNetwork):
    """ResNet with (2+1)D convolutions; 33.4 M parameters at depth 18 in the paper's variant."""

    def __init__(
        self,
        *,
        num_classes: int,
        input: InputSpec,
        depth: int = 18,
        width: int = 64,
        variant: str = "vmz",
        temporal_padding: str = "zeros",
        dropout: float = 0.0,
    ) -> None:
        """Build.

        Args:
            num_classes: K; 0: no classifier.
            input: The clip that the network is fed.
            depth: 10, 16, 18 or 34 (basic blocks); 26, 50, 101 or 152 (bottlenecks, whose 3×3×3 is factored).
            width: Channels of the first stage; 64 in the papers. All stages, the stem's middle channels and those of
                the factored convolutions scale with it.
            variant: ``vmz`` (middle channels for each convolution, BN eps 1e-3, short clips keep their frames) or
                ``torchvision`` (one number of middle channels for the block, BN eps 1e-5).
            temporal_padding: ``zeros`` or ``replicate``.
            dropout: Dropped fraction before the classifier.

        Raises:
            UserError: A switch outside its range.
        """
        check_switches(depth, width, variant, temporal_padding)
        layout = Layout(cast(Variant, variant), cast(TemporalPadding, temporal_padding))
        mid_channels = max(1, round(STEM_MID_CHANNELS * width / 64))
        stem = nn.Sequential(
            layout.conv(input.channels, mid_channels, (1, 7, 7), (1, 2, 2)),
            layout.norm(mid_channels),
            nn.ReLU(inplace=True),
            layout.conv(mid_channels, width, (3, 1, 1), (1, 1, 1)),
            layout.norm(width),
            nn.ReLU(inplace=True),
        )
        super().__init__(
            stem=stem,
            stem_pool=nn.Identity(),
            build_conv=_factored_conv,
            layout=layout,
            num_classes=num_classes,
            input=input,
            depth=depth,
            width=width,
            dropout=dropout,
        )

    @property
    def no_counterpart(self) -> str:
        """The factors of a kernel are in no image network."""
        return NO_FACTORS


def mid_channels(in_channels: int, out_channels: int) -> int:
    """Channels between the two halves that give them as many weights as one 3×3×3 convolution has."""
    return 27 * in_channels * out_channels // (9 * in_channels + 3 * out_channels)


def _factored_conv(shape: ConvShape, layout: Layout) -> nn.Sequential:
    """1×3×3 with the spatial stride → BN → ReLU → 3×1×1 with the temporal stride."""
    per_block = layout.variant == "torchvision"
    middle = mid_channels(shape.block_in_channels if per_block else shape.in_channels, shape.channels)
    return nn.Sequential(
        layout.conv(shape.in_channels, middle, (1, 3, 3), (1, shape.spatial_stride, shape.spatial_stride)),
        layout.norm(middle),
        nn.ReLU(inplace=True),
        layout.conv(middle, shape.channels, (3, 1, 1), (shape.temporal_stride, 1, 1)),
    )
