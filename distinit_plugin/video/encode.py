"""Writing videos: pictures with their times → H.264 in an mp4 file."""

from __future__ import annotations

import os
from collections.abc import Iterable
from fractions import Fraction
from typing import BinaryIO

import av
import numpy as np
from av.video.stream import VideoStream

from distinit_plugin.errors import UserError
from distinit_plugin.files import write_file
from distinit_plugin.video.source import Frames

_TICKS = 90_000
"""Units of time per second: those of MPEG, in which every usual frame rate is a whole number."""

_QUALITY = {"crf": "18", "preset": "veryfast"}
"""Options of libx264: thin lines and letters stay sharp."""


def write_mp4(path: str | os.PathLike[str], pictures: Iterable[tuple[float, Frames]]) -> int:
    """Write pictures as they come; none is kept.

    Args:
        path: The file; what was there stays until the new one is whole.
        pictures: (when it is shown, seconds from the start, increasing; (H,W,3) uint8 RGB). All have the first one's
            size, from which an odd last row or column is cut: H.264 with 4:2:0 colours cannot have it.

    Returns:
        How many there were.

    Raises:
        UserError: There are none, PyAV was built without libx264, or the file cannot be written.
        VideoError: From ``pictures``.
    """
    count = 0

    def write(file: BinaryIO) -> None:
        nonlocal count
        count = _encode(pictures, file, os.fspath(path))

    write_file(path, write)
    return count


def _encode(pictures: Iterable[tuple[float, Frames]], file: BinaryIO, path: str) -> int:
    count, stamp = 0, -1
    with av.open(file, "w", format="mp4") as container:
        stream: VideoStream | None = None
        for seconds, picture in pictures:
            height, width = (max(side - side % 2, 2) for side in picture.shape[:2])
            if stream is None:
                stream = _add_stream(container, height, width)
            even = np.ascontiguousarray(picture[:height, :width])
            if even.shape[:2] != (height, width):  # a picture of a single row or column
                even = np.ascontiguousarray(np.resize(even, (height, width, 3)))
            frame = av.VideoFrame.from_ndarray(even, format="rgb24")
            stamp = max(round(seconds * _TICKS), stamp + 1)
            frame.pts, frame.time_base = stamp, Fraction(1, _TICKS)
            container.mux(stream.encode(frame))
            count += 1
        if stream is None:
            raise UserError(f"there are no frames to write to {path}.")
        container.mux(stream.encode(None))
    return count


def _add_stream(container: av.container.OutputContainer, height: int, width: int) -> VideoStream:
    try:
        stream = container.add_stream("libx264", rate=25, options=dict(_QUALITY))
    except (av.FFmpegError, ValueError) as error:
        raise UserError(
            "this PyAV has no H.264 encoder (libx264). Install PyAV's binary wheel: "
            "pip install --force-reinstall --only-binary av av."
        ) from error
    assert isinstance(stream, VideoStream)
    stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
    stream.codec_context.time_base = Fraction(1, _TICKS)  # frames have times of their own; the rate is only a hint
    return stream
