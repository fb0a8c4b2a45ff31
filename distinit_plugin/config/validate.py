"""The check of a whole configuration: every problem at once, each with key, value, what is allowed, and the fix."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

from distinit_plugin.config.defaults import CORPUS_ENTRY, TEACHER_ENTRY, get_cfg
from distinit_plugin.config.node import CfgNode
from distinit_plugin.config.paths import path_problems
from distinit_plugin.config.rules import (
    CORPUS_RULES,
    PERSON_RPN,
    RULES,
    TEACHER_RULES,
    TWO_STREAM_NETWORKS,
    Rule,
)
from distinit_plugin.config.theirs import is_architecture
from distinit_plugin.config.validate_detection import detection_problems
from distinit_plugin.config.validate_keyframes import KEYFRAME_KEYS, keyframe_problems
from distinit_plugin.config.validate_networks import (
    flow_problems,
    head_problems,
    inflation_problems,
    layer_problems,
    norm_problems,
    part_problems,
    student_problems,
)
from distinit_plugin.config.validate_teachers import gate_problems, grid_problems, teacher_problems
from distinit_plugin.errors import ConfigError, shown
from distinit_plugin.registry import near_matches

Problems = Iterator[str]

MOST_CHARACTERS = 4096
"""Of a text: no system takes longer names of files."""

_MEANINGLESS = {
    "folder": ("ROOT", "SUBSET"),
    "frames": ("ROOT", "SUBSET"),
    "list": ("SUBSET", "CLASSES"),
    "csv": ("SUBSET",),
    "ucf101": ("CLASSES",),
    "hmdb51": ("CLASSES",),
}
"""FORMAT → keys of a corpus that its reader has no use for."""


def validate(cfg: CfgNode, check_paths: bool = False) -> None:
    """Check types, ranges, choices, and what keys demand of one another.

    Args:
        cfg: The configuration.
        check_paths: Also look for the files and folders that it names, and whether OUTPUT_DIR can be written.

    Raises:
        ConfigError: Every problem found, one sentence each.
    """
    problems = problems_of(cfg)
    if check_paths:
        problems += path_problems(cfg)
    if problems:
        raise ConfigError(problems)


def problems_of(cfg: CfgNode, wrong: Collection[str] = ()) -> list[str]:
    """Every problem of a configuration, one sentence each that begins with the key, a colon after it.

    Args:
        cfg: The configuration.
        wrong: Keys whose values could not be taken, so that the configuration holds others in their place.
    """
    problems = list(_single_keys(cfg))
    wrong = {*wrong, *(problem.partition(":")[0] for problem in problems)}
    for check, needs in _CHECKS:
        # A rule over several keys says nothing useful while one of them alone is already wrong.
        if not touches(wrong, needs):
            problems += check(cfg)
    return problems


def network_problems(cfg: CfgNode, wrong: Collection[str] = ()) -> list[str]:
    """As ``problems_of``, but of single keys and the network's switches alone."""
    problems = list(_single_keys(cfg))
    wrong = {*wrong, *(problem.partition(":")[0] for problem in problems)}
    needs = next(needs for check, needs in _CHECKS if check is student_problems)
    return problems if touches(wrong, needs) else [*problems, *student_problems(cfg)]


def touches(wrong: Collection[str], needs: Collection[str]) -> bool:
    """Whether one of some wrong keys lies in, or above, one of the (starts of) keys that something needs."""
    return any(key.startswith(need) or need.startswith(key) for key in wrong for need in needs)


def _single_keys(cfg: CfgNode) -> Problems:
    """Every key that is unknown, of the wrong type, not finite, or out of its range."""
    yield from _node(cfg, get_cfg(), RULES, "")
    for name, entry in cfg.DISTILL.TEACHERS.items():
        yield from _node(entry, TEACHER_ENTRY, TEACHER_RULES, f"DISTILL.TEACHERS.{name}.")
    for use in ("TRAIN", "VAL", "TEST"):
        for name, entry in cfg.CORPUS[use].items():
            yield from _node(entry, CORPUS_ENTRY, CORPUS_RULES, f"CORPUS.{use}.{name}.")


def _node(node: Any, defaults: CfgNode, rules: Mapping[str, Rule], prefix: str) -> Problems:
    if not isinstance(node, Mapping):
        yield f"{prefix[:-1]}: {shown(node)} is not a node. Allowed: a mapping with the keys {', '.join(defaults)}."
        return
    for key in [key for key in node if key not in defaults and not is_architecture(f"{prefix}{key}")]:
        yield f"{prefix}{key}: there is no such key.{near_matches(str(key), list(defaults))}"
    for key, default in defaults.items():
        full_key = f"{prefix}{key}"
        if key not in node:
            yield f"{full_key}: the key is missing. Start from get_cfg() or the entry's template."
        elif isinstance(default, CfgNode):
            if default.template is None:
                yield from _node(node[key], default, rules, f"{full_key}.")
        elif not _same_type(node[key], default):
            yield f"{full_key}: {shown(node[key])} is not allowed. Allowed: a value like the default, {default!r}."
        elif (wrong := _wrong_text(node[key])) is not None:
            yield f"{full_key}: {shown(node[key])} is not allowed. Allowed: {wrong}. The default is {default!r}."
        elif not _finite(node[key]):
            value = shown(node[key])
            yield f"{full_key}: {value} is not allowed. Allowed: a finite number. The default is {default!r}."
        elif full_key in rules or key in rules:
            problem = rules[full_key if full_key in rules else key].problem(full_key, node[key], default)
            if problem:
                yield problem


def _same_type(value: Any, default: Any) -> bool:
    if isinstance(default, list):
        kind = default[0] if default else ""  # an empty default is a list of texts
        return isinstance(value, list | tuple) and all(_same_type(item, kind) for item in value)
    if isinstance(default, float):
        return isinstance(value, int | float) and not isinstance(value, bool)
    return type(value) is type(default)


def _wrong_text(value: Any) -> str | None:
    """What a text (or one of a list) would have to be that no file, network or choice can be called."""
    if isinstance(value, list | tuple):
        return next(filter(None, map(_wrong_text, value)), None)
    if not isinstance(value, str):
        return None
    if "\0" in value:
        return "a text without a zero byte"
    return f"a text of at most {MOST_CHARACTERS} characters" if len(value) > MOST_CHARACTERS else None


def _finite(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_finite, value))
    return not isinstance(value, float) or math.isfinite(value)


# ------------------------------------------------------------------------------------------- rules over several keys
def _machines(cfg: CfgNode) -> Problems:
    ranks, accumulate = cfg.NUM_GPUS or cfg.RUNNER.CPU_RANKS, cfg.RUNNER.ACCUMULATE
    source = "NUM_GPUS" if cfg.NUM_GPUS else "RUNNER.CPU_RANKS"
    if cfg.NUM_GPUS and cfg.RUNNER.CPU_RANKS > 1:
        yield (
            f"RUNNER.CPU_RANKS: {cfg.RUNNER.CPU_RANKS} with NUM_GPUS {cfg.NUM_GPUS}, but on GPUs there is one process "
            "for each. Set RUNNER.CPU_RANKS 1, or NUM_GPUS 0."
        )
    if cfg.SHARD_ID >= cfg.NUM_SHARDS:
        yield f"SHARD_ID: {cfg.SHARD_ID} is not allowed. Allowed: 0 … {cfg.NUM_SHARDS - 1} (NUM_SHARDS − 1)."
    if cfg.TRAIN.BATCH_SIZE % (ranks * accumulate):
        yield (
            f"TRAIN.BATCH_SIZE: {cfg.TRAIN.BATCH_SIZE} clips cannot be shared by {ranks} rank(s) ({source}) in "
            f"{accumulate} part(s) (RUNNER.ACCUMULATE). Use a multiple of {ranks * accumulate}."
        )
    if cfg.TEST.BATCH_SIZE % ranks:
        yield (
            f"TEST.BATCH_SIZE: {cfg.TEST.BATCH_SIZE} clips cannot be shared by {ranks} ranks ({source}). "
            f"Use a multiple of {ranks}."
        )


def precision_problems(cfg: CfgNode) -> Problems:
    """What speaks against the precision, as in :func:`problems_of`."""
    precision, on_cpu = cfg.RUNNER.PRECISION, cfg.NUM_GPUS == 0
    if precision == "fp16" and on_cpu:
        yield "RUNNER.PRECISION: fp16 works on a GPU only, this job runs on the CPU. Use auto, bf16 or fp32."
    if cfg.TRAIN.MIXED_PRECISION and precision in ("fp32", "bf16"):
        yield f"TRAIN.MIXED_PRECISION: True means fp16, but RUNNER.PRECISION is {precision}. Keep one of the two."
    if cfg.TRAIN.MIXED_PRECISION and on_cpu:
        yield "TRAIN.MIXED_PRECISION: True means fp16, which works on a GPU only. Set it False; auto takes bf16."
    if cfg.RUNNER.DETERMINISTIC and (precision in ("bf16", "fp16") or cfg.TRAIN.MIXED_PRECISION):
        yield "RUNNER.DETERMINISTIC: exact reproduction is fp32. Set RUNNER.PRECISION fp32 or auto, no MIXED_PRECISION."


def _hardware(cfg: CfgNode) -> Problems:
    on_cpu = cfg.NUM_GPUS == 0
    if cfg.BN.NORM_TYPE == "sync_batchnorm" and on_cpu:
        yield (
            "BN.NORM_TYPE: sync_batchnorm works on GPUs only (torch has no CPU version), this job runs on the CPU. "
            "Use batchnorm: each rank then takes the statistics of its own clips."
        )
    if cfg.RUNNER.DETERMINISTIC and cfg.RUNNER.COMPILE:
        yield (
            "RUNNER.COMPILE: True, but a compiled network adds in an order that its tuning chooses, and "
            "RUNNER.DETERMINISTIC asks for exact reproduction. Set one of the two False."
        )


def _schedule(cfg: CfgNode) -> Problems:
    solver = cfg.SOLVER
    steps = list(solver.STEPS)
    if solver.LR_POLICY == "steps_with_relative_lrs":
        if steps[0] != 0 or steps != sorted(set(steps)):
            yield f"SOLVER.STEPS: {steps} is not allowed. Allowed: starts of stages, ascending, the first one 0."
        if len(steps) != len(solver.LRS):
            yield (
                f"SOLVER.LRS: {len(solver.LRS)} factor(s) {list(solver.LRS)} for {len(steps)} stage(s) of "
                f"SOLVER.STEPS {steps}. Give one factor per stage."
            )
    if solver.WARMUP_EPOCHS > 0:
        if solver.WARMUP_EPOCHS >= solver.MAX_EPOCH:
            yield (
                f"SOLVER.WARMUP_EPOCHS: {solver.WARMUP_EPOCHS:g} leaves nothing of SOLVER.MAX_EPOCH "
                f"{solver.MAX_EPOCH} (both count in {cfg.RUNNER.SCHEDULE_UNIT}s). Use a smaller value; 0 is no warm-up."
            )
        if solver.WARMUP_START_LR > solver.BASE_LR:
            yield (
                f"SOLVER.WARMUP_START_LR: {solver.WARMUP_START_LR:g} is above SOLVER.BASE_LR {solver.BASE_LR:g}, so "
                "the warm-up would go down. Use a smaller value."
            )
    if solver.LR_POLICY == "cosine" and solver.COSINE_END_LR > solver.BASE_LR:
        yield (
            f"SOLVER.COSINE_END_LR: {solver.COSINE_END_LR:g} is above SOLVER.BASE_LR {solver.BASE_LR:g}. "
            "Use a smaller value; 0 is usual."
        )
    if solver.LR_POLICY == "plateau" and cfg.CORPUS.VAL and cfg.TRAIN.EVAL_PERIOD != 1:
        yield (
            f"TRAIN.EVAL_PERIOD: {cfg.TRAIN.EVAL_PERIOD} with SOLVER.LR_POLICY plateau, which needs the validation "
            "loss of every epoch. Set it to 1."
        )


def _optimizer(cfg: CfgNode) -> Problems:
    solver = cfg.SOLVER
    if solver.OPTIMIZING_METHOD == "sgd" and solver.NESTEROV and (solver.MOMENTUM == 0 or solver.DAMPENING != 0):
        yield (
            f"SOLVER.NESTEROV: True needs MOMENTUM > 0 and DAMPENING 0; they are {solver.MOMENTUM:g} and "
            f"{solver.DAMPENING:g}. Set SOLVER.NESTEROV False, or change those."
        )
    if solver.CLIP_GRAD_VAL > 0 and solver.CLIP_GRAD_L2NORM > 0:
        yield (
            f"SOLVER.CLIP_GRAD_VAL: {solver.CLIP_GRAD_VAL:g} together with CLIP_GRAD_L2NORM "
            f"{solver.CLIP_GRAD_L2NORM:g}; only one kind of clipping can act. Set one of them to 0."
        )


def _views(cfg: CfgNode) -> Problems:
    data, corpus = cfg.DATA, cfg.CORPUS
    low, high = data.TRAIN_JITTER_SCALES
    if low > high:
        yield f"DATA.TRAIN_JITTER_SCALES: [{low}, {high}] is not allowed. Allowed: [smallest, largest]."
    if low < data.TRAIN_CROP_SIZE:
        yield (
            f"DATA.TRAIN_JITTER_SCALES: a short side of {low} is smaller than DATA.TRAIN_CROP_SIZE "
            f"{data.TRAIN_CROP_SIZE}. Use scales of at least the crop."
        )
    if 0 < corpus.TEST_SCALE < data.TEST_CROP_SIZE:
        yield (
            f"CORPUS.TEST_SCALE: {corpus.TEST_SCALE} is smaller than DATA.TEST_CROP_SIZE {data.TEST_CROP_SIZE}. "
            "Use at least the crop, or 0 for the crop itself."
        )
    two_streams = cfg.MODEL.MODEL_NAME in TWO_STREAM_NETWORKS  # of their modality student_problems speaks
    channels = 3 if cfg.NETWORK.MODALITY == "rgb" or two_streams else 2
    for key in ("MEAN", "STD"):
        if len(data[key]) != channels:
            yield (
                f"DATA.{key}: {data[key]} has {len(data[key])} entries, but NETWORK.MODALITY {cfg.NETWORK.MODALITY} "
                f"has {channels} channels. Give one entry for each."
            )
    if corpus.DENSE_STRIDE != 1 and corpus.TEST_CLIPS != "dense":
        yield f"CORPUS.DENSE_STRIDE: {corpus.DENSE_STRIDE} is only read with CORPUS.TEST_CLIPS dense. Set that, or 1."


def _initialisation(cfg: CfgNode) -> Problems:
    init = cfg.INIT
    if init.INFLATE_FROM:
        yield from inflation_problems(cfg)
        if cfg.TRAIN.CHECKPOINT_FILE_PATH:
            yield (
                f"TRAIN.CHECKPOINT_FILE_PATH: {cfg.TRAIN.CHECKPOINT_FILE_PATH} would overwrite the weights that "
                "INIT.INFLATE_FROM inflates. Leave one of the two empty."
            )
    elif init.INFLATE_WEIGHTS:
        yield f"INIT.INFLATE_WEIGHTS: {shown(init.INFLATE_WEIGHTS)} has no network. Set INIT.INFLATE_FROM as well."
    yield from part_problems(cfg)
    if init.TRAINABLE == "classifier" and cfg.ACTION.LOSS_WEIGHT == 0:
        yield (
            "INIT.TRAINABLE: classifier trains the last layer on labels, but ACTION.LOSS_WEIGHT is 0. "
            "Set ACTION.LOSS_WEIGHT 1.0, or INIT.TRAINABLE all."
        )


def _purpose(cfg: CfgNode) -> Problems:
    active = {name: entry for name, entry in cfg.DISTILL.TEACHERS.items() if entry.LOSS_WEIGHT > 0}
    if not (cfg.TRAIN.ENABLE or cfg.TEST.ENABLE):
        yield "TRAIN.ENABLE: False, and TEST.ENABLE is False too, so there is nothing to do. Set one of them True."
    if cfg.MODEL.MODEL_NAME == PERSON_RPN:  # detection_problems speaks of it
        return
    if cfg.TRAIN.ENABLE and not active and cfg.ACTION.LOSS_WEIGHT == 0:
        yield (
            "DISTILL.TEACHERS: no teacher with LOSS_WEIGHT > 0, and ACTION.LOSS_WEIGHT is 0, so there is nothing to "
            "learn. Name a teacher, or set ACTION.LOSS_WEIGHT 1.0 for labelled corpora."
        )
    own = any(entry.HEAD == "own" and entry.LAYER == "logits" for entry in active.values())
    if cfg.TEST.ENABLE and cfg.TRAIN.ENABLE and cfg.ACTION.LOSS_WEIGHT == 0 and not own:
        yield (
            "TEST.ENABLE: True, but nothing trains a classifier (ACTION.LOSS_WEIGHT is 0 and no teacher has HEAD own). "
            "Set TEST.ENABLE False; fine-tune and test with another configuration."
        )


def _corpora(cfg: CfgNode) -> Problems:
    if cfg.DETECTION.ENABLE:  # keyframe_problems speaks of it
        return
    listed = cfg.DATA.PATH_TO_DATA_DIR
    for use, wanted in (("TRAIN", cfg.TRAIN.ENABLE), ("TEST", cfg.TEST.ENABLE)):
        if wanted and not cfg.CORPUS[use] and not listed:
            yield (
                f"CORPUS.{use}: empty, but {use}.ENABLE is True. Add one (CORPUS.{use}.NAME.PATH, .FORMAT), set "
                f"DATA.PATH_TO_DATA_DIR to a folder with {use.lower()}.csv, or set {use}.ENABLE False."
            )
    named = [use for use in ("TRAIN", "VAL", "TEST") if cfg.CORPUS[use]]
    if listed and named:
        yield (
            f"DATA.PATH_TO_DATA_DIR: {shown(listed)} is only read when CORPUS names no corpora, but "
            f"CORPUS.{named[0]} does. Leave one of the two empty."
        )
    for use in named:
        for name, entry in cfg.CORPUS[use].items():
            yield from _corpus(f"CORPUS.{use}.{name}", entry, needs_labels=_needs_labels(cfg, use))
        weights = {name: entry.WEIGHT for name, entry in cfg.CORPUS[use].items()}
        if -1 in weights.values() and set(weights.values()) != {-1}:
            yield f"CORPUS.{use}: WEIGHT -1 (by size) cannot be mixed with others ({weights}). Use it for all or none."
        if len({bool(entry.LABELED) for entry in cfg.CORPUS[use].values()}) == 2:
            yield f"CORPUS.{use}: labelled and unlabelled corpora cannot be mixed. Set LABELED alike for all of them."


def _needs_labels(cfg: CfgNode, use: str) -> str:
    """The key that makes labels necessary; empty when they are not."""
    if use == "TEST":
        return "TEST.ENABLE" if cfg.TEST.ENABLE else ""
    return "ACTION.LOSS_WEIGHT" if cfg.ACTION.LOSS_WEIGHT > 0 and cfg.TRAIN.ENABLE else ""


def _corpus(where: str, entry: CfgNode, needs_labels: str) -> Problems:
    if needs_labels and not entry.LABELED:
        yield f"{where}.LABELED: False, but {needs_labels} needs labels. Set it True for a labelled corpus."
    if entry.LABELED and entry.FORMAT == "list":
        yield f"{where}.FORMAT: list has no labels. Use csv with rows of 'path label', or set LABELED False."
    for key in _MEANINGLESS.get(entry.FORMAT, ()):
        if entry[key]:
            yield f"{where}.{key}: {entry[key]!r} has no meaning for FORMAT {entry.FORMAT}. Leave it empty."
    if entry.FORMAT in ("ucf101", "hmdb51") and entry.SUBSET not in ("", "train", "test"):
        yield f"{where}.SUBSET: {entry.SUBSET!r} is not allowed. Allowed: train, test, or empty (by use)."


_CHECKS: tuple[tuple[Callable[[CfgNode], Problems], tuple[str, ...]], ...] = (
    (_machines, ("NUM_", "SHARD_ID", "TRAIN.BATCH_SIZE", "TEST.BATCH_SIZE", "RUNNER.ACCUMULATE", "RUNNER.CPU_RANKS")),
    (precision_problems, ("NUM_GPUS", "RUNNER.", "TRAIN.MIXED_PRECISION")),
    (_hardware, ("NUM_GPUS", "RUNNER.", "BN.NORM_TYPE")),
    (_schedule, ("SOLVER.", "TRAIN.EVAL_PERIOD", "RUNNER.SCHEDULE_UNIT")),
    (_optimizer, ("SOLVER.",)),
    (_views, ("DATA.", "MODEL.MODEL_NAME", "NETWORK.MODALITY", "CORPUS.TEST_", "CORPUS.DENSE_STRIDE")),
    (student_problems, ("MODEL.", "RESNET.", "NETWORK.")),
    (flow_problems, ("FLOW.",)),
    (layer_problems, ("MODEL.", "NETWORK.", "RUNNER.", "NUM_GPUS", "TRAIN.ENABLE", "BN.NORM_TYPE")),
    (norm_problems, ("MODEL.FROZEN_BN", "BN.", "INIT.", "TRAIN.")),
    (_initialisation, ("MODEL.", "INIT.", "ACTION.", "NETWORK.AFFINE_NORM", "TRAIN.CHECKPOINT_FILE_PATH")),
    (head_problems, ("INIT.TRAINABLE", "ACTION.", "DISTILL.")),
    (_purpose, ("MODEL.MODEL_NAME", "TRAIN.ENABLE", "TEST.ENABLE", "ACTION.", "DISTILL.")),
    (_corpora, ("CORPUS.", "ACTION.", "TRAIN.ENABLE", "TEST.ENABLE", "DATA.PATH_TO_DATA_DIR")),
    (teacher_problems, ("DISTILL.TEACHERS", "MODEL.NUM_CLASSES", "DATA.NUM_FRAMES", "SOLVER.MAX_EPOCH")),
    (gate_problems, ("DISTILL.",)),
    (keyframe_problems, (*KEYFRAME_KEYS, "ROI.PROPOSALS", "DISTILL.")),
    (detection_problems, ("MODEL.MODEL_NAME", "DETECTION.", "ROI.", "RPN.", "ACTION.", "DISTILL.")),
    (grid_problems, ("DISTILL.", "DATA.")),
)
"""Each rule over several keys, with the (starts of) keys that must be right alone before it is asked."""
