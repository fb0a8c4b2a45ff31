"""Runs that would end with wrong numbers are refused, or named, before they start."""

import re
import shutil
from pathlib import Path

import pytest
from small_jobs import checkpoint, labelled, small_cfg, write_corpus

from distinit_plugin.config.load import load_cfg
from distinit_plugin.config.paths import path_problems
from distinit_plugin.errors import UserError
from distinit_plugin.jobs.running import run

README = Path(__file__).resolve().parents[1] / "README.md"


@pytest.fixture(scope="module")
def trained(videos, tmp_path_factory) -> Path:
    """A finished training on the labels, of two epochs."""
    output = tmp_path_factory.mktemp("trained") / "run"
    run(small_cfg(videos, output, **labelled(videos, TRAIN="train"), SOLVER={"MAX_EPOCH": 2}))
    return output


def test_other_classes_in_the_test_are_refused(videos, tmp_path):
    """Folders number their classes themselves: a test without class "bright" would call "dark" class 0."""
    write_corpus(tmp_path / "other" / "test", 1)
    (tmp_path / "other" / "test" / "bright").rename(tmp_path / "other" / "test" / "eclipse")
    cfg = small_cfg(
        videos,
        tmp_path / "run",
        ACTION={"LOSS_WEIGHT": 1.0},
        TEST={"ENABLE": True},
        CORPUS={
            "TRAIN": {"VIDEOS": {"PATH": str(videos / "train"), "LABELED": True}},
            "TEST": {"VIDEOS": {"PATH": str(tmp_path / "other" / "test"), "LABELED": True}},
        },
    )
    with pytest.raises(UserError, match=r"CORPUS.TEST: its classes .* class 0 was 'bright' and is 'dark' here"):
        run(cfg)


def test_a_checkpoint_of_another_depth_is_refused(videos, trained, tmp_path):
    sections = labelled(videos, TRAIN="train")
    cfg = small_cfg(
        videos,
        tmp_path / "run",
        **sections,
        RESNET={"DEPTH": 18},
        TRAIN={"CHECKPOINT_FILE_PATH": str(checkpoint(trained))},
    )
    with pytest.raises(UserError, match=r"misses \d+ tensors .* of another network"):
        run(cfg)


def test_a_new_run_beside_old_checkpoints_is_refused(videos, trained):
    cfg = small_cfg(videos, trained, **labelled(videos, TRAIN="train"), TRAIN={"AUTO_RESUME": False})
    with pytest.raises(UserError, match=r"holds checkpoints of an earlier run and TRAIN\.AUTO_RESUME is False"):
        run(cfg)
    assert checkpoint(trained, 2).is_file()


def test_a_continued_run_names_the_values_that_differ(videos, trained, tmp_path):
    output = tmp_path / "run"
    shutil.copytree(trained, output)
    sections = labelled(videos, TRAIN="train")
    with pytest.raises(UserError, match=r"SOLVER\.BASE_LR: 0\.05 → 0\.01\. Name") as caught:
        run(small_cfg(videos, output, **sections, SOLVER={"MAX_EPOCH": 3, "BASE_LR": 0.01}, LOG_PERIOD=2))
    for harmless in ("SOLVER.MAX_EPOCH", "LOG_PERIOD", "OUTPUT_DIR:"):
        assert harmless not in str(caught.value)
    run(small_cfg(videos, output, **sections, SOLVER={"MAX_EPOCH": 3}, LOG_PERIOD=2))
    assert "goes on with another SOLVER.MAX_EPOCH: 2 → 3" in (output / "stdout.log").read_text()


def test_the_home_folder_is_found(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    cfg, _ = load_cfg("configs/DistInit/table1_res3d18_scratch.yaml", ["OUTPUT_DIR", "~/runs/mine"])
    assert str(tmp_path / "runs" / "mine") == cfg.OUTPUT_DIR


def test_pyslowfasts_frame_rate_is_named_even_at_its_default():
    _, warnings = load_cfg("configs/DistInit/table1_res3d18_scratch.yaml", ["DATA.TARGET_FPS", "30"])
    assert len(warnings) == 1
    assert "CORPUS.TARGET_FPS" in warnings[0]


def test_the_readmes_own_classes_need_only_the_files_that_they_name(tmp_path, monkeypatch):
    """The YAML of "your own videos" names nothing of HMDB-51 any more."""
    text = next(
        block for block in re.findall(r"```yaml\n(.*?)```", README.read_text(), re.S) if "NUM_CLASSES: 3" in block
    )
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text(text)
    cfg, _ = load_cfg("mine.yaml")
    assert [list(cfg.CORPUS[use]) for use in ("TRAIN", "VAL", "TEST")] == [["MINE"], [], ["MINE"]]
    assert not [problem for problem in path_problems(cfg) if "hmdb" in problem.lower()]
