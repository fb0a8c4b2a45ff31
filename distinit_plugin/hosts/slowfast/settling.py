"""What a configuration means in PySlowFast: what follows from it, what is refused, and what is left out."""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Iterator
from typing import Any

from distinit_plugin import build
from distinit_plugin.config.defaults import get_cfg
from distinit_plugin.config.node import CfgNode, leaf_keys
from distinit_plugin.config.theirs import PREFIX
from distinit_plugin.config.validate import problems_of
from distinit_plugin.errors import ConfigError
from distinit_plugin.hosts.slowfast.networks import ARCH, is_own
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

HONOURED = ("RUNNER.CLIPS_PER_EPOCH", "RUNNER.CPU_RANKS")
"""Keys of RUNNER that mean something in PySlowFast."""

logger = logging.getLogger(__name__)


def has_terms(cfg: CfgNode) -> bool:
    """Whether DISTILL or ACTION say what the loss is; else it is PySlowFast's MODEL.LOSS_FUNC."""
    return cfg.ACTION.LOSS_WEIGHT > 0 or any(entry.LOSS_WEIGHT > 0 for entry in cfg.DISTILL.TEACHERS.values())


def reads_corpora(cfg: CfgNode) -> bool:
    """Whether videos come from CORPUS and the teachers' views with them; else they are PySlowFast's datasets."""
    return has_terms(cfg) or any(cfg.CORPUS[use] for use in ("TRAIN", "VAL", "TEST"))


def can_classify(cfg: CfgNode, split: Any) -> bool:
    """Whether there are videos for a use, and a classifier that something trains."""
    return (not has_terms(cfg) or build.needs_own_logits(cfg)) and build.has_corpus(cfg, split)


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
    problems = [*traps(cfg), *box_problems(cfg, own, terms)]
    if own_corpora or is_own(cfg.MODEL.MODEL_NAME):
        problems += _own_problems(own, (*OWN_NODES, *NODES) if keyframes else OWN_NODES, terms)
        problems += _not_there(cfg, own)
    if own_corpora:
        problems += _data_problems(cfg, KEYFRAMES if keyframes else DATASET)
    if problems:
        raise ConfigError(problems)
    if own_corpora:
        cfg.TRAIN.DATASET = cfg.TEST.DATASET = DATASET
    settle_boxes(cfg, own, terms)
    if terms:
        cfg.MODEL.LOSS_FUNC = LOSS
    if own_corpora and own.RUNNER.SCHEDULE_UNIT == "step":
        _count_in_epochs(cfg, own)
    if is_own(cfg.MODEL.MODEL_NAME):
        cfg.MODEL.ARCH = ARCH
        if ARCH not in cfg.MODEL.SINGLE_PATHWAY_ARCH:
            cfg.MODEL.SINGLE_PATHWAY_ARCH = [*cfg.MODEL.SINGLE_PATHWAY_ARCH, ARCH]
        # PySlowFast counts operations on three channels of one pathway.
        cfg.LOG_MODEL_INFO = cfg.LOG_MODEL_INFO and list(build.input_spec(own).view_specs("train")) == ["rgb"]
        cfg.LOG_MODEL_INFO = cfg.LOG_MODEL_INFO and cfg.MODEL.MODEL_NAME not in ("TwoStream", "Fused3D")
    ignored = [*unhonoured(own), *ignored_rules(own)]
    if ignored:
        logger.warning("PySlowFast's loop does not honour what is set: %s", ", ".join(ignored))


def _own_problems(own: CfgNode, nodes: Collection[str], terms: bool) -> list[str]:
    """What this package's rules say of some nodes; without terms MODEL.LOSS_FUNC is what is learned."""
    found = [problem for problem in problems_of(own) if problem.split(".")[0].split(":")[0] in nodes]
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


def _not_there(cfg: Any, own: CfgNode) -> Iterator[str]:
    """What this package's own runner does and PySlowFast's loop cannot."""
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
