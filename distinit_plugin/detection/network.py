"""A network that says what each person of a clip does: a RoI head around any backbone.

Source: C. Gu et al., "AVA" (arXiv 1705.08421) §5; J. Stroud et al., "D3D" (arXiv 1812.08249) §5.5; C. Feichtenhofer et
al., "SlowFast" (arXiv 1812.03982) §5. Shapes: B batch, C channels, T frames, R boxes, K classes.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import cast

from torch import Tensor, nn

from distinit_plugin.detection.dilation import dilate_last_stage
from distinit_plugin.detection.matching import Sampling, no_boxes, sample
from distinit_plugin.detection.proposals import Proposer
from distinit_plugin.detection.roi_head import RoiHead
from distinit_plugin.errors import UserError
from distinit_plugin.models.network import VideoNetwork
from distinit_plugin.types import LayerInfo, ModelOutput, Split, ViewSpec

PROPOSAL_LOSS = "proposal_loss"
"""A tap of networks whose proposer trains: the proposer's loss, (B,)."""

OWN_PREFIXES = ("roi_head.", "rpn.")
"""Starts of the keys that a RoiNetwork adds to its backbone's."""


class RoiNetwork(VideoNetwork):
    """A backbone, what proposes boxes, and a head that classifies them.

    In training proposals are joined with the annotated boxes and sampled; without a proposer the boxes are those that
    are given. The keys of its checkpoints are the backbone's own, ``roi_head.…``, and ``rpn.…`` of a proposer that
    trains.
    """

    def __init__(
        self,
        backbone: VideoNetwork,
        layers: Sequence[str],
        *,
        num_classes: int,
        pool: str = "avg",
        resolution: int = 7,
        aligned: bool = True,
        stride: int = 0,
        dilated: bool = False,
        dropout: float = 0.0,
        build_proposer: Callable[[LayerInfo], Proposer] | None = None,
        sampling: Sampling | None = None,
        refines: bool = False,
    ) -> None:
        """Build the head around a backbone.

        Args:
            backbone: Without a classifier.
            layers: Those of the backbone on which boxes are pooled; their features are joined.
            num_classes: K.
            pool: ``avg`` or ``max`` over time.
            resolution: Cells of a box on each side.
            aligned: RoIAlign without its old shift by half a cell.
            stride: What the layers' stride must be, pixels; 0: whatever it is.
            dilated: The backbone's last stage keeps the resolution of the one before, with dilated kernels.
            dropout: Dropped fraction before the projection.
            build_proposer: Makes the proposer from the geometry of the first of the layers; ``None``: boxes are given.
            sampling: Which proposals a training step learns from; goes with a proposer.
            refines: Learn one class-agnostic offset per box.

        Raises:
            UserError: There is no such layer, or its stride is another one.
        """
        super().__init__(backbone.input)
        if backbone.num_classes:
            backbone.reset_classifier(0)
        self.backbone = backbone
        self._layers = dilate_last_stage(backbone) if dilated else backbone.layers
        backbone.check_taps(layers)
        self.roi_layers = tuple(layers)
        geometry = [self._layers[layer] for layer in layers]
        for layer, info in zip(layers, geometry, strict=True):
            if stride and info.spatial_stride != stride:
                raise UserError(
                    f"DETECTION.SPATIAL_SCALE_FACTOR is {stride}, but the layer {layer} has a stride of "
                    f"{info.spatial_stride} pixels. Set it to that or 0, take another ROI.LAYER, or, for a last stage "
                    "of stride 32, set ROI.DILATION True."
                )
        self.roi_head = RoiHead(
            [info.channels for info in geometry],
            [info.spatial_stride for info in geometry],
            num_classes=num_classes,
            pool=pool,
            resolution=resolution,
            aligned=aligned,
            dropout=dropout,
            refines=refines,
        )
        self.sampling = sampling
        self.rpn: nn.Module | None = None
        self._frozen: tuple[Proposer, ...] = ()  # a tuple: no submodule, so that nothing saves or trains it
        if build_proposer is not None:
            assert sampling is not None
            proposer = build_proposer(geometry[0])
            if proposer.trains:
                self.rpn = cast(nn.Module, proposer)
            else:
                self._frozen = (proposer,)

    # ------------------------------------------------------------------------------------------- the contract
    @property
    def layers(self) -> Mapping[str, LayerInfo]:
        """The backbone's."""
        return self._layers

    @property
    def feature_dim(self) -> int:
        """The backbone's."""
        return self.backbone.feature_dim

    @property
    def num_classes(self) -> int:
        """K."""
        return self.roi_head.projection.out_features

    @property
    def proposer(self) -> Proposer | None:
        """What proposes boxes; ``None``: they are given."""
        if self.rpn is not None:
            return cast(Proposer, self.rpn)
        return self._frozen[0] if self._frozen else None

    def view_specs(self, split: Split) -> Mapping[str, ViewSpec]:
        """The backbone's and the proposer's; validation and test see whole frames."""
        specs = dict(self.backbone.view_specs(split))
        if self.proposer is not None:
            specs |= self.proposer.view_specs(split)
        return specs if split == "train" else {name: replace(spec, crop="whole") for name, spec in specs.items()}

    def forward(
        self, views: Mapping[str, Tensor], *, boxes: Tensor | None = None, taps: Collection[str] = ()
    ) -> ModelOutput:
        """Run on normalised views (B,C,T,H,W).

        Args:
            views: Those of ``view_specs``.
            boxes: (R,5) the given ones; with a proposer the annotated ones, which only training needs.
            taps: Layers of the backbone, and ``PROPOSAL_LOSS`` of a proposer that trains.

        Returns:
            ``logits`` (R',K) of ``boxes`` (R',5): those that were given, or in training the sampled, else the proposed
            ones; ``offsets`` (R',4) where boxes are refined; ``features`` (B,D) of the backbone.
        """
        wanted = [tap for tap in taps if tap != PROPOSAL_LOSS]
        output: ModelOutput = self.backbone(views, taps={*wanted, *self.roi_layers})
        kept = {tap: output.taps[tap] for tap in wanted}
        maps = [output.taps[layer] for layer in self.roi_layers]
        if self.proposer is None:
            rois = no_boxes(maps[0]) if boxes is None else boxes
        else:
            found = self.proposer.propose(views, self._keyframe_of(maps[0]), boxes)
            rois = found.boxes
            if self.training and self.sampling is not None:
                rois = sample(rois, no_boxes(rois) if boxes is None else boxes, self.sampling, len(maps[0]))
            if PROPOSAL_LOSS in taps:
                assert found.loss is not None
                kept[PROPOSAL_LOSS] = found.loss
        logits, offsets = self.roi_head(maps, rois)
        return ModelOutput(logits, output.features, kept, boxes=rois, offsets=offsets)

    def reset_classifier(self, num_classes: int) -> None:
        """Put a fresh head; its boxes are refined as before.

        Raises:
            UserError: 0 classes.
        """
        if not num_classes:
            raise UserError("a network that classifies boxes needs classes: set MODEL.NUM_CLASSES, at least 1.")
        like = next(self.roi_head.parameters())
        self.roi_head.projection = nn.Linear(self.roi_head.feature_dim, num_classes).to(like)
        self.roi_head.requires_grad_(True)
        self.roi_head.reset()

    def bare_state_dict(self) -> dict[str, Tensor]:
        """The backbone's keys as they are, ``roi_head.…``, and ``rpn.…`` of a proposer that trains."""
        parts: dict[str, nn.Module] = {"roi_head.": self.roi_head}
        if self.rpn is not None:
            parts["rpn."] = self.rpn
        own = {start + key: value for start, part in parts.items() for key, value in part.state_dict().items()}
        return {**self.backbone.bare_state_dict(), **own}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RoiNetwork:
        """A frozen proposer moves along."""
        for proposer in self._frozen:
            cast(nn.Module, proposer)._apply(fn, recurse)
        super()._apply(fn, recurse)
        return self

    def _keyframe_of(self, feature_map: Tensor) -> Tensor:
        """(B,C,T',H,W) → (B,C,H,W): the slice over frame T // 2 of the clip."""
        return feature_map[:, :, feature_map.shape[2] // 2]
