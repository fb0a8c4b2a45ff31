"""Boxes against boxes: which annotated box a proposal is of, which proposals a step learns from, and box offsets.

Boxes of several clips together are (R,5): number of the clip, x1, y1, x2, y2; boxes of different clips never meet.
Source: S. Ren et al., "Faster R-CNN" (arXiv 1506.01497) §3.1.2 and R. Girshick, "Fast R-CNN" (arXiv 1504.08083) §2.3.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision.ops import box_iou

from distinit_plugin.constants import constant
from distinit_plugin.errors import UserError

BACKGROUND = -1
"""Match of a box that is of no annotated one."""

OFFSET_SCALES = (10.0, 10.0, 5.0, 5.0)
"""Offsets are multiplied by these, which brings them to about unit variance (Fast R-CNN's reference code)."""

MAX_LOG_SCALE = math.log(1000 / 16)
"""A box grows at most so much, so that exp stays finite."""

LEAST_SIDE = 1e-3
"""Pixels; sides of boxes below this count as this, so that offsets stay finite."""


@dataclass(frozen=True)
class Sampling:
    """Which of the proposals a training step learns from.

    Attributes:
        count: Boxes per keyframe, at most.
        positive_share: Of them, at most this share is of annotated boxes; the rest is background.
        iou: From this overlap on a proposal is of an annotated box.

    Raises:
        UserError: A value is out of range.
    """

    count: int
    positive_share: float = 0.5
    iou: float = 0.5

    def __post_init__(self) -> None:
        """Check the ranges."""
        if self.count < 1:
            raise UserError(f"ROI.SAMPLES is {self.count}. Allowed: 1 and above.")
        if not 0 < self.positive_share <= 1:
            raise UserError(f"ROI.POSITIVE_SHARE is {self.positive_share}. Allowed: above 0, up to 1.")
        if not 0 < self.iou <= 1:
            raise UserError(f"ROI.MATCH_IOU is {self.iou}. Allowed: above 0, up to 1.")


def no_boxes(like: Tensor) -> Tensor:
    """(0,5) float32 on the device of ``like``."""
    return torch.zeros(0, 5, device=like.device)


def match(boxes: Tensor, truth: Tensor, iou: float) -> Tensor:
    """The annotated box that each box overlaps most.

    Args:
        boxes: (R,5).
        truth: (G,5).
        iou: Least overlap.

    Returns:
        (R,) int64, rows of ``truth``, ``BACKGROUND`` where no overlap reaches ``iou``.
    """
    if len(truth) == 0:
        return torch.full((len(boxes),), BACKGROUND, dtype=torch.int64, device=boxes.device)
    overlaps = box_iou(boxes[:, 1:], truth[:, 1:]).nan_to_num(0.0)  # two boxes without area: 0 / 0
    overlaps = overlaps.masked_fill(boxes[:, :1] != truth[:, 0], -1.0)
    best, rows = overlaps.max(dim=1)
    return torch.where(best >= iou, rows, BACKGROUND)


def sample(proposed: Tensor, truth: Tensor, sampling: Sampling, num_clips: int) -> Tensor:
    """Proposals and annotated boxes together → the boxes that a training step learns from.

    The draw is that of torch's generator of the boxes' device.

    Args:
        proposed: (R,5).
        truth: (G,5).
        sampling: How many.
        num_clips: B.

    Returns:
        (R',5), of each clip at most ``sampling.count``, those of annotated boxes first.
    """
    boxes = torch.cat([proposed, truth.to(proposed.dtype)])
    positive = match(boxes, truth, sampling.iou) != BACKGROUND
    order = torch.rand(len(boxes), device=boxes.device).argsort()
    chosen = []
    for clip in range(num_clips):
        own = order[boxes[order, 0] == clip]
        positives = own[positive[own]][: max(1, int(sampling.positive_share * sampling.count))]
        chosen += [positives, own[~positive[own]][: sampling.count - len(positives)]]
    return boxes[torch.cat(chosen)]


def encode(boxes: Tensor, targets: Tensor) -> Tensor:
    """The offsets that lead from boxes to others: (tx, ty, tw, th) of Faster R-CNN times ``OFFSET_SCALES``.

    Args:
        boxes: (R,4) x1, y1, x2, y2.
        targets: (R,4).

    Returns:
        (R,4).
    """
    x, y, width, height = _centres(boxes)
    to_x, to_y, to_width, to_height = _centres(targets)
    offsets = [(to_x - x) / width, (to_y - y) / height, (to_width / width).log(), (to_height / height).log()]
    return torch.stack(offsets, dim=1) * constant(OFFSET_SCALES, boxes.device, boxes.dtype)


def decode(boxes: Tensor, offsets: Tensor) -> Tensor:
    """The boxes to which ``encode``'s offsets lead.

    Args:
        boxes: (R,4) x1, y1, x2, y2.
        offsets: (R,4).

    Returns:
        (R,4).
    """
    x, y, width, height = _centres(boxes)
    dx, dy, dw, dh = (offsets / constant(OFFSET_SCALES, offsets.device, offsets.dtype)).unbind(dim=1)
    x, y = x + dx * width, y + dy * height
    half_width = width * dw.clamp(max=MAX_LOG_SCALE).exp() / 2
    half_height = height * dh.clamp(max=MAX_LOG_SCALE).exp() / 2
    return torch.stack([x - half_width, y - half_height, x + half_width, y + half_height], dim=1)


def _centres(boxes: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Centre x and y, width, height."""
    x1, y1, x2, y2 = boxes.unbind(dim=1)
    return (x1 + x2) / 2, (y1 + y2) / 2, (x2 - x1).clamp(min=LEAST_SIDE), (y2 - y1).clamp(min=LEAST_SIDE)
