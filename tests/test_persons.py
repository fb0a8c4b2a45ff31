"""The small set in AVA's form: its files are AVA's, its boxes are what is drawn, one frame does not tell what moves."""

from dataclasses import replace

import numpy as np
import pytest

from distinit_plugin.demos import figures
from distinit_plugin.demos.persons import ACTION_NAMES, FIRST_SECOND, START, STILL_ACTIONS, actions_of, make_persons
from distinit_plugin.detection.files import read_boxes, read_excluded, read_frame_list, read_label_map, read_truth
from distinit_plugin.errors import UserError
from distinit_plugin.video.decode import open_video

LABEL_MAP = "ava_action_list_v2.2_for_activitynet_2019.pbtxt"


def some_figures(seed=0, height=96, width=128):
    return figures.cast(range(902, 912), height, width, np.random.default_rng(seed))


def test_files_are_those_of_ava(persons):
    truth = read_truth(persons.annotations / "ava_train_v2.2.csv")
    assert set(truth.videos) == set(persons.names("train"))
    assert set(truth.seconds) <= {902.0, 903.0, 904.0, 905.0}
    assert (truth.boxes >= 0).all()
    assert (truth.boxes <= 1).all()
    assert truth.persons is not None
    found = read_boxes(persons.annotations / "ava_val_predicted_boxes.csv")
    assert (found.actions == -1).all()
    assert (found.scores > 0.9).any()
    assert (found.scores < 0.9).any()
    assert read_label_map(persons.annotations / LABEL_MAP) == dict(enumerate(ACTION_NAMES, start=1))
    ((video, second),) = read_excluded(persons.annotations / "ava_val_excluded_timestamps_v2.2.csv")
    val = read_truth(persons.annotations / "ava_val_v2.2.csv")
    assert not ((val.video == val.videos.index(video)) & (val.seconds == second)).any() if video in val.videos else True
    for split in ("train", "val"):
        lists = read_frame_list(persons.frame_lists / f"{split}.csv")
        assert set(lists) == set(persons.names(split))
        for name, paths in lists.items():
            with open_video(persons.videos / f"{name}.mp4") as video_file:
                assert len(paths) == len(video_file.index.timeline(30))
            assert paths[0] == f"{name}/{name}_000001.png"
            assert all((persons.frames / path).is_file() for path in paths)


def test_persons_do_several_things_at_once():
    made = [figure for seed in range(20) for figure in some_figures(seed)]
    counts = np.zeros(len(ACTION_NAMES), dtype=int)
    boxes = 0
    for figure in made:
        for second in range(figure.first, figure.last + 1):
            actions = actions_of(figure, second)
            assert 2 <= len(actions) <= 4
            assert len(actions) == len(set(actions))
            counts[np.array(actions) - 1] += 1
            boxes += 1
    assert (counts > 0.15 * boxes).all()  # no action is rare
    assert (counts < 0.6 * boxes).all()
    assert set(STILL_ACTIONS) == {1 + ACTION_NAMES.index(name) for name in (*figures.POSES, "carry")}


def test_some_seconds_have_nobody_and_some_several():
    numbers = [
        sum(figure.first <= second <= figure.last for figure in some_figures(seed))
        for seed in range(20)
        for second in range(902, 912)
    ]
    assert numbers.count(0) >= 10
    assert max(numbers) == figures.LANES
    assert np.mean(numbers) > 1.5


@pytest.mark.parametrize("seed", range(3))
def test_boxes_hold_exactly_what_is_drawn(seed):
    for figure in some_figures(seed)[:4]:
        figure = replace(figure, flashes=False, colour=np.ones(3, np.float32))
        times = figure.first + np.array([-0.3, 0.0, 0.4])
        empty, drawn = (
            figures.draw(shown, times, 96, 128, np.random.default_rng(5)).astype(int) for shown in ([], [figure])
        )
        for time, changed in zip(times, np.abs(drawn - empty).sum(axis=-1) > 0, strict=True):
            rows, columns = np.flatnonzero(changed.any(axis=1)), np.flatnonzero(changed.any(axis=0))
            x1, y1, x2, y2 = figure.box(float(time))
            inner = np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])
            outside = np.array([columns[0] + 1 - x1, rows[0] + 1 - y1, x2 - columns[-1], y2 - rows[-1]])
            assert (outside > 0).all()  # nothing is drawn beyond the box
            assert np.abs(inner - [x1, y1, x2, y2]).max() < 1.5  # and it is tight
            assert 0 <= x1 < x2 <= 128
            assert 0 <= y1 < y2 <= 96


def test_one_frame_does_not_tell_the_moves():
    """The picture of a keyframe is the same whatever the move; a quarter of a second later it is not."""
    figure = next(figure for figure in some_figures(1) if len(figure.moves) > 1)
    pictures = {}
    for name, shift in (("climb", -10.0), ("descend", 10.0), ("stay", 0.0)):
        moved = replace(figure, tops=(30 - shift / 2, 30 + shift / 2), moves=(name,), flashes=False)
        times = moved.first + np.array([0.0, 0.25])
        pictures[name] = figures.draw([moved], times, 96, 128, np.random.default_rng(0))
    for other in ("climb", "descend"):
        assert np.array_equal(pictures["stay"][0], pictures[other][0])
        assert not np.array_equal(pictures["stay"][1], pictures[other][1])
    brightness = [replace(figure, flashes=True).brightness(902 + step / 25) for step in range(25)]
    assert min(brightness) < 0.55
    assert max(brightness) > 0.95
    assert {replace(figure, flashes=False).brightness(902 + step / 25) for step in range(25)} == {1.0}


def test_the_set_is_a_function_of_its_arguments(tmp_path):
    small = {"num_train": 1, "num_test": 1, "num_keyframes": 2, "height": 32, "width": 48}
    first = make_persons(tmp_path / "a", **small)
    again = make_persons(tmp_path / "b", **small)
    other = make_persons(tmp_path / "c", **small, seed=1)
    files = sorted(path.relative_to(first.folder) for path in first.folder.rglob("*.*") if path.is_file())
    assert len(files) == 9
    for path in files:
        same = (first.folder / path).read_bytes() == (again.folder / path).read_bytes()
        assert same
    assert (first.videos / "val_0000.mp4").read_bytes() != (other.videos / "val_0000.mp4").read_bytes()
    made = (first.videos / "val_0000.mp4").stat().st_mtime_ns
    make_persons(tmp_path / "a", **small)  # nothing to do
    assert (first.videos / "val_0000.mp4").stat().st_mtime_ns == made
    with open_video(first.videos / "train_0000.mp4") as video:
        last = FIRST_SECOND + 1 - START
        assert last < video.index.seconds[-1] < last + 1
    for wrong, message in (
        ({"height": 33}, "even"),
        ({"num_keyframes": 0}, "at least 1"),
        ({"width": 8}, "at least 48"),
    ):
        with pytest.raises(UserError, match=message):
            make_persons(tmp_path / "d", **{**small, **wrong})
