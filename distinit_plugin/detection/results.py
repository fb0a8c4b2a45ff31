"""Scores of boxes → detections: per-class suppression, a floor of scores, the best of each keyframe.

Source: C. Gu et al., "AVA" (arXiv 1705.08421) §5.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torchvision.ops import batched_nms

from distinit_plugin.detection.geometry import Boxes
from distinit_plugin.detection.tables import BoxTable


@dataclass(frozen=True)
class Selection:
    """Which detections (box × action) of a keyframe are kept.

    Attributes:
        floor: Those with a score below are left out.
        nms: Of two boxes of one action that overlap by more than this, the better one is kept; 1: both.
        most: The best of those that are left, at most; ``None``: all.
    """

    floor: float = 0.0
    nms: float = 1.0
    most: int | None = None


class Detections(NamedTuple):
    """Rows of some keyframes, by their numbers.

    Attributes:
        keyframe: (n,) int32.
        boxes: (n,4) float64: fractions of the picture.
        actions: (n,) int32, from 1.
        scores: (n,) float32.
    """

    keyframe: npt.NDArray[np.int32]
    boxes: npt.NDArray[np.float64]
    actions: npt.NDArray[np.int32]
    scores: npt.NDArray[np.float32]

    @classmethod
    def joined(cls, parts: Iterable[Detections]) -> Detections:
        """All rows, sorted by keyframe; those of one keyframe stay in their order."""
        columns = [*zip(*parts, strict=True)] or [(), (), (), ()]
        kinds = ((np.int32, ()), (np.float64, (4,)), (np.int32, ()), (np.float32, ()))
        keyframe, boxes, actions, scores = (
            np.concatenate([np.zeros((0, *shape), kind), *column]).astype(kind, copy=False)
            for column, (kind, shape) in zip(columns, kinds, strict=True)
        )
        order = np.argsort(keyframe, kind="stable")
        return cls(keyframe[order], boxes[order], actions[order], scores[order])

    def table(self, videos: Sequence[str], video: npt.NDArray[np.int32], seconds: npt.NDArray[np.float64]) -> BoxTable:
        """The rows as a table.

        Args:
            videos: Names of the videos.
            video: (k,) of each keyframe.
            seconds: (k,) of each keyframe.
        """
        return BoxTable(
            tuple(videos),
            video[self.keyframe],
            seconds[self.keyframe],
            self.boxes,
            self.actions,
            self.scores.astype(np.float64),
        )


def select(keyframe: int, boxes: Boxes, scores: Tensor, selection: Selection) -> Detections:
    """The detections of one keyframe, the best first.

    Args:
        keyframe: Its number.
        boxes: (m,4) fractions of the picture.
        scores: (m,K) of each box and action, on the CPU.
        selection: Which are kept.
    """
    rows, columns = (scores >= selection.floor).nonzero(as_tuple=True)
    found = scores[rows, columns]
    # Equal scores stay in the order of boxes, then actions.
    order = found.argsort(descending=True, stable=True)
    rows, columns, found = rows[order], columns[order], found[order]
    if selection.nms < 1:
        # Overlaps are shares of areas, so that fractions serve as well as pixels.
        kept = batched_nms(torch.from_numpy(boxes)[rows], found.double(), columns, selection.nms).sort().values
        rows, columns, found = rows[kept], columns[kept], found[kept]
    rows, columns, found = (part[: selection.most] for part in (rows, columns, found))
    return Detections(
        np.full(len(rows), keyframe, dtype=np.int32),
        boxes[rows.numpy()],
        (columns + 1).numpy().astype(np.int32),
        found.numpy().astype(np.float32),
    )
