"""Frames of videos: those that a full decode gives, and no more work than they need."""

import os
import shutil
from dataclasses import replace

import av
import numpy as np
import pytest
from PIL import Image
from videos import frame_numbers, number_frame, write_video

from distinit_plugin.errors import VideoError
from distinit_plugin.video import decode, guard
from distinit_plugin.video.decode import VideoReader, open_video
from distinit_plugin.video.index import IndexCache

_ASSETS = os.environ.get("DISTINIT_TEST_ASSETS", "")
_VIDEO_TYPES = {".mp4", ".mov", ".avi", ".mkv"}


def _asset_videos():
    names = []
    for folder, _, files in os.walk(os.path.join(_ASSETS, "videos") if _ASSETS else ""):
        names += [os.path.relpath(os.path.join(folder, file), _ASSETS) for file in files]
    videos = sorted(name for name in names if os.path.splitext(name)[1] in _VIDEO_TYPES and "corrupted" not in name)
    return videos or [pytest.param("", marks=pytest.mark.skip("DISTINIT_TEST_ASSETS is not set: no real files"))]


def _decode_all(path, keep):
    """The plain way: every frame in turn; the kept ones as upright RGB."""
    kept, count = {}, 0
    with av.open(str(path)) as container:
        stream = container.streams.best("video")
        stream.thread_type = "NONE"
        for frame in container.decode(stream):
            if count in keep:
                kept[count] = np.rot90(frame.to_ndarray(format="rgb24"), frame.rotation // 90 % 4)
            count += 1
    return count, kept


def _assert_equals_full_decode(path, seed=0):
    rng = np.random.default_rng(seed)
    cache = IndexCache()
    with open_video(path, cache=cache) as reader:
        last = reader.index.num_frames - 1
        keys = reader.index.key_positions[1:3].tolist()
        chosen = [0, last // 2, last, *keys, *(key - 1 for key in keys), *rng.integers(0, last + 1, 2).tolist()]
        one_by_one = {number: reader.read([number])[0] for number in chosen}
        together = reader.read(chosen)
    with open_video(path, cache=cache) as known:  # opened without decoding anything
        assert np.array_equal(known.read(chosen), together)
    count, kept = _decode_all(path, set(chosen))
    assert last + 1 == count
    for place, number in enumerate(chosen):
        with open_video(path, cache=cache) as known:
            assert np.array_equal(known.read([number])[0], kept[number]), f"frame {number} of a known file"
        assert np.array_equal(one_by_one[number], kept[number]), f"frame {number} alone"
        assert np.array_equal(together[place], kept[number]), f"frame {number} among others"
    return reader.index


@pytest.mark.parametrize("name", _asset_videos())
def test_real_videos_equal_a_full_decode(assets, name):
    index = _assert_equals_full_decode(assets / name)
    assert (np.diff(index.seconds) > 0).all()


def test_the_damaged_real_video_is_refused_from_the_damage_on(assets):
    path = assets / "videos/decord/corrupted.mp4"
    with open_video(path) as reader:
        reader.read([0])
        for numbers in (range(reader.index.num_frames), [30], [40]):
            with pytest.raises(VideoError, match=r"frame \d+ of 50 .*Invalid data"):
                reader.read(numbers)
        reader.read([28])  # decoded before the damage comes, although shown later than some of it


def test_declared_frame_counts_are_not_believed(assets):
    path = next((assets / "videos/hmdb51").glob("6arrow*.avi"))
    with av.open(str(path)) as container:
        declared = container.streams.video[0].frames
    with open_video(path) as reader:
        assert (declared, reader.index.num_frames) == (82, 81)
        with pytest.raises(VideoError, match="frame 81 was asked for, but it has 81 frames"):
            reader.read([81])


@pytest.mark.parametrize("clockwise", [0, 90, 180, 270])
def test_rotated_real_videos_are_upright(assets, clockwise):
    # The files are named by the clockwise turn that makes the keyboard in them upright (seen by eye).
    path = assets / f"videos/decord/video_{clockwise}.mov"
    with av.open(str(path)) as container:
        coded = next(container.decode(video=0)).to_ndarray(format="rgb24")
    with open_video(path) as reader:
        frame = reader.read([0])[0]
        assert reader.index.rotation == (-clockwise) % 360
        assert (reader.index.height, reader.index.width) == frame.shape[:2]
    assert np.array_equal(frame, np.rot90(coded, -clockwise // 90))
    assert frame.shape[:2] == ((568, 320) if clockwise in (90, 270) else (320, 568))


_OPEN_GOP = {"x264-params": "open-gop=1:scenecut=0:b-adapt=0:bframes=3:keyint=10:min-keyint=10"}
_REFRESH = {"x264-params": "intra-refresh=1:keyint=10:scenecut=0"}
_SHORT_GOP = {"x264-params": "keyint=2:bframes=1:b-adapt=0:scenecut=0"}
_HEVC = {"x265-params": "log-level=0:pools=none:frame-threads=1:scenecut=0:keyint=8:min-keyint=8:bframes=3:open-gop=1"}


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("closed.mp4", {}),
        ("closed.mkv", {}),
        ("closed.ts", {}),
        ("closed.flv", {}),
        ("raw.h264", {}),
        ("h264.avi", {}),
        ("fragments.mp4", {"container_options": {"movflags": "frag_keyframe+empty_moov"}}),
        ("open.mp4", {"options": _OPEN_GOP}),
        ("open.mkv", {"options": _OPEN_GOP}),
        ("refresh.mp4", {"options": _REFRESH}),
        ("short.mp4", {"options": _SHORT_GOP}),
        ("one_group.mp4", {"gop": 250}),
        ("intra.mp4", {"gop": 1}),
        ("mpeg4.mp4", {"codec": "mpeg4"}),
        ("mpeg4.avi", {"codec": "mpeg4"}),
        ("mpeg4.m4v", {"codec": "mpeg4"}),
        ("mpeg4_p.m4v", {"codec": "mpeg4", "b_frames": 0}),
        ("hevc.mp4", {"codec": "libx265", "options": _HEVC}),
        ("vp9.webm", {"codec": "libvpx-vp9", "options": {"deadline": "realtime", "cpu-used": "8"}}),
        ("vp8_hidden.webm", {"codec": "libvpx", "options": {"auto-alt-ref": "1", "lag-in-frames": "16"}}),
        ("mpeg2.mpg", {"codec": "mpeg2video"}),
        ("jpeg.avi", {"codec": "mjpeg", "pix_fmt": "yuvj420p"}),
        ("sound.mp4", {"audio": True}),
        ("portrait_444.mp4", {"height": 90, "width": 50, "pix_fmt": "yuv444p"}),
    ],
)
def test_written_videos_equal_a_full_decode(tmp_path, name, arguments):
    path = write_video(tmp_path / name, 32, **{"gop": 8, **arguments})
    index = _assert_equals_full_decode(path)
    assert index.num_frames == 32
    with open_video(path) as reader:
        assert frame_numbers(reader.read(range(32))) == list(range(32))
        for first in range(0, 28, 3):
            assert frame_numbers(reader.read(range(first, first + 4))) == list(range(first, first + 4))


def _remux(source, target, first_packet=0, shift=0, options=None):
    """Copy packets from ``first_packet`` on, ``shift`` frames later; some frames then cannot be presented."""
    with av.open(str(source)) as given, av.open(str(target), "w", options=options or {}) as taken:
        stream = taken.add_stream_from_template(given.streams.video[0])
        step = int(1 / (given.streams.video[0].average_rate * given.streams.video[0].time_base))
        packets = [packet for packet in given.demux(video=0) if packet.size]
        for packet in packets[first_packet:]:
            packet.pts += shift * step
            packet.dts += shift * step
            packet.stream = stream
            taken.mux(packet)
    return target


def _num_packets(path):
    with av.open(str(path)) as container:
        return sum(packet.size > 0 for packet in container.demux(video=0))


def test_frames_before_the_edit_list_are_not_presented(tmp_path):
    source = write_video(tmp_path / "source.mp4", 32, gop=16, options={"x264-params": "scenecut=0"})
    # Times below zero become an edit list: the first frames are decoded and not shown.
    path = _remux(source, tmp_path / "cut.mp4", shift=-5, options={"avoid_negative_ts": "disabled"})
    assert _num_packets(path) == 32
    index = _assert_equals_full_decode(path)
    assert index.num_frames == 27
    with open_video(path) as reader:
        assert frame_numbers(reader.read(range(27))) == list(range(5, 32))


@pytest.mark.parametrize(("codec", "options"), [("libx265", _HEVC), ("libx264", _OPEN_GOP)])
def test_a_stream_cut_at_an_open_group(tmp_path, codec, options):
    source = write_video(tmp_path / "source.mp4", 32, codec=codec, options=options, gop=8)
    with av.open(str(source)) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
    second = [place for place, packet in enumerate(packets) if packet.is_keyframe][1]
    # Pictures that follow the key frame in the file, are shown before it, and lack what they refer to.
    assert any(packet.pts < packets[second].pts for packet in packets[second:])
    path = _remux(source, tmp_path / "cut.mkv", second)
    index = _assert_equals_full_decode(path)
    assert 1 < index.num_frames < _num_packets(path)


def test_a_seek_that_goes_too_far_is_noticed(tmp_path):
    path = write_video(tmp_path / "a.mp4", 32, gop=8, options={"x264-params": "scenecut=0"})
    cache = IndexCache()
    with open_video(path, cache=cache) as reader:
        index = reader.index
    assert index.key_positions.tolist() == [0, 8, 16, 24]
    wrong = IndexCache()
    wrong.put(str(path), os.stat(path), replace(index, key_seeks=np.roll(index.key_seeks, -1)))
    with open_video(path, cache=wrong) as reader:
        assert frame_numbers(reader.read([10, 20])) == [10, 20]


def test_a_known_file_is_opened_in_the_long_way_when_the_short_one_misses_a_frame(tmp_path, monkeypatch):
    path, cache = write_video(tmp_path / "a.mp4", 30), IndexCache()
    with open_video(path, cache=cache) as reader:
        expected = reader.read([3, 9, 20])
    counter = _Counter(monkeypatch)
    with open_video(path, cache=cache) as reader:
        assert np.array_equal(reader.read([3, 9, 20]), expected)
    assert [options.get("codec_whitelist") for options in counter.options] == ["none"]
    monkeypatch.setattr(VideoReader, "_frames_from", lambda *_: iter(()))
    with open_video(path, cache=cache) as reader:
        assert np.array_equal(reader.read([3, 9, 20]), expected)
    assert [options.get("codec_whitelist") for options in counter.options[1:]] == ["none", None]


def test_order_and_repeats_are_kept(tmp_path):
    path = write_video(tmp_path / "a.mp4", 30)
    with open_video(path) as reader:
        numbers = [29, 3, 3, 0, 17, 29]
        assert frame_numbers(reader.read(numbers)) == numbers
        assert frame_numbers(reader.read(np.array([5, 4]))) == [5, 4]
        assert reader.read([]).shape == (0, 64, 80, 3)


@pytest.mark.parametrize("number", [-1, 30, 10**12])
def test_a_frame_that_is_not_there_is_named(tmp_path, number):
    with (
        open_video(write_video(tmp_path / "a.mp4", 30)) as reader,
        pytest.raises(VideoError, match=f"frame {number} was asked for, but it has 30 frames"),
    ):
        reader.read([number])


class _Counter:
    """Counts opened and closed containers and converted frames."""

    def __init__(self, monkeypatch):
        self.opened, self.closed, self.converted = 0, 0, 0
        self.options: list[dict[str, str]] = []
        real_open, real_convert = av.open, VideoReader._convert
        counter = self

        class Container:
            def __init__(self, container):
                self._container = container

            def __getattr__(self, name):
                return getattr(self._container, name)

            def close(self):
                counter.closed += 1
                self._container.close()

        def counted_open(*args, **kwargs):
            container = real_open(*args, **kwargs)
            counter.opened += 1
            counter.options.append(kwargs["options"])
            return Container(container)

        def counted_convert(reader, frame):
            counter.converted += 1
            return real_convert(reader, frame)

        monkeypatch.setattr(decode.av, "open", counted_open)
        monkeypatch.setattr(VideoReader, "_convert", counted_convert)


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.avi"])
def test_a_file_is_opened_once_and_closed_and_only_the_frames_asked_for_are_converted(tmp_path, monkeypatch, name):
    path = write_video(tmp_path / name, 30, codec="mpeg4" if name.endswith("avi") else "libx264")
    counter = _Counter(monkeypatch)
    with open_video(path) as reader:
        reader.read([7, 9, 9, 25])
    assert (counter.opened, counter.closed, counter.converted) == (1, 1, 3)


def test_a_file_is_closed_after_errors(tmp_path, monkeypatch):
    path = write_video(tmp_path / "a.mp4", 30)
    counter = _Counter(monkeypatch)
    with pytest.raises(VideoError), open_video(path) as reader:
        reader.read([99])
    monkeypatch.setattr(guard, "MAX_PIXELS", 10)
    with pytest.raises(VideoError, match="its size of 80×64 is beyond 10 pixels"):
        open_video(path)
    assert counter.opened == counter.closed == 2


def test_only_the_span_needed_is_decoded(tmp_path, monkeypatch):
    path = write_video(tmp_path / "a.mp4", 100, gop=10, options={"x264-params": "scenecut=0"})
    packets = []  # the clock is looked at once per packet
    cache = IndexCache()
    open_video(path, cache=cache).close()
    with open_video(path, cache=cache) as reader:
        monkeypatch.setattr(reader._deadline, "check", lambda: packets.append(1))
        reader.read([55, 57])
        near = len(packets)
        reader.read([2, 95])  # two groups; what lies between is left out
        far = len(packets) - near
    assert near <= 12
    assert far <= 16


@pytest.mark.parametrize(("codec", "options"), [("libx264", {"x264-params": "b-adapt=0"}), ("libx265", _HEVC)])
def test_frames_that_no_other_needs_are_left_out(tmp_path, codec, options):
    path = write_video(tmp_path / "a.mp4", 48, gop=8 if codec == "libx265" else 48, codec=codec, options=options)
    wanted = [21, 22, 23, 30]
    _, plain = _decode_all(path, set(wanted))
    with open_video(path) as reader:
        assert np.array_equal(reader.read(wanted), np.stack([plain[number] for number in wanted]))
        key = reader._last_key(21)
        assert reader._go_to(key)
        stamps = [frame.pts for frame in reader._frames_from(key, wanted)]
    given = np.searchsorted(reader.index.stamps, stamps).tolist()
    assert set(wanted) <= set(given)
    missing = set(range(key, 21)) - set(given)
    assert len(missing) >= 5 if codec == "libx264" else not missing


@pytest.mark.parametrize("name", ["a.mp4", "turned.mp4", "frames"])
def test_a_window_is_a_part_of_the_whole(tmp_path, name):
    if name == "frames":
        for number in range(6):
            Image.fromarray(number_frame(number, 64, 80)).save(tmp_path / f"{number}.png")
    else:
        write_video(tmp_path / name, 6)
    with open_video(tmp_path if name == "frames" else tmp_path / name) as reader:
        if name == "turned.mp4":
            reader.index = replace(reader.index, rotation=90, height=80, width=64)
        whole = reader.read([1, 4, 4])
        assert whole.shape == ((3, 80, 64, 3) if name == "turned.mp4" else (3, 64, 80, 3))
        part = reader.read([1, 4, 4], (slice(3, 50), slice(20, 60)))
    assert np.array_equal(part, whole[:, 3:50, 20:60])


def test_time_is_limited(tmp_path):
    path = write_video(tmp_path / "a.mp4", 30)
    with pytest.raises(VideoError, match=r"took longer than"):
        open_video(path, timeout=0.0)
    with open_video(path, timeout=30.0) as reader:
        reader._deadline._end = 0.0
        with pytest.raises(VideoError, match="took longer than 30 s"):
            reader.read([3])


def test_names_that_look_like_something_else(tmp_path, monkeypatch):
    source = write_video(tmp_path / "source.mp4", 5)
    monkeypatch.chdir(tmp_path)
    # A protocol, a pattern, an option, bytes that are no UTF-8.
    for name in ("http:a.mp4", "%03d.mp4", "-i.mp4", "a b!+(1).mp4", os.fsdecode(b"\xff\xfe.mp4")):
        shutil.copy(source, name)
        with open_video(name) as reader:
            assert frame_numbers(reader.read(range(5))) == list(range(5))


def test_a_stream_that_changes_its_size_is_scaled_to_the_first(tmp_path):
    small = write_video(tmp_path / "small.ts", 10, 64, 80)
    large = write_video(tmp_path / "large.ts", 10, 128, 160)
    path = tmp_path / "both.ts"
    path.write_bytes(small.read_bytes() + large.read_bytes())
    with open_video(path) as reader:
        frames = reader.read(range(reader.index.num_frames))
    assert frames.shape[1:] == (64, 80, 3)
    assert frame_numbers(frames)[-1] == 9
