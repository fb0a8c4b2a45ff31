"""What DETECTION.ENABLE means in PySlowFast: whose data are read, what is refused, and what follows."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

from distinit_plugin.config.defaults import get_cfg
from distinit_plugin.config.node import CfgNode
from distinit_plugin.config.rules import PERSON_RPN
from distinit_plugin.hosts.slowfast.networks import is_own

KEYFRAMES = "distinitava"
"""TRAIN.DATASET and TEST.DATASET of the nodes AVA and KEYFRAMES, as this package reads them."""

THEIR_SETS = "ava"
"""PySlowFast's own: extracted frames and their lists."""

THEIR_STRIDE = 16
"""Pixels of the view for each cell of its networks' last maps, as its configurations of AVA have them."""

NODES = ("AVA", "DETECTION")
"""Nodes of PySlowFast that this package's rules check, too, where it reads keyframes."""

THEIR_RULES = {"SCORE_FLOOR": 0.0, "MAX_DETECTIONS": 0, "EVALUATOR": "pyslowfast"}
"""Keys of ROI and what PySlowFast's evaluation does."""

logger = logging.getLogger(__name__)


def reads_keyframes(cfg: Any) -> bool:
    """Whether this package reads the boxes and their pictures: the datasets that are used are not all ``ava``."""
    used = [use for use in ("TRAIN", "TEST") if cfg[use].ENABLE]
    return bool(cfg.DETECTION.ENABLE) and any(cfg[use].DATASET.lower() != THEIR_SETS for use in used)


def box_problems(cfg: Any, own: CfgNode, terms: bool) -> Iterator[str]:
    """What this package's own runner does with boxes and PySlowFast's loop cannot; without DETECTION.ENABLE nothing.

    Args:
        cfg: PySlowFast's configuration.
        own: This package's view of it.
        terms: DISTILL or ACTION say what the loss is.
    """
    if not cfg.DETECTION.ENABLE:
        return
    if not reads_keyframes(cfg) and own.KEYFRAMES.VIDEO_DIR:
        yield (
            f"KEYFRAMES.VIDEO_DIR: {own.KEYFRAMES.VIDEO_DIR}, but TRAIN.DATASET ava, PySlowFast's own, reads extracted "
            f"frames alone. Set TRAIN.DATASET and TEST.DATASET {KEYFRAMES}, or leave it empty."
        )
    if cfg.MODEL.MODEL_NAME == PERSON_RPN:
        yield f"MODEL.MODEL_NAME: {PERSON_RPN} is not possible in PySlowFast. Use distinit train-rpn."
        return
    if cfg.BN.USE_PRECISE_STATS and not is_own(cfg.MODEL.MODEL_NAME):
        yield (
            "BN.USE_PRECISE_STATS: PySlowFast shows its network clips without boxes to measure them, at which its RoI "
            "head fails (DETECTION.ENABLE True). Set it False."
        )
    if own.ROI.PROPOSALS != "given":
        yield (
            f"ROI.PROPOSALS: {own.ROI.PROPOSALS} is not possible in PySlowFast, whose loader brings the boxes with the "
            "clips. Set it to given, with boxes in AVA.TEST_PREDICT_BOX_LISTS (distinit detect-persons finds them) and "
            "ROI.REFINE_BOXES False, or use distinit run."
        )
    ours = is_own(cfg.MODEL.MODEL_NAME)
    if (ours or reads_keyframes(cfg)) and not terms and cfg.MODEL.LOSS_FUNC != "bce":
        yield (
            f"MODEL.LOSS_FUNC: {cfg.MODEL.LOSS_FUNC}, but RoI heads give the probability of each action (DETECTION."
            "ENABLE True). Set it to bce, or ACTION.LOSS bce and ACTION.LOSS_WEIGHT 1.0."
        )
    if not ours and any(entry.LOSS_WEIGHT > 0 for entry in own.DISTILL.TEACHERS.values()):
        yield (
            "DISTILL.TEACHERS: on boxes they need a network of this package (DETECTION.ENABLE True); of PySlowFast's "
            f"own ones, {cfg.MODEL.MODEL_NAME} among them, no features of clips can be had. Name no teacher."
        )


def settle_boxes(cfg: Any, own: CfgNode, terms: bool) -> None:
    """Fill in what follows from DETECTION.ENABLE; arguments as ``box_problems``."""
    if not cfg.DETECTION.ENABLE:
        return
    ours = reads_keyframes(cfg)
    if ours:
        cfg.TRAIN.DATASET = cfg.TEST.DATASET = KEYFRAMES
    if terms or is_own(cfg.MODEL.MODEL_NAME):
        cfg.MODEL.HEAD_ACT = "sigmoid"  # what the loss of this package, and its networks, mean by a score
    if not is_own(cfg.MODEL.MODEL_NAME) and not cfg.DETECTION.SPATIAL_SCALE_FACTOR:
        cfg.DETECTION.SPATIAL_SCALE_FACTOR = THEIR_STRIDE
    # Pictures of a test may have any size, so that a process takes one at a time; PySlowFast asserts it on GPUs.
    processes = cfg.NUM_GPUS or int(own.RUNNER.CPU_RANKS)
    if processes != cfg.TEST.BATCH_SIZE and (ours or processes > 1):
        logger.warning("TEST.BATCH_SIZE: %d, one keyframe per process, instead of %d", processes, cfg.TEST.BATCH_SIZE)
        cfg.TEST.BATCH_SIZE = processes


def ignored_rules(own: CfgNode) -> list[str]:
    """Keys of a test of boxes that ask for something, and not for what PySlowFast's evaluation does."""
    if not own.DETECTION.ENABLE:
        return []
    defaults = get_cfg().ROI
    return [f"ROI.{key}" for key, theirs in THEIR_RULES.items() if own.ROI[key] not in (defaults[key], theirs)]
