"""I3D: Inception-v1 with every kernel inflated to three dimensions.

Source: J. Carreira and A. Zisserman, "Quo Vadis, Action Recognition?" (arXiv 1705.07750) §2.4 and figure 3;
https://github.com/google-deepmind/kinetics-i3d ``i3d.py``, whose end-points have the same names.
"""

from __future__ import annotations

import math
from typing import cast

from torch import Tensor

from distinit_plugin.models.conv3d import TemporalPadding
from distinit_plugin.models.inception import Padding, padding_gaps
from distinit_plugin.models.inception3d import STARTS, InceptionNetwork, Layout, check_common
from distinit_plugin.models.network import InputSpec
from distinit_plugin.registry import MODELS


@MODELS.register()
class I3D(InceptionNetwork):
    """Inflated Inception-v1; 12.7 M parameters with 400 classes."""

    def __init__(
        self,
        *,
        num_classes: int,
        input: InputSpec,
        width: int = 64,
        padding: str = "same",
        temporal_padding: str = "zeros",
        affine_norm: bool = False,
        fully_convolutional: bool = False,
        dropout: float = 0.0,
    ) -> None:
        """Build.

        Args:
            num_classes: K; 0: no classifier.
            input: The clip that the network is fed; ``flow`` makes the stem take 2 channels.
            width: Channels of the first convolution; 64 in the paper. All others scale with it.
            padding: ``same``: TensorFlow's. ``symmetric``: as torchvision's GoogLeNet pads, so that a network inflated
                from it sees a still video as it does.
            temporal_padding: ``zeros`` or ``replicate``.
            affine_norm: Normalisation has a factor too; a network inflated from images needs it.
            fully_convolutional: Logits of every 7×7 window of the last map instead of its average in space.
            dropout: Dropped fraction before the classifier.

        Raises:
            UserError: A switch outside its range.
        """
        check_common(padding, temporal_padding, width)
        super().__init__(
            num_classes=num_classes,
            input=input,
            layout=Layout(
                cast(Padding, padding),
                "same" if padding == "same" else "ceil",
                cast(TemporalPadding, temporal_padding),
                affine_norm,
            ),
            width=width,
            dropout=dropout,
            stem_frames=7,
            separable_stem=False,
            separable=False,
            temporal=STARTS,
            gated=(),
            fully_convolutional=fully_convolutional,
        )
        self._padding = padding

    @property
    def image_gaps(self) -> tuple[str, ...]:
        """TensorFlow's padding."""
        return padding_gaps(self._padding, self.input)

    @staticmethod
    def own_name(end_point: str) -> str:
        """``Conv3d_…`` and ``MaxPool3d_…``."""
        return end_point.replace("Conv2d", "Conv3d").replace("MaxPool", "MaxPool3d")

    def kernel_deviation(self, kernel: Tensor) -> float:
        """1 / √(fan-in), as the published code's library does by default."""
        return 1 / math.sqrt(math.prod(kernel.shape[1:]))
