"""What the rules of configurations refuse, and in which words."""

import importlib
import inspect
import math
import os

import pytest
from good_configs import GOOD, LABELLED, TEACHER, problems, write

from distinit_plugin.config import rules, validate_networks
from distinit_plugin.config.defaults import CORPUS_ENTRY, TEACHER_ENTRY, get_cfg
from distinit_plugin.config.load import load_cfg
from distinit_plugin.config.node import leaf_keys
from distinit_plugin.config.rules import CORPUS_RULES, RULES, TEACHER_RULES
from distinit_plugin.config.validate import validate
from distinit_plugin.errors import ConfigError
from distinit_plugin.registry import CORPORA, FRAME_PICKERS, LOSSES, MODELS

# --------------------------------------------------------------------------------------------------------- validation
BAD = [
    # key, value, part of the message, further words
    ("OUTPUT_DIR", "", "any text but the empty one", []),
    ("RNG_SEED", "-1", "a number ≥ 0", []),
    ("NUM_GPUS", "-1", "a number ≥ 0", []),
    ("SHARD_ID", "1", "0 … 0", []),
    ("TRAIN.DATASET", "ava", "kinetics", []),
    ("TRAIN.DATASET", "ssv2", "kinetics", []),
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
    ("DISTILL.GRID.CLIPS", "-1", "a number ≥ 0", []),
    ("DISTILL.GRID.CROPS", "2", "0, 1, 3", []),
    ("DISTILL.GRID.CROPS", "3", "no effect on random clips", []),
    ("DISTILL.GRID.SCALE", "128", "no effect on random crops", []),
    (
        "DISTILL.GRID.SCALE",
        "100",
        "smaller than DATA.TRAIN_CROP_SIZE",
        ["DISTILL.GRID.CLIPS", "1", "DISTILL.GRID.CROPS", "1"],
    ),
    ("DISTILL.GRID.FRAMES", "9", "0 … 8", []),
    ("DISTILL.TEACHERS.IMAGENET.VIEW", "middle", "shared, center", []),
    ("DISTILL.TEACHERS.IMAGENET.CACHE", "x", "DISTILL.GRID.CLIPS is 0", []),
    ("DISTILL.TEACHERS.IMAGENET.CACHE", "x", "DISTILL.GRID.CROPS is 0", ["DISTILL.GRID.CLIPS", "2"]),
    (
        "DISTILL.TEACHERS.IMAGENET.CACHE",
        "x",
        "no two times the same",
        [
            *("DISTILL.GRID.CLIPS", "2", "DISTILL.TEACHERS.IMAGENET.VIEW", "center"),
            *("DISTILL.TEACHERS.IMAGENET.WEIGHTS", "random"),
        ],
    ),
    (
        "DISTILL.TEACHERS.IMAGENET.NUM_PICKED_FRAMES",
        "3",
        "DISTILL.GRID.FRAMES 2 cannot be picked",
        [
            *("DISTILL.GRID.FRAMES", "2", "DISTILL.TEACHERS.IMAGENET.FRAME_PICK", "random"),
        ],
    ),
    ("FLOW.MISSING", "live", "FLOW.STORE is empty", []),
    ("FLOW.MISSING", "skip", "refuse, live", []),
    ("FLOW.BACKEND", "tvl", "Did you mean tvl1", []),
    ("FLOW.BACKEND", "raft", "needs FLOW.WEIGHTS", []),
    ("FLOW.WEIGHTS", "raft.pth", "no meaning for FLOW.BACKEND tvl1", []),
    ("FLOW.BOUND", "0", "a number ≥ 0.01", []),
    ("CORPUS.TARGET_FPS", "1e9", "≤ 1000", []),
    ("RUNNER.CLIPS_PER_EPOCH", "1000000000", "≤ 100000000", []),
    ("SOLVER.BASE_LR", "1e308", "≤ 1e+30", []),
    (f"{TEACHER}.NUM_CLASSES", "10000000000", "≤ 1000000000", []),
    ("INIT.INFLATE_WEIGHTS", "a" * 5000, "at most 4096 characters", []),
    ("FLOW.ROUNDING", "ceil", "round, floor", []),
    ("NETWORK.MODALITY", "flow", "sees frames and flow", ["MODEL.MODEL_NAME", "TwoStream"]),
    ("NETWORK.VARIANT", "caffe", "vmz, torchvision", []),
    ("NETWORK.PADDING", "valid", "same, symmetric", []),
    ("NETWORK.PADDING", "symmetric", "it is for ConvLSTM, Fused3D, I3D, PredictedFlow3D, S3DG", []),
    ("NETWORK.STEM_FRAMES", "7", "no effect on I3D; it is for PredictedFlow3D, S3DG", ["MODEL.MODEL_NAME", "I3D"]),
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
    (f"{TEACHER}.LOSS", "kl", "compares classes", [f"{TEACHER}.LAYER", "4F"]),
    (f"{TEACHER}.LAYER", "", "any text but the empty one", []),
    (f"{TEACHER}.LOSS", "cross_entropy", "Did you mean soft_cross_entropy", []),
    (f"{TEACHER}.LOSS_WEIGHT", "-1", "a number ≥ 0", []),
    (f"{TEACHER}.TEMPERATURE", "0", "a number > 0", []),
    (f"{TEACHER}.TEMPERATURE", "2", "only read by soft_cross_entropy and kl", [f"{TEACHER}.LOSS", "mse"]),
    (f"{TEACHER}.CLASS_REDUCTION", "sum", "only read by mse", []),
    (f"{TEACHER}.NORMALIZE", "variance", "only read by mse", []),
    (f"{TEACHER}.NORMALIZE", "standardise", "Did you mean standardize?", [f"{TEACHER}.LOSS", "mse"]),
    (f"{TEACHER}.WARMUP", "-1", "a number ≥ 0", []),
    (f"{TEACHER}.WARMUP", "45", "leaves nothing of SOLVER.MAX_EPOCH 45", []),
    (f"{TEACHER}.NUM_PICKED_FRAMES", "2", "center is one frame", []),
    (f"{TEACHER}.NUM_PICKED_FRAMES", "2", "keyframe is one frame", [f"{TEACHER}.FRAME_PICK", "keyframe"]),
    (f"{TEACHER}.NUM_PICKED_FRAMES", "9", "1 … 8", [f"{TEACHER}.FRAME_PICK", "random"]),
    (f"{TEACHER}.NUM_PICKED_FRAMES", "4", "all 8 frames", [f"{TEACHER}.FRAME_PICK", "clip"]),
    (f"{TEACHER}.FRAME_PICK", "centre", "Did you mean center?", []),
    (f"{TEACHER}.MAX_ENTROPY", "0", "or -1", []),
    (f"{TEACHER}.MAX_ENTROPY", "7", "at most 6.91", []),
    (f"{TEACHER}.STUDENT_LAYER", "features", "is no map", [f"{TEACHER}.LAYER", "feature_map"]),
    (f"{TEACHER}.STUDENT_LAYER", "logits", "is no map", [f"{TEACHER}.LAYER", "4F", f"{TEACHER}.LOSS", "mse"]),
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


@pytest.mark.parametrize("network", [["S3DG"], ["Res3D", "NETWORK.STEM_POOL", "True"]])
@pytest.mark.parametrize(("version", "refused"), [("2.14.1", True), ("2.15.0+cu132", False), ("3.0.0a0", False)])
def test_pools_that_an_older_torch_cannot_reproduce(network, version, refused, monkeypatch):
    monkeypatch.setattr(validate_networks.metadata, "version", lambda _: version)
    given = [*GOOD, "RUNNER.DETERMINISTIC", "True", "NUM_GPUS", "1", "MODEL.MODEL_NAME", *network]
    if not refused:
        load_cfg([], given)
        return
    (problem,) = problems(given)
    assert "3D max-pools" in problem
    assert "Install torch 2.15" in problem


def test_all_problems_at_once():
    found = problems([*GOOD, "RNG_SEED", "-1", "SOLVER.LRS", "[1, 2]", "DISTILL.GATE", "skip", f"{TEACHER}.HEAD", "x"])
    assert {problem.partition(":")[0] for problem in found} == {"RNG_SEED", "SOLVER.LRS", f"{TEACHER}.HEAD"}


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
        [
            f"{TEACHER}.LAYER",
            "4F",
            f"{TEACHER}.LOSS",
            "mse",
            f"{TEACHER}.NORMALIZE",
            "variance",
            f"{TEACHER}.WARMUP",
            "2",
        ],
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
        *("ANNOTATION_DIR", "FRAME_DIR", "FRAME_LIST_DIR", "VIDEO_DIR"),
        *("GROUNDTRUTH_FILE", "LABEL_MAP_FILE", "EXCLUSION_FILE"),
        "FLOW_NET_WEIGHTS",
        "INFLATE_WEIGHTS",
        "STREAM_WEIGHTS",
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
