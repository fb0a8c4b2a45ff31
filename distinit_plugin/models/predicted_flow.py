"""Flow as a learnable input: a 3D network predicts the flow that a temporal stream then sees, end to end.

D3D (arXiv 1812.08249) §4.1. The paper joins S3D-G up to 3A, a decoder, and the S3D-G of the temporal stream; how a flow
of 28×28×T/2 becomes an input of 224×224×T it does not say. Here: (u,v) = mag · (cos θ, sin θ); bilinear in space; each
slice holds for all of its frames (``flow.motion.enlarge_flow``); still in pixels of the input, cut off at ±bound and
scaled to [-1, 1] as views of flow are, so that a stream that was trained on those can go on. §4.1 names the decoder
Simple, §5.6 PWC, which is the default: Simple cannot read out any motion (table 1).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

from torch import Tensor

from distinit_plugin.errors import UserError
from distinit_plugin.flow.motion import enlarge_flow, flow_to_view, polar_to_flow
from distinit_plugin.models.flow_decoders import FlowDecoder
from distinit_plugin.models.inception import EndPoints
from distinit_plugin.models.network import InputSpec, VideoNetwork
from distinit_plugin.models.s3dg import S3DG
from distinit_plugin.registry import MODELS
from distinit_plugin.types import LayerInfo, ModelOutput

DECODED_LAYER = "3A"
"""Where the flow network ends."""

PREDICTED_FLOW = "predicted_flow"
"""The layer that is the decoded flow, (B,2,T/2,H/8,W/8), pixels."""

MEAN, STD = (0.5, 0.5), (0.5, 0.5)
"""Of what the stream sees: ±bound becomes ±1."""


@MODELS.register()
class PredictedFlow3D(VideoNetwork):
    """S3D-G up to 3A → decoder → flow → S3D-G; sees frames alone. 10.3 M parameters with 400 classes.

    Layers are those of both parts, ``flow_net.3A`` and ``stream.4F``, and ``predicted_flow``; features and logits are
    the stream's.
    """

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
        decoder: str = "pwc",
        decoder_norm: bool = False,
        dropout: float = 0.0,
    ) -> None:
        """Build.

        Args:
            num_classes: K; 0: no classifier.
            input: The frames; its ``flow_bound`` is that of the flow which the stream was trained on.
            width: As for :class:`S3DG`, as all that follow; of both parts.
            padding: Likewise.
            temporal_padding: Likewise.
            affine_norm: Likewise.
            fully_convolutional: Likewise, of the stream.
            stem_frames: Likewise.
            separable_stem: Likewise.
            temporal_norm: Likewise.
            temporal_from: Likewise.
            gating_from: Likewise.
            decoder: ``simple``, ``spatial`` or ``pwc``.
            decoder_norm: Batch normalisation in the decoder.
            dropout: Dropped fraction before the classifier.

        Raises:
            UserError: A switch outside its range, or ``input`` is of flow.
        """
        if input.modality != "rgb":
            raise UserError(
                f"NETWORK.MODALITY is '{input.modality}', but PredictedFlow3D predicts its flow from frames. Use rgb."
            )
        super().__init__(input)
        switches = {
            "width": width,
            "padding": padding,
            "temporal_padding": temporal_padding,
            "affine_norm": affine_norm,
            "stem_frames": stem_frames,
            "separable_stem": separable_stem,
            "temporal_norm": temporal_norm,
            "temporal_from": temporal_from,
            "gating_from": gating_from,
        }
        self.flow_net = S3DG(num_classes=0, input=input, last_layer=DECODED_LAYER, **switches)  # type: ignore[arg-type]
        self.decoder = FlowDecoder(decoder, self.flow_net.feature_dim, norm=decoder_norm)
        self.stream = S3DG(
            num_classes=num_classes,
            input=replace(input, modality="flow", mean=MEAN, std=STD),
            fully_convolutional=fully_convolutional,
            dropout=dropout,
            **switches,  # type: ignore[arg-type]
        )

    @property
    def layers(self) -> Mapping[str, LayerInfo]:
        """The end-points of both parts, and the flow between them."""
        first = {f"flow_net.{name}": info for name, info in self.flow_net.layers.items()}
        decoded = self.flow_net.layers[DECODED_LAYER]._replace(channels=2)
        stream = {f"stream.{name}": info for name, info in self.stream.layers.items()}
        return EndPoints({**first, PREDICTED_FLOW: decoded, **stream})

    @property
    def feature_dim(self) -> int:
        """The stream's."""
        return self.stream.feature_dim

    @property
    def num_classes(self) -> int:
        """The stream's."""
        return self.stream.num_classes

    def reset_classifier(self, num_classes: int) -> None:
        """Put a fresh classifier on the stream; 0 removes it."""
        self.stream.reset_classifier(num_classes)

    def forward(
        self, views: Mapping[str, Tensor], *, boxes: Tensor | None = None, taps: Collection[str] = ()
    ) -> ModelOutput:
        """Run on ``rgb`` (B,3,T,H,W), normalised."""
        self.check_taps(taps)
        own = {
            part: [tap.partition(".")[2] for tap in taps if tap.startswith(f"{part}.")]
            for part in ("flow_net", "stream")
        }
        feature_map, first = self.flow_net.run_trunk(views["rgb"], own["flow_net"])
        flow = polar_to_flow(self.decoder(feature_map).float())
        frames, height, width = views["rgb"].shape[2:]
        seen = flow_to_view(enlarge_flow(flow, (frames, height, width)), MEAN, STD, self.input.flow_bound)
        output: ModelOutput = self.stream({"flow": seen}, taps=own["stream"])
        kept = {f"flow_net.{name}": x for name, x in first.items()}
        kept |= {f"stream.{name}": x for name, x in output.taps.items()}
        if PREDICTED_FLOW in taps:
            kept[PREDICTED_FLOW] = flow
        return ModelOutput(output.logits, output.features, kept)
