"""Every YAML file that is shipped."""

import re
from pathlib import Path

import pytest

from distinit_plugin.config.load import load_cfg, parse_cfg, shipped_configs
from distinit_plugin.config.yaml_files import read_yaml

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted(path for folder in ("configs", "projects") for path in (ROOT / folder).rglob("*.yaml"))
LEAVES = [path for path in FILES if "_base_" not in path.parts]
DISTINIT = [path for path in LEAVES if path.parent.name == "DistInit"]
MAX_LEAF_LINES = 15


def name_of(path):
    return path.relative_to(ROOT).as_posix()


def test_there_are_files():
    assert len(LEAVES) >= 30
    assert len(DISTINIT) >= 30
    assert set(shipped_configs()) == {name_of(path) for path in LEAVES if path.is_relative_to(ROOT / "configs")}


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_loads_validates_and_round_trips(path):
    is_base = "_base_" in path.parts
    cfg, warnings = load_cfg(path, check=not is_base)
    assert warnings == []
    again, _ = parse_cfg(cfg.dump(), "dump", check=False)
    assert again == cfg


@pytest.mark.parametrize("path", LEAVES, ids=name_of)
def test_leaves_are_short_and_inherit(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MAX_LEAF_LINES
    if path.is_relative_to(ROOT / "configs"):
        assert "_BASE_" in read_yaml(path)


def test_readme_lists_exactly_these_files():
    text = (ROOT / "configs" / "README.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| `(configs/[^`]+\.yaml)` \|", text, flags=re.MULTILINE)
    assert len(listed) == len(set(listed))
    assert set(listed) == {name_of(path) for path in FILES if path.is_relative_to(ROOT / "configs")}


def test_every_base_is_used():
    bases = {path.resolve() for path in FILES if "_base_" in path.parts}
    used = {(path.parent / read_yaml(path)["_BASE_"]).resolve() for path in FILES if "_BASE_" in read_yaml(path)}
    assert bases <= used


def test_results_table_names_every_distinit_file_and_no_other():
    text = (ROOT / "projects" / "distinit" / "README.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`((?:table|figure|teacher)\d*_[\w.]+)`", text))
    assert named == {path.stem for path in DISTINIT}


@pytest.mark.parametrize("path", DISTINIT, ids=lambda path: path.stem)
def test_distinit_files_fit_together(path):
    cfg, _ = load_cfg(path)
    assert f"./runs/DistInit/{path.stem}" == cfg.OUTPUT_DIR
    if path.stem.endswith("_finetune"):
        match = re.fullmatch(
            r"\./runs/DistInit/(.+_pretrain)/checkpoints/checkpoint_epoch_(\d{5})\.pyth", cfg.TRAIN.CHECKPOINT_FILE_PATH
        )
        assert match
        before, _ = load_cfg(path.with_name(f"{match[1]}.yaml"))
        assert int(match[2]) == before.SOLVER.MAX_EPOCH
        assert before.MODEL.MODEL_NAME == cfg.MODEL.MODEL_NAME
        assert before.DATA.NUM_FRAMES == cfg.DATA.NUM_FRAMES
    else:
        assert cfg.TRAIN.CHECKPOINT_FILE_PATH == ""


def recipe(name):
    return load_cfg(f"configs/DistInit/{name}.yaml")[0]


def test_pretraining_recipe():
    cfg = recipe("table1_r2plus1d18_distinit_pretrain")
    solver, teacher = cfg.SOLVER, cfg.DISTILL.TEACHERS.IMAGENET
    assert (solver.BASE_LR, solver.WEIGHT_DECAY, solver.MAX_EPOCH) == (0.01, 1e-4, 45)
    assert solver.STEPS == [0, 10, 20, 30, 40]
    assert pytest.approx([10.0**-stage for stage in range(5)]) == solver.LRS
    assert (cfg.RUNNER.CLIPS_PER_EPOCH, cfg.TRAIN.BATCH_SIZE * cfg.NUM_SHARDS) == (1_000_000, 16 * 4 * 24)
    assert cfg.TRAIN.BATCH_SIZE // cfg.NUM_GPUS // cfg.RUNNER.ACCUMULATE == 24
    assert (cfg.DATA.NUM_FRAMES, cfg.DATA.TRAIN_CROP_SIZE) == (8, 112)
    assert (teacher.FRAME_PICK, teacher.TEMPERATURE, teacher.MAX_ENTROPY) == ("center", 1.0, -1.0)
    assert teacher.WEIGHTS == "IMAGENET1K_V1"
    assert not any(entry.LABELED for entry in cfg.CORPUS.TRAIN.values())
    assert cfg.ACTION.LOSS_WEIGHT == 0


def test_finetuning_and_scratch_recipes():
    cfg = recipe("table1_r2plus1d18_distinit_finetune")
    solver = cfg.SOLVER
    assert (solver.BASE_LR, solver.WEIGHT_DECAY, solver.MAX_EPOCH) == (0.002, 5e-3, 8)
    assert solver.STEPS == [0, 2, 4, 6]
    assert pytest.approx([1, 0.1, 0.01, 0.001]) == solver.LRS
    assert cfg.RUNNER.CLIPS_PER_EPOCH == 40_000
    assert (cfg.TEST.NUM_ENSEMBLE_VIEWS, cfg.TEST.NUM_SPATIAL_CROPS, cfg.CORPUS.TEST_CLIPS) == (10, 1, "uniform")
    assert cfg.CORPUS.TEST.HMDB51.SUBSET == "test"
    assert not cfg.DISTILL.TEACHERS
    scratch = recipe("table1_res3d18_scratch")
    assert (scratch.SOLVER.BASE_LR, scratch.SOLVER.MAX_EPOCH, scratch.MODEL.MODEL_NAME) == (0.01, 45, "Res3D")


def test_rows_differ_as_the_tables_say():
    reference = recipe("table1_r2plus1d18_distinit_pretrain")
    mse = recipe("table3_mse_pretrain")
    assert pytest.approx(reference.SOLVER.BASE_LR / 10) == mse.SOLVER.BASE_LR
    assert mse.DISTILL.TEACHERS.IMAGENET.LOSS == "mse"
    two = recipe("table2_two_random_pretrain").DISTILL.TEACHERS.IMAGENET
    assert (two.FRAME_PICK, two.NUM_PICKED_FRAMES) == ("random", 2)
    assert set(recipe("table4_sports1m_pretrain").CORPUS.TRAIN) == {"SPORTS1M"}
    assert set(recipe("table4_kinetics_sports1m_pretrain").CORPUS.TRAIN) == {"KINETICS", "SPORTS1M"}
    assert set(recipe("teacher_places_pretrain").DISTILL.TEACHERS) == {"PLACES"}
    assert set(recipe("teacher_imagenet_places_pretrain").DISTILL.TEACHERS) == {"IMAGENET", "PLACES"}
    assert recipe("figure6_entropy_2.7_pretrain").DISTILL.TEACHERS.IMAGENET.MAX_ENTROPY == 2.7
    supervised = recipe("table1_r2plus1d18_kinetics_pretrain")
    assert (supervised.ACTION.LOSS_WEIGHT, supervised.MODEL.NUM_CLASSES) == (1.0, 400)
    assert not supervised.DISTILL.TEACHERS
    for corpus, classes in (("hmdb51", 51), ("ucf101", 101)):
        cfg = recipe(f"table6_{corpus}_32f_finetune")
        assert (32, "dense", classes) == (cfg.DATA.NUM_FRAMES, cfg.CORPUS.TEST_CLIPS, cfg.MODEL.NUM_CLASSES)
    for place in ("imagenet", "places"):
        assert recipe(f"table1_res3d18_{place}_inflated").INIT.INFLATE_FROM == "torchvision/resnet18"
