"""Whole runs of two ranks do what those of one process do."""

import csv
import json
import os
import re
from pathlib import Path

import pytest
import torch
from rank_processes import forked_ranks
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
    write_videos,
)

from distinit_plugin.data.sampler import ClipSampler
from distinit_plugin.errors import UserError
from distinit_plugin.jobs.running import run
from distinit_plugin.types import SampleKey

TWO = {"CPU_RANKS": 2}


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> Path:
    folder = write_videos(tmp_path_factory.mktemp("videos"))
    (folder / "test" / "dark" / "video102.mp4").write_bytes(b"broken")  # five that can be read: the ranks differ
    return folder


def _bad_names(output: Path) -> list[str]:
    with open(output / "bad_videos.csv", newline="") as file:
        return sorted(Path(row["path"]).name for row in csv.DictReader(file))


@pytest.fixture(autouse=True)
def _ranks_are_forked():
    with forked_ranks():
        yield


def test_two_ranks_train_and_test_as_one(videos, tmp_path, capfd):
    """With batch norm in eval mode (classifier only) the gradient of two ranks is that of one on the joined batch."""
    sections = {
        **labelled(videos, TRAIN="train", VAL="test", TEST="test"),
        "INIT": {"TRAINABLE": "classifier"},
        "SOLVER": {"MAX_EPOCH": 2},
        "TEST": {"ENABLE": True},
    }
    alone, together = tmp_path / "alone", tmp_path / "together"
    result = run(small_cfg(videos, alone, **sections))
    capfd.readouterr()
    run(small_cfg(videos, together, **sections, RUNNER=TWO))
    printed = "".join(capfd.readouterr())
    one, two = weights_of(alone, 2), weights_of(together, 2)
    trunk = [name for name in one if not name.startswith("fc.")]
    assert differing({name: one[name] for name in trunk}, {name: two[name] for name in trunk}) == []
    torch.testing.assert_close(two, one, rtol=1e-4, atol=1e-6)
    metrics = json.loads((together / "test" / "metrics.json").read_text())
    expected = result.evaluation.metrics()
    assert metrics["num_videos"] == expected["num_videos"] == 5
    assert metrics["top1"] == expected["top1"]
    assert metrics["clip_loss"] == pytest.approx(expected["clip_loss"], rel=1e-4)
    assert [Path(bad["path"]).name for bad in metrics["bad"]] == ["video102.mp4"]
    assert _bad_names(together) == ["video102.mp4"]  # met in two validations and the test, by one rank alone
    assert printed.count("bad video ") == 1
    for kind in ("train_iter_", "train_epoch", "val_epoch"):
        ours, theirs = json_stats(alone, kind), json_stats(together, kind)
        assert [line["loss"] for line in theirs] == pytest.approx([line["loss"] for line in ours], abs=2e-4)
    assert printed.count("5 test videos") == 1  # one table, not one per rank


def test_two_ranks_distil_with_a_gate(videos, tmp_path):
    """Ranks may keep different numbers of clips, or validate none, and still go together; then one goes on alone."""
    entry = brightness_teacher(write_teacher(tmp_path / "teacher.pth"), MAX_ENTROPY=0.5)
    distill = {"TEACHERS": {"IMAGENET": entry}, "GATE": "skip", "GATE_MEAN": "kept"}
    output = tmp_path / "run"
    corpora = {"VAL": {"ONE": {"FORMAT": "list", "PATH": str(tmp_path / "one.txt")}}}  # nothing for the second rank
    (tmp_path / "one.txt").write_text(f"{videos}/test/bright/video100.mp4\n")
    run(small_cfg(videos, output, DISTILL=distill, CORPUS=corpora, RUNNER=TWO))
    (epoch,) = json_stats(output, "train_epoch")
    assert epoch["kept/IMAGENET"] == 0.5
    (validation,) = json_stats(output, "val_epoch")
    assert validation["kept/IMAGENET"] == 1.0  # the video is bright
    assert len(state_of(output)["distinit"]["rng"]) == 2
    result = run(small_cfg(videos, output, DISTILL=distill, CORPUS=corpora, SOLVER={"MAX_EPOCH": 2}))
    assert result.training.steps == 6
    assert checkpoint(output, 2).is_file()


def test_two_ranks_validate_what_the_checkpoint_holds(videos, tmp_path):
    """Batch norm statistics are the main rank's on all ranks; here the main rank has nothing to read itself."""
    rows = [f"{videos}/test/dark/video102.mp4 1", f"{videos}/test/bright/video100.mp4 0"]
    (tmp_path / "list.csv").write_text("\n".join(rows))
    node = {"TWO": {"FORMAT": "csv", "PATH": str(tmp_path / "list.csv"), "LABELED": True}}
    sections = labelled(videos, TRAIN="train")
    sections["CORPUS"] |= {"VAL": node, "TEST": node}
    output = tmp_path / "run"
    test = {"ENABLE": True, "NUM_ENSEMBLE_VIEWS": 1}
    run(small_cfg(videos, output, **sections, TEST=test, SOLVER={"BASE_LR": 0.01}, RUNNER=TWO))
    metrics = json.loads((output / "test" / "metrics.json").read_text())
    assert metrics["num_videos"] == 1
    assert json_stats(output, "val_epoch")[-1]["loss"] == pytest.approx(metrics["clip_loss"], abs=2e-5)


def test_bad_videos_of_two_ranks_are_one_account(videos, tmp_path):
    """Each rank meets two of four bad videos, which is allowed; together they are too many."""
    corpus = tmp_path / "corpus" / "train"
    corpus.mkdir(parents=True)
    good = sorted((videos / "train").rglob("*.mp4"))[:8]
    for number, path in enumerate(good):
        os.link(path, corpus / f"good{number}.mp4")
    for number in range(4):
        (corpus / f"bad{number}.mp4").write_bytes(b"not a video")
    output = tmp_path / "run"
    entry = brightness_teacher(write_teacher(tmp_path / "teacher.pth"))
    settings = {
        "DISTILL": {"TEACHERS": {"IMAGENET": entry}},
        "TRAIN": {"BATCH_SIZE": 12},  # every video in one step
        "CORPUS": {"MAX_BAD_FRACTION": 0.3},
        "RUNNER": TWO,
    }
    with pytest.raises(UserError, match=r"4 of 12 videos are bad, more than CORPUS\.MAX_BAD_FRACTION 0\.3"):
        run(small_cfg(corpus.parent, output, **settings))
    assert _bad_names(output) == [f"bad{number}.mp4" for number in range(4)]
    assert len(re.findall("bad video ", (output / "stdout.log").read_text())) == 4
    assert not checkpoint(output).exists()
    # The folder is sorted: the bad ones have the first indices.
    met = [{key.index for key in _first_step(len(good) + 4, rank)} for rank in range(2)]
    assert [len(indices & set(range(4))) for indices in met] == [2, 2], "the test needs bad videos on both ranks"


def _first_step(num_videos: int, rank: int) -> list[SampleKey]:
    sampler = ClipSampler(
        [num_videos], None, num_clips_per_epoch=0, global_batch_size=12, seed=0, rank=rank, world_size=2
    )
    return list(sampler)
