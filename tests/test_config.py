"""Reading and merging configurations."""

import copy
import os
import pickle

import pytest
import yaml
from good_configs import GOOD, LABELLED, TEACHER, problems, write

from distinit_plugin.config.defaults import CORPUS_ENTRY, TEACHER_ENTRY, get_cfg
from distinit_plugin.config.load import load_cfg, parse_cfg, resolve_config, shipped_configs
from distinit_plugin.config.node import CfgNode, leaf_keys
from distinit_plugin.config.pyslowfast_keys import PYSLOWFAST_DEFAULTS
from distinit_plugin.errors import ConfigError


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
