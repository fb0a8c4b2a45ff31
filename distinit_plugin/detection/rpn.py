"""Region proposal networks of persons: one with a ResNet of its own, and one on the map of a backbone.

Source: S. Ren et al., "Faster R-CNN" (arXiv 1506.01497) §3.1; T.-Y. Lin et al., "Feature Pyramid Networks" (arXiv
1612.03144) §4.1; J. Stroud et al., "D3D" (arXiv 1812.08249) §5.5: a pretrained ResNet RPN beside the video network.
Shapes: B batch, A anchors, R boxes of all pictures together.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as functional
import torchvision.models
from torch import Tensor, nn
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.rpn import RPNHead
from torchvision.ops import FrozenBatchNorm2d
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from distinit_plugin.detection.anchors import (
    RATIOS,
    Choice,
    Predictions,
    best_proposals,
    flatten_maps,
    level_anchors,
    rpn_loss,
)
from distinit_plugin.detection.matching import no_boxes
from distinit_plugin.detection.network import PROPOSAL_LOSS
from distinit_plugin.detection.proposals import KEYFRAME, Proposals, student_view
from distinit_plugin.errors import UserError, WeightsError
from distinit_plugin.models.network import InputSpec, VideoNetwork, check_choice
from distinit_plugin.types import LayerInfo, ModelOutput, Split, ViewSpec
from distinit_plugin.weights import LoadReport, read_checkpoint
from distinit_plugin.weights.load import load_tensors
from distinit_plugin.weights.read import CheckpointFile
from distinit_plugin.weights.sources import source_weights, torchvision_tags

ARCHS = ("resnet18", "resnet50", "resnet18_fpn", "resnet50_fpn", "resnet50_fpn_v2")
"""Trunks: the ResNet's map of stride 16, or a feature pyramid on all of its stages."""

DETECTORS = {"resnet50_fpn": "fasterrcnn_resnet50_fpn", "resnet50_fpn_v2": "fasterrcnn_resnet50_fpn_v2"}
"""Trunk → the detector of torchvision whose published weights hold such an RPN."""

ANCHOR_SIZES = (32, 64, 128, 256, 512)
"""Roots of the areas of anchors, pixels: one for each level of a pyramid, all of them on a single map."""

_ALIGNMENT = 32
"""Pictures are padded to multiples of this, pixels, as torchvision's detectors do: anchors depend on it."""


class PersonRpn(VideoNetwork):
    """A ResNet that finds persons on single frames. Keys are those of torchvision's Faster R-CNN without RoI heads.

    It is trained by itself, on keyframes with boxes; then it stands frozen beside a network that classifies boxes.
    """

    def __init__(
        self,
        arch: str,
        *,
        input: InputSpec,
        anchor_sizes: Sequence[float] = ANCHOR_SIZES,
        frozen_norm: bool = False,
        choice: Choice = Choice(),  # noqa: B008 (frozen)
    ) -> None:
        """Build with random weights.

        Args:
            arch: One of ``ARCHS``.
            input: Sizes of crops, frame rate, mean and deviation.
            anchor_sizes: Five, pixels.
            frozen_norm: Batch normalisation is a fixed factor and summand, for weights that are trained already.
            choice: Which proposals are given.

        Raises:
            UserError: No such ``arch``, or another number of sizes.
        """
        super().__init__(input)
        check_choice("RPN.ARCH", arch, ARCHS)
        if input.modality != "rgb":
            raise UserError(f"NETWORK.MODALITY is {input.modality}, but PersonRpn sees rgb. Use rgb.")
        if len(anchor_sizes) != len(ANCHOR_SIZES) or not all(size > 0 for size in anchor_sizes):
            raise UserError(f"RPN.ANCHOR_SIZES is {list(anchor_sizes)}. Allowed: {len(ANCHOR_SIZES)} numbers above 0.")
        self.arch = arch
        self.choice = choice
        self._pyramid = "_fpn" in arch
        self._sizes = [(size,) for size in anchor_sizes] if self._pyramid else [tuple(anchor_sizes)]
        self.backbone = _build_trunk(arch, frozen_norm)
        depth = 2 if arch.endswith("_v2") else 1
        self.rpn = nn.ModuleDict({"head": RPNHead(_channels(arch), len(RATIOS) * len(self._sizes[0]), depth)})

    @property
    def layers(self) -> Mapping[str, LayerInfo]:
        """None that is a map of a clip."""
        return {}

    @property
    def feature_dim(self) -> int:
        """Channels of the maps on which it decides."""
        return _channels(self.arch)

    @property
    def num_classes(self) -> int:
        """None: it tells persons from everything else."""
        return 0

    def reset_classifier(self, num_classes: int) -> None:
        """There is none.

        Raises:
            UserError: ``num_classes`` is not 0.
        """
        if num_classes:
            raise UserError("PersonRpn proposes boxes and has no classifier. Set ACTION.LOSS_WEIGHT 0.")

    def view_specs(self, split: Split) -> Mapping[str, ViewSpec]:
        """The keyframe: a crop in training, else all of it."""
        spec = self.input.view_specs(split)["rgb"]
        frame = replace(spec, num_frames=1, sampling_rate=1, pick="keyframe")
        return {KEYFRAME: frame if split == "train" else replace(frame, crop="whole")}

    def forward(
        self, views: Mapping[str, Tensor], *, boxes: Tensor | None = None, taps: Collection[str] = ()
    ) -> ModelOutput:
        """Run on ``views["keyframe"]``, normalised (B,3,1,H,W).

        Args:
            views: The keyframes.
            boxes: (R,5) the annotated ones, for the loss; ``None``: there are none.
            taps: ``PROPOSAL_LOSS``: the loss of each keyframe, (B,).

        Returns:
            In eval mode ``boxes``: the proposals (R',5).
        """
        frames = views[KEYFRAME][:, :, 0]
        predictions = self.predict(frames)
        kept = {}
        if PROPOSAL_LOSS in taps:
            kept[PROPOSAL_LOSS] = rpn_loss(predictions, no_boxes(frames) if boxes is None else boxes)
        found = None if self.training else self._propose(predictions, frames).boxes
        return ModelOutput(None, None, kept, boxes=found)

    def find(self, frames: Tensor) -> Proposals:
        """Boxes of normalised frames (B,3,H,W), in pixels of these."""
        return self._propose(self.predict(frames), frames)

    def predict(self, frames: Tensor) -> Predictions:
        """What it says of every anchor on normalised frames (B,3,H,W)."""
        height, width = frames.shape[-2:]
        padded = functional.pad(frames, (0, -width % _ALIGNMENT, 0, -height % _ALIGNMENT))
        maps: list[Tensor] = list(self.backbone(padded).values())
        size = padded.shape[-2:]
        strides = [(size[0] // feature_map.shape[-2], size[1] // feature_map.shape[-1]) for feature_map in maps]
        return _predict(self.rpn["head"], maps, self._sizes, strides)

    def _propose(self, predictions: Predictions, frames: Tensor) -> Proposals:
        return best_proposals(predictions, frames.shape[-2], frames.shape[-1], self.choice)


class MapRpn(nn.Module):
    """A small RPN on a video network's own map, at the keyframe; trained with the network (a ``Proposer``)."""

    trains = True

    def __init__(
        self,
        layer: LayerInfo,
        *,
        anchor_sizes: Sequence[float] = ANCHOR_SIZES,
        choice: Choice = Choice(),  # noqa: B008 (frozen)
    ) -> None:
        """Build with random weights.

        Args:
            layer: Geometry of the map.
            anchor_sizes: All of them stand on each cell, pixels.
            choice: Which proposals are given.
        """
        super().__init__()
        self._stride = (layer.spatial_stride,) * 2
        self._sizes = [tuple(anchor_sizes)]
        self.choice = choice
        self.head = RPNHead(layer.channels, len(RATIOS) * len(anchor_sizes))

    def view_specs(self, split: Split) -> Mapping[str, ViewSpec]:
        """None besides the student's own."""
        return {}

    def propose(self, views: Mapping[str, Tensor], feature_map: Tensor, boxes: Tensor | None) -> Proposals:
        """See ``Proposer``."""
        predictions = _predict(self.head, [feature_map], self._sizes, [self._stride])
        height, width = student_view(views).shape[-2:]
        found = best_proposals(predictions, height, width, self.choice)
        return found._replace(loss=rpn_loss(predictions, no_boxes(feature_map) if boxes is None else boxes))


def _predict(
    head: nn.Module, maps: Sequence[Tensor], sizes: Sequence[Sequence[float]], strides: Sequence[tuple[int, int]]
) -> Predictions:
    """Run the head on the maps of all levels, each with its sizes of anchors."""
    logits, offsets = head(list(maps))
    flat = [flatten_maps(*pair) for pair in zip(logits, offsets, strict=True)]
    anchors = [
        level_anchors(own, (feature_map.shape[-2], feature_map.shape[-1]), stride, feature_map.device)
        for own, feature_map, stride in zip(sizes, maps, strides, strict=True)
    ]
    levels = [torch.full((len(own),), number, device=own.device) for number, own in enumerate(anchors)]
    return Predictions(
        torch.cat([pair[0] for pair in flat], dim=1),
        torch.cat([pair[1] for pair in flat], dim=1),
        torch.cat(anchors),
        torch.cat(levels),
    )


# ------------------------------------------------------------------------------------------------------------ trunks
def resnet_of(arch: str) -> str:
    """Torchvision's name of the ResNet in a trunk."""
    return arch.partition("_")[0]


def _channels(arch: str) -> int:
    if "_fpn" in arch:
        return 256
    return 256 if resnet_of(arch) == "resnet18" else 1024


def _build_trunk(arch: str, frozen_norm: bool) -> nn.Module:
    """(B,3,H,W) → the maps of all levels, by their names."""
    norm: type[nn.Module] | partial[FrozenBatchNorm2d] = nn.BatchNorm2d
    if frozen_norm:
        # The published resnet50_fpn was trained without the small summand to the variance.
        norm = partial(FrozenBatchNorm2d, eps=0.0) if arch == "resnet50_fpn" else FrozenBatchNorm2d
    resnet = torchvision.models.get_model(resnet_of(arch), weights=None, norm_layer=norm)
    if "_fpn" not in arch:
        return _SingleMap(resnet)
    stages = {f"layer{number}": str(number - 1) for number in range(1, 5)}
    channels = [resnet.inplanes // 8 * 2**number for number in range(4)]
    norms = nn.BatchNorm2d if arch.endswith("_v2") else None
    return BackboneWithFPN(resnet, stages, channels, 256, extra_blocks=LastLevelMaxPool(), norm_layer=norms)


class _SingleMap(nn.Module):
    """A ResNet up to its map of stride 16, under the keys that it has in a feature pyramid."""

    def __init__(self, resnet: nn.Module) -> None:
        super().__init__()
        self.body = IntermediateLayerGetter(resnet, {"layer3": "0"})

    def forward(self, frames: Tensor) -> Mapping[str, Tensor]:
        """(B,3,H,W) → one map."""
        maps: Mapping[str, Tensor] = self.body(frames)
        return maps


# ----------------------------------------------------------------------------------------------------------- weights
_OLD_KEYS = (
    (re.compile(r"^rpn\.head\.conv\.(weight|bias)$"), r"rpn.head.conv.0.0.\1"),
    (re.compile(r"^(backbone\.fpn\.(?:inner|layer)_blocks\.\d+)\.(weight|bias)$"), r"\1.0.\2"),
)
"""Names in the files that torchvision published before its pyramids could have normalisation."""


def load_rpn(rpn: PersonRpn, weights: str) -> LoadReport:
    """Put published or trained weights into an RPN.

    Args:
        rpn: Changed in place.
        weights: A file of ``distinit train-rpn``, of one of torchvision's Faster R-CNNs, or of an image classifier (its
            trunk is taken, the head stays random); or a tag of torchvision's (COCO_V1, IMAGENET1K_V1).

    Raises:
        WeightsError: They are not on disk nor downloadable, unreadable, or of another network.
    """
    file = _read(rpn.arch, weights)
    tensors = modern_detector_keys(file.tensors)
    tensors = {key: value for key, value in tensors.items() if not key.startswith("roi_heads.")}
    absent: tuple[str, ...] = ()
    if "layer1.0.conv1.weight" in tensors:  # an image classifier
        unused = ("fc.",) if rpn._pyramid else ("fc.", "layer4.")
        tensors = {f"backbone.body.{key}": value for key, value in tensors.items() if not key.startswith(unused)}
        absent = ("backbone.fpn.", "rpn.")
    if not any(key.startswith("backbone.body.") for key in tensors):
        raise WeightsError(
            f"{file.path} holds neither an RPN nor a ResNet. Give a file of distinit train-rpn, of a Faster R-CNN of "
            "torchvision, or of its ResNets."
        )
    return load_tensors(rpn.bare_state_dict(), tensors, file.path, strict=True, allow_missing_prefixes=absent)


def modern_detector_keys(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a detector of torchvision under today's names."""
    for pattern, name in _OLD_KEYS:
        tensors = {pattern.sub(name, key): value for key, value in tensors.items()}
    return dict(tensors)


def _read(arch: str, weights: str) -> CheckpointFile:
    for name in (DETECTORS.get(arch), resnet_of(arch)):
        if name is not None and weights in torchvision_tags(name):
            return source_weights(f"torchvision/{name}", weights)
    try:
        return read_checkpoint(weights)
    except WeightsError as error:
        known = [tag for name in (DETECTORS.get(arch), resnet_of(arch)) if name for tag in torchvision_tags(name)]
        raise WeightsError(f"{error} Tags of torchvision for {arch}: {', '.join(known)}.") from error
