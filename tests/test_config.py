"""Reading, merging and checking configurations."""

import copy
import importlib
import inspect
import math
import os
import pickle

import pytest
import yaml

from distinit_plugin.config import rules
from distinit_plugin.config.defaults import CORPUS_ENTRY, TEACHER_ENTRY, get_cfg
from distinit_plugin.config.load import load_cfg, parse_cfg, resolve_config, shipped_configs
from distinit_plugin.config.node import CfgNode, leaf_keys
from distinit_plugin.config.pyslowfast_keys import PYSLOWFAST_DEFAULTS
from distinit_plugin.config.rules import CORPUS_RULES, RULES, TEACHER_RULES
from distinit_plugin.config.validate import validate
from distinit_plugin.errors import ConfigError
from distinit_plugin.registry import CORPORA, FRAME_PICKERS, LOSSES, MODELS

# A job that is right in every way: each test of a bad override starts from it.
GOOD = [
    *("DISTILL.TEACHERS.IMAGENET.ARCH", "torchvision/resnet50", "DISTILL.TEACHERS.IMAGENET.NUM_CLASSES", "1000"),
    *("CORPUS.TRAIN.VIDEOS.PATH", "videos", "TEST.ENABLE", "False"),
]
LABELLED = [
    *("ACTION.LOSS_WEIGHT", "1", "CORPUS.TRAIN.VIDEOS.LABELED", "True"),
    *("TEST.ENABLE", "True", "CORPUS.TEST.VIDEOS.PATH", "videos", "CORPUS.TEST.VIDEOS.LABELED", "True"),
]
TEACHER = "DISTILL.TEACHERS.IMAGENET"


def write(folder, name, text):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def problems(opts, paths=()):
    with pytest.raises(ConfigError) as caught:
        load_cfg(list(paths), opts)
    return caught.value.problems


def test_the_good_configurations_are_good():
    cfg, warnings = load_cfg([], GOOD)
    assert cfg.is_frozen()
    assert warnings == []
    assert set(cfg.DISTILL.TEACHERS.IMAGENET) == set(TEACHER_ENTRY)
    load_cfg([], GOOD + LABELLED)


# ---------------------------------------------------------------------------------------------------------- merging
@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("SOLVER.BASE_LR", "1", 1.0),
        ("SOLVER.WEIGHT_DECAY", "1e-4", 1e-4),
        ("SOLVER.WEIGHT_DECAY", "5E-3", 5e-3),
        ("RUNNER.CLIPS_PER_EPOCH", "1e6", 1_000_000),
        ("RNG_SEED", "010", 10),
        ("SOLVER.LRS", "[1, 1e-1]", [1.0, 0.1]),
        ("SOLVER.BETAS", "!!python/tuple [1, 1]", None),
        ("RUNNER.CHANNELS_LAST", "off", "off"),
        ("TRAIN.AUTO_RESUME", "off", False),
        ("TRAIN.AUTO_RESUME", "true", True),
        ("OUTPUT_DIR", "1:30", "1:30"),
        ("DATA.PATH_PREFIX", "", ""),
        ("OUTPUT_DIR", "2019-01-01", "2019-01-01"),
    ],
)
def test_scalars_of_a_yaml_file(tmp_path, key, text, value):
    node, _, leaf = key.rpartition(".")
    line = f"{leaf}: {text}" if not node else f"{node}: {{{leaf}: {text}}}"
    path = write(tmp_path, "a.yaml", line + "\n")
    if value is None:  # an unsafe tag
        with pytest.raises(ConfigError, match="could not determine a constructor"):
            load_cfg(path, check=False)
        return
    cfg, _ = load_cfg(path, check=False)
    for part in key.split("."):
        cfg = cfg[part]
    assert cfg == value
    assert type(cfg) is type(value)


@pytest.mark.parametrize(
    ("key", "word", "value"),
    [
        ("SOLVER.BASE_LR", "1", 1.0),
        ("SOLVER.BASE_LR", 1, 1.0),
        ("SOLVER.WEIGHT_DECAY", "1e-4", 1e-4),
        ("SOLVER.STEPS", "(0,10)", [0, 10]),
        ("SOLVER.STEPS", "[0, 1e1]", [0, 10]),
        ("SOLVER.LRS", (1, 0.1), [1.0, 0.1]),
        ("TRAIN.ENABLE", "false", False),
        ("OUTPUT_DIR", "123", "123"),
        ("OUTPUT_DIR", "'a b'", "a b"),
        ("OUTPUT_DIR", "None", "None"),
    ],
)
def test_words_of_a_command_line(key, word, value):
    cfg, _ = load_cfg([], [key, word], check=False)
    for part in key.split("."):
        cfg = cfg[part]
    assert cfg == value
    assert type(cfg) is type(value)


def test_tuple_of_python_becomes_a_list():
    cfg = get_cfg()
    cfg.merge_from_other_cfg({"SOLVER": {"BETAS": (0, 1e-1)}})
    assert cfg.SOLVER.BETAS == [0.0, 0.1]


def test_unknown_key_names_key_file_and_near_match(tmp_path):
    path = write(tmp_path, "mine.yaml", "SOLVER:\n  BASE_LRR: 1\n")
    (problem,) = problems(GOOD, [path])
    assert "SOLVER.BASE_LRR" in problem
    assert str(path) in problem
    assert "Did you mean BASE_LR?" in problem


def test_unknown_key_of_a_base_names_the_base(tmp_path):
    base = write(tmp_path, "base.yaml", "FOO: 1\n")
    leaf = write(tmp_path, "sub/leaf.yaml", "_BASE_: ../base.yaml\n")
    (problem,) = problems(GOOD, [leaf])
    assert problem.startswith("FOO (in ")
    assert os.path.samefile(problem.split("(in ")[1].split(")")[0], base)


def test_key_in_the_wrong_node_is_pointed_to():
    (problem,) = problems([*GOOD, "BATCH_SIZE", "3"])
    assert "Did you mean TRAIN.BATCH_SIZE or TEST.BATCH_SIZE?" in problem


def test_all_merge_problems_at_once(tmp_path):
    path = write(tmp_path, "a.yaml", "SOLVER: {BASE_LR: fast, STEPS: 3}\nTRAINS: {}\nTEST: 4\nOUTPUT_DIR: 5\n")
    found = problems(["NUM_GPUS", "many", "TRAIN.ENABLE", "perhaps", "DATA.MEAN", "[a]"], [path])
    starts = [problem.split(" ")[0] for problem in found]
    assert starts == [
        *("SOLVER.BASE_LR", "SOLVER.STEPS", "TRAINS", "TEST", "OUTPUT_DIR", "NUM_GPUS", "TRAIN.ENABLE", "DATA.MEAN")
    ]
    assert "put it in quotes" in found[4]


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (["SOLVER.BASE_LR"], "'SOLVER.BASE_LR' is left over"),
        (["SOLVER.BASE_LR=1"], "Write SOLVER.BASE_LR 1"),
        (["SOLVER", "1"], "node with keys of its own"),
        (["SOLVER.BASE_LR.X", "1"], "is not a number"),
        (["RNG_SEED", "1.5"], "not a whole number"),
        (["RNG_SEED", "True"], "not a whole number"),
        (["RNG_SEED", "null"], "not a whole number"),
        (["_BASE_", "a.yaml"], "no such key"),
        ([f"{TEACHER}.ARCHH", "x"], "Did you mean ARCH"),
        (["DISTILL.TEACHERS.2X.ARCH", "x"], "is no name"),
        (["DISTILL.TEACHERS.X", "3"], "node with keys"),
        (["DISTILL.TEACHERS.X", "{"], "cannot be read as YAML"),
        (["CORPUS.TRAIN.X.WEIGHT", "2"], "give CORPUS.TRAIN.X.PATH as well"),
    ],
)
def test_bad_words(words, match):
    with pytest.raises(ConfigError, match=match):
        load_cfg([], words)


# ------------------------------------------------------------------------------------------------------ named entries
def test_a_default_of_a_named_entry_is_reached_from_the_command_line(tmp_path):
    path = write(tmp_path, "a.yaml", "DISTILL: {TEACHERS: {PLACES: {ARCH: torchvision/resnet50}}}\n")
    cfg, _ = load_cfg(path, ["DISTILL.TEACHERS.PLACES.LOSS_WEIGHT", "0.5"], check=False)
    assert cfg.DISTILL.TEACHERS.PLACES.LOSS_WEIGHT == 0.5
    assert TEACHER_ENTRY.LOSS_WEIGHT == 1.0
    assert get_cfg().DISTILL.TEACHERS == {}


def test_a_new_entry_from_the_command_line_in_any_order():
    cfg, _ = load_cfg([], ["CORPUS.VAL.A.WEIGHT", "2", "CORPUS.VAL.A.PATH", "x"], check=False)
    assert {**CORPUS_ENTRY, "PATH": "x", "WEIGHT": 2.0} == cfg.CORPUS.VAL.A
    cfg, _ = load_cfg([], ["DISTILL.TEACHERS.A", "{ARCH: torchvision/resnet18, LOSS_WEIGHT: 2}"], check=False)
    assert cfg.DISTILL.TEACHERS.A.LOSS_WEIGHT == 2.0


def test_a_mistyped_entry_is_no_new_entry():
    (problem,) = problems([*GOOD, "DISTILL.TEACHERS.IMAGNET.LOSS_WEIGHT", "0.5"])
    assert "there is no 'IMAGNET'" in problem
    assert "Did you mean IMAGENET?" in problem
    assert "DISTILL.TEACHERS.IMAGNET.ARCH" in problem


@pytest.mark.parametrize("nothing", ["null", "{}", "~", ""])
def test_removing_inherited_entries(tmp_path, nothing):
    write(tmp_path, "base.yaml", "DISTILL: {TEACHERS: {A: {ARCH: torchvision/a}, B: {ARCH: torchvision/b}}}\n")
    one = write(tmp_path, "one.yaml", f"_BASE_: base.yaml\nDISTILL:\n  TEACHERS:\n    A: {nothing}\n")
    every = write(tmp_path, "every.yaml", f"_BASE_: base.yaml\nDISTILL:\n  TEACHERS: {nothing}\n")
    assert list(load_cfg(one, check=False)[0].DISTILL.TEACHERS) == ["B"]
    assert list(load_cfg(every, check=False)[0].DISTILL.TEACHERS) == []
    again = write(tmp_path, "again.yaml", "_BASE_: one.yaml\nDISTILL: {TEACHERS: {A: {ARCH: torchvision/c}}}\n")
    teachers = load_cfg(again, check=False)[0].DISTILL.TEACHERS
    assert teachers.A.ARCH == "torchvision/c"
    assert list(load_cfg(one, ["DISTILL.TEACHERS.B", "null"], check=False)[0].DISTILL.TEACHERS) == []


def test_removing_what_is_not_there():
    (problem,) = problems([*GOOD, "DISTILL.TEACHERS.IMAGNET", "null"])
    assert "nothing of this name to remove" in problem
    assert "Did you mean IMAGENET?" in problem


def test_an_empty_ordinary_node_changes_nothing(tmp_path):
    path = write(tmp_path, "a.yaml", "SOLVER:\n  # BASE_LR: 1\nTRAIN: {}\n")
    assert load_cfg(path, check=False)[0] == get_cfg()


# -------------------------------------------------------------------------------------------------------------- files
def test_base_chain_and_several_files(tmp_path):
    write(tmp_path, "a/base.yaml", "SOLVER: {BASE_LR: 1, MOMENTUM: 0.5}\nRNG_SEED: 1\n")
    write(tmp_path, "middle.yaml", "_BASE_: a/base.yaml\nSOLVER: {BASE_LR: 2}\n")
    leaf = write(tmp_path, "b/leaf.yaml", "_BASE_: ../middle.yaml\nRNG_SEED: 3\n")
    other = write(tmp_path, "other.yaml", "RNG_SEED: 4\n")
    cfg, _ = load_cfg([leaf, other], ["SOLVER.MOMENTUM", "0.25"], check=False)
    assert (cfg.SOLVER.BASE_LR, cfg.SOLVER.MOMENTUM, cfg.RNG_SEED) == (2.0, 0.25, 4)
    assert CfgNode.load_yaml_with_base(str(leaf)) == {"SOLVER": {"BASE_LR": 2, "MOMENTUM": 0.5}, "RNG_SEED": 3}


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("SOLVER: {BASE_LR: 1, BASE_LR: 2}", "BASE_LR is written twice"),
        ("SOLVER: {}\nSOLVER: {}", "line 2, column 1.*SOLVER is written twice"),
        ("a: [", "line 1"),
        ("- 1", "a mapping of KEY: value is expected"),
        ("just words", "a mapping of KEY: value is expected"),
        ("_BASE_: [a.yaml, b.yaml]", "one file name is expected"),
        ("_BASE_: absent.yaml", "absent.yaml, which is not a file"),
        ("_BASE_: it.yaml", "cannot inherit itself"),
        ("x: !!python/object/apply:os.system [true]", "could not determine a constructor"),
        ("SOLVER: &a {BASE_LR: *a}", "is not a number"),
        ("? [1, 2]\n: 3", "unhashable"),
        ("[" * 3000, "read as YAML"),
        ("1: 2", "1 .*no such key"),
    ],
)
def test_bad_files(tmp_path, text, match):
    path = write(tmp_path, "it.yaml", text)
    with pytest.raises(ConfigError, match=f"(?s){match}"):
        load_cfg(path)


def test_files_that_are_no_files(tmp_path):
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="not a text file"):
        load_cfg(tmp_path / "binary.yaml")
    with pytest.raises(ConfigError, match="a folder, not a YAML file"):
        load_cfg(tmp_path)
    with pytest.raises(ConfigError, match="no such file"):
        load_cfg(tmp_path / "absent.yaml")


def test_nothing_is_executed(tmp_path):
    script = write(tmp_path, "evil.py", "raise SystemExit('executed')\ncfg = {}\n")
    with open(script) as file, pytest.raises(ConfigError, match="not executed"):
        CfgNode.load_cfg(file)
    evil = write(tmp_path, "evil.yaml", "x: !!python/object/apply:os.mkdir [never]\n")
    for call in (get_cfg().merge_from_file, CfgNode.load_yaml_with_base):
        with pytest.raises(ConfigError, match="never loaded"):
            call(str(evil), allow_unsafe=True)
        with pytest.raises(ConfigError, match="read as YAML"):
            call(str(evil))


def test_shipped_names_work_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = shipped_configs()[0]
    expected = resolve_config(name)
    assert resolve_config(name.removeprefix("configs/")) == expected
    assert resolve_config(f"./{name}") == expected
    own = write(tmp_path, name, "RNG_SEED: 7\n")
    assert resolve_config(name).resolve() == own  # a file of the user's comes first
    for outside in ("configs/../setup.py", "../pyproject.toml", "configs", ""):
        with pytest.raises(ConfigError):
            resolve_config(outside)


def test_mistyped_shipped_name():
    with pytest.raises(ConfigError, match=r"Did you mean configs/DistInit/table3_mse_pretrain\.yaml"):
        resolve_config("DistInit/table3_mse_pretrian.yaml")


def test_own_file_over_a_shipped_base(tmp_path):
    path = write(tmp_path, "mine.yaml", "_BASE_: configs/DistInit/table3_mse_pretrain.yaml\nRNG_SEED: 5\n")
    cfg, _ = load_cfg(path)
    assert cfg.RNG_SEED == 5
    assert cfg.DISTILL.TEACHERS.IMAGENET.LOSS == "mse"


# ---------------------------------------------------------------------------------------------------------- the node
def test_dump_round_trips():
    cfg, _ = load_cfg([], [*GOOD, *LABELLED, "RUNNER.CHANNELS_LAST", "on", "SOLVER.WEIGHT_DECAY", "1e-5"])
    again, warnings = parse_cfg(cfg.dump(), "a checkpoint")
    assert again == cfg
    assert warnings == []
    assert yaml.safe_load(cfg.dump())["RUNNER"]["CHANNELS_LAST"] == "on"
    with pytest.raises(ConfigError, match="a checkpoint"):
        parse_cfg("SOLVER: {X: 1}", "a checkpoint")


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda cfg: pickle.loads(pickle.dumps(cfg)), CfgNode.clone])
def test_copies_keep_everything(duplicate):
    cfg, _ = load_cfg([], GOOD)
    twin = duplicate(cfg)
    assert twin == cfg
    assert twin.is_frozen()
    twin.defrost()
    twin.merge_from_list(["DISTILL.TEACHERS.NEW.ARCH", "timm/x"])
    assert twin.DISTILL.TEACHERS.NEW.LOSS_WEIGHT == 1.0
    assert "NEW" not in cfg.DISTILL.TEACHERS


def test_frozen_is_frozen():
    cfg, _ = load_cfg([], GOOD)
    with pytest.raises(ConfigError, match="frozen"):
        cfg.merge_from_list(["RNG_SEED", "1"])
    with pytest.raises(AttributeError):
        cfg.RNG_SEED = 1


# ------------------------------------------------------------------------------------------------- PySlowFast's keys
def test_pyslowfast_keys():
    word = ["MVIT.DEPTH", "16", "DATA.DECODING_BACKEND", "torchvision", "SLOWFAST.BETA_INV", "8"]
    _, silent = load_cfg([], GOOD + word)
    assert silent == []
    _, warnings = load_cfg([], [*GOOD, *word, "MVIT.DEPTH", "24", "TENSORBOARD.MODEL_VIS.GRAD_CAM.COLORMAP", "jet"])
    assert len(warnings) == 2
    assert "MVIT.DEPTH is 24" in warnings[0]
    assert "does not honour" in warnings[0]
    assert "16" in warnings[0]
    assert "TENSORBOARD.MODEL_VIS.GRAD_CAM.COLORMAP is 'jet'" in warnings[1]
    (problem,) = problems([*GOOD, "MVIT.DEPHT", "1"])
    assert "MVIT.DEPHT" in problem
    assert "Did you mean DEPTH?" in problem


def test_pyslowfast_yaml_is_read(tmp_path):
    text = """
TRAIN: {ENABLE: True, DATASET: kinetics, BATCH_SIZE: 64, EVAL_PERIOD: 10, CHECKPOINT_TYPE: pytorch}
DATA: {PATH_TO_DATA_DIR: lists, NUM_FRAMES: 16, INPUT_CHANNEL_NUM: [3], TRAIN_JITTER_SCALES: [256, 320]}
RESNET: {ZERO_INIT_FINAL_BN: True, DEPTH: 18}
NONLOCAL: {LOCATION: [[[]], [[]], [[]], [[]]], GROUP: [[1], [1], [1], [1]]}
SOLVER: {BASE_LR: 1e-2, LR_POLICY: cosine, MAX_EPOCH: 196, WARMUP_EPOCHS: 34, CLIP_GRAD_VAL: null}
MODEL: {ARCH: slow, MODEL_NAME: R2Plus1D, LOSS_FUNC: cross_entropy}
MULTIGRID: {LONG_CYCLE_FACTORS: [[0.25, 0.7071067811865476], [0.5, 0.7071067811865476], [0.5, 1], [1, 1]]}
ACTION: {LOSS_WEIGHT: 1}
MVIT:
"""
    cfg, warnings = load_cfg(write(tmp_path, "psf.yaml", text))
    assert cfg.SOLVER.WARMUP_EPOCHS == 34.0
    assert cfg.SOLVER.CLIP_GRAD_VAL == 0.0
    given = [warning.split(" is ")[0] for warning in warnings]
    assert given == ["DATA.INPUT_CHANNEL_NUM", "RESNET.ZERO_INIT_FINAL_BN", "MODEL.ARCH"]


def test_a_base_value_that_the_leaf_takes_back_is_silent(tmp_path):
    write(tmp_path, "base.yaml", "MVIT: {DEPTH: 24}\n")
    leaf = write(tmp_path, "leaf.yaml", "_BASE_: base.yaml\nMVIT: {DEPTH: 16}\n")
    assert load_cfg(leaf, GOOD)[1] == []


def test_our_keys_in_pyslowfast_nodes_are_pyslowfast_keys():
    nodes = {key.split(".")[0] for key in PYSLOWFAST_DEFAULTS if "." in key}
    ours = [key for key in leaf_keys(get_cfg()) if "." not in key or key.split(".")[0] in nodes]
    assert len(ours) > 60
    assert [key for key in ours if key not in PYSLOWFAST_DEFAULTS] == []
    assert len(PYSLOWFAST_DEFAULTS) == 339


# --------------------------------------------------------------------------------------------------------- validation
BAD = [
    # key, value, part of the message, further words
    ("OUTPUT_DIR", "", "any text but the empty one", []),
    ("RNG_SEED", "-1", "a number ≥ 0", []),
    ("NUM_GPUS", "-1", "a number ≥ 0", []),
    ("SHARD_ID", "1", "0 … 0", []),
    ("TRAIN.DATASET", "ava", "kinetics", []),
    ("TRAIN.BATCH_SIZE", "30", "multiple of 4", ["NUM_GPUS", "2", "RUNNER.ACCUMULATE", "2"]),
    ("RUNNER.ACCUMULATE", "0", "a number ≥ 1", []),
    ("TEST.BATCH_SIZE", "7", "multiple of 2", ["NUM_GPUS", "2"]),
    ("TEST.NUM_SPATIAL_CROPS", "2", "1, 3", []),
    ("DATA.PATH_LABEL_SEPARATOR", "", "without a line break", []),
    ("DATA.NUM_FRAMES", "0", "a number ≥ 1", []),
    ("DATA.MEAN", "[0.5]", "exactly 2 or 3 entries", []),
    ("DATA.STD", "[1, 0, 1]", "a number > 0", []),
    ("DATA.TRAIN_JITTER_SCALES", "[160, 128]", "[smallest, largest]", []),
    ("DATA.TRAIN_JITTER_SCALES", "[100, 128]", "smaller than DATA.TRAIN_CROP_SIZE 112", []),
    ("CORPUS.TEST_SCALE", "100", "smaller than DATA.TEST_CROP_SIZE 112", []),
    ("CORPUS.TEST_CLIPS", "tense", "Did you mean dense?", []),
    ("CORPUS.DENSE_STRIDE", "4", "TEST_CLIPS dense", []),
    ("CORPUS.SPLIT", "4", "1, 2, 3", []),
    ("CORPUS.MAX_BAD_FRACTION", "1.5", "≤ 1", []),
    ("MODEL.MODEL_NAME", "R2plus1", "Did you mean R2Plus1D", []),
    ("MODEL.MODEL_NAME", "timm/resnet50", "torchvision/NAME", []),
    ("MODEL.DROPOUT_RATE", "1", "< 1", []),
    ("RESNET.DEPTH", "49", "10, 16, 18, 26, 34, 50, 101, 152", []),
    ("RESNET.DEPTH", "26", "10, 18, 34, 50", ["MODEL.MODEL_NAME", "Res2D"]),
    ("RESNET.DEPTH", "34", "no effect on torchvision/mc3_18", ["MODEL.MODEL_NAME", "torchvision/mc3_18"]),
    ("NETWORK.WIDTH", "8", "no effect on torchvision/mc3_18", ["MODEL.MODEL_NAME", "torchvision/mc3_18"]),
    ("NETWORK.STEM_POOL", "True", "it is for Res3D", []),
    ("NETWORK.PADDING", "valid", "same, symmetric", []),
    ("NETWORK.AFFINE_NORM", "True", "it is for ConvLSTM", []),
    ("FLOW.MISSING", "live", "FLOW.STORE is empty", []),
    ("FLOW.MISSING", "skip", "refuse, live", []),
    ("FLOW.BACKEND", "tvl", "Did you mean tvl1", []),
    ("FLOW.BACKEND", "raft_small", "needs FLOW.WEIGHTS", []),
    ("FLOW.WEIGHTS", "raft.pth", "no meaning for FLOW.BACKEND tvl1", []),
    ("FLOW.BOUND", "0", "a number > 0", []),
    ("FLOW.ROUNDING", "ceil", "round, floor", []),
    ("NETWORK.MODALITY", "flow", "sees frames and flow", ["MODEL.MODEL_NAME", "TwoStream"]),
    ("NETWORK.VARIANT", "caffe", "vmz, torchvision", []),
    ("NETWORK.PADDING", "valid", "same, symmetric", []),
    ("NETWORK.PADDING", "symmetric", "it is for ConvLSTM, Fused3D, I3D, S3DG", []),
    ("NETWORK.STEM_FRAMES", "7", "no effect on I3D; it is for S3DG", ["MODEL.MODEL_NAME", "I3D"]),
    ("NETWORK.STEM_FRAMES", "4", "1, 3, 5, 7", ["MODEL.MODEL_NAME", "S3DG"]),
    ("NETWORK.TEMPORAL_FROM", "Mixed_6a", "Did you mean Mixed_", ["MODEL.MODEL_NAME", "S3DG"]),
    ("NETWORK.GATING_FROM", "3A", "2C, 3B, 3C", ["MODEL.MODEL_NAME", "S3DG"]),
    ("RESNET.DEPTH", "34", "no effect on S3DG", ["MODEL.MODEL_NAME", "S3DG"]),
    (
        "NETWORK.SEPARABLE_STEM",
        "True",
        "nothing to split",
        ["MODEL.MODEL_NAME", "S3DG", "NETWORK.STEM_FRAMES", "1"],
    ),
    (
        "NETWORK.TEMPORAL_NORM",
        "True",
        "no temporal convolutions",
        ["MODEL.MODEL_NAME", "S3DG", "NETWORK.TEMPORAL_FROM", "none"],
    ),
    (
        "BN.NORM_TYPE",
        "sync_batchnorm",
        "NETWORK.AFFINE_NORM True",
        ["MODEL.MODEL_NAME", "I3D", "NUM_GPUS", "1"],
    ),
    ("RUNNER.DETERMINISTIC", "True", "3D max-pools", ["MODEL.MODEL_NAME", "S3DG", "NUM_GPUS", "1"]),
    (
        "RUNNER.DETERMINISTIC",
        "True",
        "3D max-pools",
        ["MODEL.MODEL_NAME", "Res3D", "NETWORK.STEM_POOL", "True", "NUM_GPUS", "1"],
    ),
    ("SOLVER.OPTIMIZING_METHOD", "adam", "Did you mean adamw?", []),
    ("SOLVER.BASE_LR", "0", "a number > 0", []),
    ("SOLVER.BASE_LR", "nan", "a finite number", []),
    ("SOLVER.LRS", "[1, .inf]", "not a list|finite", []),
    ("SOLVER.LR_POLICY", "cosin", "Did you mean cosine?", []),
    ("SOLVER.STEPS", "[1]", "the first one 0", []),
    ("SOLVER.STEPS", "[0, 20, 10]", "ascending", ["SOLVER.LRS", "[1, 1, 1]"]),
    ("SOLVER.LRS", "[1, 0.1]", "one factor per stage", []),
    ("SOLVER.WARMUP_EPOCHS", "45", "leaves nothing of SOLVER.MAX_EPOCH 45", []),
    ("SOLVER.WARMUP_START_LR", "0.1", "is above SOLVER.BASE_LR 0.01", ["SOLVER.WARMUP_EPOCHS", "2"]),
    ("SOLVER.COSINE_END_LR", "0.1", "is above SOLVER.BASE_LR", ["SOLVER.LR_POLICY", "cosine"]),
    ("TRAIN.EVAL_PERIOD", "2", "plateau", ["SOLVER.LR_POLICY", "plateau", "CORPUS.VAL.V.PATH", "v"]),
    ("RUNNER.PLATEAU_FACTOR", "1", "< 1", []),
    ("SOLVER.NESTEROV", "True", "MOMENTUM > 0", ["SOLVER.MOMENTUM", "0"]),
    ("SOLVER.CLIP_GRAD_VAL", "1", "one kind of clipping", ["SOLVER.CLIP_GRAD_L2NORM", "1"]),
    ("BN.WEIGHT_DECAY", "-2", "or -1", []),
    ("RUNNER.SCHEDULE_UNIT", "epochs", "Did you mean epoch?", []),
    ("RUNNER.PRECISION", "fp8", "auto, fp32, bf16, fp16", []),
    ("RUNNER.PRECISION", "fp16", "GPU only", []),
    ("TRAIN.MIXED_PRECISION", "True", "GPU only", []),
    ("TRAIN.MIXED_PRECISION", "True", "RUNNER.PRECISION is bf16", ["NUM_GPUS", "1", "RUNNER.PRECISION", "bf16"]),
    ("RUNNER.DETERMINISTIC", "True", "fp32", ["RUNNER.PRECISION", "bf16"]),
    ("INIT.TRAINABLE", "classifier", "ACTION.LOSS_WEIGHT is 0", []),
    ("INIT.TRAINABLE", "head", "all, classifier", []),
    ("INIT.INFLATE_FROM", "torchvision/resnet18", "no 2D counterpart", ["INIT.INFLATE_WEIGHTS", "IMAGENET1K_V1"]),
    ("INIT.INFLATE_FROM", "torchvison/resnet18", "torchvision/NAME, timm/NAME, Res2D", []),
    ("INIT.INFLATE_FROM", "R2Plus1D", "torchvision/NAME, timm/NAME, Res2D", []),
    (
        "INIT.INFLATE_FROM",
        "torchvision/googlenet",
        "Set NETWORK.AFFINE_NORM True",
        ["MODEL.MODEL_NAME", "I3D", "INIT.INFLATE_WEIGHTS", "IMAGENET1K_V1"],
    ),
    (
        "INIT.INFLATE_FROM",
        "torchvision/resnet18",
        "no 2D counterpart",
        ["MODEL.MODEL_NAME", "torchvision/s3d", "INIT.INFLATE_WEIGHTS", "IMAGENET1K_V1"],
    ),
    (
        "INIT.INFLATE_WEIGHTS",
        "timm",
        "is not of timm",
        ["MODEL.MODEL_NAME", "Res3D", "INIT.INFLATE_FROM", "torchvision/resnet18"],
    ),
    (
        "INIT.INFLATE_WEIGHTS",
        "random",
        "a torchvision tag, 'timm', or a weights file",
        ["MODEL.MODEL_NAME", "Res3D", "INIT.INFLATE_FROM", "torchvision/resnet18"],
    ),
    ("INIT.INFLATE_WEIGHTS", "IMAGENET1K_V1", "INIT.INFLATE_FROM", []),
    ("TEST.ENABLE", "True", "nothing trains a classifier", LABELLED[6:]),
    ("TRAIN.ENABLE", "False", "nothing to do", []),
    ("DATA.PATH_TO_DATA_DIR", "lists", "only read when CORPUS names no corpora", []),
    ("CORPUS.TRAIN.VIDEOS.FORMAT", "cvs", "Did you mean csv?", []),
    ("CORPUS.TRAIN.VIDEOS.PATH", "", "any text but the empty one", []),
    ("CORPUS.TRAIN.VIDEOS.ROOT", "x", "no meaning for FORMAT folder", []),
    ("CORPUS.TRAIN.VIDEOS.WEIGHT", "0", "a number > 0, or -1", []),
    ("CORPUS.TRAIN.VIDEOS.SUBSET", "validation", "train, test, or empty", ["CORPUS.TRAIN.VIDEOS.FORMAT", "ucf101"]),
    ("CORPUS.TRAIN.VIDEOS.FORMAT", "list", "list has no labels", LABELLED),
    ("CORPUS.TRAIN.VIDEOS.LABELED", "False", "ACTION.LOSS_WEIGHT needs labels", ["ACTION.LOSS_WEIGHT", "1"]),
    ("CORPUS.TEST.VIDEOS.LABELED", "False", "TEST.ENABLE needs labels", LABELLED),
    (f"{TEACHER}.ARCH", "resnet50", "torchvision/NAME, timm/NAME", []),
    (f"{TEACHER}.WEIGHTS", "timm", "timm is for timm/NAME", []),
    (f"{TEACHER}.NUM_CLASSES", "365", "have 1000 classes", []),
    (f"{TEACHER}.HEAD", "own", "Make them equal, or use HEAD linear", []),
    (f"{TEACHER}.LOSS", "kl", "compares classes", [f"{TEACHER}.LAYER", "features"]),
    (f"{TEACHER}.LAYER", "logit", "Did you mean logits?", []),
    (f"{TEACHER}.LOSS", "cross_entropy", "Did you mean soft_cross_entropy", []),
    (f"{TEACHER}.LOSS_WEIGHT", "-1", "a number ≥ 0", []),
    (f"{TEACHER}.TEMPERATURE", "0", "a number > 0", []),
    (f"{TEACHER}.TEMPERATURE", "2", "only read by soft_cross_entropy and kl", [f"{TEACHER}.LOSS", "mse"]),
    (f"{TEACHER}.CLASS_REDUCTION", "sum", "only read by mse", []),
    (f"{TEACHER}.NUM_PICKED_FRAMES", "2", "center is one frame", []),
    (f"{TEACHER}.NUM_PICKED_FRAMES", "9", "1 … 8", [f"{TEACHER}.FRAME_PICK", "random"]),
    (f"{TEACHER}.NUM_PICKED_FRAMES", "4", "all 8 frames", [f"{TEACHER}.FRAME_PICK", "clip"]),
    (f"{TEACHER}.FRAME_PICK", "centre", "Did you mean center?", []),
    (f"{TEACHER}.MAX_ENTROPY", "0", "or -1", []),
    (f"{TEACHER}.MAX_ENTROPY", "7", "at most 6.91", []),
    (f"{TEACHER}.STUDENT_LAYER", "features", "is no map", [f"{TEACHER}.LAYER", "feature_map"]),
    ("DISTILL.GATE", "skip", "no effect without a gate", []),
    ("DISTILL.GATE_MEAN", "kept", "no effect without a gate", []),
]


@pytest.mark.parametrize(("key", "value", "message", "further"), BAD, ids=[f"{row[0]}={row[1]}" for row in BAD])
def test_bad_override_gives_its_message(key, value, message, further):
    found = problems([*GOOD, *further, key, value])
    about = [problem for problem in found if problem.startswith(key)]
    assert about, found
    assert any(part in problem for problem in about for part in message.split("|")), about
    # One mistake, one message: nothing else is blamed.
    assert len(found) == 1, found


def test_all_problems_at_once():
    found = problems([*GOOD, "RNG_SEED", "-1", "SOLVER.LRS", "[1, 2]", "DISTILL.GATE", "skip", f"{TEACHER}.LAYER", "x"])
    assert {problem.partition(":")[0] for problem in found} == {"RNG_SEED", "SOLVER.LRS", f"{TEACHER}.LAYER"}


def test_nothing_given():
    found = problems([])
    keys = [problem.partition(":")[0] for problem in found]
    assert keys == ["DISTILL.TEACHERS", "TEST.ENABLE", "CORPUS.TRAIN", "CORPUS.TEST"]


def test_a_teacher_without_weight_teaches_nothing():
    (problem,) = problems([*GOOD, f"{TEACHER}.LOSS_WEIGHT", "0"])
    assert "nothing to learn" in problem


def test_mixtures():
    two = [*GOOD, "CORPUS.TRAIN.MORE.PATH", "more"]
    load_cfg([], two)
    (problem,) = problems([*two, "CORPUS.TRAIN.MORE.WEIGHT", "-1"])
    assert "cannot be mixed with others" in problem
    (problem,) = problems([*two, "CORPUS.TRAIN.MORE.LABELED", "True"])
    assert "labelled and unlabelled corpora cannot be mixed" in problem


@pytest.mark.parametrize(
    "good",
    [
        [f"{TEACHER}.MAX_ENTROPY", "2.7", "DISTILL.GATE", "skip", "DISTILL.GATE_MEAN", "kept"],
        [f"{TEACHER}.MAX_ENTROPY", str(math.log(1000))],
        [f"{TEACHER}.FRAME_PICK", "random", f"{TEACHER}.NUM_PICKED_FRAMES", "2"],
        [f"{TEACHER}.HEAD", "own", "MODEL.NUM_CLASSES", "1000"],
        [f"{TEACHER}.HEAD", "own", "MODEL.NUM_CLASSES", "1000", "TEST.ENABLE", "True", *LABELLED[6:]],
        [f"{TEACHER}.LAYER", "features", f"{TEACHER}.LOSS", "cosine"],
        [f"{TEACHER}.LAYER", "feature_map", f"{TEACHER}.LOSS", "mse", f"{TEACHER}.CLASS_REDUCTION", "sum"],
        [f"{TEACHER}.ARCH", "timm/vit_base_patch16_224", f"{TEACHER}.WEIGHTS", "timm"],
        [f"{TEACHER}.ARCH", "Res2D", f"{TEACHER}.WEIGHTS", "digits.pyth", f"{TEACHER}.NUM_CLASSES", "10"],
        ["MODEL.MODEL_NAME", "pytorchvideo/x3d_s"],
        ["MODEL.MODEL_NAME", "Res3D", "INIT.INFLATE_FROM", "torchvision/resnet18", "INIT.INFLATE_WEIGHTS", "a.pth"],
        ["SOLVER.LR_POLICY", "plateau", "CORPUS.VAL.V.PATH", "v"],
        ["NUM_GPUS", "1", "RUNNER.PRECISION", "fp16", "TRAIN.MIXED_PRECISION", "True"],
        ["CORPUS.TEST_CLIPS", "dense", "CORPUS.DENSE_STRIDE", "4"],
        [*LABELLED, "INIT.TRAINABLE", "classifier", "DISTILL.TEACHERS", "null"],
    ],
)
def test_good_overrides(good):
    load_cfg([], GOOD + good)


def test_changes_from_python_are_checked():
    cfg = load_cfg([], GOOD)[0].clone()
    cfg.defrost()
    cfg.SOLVER.BASE_LRR = 1.0
    cfg.RNG_SEED = "zero"
    cfg.SOLVER.BASE_LR = 1  # an integer is a number
    cfg.DATA.MEAN = (0.5, 0.5, 0.5)
    del cfg.DISTILL.TEACHERS.IMAGENET["LOSS"]
    cfg.CORPUS.VAL.X = 3
    with pytest.raises(ConfigError) as caught:
        validate(cfg)
    starts = [problem.partition(":")[0] for problem in caught.value.problems]
    assert starts == ["RNG_SEED", "SOLVER.BASE_LRR", f"{TEACHER}.LOSS", "CORPUS.VAL.X"]


def test_every_rule_is_for_a_key_that_exists():
    assert set(RULES) <= set(leaf_keys(get_cfg()))
    assert set(CORPUS_RULES) <= set(CORPUS_ENTRY)
    assert set(TEACHER_RULES) <= {*TEACHER_ENTRY, *TEACHER_ENTRY.NETWORK}
    free_text = {"CHECKPOINT_FILE_PATH", "PATH_TO_DATA_DIR", "PATH_PREFIX", "LOG_DIR", "INFLATE_FROM"}
    free_text |= {
        "INFLATE_WEIGHTS",
        "INDEX_CACHE",
        "STORE",
        "WEIGHTS",
        "DEPTH",
    }  # DEPTH is judged together with the network
    unruled = {
        key
        for key in set(leaf_keys(get_cfg())) - set(RULES)
        if key.rpartition(".")[2] not in free_text
        for node in [_value(get_cfg(), key)]
        if not isinstance(node, bool)
    }
    assert unruled == set()


@pytest.mark.parametrize(
    ("module", "registry", "names"),
    [
        ("distinit_plugin.models.factory", MODELS, rules.NETWORKS),
        ("distinit_plugin.losses", LOSSES, rules.DISTILL_LOSSES + rules.ACTION_LOSSES),
        ("distinit_plugin.video.corpus", CORPORA, rules.FORMATS),
        ("distinit_plugin.video.sampling", FRAME_PICKERS, rules.FRAME_PICKS),
    ],
)
def test_names_are_those_that_the_parts_register(module, registry, names):
    importlib.import_module(module)
    registered = {name for name, part in registry if part.__module__.startswith("distinit_plugin")}
    assert registered == set(names)


def test_switches_are_those_that_the_networks_have():
    importlib.import_module("distinit_plugin.models.factory")
    switches = set(get_cfg().NETWORK) - {"MODALITY"}  # every network's input
    for name, keys in rules.NETWORK_SWITCHES.items():
        taken = {key.upper() for key in inspect.signature(MODELS.get(name)).parameters}
        assert taken & switches == set(keys), name


def _value(cfg, key):
    for part in key.split("."):
        cfg = cfg[part]
    return cfg


# -------------------------------------------------------------------------------------------------------------- paths
def test_paths(tmp_path):
    (tmp_path / "videos").mkdir()
    blocked = write(tmp_path, "file", "")
    good = [*GOOD, "CORPUS.TRAIN.VIDEOS.PATH", str(tmp_path / "videos"), "OUTPUT_DIR", str(tmp_path / "new" / "run")]
    cfg, _ = load_cfg([], good)
    validate(cfg, check_paths=True)
    assert not (tmp_path / "new").exists()
    bad = [
        *("CORPUS.TRAIN.VIDEOS.PATH", "absent_videos", "OUTPUT_DIR", str(blocked / "run")),
        *("TRAIN.CHECKPOINT_FILE_PATH", "absent.pyth", f"{TEACHER}.WEIGHTS", "./absent.pth.tar"),
        *("CORPUS.INDEX_CACHE", str(blocked)),
    ]
    cfg, _ = load_cfg([], GOOD + bad)  # without check_paths nobody looks
    with pytest.raises(ConfigError) as caught:
        validate(cfg, check_paths=True)
    starts = [problem.partition(":")[0] for problem in caught.value.problems]
    assert starts == [
        *("OUTPUT_DIR", "CORPUS.INDEX_CACHE", "CORPUS.TRAIN.VIDEOS.PATH"),
        *("TRAIN.CHECKPOINT_FILE_PATH", f"{TEACHER}.WEIGHTS"),
    ]
    assert "--opts CORPUS.TRAIN.VIDEOS.PATH PLACE" in caught.value.problems[2]


def test_paths_of_lists_and_switched_off_uses(tmp_path):
    opts = ["ACTION.LOSS_WEIGHT", "1", "DATA.PATH_TO_DATA_DIR", str(tmp_path), "OUTPUT_DIR", str(tmp_path)]
    cfg, _ = load_cfg([], opts)
    with pytest.raises(ConfigError) as caught:
        validate(cfg, check_paths=True)
    assert [problem.split(" ")[1] for problem in caught.value.problems] == [
        str(tmp_path / "train.csv"),
        str(tmp_path / "test.csv"),
    ]
    write(tmp_path, "test.csv", "a.mp4 0\n")
    cfg, _ = load_cfg([], [*opts, "TRAIN.ENABLE", "False"])
    validate(cfg, check_paths=True)


def test_read_only_output(tmp_path, monkeypatch):
    cfg, _ = load_cfg([], [*GOOD, "OUTPUT_DIR", str(tmp_path / "run"), "CORPUS.TRAIN.VIDEOS.PATH", str(tmp_path)])
    validate(cfg, check_paths=True)
    monkeypatch.setattr(os, "access", lambda place, mode: False)  # a read-only folder, also for root
    with pytest.raises(ConfigError, match=f"OUTPUT_DIR.*{tmp_path} is not writable"):
        validate(cfg, check_paths=True)
