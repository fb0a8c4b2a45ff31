"""Properties of whole runs: schedules, resuming, reproduction, bad videos, what is written and what is not."""

import csv
import os
import re
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from small_jobs import (
    brightness_teacher,
    checkpoint,
    differing,
    json_stats,
    labelled,
    small_cfg,
    state_of,
    weights_of,
    write_teacher,
)

from distinit_plugin.engine.guard import TrainingError
from distinit_plugin.engine.progress import NoProgress
from distinit_plugin.errors import UserError
from distinit_plugin.jobs import session
from distinit_plugin.jobs.running import run


def train(cfg):
    """What the training of a run gave; there is nothing to test in these."""
    return run(cfg).training


@pytest.fixture(scope="module")
def distill(tmp_path_factory) -> dict:
    """The DISTILL node with one teacher that picks random frames."""
    path = write_teacher(tmp_path_factory.mktemp("teacher") / "res2d.pth")
    return {"TEACHERS": {"IMAGENET": brightness_teacher(path, FRAME_PICK="random")}}


# --------------------------------------------------------------------------------------------------- schedules
@pytest.mark.parametrize(
    ("solver", "expected"),
    [
        ({"LR_POLICY": "steps_with_relative_lrs", "STEPS": [0, 1, 2], "LRS": [1, 0.1, 0.01]}, [0.1, 0.01, 0.001]),
        ({"LR_POLICY": "cosine", "COSINE_END_LR": 0.0}, None),
    ],
)
def test_schedules_in_epochs(solver, expected, videos, distill, tmp_path):
    output = tmp_path / "run"
    solver = {"BASE_LR": 0.1, "MAX_EPOCH": 3, **solver}
    train(small_cfg(videos, output, DISTILL=distill, SOLVER=solver))
    rates = [line["lr"] for line in json_stats(output, "train_iter_")]
    assert len(rates) == 9
    if expected is not None:
        assert rates == pytest.approx([rate for rate in expected for _ in range(3)], rel=1e-2)
    else:
        assert rates == sorted(rates, reverse=True)
        assert 0.09 < rates[0] <= 0.1
        assert 0 < rates[-1] < 0.01


def test_schedule_in_steps_with_warm_up(videos, distill, tmp_path):
    output = tmp_path / "run"
    solver = {"BASE_LR": 0.1, "MAX_EPOCH": 7, "WARMUP_EPOCHS": 4, "WARMUP_START_LR": 0.02, "OPTIMIZING_METHOD": "adamw"}
    result = train(small_cfg(videos, output, DISTILL=distill, SOLVER=solver, RUNNER={"SCHEDULE_UNIT": "step"}))
    assert result.steps == 7  # an epoch has 3: the last one is cut short
    rates = [line["lr"] for line in json_stats(output, "train_iter_")]
    assert rates == pytest.approx([0.02, 0.04, 0.06, 0.08, 0.1, 0.1, 0.1], rel=1e-2)
    assert checkpoint(output, 3).is_file()


def test_plateau_lowers_the_rate_when_validation_stalls(videos, tmp_path):
    """A learning rate that moves nothing: the validation loss stalls from the second epoch on."""
    output = tmp_path / "run"
    cfg = small_cfg(
        videos,
        output,
        **labelled(videos, TRAIN="train", VAL="test"),
        INIT={"TRAINABLE": "classifier"},
        SOLVER={"LR_POLICY": "plateau", "MAX_EPOCH": 4, "BASE_LR": 1e-30},
        RUNNER={"PLATEAU_PATIENCE": 1, "PLATEAU_FACTOR": 0.1, "CLIPS_PER_EPOCH": 4},
    )
    train(cfg)
    rates = [line["lr"] for line in json_stats(output, "train_epoch")]
    assert rates == pytest.approx([1e-30, 1e-30, 1e-31, 1e-32], rel=1e-2)


# ---------------------------------------------------------------------------------- reproduction and resuming
def _two_epochs(videos: Path, output: Path, distill: dict, **runner):
    return small_cfg(
        videos,
        output,
        DISTILL=distill,
        SOLVER={"MAX_EPOCH": runner.pop("epochs", 2)},
        DATA_LOADER={"NUM_WORKERS": runner.pop("workers", 0)},
        RNG_SEED=runner.pop("seed", 0),
        RUNNER={"DETERMINISTIC": True, "PRECISION": "auto", **runner},
    )


@pytest.fixture(scope="module")
def uninterrupted(videos, distill, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("uninterrupted") / "run"
    train(_two_epochs(videos, output, distill))
    return output


def _same_training(one: Path, other: Path) -> None:
    ours, theirs = state_of(one, 2), state_of(other, 2)
    assert differing(ours["model_state"], theirs["model_state"]) == []
    assert differing(ours["distinit"]["adapters"], theirs["distinit"]["adapters"]) == []
    momenta, others = ours["optimizer_state"]["state"], theirs["optimizer_state"]["state"]
    assert momenta.keys() == others.keys()
    assert all(torch.equal(momenta[key]["momentum_buffer"], others[key]["momentum_buffer"]) for key in momenta)


def test_resumed_run_equals_the_uninterrupted_one(videos, distill, uninterrupted, tmp_path):
    output = tmp_path / "run"
    train(_two_epochs(videos, output, distill, epochs=1))
    assert not checkpoint(output, 2).exists()
    torch.rand(7)  # the process's own generator is of no account
    result = train(_two_epochs(videos, output, distill))
    assert "continuing from" in (output / "stdout.log").read_text()
    assert result.steps == 6
    assert len(json_stats(output, "train_iter_")) == 6  # three before, three after
    _same_training(output, uninterrupted)


def test_finished_run_trains_no_more(videos, distill, uninterrupted):
    before = {path: path.read_bytes() for path in (uninterrupted / "checkpoints").iterdir()}
    result = train(_two_epochs(videos, uninterrupted, distill))
    assert result.steps == 6
    assert {path: path.read_bytes() for path in (uninterrupted / "checkpoints").iterdir()} == before


def test_interrupted_epoch_starts_again_from_the_last_checkpoint(videos, distill, uninterrupted, tmp_path, monkeypatch):
    from distinit_plugin.engine.train import Trainer

    output, steps, original = tmp_path / "run", [], Trainer.run_step

    def interrupted(self, batches):
        steps.append(1)
        if len(steps) == 5:
            raise KeyboardInterrupt
        original(self, batches)

    monkeypatch.setattr(Trainer, "run_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(_two_epochs(videos, output, distill))
    monkeypatch.undo()
    train(_two_epochs(videos, output, distill))
    _same_training(output, uninterrupted)


def test_workers_change_nothing(videos, distill, uninterrupted, tmp_path):
    output = tmp_path / "run"
    train(_two_epochs(videos, output, distill, workers=2))
    _same_training(output, uninterrupted)


def test_another_seed_changes_everything(videos, distill, uninterrupted, tmp_path):
    """The negative control of the tests above."""
    output = tmp_path / "run"
    train(_two_epochs(videos, output, distill, seed=1))
    counters = {name for name in weights_of(output, 2) if name.endswith("num_batches_tracked")}
    changed = set(differing(weights_of(output, 2), weights_of(uninterrupted, 2)))
    assert changed | counters == set(weights_of(output, 2))


def test_results_of_another_run_in_the_folder_are_refused(videos, distill, uninterrupted):
    cfg = small_cfg(videos, uninterrupted, DISTILL=distill, NETWORK={"WIDTH": 4}, SOLVER={"MAX_EPOCH": 3})
    with pytest.raises(UserError, match=r"of another run .*NETWORK\.WIDTH: 8 → 4; .*Name another OUTPUT_DIR"):
        train(cfg)


# -------------------------------------------------------------------------------------------- what is written
def test_dry_run_writes_nothing(videos, distill, tmp_path, capsys):
    output = tmp_path / "out" / "run"
    cfg = small_cfg(videos, output, DISTILL=distill, RUNNER={"DRY_RUN": True})
    before = sorted(tmp_path.rglob("*"))
    files = {path: path.stat().st_mtime_ns for path in videos.rglob("*")}
    result = run(cfg)
    assert result.training is None
    assert sorted(tmp_path.rglob("*")) == before
    assert not output.exists()
    assert {path: path.stat().st_mtime_ns for path in videos.rglob("*")} == files
    printed = capsys.readouterr().out
    for word in ("GMAC", "clips/s", "IMAGENET", "4 × 3 × 4 × 32 × 32"):
        assert word in printed


def test_everything_long_is_shown(videos, tmp_path, monkeypatch):
    """Validations and BN statistics within the training, dense counting and the test after it, each to its end."""
    shown = []

    class Screen(NoProgress):
        @contextmanager
        def work(self, name, total):
            done = []
            yield done.append
            shown.append((name, total, done))

    monkeypatch.setattr(session, "open_progress", lambda *_, **__: Screen())
    sections = labelled(videos, TRAIN="train", VAL="test", TEST="test")
    sections["CORPUS"] |= {"TEST_CLIPS": "dense", "DENSE_STRIDE": 4}
    sections |= {"TEST": {"ENABLE": True, "BATCH_SIZE": 4}, "BN": {"USE_PRECISE_STATS": True, "NUM_BATCHES_PRECISE": 3}}
    run(small_cfg(videos, tmp_path / "run", **sections))
    assert [name for name, _, _ in shown] == ["BN statistics", "validation", "counting clips", "test"]
    assert [total for _, total, _ in shown] == [3, 2, 6, 3]  # 6 videos; 12 clips of 12 frames each, 2 per video
    assert all(done == list(range(1, total + 1)) for _, total, done in shown[1:])


def test_pyslowfast_lists(videos, tmp_path):
    lists = tmp_path / "lists with spaces"
    lists.mkdir()
    for use, folder in (("train", "train"), ("val", "test"), ("test", "test")):
        rows = [f"{path.relative_to(videos)},{int('dark' in str(path))}" for path in (videos / folder).rglob("*.mp4")]
        (lists / f"{use}.csv").write_text("\n".join(sorted(rows)) + "\n")
    sections = {
        "ACTION": {"LOSS_WEIGHT": 1.0},
        "DATA": {
            "PATH_TO_DATA_DIR": str(lists),
            "PATH_PREFIX": str(videos),
            "PATH_LABEL_SEPARATOR": ",",
        },
        "TEST": {"ENABLE": True},
    }
    output = tmp_path / "run"
    result = run(small_cfg(videos, output, **sections, CORPUS={"TRAIN": None}))
    assert len(json_stats(output, "val_epoch")) == 1
    assert result.evaluation.metrics()["num_videos"] == 6
    assert sorted(result.evaluation.labels) == [0, 0, 0, 1, 1, 1]


def test_tensorboard_gets_the_curves(videos, distill, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    output = tmp_path / "run"
    train(small_cfg(videos, output, DISTILL=distill, TENSORBOARD={"ENABLE": True, "LOG_DIR": "board"}))
    events = EventAccumulator(str(output / "board"))
    events.Reload()
    losses = [(event.step, round(event.value, 4)) for event in events.Scalars("train/loss")]
    assert losses == [(n, round(line["loss"], 4)) for n, line in enumerate(json_stats(output, "train_iter_"), start=1)]


# ------------------------------------------------------------------------------------------------- what breaks
def _with_broken_videos(videos: Path, folder: Path, count: int) -> Path:
    (folder / "train" / "broken").mkdir(parents=True)
    for path in (videos / "train").rglob("*.mp4"):
        os.link(path, folder / "train" / f"{path.parent.name}_{path.name}")
    for number in range(count):
        (folder / "train" / "broken" / f"bad{number}.mp4").write_bytes(b"" if number == 0 else b"not a video " * 50)
    return folder


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_videos_are_named_once_and_replaced(workers, videos, distill, tmp_path):
    corpus = _with_broken_videos(videos, tmp_path / "corpus", 2)
    output = tmp_path / "run"
    cfg = small_cfg(
        corpus,
        output,
        DISTILL=distill,
        SOLVER={"MAX_EPOCH": 2},
        TRAIN={"BATCH_SIZE": 7},
        CORPUS={"MAX_BAD_FRACTION": 0.2},
        DATA_LOADER={"NUM_WORKERS": workers},
    )
    assert train(cfg).steps == 4
    with open(output / "bad_videos.csv") as file:
        rows = list(csv.DictReader(file))
    assert sorted(Path(row["path"]).name for row in rows) == ["bad0.mp4", "bad1.mp4"]
    assert all(row["reason"] for row in rows)
    assert len(re.findall("bad video ", (output / "stdout.log").read_text())) == 2


def test_too_many_bad_videos_stop_the_job(videos, distill, tmp_path):
    corpus = _with_broken_videos(videos, tmp_path / "corpus", 6)
    cfg = small_cfg(corpus, tmp_path / "run", DISTILL=distill, TRAIN={"BATCH_SIZE": 18})
    with pytest.raises(UserError, match=r"6 of 18 videos are bad, more than CORPUS\.MAX_BAD_FRACTION 0\.1"):
        train(cfg)
    assert len((tmp_path / "run" / "bad_videos.csv").read_text().splitlines()) == 7
    assert not checkpoint(tmp_path / "run").exists()


def test_loss_that_is_not_finite_stops_with_step_terms_and_files(videos, distill, tmp_path):
    output = tmp_path / "run"
    cfg = small_cfg(videos, output, DISTILL=distill, SOLVER={"BASE_LR": 1e30, "MAX_EPOCH": 3})
    with pytest.raises(TrainingError) as caught:
        train(cfg)
    text = str(caught.value)
    assert re.search(r"the loss is (nan|inf) at step \d", text)
    assert "loss/IMAGENET" in text
    assert len(re.findall(re.escape(str(videos)) + r"/train/\w+/video\d\.mp4", text)) == 4
    assert not checkpoint(output, 3).exists()
