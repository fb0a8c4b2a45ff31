"""Measurements of convolutions on disk: one JSON file, by hardware and library version, then by convolution."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from distinit_plugin.errors import UserError
from distinit_plugin.files import write_text

logger = logging.getLogger(__name__)

Errors = tuple[float, float, float]
"""Relative Frobenius errors of the output and of the gradients of input and weights; infinite for NaN."""

MAX_BYTES = 16 * 1024 * 1024  # a larger file is not one of ours


class Measurement(NamedTuple):
    """How far each candidate formulation is from fp32, and the seconds its forward and backward take."""

    errors: Mapping[str, Errors]
    seconds: Mapping[str, float]


def read_measurements(path: str, hardware: str) -> dict[str, Measurement]:
    """What was measured on this hardware; a missing or damaged file, or a damaged row, counts as not measured."""
    rows = _read(path).get(hardware)
    if not isinstance(rows, dict):
        return {}
    parsed = {key: _parse(row) for key, row in rows.items()}
    return {key: measurement for key, measurement in parsed.items() if measurement is not None}


def write_measurements(path: str, hardware: str, measurements: Mapping[str, Measurement]) -> None:
    """Add rows; a folder that cannot be written is only warned of."""
    content = _read(path)
    rows = content.get(hardware)
    merged = dict(rows) if isinstance(rows, dict) else {}
    for key, (errors, seconds) in measurements.items():
        finite = {name: [v if math.isfinite(v) else None for v in values] for name, values in errors.items()}
        merged[key] = {"errors": finite, "seconds": dict(seconds)}
    content[hardware] = merged
    try:
        write_text(path, json.dumps(content, indent=1, ensure_ascii=False), shared=True, durable=False)
    except UserError as error:
        logger.warning("convolution measurements could not be kept: %s", error)


def _read(path: str) -> dict[str, Any]:
    try:
        if Path(path).stat().st_size > MAX_BYTES:
            return {}
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _parse(row: Any) -> Measurement | None:
    try:
        errors = {name: _parse_errors(values) for name, values in row["errors"].items()}
        seconds = {name: float(value) for name, value in row["seconds"].items()}
    except (AttributeError, KeyError, TypeError, ValueError):
        return None
    names = {"conv3d", "conv2d"}
    timed = {name for name in errors if math.isfinite(max(errors[name]))}
    if set(errors) != names or not all(0 <= value < math.inf for value in seconds.values()):
        return None
    return Measurement(errors, seconds) if not seconds or timed <= set(seconds) <= names else None


def _parse_errors(values: Any) -> Errors:
    output, input_grad, weight_grad = (math.inf if value is None else float(value) for value in values)
    if not min(output, input_grad, weight_grad) >= 0:  # NaN too
        raise ValueError("errors are not negative")
    return output, input_grad, weight_grad
