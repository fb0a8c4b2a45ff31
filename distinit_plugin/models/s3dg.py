"""S3D-G: Inception-v1 with separable 3D convolutions and feature gates.

Sources: S. Xie et al., "Rethinking Spatiotemporal Feature Learning" (arXiv 1712.04851), as TF-slim's ``nets/s3dg.py``
has it; that is the network of D3D (arXiv 1812.08249), teacher and student. torchvision's ``s3d`` is it by switches
(``configs/_base_/s3d_torchvision.yaml``).
"""

from __future__ import annotations

from typing import cast

from distinit_plugin.models.conv3d import TemporalPadding
from distinit_plugin.models.inception import Padding, padding_gaps
from distinit_plugin.models.inception3d import (
    NOWHERE,
    InceptionNetwork,
    Layout,
    check_common,
    end_point_named,
    starts_from,
)
from distinit_plugin.models.network import InputSpec, check_choice
from distinit_plugin.registry import MODELS

STEM_FRAMES = (1, 3, 5, 7)


@MODELS.register()
class S3DG(InceptionNetwork):
    """Separable Inception-v1 with gates; 9.5 M parameters with 400 classes."""

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
        stem_frames: int = 3,
        separable_stem: bool = False,
        temporal_norm: bool = False,
        temporal_from: str = "2C",
        gating_from: str = "2C",
        last_layer: str = "5C",
        dropout: float = 0.0,
    ) -> None:
        """Build.

        Args:
            num_classes: K; 0: no classifier.
            input: The clip that the network is fed; ``flow`` makes the stem take 2 channels.
            width: Channels of the first convolution; 64 in the paper. All others scale with it.
            padding: ``same``: TensorFlow's. ``symmetric``: as torchvision's S3D pads.
            temporal_padding: ``zeros`` or ``replicate``.
            affine_norm: Normalisation has a factor too; a network initialised from images needs it.
            fully_convolutional: Logits of every 7×7 window of the last map instead of its average in space.
            stem_frames: Temporal size of the first kernel; 7 in the paper, TF-slim finds 3 better.
            separable_stem: Split the first convolution as well.
            temporal_norm: Temporal convolutions have BN in place of a bias.
            temporal_from: First end-point with temporal kernels (``2C``, ``Mixed_4b`` …); below it, kernels are
                1×3×3. ``none``: nowhere behind the stem.
            gating_from: First end-point with gates; ``none``: S3D.
            last_layer: End-point after which the network ends (``3A``, ``Mixed_4f`` …), for networks of which only the
                first layers are used; features and logits are then those of this layer.
            dropout: Dropped fraction before the classifier.

        Raises:
            UserError: A switch outside its range.
        """
        check_common(padding, temporal_padding, width)
        check_choice("NETWORK.STEM_FRAMES", stem_frames, STEM_FRAMES)
        super().__init__(
            num_classes=num_classes,
            input=input,
            layout=Layout(
                cast(Padding, padding),
                cast(Padding, padding),
                cast(TemporalPadding, temporal_padding),
                affine_norm,
                temporal_norm,
            ),
            width=width,
            dropout=dropout,
            stem_frames=stem_frames,
            separable_stem=separable_stem,
            separable=True,
            temporal=starts_from("NETWORK.TEMPORAL_FROM", temporal_from),
            gated=starts_from("NETWORK.GATING_FROM", gating_from),
            fully_convolutional=fully_convolutional,
            last=end_point_named("NETWORK.LAST_LAYER", last_layer),
        )
        self._padding, self._gated = padding, gating_from != NOWHERE

    @property
    def image_gaps(self) -> tuple[str, ...]:
        """Padding in space, and gates."""
        gaps = padding_gaps(self._padding, self.input, symmetric_pools=False)
        halved = "gates, which no image network has, halve what passes them (NETWORK.GATING_FROM none leaves them out)"
        return (*gaps, halved) if self._gated else gaps
