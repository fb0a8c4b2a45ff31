"""Teachers for every location: torchvision's segmentation networks and detection backbones.

These are DistInit's "spatial tasks". Their ``feature_map`` is matched per location, on the teacher's own grid.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torchvision.models.detection
import torchvision.models.segmentation
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

from distinit_plugin.errors import UserError
from distinit_plugin.teachers.image import FrameOutput, ImageNetwork, build_torchvision
from distinit_plugin.types import ViewSpec


class SegmentationNetwork(ImageNetwork):
    """Class logits of every location, before they are upsampled to the frame's size."""

    def __init__(self, model: str, num_classes: int, view: ViewSpec) -> None:
        """Build with random weights.

        Args:
            model: torchvision's name (``fcn_resnet50``, ``deeplabv3_…``, ``lraspp_mobilenet_v3_large``).
            num_classes: K, channels of the map (21 for the published weights).
            view: The frames that it sees.

        Raises:
            UserError: No such network, or a size that it cannot take.
        """
        body = build_torchvision(torchvision.models.segmentation, model, num_classes=num_classes, weights_backbone=None)
        super().__init__(body, view, f"torchvision/{model}")
        self.measure()

    def run_frames(self, frames: Tensor) -> FrameOutput:
        """Only the map; the features are its mean."""
        body: Any = self.body
        maps = body.backbone(frames)
        feature_map = body.classifier(maps.get("out", maps))
        return FrameOutput(None, feature_map.mean(dim=(2, 3)), feature_map)

    def reset_classifier(self, num_classes: int) -> None:
        """Dense teachers have no pooled classifier."""
        _refuse_classifier(self.name, num_classes)


class DetectionBackbone(ImageNetwork):
    """The coarsest level of a detector's feature pyramid (stride 32) that is made from its body."""

    def __init__(self, model: str, view: ViewSpec, *, frozen_norm_eps: float | None = None) -> None:
        """Build with random weights; proposals and boxes are dropped.

        Args:
            model: torchvision's name (``fasterrcnn_resnet50_fpn``, …).
            view: The frames that it sees.
            frozen_norm_eps: Use batch normalisation with constant statistics and this eps, as weights without batch
                counters need; ``None``: ordinary.

        Raises:
            UserError: No such network, one without a pyramid, or a size that it cannot take.
        """
        if "_fpn" not in model:
            raise UserError(
                f"torchvision/{model} has no feature pyramid to learn from. Use a detector whose name ends in _fpn."
            )
        detector: Any = build_torchvision(torchvision.models.detection, model, weights_backbone=None)
        super().__init__(detector.backbone, view, f"torchvision/{model}")
        if frozen_norm_eps is not None:
            _freeze_norms(self.body, frozen_norm_eps)
        self.measure()

    def run_frames(self, frames: Tensor) -> FrameOutput:
        """Only the map; the features are its mean."""
        levels: Mapping[str, Tensor] = self.body(frames)
        feature_map = levels[max((name for name in levels if name.isdigit()), key=int)]
        return FrameOutput(None, feature_map.mean(dim=(2, 3)), feature_map)

    def reset_classifier(self, num_classes: int) -> None:
        """Dense teachers have no pooled classifier."""
        _refuse_classifier(self.name, num_classes)


def _freeze_norms(module: nn.Module, eps: float) -> None:
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            module.register_module(name, FrozenBatchNorm2d(child.num_features, eps))
        else:
            _freeze_norms(child, eps)


def _refuse_classifier(name: str, num_classes: int) -> None:
    if num_classes:
        raise UserError(f"teacher {name} has a map and no classifier. Set LAYER to feature_map.")
