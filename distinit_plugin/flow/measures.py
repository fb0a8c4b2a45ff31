"""How far two flows are apart, and Middlebury's ``.flo`` files.

Baker et al., "A Database and Evaluation Methodology for Optical Flow", IJCV 2011 (https://vision.middlebury.edu/flow/).
"""

from __future__ import annotations

import os
import struct

import numpy as np
import torch
from torch import Tensor

from distinit_plugin.errors import UserError
from distinit_plugin.files import write_file

UNKNOWN = 1e9
"""Flow with a component beyond it (or not a number) is unknown, as Middlebury marks it."""

MAGIC = b"PIEH"
"""The first bytes of a ``.flo`` file: 202021.25 as a float."""

HEADER = struct.Struct("<4sii")
"""Magic, width, height."""

MAX_SIDE = 2**15
"""Pixels; a header with more is damaged."""


def known_flow(flow: Tensor) -> Tensor:
    """Where a flow (…,2,H,W) is known, (…,H,W)."""
    return (flow.abs() <= UNKNOWN).all(-3)  # false for NaN, too


def end_point_differences(flow: Tensor, reference: Tensor) -> Tensor:
    """‖flow − reference‖₂ of every pixel.

    Args:
        flow: (…,2,H,W), pixels.
        reference: Likewise.

    Returns:
        (…,H,W), pixels.
    """
    return torch.linalg.vector_norm(flow - reference, dim=-3)


def end_point_error(flow: Tensor, reference: Tensor, valid: Tensor | None = None) -> float:
    """Mean end-point error (EPE) over valid pixels, in pixels.

    Args:
        flow: (…,2,H,W), pixels.
        reference: Likewise.
        valid: (…,H,W), boolean; by default where ``reference`` is known.

    Raises:
        UserError: Shapes that do not fit, or no valid pixel.
    """
    return _mean(end_point_differences(*_fitting(flow, reference)), reference, valid)


def angular_error(flow: Tensor, reference: Tensor, valid: Tensor | None = None) -> float:
    """Mean angle between (u,v,1) and the reference's over valid pixels, in degrees.

    Barron et al., "Performance of Optical Flow Techniques", IJCV 1994. Arguments and errors as ``end_point_error``.
    """
    flow, reference = (
        torch.nn.functional.pad(tensor.double(), (0, 0, 0, 0, 0, 1), value=1.0) for tensor in _fitting(flow, reference)
    )
    # The angle from sine and cosine together: an arc cosine alone is inexact for small angles.
    sine = torch.linalg.vector_norm(torch.linalg.cross(flow, reference, dim=-3), dim=-3)
    angle = torch.atan2(sine, (flow * reference).sum(-3)).rad2deg()
    return _mean(angle, reference, valid)


def _fitting(flow: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    if flow.shape != reference.shape or flow.ndim < 3 or flow.shape[-3] != 2:
        raise UserError(
            f"flows of {tuple(flow.shape)} and {tuple(reference.shape)} cannot be compared: both must be (…,2,H,W) of "
            "one size."
        )
    return flow, reference


def _mean(values: Tensor, reference: Tensor, valid: Tensor | None) -> float:
    valid = known_flow(reference) if valid is None else valid
    if valid.shape != values.shape:
        raise UserError(f"a mask of {tuple(valid.shape)} does not fit a flow of {tuple(values.shape)} pixels.")
    if not valid.any():
        raise UserError("no pixel of the reference flow is known: there is nothing to compare with.")
    return float(values[valid].double().mean())


def read_flo(path: str | os.PathLike[str]) -> Tensor:
    """A ``.flo`` file.

    Returns:
        (2,H,W), float32, (u,v) in pixels; unknown flow as it is in the file.

    Raises:
        UserError: The file is missing, not a ``.flo`` file, truncated, or longer than its size says.
    """
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            header = file.read(HEADER.size)
            if len(header) < HEADER.size or not header.startswith(MAGIC):
                raise UserError(f"{os.fspath(path)} is not a .flo file: it does not begin with PIEH and a size.")
            _, width, height = HEADER.unpack(header)
            if not (1 <= width <= MAX_SIDE and 1 <= height <= MAX_SIDE):
                raise UserError(f"{os.fspath(path)} is damaged: its header says {width}×{height} pixels.")
            expected = HEADER.size + 8 * width * height
            if size != expected:
                raise UserError(
                    f"{os.fspath(path)} is damaged: {width}×{height} pixels make {expected} bytes, and it has {size}. "
                    "Copy it again."
                )
            content = file.read(expected - HEADER.size)
    except OSError as error:
        raise UserError(f"{os.fspath(path)} cannot be read: {error.strerror}.") from error
    values = np.frombuffer(content, "<f4").astype(np.float32).reshape(height, width, 2)
    return torch.from_numpy(values).permute(2, 0, 1).contiguous()


def write_flo(path: str | os.PathLike[str], flow: Tensor) -> None:
    """Write a flow (2,H,W), (u,v) in pixels, as a ``.flo`` file.

    Raises:
        UserError: A tensor of another shape, or a file that cannot be written.
    """
    if flow.ndim != 3 or flow.shape[0] != 2 or not 1 <= min(flow.shape[1:]) <= max(flow.shape[1:]) <= MAX_SIDE:
        raise UserError(f"a .flo file holds a flow (2,H,W), not {tuple(flow.shape)}.")
    _, height, width = flow.shape
    values = flow.detach().permute(1, 2, 0).to("cpu", torch.float32).contiguous().numpy().astype("<f4")
    write_file(path, lambda file: file.write(HEADER.pack(MAGIC, width, height) + values.tobytes()))
