"""Boxes and words on a picture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

Picture = npt.NDArray[np.uint8]
Colour = tuple[int, int, int]

COLOURS: tuple[Colour, ...] = (
    (255, 82, 82),
    (64, 196, 255),
    (105, 240, 174),
    (255, 215, 64),
    (224, 64, 251),
    (255, 145, 48),
    (120, 144, 255),
    (198, 255, 0),
    (255, 128, 171),
    (29, 233, 182),
)
"""Bright colours that are told apart on most pictures."""

_PLATE = (0, 0, 0, 150)
"""What words stand on: the picture, darkened."""


class Mark(NamedTuple):
    """A box with what is said of it.

    Attributes:
        box: x1, y1, x2, y2 as fractions of the picture; the part outside it is not drawn.
        lines: Words, one line below the other.
        colour: Number of the colour, counted around ``COLOURS``.
    """

    box: tuple[float, float, float, float]
    lines: tuple[str, ...] = ()
    colour: int = 0


def draw(picture: Picture, marks: Sequence[Mark] = (), caption: Sequence[str] = ()) -> Picture:
    """A copy of a picture with boxes and words on it.

    Lines and letters grow with the picture. The words of a box stand above it where there is room, else within it, and
    always inside the picture.

    Args:
        picture: (H,W,3) uint8 RGB.
        marks: Boxes, drawn in their order.
        caption: Lines in the upper left corner.

    Returns:
        (H,W,3) uint8 RGB.
    """
    canvas = Image.fromarray(picture)
    pen = ImageDraw.Draw(canvas, "RGBA")
    font = ImageFont.load_default(max(10, min(canvas.size) // 28))
    for mark in marks:
        _draw_box(pen, canvas.size, mark)
    for mark in marks:  # words lie over all boxes
        _draw_words(pen, canvas.size, mark, font)
    if caption:
        _write(pen, canvas.size, (0, 0), caption, "white", font)
    return np.asarray(canvas)


def line_width(height: int, width: int) -> int:
    """Thickness of the lines of boxes on a picture, pixels."""
    return max(2, min(height, width) // 160)


def pixel_box(box: tuple[float, float, float, float], height: int, width: int) -> tuple[int, int, int, int] | None:
    """First column, first row, last column and last row of a box given in fractions; ``None``: it is outside."""
    columns, rows = _span(box[0], box[2], width), _span(box[1], box[3], height)
    return None if columns is None or rows is None else (columns[0], rows[0], columns[1], rows[1])


def _span(low: float, high: float, size: int) -> tuple[int, int] | None:
    """First and last pixel of a side, at least one."""
    if high <= max(low, 0.0) or low >= 1.0:
        return None
    first = min(round(max(low, 0.0) * size), size - 1)
    return first, max(round(min(high, 1.0) * size) - 1, first)


def _draw_box(pen: ImageDraw.ImageDraw, size: tuple[int, int], mark: Mark) -> None:
    corners = pixel_box(mark.box, size[1], size[0])
    if corners is not None:
        thick = min(line_width(size[1], size[0]), 1 + min(corners[2] - corners[0], corners[3] - corners[1]) // 2)
        pen.rectangle(corners, outline=COLOURS[mark.colour % len(COLOURS)], width=thick)


def _draw_words(pen: ImageDraw.ImageDraw, size: tuple[int, int], mark: Mark, font: _Font) -> None:
    corners = pixel_box(mark.box, size[1], size[0])
    if corners is None or not mark.lines:
        return
    height = _plate(pen, mark.lines, font)[1]
    above = corners[1] - height
    place = (corners[0], above if above >= 0 else corners[1])
    _write(pen, size, place, mark.lines, COLOURS[mark.colour % len(COLOURS)], font)


_Font = ImageFont.ImageFont | ImageFont.FreeTypeFont


def _plate(pen: ImageDraw.ImageDraw, lines: Sequence[str], font: _Font) -> tuple[int, int]:
    """Width and height of what lines stand on."""
    step = _line_height(font)
    return int(max(pen.textlength(line, font) for line in lines)) + step // 2, step * len(lines) + step // 4


def _line_height(font: _Font) -> int:
    return int(font.getbbox("Ág")[3]) + 1


def _write(
    pen: ImageDraw.ImageDraw,
    size: tuple[int, int],
    place: tuple[int, int],
    lines: Sequence[str],
    colour: Colour | str,
    font: _Font,
) -> None:
    """Lines on a plate as near to ``place`` (its upper left corner) as the picture allows."""
    width, height = _plate(pen, lines, font)
    left = max(min(place[0], size[0] - width), 0)
    top = max(min(place[1], size[1] - height), 0)
    pen.rectangle((left, top, left + width - 1, top + height - 1), fill=_PLATE)
    step = _line_height(font)
    for number, line in enumerate(lines):
        pen.text((left + step // 4, top + number * step), line, fill=colour, font=font)
