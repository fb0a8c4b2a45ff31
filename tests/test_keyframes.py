"""Which keyframes are used and which boxes they have, against loops written from the descriptions."""

import csv
from collections import defaultdict

import numpy as np
import pytest

from distinit_plugin.detection.files import read_truth
from distinit_plugin.detection.joining import join, label_by_overlap, select
from distinit_plugin.detection.keyframes import Choice, Keyframes, Moment, evaluated_keyframes, training_keyframes
from distinit_plugin.detection.tables import NO_ACTION, BoxTable
from distinit_plugin.errors import UserError

ALL = Choice()


class Anywhere:
    """Pictures of every video, or of those named."""

    start = 900.0

    def __init__(self, *names: str) -> None:
        self._names = names

    def path(self, name):
        return f"/videos/{name}.mp4"

    def has(self, name):
        return not self._names or name in self._names


def table(*rows: tuple, keyframes=()) -> BoxTable:
    """Rows of (video, second, box, action, score)."""
    videos = tuple(dict.fromkeys([row[0] for row in rows] + [video for video, _ in keyframes]))
    return BoxTable(
        videos,
        np.array([videos.index(row[0]) for row in rows], dtype=np.int32),
        np.array([row[1] for row in rows], dtype=np.float64),
        np.array([row[2] for row in rows], dtype=np.float64).reshape(-1, 4),
        np.array([row[3] for row in rows], dtype=np.int32),
        np.array([row[4] if len(row) > 4 else 1.0 for row in rows], dtype=np.float64),
        np.array([(videos.index(video), second) for video, second in keyframes], dtype=np.float64).reshape(-1, 2),
    )


def rows_of(given: BoxTable) -> list[tuple]:
    return [
        (given.videos[video], second, tuple(box), action, score)
        for video, second, box, action, score in zip(
            given.video.tolist(),
            given.seconds.tolist(),
            given.boxes.tolist(),
            given.actions.tolist(),
            given.scores.tolist(),
            strict=True,
        )
    ]


def random_rows(rng, count, *, actions=True, videos="abc") -> list[tuple]:
    """Rows of few distinct boxes, so that people do several things, in any order."""
    boxes = [(0.1, 0.1, 0.5, 0.9), (0.5, 0.2, 0.8, 0.7), (0.1, 0.1, 0.5, 0.85), (0.11, 0.1, 0.5, 0.9)]
    return [
        (
            str(rng.choice(list(videos))),
            float(rng.integers(900, 906)),
            boxes[rng.integers(4)],
            int(rng.integers(1, 6)) if actions and rng.random() < 0.8 else NO_ACTION,
            float(rng.uniform()),
        )
        for _ in range(count)
    ]


def joined_by_loop(truth, predicted, least_score, first=902, last=1798):
    """PySlowFast's ``parse_bboxes_file`` and ``get_keyframe_data``: video → second → box → actions."""
    found = defaultdict(lambda: defaultdict(dict))
    for row in truth + [row for row in predicted if row[4] >= least_score]:
        video, second, box, action, _ = row
        actions = found[video][second].setdefault(box, set())
        if action != NO_ACTION:
            actions.add(action)
    return {
        (video, second): boxes
        for video, seconds in found.items()
        for second, boxes in seconds.items()
        if first <= second <= last
    }


@pytest.mark.parametrize("seed", range(5))
def test_keyframes_are_joined_as_pyslowfast_joins_them(seed):
    rng = np.random.default_rng(seed)
    truth, predicted = random_rows(rng, 60), random_rows(rng, 40)
    made = training_keyframes(
        "train", [table(*truth[:20]), table(*truth[20:])], [table(*predicted)], Anywhere(), choice=ALL, least_score=0.4
    )
    expected = joined_by_loop(truth, predicted, 0.4)
    moments = [made.moment(index) for index in range(len(made))]
    assert moments == sorted(expected)
    assert made.sizes == (len(expected),)
    for index, moment in enumerate(moments):
        boxes = expected[moment]
        assert [tuple(box) for box in made.boxes(index).tolist()] == list(boxes)  # in the order of their first rows
        actions = made.actions(index, 7)
        assert [set(np.flatnonzero(row) + 1) for row in actions] == list(boxes.values())
        assert actions.dtype == np.float32
        assert set(np.unique(actions)) <= {0, 1}
    assert made.num_boxes == sum(map(len, expected.values()))
    assert made.has_actions


@pytest.mark.parametrize("name", ["ava_sample.csv", "ava_boxes_thirdparty_sample.csv", "shared_small_gt.csv"])
def test_real_annotations(assets, name):
    rows = []
    with open(assets / "ava" / name, newline="") as file:
        for video, second, *cells in csv.reader(file):
            rows.append((video, float(second), tuple(map(float, cells[:4])), int(cells[4]), 1.0))
    made = training_keyframes(
        name, [read_truth(assets / "ava" / name)], [], Anywhere(), choice=Choice(0, 1e6), least_score=0
    )
    expected = joined_by_loop(rows, [], 0, 0, 1e6)
    assert [made.moment(index) for index in range(len(made))] == sorted(expected)
    for index in range(0, len(made), 53):
        boxes = expected[made.moment(index)]
        assert [tuple(box) for box in made.boxes(index).tolist()] == list(boxes)
        assert [set(np.flatnonzero(row) + 1) for row in made.actions(index, 80)] == list(boxes.values())


def test_boxes_that_are_nearly_equal_are_two_persons():
    rows = [("a", 902.0, (0.1, 0.1, 0.5, 0.9), 1), ("a", 902.0, (0.1, 0.1, 0.501, 0.9), 2)]
    made = training_keyframes("train", [table(*rows)], [], Anywhere(), choice=ALL, least_score=0)
    assert made.actions(0, 2).tolist() == [[1, 0], [0, 1]]


@pytest.mark.parametrize("least_iou", [0.3, 0.9, 1.0])
def test_predicted_boxes_take_the_actions_of_those_they_overlap(least_iou):
    rng = np.random.default_rng(1)
    truth, predicted = random_rows(rng, 40), random_rows(rng, 30, actions=False) + random_rows(rng, 10)
    expected = []
    for video, second, box, action, score in predicted:
        if action != NO_ACTION:
            expected.append((video, second, box, action, score))
            continue
        best, found = least_iou, []
        for other in truth:
            if other[:2] == (video, second) and other[3] != NO_ACTION:
                value = iou(box, other[2])
                if value > best:
                    best, found = value, []
                if value == best:
                    found.append(other[3])
        expected += [(video, second, box, action, score) for action in found]
    made = rows_of(label_by_overlap(table(*predicted), table(*truth), least_iou))
    assert sorted(made) == sorted(expected)
    assert len(made) > 10
    assert made != rows_of(table(*predicted))


def iou(first, second):
    width = min(first[2], second[2]) - max(first[0], second[0])
    height = min(first[3], second[3]) - max(first[1], second[1])
    common = max(width, 0.0) * max(height, 0.0)
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (first, second)]
    return common / (areas[0] + areas[1] - common)


def test_overlap_with_nothing_to_compare():
    nothing = table()
    boxes = table(("a", 902.0, (0, 0, 1, 1), NO_ACTION), ("b", 903.0, (0, 0, 1, 1), 2))
    assert rows_of(label_by_overlap(boxes, nothing, 0.5)) == [("b", 903.0, (0.0, 0.0, 1.0, 1.0), 2, 1.0)]
    assert len(label_by_overlap(nothing, boxes, 0.5)) == 0
    assert len(join([])) == 0
    assert len(select(boxes, np.array([False, False]))) == 0


BOX = (0.1, 0.1, 0.5, 0.9)
TRUTH = table(
    ("b", 904.0, BOX, 2), ("b", 905.0, BOX, 1), ("a", 908.0, BOX, 1), ("a", 2000.0, BOX, 1), keyframes=[("a", 904.0)]
)


def moments_of(made: Keyframes) -> list[tuple[str, float]]:
    return [tuple(made.moment(index)) for index in range(len(made))]


def test_keyframes_of_a_test():
    def make(boxes, choice=ALL):
        return evaluated_keyframes("val", TRUTH, Anywhere(), choice=choice, boxes=boxes)

    truth = make("ground_truth")
    assert moments_of(truth) == [("a", 908.0), ("b", 904.0), ("b", 905.0)]
    assert truth.has_boxes
    assert truth.has_actions
    assert truth.actions(1, 2).tolist() == [[0, 1]]
    assert not make("predicted").has_actions
    free = make("none")  # the network proposes: keyframes in which nobody is are asked, too
    assert moments_of(free) == [("a", 904.0), ("a", 908.0), ("b", 904.0), ("b", 905.0)]
    assert not free.has_boxes
    assert len(free.boxes(0)) == 0
    assert moments_of(make("none", Choice(every=4))) == [("a", 904.0), ("a", 908.0), ("b", 904.0)]
    assert moments_of(make("ground_truth", Choice(excluded={("b", 904.0)}))) == [("a", 908.0), ("b", 905.0)]
    assert moments_of(make("ground_truth", Choice(first=0, last=904.5))) == [("b", 904.0)]
    assert [truth[index].path for index in range(3)] == ["/videos/a.mp4", "/videos/b.mp4", "/videos/b.mp4"]
    assert truth.num_videos == 2
    with pytest.raises(IndexError, match="no number 3"):
        truth.moment(3)


def test_no_box_at_all_is_a_clear_error():
    boxes = table(("a", 904.0, BOX, NO_ACTION, 0.4), ("a", 905.0, BOX, NO_ACTION, 0.6))
    with pytest.raises(
        UserError, match=r"val.csv: no keyframe is left.*2 rows, 0 with a score of at least 0.9 \(AVA.DET"
    ):
        evaluated_keyframes("val.csv", boxes, Anywhere(), choice=ALL, boxes="predicted", least_score=0.9)
    with pytest.raises(UserError, match=r"no keyframe is left.*902 to 1798 \(KEYFRAMES.SECONDS\), divisible by 4"):
        evaluated_keyframes("val.csv", table(), Anywhere(), choice=Choice(every=4), boxes="predicted")
    with pytest.raises(UserError, match=r"0 annotated rows, 2 predicted ones, 1 with a score.*, 0 with actions"):
        training_keyframes("x", [], [boxes], Anywhere(), choice=ALL, least_score=0.5, label_iou=0.5)


def test_boxes_outside_the_picture_are_left_out_and_named():
    rows = [
        ("a", 904.0, BOX, 1),
        ("a", 904.0, (1.0, 0.2, 1.3, 0.5), 1),
        ("a", 904.0, (0.5, 0.2, 0.5, 0.5), 1),
        ("a", 904.0, (-0.2, 0.2, 0.4, 1.5), 2),  # partly inside: as it is
        ("a", 905.0, (0.2, -0.5, 0.4, 0.0), 1),  # the keyframe's only one
    ]
    made = training_keyframes("train", [table(*rows)], [], Anywhere(), choice=ALL, least_score=0)
    assert moments_of(made) == [("a", 904.0)]
    assert made.boxes(0).tolist() == [list(BOX), [-0.2, 0.2, 0.4, 1.5]]
    assert made.notes == ["3 of 5 boxes are empty or outside the picture; they are left out."]


def test_wrong_actions_are_named():
    rows = [("a", 904.0, BOX, 3), ("a", 905.0, BOX, 81), ("a", 905.0, BOX, 1), ("b", 902.0, BOX, 90)]
    made = training_keyframes("train.csv", [table(*rows)], [], Anywhere(), choice=ALL, least_score=0)
    made.check_labels(90)
    with pytest.raises(
        UserError, match=r"train.csv: 2 actions.*1 to 80\): a at 905 s has 81, b at 902 s has 90.*least 90"
    ):
        made.check_labels(80)
    with pytest.raises(UserError, match="a at 905 s has 0"):
        training_keyframes("x", [table(("a", 905.0, BOX, 0))], [], Anywhere(), choice=ALL, least_score=0).check_labels(
            5
        )


def test_videos_without_pictures_are_named():
    made = evaluated_keyframes("val", TRUTH, Anywhere("b"), choice=ALL, boxes="ground_truth")
    assert made.notes == ["1 of 2 videos are annotated but have no pictures: a. Their keyframes count as bad."]
    with pytest.raises(UserError, match=r"no pictures of any of its 2 videos, for example none at /videos/a.mp4"):
        evaluated_keyframes("val", TRUTH, Anywhere("c"), choice=ALL, boxes="ground_truth")


def test_a_keyframe_may_have_no_box_of_the_table():
    made = Keyframes("x", [Moment("a", 5.0), Moment("a", 4.0)], table(("a", 5.0, BOX, 1)), Anywhere())
    assert moments_of(made) == [("a", 4.0), ("a", 5.0)]
    assert made.boxes(0).shape == (0, 4)
    assert made.actions(0, 3).shape == (0, 3)
    assert made.actions(1, 3).tolist() == [[1, 0, 0]]
