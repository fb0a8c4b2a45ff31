"""What a region proposal network predicts for its anchors, what it learns from, and which proposals follow.

Source: S. Ren et al., "Faster R-CNN" (arXiv 1506.01497) §3.1; numbers as torchvision's ``RegionProposalNetwork``.
Shapes: B batch, A anchors of all levels, G annotated boxes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as functional
from torch import Tensor
from torchvision.ops import batched_nms, box_iou, clip_boxes_to_image

from distinit_plugin.constants import constant
from distinit_plugin.detection.matching import LEAST_SIDE, OFFSET_SCALES, decode, encode, no_boxes
from distinit_plugin.detection.proposals import Proposals
from distinit_plugin.errors import UserError

RATIOS = (0.5, 1.0, 2.0)
"""Height divided by width of the anchors of each size."""

POSITIVE_IOU, NEGATIVE_IOU = 0.7, 0.3
"""An anchor is a person's from the first overlap on, background below the second; others count for nothing."""

SAMPLES, POSITIVE_SHARE = 256, 0.5
"""Anchors of a picture that its loss is the mean of, and the most that persons may be of them."""


class Predictions(NamedTuple):
    """What is said of every anchor.

    Attributes:
        objectness: (B,A) logits.
        offsets: (B,A,4) of Faster R-CNN, not scaled.
        anchors: (A,4) x1, y1, x2, y2, pixels.
        levels: (A,) int64.
    """

    objectness: Tensor
    offsets: Tensor
    anchors: Tensor
    levels: Tensor


@dataclass(frozen=True)
class Choice:
    """Which proposals are given.

    Attributes:
        count: Per picture, at most.
        before: Of each level, at most, before overlapping ones are dropped.
        nms: Of two that overlap by more (intersection over union) the better one is kept.
        floor: Least score.

    Raises:
        UserError: A value is out of range.
    """

    count: int = 100
    before: int = 1000
    nms: float = 0.7
    floor: float = 0.0

    def __post_init__(self) -> None:
        """Check the ranges."""
        if self.count < 1:
            raise UserError(f"RPN.NUM_PROPOSALS is {self.count}. Allowed: 1 and above.")
        for key, value in (("RPN.NMS", self.nms), ("RPN.SCORE_FLOOR", self.floor)):
            if not 0 <= value <= 1:
                raise UserError(f"{key} is {value}. Allowed: 0 up to 1.")


def level_anchors(
    sizes: Sequence[float], grid: tuple[int, int], stride: tuple[int, int], device: torch.device
) -> Tensor:
    """Anchors of one map: of each cell those of all sizes and ``RATIOS``, around the cell's first pixel.

    Args:
        sizes: Roots of their areas, pixels.
        grid: Rows and columns of the map.
        stride: Pixels between rows and between columns.
        device: Of the result.

    Returns:
        (rows·columns·cell,4) fp32, cells row by row; within a cell the size changes first, then the ratio.
    """
    roots, side = constant(RATIOS, device).sqrt(), constant(sizes, device)
    widths, heights = ((1 / roots)[:, None] * side).flatten(), (roots[:, None] * side).flatten()
    cell = (torch.stack([-widths, -heights, widths, heights], dim=1) / 2).round()
    y, x = torch.meshgrid(
        torch.arange(grid[0], device=device) * stride[0],
        torch.arange(grid[1], device=device) * stride[1],
        indexing="ij",
    )
    shifts = torch.stack([x, y, x, y], dim=-1).reshape(-1, 1, 4)
    return (shifts + cell).reshape(-1, 4)


def flatten_maps(logits: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    """(B,cell,H,W) and (B,4·cell,H,W) of one level → (B,H·W·cell) and (B,H·W·cell,4), fp32, as its anchors."""
    batch, cell, height, width = logits.shape
    flat = logits.permute(0, 2, 3, 1).reshape(batch, -1)
    deltas = offsets.view(batch, cell, 4, height, width).permute(0, 3, 4, 1, 2).reshape(batch, -1, 4)
    return flat.float(), deltas.float()


def rpn_loss(predictions: Predictions, truth: Tensor) -> Tensor:
    """Objectness (binary cross-entropy) plus offsets (smooth L1, β 1/9) of each picture.

    The mean over ``SAMPLES`` random anchors, with positives and negatives in balance, is replaced by its expectation
    over the draws: every anchor has its share. So there is nothing random in it, and nothing to reproduce.

    Args:
        predictions: Of B pictures.
        truth: (G,5) number of the picture, x1, y1, x2, y2.

    Returns:
        (B,).
    """
    if predictions.objectness.is_meta:  # values decide which anchors count; a description needs the shape alone
        return predictions.objectness.mean(dim=1)
    with torch.autocast(truth.device.type, enabled=False):
        losses = [
            _loss_of_one(logits, offsets, predictions.anchors, truth[truth[:, 0] == number, 1:].float())
            for number, (logits, offsets) in enumerate(zip(predictions.objectness, predictions.offsets, strict=True))
        ]
        return torch.stack(losses)


def _loss_of_one(logits: Tensor, offsets: Tensor, anchors: Tensor, truth: Tensor) -> Tensor:
    positive, negative, own = assign(anchors, truth)
    num_positive = positive.sum().clamp(max=int(SAMPLES * POSITIVE_SHARE))
    num_negative = torch.minimum(negative.sum(), SAMPLES - num_positive)
    total = (num_positive + num_negative).clamp(min=1)
    entropy = functional.binary_cross_entropy_with_logits(logits, positive.float(), reduction="none")
    loss = (_mean(entropy, positive) * num_positive + _mean(entropy, negative) * num_negative) / total
    if not len(truth):
        return loss + 0.0 * offsets.sum()  # an empty picture reaches the same parameters, as DDP demands
    goal = encode(anchors, truth[own]) / constant(OFFSET_SCALES, anchors.device, anchors.dtype)
    distance = functional.smooth_l1_loss(offsets, goal, beta=1 / 9, reduction="none").sum(1)
    return loss + _mean(distance, positive) * num_positive / total


def _mean(values: Tensor, chosen: Tensor) -> Tensor:
    """Mean of some values; 0 of none."""
    return torch.where(chosen, values, 0.0).sum() / chosen.sum().clamp(min=1)


def assign(anchors: Tensor, truth: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Which anchors are persons, which are background, and whose.

    Args:
        anchors: (A,4).
        truth: (G,4) boxes of one picture.

    Returns:
        (A,) bool: overlap of ``POSITIVE_IOU``, or the largest one that a box has with any anchor; (A,) bool: overlap
        below ``NEGATIVE_IOU`` with every box; (A,) int64: the box that the anchor overlaps most.
    """
    if not len(truth):
        none = torch.zeros(len(anchors), dtype=torch.bool, device=anchors.device)
        return none, ~none, none.long()
    overlaps = box_iou(anchors, truth).nan_to_num(0.0)
    best, own = overlaps.max(dim=1)
    largest = (overlaps == overlaps.amax(dim=0)) & (overlaps > 0)
    positive = (best >= POSITIVE_IOU) | largest.any(dim=1)
    return positive, (best < NEGATIVE_IOU) & ~positive, own


@torch.no_grad()
def best_proposals(predictions: Predictions, height: int, width: int, choice: Choice) -> Proposals:
    """The boxes that predictions lead to, cut at the borders of the picture, without those that repeat a better one.

    Args:
        predictions: Of B pictures.
        height: Of the pictures, pixels.
        width: Of the pictures, pixels.
        choice: Which are given.
    """
    if predictions.objectness.is_meta:  # values decide how many there are, and those of a description have none
        return Proposals(no_boxes(predictions.anchors), predictions.objectness.new_zeros(0))
    boxes, scores = [], []
    for number, (logits, offsets) in enumerate(zip(predictions.objectness, predictions.offsets, strict=True)):
        rows = _best_of_levels(logits, predictions.levels, choice.before)
        scaled = offsets[rows] * constant(OFFSET_SCALES, offsets.device, offsets.dtype)
        found = clip_boxes_to_image(decode(predictions.anchors[rows], scaled), (height, width))
        chances = logits[rows].sigmoid()
        sides = found[:, 2:] - found[:, :2]
        good = ((sides >= LEAST_SIDE).all(dim=1) & (chances >= choice.floor)).nonzero().flatten()
        order = batched_nms(found[good], chances[good], predictions.levels[rows][good], choice.nms)
        kept = good[order[: choice.count]]
        boxes.append(torch.cat([torch.full_like(found[kept, :1], number), found[kept]], dim=1))
        scores.append(chances[kept])
    return Proposals(torch.cat(boxes), torch.cat(scores))


def _best_of_levels(logits: Tensor, levels: Tensor, count: int) -> Tensor:
    """Rows of the ``count`` largest logits of each level."""
    _, sizes = torch.unique_consecutive(levels, return_counts=True)
    first, rows = 0, []
    for size in sizes.tolist():
        rows.append(first + logits[first : first + size].topk(min(count, size)).indices)
        first += size
    return torch.cat(rows)
