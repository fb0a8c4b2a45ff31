"""Persons' boxes and actions from YAML: training, validation, checkpoint and test on real encoded videos."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from distinit_plugin import load_cfg
from distinit_plugin.demos.persons import ACTION_NAMES, make_persons
from distinit_plugin.detection.files import read_boxes, read_detections, read_excluded, read_label_map, read_truth
from distinit_plugin.detection.frame_map import frame_map
from distinit_plugin.engine.checkpoint import load_checkpoint
from distinit_plugin.errors import ConfigError
from distinit_plugin.jobs.running import run

YAML = Path(__file__).resolve().parents[1] / "configs" / "quickstart" / "persons.yaml"
FAST = (
    *("DATA.NUM_FRAMES", "4", "DATA.TRAIN_CROP_SIZE", "32", "DATA.TEST_CROP_SIZE", "32", "NETWORK.WIDTH", "4"),
    *("DATA.TRAIN_JITTER_SCALES", "[32, 40]", "TRAIN.BATCH_SIZE", "4", "TEST.BATCH_SIZE", "4"),
    *(
        "SOLVER.MAX_EPOCH",
        "2",
        "SOLVER.WARMUP_EPOCHS",
        "0",
        "DATA_LOADER.NUM_WORKERS",
        "0",
        "RUNNER.CHANNELS_LAST",
        "off",
    ),
    *("ROI.LAYER", "layer2", "AVA.FULL_TEST_ON_VAL", "True", "RUNNER.CLIPS_PER_EPOCH", "8"),
)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_persons(
        tmp_path_factory.mktemp("persons"), num_train=2, num_test=2, num_keyframes=3, height=48, width=64
    )


def configured(data, folder, *options):
    return load_cfg(YAML, [*data.options(), *FAST, "OUTPUT_DIR", str(folder), *options])[0]


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    return folder, run(configured(data, folder))


def lines_of(folder, kind):
    logged = (folder / "stdout.log").read_text().splitlines()
    stats = [json.loads(line.split("json_stats: ", 1)[1]) for line in logged if "json_stats: " in line]
    return [entry for entry in stats if kind in (entry.get("_type"), entry.get("split"))]


def test_detections_are_written_in_the_official_form(trained, data):
    folder, result = trained
    metrics = json.loads((folder / "test" / "metrics.json").read_text())
    table = read_detections(folder / "test" / "detections.csv")
    own = frame_map(
        read_truth(data.annotations / "ava_val_v2.2.csv"),
        table,
        read_label_map(data.annotations / "ava_action_list_v2.2_for_activitynet_2019.pbtxt"),
        excluded=read_excluded(data.annotations / "ava_val_excluded_timestamps_v2.2.csv"),
    )
    assert metrics["map"] == own.map == result.boxes.result.map
    assert set(metrics["per_class"]) == set(ACTION_NAMES)
    assert 0 <= metrics["map"] <= 1
    assert metrics["num_unread"] == 0
    # Each predicted box that is sure enough has a row for each action, with the very numbers of its file.
    given = read_boxes(data.annotations / "ava_val_predicted_boxes.csv")
    sure = given.scores >= 0.5
    excluded = read_excluded(data.annotations / "ava_val_excluded_timestamps_v2.2.csv")
    wanted = {
        (given.videos[video], second, *box)
        for video, second, box in zip(given.video[sure], given.seconds[sure], given.boxes[sure].tolist(), strict=True)
        if (given.videos[video], second) not in excluded
    }
    rows = list(zip(table.video, table.seconds, table.boxes.tolist(), strict=True))
    assert {(table.videos[video], second, *box) for video, second, box in rows} == wanted
    assert len(table) == len(wanted) * len(ACTION_NAMES)


def test_the_log_has_the_map_of_validation_and_test(trained):
    folder, result = trained
    (validation,) = lines_of(folder, "val_epoch")
    (final,) = lines_of(folder, "test_final")
    assert final["map"] == pytest.approx(result.boxes.result.map, abs=1e-5)
    assert validation["map"] == final["map"]  # the same keyframes and weights
    assert result.training.best["name"] == "map"
    assert result.evaluation is None
    assert all(np.isfinite(entry["loss/action"]) for entry in lines_of(folder, "train_epoch"))


def test_the_checkpoint_is_tested_again_with_the_same_result(trained, data, tmp_path):
    folder, before = trained
    (path,) = (folder / "checkpoints").glob("checkpoint_epoch_*.pyth")
    state = load_checkpoint(path)["model_state"]
    assert {"roi_head.projection.weight", "roi_head.projection.bias"} <= set(state)
    options = ("TRAIN.ENABLE", "False", "TEST.CHECKPOINT_FILE_PATH", str(path), "TEST.BATCH_SIZE", "1")
    again = run(configured(data, tmp_path, *options))
    np.testing.assert_allclose(again.boxes.table.scores, before.boxes.table.scores, atol=1e-5)
    assert again.boxes.result.map == pytest.approx(before.boxes.result.map)


def test_ground_truth_boxes_can_be_scored(trained, data, tmp_path):
    (path,) = (trained[0] / "checkpoints").glob("checkpoint_epoch_*.pyth")
    options = ("TRAIN.ENABLE", "False", "TEST.CHECKPOINT_FILE_PATH", str(path), "KEYFRAMES.TEST_BOXES", "ground_truth")
    table = run(configured(data, tmp_path, *options, "ROI.SCORE_FLOOR", "0.3", "ROI.MAX_DETECTIONS", "5")).boxes.table
    truth = read_truth(data.annotations / "ava_val_v2.2.csv")
    assert {tuple(box) for box in table.boxes.tolist()} <= {tuple(box) for box in truth.boxes.tolist()}
    assert table.scores.min() >= 0.3
    assert np.unique(np.stack([table.video, table.seconds]), axis=1, return_counts=True)[1].max() <= 5


def test_normalisation_can_stay_as_it_is(trained, data, tmp_path):
    (path,) = (trained[0] / "checkpoints").glob("checkpoint_epoch_*.pyth")
    options = ("TRAIN.CHECKPOINT_FILE_PATH", str(path), "MODEL.FROZEN_BN", "True", "TEST.ENABLE", "False")
    run(configured(data, tmp_path, *options, "AVA.FULL_TEST_ON_VAL", "False"))
    before = load_checkpoint(path)["model_state"]
    (path,) = (tmp_path / "checkpoints").glob("checkpoint_epoch_*.pyth")
    after = load_checkpoint(path)["model_state"]
    statistics = [key for key in before if "running_" in key]
    assert statistics
    assert all(torch.equal(before[key], after[key]) for key in statistics)
    assert not torch.equal(before["stem.0.weight"], after["stem.0.weight"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("ACTION.LOSS", "cross_entropy"), "ACTION.LOSS: cross_entropy with LOSS_WEIGHT 1, but a person does several"),
        (("DETECTION.ENABLE", "False"), "ACTION.LOSS: bce is for the actions of boxes"),
        (("ROI.REFINE_BOXES", "True"), "ROI.REFINE_BOXES: True, but with ROI.PROPOSALS given"),
        (("ROI.LAYER", "layer7"), "no layer named 'layer7'"),
        (("ROI.LAYER", "layer2+"), "ROI.LAYER: 'layer2\\+' is not allowed"),
        (("DETECTION.SPATIAL_SCALE_FACTOR", "16"), "the layer layer2 has a stride of 8 pixels"),
        (("SOLVER.LR_POLICY", "plateau"), "SOLVER.LR_POLICY: plateau listens to the loss"),
        (("DISTILL.GATE", "skip"), "DISTILL.GATE: skip leaves clips out"),
        (("MODEL.NUM_CLASSES", "5"), "actions do not fit MODEL.NUM_CLASSES 5"),
        (("MODEL.FROZEN_BN", "True"), "MODEL.FROZEN_BN: True, but the training starts from random weights"),
        (("AVA.GROUNDTRUTH_FILE", "none.csv"), "none.csv"),
    ],
)
def test_what_is_wrong_is_said_before_the_first_step(options, message, data, tmp_path):
    with pytest.raises(ConfigError, match=message):
        run(configured(data, tmp_path / "out", *options))
    assert not (tmp_path / "out" / "checkpoints").exists()
