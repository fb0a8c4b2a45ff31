"""Whole jobs whose student sees flow, computed in the step or stored; with labels, and with a teacher of frames."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_jobs import (
    CLASSES,
    brightness_teacher,
    labelled,
    merged,
    small_cfg,
    write_squares,
    write_teacher,
)
from videos import write_video

from distinit_plugin.errors import UserError
from distinit_plugin.jobs.running import run

SIDE = 48
SEES_FLOW = {
    "NETWORK": {"MODALITY": "flow"},
    "DATA": {
        "MEAN": [0.5, 0.5],
        "STD": [0.5, 0.5],
        "SAMPLING_RATE": 1,
        # The whole picture, as it is: what is stored is then what would be computed.
        "TRAIN_CROP_SIZE": SIDE,
        "TEST_CROP_SIZE": SIDE,
        "TRAIN_JITTER_SCALES": [SIDE, SIDE],
        "RANDOM_FLIP": False,
    },
}


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Square videos: four to train on and two to test, of two classes; and their stored flow."""
    return write_squares(tmp_path_factory.mktemp("square"), 8, SIDE)


def flow_run(videos: Path, output: Path, **sections: Any) -> Any:
    base = merged(merged(SEES_FLOW, labelled(videos)), {"TEST": {"ENABLE": True}})
    return run(small_cfg(videos, output, **merged(base, sections)))


def test_stored_and_live_flow_give_the_same_loss_and_scores(
    videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    live = flow_run(videos, tmp_path / "live")
    assert "flow " in capsys.readouterr().out  # its share of the step
    stored = flow_run(videos, tmp_path / "stored", FLOW={"STORE": str(videos / "flow")})
    assert "flow " not in capsys.readouterr().out.split("trained")[0].partition("step")[2]
    assert stored.training.train["loss"] == pytest.approx(live.training.train["loss"], rel=1e-6)
    np.testing.assert_allclose(stored.evaluation.scores, live.evaluation.scores, atol=1e-6)
    # The control: another bound is another input.
    other = flow_run(videos, tmp_path / "other", FLOW={"STORE": str(videos / "flow"), "BOUND": 5.0})
    assert other.training.train["loss"] != pytest.approx(live.training.train["loss"], rel=1e-4)


def test_student_of_flow_learns_from_a_teacher_of_frames(videos: Path, tmp_path: Path) -> None:
    teacher = write_teacher(tmp_path / "teacher.pth")
    cfg = small_cfg(
        videos,
        tmp_path / "run",
        **merged(SEES_FLOW, {"DISTILL": {"TEACHERS": {"IMAGE": brightness_teacher(teacher, FRAME_PICK="random")}}}),
        FLOW={"STORE": str(videos / "flow")},
    )
    result = run(cfg)
    assert result.training.steps == 1
    assert np.isfinite(result.training.train["loss"])


def test_a_teacher_of_flow_beside_a_student_of_frames(videos: Path, tmp_path: Path) -> None:
    entry = {
        "ARCH": "Res3D",
        "DEPTH": 10,
        "WEIGHTS": "random",
        "NUM_CLASSES": 5,
        "NETWORK": {"MODALITY": "flow", "WIDTH": 8},
        "MEAN": [0.5, 0.5],
        "STD": [0.5, 0.5],
        "FRAME_PICK": "clip",
        "CROP_SIZE": 24,
    }
    result = run(small_cfg(videos, tmp_path / "run", DISTILL={"TEACHERS": {"FLOW": entry}}))
    assert result.training.steps == 1
    assert "FLOW" in " ".join(result.training.train)


def test_what_the_store_lacks_is_refused_by_name_or_computed(videos: Path, tmp_path: Path) -> None:
    shutil.copytree(videos / "train", tmp_path / "train")  # found by the last parts of their paths, and their content
    for name in CLASSES:
        write_video(tmp_path / "train" / name / "late.mp4", 8, SIDE, SIDE)
    other = {"VIDEOS": {"PATH": str(tmp_path / "train")}}
    further = {"CORPUS": {"TRAIN": other, "MAX_BAD_FRACTION": 1.0}, "RUNNER": {"CLIPS_PER_EPOCH": 8}}
    sections = merged(further, {"FLOW": {"STORE": str(videos / "flow")}, "TEST": {"ENABLE": False}})
    flow_run(videos, tmp_path / "refused", **sections)
    bad = (tmp_path / "refused" / "bad_videos.csv").read_text()
    assert "late.mp4" in bad
    assert "extract-flow" in bad
    assert "video0.mp4" not in bad
    flow_run(videos, tmp_path / "computed", **merged(sections, {"FLOW": {"MISSING": "live"}}))
    assert not (tmp_path / "computed" / "bad_videos.csv").exists()


def test_gaps_of_a_store_are_not_filled_by_another_back_end(videos: Path, tmp_path: Path) -> None:
    flow = {"STORE": str(videos / "flow"), "MISSING": "live", "BACKEND": "dis_fast"}
    pytest.importorskip("cv2")
    with pytest.raises(UserError, match=r"dis_fast.*would stand in.*made by tvl1"):
        flow_run(videos, tmp_path / "run", FLOW=flow)


def test_store_of_another_frame_rate_is_refused(videos: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"CORPUS.TARGET_FPS asks for frames at 10 fps"):
        flow_run(videos, tmp_path / "run", FLOW={"STORE": str(videos / "flow")}, CORPUS={"TARGET_FPS": 10.0})
