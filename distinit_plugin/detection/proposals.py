"""Where the boxes come from that a network classifies: given ones, or those of a region proposal network (RPN).

Shapes: B batch, C channels, T frames, H height, W width, R boxes of all clips together. Boxes are (R,5): number of the
clip in the batch, x1, y1, x2, y2 in pixels of the student's view.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, Protocol, cast

import torch
from torch import Tensor, nn

from distinit_plugin.constants import constant
from distinit_plugin.types import Split, ViewSpec

KEYFRAME = "keyframe"
"""The view of an RPN that sees the keyframe itself: one frame, position T // 2 of the clip."""


class Proposals(NamedTuple):
    """Boxes that may hold a person.

    Attributes:
        boxes: (R,5) float32, detached, inside their view; of each clip the best first.
        scores: (R,) float32 in [0, 1], detached.
        loss: (B,) of an RPN that trains with the rest (objectness + offsets), else ``None``.
    """

    boxes: Tensor
    scores: Tensor
    loss: Tensor | None = None


class Proposer(Protocol):
    """What proposes the boxes of a batch. Implementations are ``torch.nn.Module``s.

    Attributes:
        trains: Whether it is trained with the network that holds it (an RPN on the network's own feature map); if not,
            it is frozen, in eval mode, and never in checkpoints, the optimizer or DDP.
    """

    trains: bool

    def view_specs(self, split: Split) -> Mapping[str, ViewSpec]:
        """Views that it needs besides the student's own."""
        ...

    def propose(self, views: Mapping[str, Tensor], feature_map: Tensor, boxes: Tensor | None) -> Proposals:
        """Find boxes.

        Args:
            views: Normalised, (B,C,T,H,W): the student's and those of ``view_specs``.
            feature_map: Slice of the student's feature map at the keyframe, (B,C,H',W').
            boxes: (R,5) the annotated ones, from which an RPN that trains takes its loss. ``None``: there are none; its
                loss is then that of empty keyframes, so that it can be seen which parameters train.
        """
        ...


class KeyframeRpn(Protocol):
    """An RPN with a trunk of its own, for :class:`KeyframeProposer`. Implementations are ``torch.nn.Module``s."""

    def view_specs(self, split: Split) -> Mapping[str, ViewSpec]:
        """One view, named :data:`KEYFRAME`."""
        ...

    def find(self, frames: Tensor) -> Proposals:
        """Boxes of normalised frames (B,3,h,w), in pixels of these."""
        ...


class KeyframeProposer(nn.Module):
    """A frozen RPN that sees the keyframe in a view of its own; its boxes are brought to the student's view."""

    trains = False

    def __init__(self, rpn: KeyframeRpn) -> None:
        """Freeze ``rpn``."""
        super().__init__()
        self.rpn = cast(nn.Module, rpn).eval().requires_grad_(False)

    def train(self, mode: bool = True) -> KeyframeProposer:
        """Stays in eval mode."""
        return super().train(False)

    def view_specs(self, split: Split) -> Mapping[str, ViewSpec]:
        """The RPN's."""
        return cast(KeyframeRpn, self.rpn).view_specs(split)

    @torch.no_grad()
    def propose(self, views: Mapping[str, Tensor], feature_map: Tensor, boxes: Tensor | None) -> Proposals:
        """Boxes of ``views["keyframe"]``, in pixels of the student's view."""
        frames = views[KEYFRAME]
        found = cast(KeyframeRpn, self.rpn).find(frames[:, :, 0])
        factors = constant([1.0, *scale_between(frames, student_view(views)) * 2], found.boxes.device)
        return Proposals(found.boxes * factors, found.scores)


def student_view(views: Mapping[str, Tensor]) -> Tensor:
    """One of the views that the student itself sees; all of them have one size."""
    return next(view for name, view in views.items() if name != KEYFRAME)


def scale_between(source: Tensor, target: Tensor) -> tuple[float, float]:
    """Factors of x and y from pixels of one view (…,H,W) to those of another view of the same region."""
    return target.shape[-1] / source.shape[-1], target.shape[-2] / source.shape[-2]
