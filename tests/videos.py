"""Small real videos for tests. Each frame carries its number as blocks that survive compression."""

from collections.abc import Callable
from pathlib import Path

import av
import numpy as np

_BITS = 16  # in a grid of 4 rows and 4 columns


def number_frame(number: int, height: int, width: int) -> np.ndarray:
    """(H,W,3) uint8: 4×4 blocks, light for 1 and dark for 0, with a colour gradient over them."""
    bits = (number >> np.arange(_BITS)) & 1
    blocks = bits.reshape(4, 4)[np.arange(height) * 4 // height][:, np.arange(width) * 4 // width]
    frame = np.empty((height, width, 3), dtype=np.uint8)
    frame[:] = 50 + 140 * blocks[:, :, None]
    frame[:, :, 0] += (np.arange(width) * 40 // width).astype(np.uint8)
    frame[:, :, 2] += (np.arange(height) * 40 // height).astype(np.uint8)[:, None]
    return frame


def frame_number(frame: np.ndarray) -> int:
    """The number in a decoded (H,W,3) frame."""
    height, width = frame.shape[:2]
    rows = (2 * np.arange(4) + 1) * height // 8
    columns = (2 * np.arange(4) + 1) * width // 8
    bits = frame[rows][:, columns, 1].reshape(-1) > 120
    return int((bits << np.arange(_BITS)).sum())


def frame_numbers(frames: np.ndarray) -> list[int]:
    """The numbers in (n,H,W,3) decoded frames."""
    return [frame_number(frame) for frame in frames]


def write_video(
    path: Path | str,
    num_frames: int = 30,
    height: int = 64,
    width: int = 80,
    fps: int = 25,
    gop: int = 12,
    codec: str = "libx264",
    pattern: Callable[[int, int, int], np.ndarray] = number_frame,
    *,
    b_frames: int = 2,
    options: dict[str, str] | None = None,
    pix_fmt: str = "yuv420p",
    container_options: dict[str, str] | None = None,
    audio: bool = False,
) -> Path:
    """Encode a video; the container follows the file name.

    Args:
        path: Where to; the ending chooses the container (.mp4, .mkv, .avi, .mov, .webm, .m4v, .ts).
        num_frames: Frames.
        height: Pixels, even.
        width: Pixels, even.
        fps: Frames per second.
        gop: Largest distance between key frames.
        codec: Encoder: libx264, libx265, mpeg4, libvpx-vp9, mjpeg, …
        pattern: (number, height, width) → (H,W,3) uint8 RGB.
        b_frames: Largest number of B-frames in a row (not for every codec).
        options: Of the encoder.
        pix_fmt: Pixel format.
        container_options: Of the container.
        audio: Add a silent audio track.
    """
    with av.open(str(path), "w", options=container_options or {}) as container:
        stream = container.add_stream(codec, rate=fps)
        stream.height, stream.width, stream.pix_fmt, stream.gop_size = height, width, pix_fmt, gop
        stream.thread_type = "NONE"
        if codec in {"libx264", "libx265", "mpeg4"}:
            stream.codec_context.max_b_frames = b_frames
        defaults = {"preset": "veryfast", "crf": "12"} if codec == "libx264" else {}
        stream.options = {**defaults, **(options or {})}
        sound = container.add_stream("aac", rate=16000) if audio else None
        for number in range(num_frames):
            frame = av.VideoFrame.from_ndarray(pattern(number, height, width), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
        if sound is not None:
            silence = np.zeros((1, 16000 * num_frames // fps), dtype=np.float32)
            packet = av.AudioFrame.from_ndarray(silence, format="fltp", layout="mono")
            packet.sample_rate = 16000
            container.mux(sound.encode(packet))
            container.mux(sound.encode())
    return Path(path)
