"""What all pictures of numbers have in common: colours, how a figure is made, how it becomes a file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from distinit_plugin.files import write_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure, SubFigure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000", "#8A6D3B")
"""Of lines: those of Okabe and Ito, which colour-blind people tell from each other."""

DPI = 110
"""Pixels per inch."""


def new_figure(width: float, height: float) -> Figure:
    """An empty figure that needs no screen and lets nothing overlap; inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # half a second, which no other process has to wait
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def label(name: str, most: int = 48) -> str:
    """A name that somebody gave, as a picture can show it: on one line, not too long, no formula, never hidden."""
    text = " ".join(name.encode("utf-8", "replace").decode().split())
    text = text if len(text) <= most else text[: most - 1] + "…"
    text = text.replace("$", r"\$")  # what stands between two of them would be read as a formula
    return f" {text}" if text.startswith("_") else text  # legends leave such names out


def parts_of(figure: Figure, heights: Sequence[float]) -> list[SubFigure]:
    """Parts of a figure, one below the other."""
    return list(figure.subfigures(len(heights), 1, height_ratios=list(heights), squeeze=False)[:, 0])


def save_figure(figure: Figure, output: str | Path) -> None:
    """Write a figure as a PNG.

    Raises:
        UserError: ``output`` cannot be written.
    """
    write_file(output, lambda file: figure.savefig(file, format="png"))
