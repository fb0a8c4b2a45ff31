"""DistInit through the runner on real videos of many codecs, with a real ImageNet teacher."""

import csv

import pytest

from distinit_plugin.config.load import load_cfg
from distinit_plugin.jobs.running import run


@pytest.fixture(scope="module")
def index_cache(tmp_path_factory):
    return tmp_path_factory.mktemp("index")


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_distinit_runs_on_real_videos_with_any_number_of_workers(assets, tmp_path, index_cache, workers):
    teacher = "DISTILL.TEACHERS.IMAGENET"
    options = {
        "OUTPUT_DIR": tmp_path / "run",
        "CORPUS.TRAIN": None,
        "CORPUS.TRAIN.REAL.PATH": assets / "videos",
        "CORPUS.INDEX_CACHE": index_cache,
        "CORPUS.MAX_BAD_FRACTION": 0.1,
        f"{teacher}.ARCH": "torchvision/squeezenet1_0",
        f"{teacher}.WEIGHTS": assets / "teacher" / "squeezenet1_0_imagenet.pth",
        f"{teacher}.CROP_SIZE": 96,
        "RESNET.DEPTH": 10,
        "NETWORK.WIDTH": 8,
        "DATA.TRAIN_CROP_SIZE": 48,
        "DATA.TRAIN_JITTER_SCALES": [56, 64],
        "NUM_GPUS": 0,
        "TRAIN.BATCH_SIZE": 8,
        "RUNNER.ACCUMULATE": 1,
        "RUNNER.CLIPS_PER_EPOCH": 64,
        "SOLVER.MAX_EPOCH": 1,
        "SOLVER.STEPS": [0],
        "SOLVER.LRS": [1.0],
        "DATA_LOADER.NUM_WORKERS": workers,
    }
    base = "configs/DistInit/table1_r2plus1d18_distinit_pretrain.yaml"
    cfg, _ = load_cfg(base, [word for pair in options.items() for word in pair])
    result = run(cfg)
    assert result.training is not None
    assert result.training.steps == 8
    # An untrained student is at ln 1000 = 6.9 nats; the teacher's own entropy bounds it from below.
    assert 1.0 < result.training.train["loss/IMAGENET"] < 7.5
    # 64 draws from 47 files: every file comes at least once, and one of them is broken (from its 28th frame on).
    with open(tmp_path / "run" / "bad_videos.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["path"].rsplit("/", 1)[-1] for row in rows] == ["corrupted.mp4"]
    assert rows[0]["reason"]
