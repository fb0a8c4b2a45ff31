"""The command line: exit codes, and one sentence instead of a traceback."""

import csv
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from rich.console import Console
from small_jobs import labelled, small_settings, write_corpus

from distinit_plugin import cli
from distinit_plugin.version import __version__

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def config(videos, tmp_path) -> Path:
    """A YAML file that trains and tests on labels."""
    settings = small_settings(videos, tmp_path / "run", **labelled(videos), TEST={"ENABLE": True})
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def _fails(capsys, *words: str) -> str:
    """Run the words; the one sentence that they end in."""
    assert cli.main([str(word) for word in words]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert "Traceback" not in error
    return error


def test_wrong_key_is_one_sentence_with_the_near_match(config, tmp_path, capsys):
    error = _fails(capsys, "run", "--cfg", config, "--opts", "SOLVER.BASE_RL", "0.1")
    assert "SOLVER.BASE_RL" in error
    assert "Did you mean BASE_LR?" in error
    assert len(error.strip().splitlines()) == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("lr", [["SOLVER.BASE_LR", "fast"], ["SOLVER.BASE_LR", "-1"]])
def test_every_mistake_is_named_at_once(lr, config, capsys):
    frames = ["DATA.NUM_FRAMES", "zero" if lr[1] == "fast" else "0"]
    error = _fails(capsys, "run", "--cfg", config, "--opts", *lr, *frames)
    assert "SOLVER.BASE_LR" in error
    assert "DATA.NUM_FRAMES" in error


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["run", "--cfg", "absent.yaml"], "absent.yaml: no such file"),
        (["run", "--cfg", "configs/DistInit/table1_r2plus1d18_scrtch.yaml"], "table1_r2plus1d18_scratch.yaml"),
        (["predict", "video.mp4", "--checkpoint", "absent.pyth"], "absent.pyth"),
        (["check-corpus", "/nowhere/videos"], "/nowhere/videos"),
        (["plot-curves", "/nowhere/run"], "/nowhere/run"),
    ],
)
def test_missing_files_are_named(words, named, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert named in _fails(capsys, *words)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("key", "value"), [("TRAIN.CHECKPOINT_FILE_PATH", "/nowhere/x.pyth"), ("CORPUS.TRAIN.VIDEOS.PATH", "/nowhere/x")]
)
def test_missing_file_of_a_configuration_is_named_with_its_key(key, value, config, tmp_path, capsys):
    error = _fails(capsys, "run", "--cfg", config, "--opts", key, value)
    assert key in error
    assert value in error
    assert not (tmp_path / "run").exists()


def test_probe_without_a_checkpoint(config, capsys):
    assert "TEST.CHECKPOINT_FILE_PATH" in _fails(capsys, "probe", "--cfg", config)


def test_file_that_is_no_checkpoint(videos, tmp_path, capsys):
    path = tmp_path / "broken.pyth"
    path.write_bytes(b"PK\x03\x04 and then nothing")
    video = videos / "test" / "dark" / "video100.mp4"
    assert str(path) in _fails(capsys, "predict", video, "--checkpoint", path)


@pytest.mark.parametrize("words", [["trian"], [], ["run"], ["run", "--cfgs", "x.yaml"], ["check-corpus"]])
def test_wrong_command_lines_exit_with_2(words, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(words)
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert "usage: distinit" in error
    assert "error: " in error
    assert "Traceback" not in error


@pytest.mark.parametrize("words", [["--help"], *([verb, "--help"] for verb in cli.VERBS)])
def test_help(words, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(words)
    assert caught.value.code == 0
    assert "usage: distinit" in capsys.readouterr().out


def test_version(capsys):
    with pytest.raises(SystemExit):
        cli.main(["--version"])
    assert capsys.readouterr().out.strip() == f"distinit-plugin {__version__}"


def test_pairs_without_opts(config, tmp_path, capsys):
    """What people type: KEY VALUE straight after the file; a dry run, so that nothing is written."""
    words = ["run", "--dry-run", "--cfg", str(config), "RESNET.DEPTH", "18", "TRAIN.BATCH_SIZE", "2"]
    assert cli.main(words) == 0
    assert "6 steps of 2 clips" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()
    assert "RESNET.DEHPT" in _fails(capsys, *words, "RESNET.DEHPT", "18")


def test_run_predict_plot_from_the_command_line(config, videos, tmp_path, capsys):
    assert cli.main(["run", "--cfg", str(config)]) == 0
    assert "top-1" in capsys.readouterr().out
    checkpoint = tmp_path / "run" / "checkpoints" / "checkpoint_epoch_00001.pyth"
    video, broken = videos / "test" / "bright" / "video100.mp4", tmp_path / "broken.mp4"
    assert cli.main(["predict", str(video), "--checkpoint", str(checkpoint), "--clips", "1", "--top", "1"]) == 0
    assert " %  " in capsys.readouterr().out
    broken.write_bytes(b"nothing")
    assert cli.main(["predict", str(video), str(broken), "--checkpoint", str(checkpoint), "--clips", "1"]) == 1
    assert "cannot be read" in capsys.readouterr().out
    picture = tmp_path / "curves.png"
    assert cli.main(["plot-curves", str(tmp_path / "run"), "--output", str(picture)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_interrupt_exits_with_130(config, capsys, monkeypatch):
    def interrupted(cfg):
        raise KeyboardInterrupt

    monkeypatch.setattr("distinit_plugin.jobs.running.run", interrupted)
    assert cli.main(["run", "--cfg", str(config)]) == 130
    assert capsys.readouterr().err == "interrupted\n"


@pytest.mark.parametrize(
    ("terminal", "given", "width"), [(False, None, 140), (False, "90", 90), (True, None, 80), (True, "90", 90)]
)
def test_tables_in_a_file_are_not_folded(terminal, given, width, config, monkeypatch, capsys):
    """A terminal has its own width, which is 80 where it is none at all."""
    monkeypatch.setattr(os, "isatty", lambda number: terminal)
    monkeypatch.setenv("COLUMNS", given or "")
    if given is None:
        monkeypatch.delenv("COLUMNS")
    assert cli.main(["config", "--cfg", str(config)]) == 0
    assert Console(file=io.StringIO()).width == width


def test_check_corpus(tmp_path, capsys):
    folder, report = write_corpus(tmp_path / "videos", 2), tmp_path / "report.csv"
    words = ["check-corpus", str(folder), "--workers", "2", "--output", str(report)]
    assert cli.main(words) == 0
    broken = folder / "dark" / "broken.mp4"
    broken.write_bytes((folder / "dark" / "video0.mp4").read_bytes()[:200])
    capsys.readouterr()
    assert cli.main(words) == 1
    printed = capsys.readouterr().out
    assert "broken.mp4" in printed
    assert "video1.mp4" not in printed
    with open(report) as file:
        rows = [list(row.values()) for row in csv.DictReader(file)]
    assert [str(broken) in row for row in rows] == [True]


def test_tools_are_the_verbs(tmp_path):
    done = subprocess.run(
        [sys.executable, ROOT / "tools" / "run_net.py", "--cfg", "absent.yaml"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("error: absent.yaml")


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (KeyboardInterrupt(), False),
        (SystemExit(143), False),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."), False),
        (RuntimeError("something else"), True),
    ],
)
def test_what_python_drops_in_a_destructor_is_not_printed_when_it_comes_again(error, told, monkeypatch):
    class Raises:
        def __del__(self):
            raise error

    dropped = []
    monkeypatch.setattr("sys.unraisablehook", lambda unraisable: dropped.append(unraisable.exc_value))
    before = sys.unraisablehook
    with cli._told_once():
        Raises()
    assert dropped == [error] * told
    assert sys.unraisablehook is before
