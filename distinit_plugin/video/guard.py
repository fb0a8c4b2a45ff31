"""What stands between a hostile file and the rest of the program: time limits, file kinds, and one kind of error."""

from __future__ import annotations

import os
import stat
import struct
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Self

import av
from PIL import Image

from distinit_plugin.errors import VideoError

# 8K UHD and a bit. Larger sizes come from damaged headers, and a decoder would allocate several such pictures.
MAX_PIXELS = 36_000_000

# What PyAV, Pillow and NumPy raise on damaged files (UnicodeDecodeError is a ValueError).
_FILE_ERRORS = (
    av.error.FFmpegError,
    ArithmeticError,
    AssertionError,
    EOFError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    SyntaxError,  # Pillow, on broken PNG chunks
    TypeError,
    ValueError,
    Image.DecompressionBombError,
    struct.error,
    zlib.error,
)

_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a fifo"),
    (stat.S_ISCHR, "a character device"),
    (stat.S_ISBLK, "a block device"),
    (stat.S_ISSOCK, "a socket"),
)


class Closing:
    """Closes itself at the end of a ``with`` statement."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Nothing stays open between uses, unless a subclass says otherwise."""


class Deadline:
    """The moment at which work on one file has taken too long."""

    def __init__(self, path: str, seconds: float | None) -> None:
        """Start the clock.

        Args:
            path: The file, for the error.
            seconds: Time allowed; ``None``: no limit.
        """
        self.path = path
        self.seconds = seconds
        self.restart()

    def restart(self) -> None:
        """All of the time is left again."""
        self._end = None if self.seconds is None else time.monotonic() + self.seconds

    def check(self) -> None:
        """Raise VideoError when the time is over."""
        if self._end is not None and time.monotonic() > self._end:
            raise VideoError(self.path, f"took longer than {self.seconds:g} s")


def describe(error: BaseException) -> str:
    """One readable clause for an exception, without Python's or FFmpeg's numbers."""
    if isinstance(error, MemoryError):
        return "needs more memory than there is"
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(str(text).split())


def check_size(width: int, height: int) -> None:
    """Raise ValueError for a picture that no video has, before anything of its size is allocated."""
    if width * height > MAX_PIXELS:
        raise ValueError(f"its size of {width}×{height} is beyond {MAX_PIXELS} pixels")


@contextmanager
def video_errors(path: str, doing: str) -> Iterator[None]:
    """Turn whatever a damaged file makes the decoders raise into a VideoError.

    Args:
        path: The file, for the error.
        doing: What was tried, for the reason: "cannot be opened", "cannot be decoded".
    """
    try:
        yield
    except av.error.ExitError as error:  # raised by the interrupt of a read that took too long
        raise VideoError(path, "took longer than the time allowed") from error
    except _FILE_ERRORS as error:
        raise VideoError(path, f"{doing}: {describe(error)}") from error


def stat_file(path: str) -> os.stat_result:
    """``os.stat`` of a regular, non-empty file.

    Raises:
        VideoError: The path is missing, unreadable, empty, or no regular file (opening a fifo would wait for ever).
    """
    with video_errors(path, "cannot be opened"):
        status = os.stat(path)
    for is_kind, name in _KINDS:
        if is_kind(status.st_mode):
            raise VideoError(path, f"is {name}, not a regular file")
    if status.st_size == 0:
        raise VideoError(path, "is empty (0 bytes)")
    return status
