"""Data of the shipped study: negatives, motions that only the order of the frames tells, no handwriting twice."""

import numpy as np
import pytest
from PIL import Image

from distinit_plugin.demos.motions import CLASS_NAMES
from distinit_plugin.demos.shifted import _HANDWRITINGS, make_shifted
from distinit_plugin.video.decode import open_video

SMALL = {
    "num_stills": 20,
    "num_unlabeled": 4,
    "num_train": 16,
    "num_val": 8,
    "num_test": 8,
    "size": 32,
    "num_frames": 5,
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_shifted(tmp_path_factory.mktemp("shifted") / "data", **SMALL)


def rows(path):
    return [(name, int(label)) for name, label in (row.rsplit(" ", 1) for row in path.read_text().splitlines())]


def frames(data, name):
    with open_video(data.folder / name) as video:
        return video.read(range(video.index.num_frames))


def test_every_class_is_there_equally_often(data):
    assert data.class_names.read_text().split("\n")[:-1] == list(CLASS_NAMES)
    for path, each in ((data.train, 2), (data.val, 1), (data.test, 1)):
        assert sorted(label for _, label in rows(path)) == sorted(list(range(8)) * each)


def test_opposite_labels_have_the_same_frames(data):
    for forwards, backwards in zip(rows(data.test)[::2], rows(data.test)[1::2], strict=True):
        assert backwards[1] == forwards[1] + 1
        np.testing.assert_array_equal(frames(data, forwards[0]), frames(data, backwards[0])[::-1])


def test_labelled_videos_are_negatives(data):
    """Textures are dark with bright digits where the teacher learns, and the other way round in the task."""
    unlabeled = [frames(data, name).mean() for name in data.unlabeled.read_text().split()]
    labelled = [frames(data, name).mean() for name, _ in rows(data.train)]
    assert max(unlabeled) < 127 < min(labelled)
    for (one, digit), (other, same) in zip(rows(data.stills_test), rows(data.stills_negative), strict=True):
        assert digit == same
        pair = [np.asarray(Image.open(data.folder / name)).astype(int) for name in (one, other)]
        assert (pair[0] + pair[1] == 255).all()


def test_handwritings_of_the_test_are_nowhere_else():
    others = {pool for name, pool in _HANDWRITINGS.items() if name != "test"}
    assert _HANDWRITINGS["test"] not in others
    assert _HANDWRITINGS["val"] not in {_HANDWRITINGS[name] for name in ("train", "unlabeled", "stills_train")}
