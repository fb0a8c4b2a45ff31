"""Terms of networks that classify boxes: actions, corrections of boxes, and the loss of an RPN that trains along.

Shapes: B clips, G annotated boxes, R boxes that the student saw, K classes. Rows of one clip are added up, so that a
term's loss is (B,) like any other; what it is divided by is the number of boxes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as functional
from torch import Tensor

from distinit_plugin.detection.matching import BACKGROUND, encode, match
from distinit_plugin.errors import UserError
from distinit_plugin.losses import Loss, full_precision
from distinit_plugin.objectives.adapters import OFFSETS
from distinit_plugin.objectives.terms import Term
from distinit_plugin.types import ACTIONS, BOXES, ModelOutput, Network


class Annotations(NamedTuple):
    """What persons do in the keyframes of a batch.

    Attributes:
        boxes: (G,5), see ``types.BOXES``.
        actions: (G,K) of 0 and 1.
        num_clips: B.
    """

    boxes: Tensor
    actions: Tensor
    num_clips: int


@dataclass(frozen=True)
class BoxTerm(Term):
    """A term whose rows are boxes: the actions of each.

    Attributes:
        samples: Boxes that a training step draws from each clip's proposals, by which sums are divided; 0: the boxes
            are those that are given, and their number divides.
        iou: Overlap from which on a proposal is of an annotated box; the others are background, which does nothing.
    """

    samples: int = 0
    iou: float = 0.5

    @property
    def counts_vary(self) -> bool:
        """Clips have few or many given boxes."""
        return self.samples == 0

    def own_target(self, targets: Mapping[str, Tensor], batch_size: int) -> Annotations:
        """The annotated boxes.

        Raises:
            UserError: The batch has none.
        """
        if BOXES not in targets or ACTIONS not in targets:
            raise UserError(
                f"the term '{self.name}' needs annotated boxes and the batch has none. Train on keyframes "
                "(DETECTION.ENABLE True, AVA.TRAIN_GT_BOX_LISTS)."
            )
        return Annotations(targets[BOXES], targets[ACTIONS], batch_size)

    def count(self, target: Any, weights: Tensor) -> Tensor:
        """Number of boxes."""
        number = self.samples * target.num_clips if self.samples else len(target.boxes)
        return torch.full((), float(number), device=weights.device)

    def losses(self, prediction: Tensor, target: Any, output: ModelOutput) -> Tensor:
        """The sum over each clip's boxes, (B,)."""
        assert output.boxes is not None
        found = self._match(output.boxes, target)
        if prediction.shape[1:] != target.actions.shape[1:]:
            raise UserError(
                f"the annotations have {target.actions.shape[1]} actions, the network has {prediction.shape[1]}: set "
                "MODEL.NUM_CLASSES to the number of actions."
            )
        rows = self.loss(prediction, _rows_of(target.actions, found))
        return _sum_of_clips(rows, output.boxes, target.num_clips)

    def _match(self, boxes: Tensor, target: Annotations) -> Tensor:
        """(R,) the annotated box of each, or ``BACKGROUND``."""
        if self.samples:
            return match(boxes, target.boxes, self.iou)
        assert len(boxes) == len(target.boxes)
        return torch.arange(len(boxes), device=boxes.device)


@dataclass(frozen=True)
class OffsetTerm(BoxTerm):
    """Corrections of the boxes of persons: smooth L1, added over the four offsets (Fast R-CNN, arXiv 1504.08083 §2.3).

    Background has no loss, but counts in what the sum is divided by.
    """

    def check(self, student: Network) -> None:
        """The builder knows whether boxes are refined."""

    def losses(self, prediction: Tensor, target: Any, output: ModelOutput) -> Tensor:
        """The sum over each clip's boxes, (B,)."""
        assert output.boxes is not None
        found = self._match(output.boxes, target)
        own = found != BACKGROUND
        wanted = encode(output.boxes[own, 1:], target.boxes[found[own], 1:])
        rows = functional.smooth_l1_loss(full_precision(prediction[own]), wanted, reduction="none").sum(1)
        return _sum_of_clips(rows, output.boxes[own], target.num_clips)


@dataclass(frozen=True)
class ProposalTerm(Term):
    """The loss that an RPN gives by itself, as it is."""

    def check(self, student: Network) -> None:
        """The builder knows whether it trains."""

    def own_target(self, targets: Mapping[str, Tensor], batch_size: int) -> None:
        """None: the network got the annotated boxes.

        Raises:
            UserError: The batch has none.
        """
        if BOXES not in targets:
            raise UserError(f"the term '{self.name}' needs annotated boxes and the batch has none.")

    def losses(self, prediction: Tensor, target: Any, output: ModelOutput) -> Tensor:
        """(B,)."""
        return prediction


def action_term(loss: Loss, weight: float, *, samples: int = 0, iou: float = 0.5) -> BoxTerm:
    """What persons do; ``samples`` and ``iou`` as in :class:`BoxTerm`."""
    return BoxTerm(name="action", student_layer="logits", loss=loss, weight=weight, samples=samples, iou=iou)


def offset_term(weight: float, *, samples: int, iou: float) -> OffsetTerm:
    """Where persons are; ``samples`` and ``iou`` as in :class:`BoxTerm`."""
    return OffsetTerm(name="box", student_layer=OFFSETS, loss=_no_loss, weight=weight, samples=samples, iou=iou)


def proposal_term(layer: str, weight: float = 1.0) -> ProposalTerm:
    """An RPN's own loss; ``layer``: the student's tap that holds it."""
    return ProposalTerm(name="proposal", student_layer=layer, loss=_no_loss, weight=weight)


def _no_loss(prediction: Tensor, target: Tensor) -> Tensor:
    raise NotImplementedError("this term has a loss of its own")


def _rows_of(actions: Tensor, found: Tensor) -> Tensor:
    """(R,K): rows of (G,K); zeros for the background."""
    if len(actions) == 0:
        return actions.new_zeros(len(found), actions.shape[1])
    return actions[found.clamp(min=0)] * (found != BACKGROUND).to(actions.dtype)[:, None]


def _sum_of_clips(rows: Tensor, boxes: Tensor, num_clips: int) -> Tensor:
    """(R,) → (B,)."""
    return rows.new_zeros(num_clips).index_add(0, boxes[:, 0].long(), rows)
