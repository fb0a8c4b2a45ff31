"""Which frames a video has, when each is presented, and where decoding can start.

Headers lie about the number of frames, and some containers carry no presentation times, so an index comes from the
packets themselves (one pass that decodes nothing but the first frame) or, where packets do not tell either, from
decoding the file once.
"""

from __future__ import annotations

import logging
import os
import threading
import zlib
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from hashlib import sha256

import numpy as np
import numpy.typing as npt
from av.container import InputContainer
from av.error import FFmpegError
from av.packet import Packet
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from distinit_plugin.errors import UserError, VideoError
from distinit_plugin.files import write_file
from distinit_plugin.video.guard import MAX_PIXELS, Deadline, describe
from distinit_plugin.video.sampling import resample

Int64Array = npt.NDArray[np.int64]

_LOGGER = logging.getLogger(__name__)

# Containers and codecs in which each packet is one presented frame with its presentation time. In the others (AVI,
# raw streams, packed MPEG-4 B-frames, VP8's hidden frames) only the decoder knows.
_TRUE_CONTAINERS = {"mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm"}
_TRUE_CODECS = {"h264", "hevc", "av1", "libdav1d", "libaom-av1", "vp9", "libvpx-vp9"}
# Containers that store time stamps, so that stamps after a seek are those of the first pass.
_STAMPED_CONTAINERS = _TRUE_CONTAINERS | {"avi", "flv", "asf", "mpegts", "mpeg", "ogg"}

# Longer "videos" are broken time stamps; resampling them would fill the memory.
MAX_DURATION = 48 * 3600.0
_FALLBACK_RATE = Fraction(25)


@dataclass(frozen=True, eq=False)
class FrameIndex:
    """The presented frames of one video.

    Attributes:
        pts: (N,) presentation time of each frame, in ``time_base`` units, never decreasing.
        stamps: (N,) the time stamp that the decoder puts on frame i, by which it is recognised after a seek. Equal to
            ``pts`` except in containers whose stamps are not in presentation order (AVI). Empty when stamps are missing
            or repeated: frames are then counted from the start of the file.
        time_base: Seconds per unit of ``pts``.
        height: Presented height, after rotation, pixels.
        width: Presented width, after rotation, pixels.
        rotation: Counter-clockwise turn that presents the coded picture, degrees: 0, 90, 180 or 270.
        key_positions: (M,) indices of frames at which decoding can start, increasing.
        key_seeks: (M,) the time stamps with which the container finds them, in ``time_base`` units.
    """

    pts: Int64Array
    stamps: Int64Array
    time_base: Fraction
    height: int
    width: int
    rotation: int
    key_positions: Int64Array
    key_seeks: Int64Array

    @property
    def num_frames(self) -> int:
        """N, the number of presented frames."""
        return len(self.pts)

    @property
    def seconds(self) -> npt.NDArray[np.float64]:
        """(N,) presentation time of each frame, seconds."""
        return self.pts.astype(np.float64) * float(self.time_base)

    def timeline(self, fps: float | None) -> Int64Array:
        """(T,) source frame of each frame at a rate, see ``sampling.resample``; ``None``: every frame once."""
        return np.arange(self.num_frames) if fps is None else resample(self.seconds, fps)

    def to_array(self) -> Int64Array:
        """All fields as one vector of integers, see ``from_array``."""
        head = [self.time_base.numerator, self.time_base.denominator, self.height, self.width, self.rotation]
        sizes = [len(self.pts), len(self.stamps), len(self.key_positions)]
        parts = [np.array(head + sizes, dtype=np.int64), self.pts, self.stamps, self.key_positions, self.key_seeks]
        return np.concatenate(parts)

    @classmethod
    def from_array(cls, values: Int64Array) -> FrameIndex:
        """Undo ``to_array``.

        Raises:
            ValueError: The vector is not one that ``to_array`` makes.
        """
        numerator, denominator, height, width, rotation, *sizes = (int(value) for value in values[:8])
        num_frames, num_stamps, num_keys = sizes
        lengths = [num_frames, num_stamps, num_keys, num_keys]
        if min(lengths) < 0 or len(values) != 8 + sum(lengths) or num_frames < 1 or denominator < 1:
            raise ValueError("the sizes do not fit")
        pts, stamps, positions, seeks = np.split(values[8:], np.cumsum(lengths)[:-1])
        return cls(pts, stamps, Fraction(numerator, denominator), height, width, rotation, positions, seeks)


class IndexCache:
    """Frame indices of videos already seen: in memory, and in a folder when there is one.

    An entry belongs to a path, a size and a modification time; a changed file is indexed again. Files of the folder
    are written under a temporary name and renamed, so that several processes may share it; one that is damaged is
    ignored and written again.
    """

    def __init__(self, folder: str | None = None, *, memory_bytes: int = 64 << 20) -> None:
        """Make the folder if it is missing.

        Args:
            folder: Where entries outlive the process; ``None``: in memory only.
            memory_bytes: Size of the part in memory; the entries used longest ago go first.

        Raises:
            UserError: The folder cannot be made.
        """
        self.folder = folder or None
        self.memory_bytes = memory_bytes
        self._reset()
        if self.folder is not None:
            try:
                os.makedirs(self.folder, exist_ok=True)
            except OSError as error:
                raise UserError(
                    f"the folder for frame indices '{self.folder}' cannot be made: {describe(error)}. "
                    "Give a folder that can be written, or none to keep the indices in memory."
                ) from error

    def _reset(self) -> None:
        self._memory: OrderedDict[tuple[str, int, int], FrameIndex] = OrderedDict()
        self._held_bytes = 0
        self._may_write = True
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, object]:
        """Travel to worker processes without the memory part."""
        return {"folder": self.folder, "memory_bytes": self.memory_bytes}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._reset()

    def get(self, path: str, status: os.stat_result) -> FrameIndex | None:
        """The index of the file, or ``None``; ``status`` is its ``os.stat``."""
        key = _key(path, status)
        with self._lock:
            index = self._memory.get(key)
            if index is not None:
                self._memory.move_to_end(key)
                return index
        index = self._load(key)
        if index is not None:
            self._remember(key, index)
        return index

    def put(self, path: str, status: os.stat_result, index: FrameIndex) -> None:
        """Keep the index of the file. A folder that cannot be written costs a warning, not the run."""
        key = _key(path, status)
        self._remember(key, index)
        if self.folder is None or not self._may_write:
            return
        try:
            # A checksum tells a damaged entry, which is made again: there is nothing to flush.
            write_file(self._file(key), lambda file: file.write(_seal(key, index)), shared=True, durable=False)
        except UserError as error:
            self._may_write = False
            _LOGGER.warning("frame indices are not kept in %s: %s", self.folder, error)

    def _remember(self, key: tuple[str, int, int], index: FrameIndex) -> None:
        with self._lock:
            if key in self._memory:
                return
            self._memory[key] = index
            self._held_bytes += _num_bytes(index)
            while self._held_bytes > self.memory_bytes and len(self._memory) > 1:
                self._held_bytes -= _num_bytes(self._memory.popitem(last=False)[1])

    def _load(self, key: tuple[str, int, int]) -> FrameIndex | None:
        if self.folder is None:
            return None
        try:
            with open(self._file(key), "rb") as file:
                return _unseal(key, file.read())
        except (OSError, ValueError, ArithmeticError):
            return None

    def _file(self, key: tuple[str, int, int]) -> str:
        assert self.folder is not None
        # The name is the path's alone: the entry of a changed file is replaced, not left behind.
        name = sha256(os.fsencode(key[0])).hexdigest()
        return os.path.join(self.folder, name[:2], f"{name[2:32]}.index")


def _key(path: str, status: os.stat_result) -> tuple[str, int, int]:
    return os.path.abspath(path), status.st_size, status.st_mtime_ns


def _num_bytes(index: FrameIndex) -> int:
    return 500 + index.pts.nbytes + index.stamps.nbytes + index.key_positions.nbytes + index.key_seeks.nbytes


_FORMAT_VERSION = 1


def _seal(key: tuple[str, int, int], index: FrameIndex) -> bytes:
    body = np.concatenate([np.array([_FORMAT_VERSION, key[1], key[2]]), index.to_array()]).astype("<i8").tobytes()
    return zlib.crc32(body).to_bytes(8, "little") + body


def _unseal(key: tuple[str, int, int], data: bytes) -> FrameIndex | None:
    """The index, or ``None`` when it is that of an earlier state of the file; ValueError when it is damaged."""
    body = data[8:]
    if zlib.crc32(body) != int.from_bytes(data[:8], "little"):
        raise ValueError("the checksum is wrong")
    values = np.frombuffer(body, dtype="<i8").astype(np.int64)
    if values[:3].tolist() != [_FORMAT_VERSION, key[1], key[2]]:
        return None
    return FrameIndex.from_array(values[3:])


def packets_of(container: InputContainer, stream: VideoStream) -> Iterator[Packet]:
    """The packets of a stream, from where the container stands.

    PyAV's generator frees its buffer only at the end or when it is closed: left early and then forgotten, as happens
    when a clip is read, it would keep some 150 bytes of each file that is opened. Closing this one closes it.
    """
    yield from container.demux(stream)


def packets_tell(container: InputContainer, stream: VideoStream) -> bool:
    """Whether the container and codec are such that packets usually tell which frames are presented, and when."""
    return container.format.name in _TRUE_CONTAINERS and stream.codec_context.name in _TRUE_CODECS


def index_packets(container: InputContainer, stream: VideoStream, deadline: Deadline) -> FrameIndex | None:
    """Index a freshly opened video by its packets; only the first frame is decoded.

    Returns:
        The index, or ``None`` when these packets do not tell which frames are presented: the file has to be opened
        again for ``index_frames``.

    Raises:
        VideoError: It takes too long.
    """
    first: VideoFrame | None = None
    pts: list[int] = []
    keys: list[int] = []
    truthful = True
    for packet in packets_of(container, stream):
        deadline.check()
        if first is None:
            first = next(iter(packet.decode()), None)
        if packet.size == 0:
            continue
        if packet.pts is None or packet.is_discard or packet.is_corrupt:
            truthful = False
            break
        if packet.is_keyframe:
            keys.append(packet.pts)
        elif not keys:
            truthful = False  # the stream starts in the middle of a group: its first frames cannot be decoded
            break
        pts.append(packet.pts)
    if not truthful or first is None:
        return None
    stamps = np.sort(np.array(pts, dtype=np.int64))
    # Frames presented before the first key frame may lack what they refer to; equal stamps name two frames.
    if stamps[0] < keys[0] or (np.diff(stamps) == 0).any():
        return None
    key_pts = np.array(sorted(keys), dtype=np.int64)
    return _finish(deadline.path, stream, first, stamps, stamps, np.searchsorted(stamps, key_pts), key_pts)


def index_frames(container: InputContainer, stream: VideoStream, deadline: Deadline) -> FrameIndex:
    """Index a freshly opened video by decoding all of it (without conversion to RGB).

    Packets that do not decode are passed over here; reading a frame that depends on one is an error.

    Raises:
        VideoError: No frame can be decoded, or it takes too long.
    """
    first: VideoFrame | None = None
    stamps: list[int | None] = []
    key_frames: list[tuple[int, int]] = []
    key_packets: dict[int, int] = {}
    packet_order: list[int | None] = []
    seeks_by_pts = container.format.name in _TRUE_CONTAINERS
    problem = "there are no frames in it"
    for packet in packets_of(container, stream):
        deadline.check()
        if packet.size:
            packet_order.append(packet.pts)
            if packet.is_keyframe and packet.pts is not None:
                # MP4 and Matroska seek by presentation time, the others by decoding time.
                key_packets[packet.pts] = packet.pts if seeks_by_pts or packet.dts is None else packet.dts
        try:
            frames = packet.decode()
        except FFmpegError as error:
            problem = describe(error)
            continue
        for frame in frames:
            first = first or frame
            if frame.key_frame and frame.pts in key_packets:
                key_frames.append((len(stamps), key_packets[frame.pts]))
            stamps.append(frame.pts)
    if first is None:
        if not stream.codec_context.width:
            problem += f" (its size is unknown, or beyond {MAX_PIXELS} pixels)"
        raise VideoError(deadline.path, f"no frame can be decoded: {problem}")
    if None in stamps:
        return _finish_counted(deadline.path, stream, first, len(stamps))
    numbers = np.array(stamps, dtype=np.int64)
    if len(np.unique(numbers)) < len(numbers):
        return _finish(deadline.path, stream, first, np.sort(numbers), numbers[:0], numbers[:0], numbers[:0])
    if container.format.name not in _STAMPED_CONTAINERS and stamps != packet_order:
        key_frames = []  # the demuxer makes stamps up as it reads: with B-frames they differ after a seek
    keys = np.array(key_frames, dtype=np.int64).reshape(-1, 2)
    return _finish(deadline.path, stream, first, np.sort(numbers), numbers, keys[:, 0], keys[:, 1])


def _finish_counted(path: str, stream: VideoStream, first: VideoFrame, num_frames: int) -> FrameIndex:
    """An index without stamps: frames are evenly spaced at the declared rate, 25 per second where none is declared."""
    rate = stream.average_rate or stream.guessed_rate or _FALLBACK_RATE
    nothing = np.zeros(0, dtype=np.int64)
    pts = np.arange(num_frames, dtype=np.int64)
    return _finish(path, stream, first, pts, nothing, nothing, nothing, time_base=1 / Fraction(rate))


def _finish(
    path: str,
    stream: VideoStream,
    first: VideoFrame,
    pts: Int64Array,
    stamps: Int64Array,
    key_positions: Int64Array,
    key_seeks: Int64Array,
    time_base: Fraction | None = None,
) -> FrameIndex:
    time_base = time_base or stream.time_base or 1 / _FALLBACK_RATE
    duration = (int(pts[-1]) - int(pts[0])) * float(time_base)
    if duration > MAX_DURATION:
        raise VideoError(path, f"its time stamps span {duration / 3600:.3g} hours")
    quarters = round(first.rotation / 90)
    # Players turn by right angles; other angles are decoration and are left alone.
    rotation = quarters % 4 * 90 if abs(first.rotation - 90 * quarters) <= 1 else 0
    height, width = (first.width, first.height) if rotation in (90, 270) else (first.height, first.width)
    return FrameIndex(pts, stamps, time_base, height, width, rotation, key_positions, key_seeks)
