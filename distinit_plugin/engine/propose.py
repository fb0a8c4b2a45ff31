"""How well a region proposal network finds the annotated persons of keyframes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.ops import box_iou

from distinit_plugin.detection.network import PROPOSAL_LOSS
from distinit_plugin.engine import distributed
from distinit_plugin.engine.evaluate import Finish, evaluation_mode
from distinit_plugin.engine.meters import MeanMeter
from distinit_plugin.errors import UserError
from distinit_plugin.types import BOXES, Batch, ModelOutput

RECALLS = (0.5, 0.7)
"""Overlaps from which on a person counts as found."""


def evaluate_proposals(
    network: nn.Module,
    batches: Iterable[Batch],
    *,
    finish: Finish,
    device: torch.device,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    all_reduce_sum: Callable[[Tensor], Tensor] = distributed.all_reduce_sum,
    gather_objects: Callable[[Any], list[Any]] = distributed.gather_objects,
) -> dict[str, float]:
    """Compare the proposals for keyframes with the annotated boxes.

    Args:
        network: A ``PersonRpn``.
        batches: Keyframes with boxes.
        finish: Makes the network's views of a batch.
        device: Where the network is.
        autocast: Context of the forward pass.
        all_reduce_sum: Sum of a tensor over ranks.
        gather_objects: The objects of all ranks.

    Returns:
        Over the keyframes of all ranks: ``loss``; ``recall50`` and ``recall70``, the shares of annotated persons that
        some proposal overlaps by 0.5 and 0.7; ``mean_iou``, the mean of their best overlap; ``proposals``, the mean
        number per keyframe. NaN: there are no persons at all.

    Raises:
        UserError: No keyframe could be read.
    """
    meter = MeanMeter()
    with evaluation_mode(network):
        for batch in batches:
            if not batch["keys"]:
                continue
            truth = batch["targets"][BOXES].to(device)
            with autocast():
                output: ModelOutput = network(finish(batch), boxes=truth, taps=[PROPOSAL_LOSS])
            assert output.boxes is not None
            best = best_overlaps(truth, output.boxes)
            count = len(batch["keys"])
            meter.update({"loss": output.taps[PROPOSAL_LOSS].float().mean()}, count)
            meter.update({"proposals": torch.tensor(len(output.boxes) / count, device=device)}, count)
            shares = {f"recall{round(100 * least)}": (best >= least).double().mean() for least in RECALLS}
            meter.update({**shares, "mean_iou": best.double().mean()}, len(truth))
    means = meter.read_all(device, all_reduce_sum, gather_objects)
    if not means:
        raise UserError("none of the keyframes could be read. See where AVA.FRAME_DIR or KEYFRAMES.VIDEO_DIR lead.")
    return means


def best_overlaps(truth: Tensor, boxes: Tensor) -> Tensor:
    """The largest overlap of each annotated box with some boxes of its picture.

    Args:
        truth: (G,5) number of the picture, x1, y1, x2, y2.
        boxes: (R,5).

    Returns:
        (G,) intersection over union, 0 where the picture has no boxes.
    """
    if not len(boxes):
        return torch.zeros(len(truth), device=truth.device)
    overlaps = box_iou(truth[:, 1:].float(), boxes[:, 1:].float()).nan_to_num(0.0)
    return overlaps.masked_fill(truth[:, :1] != boxes[:, 0], 0.0).amax(dim=1)
