"""Frames of one video by number, as RGB.

A file is opened once, decoded from the key frame before the first frame asked for to the last one, and only the
frames asked for are converted to RGB. Pixels are taken as square; a stream whose size changes is scaled to the size
of its first frame.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

import av
import numpy as np
from av.video.frame import VideoFrame
from av.video.reformatter import VideoReformatter
from av.video.stream import VideoStream

from distinit_plugin.errors import VideoError
from distinit_plugin.video.guard import MAX_PIXELS, Closing, Deadline, check_size, describe, stat_file, video_errors
from distinit_plugin.video.images import IMAGE_EXTENSIONS, WHOLE, ImageReader, Window, list_frames, window_size
from distinit_plugin.video.index import (
    FrameIndex,
    IndexCache,
    Int64Array,
    index_frames,
    index_packets,
    packets_of,
    packets_tell,
)
from distinit_plugin.video.source import Frames, FrameSource

# Frames that a seek must save before it pays (it throws the decoder's pictures away).
_SEEK_GAIN = 8

# Containers that hold videos. Playlists, scripts and devices stay out: they make FFmpeg open other files, or wait.
_CONTAINERS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,flv,live_flv,asf,mpegts,mpeg,mpegvideo,m4v,h264,hevc,av1,obu,ivf,ogg,"
    "rm,dv,mxf,nut,gif,mjpeg,vc1,h263,h261,wtv,swf,yuv4mpegpipe,apng,webp"
)
# Opening a file decodes a picture already, so the limit on its size is an option of that, too.
_OPTIONS = {"format_whitelist": _CONTAINERS, "protocol_whitelist": "file", "max_pixels": str(MAX_PIXELS)}

# Opening decodes pictures to learn what such files say in their headers, too: with a decoder refused for that, files
# whose frames are known already open five times as fast. (The decoder that reads frames afterwards is another one.)
_TELLING_HEADERS = (".mp4", ".m4v", ".mov", ".mkv", ".webm")
_UNPROBED = {**_OPTIONS, "codec_whitelist": "none", "analyzeduration": "1"}


def open_video(
    path: str | os.PathLike[str], *, cache: IndexCache | None = None, timeout: float | None = None
) -> FrameSource:
    """Open a video file, a folder of extracted frames, or a single image (a video of one frame).

    Args:
        path: The file or folder.
        cache: Frame indices already known.
        timeout: Seconds that this file may take, all reads together; ``None``: no limit.

    Returns:
        A reader to be used in a ``with`` statement, which closes it.

    Raises:
        VideoError: It cannot be opened, or holds no frames.
    """
    name = os.fspath(path)
    with video_errors(name, "cannot be opened"):
        is_folder = os.path.isdir(name)
    if is_folder:
        return ImageReader(name, list_frames(name), timeout=timeout)
    if os.path.splitext(name)[1].lower() in IMAGE_EXTENSIONS:
        stat_file(name)
        return ImageReader(name, [name], timeout=timeout)
    return VideoReader(name, cache=cache, timeout=timeout)


class VideoReader(Closing):
    """A video file. ``index`` tells its frames, ``read`` gives them.

    Only files without usable time stamps are opened a second time, when they are read after having been indexed.
    """

    def __init__(
        self, path: str | os.PathLike[str], *, cache: IndexCache | None = None, timeout: float | None = None
    ) -> None:
        """Open the file, and index it unless the cache knows it.

        Args:
            path: The file.
            cache: Frame indices already known; the file's is added.
            timeout: Seconds that this file may take from now on; ``None``: no limit.

        Raises:
            VideoError: It is no regular file, cannot be opened, has no decodable video, or takes too long.
        """
        self.path = os.fspath(path)
        self._deadline = Deadline(self.path, timeout)
        self._container: av.container.InputContainer | None = None
        self._reformatter = VideoReformatter()
        self._missing = ""
        status = stat_file(self.path)
        cached = cache.get(self.path, status) if cache is not None else None
        try:
            with video_errors(self.path, "cannot be opened"):
                self._open(probe=cached is None or not self.path.lower().endswith(_TELLING_HEADERS))
            with video_errors(self.path, "cannot be decoded"):
                self.index = cached or self._build_index()
        except BaseException:
            self.close()
            raise
        if cache is not None and cached is None:
            cache.put(self.path, status, self.index)

    def close(self) -> None:
        """Close the file; more than once is fine."""
        if self._container is not None:
            # An open container that a forked worker inherits can block it for ever.
            self._container.close()
            self._container = None

    def read(self, indices: Sequence[int] | Int64Array, window: Window = WHOLE) -> Frames:
        """Frames by number, in the order asked for, repeats allowed.

        Args:
            indices: (n,) frame numbers, 0 ≤ i < ``index.num_frames``.
            window: The part of every frame that is given: nothing else is copied.

        Returns:
            (n,H,W,3) uint8 RGB, H and W of the window.

        Raises:
            VideoError: A frame cannot be decoded, or it takes too long.
        """
        asked = [int(index) for index in indices]
        wanted = sorted(set(asked))
        if wanted and not 0 <= wanted[0] <= wanted[-1] < self.index.num_frames:
            beyond = wanted[0] if wanted[0] < 0 else wanted[-1]
            raise VideoError(self.path, f"frame {beyond} was asked for, but it has {self.index.num_frames} frames")
        with video_errors(self.path, "cannot be decoded"):
            size = window_size(self.index.height, self.index.width, window)
            frames = np.empty((len(wanted), *size, 3), dtype=np.uint8)
            done = 0
            for span in self._spans(wanted):
                self._read_span(span, frames[done : done + len(span)], window)
                done += len(span)
        return frames if asked == wanted else frames[np.searchsorted(wanted, asked)]

    def stream(self, indices: Sequence[int] | Int64Array) -> Iterator[Frames]:
        """Frames by increasing number, one at a time in one pass over the file; see ``FrameSource``.

        Raises:
            VideoError: A frame cannot be decoded, or nothing comes for too long.
        """
        wanted = [int(index) for index in indices]
        assert bool((np.diff(wanted) > 0).all()), "frames of a stream increase"
        done = 0
        with video_errors(self.path, "cannot be decoded"):
            key = self._last_key(wanted[0])
            if self._go_to(key):
                for frame in self._in_order(self._frames_from(key, wanted), wanted):
                    yield self._convert(frame)
                    done += 1
            if done < len(wanted):  # as for ``read``, the long way decides
                self._start_over()
                for frame in self._in_order(self._all_frames(), wanted[done:]):
                    yield self._convert(frame)
                    done += 1
        if done < len(wanted):
            raise VideoError(
                self.path,
                f"frame {wanted[done]} of {self.index.num_frames} cannot be decoded: {self._missing}",
            )

    def _in_order(self, frames: Iterator[VideoFrame], wanted: list[int]) -> Iterator[VideoFrame]:
        """The wanted ones of some frames; ends early at one that is not to be had, with the reason in ``_missing``."""
        counted = len(self.index.stamps) == 0
        names = wanted if counted else self.index.stamps[wanted].tolist()
        place = 0
        self._missing = "the decoder does not give it"
        try:
            for count, frame in enumerate(frames):
                if (count if counted else frame.pts) != names[place]:
                    continue
                if frame.is_corrupt:
                    self._missing = "it is damaged"
                    return
                self._deadline.restart()
                yield frame
                place += 1
                if place == len(names):
                    return
        except av.error.FFmpegError as error:
            self._missing = describe(error)

    def _open(self, *, probe: bool = True) -> None:
        self.close()
        self._deadline.check()
        container = av.open(
            os.path.abspath(self.path),  # an absolute path cannot be taken for a protocol ("http:…")
            options=_OPTIONS if probe else _UNPROBED,
            metadata_errors="replace",
            timeout=self._deadline.seconds,
        )
        self._container = container
        self._probed = probe
        self._at_start = True
        stream = container.streams.best("video")
        if not isinstance(stream, VideoStream) or stream.disposition & av.stream.Disposition.attached_pic:
            raise ValueError("there is no video stream in it")
        codec = stream.codec_context
        if codec is None:
            raise ValueError("there is no decoder for its codec")
        check_size(codec.width, codec.height)
        codec.options = {"max_pixels": str(MAX_PIXELS)}
        stream.thread_type = "NONE"  # parallelism is in the worker processes
        for other in container.streams:
            if other.index != stream.index:
                other.discard = av.stream.Discard.all
        self._stream = stream

    def _start_over(self) -> None:
        """Be at the start of the file, opened with all that probing tells."""
        if not (self._at_start and self._probed):
            self._open()

    def _build_index(self) -> FrameIndex:
        assert self._container is not None
        self._at_start = False
        if packets_tell(self._container, self._stream):
            try:
                index = index_packets(self._container, self._stream, self._deadline)
            except av.error.FFmpegError:
                index = None  # the first packet may be damaged and others not
            if index is not None:
                return index
            self._open()
            self._at_start = False
        return index_frames(self._container, self._stream, self._deadline)

    def _spans(self, wanted: list[int]) -> Iterator[list[int]]:
        """Split sorted frame numbers where seeking is cheaper than decoding what lies between."""
        begin = 0
        for place in range(1, len(wanted)):
            if self._last_key(wanted[place]) - wanted[place - 1] > _SEEK_GAIN:
                yield wanted[begin:place]
                begin = place
        if wanted:
            yield wanted[begin:]

    def _last_key(self, number: int) -> int:
        """The nearest key frame at or before a frame; -1: none is known."""
        place = int(self.index.key_positions.searchsorted(number, side="right"))
        return int(self.index.key_positions[place - 1]) if place else -1

    def _read_span(self, wanted: list[int], out: Frames, window: Window) -> None:
        """Decode the window of sorted, distinct frames into ``out``, from the last key frame or else from the start."""
        key = self._last_key(wanted[0])
        if self._go_to(key):
            problem = self._collect(wanted, out, window, self._frames_from(key, wanted))
            if problem is None:
                return
            # A key frame that is none (a gradual refresh), a seek that missed, or pictures in another order than the
            # header says: the long way decides.
        self._start_over()
        problem = self._collect(wanted, out, window, self._all_frames())
        if problem is not None:
            raise VideoError(self.path, problem)

    def _go_to(self, key: int) -> bool:
        """Go to the key frame; False: decoding has to begin at the start of the file."""
        if key < 0 or len(self.index.stamps) == 0:
            return False
        if key == self.index.key_positions[0] and self._at_start:
            return True
        assert self._container is not None
        stamp = self.index.key_seeks[self.index.key_positions.searchsorted(key)]
        try:
            self._container.seek(int(stamp), stream=self._stream)
        except av.error.FFmpegError:
            return False
        self._at_start = False
        return True

    def _collect(self, wanted: list[int], out: Frames, window: Window, frames: Iterator[VideoFrame]) -> str | None:
        """Convert every wanted frame and put its window into ``out``.

        Args:
            wanted: Sorted, distinct frame numbers.
            out: (len(wanted),H,W,3), written.
            window: See ``read``.
            frames: From ``_frames_from`` or ``_all_frames``.

        Returns:
            ``None``, or why a frame is missing.
        """
        counted = len(self.index.stamps) == 0
        names = wanted if counted else self.index.stamps[wanted].tolist()
        slots: dict[int | None, int] = {name: slot for slot, name in enumerate(names)}
        reason = "the decoder does not give it"
        try:
            for count, frame in enumerate(frames):
                slot = slots.pop(count if counted else frame.pts, None)
                if slot is None:
                    continue
                if frame.is_corrupt:
                    return f"frame {wanted[slot]} of {self.index.num_frames} is damaged"
                out[slot] = self._convert(frame)[window]
                if not slots:
                    return None
        except av.error.FFmpegError as error:
            reason = describe(error)
        return f"frame {wanted[min(slots.values())]} of {self.index.num_frames} cannot be decoded: {reason}"

    def _all_frames(self) -> Iterator[VideoFrame]:
        """Every frame of a file that is at its start."""
        assert self._container is not None
        self._at_start = False
        started = False
        for packet in packets_of(self._container, self._stream):
            self._deadline.check()
            started = started or (packet.size > 0 and packet.is_keyframe)
            try:
                frames = packet.decode()
            except av.error.FFmpegError:
                if started:
                    raise
                continue  # the tail of a group whose key frame was cut off
            yield from frames

    def _frames_from(self, key: int, wanted: list[int]) -> Iterator[VideoFrame]:
        """Frames from the key frame that comes next, the wanted ones among them; none when the seek went too far.

        Where a packet tells which frame it is, H.264 frames that no other frame refers to are left out, and the decoder
        is emptied when it has been given all that is wanted: what it gives is the same.
        """
        assert self._container is not None
        self._at_start = False
        tells = packets_tell(self._container, self._stream)
        codec = self._stream.codec_context
        skips = tells and codec.name == "h264"
        pending = set(self.index.stamps[wanted].tolist())
        started = False
        for packet in packets_of(self._container, self._stream):
            self._deadline.check()
            if not started:
                if not (packet.size and packet.is_keyframe):
                    continue
                if packet.pts is None or packet.pts > self.index.stamps[key]:
                    return
                started = True
            if skips:
                codec.skip_frame = "DEFAULT" if packet.pts in pending else "NONREF"
            pending.discard(packet.pts)
            yield from packet.decode()
            if tells and not pending:
                yield from codec.decode(None)
                return

    def _convert(self, frame: VideoFrame) -> Frames:
        """Upright RGB (H,W,3) of the size in ``index``."""
        turned = self.index.rotation in (90, 270)
        height, width = (self.index.width, self.index.height) if turned else (self.index.height, self.index.width)
        # One scaler for all frames, and one thread: PyAV's defaults are a new scaler per frame on all cores.
        rgb = self._reformatter.reformat(frame, width=width, height=height, format="rgb24", threads=1).to_ndarray()
        return np.rot90(rgb, self.index.rotation // 90)
