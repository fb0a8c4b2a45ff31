"""Decoders of optical flow from one feature map: how much of the motion do features know?

D3D (arXiv 1812.08249) §3.1: no kernel reaches over time and nothing compares frames, so that a decoder can only read
out the motion that is in the features already. The paper gives kernels and channels; here, as in PWC-Net (arXiv
1709.02371), a leaky ReLU of slope 0.1 stands between convolutions and none behind the last, and there is no
normalisation unless it is asked for.
"""

from __future__ import annotations

from torch import Tensor, nn

from distinit_plugin.errors import UserError
from distinit_plugin.models.conv3d import Conv3d
from distinit_plugin.models.network import check_choice

POLAR = 3
"""Outputs: (mag, sin θ, cos θ), see ``distinit_plugin.flow.motion``."""

SLOPE = 0.1
"""Of the leaky ReLU."""

PWC_CHANNELS = (128, 128, 96, 64, 32)
"""Outputs of PWC's convolutions before the last one."""

FLOW_DECODERS = ("simple", "spatial", "pwc")


class FlowDecoder(nn.Sequential):
    """Feature map (B,C,T,H,W) → (mag, sin θ, cos θ) (B,3,T,H,W), in pixels of the network's input.

    ``simple``: one convolution 1×1×1. ``spatial``: two 1×3×3 with C outputs, then 1×1×1. ``pwc``: six 1×3×3 with 128,
    128, 96, 64, 32 and 3 outputs. With C = 192 (3A of S3D-G): 579, 664,515 and 554,275 parameters.
    """

    def __init__(self, kind: str, channels: int, *, norm: bool = False) -> None:
        """Build.

        Args:
            kind: One of :data:`FLOW_DECODERS`.
            channels: C.
            norm: Batch normalisation after each convolution but the last, in place of its bias.

        Raises:
            UserError: No such decoder, or normalisation in one that has a single convolution.
        """
        check_choice("HEAD", kind, FLOW_DECODERS)
        if norm and kind == "simple":
            raise UserError("the decoder simple is one convolution, and nothing is normalised behind the last one.")
        widths = {"simple": (), "spatial": (channels, channels), "pwc": PWC_CHANNELS}[kind]
        layers: list[nn.Module] = []
        for width in widths:
            layers.append(Conv3d(channels, width, (1, 3, 3), padding=(0, 1, 1), bias=not norm))
            if norm:
                layers.append(nn.BatchNorm3d(width))
            layers.append(nn.LeakyReLU(SLOPE, inplace=True))
            channels = width
        last = 3 if kind == "pwc" else 1
        layers.append(Conv3d(channels, POLAR, (1, last, last), padding=(0, last // 2, last // 2)))
        super().__init__(*layers)
        self.initialize()

    def initialize(self) -> None:
        """Normal kernels that keep the variance behind the leaky ReLU (arXiv 1502.01852); biases 0."""
        for module in self:
            if isinstance(module, Conv3d):
                nn.init.kaiming_normal_(module.weight, a=SLOPE, nonlinearity="leaky_relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, input: Tensor) -> Tensor:
        """Decode."""
        decoded: Tensor = super().forward(input)
        return decoded
