"""The demonstration of D3D: what its videos tell and what they do not, and the whole of it in small."""

import json

import numpy as np
import pytest
import torch

from distinit_plugin.config.load import load_cfg
from distinit_plugin.demos.d3d import CONTROLS, D3D, MIXTURES, STREAMS, STUDENTS, DemoD3D, folder_of
from distinit_plugin.demos.motions import CLASS_NAMES, PAIRS, MotionData, make_motions
from distinit_plugin.demos.runs import pairs_of, run_task
from distinit_plugin.engine.results import differences, paired_text
from distinit_plugin.jobs import report
from distinit_plugin.video.decode import open_video

SMALL = {"num_train": 16, "num_test": 8, "num_more": 8, "size": 32, "num_frames": 9}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> MotionData:
    return make_motions(tmp_path_factory.mktemp("motions") / "data", **SMALL)


def rows_of(data: MotionData, name: str) -> list[tuple[str, int]]:
    rows = [row.rsplit(" ", 1) for row in getattr(data, name).read_text().splitlines()]
    return [(path, int(label)) for path, label in rows]


def frames_of(data: MotionData, path: str) -> np.ndarray:
    with open_video(data.folder / path) as video:
        return video.read(range(video.index.num_frames))


def test_every_class_is_there_equally_often(data):
    assert data.class_names.read_text().split("\n")[:-1] == list(CLASS_NAMES)
    for name, each in (("train", 2), ("test", 1)):
        labels = [label for _, label in rows_of(data, name)]
        assert sorted(labels) == sorted(list(range(8)) * each)


def test_more_videos_without_labels(data):
    """Those of the training first, none of the test, and others that no list with labels has."""
    unlabeled = data.unlabeled.read_text().splitlines()
    train = [path for path, _ in rows_of(data, "train")]
    assert unlabeled[: len(train)] == train
    more = unlabeled[len(train) :]
    assert len(set(more)) == 8
    assert not {path for path, _ in rows_of(data, "test")} & set(more)
    first = {frames_of(data, path)[0].tobytes() for path in more}
    assert not first & {frames_of(data, path)[0].tobytes() for path in train}


@pytest.mark.parametrize("pair", range(len(PAIRS)), ids=["-".join(pair) for pair in PAIRS])
def test_opposite_classes_have_the_same_decoded_frames(data, pair):
    """A classifier of single frames, or of frames in any order, can only guess between the two."""
    frames = {}
    for label in (2 * pair, 2 * pair + 1):
        videos = [frames_of(data, path) for path, found in rows_of(data, "train") if found == label]
        frames[label] = [frame.tobytes() for video in videos for frame in video]
    forwards, backwards = frames.values()
    assert sorted(forwards) == sorted(backwards)
    assert forwards != backwards  # the control: the order differs
    assert len(set(forwards)) == len(forwards)  # and every frame is another picture


def test_the_backwards_file_is_the_forwards_one_reversed(data):
    paths = [path for path, _ in rows_of(data, "test")]
    for one, other in zip(paths[::2], paths[1::2], strict=True):
        np.testing.assert_array_equal(frames_of(data, one), frames_of(data, other)[::-1])


def test_same_arguments_give_the_same_bytes(data, tmp_path):
    again = make_motions(tmp_path, **SMALL)
    for name in ("train", "test"):
        for path, _ in rows_of(data, name):
            assert (again.folder / path).read_bytes() == (data.folder / path).read_bytes()
    other = make_motions(tmp_path, **SMALL, seed=1)  # replaces the videos
    path = rows_of(data, "train")[0][0]
    assert (other.folder / path).read_bytes() != (data.folder / path).read_bytes()


@pytest.mark.parametrize(
    ("ours", "theirs", "text"),
    [([0.5], [0.25], "+25.0"), ([0.5, 0.75], [0.25, 0.25], "+37.5 ± 12.5"), ([0.25, 0.25], [0.5, 0.5], "-25.0 ± 0.0")],
)
def test_paired_differences(ours, theirs, text):
    assert paired_text(differences(ours, theirs)) == text


@pytest.mark.parametrize("student", [*STUDENTS, *CONTROLS], ids=lambda student: student.config)
def test_a_teacher_that_sees_the_same_is_of_another_seed(data, tmp_path, student):
    """With its own seed, a student of the RGB stream would start as its teacher did and see the same clips."""
    demo = DemoD3D(tmp_path, say=lambda _: None, seeds=[3, 5])
    for stream in STREAMS:
        for seed in (3, 5):
            folder = tmp_path / folder_of(stream, seed) / "checkpoints"
            folder.mkdir(parents=True)
            torch.save({"epoch": 1}, folder / "checkpoint_epoch_00001.pyth")
    (node, teacher), *others = student.teachers.items()
    assert others == []
    for seed, other in ((3, 5), (5, 3)):
        task = demo.task(student, seed, data)
        expected = folder_of(teacher, seed if teacher.sees != student.sees else other)
        assert task.options[f"DISTILL.TEACHERS.{node}.WEIGHTS"].parts[-3] == expected
        assert task.options["RNG_SEED"] == seed
        cfg, _ = load_cfg(task.config, [f"DISTILL.TEACHERS.{node}.WEIGHTS", "random"])
        assert cfg.DISTILL.TEACHERS[node].HEAD == "own"


def test_the_whole_demonstration(tmp_path, monkeypatch):
    """Tiny: a step each. What is finished is not trained again."""
    for pictures in ("curve_blocks", "class_pictures", "filter_blocks"):  # they take longer than all of the rest
        monkeypatch.setattr(report, pictures, lambda *runs: [])
    options = {
        "SOLVER.MAX_EPOCH": 1,
        "SOLVER.WARMUP_EPOCHS": 0,
        "RUNNER.CLIPS_PER_EPOCH": 4,
        "TRAIN.BATCH_SIZE": 4,
        "BN.NUM_BATCHES_PRECISE": 1,
    }
    told: list[str] = []
    counts = {"num_train": 8, "num_test": 8, "num_more": 8}
    students = [D3D, STUDENTS[-1]]
    demo = DemoD3D(tmp_path, say=told.append, seeds=[0], processes=1, **counts, students=students, options=options)
    rows = demo.run()
    two_seeds = MIXTURES[1]
    assert {row.name for row in rows} == {
        entry.name for entry in (*STREAMS, *students, *MIXTURES) if entry is not two_seeds
    }
    results = json.loads((tmp_path / "results.json").read_text())
    assert set(results["top1"]) == {row.name for row in rows}
    assert all(len(values) == 1 and 0 <= values[0] <= 1 for values in results["top1"].values())
    assert set(demo.errors) == {"all zeros", "S3D-G", "D3D", "flow stream"}
    assert all(len(errors) == 4 for errors in demo.errors.values())
    for name in ("classes.png", "curves.png", "motion.png", "results.md"):
        assert (tmp_path / name).stat().st_size > 0
    page = (tmp_path / "report.html").read_text("utf-8")
    assert all(f"{variant.name}, seed 0" in page for variant in (*STREAMS, *students))
    assert page.count("<figure>") == 2  # classes and end-point errors

    weights = tmp_path / "d3d_seed0" / "checkpoints" / "checkpoint_epoch_00001.pyth"
    written = weights.stat().st_mtime_ns
    data = make_motions(tmp_path / "data", **counts)
    on_more = demo.task(students[1], 0, data)
    videos = load_cfg(on_more.config, pairs_of(on_more.options))[0].CORPUS.TRAIN["MOTIONS"]
    assert str(data.unlabeled) == videos.PATH
    assert not videos.LABELED
    outcome = run_task(demo.task(D3D, 0, data), tmp_path, {"RUNNER.NUM_THREADS": 1, "DATA_LOADER.NUM_WORKERS": 0})
    assert outcome.top1 == results["top1"]["D3D"][0]
    assert weights.stat().st_mtime_ns == written
