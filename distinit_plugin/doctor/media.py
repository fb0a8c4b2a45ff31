"""Decoders: a tiny video of each kind is written, read by this package's reader, and compared."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from distinit_plugin.doctor.findings import Finding, State, first_line

if TYPE_CHECKING:
    from distinit_plugin.video.source import Frames

FRAMES, HEIGHT, WIDTH = 8, 48, 64

TOLERANCE = 12.0
"""Grey levels, on average, that a lossy codec may be off."""

WHEEL = "Install PyAV's binary wheel, which has FFmpeg in it: pip install --force-reinstall --only-binary av av."


class Codec(NamedTuple):
    """A kind of video: FFmpeg's encoder and decoder, and a file's ending."""

    encoder: str
    decoder: str
    ending: str


CODECS = {
    "H.264": Codec("libx264", "h264", ".mp4"),
    "HEVC": Codec("libx265", "hevc", ".mp4"),
    "VP9": Codec("libvpx-vp9", "vp9", ".webm"),
    "AV1": Codec("libsvtav1", "libdav1d", ".mp4"),
    "MPEG-4": Codec("mpeg4", "mpeg4", ".avi"),
}
"""H.264 first: without it hardly any corpus can be read."""


def pictures() -> Frames:
    """(FRAMES,HEIGHT,WIDTH,3): a smooth picture that gets lighter from frame to frame."""
    import numpy as np

    rows = np.linspace(20, 120, HEIGHT)[:, None, None]
    columns = np.linspace(0, 60, WIDTH)[None, :, None]
    picture = rows + columns + np.array([0.0, 5.0, 10.0])
    return np.stack([picture + 6 * number for number in range(FRAMES)]).astype(np.uint8)


def write_tiny(path: Path, encoder: str, frames: Frames) -> None:
    """Encode pictures; the container follows the ending."""
    import av
    from av.video.stream import VideoStream

    with av.open(str(path), "w") as container:
        stream = container.add_stream(encoder, rate=25)
        assert isinstance(stream, VideoStream)
        stream.height, stream.width, stream.pix_fmt = HEIGHT, WIDTH, "yuv420p"
        stream.codec_context.thread_type = "NONE"
        for picture in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))


def look_at_codec(name: str) -> list[Finding]:
    """One of ``CODECS``: written and read, or, where nothing here can write it, whether there is a decoder."""
    import av

    codec, shown = CODECS[name], f"{name} videos"
    otherwise: State = "broken" if name == "H.264" else "note"
    if codec.encoder not in av.codecs_available:
        if codec.decoder in av.codecs_available:
            return [Finding(shown, "works", f"decoder {codec.decoder} is here (not tried: no {codec.encoder})")]
        return [Finding(shown, otherwise, "no decoder", WHEEL)]
    frames = pictures()
    with tempfile.TemporaryDirectory(prefix="distinit-") as folder:
        path = Path(folder) / f"tiny{codec.ending}"
        try:
            write_tiny(path, codec.encoder, frames)
        except Exception as error:
            return [Finding(shown, "note", f"{codec.encoder} does not write: {first_line(error)}", WHEEL)]
        return [_read(shown, path, frames, otherwise)]


def look_at_images() -> list[Finding]:
    """Folders of extracted frames, JPEG and PNG."""
    from PIL import Image

    findings = []
    for kind, ending in (("JPEG", "jpg"), ("PNG", "png")):
        with tempfile.TemporaryDirectory(prefix="distinit-") as folder:
            for number, picture in enumerate(pictures()):
                Image.fromarray(picture).save(Path(folder) / f"{number:05d}.{ending}")
            findings.append(_read(f"{kind} frames", Path(folder), pictures(), "broken"))
    return findings


def _read(name: str, path: Path, frames: Frames, otherwise: State) -> Finding:
    import numpy as np

    from distinit_plugin.errors import VideoError
    from distinit_plugin.video.decode import open_video

    try:
        with open_video(path, timeout=30.0) as reader:
            count = reader.index.num_frames
            found = reader.read(range(min(count, FRAMES)))
    except VideoError as error:
        return Finding(name, otherwise, error.reason, WHEEL)
    if count != FRAMES:
        return Finding(name, otherwise, f"{count} of {FRAMES} frames read", WHEEL)
    off = float(np.abs(found.astype(float) - frames).mean())
    if off > TOLERANCE:
        return Finding(name, otherwise, f"decoded wrongly: pictures are off by {off:.0f} levels", WHEEL)
    return Finding(name, "works", f"{FRAMES} frames read")
