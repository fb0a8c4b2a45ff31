"""The flow of one video as one file: a lossless video in Matroska that any player shows, u above v, in gray.

Picture i is flow i at i/25 s. Every picture can be decoded by itself. A tag says, in JSON, how the flow was made and
from what, and has a checksum of each picture; nothing in the file depends on when or where it was written.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

import av
import numpy as np
from av.codec.context import Flags
from av.container import InputContainer, OutputContainer
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from distinit_plugin.errors import UserError, VideoError
from distinit_plugin.files import write_file
from distinit_plugin.flow.codes import Codes, Quantiser
from distinit_plugin.flow.source import MissingFlowError, kept_numbers
from distinit_plugin.video.guard import MAX_PIXELS, Closing, Deadline, check_size, stat_file, video_errors
from distinit_plugin.video.images import WHOLE, Window, window_size
from distinit_plugin.video.index import Int64Array, packets_of

SUFFIX = ".flow.mkv"

TAG = "DISTINIT_FLOW"
"""The tag that describes the flow."""

FORMAT_VERSION = 1

_RATE = 25
_PICTURE_MS = 1000 // _RATE
"""Matroska's time stamps are milliseconds."""

_GRAY = "gray"
_GIVEN = (_GRAY, "yuv420p", "yuvj420p")
"""What decoders make of gray: FFmpeg's for H.264 adds colours that say nothing."""
_FULL_RANGE = 2
_CHECKSUMS = "<u4"

_ENCODERS = {
    # Arithmetic coding would save a tenth and double the time of reading.
    "h264": ("libx264", {"qp": "0", "preset": "veryfast", "coder": "0", "threads": "1"}),
    "ffv1": ("ffv1", {"level": "3", "coder": "1", "context": "0", "slices": "4", "slicecrc": "1"}),
}
CODECS = tuple(_ENCODERS)
"""Both are lossless. H.264 is read in less than half of the time, FFV1 needs two thirds of the space."""

# Bit-exact: no dates, no random numbers. A cluster per picture: a seek need not pass over others.
_MUXER = {"fflags": "bitexact", "cluster_time_limit": "0"}
_OPENING = {
    "format_whitelist": "matroska,webm",
    "protocol_whitelist": "file",
    "codec_whitelist": "none",  # the header says all; decoding is checked below
    "analyzeduration": "1",
    "max_pixels": str(MAX_PIXELS),
}
_DECODER = {"max_pixels": str(MAX_PIXELS), "err_detect": "explode"}
_FEW_PICTURES = 4
"""Reading on over so few pictures is no slower than a seek."""


def write_entry(
    path: str | os.PathLike[str],
    flows: Iterable[Codes],
    description: Callable[[], Mapping[str, Any]],
    *,
    codec: str = "h264",
) -> int:
    """Encode the flow of a video; what was at ``path`` stays until the new file is whole.

    Args:
        path: The file to be, ending with ``SUFFIX``.
        flows: Each (H,W,2) uint8, at least one.
        description: What the tag says beside the version and the number of flows; called when all flows are there.
        codec: One of ``CODECS``.

    Returns:
        Size of the file, bytes.

    Raises:
        UserError: The folder cannot be written or the disk is full.
    """
    place = Path(path)
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        scratch = tempfile.TemporaryFile(dir=place.parent, prefix=".flow-", suffix=".tmp")  # noqa: SIM115
    except OSError as error:
        raise _unwritable(place, error) from error
    try:
        height, width = _encode(flows, scratch, codec)
        sums = _checksums(scratch)
        told = {**description(), "version": FORMAT_VERSION, "flows": len(sums), "height": height, "width": width}
        told["crc32"] = base64.b64encode(np.array(sums, dtype=_CHECKSUMS).tobytes()).decode("ascii")
        write_file(place, lambda file: _copy_tagged(scratch, file, json.dumps(told, sort_keys=True)))
    except OSError as error:
        raise _unwritable(place, error) from error
    finally:
        with contextlib.suppress(OSError):  # what a full disk did not take is lost anyway
            scratch.close()
    return place.stat().st_size


def _unwritable(path: Path, error: OSError) -> UserError:
    return UserError(
        f"cannot write {path}: {error.strerror or error}. Free space there or name a place that can be written; what "
        "is finished stays."
    )


class _Watched:
    """A file for FFmpeg that remembers the first failed write, which FFmpeg may not report."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.error: OSError | None = None
        self.seek, self.tell = file.seek, file.tell

    def write(self, data: bytes) -> int:
        try:
            return self._file.write(data)
        except OSError as error:
            self.error = self.error or error
            raise

    def check(self) -> None:
        """Write what is buffered; raise what a write raised."""
        if self.error is not None:
            raise self.error
        self._file.flush()


def _encode(flows: Iterable[Codes], scratch: IO[bytes], codec: str) -> tuple[int, int]:
    """Encode into a container without a tag; height and width of the flow."""
    encoder, options = _ENCODERS[codec]
    rest = iter(flows)
    first = next(rest)
    height, width = first.shape[:2]
    watched = _Watched(scratch)
    with _muxer(watched) as container:
        try:
            stream = container.add_stream(encoder, rate=_RATE, options=dict(options))
        except av.codec.codec.UnknownCodecError as error:
            others = ", ".join(name for name in CODECS if name != codec)
            raise UserError(
                f"this installation of PyAV has no encoder {encoder}. Choose another codec: {others}."
            ) from error
        assert isinstance(stream, VideoStream)
        stream.height, stream.width, stream.pix_fmt, stream.gop_size = 2 * height, _even(width), _GRAY, 1
        stream.codec_context.color_range = _FULL_RANGE
        stream.codec_context.flags |= Flags.bitexact
        stream.thread_type = "NONE"
        for number, codes in enumerate(chain([first], rest)):
            assert codes.shape == first.shape, "all flows have one size"
            both = np.concatenate([codes[..., 0], codes[..., 1]])
            both = np.pad(both, ((0, 0), (0, width % 2)), mode="edge")  # H.264 has no odd widths
            picture = VideoFrame.from_ndarray(both, format=_GRAY)
            picture.pts, picture.color_range = number, _FULL_RANGE
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
    watched.check()
    return height, width


def _even(number: int) -> int:
    return number + number % 2


def _checksums(scratch: IO[bytes]) -> list[int]:
    """Of each encoded picture."""
    scratch.seek(0)
    with _demuxer(scratch) as container:
        packets = packets_of(container, container.streams.video[0])
        return [zlib.crc32(bytes(packet)) for packet in packets if packet.size]


def _copy_tagged(scratch: IO[bytes], file: BinaryIO, text: str) -> None:
    watched = _Watched(file)
    scratch.seek(0)
    with _demuxer(scratch) as old, _muxer(watched) as new:
        stream = old.streams.video[0]
        copy = new.add_stream_from_template(stream)
        new.metadata[TAG] = text
        for packet in packets_of(old, stream):
            if packet.size:
                packet.stream = copy
                new.mux(packet)
    watched.check()


def _demuxer(file: IO[bytes]) -> InputContainer:
    return cast(InputContainer, av.open(file, options=dict(_OPENING)))


def _muxer(file: _Watched) -> OutputContainer:
    return av.open(file, "w", format="matroska", options=dict(_MUXER))


class EntryReader(Closing):
    """The flow of one video from its file, see ``FlowSource``.

    Attributes:
        path: The video, or the file itself where no video is known.
        entry: The file.
        description: What the tag says.
    """

    def __init__(self, entry: str | os.PathLike[str], *, path: str = "", timeout: float | None = None) -> None:
        """Open it and read its tag; no picture is decoded.

        Args:
            entry: The file.
            path: The video, for errors.
            timeout: Seconds that this file may take from now on; ``None``: no limit.

        Raises:
            MissingFlowError: It is not there, damaged, or another kind of file.
        """
        self.entry = os.fspath(entry)
        self.path = path or self.entry
        self._container: InputContainer | None = None
        self._packets: Iterator[Any] = iter(())
        self._next: int | None = None
        self._deadline = Deadline(self.entry, timeout)
        try:
            with video_errors(self.entry, "is damaged or no flow"):
                stat_file(self.entry)
                self._open()
        except VideoError as error:
            self.close()
            raise self._unavailable(error.reason) from error
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the file; more than once is fine."""
        if self._container is not None:
            self._packets = iter(())
            self._container.close()
            self._container = None

    def read(self, indices: Sequence[int] | Int64Array, window: Window = WHOLE) -> Codes:
        """See ``FlowSource.read``."""
        numbers, places = kept_numbers(self.path, indices, self.num_flows)
        try:
            with video_errors(self.entry, "is damaged"):
                rows, columns = window
                out = np.empty((len(numbers), *window_size(self.height, self.width, window), 2), dtype=np.uint8)
                for slot, number in enumerate(numbers.tolist()):
                    picture = self._picture(number)
                    out[slot, ..., 0] = picture[: self.height][rows, columns]
                    out[slot, ..., 1] = picture[self.height :][rows, columns]
        except VideoError as error:
            raise self._unavailable(error.reason) from error
        return out if len(out) == len(places) and (np.diff(places) == 1).all() else out[places]

    def _unavailable(self, reason: str) -> MissingFlowError:
        if self.path == self.entry:
            return MissingFlowError(self.path, reason)
        return MissingFlowError(self.path, f"its flow {self.entry} {reason}")

    def _open(self) -> None:
        # Its own path is absolute: it cannot be taken for a protocol ("http:…").
        place = os.path.abspath(self.entry)
        self._container = av.open(place, options=dict(_OPENING), timeout=self._deadline.seconds)
        text = self._container.metadata.get(TAG)
        if text is None:
            raise ValueError(f"it has no tag {TAG}")
        self.description: dict[str, Any] = dict(json.loads(text))
        if self.description.get("version") != FORMAT_VERSION:
            raise ValueError(
                f"it is of version {self.description.get('version')!r:.20}, this program reads {FORMAT_VERSION}"
            )
        self.num_flows = int(self.description["flows"])
        self._sums = np.frombuffer(base64.b64decode(self.description["crc32"], validate=True), dtype=_CHECKSUMS)
        self.quantiser = Quantiser(float(self.description["bound"]), self.description["rounding"])
        stream = self._container.streams.best("video")
        if not isinstance(stream, VideoStream):
            raise ValueError("there is no video stream in it")
        codec = stream.codec_context
        self.height, self.width = int(self.description["height"]), int(self.description["width"])
        self._shape = (2 * self.height, _even(self.width))
        check_size(*self._shape)
        fits = (codec.height, codec.width) == self._shape and len(self._sums) == self.num_flows
        if not fits or codec.name not in CODECS or min(self.height, self.width, self.num_flows) < 1:
            raise ValueError("its header and its tag do not fit")
        codec.options = dict(_DECODER)
        stream.thread_type = "NONE"
        self._stream = stream

    def _picture(self, number: int) -> Codes:
        """(2H,W): u above v."""
        self._deadline.check()
        assert self._container is not None, "the reader is closed"
        if self._next is None or not 0 <= number - self._next < _FEW_PICTURES:
            self._container.seek(number * _PICTURE_MS, stream=self._stream)
            self._packets = packets_of(self._container, self._stream)
        for packet in self._packets:
            if packet.pts is None or packet.pts < number * _PICTURE_MS:
                continue
            if packet.pts > number * _PICTURE_MS:
                break
            if zlib.crc32(bytes(packet)) != self._sums[number]:
                break
            self._next = number + 1
            for frame in packet.decode():
                return self._plane(frame)
        self._next = None
        raise ValueError(f"flow {number} of {self.num_flows} is missing or changed")

    def _plane(self, frame: VideoFrame) -> Codes:
        if frame.format.name not in _GIVEN or (frame.height, frame.width) != self._shape:
            raise ValueError("its pictures are not of one kind")
        plane = frame.planes[0]
        return np.frombuffer(memoryview(plane), dtype=np.uint8).reshape(frame.height, plane.line_size)[:, : self.width]
