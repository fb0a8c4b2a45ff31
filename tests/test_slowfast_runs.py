"""PySlowFast's own run_net with everything of this package in it: runs only where PYSLOWFAST_ROOT names a checkout."""

import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from small_jobs import (
    CLASSES,
    brightness_teacher,
    checkpoint,
    json_stats,
    labelled,
    merged,
    small_settings,
    state_of,
    write_corpus,
    write_teacher,
)

from distinit_plugin import InputSpec, build_network, cli

ROOT = Path(os.environ.get("PYSLOWFAST_ROOT") or ".")
PACKAGE = Path(__file__).resolve().parents[1]

pytestmark = [
    pytest.mark.skipif(not os.environ.get("PYSLOWFAST_ROOT"), reason="PYSLOWFAST_ROOT is not set"),
    pytest.mark.timeout(1200),  # whole programs, several in a test
]


def words_of(line):
    """The words of a command line."""
    return line.split()


SMALL = words_of("""
NUM_GPUS 0 SOLVER.MAX_EPOCH 1 TRAIN.BATCH_SIZE 2 TEST.BATCH_SIZE 2 DATA.NUM_FRAMES 8 DATA.SAMPLING_RATE 2
DATA.TRAIN_CROP_SIZE 64 DATA.TEST_CROP_SIZE 64 DATA.TRAIN_JITTER_SCALES [64,72] MODEL.NUM_CLASSES 2
DATA_LOADER.NUM_WORKERS 0 TEST.NUM_ENSEMBLE_VIEWS 2 TEST.NUM_SPATIAL_CROPS 1 BN.USE_PRECISE_STATS False
SOLVER.BASE_LR 0.001 SOLVER.WARMUP_EPOCHS 0 LOG_PERIOD 1 LOG_MODEL_INFO False
""")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """``train``, ``test`` and PySlowFast's ``lists/{train,val,test}.csv`` of them."""
    folder = tmp_path_factory.mktemp("corpus")
    write_corpus(folder / "train", 2, frames=24)
    write_corpus(folder / "test", 1, first=100, frames=24)
    (folder / "lists").mkdir()
    for split, source in (("train", "train"), ("val", "test"), ("test", "test")):
        rows = [
            f"{path} {label}\n"
            for label, name in enumerate(CLASSES)
            for path in sorted((folder / source / name).iterdir())
        ]
        (folder / "lists" / f"{split}.csv").write_text("".join(rows))
    return folder


def git_status():
    done = subprocess.run(["git", "status", "--short"], cwd=ROOT, capture_output=True, text=True)
    return done.stdout if done.returncode == 0 else sorted(str(path) for path in ROOT.rglob("*"))


def start(folder, words, **environment):
    """``distinit slowfast`` from an empty folder; returns what it printed."""
    empty = folder / "empty"
    empty.mkdir(parents=True, exist_ok=True)
    before = git_status()
    program = [sys.executable, "-W", "ignore", "-m", "distinit_plugin.hosts.slowfast", *map(str, words)]
    given = {**os.environ, "PYTHONPATH": str(PACKAGE), "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run(program, cwd=empty, env=given, capture_output=True, text=True)
    assert git_status() == before, "the checkout was written to"
    assert list(empty.iterdir()) == [], "something was written outside OUTPUT_DIR"
    return done


def train(folder, corpus, config, *words):
    output = folder / "run"
    done = start(
        folder, ["--cfg", config, *SMALL, "DATA.PATH_TO_DATA_DIR", corpus / "lists", *words, "OUTPUT_DIR", output]
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return output


THEIR_CONFIGS = {
    "SLOW_4x16_R50": [],
    "SLOWFAST_4x16_R50": [],
    "X3D_XS": [],
    "MVIT_B_16x4_CONV": ["DATA.NUM_FRAMES", "16"],
    "pytorchvideo/R2PLUS1D_16x4_R50": words_of("DATA.NUM_FRAMES 16"),
}


@pytest.mark.parametrize("name", THEIR_CONFIGS)
def test_its_own_configurations_train_and_test(tmp_path, corpus, name):
    output = train(tmp_path, corpus, ROOT / "configs" / "Kinetics" / f"{name}.yaml", *THEIR_CONFIGS[name])
    (epoch,) = json_stats(output, "train_epoch", "json_stats.log")
    assert epoch["loss"] > 0
    assert len(json_stats(output, "val_epoch", "json_stats.log")) == 1
    assert '"split": "test_final"' in (output / "stdout.log").read_text()
    assert checkpoint(output).is_file()


def test_without_a_patch_its_symptom_is_back(tmp_path, corpus):
    config = ROOT / "configs" / "Kinetics" / "SLOW_4x16_R50.yaml"
    done = start(tmp_path, ["--without", "vision", "demo", "--cfg", config])
    assert done.returncode != 0
    assert "No module named 'vision'" in done.stdout + done.stderr


def test_a_video_that_cannot_be_read_is_named_with_the_reason(tmp_path, corpus):
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"this is no video")
    lists = tmp_path / "lists"
    lists.mkdir()
    text = (corpus / "lists" / "train.csv").read_text()
    (lists / "train.csv").write_text(f"{broken} 0\n{text}")
    for split in ("val", "test"):
        (lists / f"{split}.csv").write_text((corpus / "lists" / f"{split}.csv").read_text())
    config = ROOT / "configs" / "Kinetics" / "X3D_XS.yaml"
    output = train(
        tmp_path, corpus, config, "DATA.PATH_TO_DATA_DIR", lists, "TRAIN.BATCH_SIZE", "5", "TEST.ENABLE", "False"
    )
    assert f"{broken}: cannot be opened" in (output / "stdout.log").read_text()


# ---------------------------------------------------------------------------------------------- teachers and terms


def program(name, script="slowfast_programs.py", **arguments):
    """A function of ``slowfast_programs`` (or of another such file) in a process of its own."""
    script = Path(__file__).with_name(script)
    given = {**os.environ, "PYTHONPATH": f"{PACKAGE}{os.pathsep}{script.parent}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", script, name, json.dumps(arguments)], env=given, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def written(path, settings):
    path.write_text(yaml.safe_dump(settings))
    return path


@pytest.fixture(scope="module")
def image_teacher(tmp_path_factory):
    return write_teacher(tmp_path_factory.mktemp("teacher") / "teacher.pyth")


@pytest.fixture(scope="module")
def flow_teacher(tmp_path_factory):
    path = tmp_path_factory.mktemp("flow_teacher") / "teacher.pyth"
    clip = InputSpec(num_frames=4, modality="flow", mean=(0.5, 0.5), std=(0.5, 0.5))
    network = build_network("S3DG", num_classes=2, input=clip, width=8)
    with torch.no_grad():  # at their start all classes are equally likely
        logits = network.eval()({"flow": torch.rand(8, 2, 4, 32, 32)}).logits
        network.fc.weight *= 3 / (logits[:, 0] - logits[:, 1]).std()
    torch.save(network.bare_state_dict(), path)
    return path


def distinit_settings(corpus, output, image_teacher, **sections):
    teachers = {
        "LIGHT": brightness_teacher(image_teacher),
        "GATED": brightness_teacher(image_teacher, MAX_ENTROPY=0.5, LOSS_WEIGHT=0.5, FRAME_PICK="random"),
    }
    return small_settings(corpus, output, **merged({"DISTILL": {"TEACHERS": teachers}}, sections))


def d3d_settings(corpus, output, flow_teacher, **sections):
    entry = {
        "ARCH": "S3DG",
        "WEIGHTS": str(flow_teacher),
        "NUM_CLASSES": 2,
        "NETWORK": {"MODALITY": "flow", "WIDTH": 8},
        "HEAD": "own",
        "LOSS": "mse",
        "LOSS_WEIGHT": 0.5,
        "FRAME_PICK": "clip",
        "CROP_SIZE": 32,
        "MEAN": [0.5, 0.5],
        "STD": [0.5, 0.5],
    }
    base = {"MODEL": {"MODEL_NAME": "S3DG"}, "RESNET": {"DEPTH": 18}, "DISTILL": {"TEACHERS": {"FLOW": entry}}}
    return small_settings(corpus, output, **merged(merged(base, labelled(corpus)), sections))


@pytest.mark.parametrize("method", ["distinit", "d3d", "stages"])
def test_a_step_is_the_same_in_both_programs(tmp_path, corpus, image_teacher, flow_teacher, method):
    make = {
        "distinit": (distinit_settings, image_teacher),
        "d3d": (d3d_settings, flow_teacher),
        "stages": (on_stages, image_teacher),
    }
    settings, teacher = make[method]
    config = written(tmp_path / "job.yaml", settings(corpus, tmp_path / "run", teacher))
    result = program("compare_steps", config=str(config), clips=[0, 1, 3], start=str(tmp_path / "start.pyth"))
    ours, theirs = result["loss"]
    assert ours > 0.1
    assert min(result["terms"][0]) > 0.01
    assert result["norm"] > 0.01
    assert theirs == pytest.approx(ours, abs=1e-4)
    assert result["terms"][1] == pytest.approx(result["terms"][0], abs=1e-4)
    assert len(result["terms"][0]) == 2
    assert result["gradient"] < 1e-3
    # PySlowFast's top1_err: how often the student disagrees with the teacher, where there are no labels.
    assert method == "d3d" or result["labels"] == result["best"]


def run_there(folder, settings, *words):
    """``distinit slowfast`` on these settings; returns OUTPUT_DIR."""
    config = written(folder / "job.yaml", settings)
    done = start(folder, ["--cfg", config, *words])
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return Path(settings["OUTPUT_DIR"])


def on_slow(corpus, output, image_teacher, **sections):
    """DistInit on PySlowFast's own ResNet, from one of its files (with precise BN)."""
    base = {
        "_BASE_": str(ROOT / "configs" / "Kinetics" / "SLOW_4x16_R50.yaml"),
        "RESNET": {"DEPTH": 50, "WIDTH_PER_GROUP": 8},
        "NETWORK": {"WIDTH": 64},
        "NUM_GPUS": 0,
        "SOLVER": {"MAX_EPOCH": 1, "BASE_LR": 0.01, "WARMUP_EPOCHS": 0.0},
        "TEST": {"NUM_SPATIAL_CROPS": 1, "BATCH_SIZE": 4},
        "LOG_MODEL_INFO": False,
    }
    return distinit_settings(corpus, output, image_teacher, **merged(base, sections))


def on_stages(corpus, output, image_teacher):
    """The same with one of the two terms on maps of its network."""
    maps = {"LAYER": "feature_map", "STUDENT_LAYER": "s4", "LOSS": "mse"}
    sections = {"MODEL": {"DROPOUT_RATE": 0.0}, "DISTILL": {"TEACHERS": {"LIGHT": maps}}}
    return on_slow(corpus, output, image_teacher, **sections)


def test_distinit_on_its_own_network(tmp_path, corpus, image_teacher):
    """Two epochs at once and one after the other; what is saved is the bare student, which its own run_net tests."""
    whole = run_there(tmp_path, on_slow(corpus, tmp_path / "whole", image_teacher, SOLVER={"MAX_EPOCH": 2}))
    _, last = json_stats(whole, "train_epoch", "json_stats.log")
    assert {"loss", "loss_0", "loss_1"} <= last.keys()
    assert last["loss"] == pytest.approx(0.5 * last["loss_0"] + last["loss_1"], abs=1e-3)  # GATED × 0.5 + LIGHT
    text = (whole / "stdout.log").read_text()
    assert "no validation" in text
    state = state_of(whole, 2)
    assert not [key for key in state["model_state"] if "heads" in key]
    assert {key.split(".")[0] for key in state["distinit"]["adapters"]} == {"GATED", "LIGHT"}
    (group,) = state["distinit"]["optimizer"]["param_groups"]
    assert len(group["params"]) == len(state["distinit"]["optimizer"]["state"]) == 4
    assert not [key for group in state["optimizer_state"]["param_groups"] for key in group if key == "distinit"]

    parts = on_slow(corpus, tmp_path / "parts", image_teacher, SOLVER={"MAX_EPOCH": 1})
    run_there(tmp_path, parts)
    run_there(tmp_path, parts, "SOLVER.MAX_EPOCH", "2")
    text = (tmp_path / "parts" / "stdout.log").read_text()
    assert "Load from last checkpoint" in text
    adapters = state_of(tmp_path / "parts", 2)["distinit"]["adapters"]
    assert adapters.keys() == state["distinit"]["adapters"].keys()


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory, corpus, image_teacher):
    """``plain.yaml`` and ``run`` of DistInit on PySlowFast's own network."""
    folder = tmp_path_factory.mktemp("pretrained")
    run_there(folder, on_slow(corpus, folder / "run", image_teacher))
    plain = folder / "plain.yaml"
    assert cli.main(["config", "--plain", "--output", str(plain), "--cfg", str(folder / "job.yaml")]) == 0
    return folder


def scores_of(output):
    """Sums of probabilities over views and places ``(videos, classes)``, and labels ``(videos)``."""
    with open(output / "scores.pkl", "rb") as file:
        return pickle.load(file)


@pytest.mark.parametrize("ranks", [1, 2])
def test_its_own_program_fine_tunes_the_student(tmp_path, corpus, pretrained, ranks):
    """The student goes into PySlowFast without terms: no keys are missing, none are left over.

    Fine-tuned, validated and tested on several views; its scores are those that one process gives.
    """
    words = ["--cfg", pretrained / "plain.yaml", "DATA.PATH_TO_DATA_DIR", corpus / "lists", "TEST.ENABLE", "True"]
    words += ["TEST.NUM_ENSEMBLE_VIEWS", "3", "TEST.NUM_SPATIAL_CROPS", "3", "TEST.SAVE_RESULTS_PATH", "scores.pkl"]
    given = ["TRAIN.CHECKPOINT_FILE_PATH", checkpoint(pretrained / "run"), "RUNNER.CPU_RANKS", str(ranks)]
    output = tmp_path / "tuned"
    done = start(tmp_path, [*words, *given, "OUTPUT_DIR", output])
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert done.stdout.count("missing keys: []") == done.stdout.count("unexpected keys: []") == 2
    assert json_stats(output, "val_epoch", "json_stats.log")
    assert '"split": "test_final"' in (output / "stdout.log").read_text()
    if ranks == 1:
        return
    given = ["TRAIN.ENABLE", "False", "TEST.CHECKPOINT_FILE_PATH", checkpoint(output)]
    alone = tmp_path / "alone"
    done = start(tmp_path, [*words, *given, "OUTPUT_DIR", alone])
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (ours, labels), (theirs, their_labels) = scores_of(output), scores_of(alone)
    assert labels.tolist() == their_labels.tolist()
    assert (ours - theirs).abs().max() < 1e-4
    assert theirs.sum(1).tolist() == pytest.approx([9.0] * len(theirs), abs=1e-4)  # 3 clips × 3 crops
    assert (theirs - theirs.mean(0)).abs().max() > 1e-3  # they say something


@pytest.mark.parametrize("ranks", [1, 2])
def test_d3d_trains_validates_and_tests_there(tmp_path, corpus, flow_teacher, ranks):
    sections = {"TEST": {"ENABLE": True, "NUM_ENSEMBLE_VIEWS": 2}, "RUNNER": {"CPU_RANKS": ranks}}
    corpora = labelled(corpus, TRAIN="train", VAL="test", TEST="test")
    output = run_there(tmp_path, d3d_settings(corpus, tmp_path / "run", flow_teacher, **merged(corpora, sections)))
    (epoch,) = json_stats(output, "train_epoch", "json_stats.log")
    assert epoch["loss"] == pytest.approx(epoch["loss_0"] + 0.5 * epoch["loss_1"], abs=1e-3)  # action + FLOW × 0.5
    assert epoch["loss_1"] > 0.01
    assert len(json_stats(output, "val_epoch", "json_stats.log")) == 1
    assert '"split": "test_final"' in (output / "stdout.log").read_text()
    network = build_network("S3DG", num_classes=2, input=InputSpec(), width=8)
    assert state_of(output)["model_state"].keys() == network.bare_state_dict().keys()


def test_networks_of_this_package_train_and_test_there(tmp_path, corpus):
    settings = small_settings(
        corpus,
        tmp_path / "run",
        **merged(labelled(corpus, TRAIN="train", VAL="test", TEST="test"), {"TEST": {"ENABLE": True}}),
    )
    output = run_there(tmp_path, settings)
    (epoch,) = json_stats(output, "train_epoch", "json_stats.log")
    assert epoch["loss"] == pytest.approx(epoch["loss_0"], abs=1e-4)
    assert len(json_stats(output, "val_epoch", "json_stats.log")) == 1
    assert '"split": "test_final"' in (output / "stdout.log").read_text()
    network = build_network("R2Plus1D", num_classes=2, input=InputSpec(), depth=10, width=8)
    assert state_of(output)["model_state"].keys() == network.bare_state_dict().keys()


def test_two_processes_train_as_one(tmp_path, corpus, image_teacher):
    settings = on_slow(corpus, tmp_path / "two", image_teacher, RUNNER={"CPU_RANKS": 2})
    output = run_there(tmp_path, settings)
    (epoch,) = json_stats(output, "train_epoch", "json_stats.log")
    assert epoch["loss"] == pytest.approx(0.5 * epoch["loss_0"] + epoch["loss_1"], abs=1e-3)
    assert "distinit" in state_of(output)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["DISTILL.GATE", "skip"], "DISTILL.GATE: skip is not possible in PySlowFast"),
        (["AUG.NUM_SAMPLE", "2"], "AUG.ENABLE: AUG and several crops"),
        (["TRAIN.DATASET", "ssv2"], "TRAIN.DATASET: ssv2 is a dataset of PySlowFast"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_built(tmp_path, corpus, image_teacher, words, sentence):
    config = written(tmp_path / "job.yaml", on_slow(corpus, tmp_path / "run", image_teacher))
    done = start(tmp_path, ["--cfg", config, *words])
    assert done.returncode == cli.EXIT_USER_ERROR
    assert sentence in done.stderr


@pytest.mark.parametrize("ranks", [1, 2])
def test_two_lines_in_its_custom_config_do_the_same(tmp_path, corpus, image_teacher, ranks):
    """A tree of one's own whose ``custom_config.py`` makes it ready, started by its own ``tools/run_net.py``."""
    tree = tmp_path / "SlowFast"
    for name in ("slowfast", "tools", "ava_evaluation"):
        shutil.copytree(ROOT / name, tree / name)
    custom = tree / "slowfast" / "config" / "custom_config.py"
    custom.write_text(
        "def add_custom_config(_C):\n    from distinit_plugin.hosts.slowfast.boot import boot\n    boot()\n"
    )
    settings = on_slow(corpus, tmp_path / "run", image_teacher, RUNNER={"CPU_RANKS": ranks})
    config = written(tmp_path / "job.yaml", settings)
    given = {**os.environ, "PYTHONPATH": f"{PACKAGE}{os.pathsep}{tree}", "OMP_NUM_THREADS": "1"}
    del given["PYSLOWFAST_ROOT"]
    program = [sys.executable, "-W", "ignore", tree / "tools" / "run_net.py", "--cfg", config]
    done = subprocess.run(program, cwd=tmp_path, env=given, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "adapters" in state_of(tmp_path / "run")["distinit"]
