"""Pickles of numpy arrays, read without running any code of theirs.

Caffe2's zoos publish their weights as plain pickles. Only the names of :data:`ALLOWED` are known here, and each stands
for a function of this module (or an ordered dict) that checks what it is given; any other name is refused.
"""

from __future__ import annotations

import io
import math
import mmap
import pickle
import pickletools
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, Literal, cast

import numpy as np
import torch
from torch import Tensor

MAX_OPCODES = 2_000_000
"""A file of weights has some thousands; each costs memory."""

_TYPE_CODES = {"f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "b1"}


class RefusedPickleError(Exception):
    """A pickle that asks for something other than arrays and plain values; the text is what it asks for."""


class _Type:
    """What a pickled ``numpy.dtype`` becomes."""

    def __init__(self, code: str = "", *_flags: object) -> None:
        name = str(code).lstrip("<>|=")
        if name not in _TYPE_CODES:
            raise RefusedPickleError(f"numpy arrays of type {code!r}")
        self.numpy = np.dtype(name).newbyteorder("<")

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        """(version, byte order, …): only the order matters for plain numbers."""
        if state[1] == ">":
            self.numpy = self.numpy.newbyteorder(">")


class _Array:
    """What a pickled ``numpy.ndarray`` becomes; its contents are decoded when all is read."""

    def __init__(self, *_arguments: object) -> None:
        self.shape: tuple[int, ...] = ()
        self.order: Literal["C", "F"] = "C"
        self.type = _Type("u1")
        self.data: bytes | str = b""

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        """(version, shape, dtype, Fortran order, contents)."""
        _, shape, kind, fortran, data = state
        if not isinstance(kind, _Type) or not isinstance(data, bytes | str):
            raise ValueError("an array of a strange type")
        if not all(isinstance(size, int) and size >= 0 for size in shape):
            raise ValueError("an array of a strange shape")
        if math.prod(shape) * kind.numpy.itemsize != len(data):
            raise ValueError("an array whose shape and contents differ")
        self.shape, self.type, self.order, self.data = tuple(shape), kind, "F" if fortran else "C", data

    def tensor(self) -> Tensor:
        """A copy of the contents, in this machine's byte order."""
        raw = self.data.encode("latin1") if isinstance(self.data, str) else self.data
        values = np.frombuffer(raw, self.type.numpy).reshape(self.shape, order=self.order)
        return torch.from_numpy(np.array(values, dtype=values.dtype.newbyteorder("="), order="C"))


def _scalar(dtype: _Type, data: bytes | str) -> float | int | bool:
    raw = data.encode("latin1") if isinstance(data, str) else data
    if not isinstance(dtype, _Type) or len(raw) != dtype.numpy.itemsize:
        raise ValueError("a number whose type and bytes differ")
    return cast(float, np.frombuffer(raw, dtype.numpy)[0].item())


def _reconstruct(kind: type, *_arguments: object) -> _Array:
    if kind is not _Array:
        raise RefusedPickleError("an array of another class than numpy.ndarray")
    return _Array()


ALLOWED: Mapping[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("numpy", "dtype"): _Type,
    ("numpy", "ndarray"): _Array,
    **{
        (f"numpy.{core}.multiarray", name): stand_in
        for core in ("core", "_core")
        for name, stand_in in (("_reconstruct", _reconstruct), ("scalar", _scalar))
    },
}
"""(module, name) as they stand in pickles → what is called in their place; each file adds ``_codecs.encode``."""


class _Unpickler(pickle.Unpickler):
    """Knows the names of :data:`ALLOWED` and nothing else."""

    def __init__(self, file: Any, limit: int) -> None:
        super().__init__(file, encoding="latin1")
        self.left = limit

    def find_class(self, module: str, name: str) -> Any:
        """The stand-in for a name.

        Raises:
            RefusedPickleError: There is none.
        """
        if module == "_codecs" and name == "encode":
            return self._encode
        if (module, name) not in ALLOWED:
            raise RefusedPickleError(f"{module}.{name}")
        return ALLOWED[module, name]

    def _encode(self, text: str, encoding: str) -> bytes:
        """How Python 3 writes bytes into old pickles; together they cannot be more than the file holds."""
        self.left -= len(text)
        if encoding != "latin1" or self.left < 0:
            raise RefusedPickleError("more text than the file holds")
        return text.encode("latin1")


def first_object(path: Path) -> Any:
    """The first object of a pickle: numbers, text, lists, dicts and tensors (from numpy arrays).

    Args:
        path: The file. It is mapped, so that no length written in it can ask for more memory than it has bytes.

    Raises:
        RefusedPickleError: It names anything else.
        Exception: It is truncated or damaged.
    """
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        _check_opcodes(data)
        data.seek(0)
        return _as_tensors(_Unpickler(data, len(data)).load(), [len(data)])


def _check_opcodes(data: mmap.mmap) -> None:
    """Memo numbers make the unpickler allocate: they must not be larger than the number of opcodes."""
    highest = 0
    for count, (opcode, argument, _) in enumerate(pickletools.genops(cast(BinaryIO, _Steady(data)))):
        if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT"):
            highest = max(highest, int(argument or 0))
        if count > MAX_OPCODES or highest > count + 1:
            raise RefusedPickleError("more memory than a file of weights needs")


class _Steady(io.RawIOBase):
    """A mapped file for pickletools, which copies all that it reads."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data = data

    def read(self, size: int = -1) -> bytes:
        """At most ``size`` bytes."""
        return self.data.read(size)

    def readline(self, size: int | None = -1) -> bytes:
        """Up to the end of the line."""
        return self.data.readline()

    def tell(self) -> int:
        """Where it stands."""
        return self.data.tell()


def _as_tensors(value: Any, left: list[int], depth: int = 0) -> Any:
    """Arrays become tensors, in the outer two levels of dicts, where weights are.

    ``left``: bytes that may still be decoded; many arrays cannot share contents and grow beyond the file.
    """
    if isinstance(value, _Array):
        left[0] -= len(value.data)
        if left[0] < 0:
            raise RefusedPickleError("more values than the file holds")
        return value.tensor()
    if isinstance(value, dict) and depth < 2:
        return {key: _as_tensors(item, left, depth + 1) for key, item in value.items()}
    return value
