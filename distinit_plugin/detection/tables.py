"""Rows of boxes as columns: the one form in which annotations, detections and results travel through the program."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

NO_ACTION = -1
"""Action of a row that has none: a person's box alone."""


@dataclass(frozen=True)
class BoxTable:
    """One row per box × action, as in AVA's files.

    Attributes:
        videos: Names of the videos, each once.
        video: (n,) int32: places in ``videos``.
        seconds: (n,) float64: time stamps of the keyframes.
        boxes: (n,4) float64: x1, y1, x2, y2 as fractions of the frame.
        actions: (n,) int32: numbers of the label map (from 1), or ``NO_ACTION``.
        scores: (n,) float64; 1 where the file has none.
        keyframes: (k,2) of (place in ``videos``, seconds), float64: keyframes without any box (rows of two columns).
        persons: (n,) int64: who it is, in ground truth that says so (its eighth column); else ``None``.
    """

    videos: tuple[str, ...]
    video: npt.NDArray[np.int32]
    seconds: npt.NDArray[np.float64]
    boxes: npt.NDArray[np.float64]
    actions: npt.NDArray[np.int32]
    scores: npt.NDArray[np.float64]
    keyframes: npt.NDArray[np.float64] = field(default_factory=lambda: np.zeros((0, 2)))
    persons: npt.NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return len(self.video)
