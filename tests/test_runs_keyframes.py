"""Whole jobs on sets in which much is odd: nobody in sight, boxes outside, missing and damaged frames."""

import csv
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from distinit_plugin import load_cfg
from distinit_plugin.demos.persons import PersonData
from distinit_plugin.detection.files import read_boxes
from distinit_plugin.errors import UserError
from distinit_plugin.jobs.running import run

YAML = Path(__file__).resolve().parents[1] / "configs" / "quickstart" / "persons.yaml"
SMALL = (
    *("DATA.NUM_FRAMES", "4", "DATA.TRAIN_CROP_SIZE", "32", "DATA.TEST_CROP_SIZE", "32", "NETWORK.WIDTH", "4"),
    *("DATA.TRAIN_JITTER_SCALES", "[80, 120]", "TRAIN.BATCH_SIZE", "2", "TEST.BATCH_SIZE", "3", "ROI.LAYER", "layer2"),
    *("SOLVER.MAX_EPOCH", "1", "SOLVER.WARMUP_EPOCHS", "0", "DATA_LOADER.NUM_WORKERS", "0", "LOG_PERIOD", "1"),
    *("AVA.FULL_TEST_ON_VAL", "True", "AVA.TRAIN_USE_COLOR_AUGMENTATION", "True", "RUNNER.CHANNELS_LAST", "off"),
)


@pytest.fixture
def odd(persons, tmp_path) -> PersonData:
    """A copy of the set: a corner as the only box, boxes beyond the borders, missing and damaged frames."""
    folder = tmp_path / "set"
    shutil.copytree(persons.annotations, folder / "annotations")
    shutil.copytree(persons.frames, folder / "frames", copy_function=os.link)
    train, val = persons.names("train"), persons.names("val")
    truth = folder / "annotations" / "ava_train_v2.2.csv"
    rows = [row for row in truth.read_text().splitlines() if not row.startswith(train[0])]
    rows += [f"{train[0]},{second},0.98,0.97,1.2,1.3,1,0" for second in range(902, 906)]
    rows += [f"{train[0]},903,1.1,0.2,1.4,0.9,2,0", f"{train[0]},904,-0.5,-0.5,1.5,1.5,3,0"]
    truth.write_text("\n".join(rows) + "\n")
    with open(folder / "annotations" / "ava_val_v2.2.csv", "a") as file:
        file.write(f"{val[0]},0907\n")  # evaluated although nobody is there, and nobody is predicted
    (folder / "frames" / train[1] / f"{train[1]}_000091.png").unlink()
    damaged = folder / "frames" / val[0] / f"{val[0]}_000091.png"  # of second 903
    damaged.unlink()
    damaged.write_bytes(b"\x89PNG damaged")
    return replace(persons, folder=folder, annotations=folder / "annotations", frames=folder / "frames")


def configured(odd, output, *options):
    given = ["OUTPUT_DIR", str(output), "CORPUS.MAX_BAD_FRACTION", "1", *options]
    return load_cfg(YAML, [*SMALL, *odd.options("frames"), *given])[0]


def test_a_job_on_an_odd_set_ends_well(odd, tmp_path):
    result = run(configured(odd, tmp_path / "run"))
    losses = [
        json.loads(line.split("json_stats: ", 1)[1]).get("loss")
        for line in (tmp_path / "run" / "stdout.log").read_text().splitlines()
        if "json_stats: " in line and "train_iter" in line
    ]
    assert losses
    assert np.isfinite(losses).all()
    boxes = result.boxes
    assert np.isfinite(boxes.result.map)
    assert boxes.num_seen == boxes.num_keyframes - 1
    with open(tmp_path / "run" / "bad_videos.csv", newline="") as file:
        bad = {row["path"]: row["reason"] for row in csv.DictReader(file)}
    first, last = odd.names("val")
    assert set(bad) <= {str(odd.frames / name) for name in (odd.names("train")[1], first)}
    assert "_000091.png" in bad[str(odd.frames / first)]
    asked = moments(read_boxes(odd.annotations / "ava_val_predicted_boxes.csv"))
    assert moments(boxes.table) == asked - {(first, 903.0), (last, 905.0)}  # damaged; excluded


def moments(table):
    """(video, second) of the rows with enough score."""
    kept = table.scores >= 0.5 if (table.actions < 0).all() else table.scores > -1
    return {(table.videos[video], second) for video, second in zip(table.video[kept], table.seconds[kept], strict=True)}


def test_too_many_bad_videos_end_the_job_by_name(odd, tmp_path):
    cfg = configured(odd, tmp_path / "run", "CORPUS.MAX_BAD_FRACTION", "0")
    with pytest.raises(UserError, match=r"1 of [23] .*videos are bad, more than CORPUS.MAX_BAD_FRACTION 0 allows"):
        run(cfg)


def test_a_training_in_which_nobody_is_ever_in_sight(odd, tmp_path):
    """The only boxes are corners, which no crop of the first steps holds: the loss of nothing is 0, not NaN."""
    truth = odd.folder / "annotations" / "ava_train_v2.2.csv"
    rows = [f"{name},{second},0.999,0.999,1.2,1.3,1,0" for name in odd.names("train") for second in (902, 904)]
    truth.write_text("\n".join(rows) + "\n")
    cfg = configured(odd, tmp_path / "run", "DATA.TRAIN_JITTER_SCALES", "[600, 600]", "TEST.ENABLE", "False")
    result = run(cfg)
    assert result.training is not None
    log = (tmp_path / "run" / "stdout.log").read_text()
    assert "NaN" not in log
    assert '"map"' in log
