"""The one way in which files are written: to a temporary name, then renamed, so that a name only holds whole files."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import math
import os
import shutil
import struct
import time
import uuid
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from distinit_plugin.errors import UserError

LOCK_FILE = ".lock"
"""In a folder that cannot be locked itself; it stays there."""

REMOTE_LOCK_SECONDS = 120.0
"""That it is waited for: NFS keeps the lock of a machine that died for about 90 s."""

LOCK_SECONDS = 20.0
"""That another writer of a folder is waited for: processes of a call that was killed end a moment after it."""

UNREADABLE_ARCHIVE = (
    *(OSError, ValueError, LookupError, EOFError, TypeError, AttributeError, RuntimeError, MemoryError),
    *(zipfile.BadZipFile, zlib.error, struct.error),
)
"""What damaged or hostile files of numpy's arrays make their reader raise."""

STALE_SECONDS = 3600.0
"""A temporary of a shared file that is older was left by a killed process: no such file takes this long to write."""


def write_file(
    path: str | os.PathLike[str],
    write: Callable[[BinaryIO], object],
    *,
    shared: bool = False,
    durable: bool = True,
) -> None:
    """Let ``write`` fill a temporary file beside ``path``, then give it that name; missing folders are made.

    What was at ``path`` stays until the new file is whole. The temporary is removed when anything fails; one that a
    killed process left is overwritten by the next write of the same file (``shared``: removed once it is an hour old).

    Args:
        path: The file to be.
        write: Called with the temporary, open for binary writing.
        shared: Several processes may write this (small) file at once: each writes a temporary of its own.
        durable: Survive a power cut too. ``False`` saves some milliseconds where losing the file does no harm.

    Raises:
        UserError: The folder cannot be written or the disk is full; what was at ``path`` is untouched.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp" if shared else f"{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if shared:
            _remove_stale(path)
        try:
            with open(temporary, "wb") as file:
                write(file)
                if durable:
                    file.flush()
                    os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            _remove(temporary)
            raise
        if durable:
            _flush_folder(path.parent)
    except (OSError, RuntimeError) as error:
        # torch reports a failed write (full disk, file size limit) as RuntimeError.
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(
            f"cannot write {path}: {reason}. Free space there or name a place that can be written; what was there "
            "before is untouched."
        ) from error


def write_text(path: str | os.PathLike[str], text: str, *, shared: bool = False, durable: bool = True) -> None:
    """``write_file`` for text, in UTF-8; names of files need not be valid in it and still find their file."""
    content = text.encode("utf-8", "surrogateescape")
    write_file(path, lambda file: file.write(content), shared=shared, durable=durable)


def write_json(path: str | os.PathLike[str], values: Any, *, shared: bool = False) -> None:
    """``write_file`` for JSON: named tuples become objects, NaN and infinities, which JSON has not, null."""
    write_text(path, json.dumps(_plain(values), indent=2, ensure_ascii=False, allow_nan=False) + "\n", shared=shared)


def write_csv(path: str | os.PathLike[str], rows: Iterable[Sequence[Any]], *, shared: bool = False) -> None:
    """``write_file`` for rows of a table, the header among them; what is no finite number stays empty."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(
        ["" if isinstance(value, float) and not math.isfinite(value) else value for value in row] for row in rows
    )
    write_text(path, text.getvalue(), shared=shared)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        return _plain(value._asdict())
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_json(path: str | os.PathLike[str], max_bytes: int) -> dict[str, Any]:
    """The object that a JSON file holds.

    Raises:
        OSError: It cannot be read.
        ValueError: It is larger than ``max_bytes``, no JSON, or no object.
        RecursionError: It is nested too deeply.
    """
    with open(path, "rb") as file:
        text = file.read(max_bytes + 1)
    if len(text) > max_bytes:
        raise ValueError("it is too large")
    values = json.loads(text)
    if not isinstance(values, dict):
        raise ValueError("it is no JSON object")
    return values


def why_unusable(error: Exception) -> str:
    """What an error of ``read_json``, or of looking into its result, says to a person."""
    if isinstance(error, KeyError):
        return f"{error} is missing"
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def replace_folder(temporary: Path, place: Path) -> None:
    """Give a finished folder its name; one that is there goes first (folders cannot change places at once).

    Raises:
        OSError: It cannot be done.
    """
    if place.exists():
        shutil.rmtree(place)
    os.rename(temporary, place)
    _flush_folder(place.parent)


@contextmanager
def writing_alone(folder: str | os.PathLike[str], what: str, *, with_forked: bool = True) -> Iterator[None]:
    """One process (with those that it forks) at a time writes to a folder, which is there.

    Args:
        folder: It.
        what: That is written, for the error.
        with_forked: Others also wait for the processes that this one forks; ``False``: those only read.

    Raises:
        UserError: Another one does, for longer than those of a call that was killed take to end.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    end = time.monotonic() + LOCK_SECONDS
    held: str | None = None
    handle: int | None = os.open(folder, os.O_RDONLY)
    while handle is not None:
        if not with_forked:
            _OWN.add(handle)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError as error:
            if time.monotonic() > end:
                dead = "" if held is None else f" If its machine has died, delete {held}."
                _let_go(handle)
                raise UserError(
                    f"another process is writing {what} to {folder}. Wait for it, or name another folder.{dead}"
                ) from error
            time.sleep(0.2)
        except OSError:
            _let_go(handle)
            handle = None
            if held is None:  # NFS locks only what is open for writing
                held, end = os.path.join(folder, LOCK_FILE), time.monotonic() + REMOTE_LOCK_SECONDS
                handle = _open_lock(held)
    try:
        yield
    finally:
        if handle is not None:
            _let_go(handle)


def _open_lock(path: str) -> int | None:
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError:
        return None


def _let_go(handle: int) -> None:
    _OWN.discard(handle)
    os.close(handle)


def move_file(path: Path, target: Path) -> Path:
    """Move a file within a file system, in place of one that is there; makes the folder and returns ``target``."""
    target.parent.mkdir(parents=True, exist_ok=True)
    os.replace(path, target)
    return target


_OWN: set[int] = set()
"""Open folders whose locks end with this process, whatever it has forked."""


def _close_own() -> None:
    while _OWN:
        with contextlib.suppress(OSError):
            os.close(_OWN.pop())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_own)


def _remove(path: str | os.PathLike[str]) -> None:
    with contextlib.suppress(OSError):
        os.unlink(path)


def _remove_stale(path: Path) -> None:
    """Remove what killed writers of ``path`` left long ago."""
    prefix = f".{path.name}."
    with os.scandir(path.parent) as entries:
        for entry in entries:
            if entry.name.startswith(prefix) and entry.name.endswith(".tmp"):
                with contextlib.suppress(OSError):
                    if time.time() - entry.stat().st_mtime > STALE_SECONDS:
                        os.unlink(entry)


def _flush_folder(folder: Path) -> None:
    """Make a rename survive a power cut; some file systems do not offer it for folders."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    except OSError:
        pass
    finally:
        os.close(handle)
