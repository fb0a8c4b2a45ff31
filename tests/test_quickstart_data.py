"""The demonstration's data: real files, labels that say what is seen, pools that share nothing, stopped runs."""

import errno
import fcntl
import hashlib
import json
import os
import stat
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from distinit_plugin import files as writing
from distinit_plugin.demos import files
from distinit_plugin.demos.digits import CLASS_NAMES, LABELED_MOTIONS, digit_pools, make_digits
from distinit_plugin.demos.drawing import MOTIONS, draw_still, draw_video
from distinit_plugin.demos.files import encode_h264
from distinit_plugin.errors import UserError

SMALL = {
    "seed": 3,
    "num_unlabeled": 4,
    "num_labeled_train": 5,
    "num_labeled_test": 4,
    "num_stills": 12,
    "size": 48,
    "num_frames": 6,
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_digits(tmp_path_factory.mktemp("digits"), **SMALL)


def fingerprints(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def decode(path: Path) -> tuple[np.ndarray, av.VideoStream]:
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.thread_type = "NONE"
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]), stream


def ink_in_empty_scene(motion: str, seed: int = 0, num_frames: int = 9) -> np.ndarray:
    """(T,H,W): where the digit is, as the difference from the same scene with an empty digit."""
    images, pools = digit_pools(0)
    arguments = {"scraps": images[:4], "size": 64, "num_frames": num_frames}
    with_digit = draw_video(images[pools["train"][4][0]], motion, rng=np.random.default_rng(seed), **arguments)
    without = draw_video(np.zeros((8, 8), np.float32), motion, rng=np.random.default_rng(seed), **arguments)
    return np.abs(with_digit.astype(float) - without).sum(axis=-1)


def centre(ink: np.ndarray) -> tuple[float, float]:
    ys, xs = np.indices(ink.shape)
    return float((xs * ink).sum() / ink.sum()), float((ys * ink).sum() / ink.sum())


def orientation(ink: np.ndarray) -> float:
    """Angle of the longest axis, radians in (−π/2, π/2], clockwise on the screen."""
    x, y = centre(ink)
    ys, xs = np.indices(ink.shape)
    xx, yy, xy = (((a * b) * ink).sum() for a, b in ((xs - x, xs - x), (ys - y, ys - y), (xs - x, ys - y)))
    return float(0.5 * np.arctan2(2 * xy, xx - yy))


def test_files_are_what_the_lists_say(data):
    names = data.class_names.read_text().split("\n")[:-1]
    assert names == list(CLASS_NAMES)
    assert len(names) == 20
    unlabeled = data.unlabeled.read_text().split()
    train = [row.rsplit(" ", 1) for row in data.train.read_text().splitlines()]
    test = [row.rsplit(" ", 1) for row in data.test.read_text().splitlines()]
    stills = [row.rsplit(" ", 1) for row in data.stills_train.read_text().splitlines()]
    assert [len(rows) for rows in (unlabeled, train, test, stills)] == [4, 5, 4, 12]
    assert [int(label) for _, label in train] == [0, 1, 2, 3, 4]
    assert [int(label) for _, label in stills] == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1]
    for path in [*unlabeled, train[0][0], test[0][0]]:
        frames, stream = decode(data.folder / path)
        assert frames.shape == (6, 48, 48, 3)
        assert stream.codec_context.name == "h264"
        assert stream.average_rate == Fraction(25)
        assert frames.std() > 10, "a picture, not a grey area"
    with Image.open(data.folder / stills[0][0]) as image:
        assert image.size == (48, 48)
        assert image.mode == "RGB"


def test_same_arguments_give_the_same_bytes_and_another_seed_does_not(data, tmp_path):
    again = make_digits(tmp_path / "again", **SMALL)
    assert fingerprints(again.folder) == fingerprints(data.folder)
    other = make_digits(tmp_path / "other", **{**SMALL, "seed": 4})
    first, second = fingerprints(data.folder), fingerprints(other.folder)
    media = [name for name in first if name.endswith((".mp4", ".png"))]
    assert len(media) > 20
    assert not [name for name in media if first[name] == second[name]]


def test_a_file_does_not_depend_on_how_many_there_are(data, tmp_path):
    more = make_digits(tmp_path / "more", **{**SMALL, "num_unlabeled": 6})
    first, second = fingerprints(data.folder), fingerprints(more.folder)
    assert all(second[name] == first[name] for name in first if name.endswith(".mp4"))


def test_finished_data_are_left_alone_and_a_stopped_run_is_done_again(tmp_path):
    data = make_digits(tmp_path, **SMALL)
    before = fingerprints(tmp_path)
    video = tmp_path / "unlabeled" / "00000.mp4"
    age = video.stat().st_mtime_ns
    make_digits(tmp_path, **SMALL)
    assert video.stat().st_mtime_ns == age

    seen = []

    def stop_in_the_middle(done: int, total: int) -> None:
        seen.append((done, total))
        if done == 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_digits(tmp_path, **{**SMALL, "num_frames": 7}, on_progress=stop_in_the_middle)
    assert not (tmp_path / files.MANIFEST).exists()
    assert seen == [(number, 35) for number in range(1, 9)]
    make_digits(tmp_path, **SMALL)
    assert fingerprints(tmp_path) == before
    assert data.train.exists()


def test_one_process_at_a_time_fills_a_folder(tmp_path, monkeypatch):
    """Another one would empty the folders that this one fills."""
    monkeypatch.setattr(writing, "LOCK_SECONDS", 0.0)
    with writing.writing_alone(tmp_path, "it"), pytest.raises(UserError, match="another process is writing the data"):
        make_digits(tmp_path, **SMALL)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be made: Not a directory"):
        make_digits(tmp_path / "file" / "data", **SMALL)


def test_a_folder_on_a_network_disk_is_filled(tmp_path, monkeypatch):
    """Where folders cannot be locked a file is, before anything else is there."""

    def as_nfs(handle, operation):
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(errno.EBADF, "Bad file descriptor")

    monkeypatch.setattr(fcntl, "flock", as_nfs)
    make_digits(tmp_path, **SMALL)
    assert {writing.LOCK_FILE, files.MANIFEST} <= {path.name for path in tmp_path.iterdir()}


def test_other_peoples_files_are_never_removed(tmp_path):
    mine = tmp_path / "train" / "holiday.mp4"
    mine.parent.mkdir()
    mine.write_bytes(b"precious")
    with pytest.raises(UserError, match="holds files that the demonstration did not write"):
        make_digits(tmp_path, **SMALL)
    assert mine.read_bytes() == b"precious"


def test_a_manifest_that_cannot_be_read_means_not_finished(tmp_path):
    make_digits(tmp_path, **SMALL)
    before = fingerprints(tmp_path)
    (tmp_path / files.MANIFEST).write_text('{"layout": ')
    (tmp_path / "unlabeled" / "00001.mp4").unlink()
    make_digits(tmp_path, **SMALL)
    assert fingerprints(tmp_path) == before
    assert json.loads((tmp_path / files.MANIFEST).read_text())["seed"] == 3


@pytest.mark.parametrize(
    ("change", "words"),
    [({"size": 49}, "even number"), ({"size": 8}, "at least 32"), ({"num_unlabeled": 0}, "num_unlabeled is 0")],
)
def test_senseless_numbers_are_refused(tmp_path, change, words):
    with pytest.raises(UserError, match=words):
        make_digits(tmp_path / "new", **{**SMALL, **change})
    assert not (tmp_path / "new").exists()


def test_no_picture_is_in_two_pools():
    images, pools = digit_pools(0)
    rows = [row for by_digit in pools.values() for part in by_digit for row in part]
    assert sorted(rows) == list(range(len(images)))
    assert all(len(part) >= 10 for by_digit in pools.values() for part in by_digit)


@pytest.mark.parametrize("motion", MOTIONS)
def test_the_motion_is_the_one_of_the_name(motion):
    ink = ink_in_empty_scene(motion)
    first, last = ink[0], ink[-1]
    right, down = (after - before for before, after in zip(centre(first), centre(last), strict=True))
    growth = last.sum() / first.sum()
    turn = (orientation(last) - orientation(first) + np.pi / 2) % np.pi - np.pi / 2
    shift = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}.get(motion, (0, 0))
    for moved, sign in zip((right, down), shift, strict=True):
        assert moved * sign > 12 if sign else abs(moved) < 4
    assert (growth > 1.4) == (motion == "zoom_in")
    assert (growth < 1 / 1.4) == (motion == "zoom_out")
    assert (turn > 0.6) == (motion == "clockwise")
    assert (turn < -0.6) == (motion == "counterclockwise")


def test_the_middle_frame_does_not_tell_the_motion():
    """Played backwards, a video to the left is one to the right: its frames alone hold no label."""
    left, right = (ink_in_empty_scene(motion) for motion in LABELED_MOTIONS)
    middle = len(left) // 2
    np.testing.assert_array_equal(left[middle], right[middle])
    assert np.abs(left[0] - right[0]).max() > 100


def test_the_background_moves_whatever_the_digit_does():
    images, _ = digit_pools(0)
    empty = np.zeros((8, 8), np.float32)
    drawn = {
        motion: draw_video(
            empty, motion, scraps=images[:8], size=64, num_frames=5, rng=np.random.default_rng(1)
        ).astype(int)
        for motion in ("left", "right")
    }
    assert np.abs(drawn["left"][0] - drawn["left"][-1]).mean() > 1
    np.testing.assert_array_equal(drawn["left"], drawn["right"])


def test_a_still_is_drawn_as_a_frame_is():
    images, pools = digit_pools(0)
    stills = [
        draw_still(images[pools["stills_train"][7][k]], scraps=images[:8], size=64, rng=np.random.default_rng(k))
        for k in range(6)
    ]
    assert all(still.shape == (64, 64, 3) and still.dtype == np.uint8 for still in stills)
    assert len({still.tobytes() for still in stills}) == 6


def test_without_an_encoder_the_error_says_what_to_do(tmp_path, monkeypatch):
    class NoEncoder:
        def __init__(self, *_args, **_kwargs):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *_):
            return None

        def add_stream(self, name, rate):
            raise av.codec.codec.UnknownCodecError(name)

    monkeypatch.setattr(files.av, "open", NoEncoder)
    with pytest.raises(UserError, match="libx264"):
        encode_h264(np.zeros((2, 32, 32, 3), np.uint8), tmp_path / "x.mp4")


def test_the_encoded_video_shows_what_was_drawn(tmp_path):
    images, _ = digit_pools(0)
    drawn = draw_video(images[0], "right", scraps=images[1:5], size=64, num_frames=10, rng=np.random.default_rng(0))
    encode_h264(drawn, tmp_path / "x.mp4")
    decoded, _ = decode(tmp_path / "x.mp4")
    assert not list(tmp_path.glob("*.part*"))
    assert np.abs(decoded.astype(float) - drawn).mean() < 8
    swapped = np.abs(decoded.astype(float) - drawn[::-1]).mean()
    assert swapped > 10, "negative control: another order of the frames is seen"
