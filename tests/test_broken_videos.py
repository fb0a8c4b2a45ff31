"""Broken files: each ends in a good sample or in a VideoError with a reason, in bounded time."""

import os
import socket
import struct
import subprocess
import sys
import time
import wave
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image
from videos import frame_numbers, number_frame, write_video

from distinit_plugin.errors import VideoError
from distinit_plugin.video.decode import VideoReader, open_video
from distinit_plugin.video.guard import describe, video_errors
from distinit_plugin.video.index import MAX_DURATION, IndexCache

_TIMEOUT = 10.0
_NUM_FRAMES = 40
_BLACK = np.zeros((6400, 6400, 3), dtype=np.uint8)


def _outcome(path, wanted=None):
    """``(frames, None)`` or ``(None, reason)``; any other exception, or too long a time, fails the test."""
    begun = time.monotonic()
    frames, caught = None, None
    try:
        with open_video(path, timeout=_TIMEOUT) as reader:
            numbers = np.arange(reader.index.num_frames) if wanted is None else wanted
            frames = reader.read(numbers)
            shape = (len(numbers), reader.index.height, reader.index.width, 3)
    except VideoError as error:
        caught = error
    assert time.monotonic() - begun < _TIMEOUT
    if caught is None:
        assert (frames.shape, frames.dtype) == (shape, np.uint8)
        return frames, None
    assert caught.path == str(path)
    assert len(caught.reason) > 8
    assert caught.reason.isprintable()  # one line
    return None, caught.reason


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """One small good video per container, as bytes."""
    folder = tmp_path_factory.mktemp("good")
    options = {"x264-params": "scenecut=0"}
    return {
        "mp4": write_video(folder / "a.mp4", _NUM_FRAMES, gop=10, options=options).read_bytes(),
        "fast.mp4": write_video(
            folder / "f.mp4", _NUM_FRAMES, gop=10, options=options, container_options={"movflags": "faststart"}
        ).read_bytes(),
        "mkv": write_video(folder / "a.mkv", _NUM_FRAMES, gop=10, options=options).read_bytes(),
        "avi": write_video(folder / "a.avi", _NUM_FRAMES, gop=10, codec="mpeg4").read_bytes(),
        "ts": write_video(folder / "a.ts", _NUM_FRAMES, gop=10, options=options).read_bytes(),
    }


def _assert_in_order(frames):
    """What is given is right; what the file lost (B-frames before its last picture, too) is not counted."""
    numbers = frame_numbers(frames)
    assert (np.diff(numbers) > 0).all()
    assert 0 <= numbers[0] <= numbers[-1] < _NUM_FRAMES
    assert numbers[: len(numbers) - 4] == list(range(len(numbers) - 4)) or len(numbers) <= 4


_CONTAINERS = ["mp4", "fast.mp4", "mkv", "avi", "ts"]


def _write(folder, name, data):
    path = folder / f"video.{name}"
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("container", _CONTAINERS)
def test_the_unbroken_files_are_good(tmp_path, good, container):
    frames, _ = _outcome(_write(tmp_path, container, good[container]))
    assert frame_numbers(frames) == list(range(_NUM_FRAMES))


@pytest.mark.parametrize("container", _CONTAINERS)
@pytest.mark.parametrize("kept", [0.001, 0.02, 0.3, 0.5, 0.8, 0.95, 0.999])
def test_truncated(tmp_path, good, container, kept):
    data = good[container]
    path = _write(tmp_path, container, data[: max(int(len(data) * kept), 1)])
    frames, reason = _outcome(path)
    if frames is not None:
        _assert_in_order(frames)
    elif kept > 0.5 and container != "mp4":  # this mp4 has its index at its end
        early, reason = _outcome(path, [0, 3])
        assert reason is None
        assert frame_numbers(early) == [0, 3]


def test_truncated_before_the_index(tmp_path, good):
    _, reason = _outcome(_write(tmp_path, "mp4", good["mp4"][: len(good["mp4"]) // 2]))
    assert reason.startswith("cannot be opened: ")


def test_empty(tmp_path):
    assert _outcome(_write(tmp_path, "mp4", b""))[1] == "is empty (0 bytes)"


@pytest.mark.parametrize("data", [b"\0" * 5000, b"\xff" * 5000, b"x", bytes(range(256)) * 40])
def test_no_video_at_all(tmp_path, data):
    assert _outcome(_write(tmp_path, "mp4", data))[1].startswith("cannot be opened: ")


@pytest.mark.parametrize(
    "text",
    [
        "this is not a video\n" * 50,
        "<html><body>404</body></html>",
        "#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\nsecret.mp4\n#EXT-X-ENDLIST\n",
        "ffconcat version 1.0\nfile secret.mp4\n",
        "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\n",
    ],
    ids=["prose", "html", "hls", "concat", "sdp"],
)
def test_text_named_mp4_opens_nothing_else(tmp_path, text):
    write_video(tmp_path / "secret.mp4", 5)
    path = _write(tmp_path, "mp4", text.encode())
    assert _outcome(path)[1].startswith("cannot be opened: ")


def test_audio_only(tmp_path):
    with wave.open(str(tmp_path / "sound.mp4"), "wb") as sound:
        sound.setnchannels(1)
        sound.setsampwidth(2)
        sound.setframerate(8000)
        sound.writeframes(b"\0" * 16000)
    assert _outcome(tmp_path / "sound.mp4")[1].startswith("cannot be opened: ")
    with av.open(str(tmp_path / "aac.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    assert _outcome(tmp_path / "aac.mp4")[1] == "cannot be opened: there is no video stream in it"


@pytest.mark.parametrize("container", _CONTAINERS)
@pytest.mark.parametrize("seed", range(6))
def test_flipped_bytes(tmp_path, good, container, seed):
    rng = np.random.default_rng(seed)
    data = np.frombuffer(good[container], dtype=np.uint8).copy()
    places = rng.integers(0, len(data), (1, 3, 10, 50, 200, 1000)[seed])
    data[places] ^= rng.integers(1, 256, len(places), dtype=np.uint8)
    path = _write(tmp_path, container, data.tobytes())
    _outcome(path)
    _outcome(path, [0])


@pytest.mark.parametrize("seed", range(30))
def test_flipped_bytes_in_the_header(tmp_path, good, seed):
    rng = np.random.default_rng(seed)
    data = bytearray(good["mp4"])
    begin = data.index(b"moov")
    for place in rng.integers(begin, len(data), 4):
        data[place] ^= int(rng.integers(1, 256))
    _outcome(_write(tmp_path, "mp4", bytes(data)))


def test_a_hole_in_the_middle_is_named_and_the_rest_is_good(tmp_path, good):
    with av.open(str(_write(tmp_path, "whole.mp4", good["mp4"]))) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
        hole = packets[len(packets) // 2]
        begin, end = hole.pos, hole.pos + hole.size
    data = good["mp4"][:begin] + b"\xff" * (end - begin) + good["mp4"][end:]
    path = _write(tmp_path, "mp4", data)
    _, reason = _outcome(path)
    assert reason.startswith("frame ")
    assert f" of {_NUM_FRAMES} " in reason
    for numbers in ([0, 5], [_NUM_FRAMES - 5, _NUM_FRAMES - 1]):  # groups before and after it
        frames, reason = _outcome(path, numbers)
        assert reason is None
        assert frame_numbers(frames) == numbers


def _declare_frames(data, count):
    """Rewrite the sample count of the size table (stsz) of an mp4."""
    place = data.index(b"stsz") + 12
    assert struct.unpack(">I", data[place : place + 4])[0] == _NUM_FRAMES
    return data[:place] + struct.pack(">I", count) + data[place + 4 :]


@pytest.mark.parametrize("count", [0, 1, _NUM_FRAMES - 1, _NUM_FRAMES + 1, 10**6, 2**32 - 1])
def test_wrong_counts_in_the_header(tmp_path, good, count):
    frames, reason = _outcome(_write(tmp_path, "mp4", _declare_frames(good["mp4"], count)))
    if reason is None:
        _assert_in_order(frames)


def test_a_wrong_count_in_an_avi_header_is_not_believed(tmp_path, good):
    data = bytearray(good["avi"])
    place = data.index(b"avih") + 8 + 16
    assert struct.unpack("<I", data[place : place + 4])[0] == _NUM_FRAMES
    data[place : place + 4] = struct.pack("<I", 9999)
    length = data.index(b"strh") + 8 + 32
    data[length : length + 4] = struct.pack("<I", 9999)
    frames, _ = _outcome(_write(tmp_path, "avi", bytes(data)))
    assert frame_numbers(frames) == list(range(_NUM_FRAMES))


def test_a_video_without_frames(tmp_path):
    path = tmp_path / "none.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        container.start_encoding()
    assert _outcome(path)[1]


@pytest.mark.parametrize("size", [(65535, 65535), (16384, 16384), (0, 0), (1, 65535)])
def test_sizes_that_no_video_has(tmp_path, good, size):
    """The size in the container's header, where FFmpeg takes it before it sees a frame."""
    data = bytearray(good["mp4"])
    place = data.rindex(b"avc1") + 28
    assert struct.unpack(">HH", data[place : place + 4]) == (80, 64)
    data[place : place + 4] = struct.pack(">HH", *size)
    frames, _ = _outcome(_write(tmp_path, "mp4", bytes(data)))
    assert frames is None or frames.shape[1:] == (64, 80, 3)  # the stream's own size is the true one


@pytest.mark.parametrize(
    ("name", "codec", "pix_fmt"), [("a.avi", "mjpeg", "yuvj420p"), ("a.mp4", "libx264", "yuv420p")]
)
def test_a_really_huge_picture_is_refused_before_it_is_decoded(tmp_path, name, codec, pix_fmt):
    path = write_video(tmp_path / name, 1, 6400, 6400, codec=codec, pix_fmt=pix_fmt, pattern=lambda *_: _BLACK)
    with av.open(str(path)) as container:  # FFmpeg alone takes it
        assert next(container.decode(video=0)).width == 6400
    assert "beyond 36000000 pixels" in _outcome(path)[1]


def test_a_size_that_jumps_to_a_huge_one_is_not_decoded(tmp_path):
    small = write_video(tmp_path / "small.ts", 10)
    options = {"preset": "ultrafast"}
    huge = write_video(tmp_path / "huge.ts", 1, 6400, 6400, options=options, pattern=lambda *_: _BLACK)
    path = _write(tmp_path, "ts", small.read_bytes() + huge.read_bytes())
    with open_video(path) as reader:
        assert reader.index.num_frames == 10
        assert frame_numbers(reader.read(range(5))) == list(range(5))


def test_time_stamps_that_span_years(tmp_path, monkeypatch):
    path = tmp_path / "years.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        stream.codec_context.max_b_frames = 0
        for number in range(3):
            frame = av.VideoFrame.from_ndarray(number_frame(number, 64, 64), format="rgb24")
            frame.pts = number * int(MAX_DURATION) * 25
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    assert _outcome(path)[1] == "its time stamps span 96 hours"
    monkeypatch.chdir(tmp_path)
    assert _outcome("years.mkv")[1] == "its time stamps span 96 hours"  # under the name that was given


def test_missing_unreadable_and_odd_names(tmp_path):
    assert "No such file" in _outcome(tmp_path / "missing.mp4")[1]
    (tmp_path / "loop.mp4").symlink_to(tmp_path / "loop.mp4")
    assert _outcome(tmp_path / "loop.mp4")[1].startswith("cannot be opened: ")
    (tmp_path / "dangling.mp4").symlink_to(tmp_path / "gone")
    assert "No such file" in _outcome(tmp_path / "dangling.mp4")[1]
    for name in ("a\0b.mp4", "x" * 5000, ""):
        with pytest.raises(VideoError):
            open_video(name)


def test_folders_fifos_devices_and_sockets_do_not_block(tmp_path, monkeypatch):
    (tmp_path / "folder.mp4").mkdir()
    assert _outcome(tmp_path / "folder.mp4")[1] == "is a folder without images"
    with pytest.raises(VideoError, match="is a folder, not a regular file"):
        VideoReader(tmp_path / "folder.mp4")
    os.mkfifo(tmp_path / "fifo.mp4")
    assert _outcome(tmp_path / "fifo.mp4")[1] == "is a fifo, not a regular file"
    os.mkfifo(tmp_path / "fifo.png")
    assert _outcome(tmp_path / "fifo.png")[1] == "is a fifo, not a regular file"
    assert _outcome("/dev/zero")[1] == "is a character device, not a regular file"
    with socket.socket(socket.AF_UNIX) as server:
        monkeypatch.chdir(tmp_path)  # names of sockets are short
        server.bind("socket.mp4")
        assert _outcome(tmp_path / "socket.mp4")[1] == "is a socket, not a regular file"


def test_broken_images(tmp_path):
    Image.fromarray(number_frame(1, 40, 60)).save(tmp_path / "good.png")
    data = (tmp_path / "good.png").read_bytes()
    for name, content in (
        ("half.png", data[: len(data) // 2]),
        ("text.png", b"no image"),
        ("empty.jpg", b""),
        ("chunk.png", data[:40] + b"\xff" * 8 + data[48:]),
    ):
        path = tmp_path / name
        path.write_bytes(content)
        assert _outcome(path)[1]


def test_a_broken_frame_of_a_folder_is_named(tmp_path):
    for number in range(3):
        Image.fromarray(number_frame(number, 40, 60)).save(tmp_path / f"{number}.png")
    (tmp_path / "1.png").write_bytes(b"no image")
    frames, _ = _outcome(tmp_path, [0, 2])
    assert frame_numbers(frames) == [0, 2]
    assert _outcome(tmp_path)[1].startswith("frame file 1.png cannot be decoded: ")
    (tmp_path / "0.png").unlink()
    (tmp_path / "0.png").mkdir()
    assert _outcome(tmp_path)[1] == "frame file 0.png is a folder, not a regular file"


def test_an_image_that_unpacks_to_gigabytes_is_refused(tmp_path):
    path = tmp_path / "bomb.png"
    for side in (7000, 20000):  # beyond ours, beyond Pillow's
        Image.new("1", (side, side)).save(path)
        assert path.stat().st_size < 100_000
        assert "pixels" in _outcome(path)[1]


def test_a_file_that_changes_under_a_cached_index(tmp_path, good):
    """Same size and time, other content: the stale index must not end in a wrong frame or another exception."""
    path = _write(tmp_path, "mp4", good["mp4"])
    cache = IndexCache()
    open_video(path, cache=cache).close()
    status = os.stat(path)
    path.write_bytes(good["mp4"][: len(good["mp4"]) // 2].ljust(len(good["mp4"]), b"\0"))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(VideoError), open_video(path, cache=cache) as reader:
        reader.read([30])


@pytest.mark.parametrize(
    "error",
    [
        av.error.InvalidDataError(1, "bad data"),
        av.error.EOFError(1, "end"),
        ValueError("value"),
        EOFError("end"),
        MemoryError(),
        UnicodeDecodeError("utf-8", b"x", 0, 1, "why"),
        OverflowError("large"),
        IndexError("index"),
        RuntimeError("run"),
        OSError(5, "Input/output error"),
        ZeroDivisionError("zero"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_everything_that_decoders_raise_becomes_a_video_error(error):
    with pytest.raises(VideoError) as caught, video_errors("a.mp4", "cannot be decoded"):
        raise error
    assert caught.value.reason == f"cannot be decoded: {describe(error)}"


def test_an_interrupt_by_the_user_is_no_broken_video():
    with pytest.raises(KeyboardInterrupt), video_errors("a.mp4", "cannot be decoded"):
        raise KeyboardInterrupt


def test_nothing_is_printed(tmp_path, good):
    """FFmpeg's own complaints would tear up the progress bar."""
    data = bytearray(good["mp4"])
    data[2000:2400] = b"\x55" * 400
    path = _write(tmp_path, "mp4", bytes(data))
    program = (
        "import sys; from distinit_plugin.video.decode import open_video\n"
        "from distinit_plugin.errors import VideoError\n"
        "try:\n    with open_video(sys.argv[1]) as reader: reader.read(range(reader.index.num_frames))\n"
        "except VideoError: pass\n"
    )
    root = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", program, str(path)], cwd=root, capture_output=True, text=True, timeout=60, check=True
    )
    assert (done.stdout, done.stderr) == ("", "")
