"""PySlowFast's own run_net with everything of this package in it: runs only where PYSLOWFAST_ROOT names a checkout."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from small_jobs import CLASSES, checkpoint, json_stats, write_corpus

ROOT = Path(os.environ.get("PYSLOWFAST_ROOT") or ".")
PACKAGE = Path(__file__).resolve().parents[1]

pytestmark = pytest.mark.skipif(not os.environ.get("PYSLOWFAST_ROOT"), reason="PYSLOWFAST_ROOT is not set")


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
    "pytorchvideo/R2PLUS1D_16x4_R50": words_of(
        "DATA.NUM_FRAMES 16 DATA.TRAIN_CROP_SIZE 224 DATA.TEST_CROP_SIZE 224 DATA.TRAIN_JITTER_SCALES [224,240]"
    ),
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
    output = train(tmp_path, corpus, config, "DATA.PATH_TO_DATA_DIR", lists, "TRAIN.BATCH_SIZE", "5", "TEST.ENABLE", "False")
    assert f"{broken}: cannot be opened" in (output / "stdout.log").read_text()
