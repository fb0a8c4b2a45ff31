"""Boxes and actions in PySlowFast's own run_net: runs only where PYSLOWFAST_ROOT names a checkout."""

import csv
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from small_jobs import checkpoint, json_stats, state_of
from test_slowfast_runs import ROOT, program, start, words_of, written

from distinit_plugin import InputSpec, build, build_network, cli, load_cfg
from distinit_plugin.detection.joining import select
from distinit_plugin.jobs.running import run

pytestmark = [
    pytest.mark.skipif(not os.environ.get("PYSLOWFAST_ROOT"), reason="PYSLOWFAST_ROOT is not set"),
    pytest.mark.timeout(1200),  # whole programs, several in a test
]

OURS = Path(__file__).resolve().parents[1] / "configs" / "AVA" / "d3d_given_boxes.yaml"


def frames_of(persons):
    """Words that make PySlowFast's own ``ava`` read the small set."""
    return [
        *("AVA.ANNOTATION_DIR", persons.annotations, "AVA.FRAME_DIR", persons.frames),
        *("AVA.FRAME_LIST_DIR", persons.frame_lists, "AVA.TRAIN_PREDICT_BOX_LISTS", "[]"),
        *("AVA.TEST_PREDICT_BOX_LISTS", "['ava_val_predicted_boxes.csv']", "AVA.DETECTION_SCORE_THRESH", "0.5"),
    ]


SMALL = words_of("""
NUM_GPUS 0 SOLVER.MAX_EPOCH 1 TRAIN.BATCH_SIZE 2 TEST.BATCH_SIZE 1 DATA.TRAIN_CROP_SIZE 64 DATA.TEST_CROP_SIZE 64
DATA.TRAIN_JITTER_SCALES [64,80] MODEL.NUM_CLASSES 8 DATA_LOADER.NUM_WORKERS 0 RESNET.WIDTH_PER_GROUP 8
SOLVER.BASE_LR 0.001 SOLVER.WARMUP_EPOCHS 0 LOG_PERIOD 1 AVA.FULL_TEST_ON_VAL True TRAIN.CHECKPOINT_TYPE pytorch
LOG_MODEL_INFO False
""")


def train_theirs(folder, persons, name, *words, status=0, **environment):
    config = ROOT / "configs" / "AVA" / f"{name}.yaml"
    output = folder / "run"
    given = ["--cfg", config, *SMALL, *frames_of(persons), *words, "OUTPUT_DIR", output]
    done = start(folder, given, **environment)
    assert (done.returncode == 0) == (status == 0), done.stdout[-3000:] + done.stderr[-3000:]
    return output, done


def maps_of(output):
    """What was printed last of a validation and of a test."""
    (validated,) = json_stats(output, "val_epoch", "json_stats.log")[-1:]
    return validated["map"], map_of_test(output)


def map_of_test(output):
    """What was printed of the last test."""
    lines = [line for line in (output / "json_stats.log").read_text().splitlines() if '"mode": "test"' in line]
    return json.loads(lines[-1].split("json_stats: ")[1])["map"]


def detections_of(path):
    """(video, second, action, box to three decimals) → score."""
    with open(path, newline="") as file:
        rows = list(csv.reader(file))
    found = {
        (row[0], int(float(row[1])), int(row[6]), *(round(float(value), 3) for value in row[2:6])): float(row[7])
        for row in rows
    }
    assert len(found) == len(rows)
    return found


# ---------------------------------------------------------------------------------------------- its own route


@pytest.mark.parametrize("name", ["SLOW_8x8_R50_SHORT", "SLOWFAST_32x2_R50_SHORT"])
def test_its_own_configurations_train_validate_and_test(tmp_path, persons, name):
    frames = ["DATA.NUM_FRAMES", "8"] if name.startswith("SLOWFAST") else []
    output, done = train_theirs(tmp_path, persons, name, *frames)
    losses = [stats["loss"] for stats in json_stats(output, "train_iter")]
    assert len(losses) == 6
    assert all(0 < loss < 5 for loss in losses)
    validated, tested = maps_of(output)
    assert 0 < validated < 1  # of the middle of each picture
    assert 0 < tested < 1
    assert checkpoint(output).is_file()
    assert len(detections_of(output / "detections_latest.csv")) % 8 == 0
    assert (output / "groundtruth_latest.csv").is_file()
    assert all(patch in done.stdout for patch in ("detection_test", "padded_keyframes", "detection_files"))


def test_without_a_patch_its_symptom_is_back(tmp_path, persons):
    words = ["TRAIN.ENABLE", "False"]
    without = {"DISTINIT_SLOWFAST_WITHOUT": "detection_test"}
    _, done = train_theirs(tmp_path / "test", persons, "SLOW_8x8_R50_SHORT", *words, status=1, **without)
    assert "Trying to pause a Timer that is already paused!" in done.stderr
    without = {"DISTINIT_SLOWFAST_WITHOUT": "detection_files"}
    with pytest.raises(AssertionError, match="something was written outside OUTPUT_DIR"):
        train_theirs(tmp_path / "files", persons, "SLOW_8x8_R50_SHORT", *words, **without)


def test_two_processes_test_its_network_as_one(tmp_path, persons):
    """Seven keyframes: one of them fills up the last batch of the second process."""
    output, _ = train_theirs(tmp_path / "one", persons, "SLOW_8x8_R50_SHORT")
    words = ["RUNNER.CPU_RANKS", "2", "TRAIN.ENABLE", "False", "TEST.CHECKPOINT_FILE_PATH", checkpoint(output)]
    both, _ = train_theirs(tmp_path / "two", persons, "SLOW_8x8_R50_SHORT", *words)
    one, two = (detections_of(folder / "detections_latest.csv") for folder in (output, both))
    assert one.keys() == two.keys()
    assert max(abs(one[key] - two[key]) for key in one) < 2e-4
    assert map_of_test(both) == pytest.approx(map_of_test(output), abs=1e-4)


# ---------------------------------------------------------------------------------------------- ours in it


def settings(persons, output, **keys):
    """A file on ours of AVA: S3D-G of a few channels, the small set straight from its videos."""
    words = dict(zip(persons.options()[0::2], persons.options()[1::2], strict=True))
    words |= {
        **{"AVA.TRAIN_PREDICT_BOX_LISTS": [], "AVA.TEST_PREDICT_BOX_LISTS": ["ava_val_predicted_boxes.csv"]},
        **{"AVA.DETECTION_SCORE_THRESH": 0.5, "AVA.FULL_TEST_ON_VAL": True, "TRAIN.CHECKPOINT_FILE_PATH": ""},
        **{"NETWORK.WIDTH": 8, "DATA.NUM_FRAMES": 8, "DATA.TRAIN_CROP_SIZE": 64, "DATA.TEST_CROP_SIZE": 64},
        **{"DATA.TRAIN_JITTER_SCALES": [64, 80], "TRAIN.BATCH_SIZE": 4, "SOLVER.MAX_EPOCH": 1, "NUM_GPUS": 0},
        **{"SOLVER.WARMUP_EPOCHS": 0.0, "SOLVER.BASE_LR": 0.05, "SOLVER.STEPS": [0], "SOLVER.LRS": [1.0]},
        **{"DATA_LOADER.NUM_WORKERS": 0, "LOG_PERIOD": 1, "ROI.MAX_DETECTIONS": 0, "ROI.EVALUATOR": "pyslowfast"},
        **{"RUNNER.PRECISION": "fp32", "RUNNER.CHANNELS_LAST": "off", "OUTPUT_DIR": str(output)},
        "LOG_MODEL_INFO": False,
        **{key.replace("__", "."): value for key, value in keys.items()},
    }
    nested = {"_BASE_": str(OURS)}
    for key, value in words.items():
        *nodes, name = key.split(".")
        inner = nested
        for node in nodes:
            inner = inner.setdefault(node, {})
        inner[name] = yaml.safe_load(value) if isinstance(value, str) and value[:1] in "[{" and value else value
    nested["MODEL"]["NUM_CLASSES"] = int(nested["MODEL"]["NUM_CLASSES"])
    nested["KEYFRAMES"]["VIDEO_START"] = float(nested["KEYFRAMES"]["VIDEO_START"])
    return nested


@pytest.fixture(scope="module")
def weights(persons, tmp_path_factory):
    """A network of that file whose scores differ: settled statistics, and a head of large random weights."""
    folder = tmp_path_factory.mktemp("weights")
    config = written(folder / "job.yaml", settings(persons, folder / "run"))
    torch.manual_seed(3)
    network = build.build_network(load_cfg(config)[0])
    clips = torch.randn(8, 3, 8, 64, 64).cumsum(2).clamp(-1, 1)
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm3d):
            module.momentum = None  # statistics are means over all passes
    with torch.no_grad():
        for _ in range(3):
            network({"rgb": clips})
        torch.nn.init.normal_(network.roi_head.projection.weight, 0, 0.3)
    torch.save({"epoch": 0, "model_state": network.bare_state_dict()}, folder / "start.pyth")
    start = str(folder / "start.pyth")
    return {"TRAIN__CHECKPOINT_FILE_PATH": start, "SOLVER__BASE_LR": 1e-6, "MODEL__FROZEN_BN": True}


def differ(detections):
    """Whether the scores of an action tell boxes apart, and none is at an end, where many would be equal."""
    scores = [score for (_, _, action, *_), score in detections.items() if action == 1]
    return np.std(scores) > 0.003 and min(detections.values()) > 0.001 and max(detections.values()) < 0.999


def run_there(folder, persons, *words, **keys):
    """Our file in PySlowFast; returns OUTPUT_DIR, the file, what was printed."""
    folder.mkdir(parents=True, exist_ok=True)
    config = written(folder / "job.yaml", settings(persons, folder / "run", **keys))
    done = start(folder, ["--cfg", config, *words])
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return folder / "run", config, done


def boxes_here(config, output, weights):
    """``distinit run`` tests a checkpoint."""
    words = ["TRAIN.ENABLE", "False", "TEST.CHECKPOINT_FILE_PATH", str(weights), "OUTPUT_DIR", str(output)]
    return run(load_cfg(config, words)[0]).boxes


def in_their_order(persons, table):
    """Rows of detections, boxes as in their file and actions by number, which decides who claims a person first."""
    lines = (persons.annotations / "ava_val_predicted_boxes.csv").read_text().splitlines()
    places = [(row[0], float(row[1]), *map(float, row[2:6])) for row in (line.split(",") for line in lines)]
    keys = [
        (places.index((table.videos[video], second, *box)), action)
        for video, second, box, action in zip(
            table.video, table.seconds, table.boxes.tolist(), table.actions.tolist(), strict=True
        )
    ]
    return np.array(sorted(range(len(keys)), key=keys.__getitem__))


def test_a_checkpoint_of_either_program_is_tested_by_the_other(tmp_path, persons, weights):
    there, config, _ = run_there(tmp_path / "there", persons, **weights)
    validated, tested = maps_of(there)
    assert 0 < tested < 1
    assert validated == pytest.approx(tested, abs=1e-5)  # one epoch, and the validation takes all keyframes
    here = boxes_here(config, tmp_path / "here", checkpoint(there))
    ours, theirs = detections_of(tmp_path / "here/test/detections.csv"), detections_of(there / "detections_latest.csv")
    assert ours.keys() == theirs.keys()
    assert max(abs(ours[key] - theirs[key]) for key in ours) < 1e-4
    assert differ(ours)
    judge = build.build_judge(load_cfg(config)[0], "test")
    rows = in_their_order(persons, here.table)
    assert judge(select(here.table, rows)).map == pytest.approx(tested, abs=1e-5)

    cfg, _ = load_cfg(config, ["OUTPUT_DIR", str(tmp_path / "trained")])
    trained = run(cfg).boxes
    assert state_of(tmp_path / "trained")["model_state"].keys() == state_of(there)["model_state"].keys()
    words = ["TRAIN.ENABLE", "False", "TEST.CHECKPOINT_FILE_PATH", checkpoint(tmp_path / "trained")]
    again, _, _ = run_there(tmp_path / "again", persons, *words)
    theirs = detections_of(again / "detections_latest.csv")
    ours = detections_of(tmp_path / "trained/test/detections.csv")
    assert ours.keys() == theirs.keys()
    assert max(abs(ours[key] - theirs[key]) for key in ours) < 1e-4
    assert differ(ours)
    rows = in_their_order(persons, trained.table)
    assert judge(select(trained.table, rows)).map == pytest.approx(map_of_test(again), abs=1e-5)


def test_two_processes_train_and_test_as_one(tmp_path, persons, weights):
    """One step on the same keyframes, batch normalisation at rest: the mean is over the boxes of both processes."""
    keys = {"TRAIN__BATCH_SIZE": 12, "RUNNER__CLIPS_PER_EPOCH": 12, "MODEL__DROPOUT_RATE": 0.0}
    keys = {**weights, **keys, "SOLVER__BASE_LR": 1e-5}
    one, _, _ = run_there(tmp_path / "one", persons, **keys)
    two, _, _ = run_there(tmp_path / "two", persons, RUNNER__CPU_RANKS=2, **keys)
    (first,), (second,) = (json_stats(folder, "train_iter") for folder in (one, two))
    assert first["loss"] == pytest.approx(second["loss"], abs=2e-5)
    begun = torch.load(weights["TRAIN__CHECKPOINT_FILE_PATH"])["model_state"]
    moved, other = (
        torch.cat([(state[name] - begun[name]).double().flatten() for name in begun])
        for state in (state_of(folder)["model_state"] for folder in (one, two))
    )
    assert moved.abs().max() > 1e-5
    assert (moved - other).norm() < 0.02 * moved.norm()
    ours, theirs = (detections_of(folder / "detections_latest.csv") for folder in (one, two))
    assert ours.keys() == theirs.keys()
    assert max(abs(ours[key] - theirs[key]) for key in ours) < 2e-4
    assert maps_of(one) == pytest.approx(maps_of(two), abs=1e-4)


def test_its_own_network_on_our_data(tmp_path, persons):
    """PySlowFast's SlowFast as its file has it, on our reader of the videos, with our loss."""
    file = {
        "_BASE_": str(ROOT / "configs" / "AVA" / "SLOWFAST_32x2_R50_SHORT.yaml"),
        "TRAIN": {"DATASET": "distinitava"},
        "TEST": {"DATASET": "distinitava"},
        "AVA": {"ANNOTATION_DIR": str(persons.annotations), "TRAIN_PREDICT_BOX_LISTS": []},
        "KEYFRAMES": {"VIDEO_DIR": str(persons.videos), "VIDEO_START": 900.0},
        "ACTION": {"LOSS": "bce", "LOSS_WEIGHT": 1.0},
    }
    predicted = ["AVA.TEST_PREDICT_BOX_LISTS", "['ava_val_predicted_boxes.csv']", "AVA.DETECTION_SCORE_THRESH", "0.5"]
    words = [*SMALL, *predicted, "DATA.NUM_FRAMES", "8", "OUTPUT_DIR", tmp_path / "run"]
    done = start(tmp_path, ["--cfg", written(tmp_path / "job.yaml", file), *words])
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    losses = [stats["loss"] for stats in json_stats(tmp_path / "run", "train_iter")]
    assert all(0 < loss < 5 for loss in losses)
    assert "loss_0: action" in (tmp_path / "run" / "stdout.log").read_text()
    assert 0 < map_of_test(tmp_path / "run") < 1


def test_our_network_on_its_own_data(tmp_path, persons):
    words = words_of("MODEL.MODEL_NAME S3DG RESNET.DEPTH 18 NETWORK.WIDTH 8 ROI.DILATION True DATA.NUM_FRAMES 8")
    output, _ = train_theirs(tmp_path, persons, "SLOW_8x8_R50_SHORT", *words)
    losses = [stats["loss"] for stats in json_stats(output, "train_iter")]
    assert all(0 < loss < 5 for loss in losses)
    assert 0 < maps_of(output)[1] < 1


def test_a_trunk_starts_it(tmp_path, persons):
    clip = InputSpec(num_frames=8, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    trunk = build_network("S3DG", num_classes=5, input=clip, width=8)
    torch.save({"epoch": 40, "model_state": trunk.bare_state_dict()}, tmp_path / "d3d.pyth")
    keys = {"TRAIN__CHECKPOINT_FILE_PATH": str(tmp_path / "d3d.pyth"), "SOLVER__BASE_LR": 1e-9}
    output, _, _ = run_there(tmp_path, persons, **keys, TEST__ENABLE=False, LOG_MODEL_INFO=True)
    log = (output / "stdout.log").read_text()
    assert "missing         2  roi_head.projection.weight, roi_head.projection.bias" in log
    assert "unexpected      2  fc.weight, fc.bias" in log
    assert "Flops: 0.0" in log
    saved = state_of(output)["model_state"]
    kernels = [name for name, value in trunk.bare_state_dict().items() if value.ndim == 5]
    for name in kernels:
        torch.testing.assert_close(saved[name], trunk.bare_state_dict()[name], rtol=0, atol=1e-6)


def test_a_step_is_the_same_in_both_programs(tmp_path, persons):
    config = written(tmp_path / "job.yaml", settings(persons, tmp_path / "run", MODEL__DROPOUT_RATE=0.0))
    result = program(
        "compare_box_steps",
        "slowfast_ava_programs.py",
        config=str(config),
        clips=[0, 1, 3],
        start=str(tmp_path / "start.pyth"),
    )
    ours, theirs = result["loss"]
    assert ours > 0.1
    assert theirs == pytest.approx(ours, abs=1e-4)
    assert result["gradient"] < 1e-3
    assert result["boxes"][0] == result["boxes"][1] > 1
    assert 0 < result["range"][0] < result["range"][1] < 1


def test_its_meter_is_our_evaluator_by_its_rules(tmp_path, persons):
    config = written(tmp_path / "job.yaml", settings(persons, tmp_path / "run"))
    (tmp_path / "run").mkdir()
    result = program("compare_maps", "slowfast_ava_programs.py", config=str(config))
    assert 0.05 < result["meter"] < 0.95
    assert result["meter"] == pytest.approx(result["pyslowfast"], abs=1e-9)
    assert result["meter"] != pytest.approx(result["official"], abs=1e-6)  # the control


def test_what_boxes_cannot_be_had_there_is_refused_before_anything_is_built(tmp_path, persons):
    config = written(tmp_path / "job.yaml", settings(persons, tmp_path / "run"))
    done = start(tmp_path, ["--cfg", config, "ROI.PROPOSALS", "own"])
    assert done.returncode == cli.EXIT_USER_ERROR
    assert "ROI.PROPOSALS: own is not possible in PySlowFast" in done.stderr
