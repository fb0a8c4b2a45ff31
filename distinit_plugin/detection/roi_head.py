"""The head that classifies boxes on a network's feature maps.

As PySlowFast's (``slowfast/models/head_helper.py``): each map is pooled over time, aligned with the box (RoIAlign),
pooled over the box; the vectors of all maps are joined, dropped out and projected. Shapes: B batch, C channels, T
frames, H height, W width, R boxes of all clips together, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as functional
from torch import Tensor, nn
from torchvision.ops import roi_align

from distinit_plugin.errors import UserError
from distinit_plugin.models.network import check_choice

POOLS = ("avg", "max")
"""Over time."""


class RoiHead(nn.Module):
    """Feature maps and boxes → logits of K classes per box and, where boxes are refined, one offset per box."""

    def __init__(
        self,
        channels: Sequence[int],
        strides: Sequence[int],
        *,
        num_classes: int,
        pool: str = "avg",
        resolution: int = 7,
        aligned: bool = True,
        dropout: float = 0.0,
        refines: bool = False,
    ) -> None:
        """Build.

        Args:
            channels: C of each map.
            strides: Pixels of the view for each cell of each map.
            num_classes: K.
            pool: ``avg`` or ``max`` over time.
            resolution: Cells of a box, on each side, over which the maximum is taken.
            aligned: RoIAlign without its old shift by half a cell.
            dropout: Dropped fraction before the projection.
            refines: Learn one class-agnostic offset per box.

        Raises:
            UserError: A value is out of range.
        """
        super().__init__()
        check_choice("ROI.POOL", pool, POOLS)
        if resolution < 1:
            raise UserError(f"DETECTION.ROI_XFORM_RESOLUTION is {resolution}. Allowed: 1 and above.")
        self.strides = tuple(strides)
        self.pool, self.resolution, self.aligned, self.dropout_rate = pool, resolution, aligned, dropout
        self.feature_dim = sum(channels)
        self.projection = nn.Linear(self.feature_dim, num_classes)
        self.offsets = nn.Linear(self.feature_dim, 4) if refines else None
        self.reset()

    def reset(self) -> None:
        """N(0, 0.01²) and zero biases; offsets begin at zero, so that boxes begin as they are."""
        nn.init.normal_(self.projection.weight, 0.0, 0.01)
        nn.init.zeros_(self.projection.bias)
        if self.offsets is not None:
            nn.init.zeros_(self.offsets.weight)
            nn.init.zeros_(self.offsets.bias)

    def forward(self, maps: Sequence[Tensor], boxes: Tensor) -> tuple[Tensor, Tensor | None]:
        """Classify boxes.

        Args:
            maps: (B,C,T,H,W) each.
            boxes: (R,5): number of the clip, x1, y1, x2, y2 in pixels of the view.

        Returns:
            Logits (R,K) and offsets (R,4) or ``None``.
        """
        pooled = [self._of_boxes(part, stride, boxes) for part, stride in zip(maps, self.strides, strict=True)]
        features = functional.dropout(torch.cat(pooled, dim=1), self.dropout_rate, self.training)
        return self.projection(features), None if self.offsets is None else self.offsets(features)

    def _of_boxes(self, feature_map: Tensor, stride: int, boxes: Tensor) -> Tensor:
        """(B,C,T,H,W) → (R,C)."""
        image = feature_map.mean(dim=2) if self.pool == "avg" else feature_map.amax(dim=2)
        # One type for both, and coordinates need all of fp32.
        cells = roi_align(
            image.float(), boxes.float(), self.resolution, 1 / stride, sampling_ratio=0, aligned=self.aligned
        )
        return cells.amax(dim=(2, 3))
