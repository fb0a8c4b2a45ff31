"""Boxes through crop, resize and flip, and back.

A coordinate is a place on the continuous plane: pixel i reaches from i to i + 1. So a box scales with the picture, a
mirrored x is width − x, and RoIAlign must be told ``aligned=True``. (PySlowFast mirrors to width − x − 1.)
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from distinit_plugin.types import ViewRegion

Boxes = npt.NDArray[np.float64]
"""(n,4): x1, y1, x2, y2."""


def to_view(fractions: Boxes, region: ViewRegion) -> Boxes:
    """Boxes of the whole picture in the pixels of a view; parts may lie outside of it.

    Args:
        fractions: (n,4) of the picture's width and height.
        region: What the view shows.

    Returns:
        (n,4) pixels of the view.
    """
    frame = np.array([region.frame_width, region.frame_height] * 2, dtype=np.float64)
    boxes = (np.asarray(fractions, dtype=np.float64).reshape(-1, 4) * frame - _corner(region)) * _scale(region)
    return mirror(boxes, region.view_width) if region.flip else boxes


def to_fractions(boxes: Boxes, region: ViewRegion) -> Boxes:
    """Undo ``to_view``: (n,4) pixels of a view → (n,4) fractions of the whole picture."""
    boxes = np.asarray(boxes, dtype=np.float64).reshape(-1, 4)
    if region.flip:
        boxes = mirror(boxes, region.view_width)
    frame = np.array([region.frame_width, region.frame_height] * 2, dtype=np.float64)
    return (boxes / _scale(region) + _corner(region)) / frame


def mirror(boxes: Boxes, width: float) -> Boxes:
    """Boxes (n,4) of a picture of some width, mirrored left to right."""
    x1, y1, x2, y2 = boxes.T
    return np.stack([width - x2, y1, width - x1, y2], axis=1)


def clip_boxes(boxes: Boxes, height: float, width: float) -> Boxes:
    """Boxes (n,4) cut at the borders of a picture; of one outside nothing is left (see ``has_area``)."""
    limits = np.array([width, height] * 2, dtype=np.float64)
    return np.clip(boxes, 0.0, limits)


def has_area(boxes: Boxes) -> npt.NDArray[np.bool_]:
    """(n,) whether a box is one: finite, and neither empty nor inside out."""
    x1, y1, x2, y2 = boxes.T
    return np.isfinite(boxes).all(axis=1) & (x2 > x1) & (y2 > y1)


def _corner(region: ViewRegion) -> Boxes:
    return np.array([region.left, region.top] * 2, dtype=np.float64)


def _scale(region: ViewRegion) -> Boxes:
    """View pixels per source pixel, along x and y."""
    return np.array([region.view_width / region.width, region.view_height / region.height] * 2, dtype=np.float64)
