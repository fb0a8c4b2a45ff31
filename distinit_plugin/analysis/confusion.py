"""Which classes a run takes for which."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from distinit_plugin.engine.figures import label, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Counts = npt.NDArray[np.int64]

PAIRS = 20
"""Mistakes that are listed, the most frequent first."""

_NAMED = 60
"""Classes up to which each has its name at the axes."""
_NUMBERED = 12
"""Classes up to which each cell has its number."""


def mistakes(table: Counts, class_names: Sequence[str]) -> list[tuple[str, str, int, float]]:
    """The most frequent ones: class, what it was taken for, videos, share of the class's videos."""
    wrong = table.copy()
    np.fill_diagonal(wrong, 0)
    order = np.argsort(-wrong, axis=None, kind="stable")[:PAIRS]
    places = [(int(place) // len(table), int(place) % len(table)) for place in order]
    return [
        (class_names[row], class_names[column], int(wrong[row, column]), float(wrong[row, column] / table[row].sum()))
        for row, column in places
        if wrong[row, column]
    ]


def confusion_numbers(name: str, table: Counts, class_names: Sequence[str]) -> dict[str, Any]:
    """For JSON."""
    keys = ("class", "taken_for", "videos", "share")
    return {
        "run": name,
        "videos": int(table.sum()),
        "top1": float(np.trace(table) / table.sum()),
        "mistakes": [dict(zip(keys, found, strict=True)) for found in mistakes(table, class_names)],
        "class_names": list(class_names),
        "counts": table.tolist(),
    }


def draw_confusion(name: str, table: Counts, class_names: Sequence[str]) -> Figure:
    """The share of each class's videos that got each answer; a class without videos stays white."""
    count = len(class_names)
    named = count <= _NAMED
    side = min(max(3.0, 0.2 * count), 10.0)
    names = [label(own, 36) for own in class_names]
    longest = max(map(len, names)) * 0.075 if named else 0.5
    figure = new_figure(side + longest + 1.3, side + longest + 0.6)
    axis = figure.subplots()
    totals = table.sum(axis=1, keepdims=True)
    shares = np.ma.masked_where(np.broadcast_to(totals == 0, table.shape), 100 * table / np.maximum(totals, 1))
    image = axis.imshow(shares, cmap="cividis", vmin=0, vmax=100, interpolation="nearest")
    if named:
        axis.set_xticks(range(count), names, rotation=90, fontsize=8)
        axis.set_yticks(range(count), names, fontsize=8)
    if count <= _NUMBERED:
        for row, column in np.argwhere(table > 0).tolist():
            colour = "black" if shares[row, column] > 55 else "white"
            axis.text(column, row, str(table[row, column]), ha="center", va="center", color=colour, fontsize=8)
    axis.set_xlabel("predicted")
    axis.set_ylabel("label")
    axis.set_title(
        f"{label(name)}\n{int(table.sum())} videos, top-1 {100 * (np.trace(table) / table.sum()):.1f} %", fontsize=10
    )
    figure.colorbar(image, ax=axis, label="share of the class's videos (%)", shrink=0.8)
    return figure
