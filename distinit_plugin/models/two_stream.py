"""Two-Stream and 3D-Fused Two-Stream of Quo Vadis: Inception-v1 on frames beside Inception-v1 on stacked optical flow.

Either stream can stand alone (``streams``), as in the paper's table 2.

Sources: J. Carreira and A. Zisserman (arXiv 1705.07750) §2.3; K. Simonyan and A. Zisserman (arXiv 1406.2199) and
C. Feichtenhofer et al. (arXiv 1604.06573) for the ideas.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import cast

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from distinit_plugin.errors import UserError
from distinit_plugin.models.conv3d import Conv3d
from distinit_plugin.models.inception import EndPoints, padding_gaps, scaled
from distinit_plugin.models.inception2d import BATCH_NORM_EPS, InceptionTrunk2D
from distinit_plugin.models.network import ClassifiedNetwork, InputSpec, VideoNetwork, global_average
from distinit_plugin.registry import MODELS
from distinit_plugin.types import LayerInfo, ModelOutput, Split, ViewSpec

STREAMS: dict[str, tuple[str, ...]] = {"both": ("rgb", "flow"), "rgb": ("rgb",), "flow": ("flow",)}
"""Value of the switch → views and trunks."""

STACK = 10
"""Consecutive frames of flow that are the channels of one input."""

FLOW_MEAN, FLOW_STD = 0.5, 0.5
"""Flow codes of [0, 255] come to [-1, 1], as in https://github.com/google-deepmind/kinetics-i3d."""

FUSED_CHANNELS = 512  # at width 64
NEW_LAYER_DEVIATION = 0.01  # "Gaussian" in the paper; it does not say which


class TwoStreamNetwork(VideoNetwork):
    """Trunks and their views: each frame of ``rgb`` (B,3,T,H,W) has its stack in ``flow`` (B,20,T,H,W).

    A stack is ten consecutive frames of flow from its RGB frame on; see ``ViewSpec.stack`` for its channels. Layers are
    the end-points of both trunks, ``rgb.Mixed_4f`` and ``flow.Mixed_4f`` (or ``flow.4F``).
    """

    def __init__(self, input: InputSpec, *, streams: str, width: int, padding: str, affine_norm: bool) -> None:
        """Build the trunks.

        Raises:
            UserError: A switch outside its range, or ``input`` is of flow.
        """
        if input.modality != "rgb":
            raise UserError(
                f"NETWORK.MODALITY is '{input.modality}', but {type(self).__name__} sees frames and flow. Leave it at "
                "'rgb': DATA describes the frames, the flow follows from them."
            )
        if streams not in STREAMS:
            raise UserError(f"NETWORK.STREAMS is '{streams}'. Allowed: {', '.join(STREAMS)}.")
        super().__init__(input)
        self.streams = STREAMS[streams]
        for stream in self.streams:
            channels = 3 if stream == "rgb" else 2 * STACK
            self.add_module(stream, InceptionTrunk2D(channels, padding=padding, affine_norm=affine_norm, width=width))

    @property
    def trunks(self) -> dict[str, InceptionTrunk2D]:
        """Stream → its trunk."""
        return {stream: cast(InceptionTrunk2D, self.get_submodule(stream)) for stream in self.streams}

    @property
    def map_channels(self) -> int:
        """Channels of all maps before the last average pool."""
        return sum(trunk.out_channels for trunk in self.trunks.values())

    @property
    def image_trunks(self) -> Mapping[str, str]:
        """All streams; the first kernel of ``flow`` is the mean over the colours."""
        return {f"{stream}.": "googlenet" for stream in self.streams}

    @property
    def image_gaps(self) -> tuple[str, ...]:
        """TensorFlow's padding."""
        return padding_gaps(self.trunks[self.streams[0]].padding, self.input)

    @property
    def layers(self) -> Mapping[str, LayerInfo]:
        """The end-points of all trunks."""
        return EndPoints(
            {f"{stream}.{name}": info for stream, trunk in self.trunks.items() for name, info in trunk.layers.items()}
        )

    def view_specs(self, split: Split) -> Mapping[str, ViewSpec]:
        """``rgb``: the clip; ``flow``: a stack for each of its frames."""
        rgb = self.input.view_specs(split)["rgb"]
        channels = 2 * STACK
        flow = replace(rgb, modality="flow", stack=STACK, mean=(FLOW_MEAN,) * channels, std=(FLOW_STD,) * channels)
        views = {"rgb": rgb, "flow": flow}
        return {stream: views[stream] for stream in self.streams}

    def run_streams(self, views: Mapping[str, Tensor], taps: Collection[str]) -> tuple[list[Tensor], dict[str, Tensor]]:
        """The maps before the last average pool, (B,1024,T,H/32,W/32) of each stream, and the tapped ones."""
        self.check_taps(taps)
        maps: list[Tensor] = []
        kept: dict[str, Tensor] = {}
        for stream, trunk in self.trunks.items():
            own = [tap.partition(".")[2] for tap in taps if tap.startswith(f"{stream}.")]
            found, tapped = trunk.run_frames(views[stream], own)
            maps.append(found)
            kept |= {f"{stream}.{name}": x for name, x in tapped.items()}
        return maps, kept


class StreamClassifier(nn.Module):
    """A linear classifier for each stream, as one layer, so that another number of classes concerns one layer alone.

    weight (K,S,D) and bias (K,S) for S streams.
    """

    def __init__(self, num_streams: int, feature_dim: int, num_classes: int, like: Tensor) -> None:
        """N(0, 0.01²) with zero bias, on the device and of the type of ``like``."""
        super().__init__()
        self.weight = nn.Parameter(like.new_empty(num_classes, num_streams, feature_dim).normal_(0.0, 0.01))
        self.bias = nn.Parameter(like.new_zeros(num_classes, num_streams))

    def forward(self, features: Tensor, stream: int) -> Tensor:
        """(…,D) of one stream → its logits (…,K)."""
        return functional.linear(features, self.weight[:, stream], self.bias[:, stream])


@MODELS.register()
class TwoStream(TwoStreamNetwork):
    """Logits of one RGB frame and of ten frames of flow, averaged; trained through the average. 12.1 M parameters.

    With more frames (25 in the paper's test) each stream's logits are averaged over its frames first; the streams may
    differ in their number. Features are those of all streams joined.
    """

    fc: StreamClassifier | None

    def __init__(
        self,
        *,
        num_classes: int,
        input: InputSpec,
        streams: str = "both",
        width: int = 64,
        padding: str = "same",
        affine_norm: bool = False,
        dropout: float = 0.0,
    ) -> None:
        """Build.

        Args:
            num_classes: K; 0: no classifier.
            input: The RGB frames; 1 in the paper's training.
            streams: ``both``, or ``rgb`` or ``flow`` alone.
            width: Channels of the first convolutions; 64 in the papers. All layers scale with it.
            padding: ``same`` or ``symmetric``, see :class:`InceptionTrunk2D`.
            affine_norm: Whether the trunks' normalisation has a factor.
            dropout: Dropped fraction before the classifiers.

        Raises:
            UserError: A switch outside its range.
        """
        super().__init__(input, streams=streams, width=width, padding=padding, affine_norm=affine_norm)
        self.dropout_rate = dropout
        self.reset_classifier(num_classes)

    @property
    def feature_dim(self) -> int:
        """Channels of all trunks."""
        return self.map_channels

    @property
    def num_classes(self) -> int:
        """Outputs of ``fc``."""
        return 0 if self.fc is None else len(self.fc.bias)

    def reset_classifier(self, num_classes: int) -> None:
        """Put a fresh ``fc``; 0 removes it."""
        like = next(self.parameters())
        count = len(self.streams)
        self.fc = StreamClassifier(count, self.map_channels // count, num_classes, like) if num_classes else None

    def forward(
        self, views: Mapping[str, Tensor], *, boxes: Tensor | None = None, taps: Collection[str] = ()
    ) -> ModelOutput:
        """Run on ``rgb`` (B,3,T,H,W) and ``flow`` (B,20,T',H,W), normalised."""
        maps, kept = self.run_streams(views, taps)
        per_frame = [feature_map.mean(dim=(3, 4)).transpose(1, 2) for feature_map in maps]
        features = torch.cat([x.mean(dim=1) for x in per_frame], dim=1)
        if self.fc is None:
            return ModelOutput(None, features, kept)
        streams = [
            self.fc(functional.dropout(x, self.dropout_rate, self.training), number).mean(dim=1)
            for number, x in enumerate(per_frame)
        ]
        return ModelOutput(torch.stack(streams).mean(dim=0), features, kept)


@MODELS.register()
class Fused3D(TwoStreamNetwork, ClassifiedNetwork):
    """The streams' maps of five frames, ten apart, fused by a 3D convolution; end to end. 39.8 M parameters.

    The maps before the last average pool (5×7×7 at 224²) are joined along channels, as 39 M parameters need; 3×3×3
    convolution with BN and ReLU; 3×3×3 max-pool, whose stride the paper does not give: 2 here; average; ``fc``.
    """

    def __init__(
        self,
        *,
        num_classes: int,
        input: InputSpec,
        streams: str = "both",
        width: int = 64,
        padding: str = "same",
        affine_norm: bool = False,
        dropout: float = 0.0,
    ) -> None:
        """Build; arguments and errors as for :class:`TwoStream`, in the paper with 5 frames, 10 apart."""
        super().__init__(input, streams=streams, width=width, padding=padding, affine_norm=affine_norm)
        self._feature_dim = channels = scaled(FUSED_CHANNELS, width)
        conv = Conv3d(self.map_channels, channels, 3, padding=1, bias=False)
        nn.init.normal_(conv.weight, 0.0, NEW_LAYER_DEVIATION)
        norm = nn.BatchNorm3d(channels, eps=BATCH_NORM_EPS)
        if not affine_norm:
            norm.register_parameter("weight", None)
        self.fusion = nn.Sequential(conv, norm, nn.ReLU(inplace=True))
        self.dropout_rate = dropout
        self.reset_classifier(num_classes)

    @property
    def layers(self) -> Mapping[str, LayerInfo]:
        """The end-points of all trunks and ``fusion``."""
        return EndPoints({**super().layers, "fusion": LayerInfo(self.feature_dim, 1, 32)})

    @property
    def feature_dim(self) -> int:
        """Channels of the fusion."""
        return self._feature_dim

    def forward(
        self, views: Mapping[str, Tensor], *, boxes: Tensor | None = None, taps: Collection[str] = ()
    ) -> ModelOutput:
        """Run on ``rgb`` (B,3,T,H,W) and ``flow`` (B,20,T,H,W), normalised, with any T.

        Raises:
            UserError: The streams have different numbers of frames.
        """
        frames = {name: views[name].shape[2] for name in self.streams}
        if len(set(frames.values())) > 1:
            raise UserError(
                f"Fused3D joins its streams frame by frame, but rgb has {frames['rgb']} frames and flow "
                f"{frames['flow']} stacks. Give as many of both."
            )
        maps, kept = self.run_streams(views, taps)
        fused = self.fusion(torch.cat(maps, dim=1))
        if "fusion" in taps:
            kept["fusion"] = fused
        features = global_average(functional.max_pool3d(fused, 3, 2, 1))
        return ModelOutput(self.classify(features), features, kept)
