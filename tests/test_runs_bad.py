"""Bad videos in whole runs: one account for training, validation and test, and for runs that go on."""

import csv
import os
import re
from pathlib import Path

import pytest
from small_jobs import brightness_teacher, checkpoint, labelled, small_cfg, write_teacher

from distinit_plugin.errors import UserError
from distinit_plugin.jobs.running import run


@pytest.fixture(scope="module")
def distill(tmp_path_factory) -> dict:
    return {"TEACHERS": {"IMAGENET": brightness_teacher(write_teacher(tmp_path_factory.mktemp("teacher") / "t.pth"))}}


@pytest.fixture
def videos(videos, tmp_path) -> Path:
    """Links to those of all tests: a test may put others in their places."""
    for path in videos.rglob("*.mp4"):
        link = tmp_path / "videos" / path.relative_to(videos)
        link.parent.mkdir(parents=True, exist_ok=True)
        os.link(path, link)
    return tmp_path / "videos"


def spoil(path: Path) -> bytes:
    """Zeros of the same size; returns what was there."""
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(bytes(len(content)))
    return content


def bad_names(output: Path) -> list[str]:
    with open(output / "bad_videos.csv", newline="") as file:
        return sorted(Path(row["path"]).name for row in csv.DictReader(file))


def times_logged(output: Path) -> int:
    return len(re.findall("bad video ", (output / "stdout.log").read_text()))


def test_each_bad_video_is_named_once_in_a_job(videos, tmp_path):
    """One in training alone; one in two validations and in the test."""
    spoil(videos / "train" / "dark" / "video1.mp4")
    spoil(videos / "test" / "bright" / "video101.mp4")
    output = tmp_path / "run"
    sections = labelled(videos, TRAIN="train", VAL="test", TEST="test")
    cfg = small_cfg(
        videos, output, **sections, TEST={"ENABLE": True}, TRAIN={"BATCH_SIZE": 12}, SOLVER={"MAX_EPOCH": 2}
    )
    result = run(cfg)
    assert bad_names(output) == ["video1.mp4", "video101.mp4"]
    assert times_logged(output) == 2
    assert [Path(path).name for path in result.evaluation.left_out] == ["video101.mp4"]


def test_validation_without_labels_names_bad_videos_too(videos, distill, tmp_path):
    spoil(videos / "test" / "dark" / "video100.mp4")
    output = tmp_path / "run"
    corpora = {"VAL": {"VIDEOS": {"PATH": str(videos / "test")}}}
    run(small_cfg(videos, output, DISTILL=distill, CORPUS=corpora, SOLVER={"MAX_EPOCH": 2}))
    assert bad_names(output) == ["video100.mp4"]
    assert times_logged(output) == 1


@pytest.mark.parametrize("labels", [False, True])
def test_too_many_bad_validation_videos_stop_the_job(labels, videos, distill, tmp_path):
    for number in range(3):
        spoil(videos / "test" / "dark" / f"video{100 + number}.mp4")
    sections = labelled(videos, TRAIN="train", VAL="test")
    if not labels:
        sections = {"DISTILL": distill, "CORPUS": {"VAL": {"VIDEOS": {"PATH": str(videos / "test")}}}}
    with pytest.raises(UserError, match=r"3 of 6 validation videos are bad, more than CORPUS\.MAX_BAD_FRACTION 0\.1"):
        run(small_cfg(videos, tmp_path / "run", **sections))
    assert len(bad_names(tmp_path / "run")) == 3
    sections["CORPUS"]["MAX_BAD_FRACTION"] = 0.5
    run(small_cfg(videos, tmp_path / "again", **sections))
    assert checkpoint(tmp_path / "again").is_file()


def test_too_many_bad_test_videos_end_the_job_when_its_results_are_written(videos, tmp_path):
    for number in range(3):
        spoil(videos / "test" / "dark" / f"video{100 + number}.mp4")
    output = tmp_path / "run"
    cfg = small_cfg(videos, output, **labelled(videos), TEST={"ENABLE": True})
    with pytest.raises(UserError, match="3 of 6 test videos are bad"):
        run(cfg)
    assert (output / "test" / "metrics.json").is_file()
    assert checkpoint(output).is_file()


@pytest.mark.parametrize("how", ["replaced", "readable", "still bad"])
def test_a_repaired_video_is_used_again_when_the_run_goes_on(how, videos, distill, tmp_path):
    path, output = videos / "train" / "dark" / "video1.mp4", tmp_path / "run"
    content = spoil(path)
    status = path.stat()
    options = {"DISTILL": distill, "TRAIN": {"BATCH_SIZE": 12}}  # every video is drawn in each epoch
    run(small_cfg(videos, output, **options))
    assert bad_names(output) == ["video1.mp4"]
    if how == "replaced":
        path.write_bytes(content + b"\0")
    if how == "readable":  # as after a failure of the disk or network: nothing tells but decoding
        path.write_bytes(content)
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    result = run(small_cfg(videos, output, **options, SOLVER={"MAX_EPOCH": 2}))
    assert result.training.epochs == 2
    assert bad_names(output) == ([] if how != "still bad" else ["video1.mp4"])
    log = (output / "stdout.log").read_text()
    assert log.count("video1.mp4 was bad and is used again") == (how != "still bad")
    assert times_logged(output) == 1
