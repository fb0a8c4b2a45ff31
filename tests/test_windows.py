"""Sliding windows over videos, and ``distinit extract-features``."""

import csv
import json

import numpy as np
import pytest
import torch
from small_jobs import CLASSES, checkpoint, labelled, small_cfg
from videos import frame_numbers, write_video

from distinit_plugin import build, cli
from distinit_plugin.data.windows import SlidingWindows, Spacing
from distinit_plugin.errors import UserError, VideoError
from distinit_plugin.jobs import extraction
from distinit_plugin.jobs.extraction import extract, file_name
from distinit_plugin.jobs.running import run
from distinit_plugin.jobs.trained import read_trained
from distinit_plugin.types import SampleKey, ViewSpec
from distinit_plugin.video import decode
from distinit_plugin.video.corpus import Corpus, Listing, Mixture
from distinit_plugin.video.decode import open_video

SPEC = ViewSpec(num_frames=4, sampling_rate=3, crop_size=48)  # spans 10 frames


def windows_of(path, spacing, spec=SPEC):
    with open_video(path) as source:
        return list(SlidingWindows(source, {"rgb": spec}, spacing))


def numbers_of(window, spec=SPEC):
    return frame_numbers(window.views[spec.pixels].permute(1, 2, 3, 0).numpy())


@pytest.fixture(scope="module")
def long_video(tmp_path_factory):
    return write_video(tmp_path_factory.mktemp("long") / "long.mp4", 60, 64, 64, fps=20, gop=12)


# --------------------------------------------------------------------------------------------------- streams
@pytest.mark.parametrize("name", ["a.mp4", "a.avi", "a.mkv", "a.ts"])
def test_streams_give_what_reads_give(name, tmp_path):
    codec = "mpeg4" if name.endswith("avi") else "libx264"
    path = write_video(tmp_path / name, 40, codec=codec, gop=10)
    for wanted in ([0, 1, 2, 3], [5, 17, 18, 39], [31]):
        with open_video(path) as streamed, open_video(path) as read:
            frames = list(streamed.stream(wanted))
            np.testing.assert_array_equal(np.stack(frames), read.read(wanted))
        assert frame_numbers(np.stack(frames)) == wanted


def test_damage_in_a_stream_is_named(tmp_path):
    path = write_video(tmp_path / "a.mp4", 40, gop=10)
    with open_video(path) as source:
        whole = source.index
    data = bytearray(path.read_bytes())
    data[len(data) // 3 : len(data) // 3 + 400] = bytes(400)
    path.write_bytes(data)
    with pytest.raises(VideoError, match=r"frame \d+ of 40|cannot be"), open_video(path) as source:  # noqa: PT012
        assert source.index.num_frames == whole.num_frames
        for _ in source.stream(range(40)):
            pass


def test_folders_of_frames_stream(tmp_path):
    from PIL import Image

    for number in range(5):
        Image.new("RGB", (16, 16), (10 * number, 0, 0)).save(tmp_path / f"{number}.png")
    with open_video(tmp_path) as source:
        assert [int(frame[0, 0, 0]) for frame in source.stream([1, 3, 4])] == [10, 30, 40]


# --------------------------------------------------------------------------------------------------- windows
def test_frames_and_times_of_windows(long_video):
    found = windows_of(long_video, Spacing(stride=7))
    assert [numbers_of(window) for window in found] == [[s, s + 3, s + 6, s + 9] for s in range(0, 51, 7)]
    for window, start in zip(found, range(0, 51, 7), strict=True):
        assert (window.start, window.end) == pytest.approx((start / 20, (start + 10) / 20))


def test_windows_side_by_side_and_per_second(long_video):
    assert [numbers_of(window)[0] for window in windows_of(long_video, Spacing())] == [0, 10, 20, 30, 40, 50]
    # 4 in each of 3 seconds, as long as they fit: 0, 0.25 s, … → every 5th frame up to 50
    assert [numbers_of(w)[0] for w in windows_of(long_video, Spacing(per_second=4))] == list(range(0, 51, 5))


def test_resampled_windows_keep_the_clock_of_the_file(long_video):
    spec = ViewSpec(num_frames=4, sampling_rate=1, target_fps=10, crop_size=48)
    found = windows_of(long_video, Spacing(stride=4), spec)
    assert numbers_of(found[1], spec) == [8, 10, 12, 14]
    assert (found[1].start, found[1].end) == pytest.approx((0.4, 0.75))


def test_a_short_video_loops_in_one_window(tmp_path):
    (window,) = windows_of(write_video(tmp_path / "short.mp4", 5, 64, 64, fps=20), Spacing(stride=1))
    assert numbers_of(window) == [0, 3, 1, 4]
    assert (window.start, window.end) == pytest.approx((0, 5 / 20))


def test_one_pass_and_no_more_pictures_than_a_window_needs(long_video, monkeypatch):
    """Overlapping windows: every frame is converted once, the file is opened once, few pictures are held."""
    converted, opened, held = [], [], []
    convert, open_ = decode.VideoReader._convert, decode.VideoReader._open
    monkeypatch.setattr(decode.VideoReader, "_convert", lambda s, f: converted.append(f.pts) or convert(s, f))
    monkeypatch.setattr(decode.VideoReader, "_open", lambda s, **how: opened.append(1) or open_(s, **how))
    with open_video(long_video) as source:
        windows = SlidingWindows(source, {"rgb": SPEC}, Spacing(stride=1))
        for _ in (stream := iter(windows)):
            held.append(len(stream.gi_frame.f_locals["held"]))
    assert len(held) == 51
    assert len(converted) == len(set(converted)) == 60
    assert len(opened) == 1
    assert max(held) == 10  # the span of a window


# ------------------------------------------------------------------------------------------------ whole jobs
@pytest.fixture(scope="module")
def trained(videos, tmp_path_factory):
    output = tmp_path_factory.mktemp("trained") / "run"
    sections = labelled(videos, TRAIN="train")
    sections["CORPUS"]["TEST_SCALE"] = 40
    run(small_cfg(videos, output, **sections))
    return checkpoint(output)


@pytest.fixture
def paths(videos):
    return [str(videos / "test" / name / "video100.mp4") for name in CLASSES]


def from_test_loop(trained, path, stride):
    """Features and logits of the dense clips that the test loop would make of a video."""
    cfg = read_trained(str(trained)).cfg
    cfg.defrost()
    cfg.CORPUS.TEST_CLIPS, cfg.CORPUS.DENSE_STRIDE = "dense", stride
    network = read_trained(str(trained)).network().eval()
    listing = Listing(root="", labeled=False)
    listing.add(path)
    dataset = build.build_dataset(
        cfg, Mixture([Corpus("x", listing)]), build.view_specs(network, {}, "test"), "test", keep_index=False
    )
    from distinit_plugin.data.views import finish_views

    rows = []
    for clip in range(dataset.count_clips(0)):
        sample = dataset[SampleKey(0, 0, 0, clip)]
        views = finish_views({k: v[None] for k, v in sample["views"].items()}, network.view_specs("test"), "cpu")
        with torch.inference_mode():
            rows.append(network(views, taps=["layer2"]))
    return rows


def test_values_are_those_of_the_test_loop(trained, paths, tmp_path):
    layers = ["features", "logits", "layer2"]
    result = extract(paths, checkpoint=str(trained), output=tmp_path, spacing=Spacing(stride=2), layers=layers)
    assert list(result.done) == paths
    assert not result.bad
    for path in paths:
        rows = np.load(result.done[path], allow_pickle=False)
        expected = from_test_loop(trained, path, 2)
        assert len(rows) == len(expected) == 3  # 12 frames, a clip spans 7: starts 0, 2, 4
        np.testing.assert_allclose(rows["features"], torch.cat([row.features for row in expected]), atol=1e-5)
        np.testing.assert_allclose(rows["logits"], torch.cat([row.logits for row in expected]), atol=1e-5)
        maps = torch.cat([row.taps["layer2"].mean((2, 3, 4)) for row in expected])
        np.testing.assert_allclose(rows["layer2"], maps, atol=1e-5)
        assert np.abs(np.diff(rows["features"], axis=0)).max() > 1e-3  # windows differ, so the equality says something
        np.testing.assert_allclose(rows["start"], np.array([0, 2, 4]) / 25)
        np.testing.assert_allclose(rows["end"], np.array([7, 9, 11]) / 25)


def test_precision_is_the_trainings_fp32_or_what_is_asked_for(trained, paths, tmp_path):
    def features(name, opts):
        done = extract(paths[:1], checkpoint=str(trained), output=tmp_path / name, spacing=Spacing(stride=2), opts=opts)
        assert not done.bad
        settings = json.loads((tmp_path / name / "settings.json").read_text())
        return settings["precision"], np.load(done.done[paths[0]], allow_pickle=False)["features"]

    precision, exact = features("as_trained", [])
    assert precision == "fp32"
    precision, rounded = features("bf16", ["RUNNER.PRECISION", "bf16"])
    assert precision == "bf16"
    assert 1e-5 < np.abs(rounded - exact).max() < 0.1 * np.abs(exact).max()
    with pytest.raises(UserError, match="precision: bf16 there, fp32 now"):
        features("bf16", ["RUNNER.PRECISION", "fp32"])


def test_a_stopped_job_goes_on_and_other_settings_are_refused(trained, paths, tmp_path, capsys, monkeypatch):
    words = ["extract-features", *paths, "--checkpoint", str(trained), "--output", str(tmp_path / "out")]
    assert cli.main([*words, "--stride", "4"]) == 0
    (first, second) = (tmp_path / "out" / file_name(path, "npy") for path in paths)
    before = first.read_bytes()
    second.unlink()
    first.touch()
    opened = []
    open_ = extraction.open_video
    monkeypatch.setattr(extraction, "open_video", lambda path, **kw: opened.append(path) or open_(path, **kw))
    assert cli.main([*words, "--stride", "4"]) == 0
    assert opened == paths[1:]
    assert (first.read_bytes(), second.is_file()) == (before, True)
    capsys.readouterr()
    assert cli.main([*words, "--stride", "2"]) == 1
    error = capsys.readouterr().err
    assert "windows: every 4 frames there, every 2 frames now" in error
    assert "weights" not in error
    assert cli.main([*words, "--stride", "4", "--layer", "features"]) == 1
    assert "layers: features, logits there, features now" in capsys.readouterr().err
    settings = tmp_path / "out" / "settings.json"
    kept = settings.read_text()
    settings.write_text("[" * 100_000)
    assert cli.main([*words, "--stride", "4"]) == 1
    assert "is not readable as settings of" in capsys.readouterr().err
    settings.write_text(kept)
    with open(tmp_path / "out" / "videos.csv") as file:
        assert {row["video"]: row["file"] for row in csv.DictReader(file)} == {
            paths[0]: first.name,
            paths[1]: second.name,
        }


def test_bad_videos_are_named_and_the_others_done(trained, paths, tmp_path, capsys):
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"nothing")
    listed = tmp_path / "list.txt"
    listed.write_text(f"{paths[0]}\nbroken.mp4\nabsent.mp4\n")
    output = tmp_path / "out"
    words = ["extract-features", "--list", str(listed), "--checkpoint", str(trained), "--output", str(output)]
    assert cli.main(words) == 1
    error = capsys.readouterr().err
    assert f"error: {broken}: " in error
    assert "absent.mp4: cannot be opened" in error
    assert sorted(path.name for path in output.iterdir()) == sorted(
        ["settings.json", "videos.csv", file_name(paths[0], "npy")]
    )
    assert set(json.loads((output / "settings.json").read_text())) > {"weights", "windows", "layers", "views"}


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--checkpoint", "{trained}"], "there are no videos"),
        (["{video}", "--checkpoint", "absent.pyth"], "absent.pyth"),
        (["{video}", "--checkpoint", "{video}"], "cannot be read"),
        (["{video}", "--checkpoint", "{trained}", "--layer", "layer9"], "--layer layer9"),
        (["--list", "absent.txt", "--checkpoint", "{trained}"], "absent.txt"),
    ],
)
def test_mistakes(words, expected, trained, paths, tmp_path, capsys):
    filled = [word.format(trained=trained, video=paths[0]) for word in words]
    assert cli.main(["extract-features", *filled, "--output", str(tmp_path / "out")]) == 1
    assert expected in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_parquet(trained, paths, tmp_path, capsys, monkeypatch):
    words = ["extract-features", paths[0], "--checkpoint", str(trained), "--output", str(tmp_path), "--stride", "2"]
    with monkeypatch.context() as context:
        context.setitem(__import__("sys").modules, "pyarrow", None)
        assert cli.main([*words, "--format", "parquet"]) == 1
        assert "pip install 'distinit-plugin[parquet]'" in capsys.readouterr().err
        assert list(tmp_path.iterdir()) == []
    parquet = pytest.importorskip("pyarrow.parquet", reason="the extra parquet is not installed")
    assert cli.main([*words, "--format", "parquet"]) == 0
    table = parquet.read_table(tmp_path / file_name(paths[0], "parquet"))
    assert table.column_names == ["start", "end", "features", "logits"]
    assert cli.main([*words[:-3], str(tmp_path / "npy"), "--stride", "2"]) == 0
    rows = np.load(tmp_path / "npy" / file_name(paths[0], "npy"), allow_pickle=False)
    for name in table.column_names:
        np.testing.assert_array_equal(np.array(table[name].to_pylist()), rows[name])
