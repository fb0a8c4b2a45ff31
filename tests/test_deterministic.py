"""RUNNER.DETERMINISTIC: the same seed gives the same bits, on two threads and with any number of workers."""

from pathlib import Path

import pytest
import torch
from small_jobs import (
    brightness_teacher,
    differing,
    labelled,
    merged,
    small_cfg,
    state_of,
    weights_of,
    write_teacher,
    write_videos,
)

from distinit_plugin.jobs.running import run
from distinit_plugin.jobs.session import open_session


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    write_videos(folder / "videos")
    write_teacher(folder / "teacher.pth")
    return folder


def job(world: Path, output: Path, *, workers: int = 0, **changes):
    """Labels and a gated teacher, dropout, accumulation: everything that draws numbers or adds in some order."""
    sections = {
        **labelled(world / "videos", TRAIN="train", VAL="test"),
        "DISTILL": {"TEACHERS": {"LIGHT": brightness_teacher(world / "teacher.pth", MAX_ENTROPY=1.0)}, "GATE": "skip"},
        "MODEL": {"NUM_CLASSES": 2, "DROPOUT_RATE": 0.5},
        "DATA_LOADER": {"NUM_WORKERS": workers},
        "RUNNER": {"DETERMINISTIC": True, "PRECISION": "auto", "NUM_THREADS": 2, "ACCUMULATE": 2},
    }
    return small_cfg(world / "videos", output, **merged(sections, changes))


@pytest.fixture(scope="module")
def reference(world, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("reference") / "run"
    assert run(job(world, output)).training.steps == 3
    assert "precision fp32: RUNNER.DETERMINISTIC" in (output / "stdout.log").read_text()
    return output


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_same_seed_same_bits(workers, world, reference, tmp_path):
    torch.rand(3)  # what the process drew before does not matter
    run(job(world, tmp_path / "run", workers=workers))
    one, other = state_of(reference), state_of(tmp_path / "run")
    assert differing(one["model_state"], other["model_state"]) == []
    assert differing(one["distinit"]["adapters"], other["distinit"]["adapters"]) == []
    assert one["distinit"]["best"] == other["distinit"]["best"]


def test_another_seed_gives_others(world, reference, tmp_path):
    """The negative control of the test above."""
    run(job(world, tmp_path / "run", RNG_SEED=1))
    assert len(differing(weights_of(reference), weights_of(tmp_path / "run"))) > 20


def test_the_session_sets_what_decides_and_puts_it_back(world, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    with open_session(job(world, tmp_path / "run")) as session:
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.backends.cudnn.benchmark
        assert session.precision.name == "fp32"
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.backends.cudnn.benchmark
