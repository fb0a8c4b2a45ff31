"""Whether learned corrections bring boxes nearer to the annotated ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torchvision.ops import box_iou

from distinit_plugin.detection.geometry import Boxes
from distinit_plugin.engine import distributed


@dataclass(frozen=True)
class Corrected:
    """Mean overlap (intersection over union) of proposals that are of persons, before and after their correction.

    Attributes:
        count: Proposals whose overlap with an annotated box reaches the least one before the correction.
        proposed: Their mean overlap with that box; NaN where there are none.
        corrected: The same of the corrected boxes.
    """

    count: int
    proposed: float
    corrected: float

    def metrics(self) -> dict[str, float | int | None]:
        """Ready for JSON."""
        means = {"proposed": self.proposed, "corrected": self.corrected}
        return {"count": self.count, **{name: value if self.count else None for name, value in means.items()}}

    def __str__(self) -> str:
        return f"{self.count} proposals of persons: mean IoU {self.proposed:.4f}, corrected {self.corrected:.4f}"


class Refinement:
    """Collects pairs of proposed and corrected boxes while a test runs."""

    def __init__(self, truth: Callable[[int], Boxes], least: float = 0.5) -> None:
        """Nothing is known yet.

        Args:
            truth: Number of a keyframe → its annotated boxes (n,4), fractions of the picture.
            least: Overlap from which on a proposal is of a person.
        """
        self._truth = truth
        self._least = least
        self._pairs: dict[int, npt.NDArray[np.float64]] = {}

    def add(self, keyframe: int, proposed: Boxes, corrected: Boxes) -> None:
        """Boxes (m,4) of a keyframe, as fractions; one that comes twice counts once."""
        truth = self._truth(keyframe)
        pairs = np.zeros((0, 2))
        if len(truth) and len(proposed):
            before, after = (
                box_iou(torch.from_numpy(boxes), torch.from_numpy(truth)).nan_to_num(0.0)
                for boxes in (proposed, corrected)
            )
            best, own = before.max(dim=1)
            of_persons = best >= self._least
            same = after.gather(1, own[:, None])[:, 0]
            pairs = torch.stack([best, same], dim=1)[of_persons].numpy()
        self._pairs[keyframe] = pairs

    def conclude(self, gather_objects: Callable[[Any], list[Any]] = distributed.gather_objects) -> Corrected:
        """The means over all keyframes of all ranks."""
        pairs: dict[int, npt.NDArray[np.float64]] = {}
        for others in gather_objects(self._pairs):
            pairs.update(others)
        joined = np.concatenate([np.zeros((0, 2)), *pairs.values()])
        means = joined.mean(axis=0) if len(joined) else np.full(2, np.nan)
        return Corrected(len(joined), float(means[0]), float(means[1]))
