"""Frames beside their flow as colour: contact sheets."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageDraw

from distinit_plugin.flow.colour import flow_to_colour

Picture = npt.NDArray[np.uint8]
Flow = npt.NDArray[np.float32]

_MARGIN = 8
_LINE = 16
_WHEEL = 48


def colour_flow(flow: Flow, largest: float) -> Picture:
    """(H,W,2) pixels → (H,W,3) uint8 RGB, see ``flow_to_colour``.

    Args:
        flow: u and v.
        largest: Length that gets the full colour, pixels, above 0.
    """
    return flow_to_colour(torch.from_numpy(flow).permute(2, 0, 1), largest).permute(1, 2, 0).numpy()


def large_length(flows: Sequence[Flow]) -> float:
    """A good length for the full colour: what 99 % of the vectors of a flow stay below, in the mean of the flows.

    At least a pixel: below that the steps of the codes would be all that is seen.
    """
    lengths = [float(np.quantile(np.hypot(flow[..., 0], flow[..., 1]), 0.99)) for flow in flows]
    return max(sum(lengths) / len(lengths), 1.0)


def wheel(size: int) -> Picture:
    """(size,size,3): what the colours mean."""
    axis = (np.arange(size) - (size - 1) / 2) / (size / 2)
    flow = np.stack(np.meshgrid(axis, axis), axis=-1).astype(np.float32)
    picture = colour_flow(flow, 1.0)
    picture[np.hypot(flow[..., 0], flow[..., 1]) > 1] = 255
    return picture


def contact_sheet(
    frames: Sequence[Picture], flows: Sequence[Flow], captions: Sequence[str], title: str, largest: float
) -> Image.Image:
    """Frames with their flow below, in rows of up to four, under a title with the meaning of the colours.

    Args:
        frames: Each (H,W,3) uint8 RGB.
        flows: Each (H,W,2), pixels.
        captions: Of each.
        title: Above all.
        largest: Length of the full colour, pixels.
    """
    height, width = frames[0].shape[:2]
    columns = min(len(frames), 4)
    rows = -(-len(frames) // columns)
    cell = (width + _MARGIN, 2 * height + _LINE + _MARGIN)
    top = _WHEEL + 2 * _MARGIN
    sheet = Image.new("RGB", (max(columns * cell[0] + _MARGIN, 320), top + rows * cell[1]), "white")
    pen = ImageDraw.Draw(sheet)
    sheet.paste(Image.fromarray(wheel(_WHEEL)), (_MARGIN, _MARGIN))
    pen.text((_WHEEL + 2 * _MARGIN, _MARGIN), title, fill="black")
    pen.text((_WHEEL + 2 * _MARGIN, _MARGIN + _LINE), f"full colour: {largest:.3g} px", fill="black")
    for number, (frame, flow, caption) in enumerate(zip(frames, flows, captions, strict=True)):
        left, upper = _MARGIN + number % columns * cell[0], top + number // columns * cell[1]
        pen.text((left, upper), caption, fill="black")
        sheet.paste(Image.fromarray(frame), (left, upper + _LINE))
        sheet.paste(Image.fromarray(colour_flow(flow, largest)), (left, upper + _LINE + height))
    return sheet


def picture_rows(rows: Sequence[Sequence[Picture]], columns: Sequence[str], title: str, largest: float) -> Image.Image:
    """Pictures of one size in rows under the names of their columns, with the meaning of the colours above.

    Args:
        rows: Each as long as ``columns``, of (H,W,3) uint8 RGB.
        columns: Names.
        title: Above all.
        largest: Length of the full colour, pixels.
    """
    height, width = rows[0][0].shape[:2]
    pen_width = max(ImageDraw.Draw(Image.new("RGB", (1, 1))).textlength(name) for name in columns)
    cell = (max(width, int(pen_width)) + _MARGIN, height + _MARGIN)
    top = _WHEEL + 2 * _MARGIN + _LINE
    sheet = Image.new("RGB", (max(len(columns) * cell[0] + _MARGIN, 320), top + len(rows) * cell[1]), "white")
    pen = ImageDraw.Draw(sheet)
    sheet.paste(Image.fromarray(wheel(_WHEEL)), (_MARGIN, _MARGIN))
    pen.text((_WHEEL + 2 * _MARGIN, _MARGIN), title, fill="black")
    pen.text((_WHEEL + 2 * _MARGIN, _MARGIN + _LINE), f"full colour: {largest:.3g} px", fill="black")
    for column, name in enumerate(columns):
        left = _MARGIN + column * cell[0]
        pen.text((left, top - _LINE), name, fill="black")
        for line, row in enumerate(rows):
            sheet.paste(Image.fromarray(row[column]), (left, top + line * cell[1]))
    return sheet
