"""What each key may hold, one rule a key. Rules that join several keys are in ``validate.py``."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from fvcore.common.registry import Registry

from distinit_plugin.errors import shown
from distinit_plugin.registry import CORPORA, FLOW_BACKENDS, FRAME_PICKERS, LOSSES, MODELS, PROGRAMS, near_matches

_INCEPTION_2D = ("WIDTH", "PADDING", "AFFINE_NORM")
_INCEPTION_3D = (*_INCEPTION_2D, "TEMPORAL_PADDING", "FULLY_CONVOLUTIONAL")
_S3DG = (*_INCEPTION_3D, "STEM_FRAMES", "SEPARABLE_STEM", "TEMPORAL_NORM", "TEMPORAL_FROM", "GATING_FROM")
NETWORK_SWITCHES = {
    "C3D": ("WIDTH",),
    "ConvLSTM": _INCEPTION_2D,
    "Fused3D": (*_INCEPTION_2D, "STREAMS"),
    "I3D": _INCEPTION_3D,
    "PredictedFlow3D": (*_S3DG, "DECODER", "DECODER_NORM"),
    "R2Plus1D": ("VARIANT", "WIDTH", "TEMPORAL_PADDING"),
    "Res2D": ("WIDTH",),
    "Res3D": ("VARIANT", "WIDTH", "STEM_POOL", "TEMPORAL_PADDING"),
    "S3DG": (*_S3DG, "LAST_LAYER"),
    "TwoStream": (*_INCEPTION_2D, "STREAMS"),
}
"""The networks of this package, as the models module registers them → the keys of NETWORK that they read."""
NETWORKS = tuple(NETWORK_SWITCHES)
INCEPTIONS = ("I3D", "PredictedFlow3D", "S3DG")
_VIDEO_DEPTHS = (10, 16, 18, 26, 34, 50, 101, 152)
NETWORK_DEPTHS = {"R2Plus1D": _VIDEO_DEPTHS, "Res2D": (10, 18, 34, 50, 101, 152), "Res3D": _VIDEO_DEPTHS}
"""The networks that read RESNET.DEPTH → the depths that they have."""
FLOW_BACKEND_NAMES = ("tvl1", "dual_tvl1", "dis_medium", "dis_fast", "raft")
"""What computes optical flow."""

TWO_STREAM_NETWORKS = ("Fused3D", "TwoStream")
"""The networks that see frames and flow side by side."""
FLOW = "flow"
"""ARCH and LAYER of the teacher that is no network: the flow of the student's clip."""
FLOW_DECODERS = ("simple", "spatial", "pwc")
FLOW_LOSS = "flow_decoding"
INFLATABLE = (
    *("ConvLSTM", "Fused3D", "I3D", "Res3D", "S3DG", "TwoStream"),
    *("torchvision/mc3_18", "torchvision/r3d_18"),
)
"""The networks that the weights of an image network can fill."""
IMAGE_NETWORKS = ("Res2D",)
"""The networks of this package that are image networks themselves."""
DISTILL_LOSSES = ("soft_cross_entropy", "kl", "mse", "cosine", FLOW_LOSS)
PERSON_RPN = "PersonRpn"
"""The network that finds persons in keyframes; it has no actions, and the node RPN describes it."""
RPN_ARCHS = ("resnet18", "resnet50", "resnet18_fpn", "resnet50_fpn", "resnet50_fpn_v2")
BOX_LOSS = "bce"
"""The loss on the actions of boxes."""
ACTION_LOSSES = ("cross_entropy", BOX_LOSS)
_INCEPTION_STARTS = ("2C", "3B", "3C", "4B", "4C", "4D", "4E", "4F", "5B", "5C")
"""The papers' names of the end-points from which S3DG can have temporal kernels and gates."""
_END_POINTS = {
    "1A": "Conv2d_1a_7x7",
    "2A": "MaxPool_2a_3x3",
    "2B": "Conv2d_2b_1x1",
    "2C": "Conv2d_2c_3x3",
    "3A": "MaxPool_3a_3x3",
    "4A": "MaxPool_4a_3x3",
    "5A": "MaxPool_5a_2x2",
    **{name: f"Mixed_{name.lower()}" for name in _INCEPTION_STARTS if name != "2C"},
}
"""The papers' names of all end-points → TF-slim's."""
SOFTMAX_LOSSES = ("soft_cross_entropy", "kl")
FORMATS = ("folder", "list", "csv", "ucf101", "hmdb51", "kinetics", "frames")
FRAME_PICKS = ("center", "keyframe", "random", "uniform", "clip")


class Rule(NamedTuple):
    """A test of one value and the text that says what passes it."""

    allowed: str
    accepts: Callable[[Any], bool]
    choices: Callable[[], list[str]] = list

    def problem(self, key: str, value: Any, default: Any) -> str | None:
        """The sentence for a value that the rule does not accept; ``None`` for one that it does."""
        if self.accepts(value):
            return None
        hint = near_matches(value, self.choices()) if isinstance(value, str) else ""
        return (
            f"{key}: {shown(value)} is not allowed. Allowed: {self.allowed}.{hint or f' The default is {default!r}.'}"
        )


def one_of(*names: Any) -> Rule:
    """Exactly one of some values."""
    return Rule(", ".join(map(str, names)), lambda value: value in names, lambda: [str(name) for name in names])


def registered(known: tuple[str, ...], registry: Registry, without: tuple[str, ...] = ()) -> Rule:
    """A name of this package, or one that other code has registered; ``without`` are for another use."""

    def names() -> list[str]:
        return sorted({*known, *(name for name, _ in registry if name not in without)})

    return Rule(", ".join(known), lambda value: value in names(), names)


def number(
    *, least: float | None = None, above: float | None = None, most: float | None = None, below: float | None = None
) -> Rule:
    """A number within bounds."""
    bounds = [("≥", least), (">", above), ("≤", most), ("<", below)]
    text = " and ".join(f"{sign} {bound:.12g}" for sign, bound in bounds if bound is not None)
    return Rule(
        f"a number {text}",
        lambda value: (
            (least is None or value >= least)
            and (above is None or value > above)
            and (most is None or value <= most)
            and (below is None or value < below)
        ),
    )


def number_or(special: float, meaning: str, rule: Rule) -> Rule:
    """A number within bounds, or a special value with a meaning."""
    return Rule(f"{rule.allowed}, or {special:g} ({meaning})", lambda value: value == special or rule.accepts(value))


def items(rule: Rule, *lengths: int) -> Rule:
    """A list of one of some lengths (any but 0 where none is given) whose entries all pass a rule."""
    count = f"exactly {' or '.join(map(str, lengths))} entries" if lengths else "one or more entries"
    return Rule(
        f"a list of {count}, each {rule.allowed}",
        lambda value: (len(value) in lengths if lengths else len(value) > 0) and all(map(rule.accepts, value)),
    )


def any_number_of(rule: Rule) -> Rule:
    """A list, perhaps empty, whose entries all pass a rule."""
    return Rule(f"a list, each entry {rule.allowed}", lambda value: all(map(rule.accepts, value)))


def address() -> Rule:
    """``tcp://ADDRESS:PORT`` or empty; an IPv6 address stands in brackets."""
    shape = re.compile(r"tcp://([^\s:/\[\]]+|\[[0-9A-Fa-f:.]+\]):([0-9]{1,5})")

    def accepts(value: str) -> bool:
        found = shape.fullmatch(value)
        return value == "" or (found is not None and 0 < int(found[2]) < 1 << 16)

    return Rule("tcp://ADDRESS:PORT (a port from 1 to 65535), or empty", accepts)


def inception_start() -> Rule:
    """An end-point of S3DG by the papers' name or by TF-slim's, or none."""
    return end_point(_INCEPTION_STARTS, "none")


def end_point(allowed: Iterable[str], *others: str) -> Rule:
    """Some end-points by the papers' names or by TF-slim's, or another word."""
    short = sorted(allowed)
    names = [*short, *(_END_POINTS[name] for name in short), *others]
    text = ", ".join([f"{', '.join(short)} (or TF-slim's names)", *others])
    return Rule(text, lambda value: value in names, lambda: names)


def network_name() -> Rule:
    """A network of this package, a registered one, or one of another package by ``package/NAME``."""

    def names() -> list[str]:
        return sorted({*NETWORKS, PERSON_RPN, *(name for name, _ in MODELS)})

    def accepts(value: str) -> bool:
        package, slash, name = value.partition("/")
        return value in names() or (bool(slash and name) and package in ("torchvision", "pytorchvideo", *PROGRAMS))

    others = ", ".join(f"{package}/NAME" for package in ("torchvision", "pytorchvideo", *PROGRAMS))
    return Rule(f"{', '.join(NETWORKS)}, {PERSON_RPN}, {others}", accepts, names)


def teacher_name() -> Rule:
    """An image network of torchvision or timm, a network of this package, or the flow itself."""

    def names() -> list[str]:
        return sorted({*NETWORKS, *(name for name, _ in MODELS), FLOW})

    def accepts(value: str) -> bool:
        package, slash, name = value.partition("/")
        return value in names() or (
            bool(slash and name) and package in ("torchvision", "timm", "pytorchvideo", *PROGRAMS)
        )

    others = ", ".join(f"{package}/NAME" for package in ("torchvision", "timm", "pytorchvideo", *PROGRAMS))
    return Rule(f"{others}, {', '.join(NETWORKS)}, {FLOW}", accepts, names)


def image_network_name() -> Rule:
    """Nothing, an image network of torchvision or timm, or one of this package."""

    def names() -> list[str]:
        return sorted({*IMAGE_NETWORKS, *({name for name, _ in MODELS} - set(NETWORKS))})

    def accepts(value: str) -> bool:
        package, slash, name = value.partition("/")
        return value == "" or value in names() or (bool(slash and name) and package in ("torchvision", "timm"))

    return Rule(f"torchvision/NAME, timm/NAME, {', '.join(IMAGE_NETWORKS)}, or empty", accepts, names)


_NOT_EMPTY = Rule("any text but the empty one", lambda value: bool(value.strip()))
_COUNT = number(least=1, most=1e9)
_FROM_ZERO = number(least=0, most=1e12)
_FRACTION = number(least=0, below=1)
_MEAN = items(number(least=0, most=1), 2, 3)
_STD = items(number(above=0), 2, 3)
_CROP = number(least=8, most=10_000)

SWITCH_RULES: dict[str, Rule] = {
    "MODALITY": one_of("rgb", "flow"),
    "VARIANT": one_of("vmz", "torchvision"),
    "WIDTH": _COUNT,
    "TEMPORAL_PADDING": one_of("zeros", "replicate"),
    "PADDING": one_of("same", "symmetric"),
    "STEM_FRAMES": one_of(1, 3, 5, 7),
    "TEMPORAL_FROM": inception_start(),
    "GATING_FROM": inception_start(),
    "STREAMS": one_of("both", "rgb", "flow"),
    "LAST_LAYER": end_point(_END_POINTS),
    "DECODER": one_of(*FLOW_DECODERS),
}
"""Keys of NETWORK, the student's and each teacher's."""

RULES: dict[str, Rule] = {
    "OUTPUT_DIR": _NOT_EMPTY,
    "RNG_SEED": number(least=0, most=2**32 - 1),
    "NUM_GPUS": _FROM_ZERO,
    "NUM_SHARDS": _COUNT,
    "SHARD_ID": _FROM_ZERO,
    "LOG_PERIOD": _COUNT,
    "TRAIN.DATASET": Rule(
        "kinetics (other data sets go into CORPUS.TRAIN), ava", lambda value: value.lower() in ("kinetics", "ava")
    ),
    "TRAIN.BATCH_SIZE": _COUNT,
    "TRAIN.EVAL_PERIOD": _COUNT,
    "TRAIN.CHECKPOINT_PERIOD": _COUNT,
    "TEST.DATASET": Rule(
        "kinetics (other data sets go into CORPUS.TEST), ava", lambda value: value.lower() in ("kinetics", "ava")
    ),
    "TEST.BATCH_SIZE": _COUNT,
    "TEST.NUM_ENSEMBLE_VIEWS": _COUNT,
    "TEST.NUM_SPATIAL_CROPS": one_of(1, 3),
    "DATA.PATH_LABEL_SEPARATOR": Rule("text without a line break", lambda value: value != "" and "\n" not in value),
    "DATA.NUM_FRAMES": _COUNT,
    "DATA.SAMPLING_RATE": _COUNT,
    "DATA.MEAN": _MEAN,
    "DATA.STD": _STD,
    "DATA.TRAIN_JITTER_SCALES": items(_CROP, 2),
    "DATA.TRAIN_CROP_SIZE": _CROP,
    "DATA.TEST_CROP_SIZE": _CROP,
    "DATA.TRAIN_PCA_EIGVAL": items(_FROM_ZERO, 3),
    "DATA.TRAIN_PCA_EIGVEC": items(items(number(least=-1e6, most=1e6), 3), 3),
    "AVA.TRAIN_LISTS": items(_NOT_EMPTY),
    "AVA.TEST_LISTS": items(_NOT_EMPTY),
    "AVA.TRAIN_GT_BOX_LISTS": any_number_of(_NOT_EMPTY),
    "AVA.TRAIN_PREDICT_BOX_LISTS": any_number_of(_NOT_EMPTY),
    "AVA.TEST_PREDICT_BOX_LISTS": any_number_of(_NOT_EMPTY),
    "AVA.DETECTION_SCORE_THRESH": number(least=0, most=1),
    "DATA_LOADER.NUM_WORKERS": number(least=0, most=1024),
    "MODEL.MODEL_NAME": network_name(),
    "MODEL.NUM_CLASSES": _COUNT,
    "MODEL.DROPOUT_RATE": _FRACTION,
    "BN.NUM_BATCHES_PRECISE": _COUNT,
    "BN.NORM_TYPE": one_of("batchnorm", "sync_batchnorm"),
    "BN.WEIGHT_DECAY": number_or(-1, "the same as SOLVER.WEIGHT_DECAY", _FROM_ZERO),
    "SOLVER.OPTIMIZING_METHOD": one_of("sgd", "adamw"),
    "SOLVER.BASE_LR": number(above=0, most=1e30),  # fits in fp32
    "SOLVER.LR_POLICY": one_of("steps_with_relative_lrs", "cosine", "plateau"),
    "SOLVER.MAX_EPOCH": _COUNT,
    "SOLVER.STEPS": items(_FROM_ZERO),
    "SOLVER.LRS": items(_FROM_ZERO),
    "SOLVER.COSINE_END_LR": _FROM_ZERO,
    "SOLVER.WARMUP_EPOCHS": _FROM_ZERO,
    "SOLVER.WARMUP_START_LR": _FROM_ZERO,
    "SOLVER.MOMENTUM": _FRACTION,
    "SOLVER.DAMPENING": _FRACTION,
    "SOLVER.BETAS": items(_FRACTION, 2),
    "SOLVER.WEIGHT_DECAY": _FROM_ZERO,
    "SOLVER.CLIP_GRAD_VAL": _FROM_ZERO,
    "SOLVER.CLIP_GRAD_L2NORM": _FROM_ZERO,
    **{f"NETWORK.{key}": rule for key, rule in SWITCH_RULES.items()},
    "INIT.INFLATE_FROM": image_network_name(),
    "INIT.TRAINABLE": one_of("all", "classifier", "heads"),
    "CORPUS.SPLIT": one_of(1, 2, 3),
    "CORPUS.TARGET_FPS": number(least=0, most=1000),
    "CORPUS.TEST_SCALE": number_or(0, "DATA.TEST_CROP_SIZE", _CROP),
    "CORPUS.TEST_NUM_FRAMES": number_or(0, "DATA.NUM_FRAMES", _COUNT),
    "CORPUS.TEST_CLIPS": one_of("uniform", "dense"),
    "CORPUS.DENSE_STRIDE": _COUNT,
    "CORPUS.DECODE_TIMEOUT": number(above=0),
    "CORPUS.MAX_BAD_FRACTION": number(least=0, most=1),
    "KEYFRAMES.VIDEO_START": _FROM_ZERO,
    "KEYFRAMES.FRAMES_START": _FROM_ZERO,
    "KEYFRAMES.FRAMES_FPS": number(above=0, most=1000),
    "KEYFRAMES.SECONDS": items(_FROM_ZERO, 2),
    "KEYFRAMES.LABEL_IOU": number(least=0, most=1),
    "KEYFRAMES.TEST_BOXES": one_of("predicted", "ground_truth"),
    "FLOW.LAYOUT": one_of("store", "jpg", "npy"),
    "FLOW.MISSING": one_of("refuse", "live"),
    "FLOW.BACKEND": registered(FLOW_BACKEND_NAMES, FLOW_BACKENDS),
    "FLOW.RAFT_SIZE": one_of("large", "small"),
    "FLOW.BOUND": number(least=0.01, most=4096),
    "FLOW.ROUNDING": one_of("round", "floor"),
    "DISTILL.GATE": one_of("weight", "skip"),
    "DISTILL.GATE_MEAN": one_of("all", "kept"),
    "DISTILL.GRID.CLIPS": number(least=0, most=1_000_000),
    "DISTILL.GRID.CROPS": one_of(0, 1, 3),
    "DISTILL.GRID.SCALE": number_or(0, "the middle of DATA.TRAIN_JITTER_SCALES", _CROP),
    "DISTILL.GRID.FRAMES": number(least=0, most=1_000_000),
    "ACTION.LOSS": registered(ACTION_LOSSES, LOSSES, without=DISTILL_LOSSES),
    "ACTION.LOSS_WEIGHT": _FROM_ZERO,
    "ACTION.LABEL_SMOOTHING": _FRACTION,
    "DETECTION.SPATIAL_SCALE_FACTOR": number(least=0, most=1024),
    "DETECTION.ROI_XFORM_RESOLUTION": number(least=1, most=64),
    "ROI.LAYER": Rule(
        "a layer's name, several joined by +, or empty",
        lambda value: not value or all(map(str.strip, value.split("+"))),
    ),
    "ROI.POOL": one_of("avg", "max"),
    "ROI.PROPOSALS": one_of("given", "rpn", "own"),
    "ROI.SAMPLES": _COUNT,
    "ROI.POSITIVE_SHARE": number(above=0, most=1),
    "ROI.MATCH_IOU": number(above=0, most=1),
    "ROI.BOX_LOSS_WEIGHT": number(above=0),
    "ROI.PROPOSAL_LOSS_WEIGHT": number(above=0),
    "ROI.SCORE_FLOOR": _FRACTION,
    "ROI.NMS": number(above=0, most=1),
    "ROI.MAX_DETECTIONS": _FROM_ZERO,
    "ROI.EVALUATOR": one_of("official", "pyslowfast", "mmaction2"),
    "RPN.ARCH": one_of(*RPN_ARCHS),
    "RPN.CROP_SIZE": number(least=32, most=4096),
    "RPN.MEAN": items(number(), 3),
    "RPN.STD": items(number(above=0), 3),
    "RPN.ANCHOR_SIZES": items(number(above=0), 5),
    "RPN.NUM_PROPOSALS": _COUNT,
    "RPN.NMS": number(above=0, most=1),
    "RPN.SCORE_FLOOR": number(least=0, most=1),
    "RUNNER.CLIPS_PER_EPOCH": number(least=0, most=1e8),
    "RUNNER.SCHEDULE_UNIT": one_of("epoch", "step"),
    "RUNNER.ACCUMULATE": _COUNT,
    "RUNNER.PRECISION": one_of("auto", "fp32", "bf16", "fp16"),
    "RUNNER.CHANNELS_LAST": one_of("auto", "on", "off"),
    "RUNNER.NUM_THREADS": number(least=0, most=1024),
    "RUNNER.CPU_RANKS": number(least=1, most=1024),
    "RUNNER.INIT_METHOD": address(),
    "RUNNER.JOIN_TIMEOUT": number(least=1),
    "RUNNER.COLLECTIVE_TIMEOUT": number(least=1),
    "RUNNER.PLATEAU_PATIENCE": _COUNT,
    "RUNNER.PLATEAU_FACTOR": number(above=0, below=1),
    "RUNNER.KEEP_CHECKPOINTS": _FROM_ZERO,
    "RUNNER.RESUME_MINUTES": _FROM_ZERO,
}

CORPUS_RULES: dict[str, Rule] = {
    "FORMAT": registered(FORMATS, CORPORA),
    "PATH": _NOT_EMPTY,
    "WEIGHT": number_or(-1, "by size", number(above=0)),
}
"""Keys of each entry below CORPUS.TRAIN, CORPUS.VAL and CORPUS.TEST."""

TEACHER_RULES: dict[str, Rule] = {
    **SWITCH_RULES,
    "ARCH": teacher_name(),
    "WEIGHTS": _NOT_EMPTY,
    "NUM_CLASSES": number(least=2, most=1e9),
    "DEPTH": one_of(*sorted({depth for depths in NETWORK_DEPTHS.values() for depth in depths})),
    "LAYER": _NOT_EMPTY,  # the network's own names are known when it is built
    "HEAD": one_of("linear", "own", *FLOW_DECODERS),
    "LOSS": registered(DISTILL_LOSSES, LOSSES, without=ACTION_LOSSES),
    "LOSS_WEIGHT": _FROM_ZERO,
    "TEMPERATURE": number(above=0),
    "CLASS_REDUCTION": one_of("mean", "sum"),
    "NORMALIZE": one_of("none", "variance", "standardize"),
    "WARMUP": _FROM_ZERO,
    "MAX_ENTROPY": number_or(-1, "no gate", number(above=0)),
    "FRAME_PICK": registered(FRAME_PICKS, FRAME_PICKERS),
    "NUM_PICKED_FRAMES": _COUNT,
    "VIEW": one_of("shared", "center"),
    "CROP_SIZE": _CROP,
    "MEAN": _MEAN,
    "STD": _STD,
    "ALIGNMENT": one_of("center", "mean"),
}
"""Keys of each entry below DISTILL.TEACHERS."""
