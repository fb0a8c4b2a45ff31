"""What a configuration means in PySlowFast: what follows from it, what is refused, and what is left out."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch

from distinit_plugin import build
from distinit_plugin.config.defaults import get_cfg
from distinit_plugin.config.node import CfgNode, leaf_keys, same_value, value_at
from distinit_plugin.config.pyslowfast_keys import PYSLOWFAST_DEFAULTS
from distinit_plugin.config.theirs import PREFIX, is_architecture
from distinit_plugin.config.validate import problems_of
from distinit_plugin.errors import ConfigError
from distinit_plugin.hosts.slowfast.networks import ACTIVATIONS, ARCH, is_own
from distinit_plugin.hosts.slowfast.schema import OWN_NODES, own_cfg
from distinit_plugin.hosts.slowfast.settling_boxes import (
    KEYFRAMES,
    NODES,
    box_problems,
    ignored_rules,
    reads_keyframes,
    settle_boxes,
)
from distinit_plugin.hosts.slowfast.traps import traps

LOSS = "distinit"
"""MODEL.LOSS_FUNC where DISTILL and ACTION say what the loss is."""

DATASET = "distinitcorpus"
"""TRAIN.DATASET and TEST.DATASET of CORPUS."""

HONOURED = ("RUNNER.CLIPS_PER_EPOCH", "RUNNER.CPU_RANKS", "RUNNER.SCHEDULE_UNIT")
"""Keys of RUNNER that mean something in PySlowFast."""

READ_HERE = ("DATA.MEAN", "DATA.STD", "DATA.TRAIN_JITTER_SCALES", "TEST.NUM_SPATIAL_CROPS")
"""Keys of PySlowFast that this package's datasets read by rules of their own."""

READ_THERE = ("DATA.DECODING_BACKEND", "DATA.ENSEMBLE_METHOD", "DATA.MULTI_LABEL")
"""Keys of DATA that this package lacks, and that are honoured, refused or without effect beside its datasets."""

HONOURED_ARCHITECTURE = ("MODEL.ARCH", "MODEL.HEAD_ACT", "MODEL.SINGLE_PATHWAY_ARCH", "DATA.REVERSE_INPUT_CHANNEL")
"""Keys about PySlowFast's networks that are set or refused with one of this package."""

logger = logging.getLogger(__name__)


def has_terms(cfg: CfgNode) -> bool:
    """Whether DISTILL or ACTION say what the loss is; else it is PySlowFast's MODEL.LOSS_FUNC."""
    return cfg.ACTION.LOSS_WEIGHT > 0 or any(entry.LOSS_WEIGHT > 0 for entry in cfg.DISTILL.TEACHERS.values())


def reads_corpora(cfg: CfgNode) -> bool:
    """Whether videos come from CORPUS and the teachers' views with them; else they are PySlowFast's datasets."""
    return has_terms(cfg) or any(cfg.CORPUS[use] for use in ("TRAIN", "VAL", "TEST"))


def can_classify(cfg: CfgNode, split: Any) -> bool:
    """Whether there are videos for a use, and a classifier that something trains."""
    return _trains_classifier(cfg) and build.has_corpus(cfg, split)


def can_validate(cfg: Any) -> bool:
    """The same for the validation of a configuration of PySlowFast, whose own datasets always have videos for it."""
    own = own_cfg(cfg)
    return can_classify(own, "val") if cfg.TRAIN.DATASET == DATASET else _trains_classifier(own)


def _trains_classifier(cfg: CfgNode) -> bool:
    return not has_terms(cfg) or build.needs_own_logits(cfg)


def settle(cfg: Any) -> None:
    """Fill in what follows from a configuration of PySlowFast with this package's nodes.

    Raises:
        ConfigError: Everything in it that cannot be done there, one sentence each.
    """
    cfg.MODEL.MODEL_NAME = cfg.MODEL.MODEL_NAME.removeprefix(PREFIX)  # it is there under its own name
    own = own_cfg(cfg)
    terms = has_terms(own)
    keyframes = reads_keyframes(cfg)
    own_corpora = keyframes or reads_corpora(own)
    problems = [*traps(cfg), *_rank_problems(cfg, own), *box_problems(cfg, own, terms)]
    if own_corpora or is_own(cfg.MODEL.MODEL_NAME):
        read = (*OWN_NODES, *(NODES if keyframes else ()), *(READ_HERE if own_corpora else ()))
        problems += _own_problems(own, read, terms)
        problems += _not_there(cfg, own)
    if own_corpora:
        problems += _data_problems(cfg, KEYFRAMES if keyframes else DATASET)
    elif own.RUNNER.SCHEDULE_UNIT == "step" and cfg.TRAIN.ENABLE:
        problems.append(
            "RUNNER.SCHEDULE_UNIT: step, but with datasets of PySlowFast all lengths are epochs. Set it to epoch, and "
            "SOLVER.MAX_EPOCH, STEPS and WARMUP_EPOCHS in epochs."
        )
    if problems:
        raise ConfigError(problems)
    if own_corpora:
        cfg.TRAIN.DATASET = cfg.TEST.DATASET = DATASET
    settle_boxes(cfg, own, terms)
    if terms:
        cfg.MODEL.LOSS_FUNC = LOSS
    if cfg.BN.WEIGHT_DECAY == -1:  # here that of all other weights, there a number like any
        cfg.BN.WEIGHT_DECAY = cfg.SOLVER.WEIGHT_DECAY
    if own_corpora and own.RUNNER.SCHEDULE_UNIT == "step":
        _count_in_epochs(cfg, own)
    if is_own(cfg.MODEL.MODEL_NAME):
        cfg.MODEL.ARCH = ARCH
        if ARCH not in cfg.MODEL.SINGLE_PATHWAY_ARCH:
            cfg.MODEL.SINGLE_PATHWAY_ARCH = [*cfg.MODEL.SINGLE_PATHWAY_ARCH, ARCH]
        # PySlowFast counts operations on three channels of one pathway.
        cfg.LOG_MODEL_INFO = cfg.LOG_MODEL_INFO and list(build.input_spec(own).view_specs("train")) == ["rgb"]
        cfg.LOG_MODEL_INFO = cfg.LOG_MODEL_INFO and cfg.MODEL.MODEL_NAME not in ("TwoStream", "Fused3D")
    if ignored := _ignored(cfg, own, own_corpora):
        logger.warning("distinit slowfast does not honour what is set: %s", ", ".join(ignored))


def _own_problems(own: CfgNode, read: Collection[str], terms: bool) -> list[str]:
    """What this package's rules say of some nodes and keys; without terms MODEL.LOSS_FUNC is what is learned."""
    keys = {problem: problem.partition(":")[0] for problem in problems_of(own)}
    found = [problem for problem, key in keys.items() if key in read or key.split(".")[0] in read]
    about_terms = ("ACTION.LOSS", "DISTILL.TEACHERS: no teacher")
    return [problem for problem in found if terms or not problem.startswith(about_terms)]


def _count_in_epochs(cfg: Any, own: CfgNode) -> None:
    """Lengths in steps as PySlowFast counts them; a last epoch that is not whole becomes a whole one."""
    if not cfg.TRAIN.ENABLE:
        return
    steps = build.build_train_sampler(own, build.build_records(own, "train"), all_ranks=True).steps_per_epoch
    solver = cfg.SOLVER
    logger.warning("SOLVER's %d steps are %.2f epochs of %d", solver.MAX_EPOCH, solver.MAX_EPOCH / steps, steps)
    solver.MAX_EPOCH = math.ceil(solver.MAX_EPOCH / steps)
    solver.STEPS = [start / steps for start in solver.STEPS]
    solver.WARMUP_EPOCHS = solver.WARMUP_EPOCHS / steps
    for entry in cfg.DISTILL.TEACHERS.values():
        entry.WARMUP = entry.WARMUP / steps
    cfg.RUNNER.SCHEDULE_UNIT = "epoch"


def unhonoured(own: CfgNode) -> list[str]:
    """Keys of RUNNER that differ from their default and mean nothing in PySlowFast."""
    defaults = get_cfg().RUNNER
    keys = [key for key in leaf_keys(own.RUNNER) if own.RUNNER[key] != defaults[key]]
    return [f"RUNNER.{key}" for key in keys if f"RUNNER.{key}" not in HONOURED]


def _ignored(cfg: Any, own: CfgNode, own_corpora: bool) -> list[str]:
    """Keys that are set and mean nothing there."""
    found = [*unhonoured(own), *ignored_rules(own)]
    if own_corpora:
        found += _other_than_theirs(cfg, _is_of_their_datasets)
        found += [f"CORPUS.{key}" for key in _other_than_default(own, "CORPUS") if key == "MAX_BAD_FRACTION"]
    if is_own(cfg.MODEL.MODEL_NAME):
        return found + _other_than_theirs(cfg, _is_of_their_networks)
    return found + [f"NETWORK.{key}" for key in _other_than_default(own, "NETWORK") if key != "MODALITY"]


def _other_than_theirs(cfg: Any, belongs: Callable[[str], bool]) -> list[str]:
    """Those keys that have another value than PySlowFast's default."""
    keys = [key for key in PYSLOWFAST_DEFAULTS if belongs(key)]
    return [key for key in keys if not same_value(value_at(cfg, key), PYSLOWFAST_DEFAULTS[key])]


def _is_of_their_datasets(key: str) -> bool:
    node, _, name = key.partition(".")
    return node == "DATA" and name not in get_cfg().DATA and key not in READ_THERE and not is_architecture(key)


def _is_of_their_networks(key: str) -> bool:
    return is_architecture(key) and key not in HONOURED_ARCHITECTURE


def _other_than_default(own: CfgNode, node: str) -> list[str]:
    """Keys of a node of this package whose values are not the defaults."""
    return [key for key, default in get_cfg()[node].items() if own[node][key] != default]


def _rank_problems(cfg: Any, own: CfgNode) -> Iterator[str]:
    """Several processes on a CPU, of which PySlowFast's own checks know nothing."""
    ranks = int(own.RUNNER.CPU_RANKS)
    if cfg.NUM_GPUS or ranks <= 1:
        return
    if torch.cuda.is_available():
        yield f"RUNNER.CPU_RANKS: {ranks}, but there is a GPU here. Hide it (CUDA_VISIBLE_DEVICES empty), or set it 1."
    for use in ("TRAIN", "TEST"):
        settled = use == "TEST" and cfg.DETECTION.ENABLE
        if cfg[use].ENABLE and not settled and cfg[use].BATCH_SIZE % ranks:
            yield (
                f"{use}.BATCH_SIZE: {cfg[use].BATCH_SIZE} clips cannot be shared by {ranks} processes "
                f"(RUNNER.CPU_RANKS). Use a multiple of {ranks}."
            )


def _network_problems(cfg: Any, own: CfgNode) -> Iterator[str]:
    """Keys about networks that would change a result, and that the one of MODEL.MODEL_NAME does not read."""
    name = cfg.MODEL.MODEL_NAME
    if not is_own(name):
        for key in _other_than_default(own, "INIT"):
            if key != "TRAINABLE":
                yield (
                    f"INIT.{key}: {own.INIT[key]!r} is for networks of this package, and {name} is PySlowFast's. Leave "
                    "it empty; TRAIN.CHECKPOINT_FILE_PATH names weights for either."
                )
        return
    if cfg.MODEL.HEAD_ACT not in ACTIVATIONS:
        yield f"MODEL.HEAD_ACT: {cfg.MODEL.HEAD_ACT} is not allowed. Allowed: {', '.join(ACTIVATIONS)}."
    if cfg.BN.NORM_TYPE not in ("batchnorm", "sync_batchnorm_apex"):
        yield f"BN.NORM_TYPE: {cfg.BN.NORM_TYPE} is of PySlowFast's networks, not of {name}. Set it to batchnorm."
    if cfg.DATA.REVERSE_INPUT_CHANNEL:
        yield f"DATA.REVERSE_INPUT_CHANNEL: True, but {name} sees red, green and blue in this order. Set it False."


def _not_there(cfg: Any, own: CfgNode) -> Iterator[str]:
    """What this package's own runner does and PySlowFast's loop cannot."""
    yield from _network_problems(cfg, own)
    if own.DISTILL.GATE == "skip":
        yield "DISTILL.GATE: skip is not possible in PySlowFast, whose student has run by then. Set it to weight."
    if own.INIT.TRAINABLE != "all":
        yield f"INIT.TRAINABLE: {own.INIT.TRAINABLE} is not possible in PySlowFast. Set it to all, or use distinit run."
    if cfg.SOLVER.LR_POLICY == "plateau":
        yield "SOLVER.LR_POLICY: PySlowFast has no plateau. Use cosine or steps_with_relative_lrs."
    if own.CORPUS.TEST_CLIPS != "uniform":
        yield f"CORPUS.TEST_CLIPS: {own.CORPUS.TEST_CLIPS} is not possible in PySlowFast. Set it to uniform."
    if has_terms(own) and cfg.MODEL.DETACH_FINAL_FC:
        yield "MODEL.DETACH_FINAL_FC: it cannot go with terms of DISTILL and ACTION. Set it False."
    if has_terms(own) and (cfg.TASK or cfg.MASK.ENABLE):
        yield "TASK, MASK.ENABLE: PySlowFast's other tasks cannot go with terms of DISTILL and ACTION. Leave them out."


def _data_problems(cfg: Any, dataset: str) -> Iterator[str]:
    """What PySlowFast's own datasets do and ``dataset`` does not."""
    for use in ("TRAIN", "TEST"):
        if cfg[use].DATASET not in ("kinetics", dataset):
            yield (
                f"{use}.DATASET: {cfg[use].DATASET} is a dataset of PySlowFast, but the loss or the corpora are of "
                "DISTILL, ACTION, CORPUS or KEYFRAMES, which read videos by themselves. Leave it at kinetics."
            )
    clips = (cfg.AUG.NUM_SAMPLE, cfg.DATA.TRAIN_CROP_NUM_TEMPORAL, cfg.DATA.TRAIN_CROP_NUM_SPATIAL)
    if cfg.AUG.ENABLE or max(clips) > 1:
        yield (
            "AUG.ENABLE: AUG and several crops of a clip are augmentations of PySlowFast's datasets, which CORPUS does "
            "not do. Set AUG.ENABLE False, AUG.NUM_SAMPLE, DATA.TRAIN_CROP_NUM_TEMPORAL and _SPATIAL 1."
        )
    if cfg.MULTIGRID.SHORT_CYCLE or cfg.MULTIGRID.LONG_CYCLE or cfg.MIXUP.ENABLE or cfg.DATA.MULTI_LABEL:
        yield "MULTIGRID, MIXUP.ENABLE, DATA.MULTI_LABEL: they need PySlowFast's own datasets. Switch them off."
