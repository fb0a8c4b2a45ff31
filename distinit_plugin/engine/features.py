"""Rows of features, one per window of a video: what is computed, and the files that they go to."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from distinit_plugin.engine.evaluate import evaluation_mode
from distinit_plugin.errors import UserError
from distinit_plugin.files import write_file
from distinit_plugin.types import ModelOutput

FORMATS = ("npy", "parquet")
POOLED = ("features", "logits")
"""What is asked for by these names is no layer."""

Rows = npt.NDArray[np.void]


def row_type(sizes: Mapping[str, int]) -> np.dtype[np.void]:
    """``start`` and ``end`` in seconds (float64), then each output (D,) float32."""
    return np.dtype([("start", "<f8"), ("end", "<f8"), *((name, "<f4", (size,)) for name, size in sizes.items())])


def outputs_of(network: nn.Module, views: Mapping[str, Tensor], names: Sequence[str]) -> dict[str, Tensor]:
    """``features``, ``logits`` and averaged layers of a batch, each (B,D) fp32 on the CPU.

    Args:
        network: A ``Network`` in eval mode.
        views: Its normalised views.
        names: ``features``, ``logits``, or layers, whose maps are averaged over space and time.

    Raises:
        UserError: A layer does not exist.
    """
    output: ModelOutput = network(views, taps=[name for name in names if name not in POOLED])
    found = {"features": output.features, "logits": output.logits, **{k: v.flatten(2) for k, v in output.taps.items()}}
    result = {}
    for name in names:
        values = found[name]
        assert values is not None
        result[name] = (values.float().mean(2) if values.ndim == 3 else values.float()).cpu()
    return result


def rows_of(
    network: nn.Module,
    batches: Iterable[tuple[Sequence[float], Sequence[float], Mapping[str, Tensor]]],
    names: Sequence[str],
    dtype: np.dtype[np.void],
    *,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> Iterator[Rows]:
    """One array of rows per batch of windows.

    Args:
        network: A ``Network``.
        batches: Starts, ends (seconds) and normalised views of some windows.
        names: As for ``outputs_of``.
        dtype: From ``row_type``.
        autocast: Context of the forward pass.

    Raises:
        UserError: A value is not finite.
    """
    for starts, ends, views in batches:
        with evaluation_mode(network), autocast():
            outputs = outputs_of(network, views, names)
        rows = np.zeros(len(starts), dtype=dtype)
        rows["start"], rows["end"] = starts, ends
        for name, values in outputs.items():
            if not torch.isfinite(values).all():
                raise UserError(
                    f"{name} are not finite: the checkpoint is broken, or this machine's precision too coarse for it."
                )
            rows[name] = values.numpy()
        yield rows


class _ComputingError(Exception):
    """Carries a RuntimeError of the network past the writer, which takes its own for failed writes."""

    def __init__(self, error: RuntimeError) -> None:
        super().__init__()
        self.error = error


def write_rows(path: Path, fmt: str, batches: Iterator[Rows], count: int, dtype: np.dtype[np.void]) -> None:
    """Write rows as they come; the file gets its name when it is whole.

    Args:
        path: The file.
        fmt: ``npy``: one structured array. ``parquet``: one column each, lists of float32.
        batches: Arrays of rows, ``count`` in all.
        count: Number of rows.
        dtype: Of the rows.

    Raises:
        UserError: It cannot be written, or the library for it is missing.
    """
    write = _write_npy if fmt == "npy" else _write_parquet

    def carried() -> Iterator[Rows]:
        try:
            yield from batches
        except RuntimeError as error:
            raise _ComputingError(error) from error

    try:
        write_file(path, lambda file: write(file, carried(), count, dtype))
    except _ComputingError as carrier:
        raise carrier.error from None


def _write_npy(file: BinaryIO, batches: Iterator[Rows], count: int, dtype: np.dtype[np.void]) -> None:
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (count,)}
    np.lib.format.write_array_header_1_0(file, header)
    written = 0
    for rows in batches:
        file.write(rows.tobytes())
        written += len(rows)
    assert written == count, (written, count)


def _write_parquet(file: BinaryIO, batches: Iterator[Rows], count: int, dtype: np.dtype[np.void]) -> None:
    arrow, parquet = import_parquet()
    assert dtype.names is not None
    sizes = {name: dtype[name].shape for name in dtype.names}
    schema = arrow.schema(
        [(n, arrow.list_(arrow.float32(), shape[0]) if shape else arrow.float64()) for n, shape in sizes.items()]
    )
    with parquet.ParquetWriter(file, schema) as writer:
        for rows in batches:
            columns = [
                arrow.FixedSizeListArray.from_arrays(np.ascontiguousarray(rows[name]).reshape(-1), shape[0])
                if shape
                else arrow.array(rows[name])
                for name, shape in sizes.items()
            ]
            writer.write_table(arrow.Table.from_arrays(columns, schema=schema))


def import_parquet() -> tuple[Any, Any]:
    """``pyarrow`` and ``pyarrow.parquet``.

    Raises:
        UserError: The package is not installed.
    """
    try:
        return importlib.import_module("pyarrow"), importlib.import_module("pyarrow.parquet")
    except ImportError as error:
        raise UserError(
            "--format parquet: pyarrow is not installed: pip install 'distinit-plugin[parquet]', or use --format npy."
        ) from error
