"""Folders of made data: a manifest tells what is in them, and nothing of anybody else is ever removed."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import BinaryIO, TypeVar

import av
import numpy as np
from numpy.typing import NDArray

from distinit_plugin.errors import UserError
from distinit_plugin.files import LOCK_FILE, write_file, write_text, writing_alone
from distinit_plugin.models.hardware import cpu_flags

Progress = Callable[[int, int], None]
"""Told files done, and files in all."""

FPS = 25
MANIFEST = "manifest.json"
UNFINISHED = "manifest.json.unfinished"
"""Lies in the folder from the first file to the manifest, and tells a stopped run from somebody else's folder."""

COMPRESSED: Mapping[str, str] = {"crf": "20", "preset": "veryfast"}
"""Options of libx264: clearly compressed, digits still readable."""

_Job = TypeVar("_Job")


def fill_folder(root: Path, wanted: Mapping[str, int], subfolders: Collection[str], fill: Callable[[], None]) -> None:
    """Make a folder's data, unless the manifest says that the same data are there already.

    The manifest is written last, by renaming: without it the folder is made again, so that a run that was stopped in
    the middle does no harm.

    Args:
        root: The folder; made if missing. It must be empty or hold data that this function made, which are replaced
            when they are others.
        wanted: What determines the data.
        subfolders: Emptied, for the files.
        fill: Writes everything.

    Raises:
        UserError: The folder holds other files, cannot be made, or another process is filling it.
    """
    if _read_manifest(root / MANIFEST) == wanted:
        return
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{root} cannot be made: {error.strerror}. Name another folder.") from error
    with writing_alone(root, "the data"):
        if _read_manifest(root / MANIFEST) == wanted:  # another process was faster
            return
        _claim(root)
        for name in subfolders:
            shutil.rmtree(root / name, ignore_errors=True)
            (root / name).mkdir()
        fill()
        write_text(root / MANIFEST, json.dumps(wanted, indent=2) + "\n")
        (root / UNFINISHED).unlink()


def check_numbers(wanted: Mapping[str, int], minimum: Mapping[str, int]) -> None:
    """Raise :class:`UserError` when a number is too small (the least is 1 where none is given), or a side odd."""
    for name, value in wanted.items():
        least = minimum.get(name, 1)
        if value < least:
            raise UserError(f"{name} is {value}; the data of the demonstration need at least {least}.")
    for name in ("size", "height", "width"):
        if wanted.get(name, 0) % 2:
            raise UserError(f"{name} is {wanted[name]}; H.264 with 4:2:0 colours needs an even number of pixels.")


def make_files(make: Callable[[_Job], None], jobs: Sequence[_Job], on_progress: Progress | None) -> None:
    """Call ``make`` for every job in a few threads: encoding and drawing leave Python's lock."""
    with ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1)) as executor:
        for done, _ in enumerate(executor.map(make, jobs), start=1):
            if on_progress is not None:
                on_progress(done, len(jobs))


def encode_h264(
    frames: NDArray[np.uint8], path: Path, *, group: int = 12, options: Mapping[str, str] = COMPRESSED
) -> None:
    """Write (T,H,W,3) RGB frames as H.264 in an mp4 file.

    Args:
        frames: The pictures.
        path: The file.
        group: Frames of a group of pictures; 1: each is coded by itself.
        options: Of libx264.

    Raises:
        UserError: PyAV was built without libx264, or the file cannot be written.
    """
    # The manifest tells whether the folder is whole, so that the videos need not be flushed one by one.
    write_file(path, lambda file: _encode(frames, file, group, options), durable=False)


def _encode(frames: NDArray[np.uint8], file: BinaryIO, group: int, options: Mapping[str, str]) -> None:
    with av.open(file, "w", format="mp4") as container:
        try:
            stream = container.add_stream("libx264", rate=FPS)
        except (av.FFmpegError, ValueError) as error:
            raise UserError(
                "The demonstration encodes its own videos, but this PyAV has no H.264 encoder (libx264). "
                "Install PyAV's binary wheel: pip install --force-reinstall --only-binary av av."
            ) from error
        assert isinstance(stream, av.VideoStream)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        # One thread: the bits must not depend on the machine's number of cores.
        stream.codec_context.thread_count = 1
        stream.codec_context.gop_size = group
        stream.options = {**options, **_same_bits()}
        for number, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, FPS)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


@cache
def _same_bits() -> dict[str, str]:
    """Options with which libx264 writes the same bits each time.

    Its AVX-512 code does not (x264 core 165, pictures of 48 to 112 pixels: up to nine different files of twelve calls,
    which also decode to different pixels); its AVX2 code does, and is as fast on pictures as small as ours.
    """
    return {"x264-params": "asm=avx2"} if "avx512f" in cpu_flags() else {}


def _claim(root: Path) -> None:
    """Make the folder ours. Somebody's own folders ``train`` and ``test`` must never be emptied."""
    holds_files = any(path.name != LOCK_FILE for path in root.iterdir())
    if holds_files and not ((root / MANIFEST).exists() or (root / UNFINISHED).exists()):
        raise UserError(
            f"{root} holds files that the demonstration did not write. Name another folder, or empty this one first."
        )
    (root / UNFINISHED).touch()
    (root / MANIFEST).unlink(missing_ok=True)


def _read_manifest(path: Path) -> object:
    """What the manifest says; ``None`` when there is none that can be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
