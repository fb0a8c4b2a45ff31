"""Res3D: a residual C3D, one 3×3×3 convolution for each 3×3 of the 2D ResNet.

Sources: DistInit (arXiv 1901.09244) §3.1; VMZ ``c2/lib/models/r3d_model.py``. Keys are torchvision's ``r3d_18``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

from torch import nn

from distinit_plugin.models.conv3d import Conv3d, TemporalPadding
from distinit_plugin.models.network import InputSpec
from distinit_plugin.models.residual import ConvShape, Layout, ResidualNetwork, Variant, check_switches
from distinit_plugin.registry import MODELS


@MODELS.register()
class Res3D(ResidualNetwork):
    """3D ResNet with full 3×3×3 kernels; 33.4 M parameters at depth 18."""

    def __init__(
        self,
        *,
        num_classes: int,
        input: InputSpec,
        depth: int = 18,
        width: int = 64,
        variant: str = "vmz",
        stem_pool: bool = False,
        temporal_padding: str = "zeros",
        dropout: float = 0.0,
    ) -> None:
        """Build.

        Args:
            num_classes: K; 0: no classifier.
            input: The clip that the network is fed.
            depth: 10, 16, 18 or 34 (basic blocks); 26, 50, 101 or 152 (bottlenecks).
            width: Channels of the first stage; 64 in the papers. All stages scale with it.
            variant: ``vmz`` (BN eps 1e-3, short clips keep their frames) or ``torchvision`` (BN eps 1e-5).
            stem_pool: Add the 2D ResNet's max pool, 1×3×3, to the stem. The paper's network has none; inflation from
                images is exact only with it.
            temporal_padding: ``zeros`` or ``replicate``.
            dropout: Dropped fraction before the classifier.

        Raises:
            UserError: A switch outside its range.
        """
        check_switches(depth, width, variant, temporal_padding)
        layout = Layout(cast(Variant, variant), cast(TemporalPadding, temporal_padding))
        stem = nn.Sequential(
            layout.conv(input.channels, width, (3, 7, 7), (1, 2, 2)), layout.norm(width), nn.ReLU(inplace=True)
        )
        super().__init__(
            stem=stem,
            stem_pool=nn.MaxPool3d((1, 3, 3), (1, 2, 2), (0, 1, 1)) if stem_pool else nn.Identity(),
            build_conv=_full_conv,
            layout=layout,
            num_classes=num_classes,
            input=input,
            depth=depth,
            width=width,
            dropout=dropout,
        )

    @property
    def image_trunks(self) -> Mapping[str, str]:
        """The whole of a 2D ResNet."""
        return {"": "resnet"}


def _full_conv(shape: ConvShape, layout: Layout) -> Conv3d:
    return layout.conv(shape.in_channels, shape.channels, (3, 3, 3), shape.stride)
