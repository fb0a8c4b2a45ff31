"""PySlowFast's networks, files, checkpoints and logs in this package's runner: only where PYSLOWFAST_ROOT is set."""

import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from small_jobs import checkpoint, json_stats, labelled, merged, small_settings, state_of
from test_slowfast_runs import (
    PACKAGE,
    ROOT,
    SMALL,
    THEIR_CONFIGS,
    corpus,
    distinit_settings,
    image_teacher,
    run_there,
    start,
    train,
    words_of,
    written,
)

from distinit_plugin.engine.curves import read_curves
from distinit_plugin.engine.logs import final_test, read_log

__all__ = ["corpus", "image_teacher"]  # fixtures

pytestmark = [
    pytest.mark.skipif(not os.environ.get("PYSLOWFAST_ROOT"), reason="PYSLOWFAST_ROOT is not set"),
    pytest.mark.timeout(1200),  # whole programs, several in a test
]

CONFIGS = ROOT / "configs" / "Kinetics"


def program(name, **arguments):
    """A function of ``slowfast_borrowing`` in a process of its own."""
    script = Path(__file__).with_name("slowfast_borrowing.py")
    given = {**os.environ, "PYTHONPATH": f"{PACKAGE}{os.pathsep}{script.parent}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", script, name, json.dumps(arguments)], env=given, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def run_here(folder, *words, **environment):
    """``distinit run``; returns what it printed."""
    given = {**os.environ, "PYTHONPATH": str(PACKAGE), "OMP_NUM_THREADS": "1", **environment}
    command = [sys.executable, "-W", "ignore", "-m", "distinit_plugin.cli", "run", *map(str, words)]
    done = subprocess.run(command, cwd=folder, env=given, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


# ---------------------------------------------------------------------------------------------------- networks

NETWORKS = {
    "SLOW_4x16_R50": words_of("DATA.NUM_FRAMES 4 DATA.TEST_CROP_SIZE 96"),
    "SLOWFAST_4x16_R50": words_of("DATA.NUM_FRAMES 32 DATA.TEST_CROP_SIZE 96"),
    "C2D_NLN_8x8_R50": words_of("DATA.NUM_FRAMES 8 DATA.TEST_CROP_SIZE 64"),
    "X3D_XS": words_of("DATA.NUM_FRAMES 4 DATA.TEST_CROP_SIZE 96"),
    "MVIT_B_16x4_CONV": words_of("DATA.NUM_FRAMES 16 DATA.TEST_CROP_SIZE 64"),
    "MVITv2_S_16x4": words_of("DATA.NUM_FRAMES 16 DATA.TEST_CROP_SIZE 64"),
    "pytorchvideo/SLOW_8x8_R50": words_of("DATA.NUM_FRAMES 8 DATA.TEST_CROP_SIZE 96"),
    "pytorchvideo/R2PLUS1D_16x4_R50": words_of("DATA.NUM_FRAMES 16 DATA.TEST_CROP_SIZE 64"),
}


def test_networks_are_pyslowfasts_own(tmp_path):
    """Its files build the same network here, its weights fit with nothing left over, and the logits are no scores."""
    small = words_of("DATA.TRAIN_CROP_SIZE 64 MODEL.NUM_CLASSES 7 DATA.TRAIN_JITTER_SCALES [96,96]")
    jobs = [(str(CONFIGS / f"{name}.yaml"), [*small, *words]) for name, words in NETWORKS.items()]
    found = program("compare_networks", jobs=jobs, folder=str(tmp_path))
    assert len(found) == len(NETWORKS)
    for file, result in found.items():
        assert result["report"] == [0, 0, 0], file
        assert result["back"] == [[], []], file
        assert result["keys"], file
        assert result["difference"] < 1e-5, file
        assert result["training"] < 1e-4, file
        assert min(abs(row - 1) for row in result["sums"]) > 1e-3, file
        assert result["features"], file
    layers = {Path(file).stem: result["layers"] for file, result in found.items()}
    assert layers["SLOW_4x16_R50"]["s5"] == [2048, 1, 32]
    assert layers["SLOWFAST_4x16_R50"]["s5"] == [2048, 8, 32]
    assert layers["SLOWFAST_4x16_R50"]["s5.fast"] == [256, 1, 32]
    assert layers["MVIT_B_16x4_CONV"] == {}


def test_absent_networks_are_named(tmp_path, corpus):
    settings = small_settings(corpus, tmp_path / "run", **labelled(corpus), MODEL={"MODEL_NAME": "slowfast/ResNot"})
    del settings["NETWORK"]
    config = written(tmp_path / "job.yaml", settings)
    given = {**os.environ, "PYTHONPATH": str(PACKAGE)}
    command = [sys.executable, "-m", "distinit_plugin.cli", "run", "--cfg", config]
    done = subprocess.run(command, env=given, capture_output=True, text=True)
    assert done.returncode == 1
    assert "PySlowFast has no network 'ResNot' for this. Did you mean ResNet" in done.stdout + done.stderr


# ---------------------------------------------------------------------------------------------------- its files


@pytest.mark.parametrize("name", THEIR_CONFIGS)
def test_its_files_run_here(tmp_path, corpus, name):
    words = [*SMALL, *THEIR_CONFIGS[name], "DATA.PATH_TO_DATA_DIR", corpus / "lists", "OUTPUT_DIR", tmp_path / "run"]
    run_here(tmp_path, "--cfg", CONFIGS / f"{name}.yaml", *words)
    (epoch,) = json_stats(tmp_path / "run", "train_epoch", "json_stats.log")
    assert epoch["loss"] > 0
    assert len(json_stats(tmp_path / "run", "val_epoch", "json_stats.log")) == 1
    assert final_test(tmp_path / "run")["top5_acc"] == 100.0


def test_what_is_said_about_each_of_its_files():
    files = sorted((ROOT / "configs").rglob("*.yaml"))
    found = program("survey", files=list(map(str, files)))
    good = [file for file, result in found.items() if not result["problems"]]
    kinetics = [file for file in files if file.is_relative_to(CONFIGS)]
    refused = {str(file): found[str(file)]["problems"] for file in kinetics if str(file) not in good}
    assert all(len(problems) > 0 for problems in refused.values())
    assert len(files) == 109
    for file in good:
        assert found[file]["model"].startswith("slowfast/"), file


# ---------------------------------------------------------------------------------------------------- teachers


@pytest.fixture(scope="module")
def their_run(tmp_path_factory, corpus):
    """A run of PySlowFast's own loop and loss."""
    folder = tmp_path_factory.mktemp("theirs")
    return train(folder, corpus, CONFIGS / "SLOW_4x16_R50.yaml", "RESNET.WIDTH_PER_GROUP", "8", "DATA.NUM_FRAMES", "4")


def test_one_of_its_checkpoints_is_a_teacher(tmp_path, corpus, their_run):
    """What it is stands in its own ``cfg``; from a bare file of the model zoo a YAML file says it."""
    torch.save({"model_state": state_of(their_run)["model_state"]}, tmp_path / "zoo.pyth")
    theirs = written(
        tmp_path / "theirs.yaml", {"_BASE_": str(CONFIGS / "SLOW_4x16_R50.yaml"), "RESNET": {"WIDTH_PER_GROUP": 8}}
    )
    entry = {"ARCH": "slowfast/ResNet", "NUM_CLASSES": 2, "FRAME_PICK": "clip", "CROP_SIZE": 64}
    teachers = {
        "CHECKPOINT": {**entry, "WEIGHTS": str(checkpoint(their_run))},
        "ZOO": {**entry, "WEIGHTS": str(tmp_path / "zoo.pyth"), "CFG": str(theirs)},
    }
    settings = small_settings(corpus, tmp_path / "run", DISTILL={"TEACHERS": teachers})
    run_here(tmp_path, "--cfg", written(tmp_path / "job.yaml", settings))
    (epoch,) = json_stats(tmp_path / "run", "train_epoch", "json_stats.log")
    assert epoch["loss/CHECKPOINT"] > 0.1
    assert epoch["loss/CHECKPOINT"] != epoch["loss/ZOO"]  # each term has a head of its own
    entropies = [value for key, value in epoch.items() if "entropy" in key]
    assert len(entropies) in (0, 2)
    assert len(set(entropies)) <= 1  # one network


# ---------------------------------------------------------------------------------------------------- tests of both

THEIRS = {
    "MODEL": {"MODEL_NAME": "slowfast/ResNet", "ARCH": "slow"},
    "RESNET": {"DEPTH": 50, "WIDTH_PER_GROUP": 8},
    "DATA": {"INPUT_CHANNEL_NUM": [3]},
}


@pytest.mark.parametrize("network", ["ours", "theirs"])
def test_scores_of_several_views_are_equal(tmp_path, corpus, network):
    """The same clips and crops; of its own network also places beside one another (48 pixels, trained at 32)."""
    sections = merged(
        labelled(corpus, TRAIN="train", TEST="test"),
        {
            "TRAIN": {"ENABLE": False},
            "TEST": {"ENABLE": True, "NUM_ENSEMBLE_VIEWS": 3, "NUM_SPATIAL_CROPS": 3},
            "DATA": {"TEST_CROP_SIZE": 40},
        },
    )
    settings = small_settings(corpus, tmp_path / "run", **merged(sections, THEIRS if network == "theirs" else {}))
    if network == "theirs":
        del settings["NETWORK"]
    config = written(tmp_path / "job.yaml", settings)
    weights = tmp_path / "weights.pyth"
    program("write_weights", config=str(config), path=str(weights), words=[])
    words = ["TEST.CHECKPOINT_FILE_PATH", weights]
    run_here(tmp_path, "--cfg", config, *words)
    with np.load(tmp_path / "run" / "test" / "scores.npz") as file:
        ours, labels = file["scores"], file["labels"]
    settings["OUTPUT_DIR"] = str(tmp_path / "there")
    run_there(tmp_path, settings, *words, "TEST.SAVE_RESULTS_PATH", "scores.pkl")
    with open(tmp_path / "there" / "scores.pkl", "rb") as file:
        sums, their_labels = pickle.load(file)
    assert their_labels.tolist() == labels.tolist()
    assert np.abs(sums.numpy() / 9 - ours).max() < 1e-5
    assert np.abs(ours - ours.mean(0)).max() > 1e-3  # they say something
    assert final_test(tmp_path / "there").items() <= final_test(tmp_path / "run").items()


# ---------------------------------------------------------------------------------------------------- going on

MVIT = {
    "MODEL": {"MODEL_NAME": "slowfast/MViT", "ARCH": "mvit"},
    "MVIT": {
        "DEPTH": 2,
        "EMBED_DIM": 16,
        "PATCH_KERNEL": [3, 7, 7],
        "PATCH_STRIDE": [2, 4, 4],
        "PATCH_PADDING": [1, 3, 3],
        "DROPPATH_RATE": 0.0,
    },
}


def continued(corpus, output, image_teacher, student, ranks):
    """DistInit with two teachers on all four clips in each step, so that their order does not matter."""
    sections = {"RESNET": None, "NETWORK": None, "TRAIN": {"BATCH_SIZE": 4}, "RUNNER": {"CPU_RANKS": ranks}}
    settings = distinit_settings(corpus, output, image_teacher, **merged(sections, student))
    settings["SOLVER"] |= {"BASE_LR": 0.01, "LR_POLICY": "steps_with_relative_lrs"}
    return {key: value for key, value in settings.items() if value is not None}


def largest_difference(one, other):
    assert one.keys() == other.keys()
    return max((one[key].double() - other[key].double()).abs().max().item() for key in one)


@pytest.mark.parametrize(("student", "ranks"), [(THEIRS, 1), (MVIT, 1), (MVIT, 2)], ids=["resnet", "mvit", "two ranks"])
@pytest.mark.parametrize("begins", ["here", "there"])
def test_a_training_goes_on_in_either_program(tmp_path, corpus, image_teacher, student, ranks, begins):
    """One epoch in one, the next in the other, against both epochs in the one: weights, heads and slots travel."""

    def here(output, epochs):
        settings = continued(corpus, output, image_teacher, student, ranks)
        run_here(tmp_path, "--cfg", written(tmp_path / "job.yaml", settings), "SOLVER.MAX_EPOCH", epochs)

    def there(output, epochs):
        run_there(tmp_path, continued(corpus, output, image_teacher, student, ranks), "SOLVER.MAX_EPOCH", epochs)

    first, second = (here, there) if begins == "here" else (there, here)
    names = [f"{first.__name__}_{last.__name__}" for last in (first, second)]
    first(tmp_path / names[0], 1)
    shutil.copytree(tmp_path / names[0], tmp_path / names[1])
    first(tmp_path / names[0], 2)
    second(tmp_path / names[1], 2)
    before, stayed, moved = state_of(tmp_path / names[0]), *(state_of(tmp_path / name, 2) for name in names)
    assert stayed["epoch"] == moved["epoch"] == 1
    for entry in ("model_state", "adapters"):
        one, other, start_ = (
            state[entry] if entry in state else state["distinit"][entry] for state in (stayed, moved, before)
        )
        assert largest_difference(one, start_) > 1e-3  # the second epoch changed something
        assert largest_difference(one, other) < 1e-4, (names, entry)
    assert [line.epoch for line in read_log(tmp_path / names[1]) if line.kind == "train_epoch"][:2] == [1, 2]


def test_a_student_of_this_runner_is_fine_tuned_there_and_back(tmp_path, corpus, image_teacher, their_run):
    settings = continued(corpus, tmp_path / "pretrained", image_teacher, THEIRS, 1)
    run_here(tmp_path, "--cfg", written(tmp_path / "job.yaml", settings))
    student = {"RESNET.WIDTH_PER_GROUP": "8", "DATA.NUM_FRAMES": "4"}
    words = [word for pair in student.items() for word in pair]
    there = [*SMALL, *words, "DATA.PATH_TO_DATA_DIR", corpus / "lists", "OUTPUT_DIR", tmp_path / "tuned"]
    start_from = [
        "TRAIN.CHECKPOINT_FILE_PATH",
        checkpoint(tmp_path / "pretrained"),
        "TRAIN.CHECKPOINT_EPOCH_RESET",
        "True",
    ]
    done = start(tmp_path, ["--cfg", CONFIGS / "SLOW_4x16_R50.yaml", *there, *start_from])
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert done.stdout.count("missing keys: []") == done.stdout.count("unexpected keys: []") == 2

    here = [*SMALL, *words, "DATA.PATH_TO_DATA_DIR", corpus / "lists", "OUTPUT_DIR", tmp_path / "back"]
    start_from[1] = checkpoint(their_run)
    text = run_here(tmp_path, "--cfg", CONFIGS / "SLOW_4x16_R50.yaml", *here, *start_from)
    report = text.partition(f"weights from {checkpoint(their_run)}\n")[2].splitlines()[:4]
    counts = {name: int(count) for name, count in (line.split()[:2] for line in report)}
    assert counts.pop("loaded") > 200
    assert counts == {"missing": 0, "unexpected": 0, "mismatched": 0}


def test_logs_of_both_are_read_by_one_reader(tmp_path, corpus, their_run):
    words = [*SMALL, "RESNET.WIDTH_PER_GROUP", "8", "DATA.NUM_FRAMES", "4", "DATA.PATH_TO_DATA_DIR", corpus / "lists"]
    run_here(tmp_path, "--cfg", CONFIGS / "SLOW_4x16_R50.yaml", *words, "OUTPUT_DIR", tmp_path / "run")
    both = [read_log(tmp_path / "run"), read_log(their_run)]
    kinds = [{line.kind for line in lines} for lines in both]
    assert {"train_iter", "train_epoch", "val_epoch", "test_final"} <= kinds[0] & kinds[1]
    for kind in ("train_iter", "train_epoch", "val_epoch", "test_final"):
        ours, theirs = (next(line for line in lines if line.kind == kind) for lines in both)
        assert (ours.epoch, ours.step, ours.steps) == (theirs.epoch, theirs.step, theirs.steps)
        assert theirs.values.keys() <= ours.values.keys() | {"grad_norm"}
    for folder in (tmp_path / "run", their_run):
        curves = read_curves(folder)
        assert len(curves.train_loss) == 2
        assert len(curves.val_top1) == 1
