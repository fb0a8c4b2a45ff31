"""TensorFlow's checkpoints (``model.ckpt.index`` and ``model.ckpt.data-00000-of-00001``), read without TensorFlow.

The index is a sorted table (LevelDB's format) from names to protocol buffers with type, shape, place and checksum; the
data files hold the bare values. Sources: TensorFlow ``core/util/tensor_bundle/tensor_bundle.h``,
``core/protobuf/tensor_bundle.proto``, ``core/lib/io/table``; LevelDB ``doc/table_format.md``.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from distinit_plugin.weights.crc32c import crc32c

MAGIC = struct.pack("<Q", 0xDB4775248B80FB57)
FOOTER = 48  # bytes: two handles, padding, the magic number
BLOCK_TRAILER = 5  # bytes: kind of compression, checksum
MAX_INDEX = 64 << 20
"""Bytes. The index of I3D has 11 thousand."""

_TYPES: dict[int, torch.dtype] = {
    1: torch.float32,
    2: torch.float64,
    3: torch.int32,
    4: torch.uint8,
    6: torch.int8,
    9: torch.int64,
    10: torch.bool,
    14: torch.bfloat16,
    19: torch.float16,
}
"""TensorFlow's numbers of types; variables of other types (text) are no weights and are passed over."""


class Entry(NamedTuple):
    """Where one variable is."""

    dtype: int
    shape: tuple[int, ...]
    shard: int
    offset: int
    size: int
    checksum: int


def is_index(path: Path) -> bool:
    """Whether a file is the index of such a checkpoint, by its last bytes."""
    with open(path, "rb") as file:
        file.seek(0, 2)
        if file.tell() < FOOTER:
            return False
        file.seek(-len(MAGIC), 2)
        return file.read() == MAGIC


def index_of(path: Path) -> Path | None:
    """The index that a name means: itself, or beside ``model.ckpt`` or ``model.ckpt.data-00000-of-00001``."""
    if path.name.endswith(".index"):
        return path
    prefix = path.name.partition(".data-")[0]
    index = path.with_name(f"{prefix}.index")
    return index if index.is_file() else None


def read_variables(index: Path) -> dict[str, Tensor]:
    """All numeric variables, with their checksums checked.

    Raises:
        FileNotFoundError: A data file is missing.
        ValueError: Anything is damaged, truncated or of a kind that is not published.
    """
    entries, num_shards = read_index(index)
    prefix = index.name.removesuffix(".index")
    shards: dict[int, mmap.mmap] = {}
    variables = {}
    try:
        for name, entry in entries.items():
            if entry.dtype not in _TYPES:
                continue
            if entry.shard not in shards:
                path = index.with_name(f"{prefix}.data-{entry.shard:05d}-of-{num_shards:05d}")
                with open(path, "rb") as file:
                    shards[entry.shard] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            variables[name] = _read_variable(name, entry, shards[entry.shard])
    finally:
        for shard in shards.values():
            shard.close()
    return variables


def read_index(path: Path) -> tuple[dict[str, Entry], int]:
    """Name → place of each variable, and the number of data files.

    Raises:
        ValueError: The index is damaged.
    """
    if path.stat().st_size > MAX_INDEX:
        raise ValueError("its index is larger than any index of weights")
    data = path.read_bytes()
    if len(data) < FOOTER or data[-len(MAGIC) :] != MAGIC:
        raise ValueError("its index has no end: it is truncated")
    try:
        rows = dict(_rows(data))
        header = _fields(rows.pop(b""))
        entries = {name.decode("utf-8"): _entry(value) for name, value in rows.items()}
    except (IndexError, KeyError, TypeError, struct.error, UnicodeDecodeError) as error:
        raise ValueError("its index is damaged") from error
    if header.get(2, [0])[0]:
        raise ValueError("it was written on a big-endian machine")
    num_shards = header[1][0] if 1 in header else 1
    if not isinstance(num_shards, int) or not 0 < num_shards < 1 << 16:
        raise ValueError("its index is damaged")
    return entries, num_shards


def _read_variable(name: str, entry: Entry, data: mmap.mmap) -> Tensor:
    dtype = _TYPES[entry.dtype]
    if math.prod(entry.shape) * dtype.itemsize != entry.size:
        raise ValueError(f"the size of {name} does not fit its shape")
    if entry.offset + entry.size > len(data):
        raise ValueError(f"{name} is beyond the end of the data file: it is truncated")
    raw = data[entry.offset : entry.offset + entry.size]
    if _unmask(entry.checksum) != crc32c(raw):
        raise ValueError(f"{name} has a wrong checksum")
    values = torch.from_numpy(np.frombuffer(raw, np.uint8).copy()).view(dtype)
    return values.reshape(entry.shape)


def _unmask(masked: int) -> int:
    """Stored checksums are rotated by 15 bits and shifted by a constant."""
    rotated = (masked - 0xA282EAD8) & 0xFFFFFFFF
    return ((rotated >> 17) | (rotated << 15)) & 0xFFFFFFFF


# ---------------------------------------------------------------------------------------------------- sorted table
def _rows(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    footer = data[-FOOTER:]
    _, at = _varint(footer, 0)  # the meta-index's place and size are of no use
    _, at = _varint(footer, at)
    offset, at = _varint(footer, at)
    size, at = _varint(footer, at)
    for _, handle in _block(data, offset, size):
        offset, at = _varint(handle, 0)
        size, at = _varint(handle, at)
        yield from _block(data, offset, size)


def _block(data: bytes, offset: int, size: int) -> Iterator[tuple[bytes, bytes]]:
    """Rows of one block: each key is given as what it shares with the one before and the rest."""
    end = offset + size
    if end + BLOCK_TRAILER > len(data):
        raise ValueError("its index is truncated")
    if data[end] != 0:
        raise ValueError("its index is compressed, which is not supported")
    (masked,) = struct.unpack_from("<I", data, end + 1)
    if _unmask(masked) != crc32c(data[offset : end + 1]):
        raise ValueError("its index has a wrong checksum")
    (num_restarts,) = struct.unpack_from("<I", data, end - 4)
    stop = end - 4 - 4 * num_restarts
    at, key = offset, b""
    while at < stop:
        shared, at = _varint(data, at)
        rest, at = _varint(data, at)
        length, at = _varint(data, at)
        if at + rest + length > stop or shared > len(key):
            raise ValueError("its index is damaged")
        key = key[:shared] + data[at : at + rest]
        yield key, data[at + rest : at + rest + length]
        at += rest + length


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """A number in groups of 7 bits, lowest first; returns it and what comes after."""
    value = 0
    for shift in range(0, 70, 7):
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise ValueError("its index is damaged")


# ------------------------------------------------------------------------------------------------ protocol buffers
def _fields(data: bytes) -> dict[int, list[int | bytes]]:
    """Field number → values, of one message."""
    found: dict[int, list[int | bytes]] = {}
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        value: int | bytes
        if tag & 7 == 0:
            value, at = _varint(data, at)
        elif tag & 7 == 2:
            length, at = _varint(data, at)
            value, at = data[at : at + length], at + length
        elif tag & 7 in (1, 5):
            width = 8 if tag & 7 == 1 else 4
            value, at = int.from_bytes(data[at : at + width], "little"), at + width
        else:
            raise ValueError("its index is damaged")
        found.setdefault(tag >> 3, []).append(value)
    return found


def _entry(data: bytes) -> Entry:
    fields = _fields(data)
    if 7 in fields:
        raise ValueError("it has variables in slices, which is not supported")

    def number(field: int) -> int:
        value = fields.get(field, [0])[-1]
        if not isinstance(value, int):
            raise TypeError("a number was expected")
        return value

    sizes = []
    for shape in fields.get(2, []):
        for dimension in _fields(_bytes(shape)).get(2, []):
            size = _fields(_bytes(dimension)).get(1, [0])[-1]
            if not isinstance(size, int) or size >= 1 << 40:
                raise ValueError("its index is damaged")
            sizes.append(size)
    return Entry(number(1), tuple(sizes), number(3), number(4), number(5), number(6))


def _bytes(value: int | bytes) -> bytes:
    if not isinstance(value, bytes):
        raise TypeError("a message was expected")
    return value
