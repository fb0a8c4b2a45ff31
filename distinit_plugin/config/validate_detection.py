"""Rules over the keys of networks that classify persons' boxes."""

from __future__ import annotations

from collections.abc import Iterator

from distinit_plugin.config.node import CfgNode
from distinit_plugin.config.rules import BOX_LOSS

Problems = Iterator[str]


def detection_problems(cfg: CfgNode) -> Problems:
    """What DETECTION.ENABLE demands of the loss, the boxes and the teachers."""
    boxes = cfg.DETECTION.ENABLE
    if not boxes:
        if cfg.ACTION.LOSS == BOX_LOSS and cfg.ACTION.LOSS_WEIGHT > 0:
            yield "ACTION.LOSS: bce is for the actions of boxes, but DETECTION.ENABLE is False. Use cross_entropy."
        return
    if cfg.ACTION.LOSS != BOX_LOSS or cfg.ACTION.LOSS_WEIGHT == 0:
        yield (
            f"ACTION.LOSS: {cfg.ACTION.LOSS} with LOSS_WEIGHT {cfg.ACTION.LOSS_WEIGHT:g}, but a person does several "
            "things at once (DETECTION.ENABLE True). Set ACTION.LOSS bce and ACTION.LOSS_WEIGHT 1.0."
        )
    if cfg.ROI.REFINE_BOXES and cfg.ROI.PROPOSALS == "given":
        yield (
            "ROI.REFINE_BOXES: True, but with ROI.PROPOSALS given the boxes of the training are the annotated ones, "
            "which leave nothing to correct. Set it False, or ROI.PROPOSALS rpn or own."
        )
    if cfg.SOLVER.LR_POLICY == "plateau":
        yield (
            "SOLVER.LR_POLICY: plateau listens to the loss of a validation, but one of boxes has a mAP and no loss "
            "(DETECTION.ENABLE True). Use steps_with_relative_lrs or cosine."
        )
    if cfg.DISTILL.GATE == "skip":
        yield "DISTILL.GATE: skip leaves clips out, but not their boxes (DETECTION.ENABLE True). Use weight."
    for name, entry in cfg.DISTILL.TEACHERS.items():
        if entry.LOSS_WEIGHT > 0 and entry.HEAD == "own" and entry.LAYER == "logits":
            yield (
                f"DISTILL.TEACHERS.{name}.HEAD: own compares the teacher's logits with the student's, which are of "
                "boxes here (DETECTION.ENABLE True). Use linear."
            )
        if entry.LOSS_WEIGHT > 0 and entry.CACHE:
            yield (
                f"DISTILL.TEACHERS.{name}.CACHE: {entry.CACHE}, but targets are cached for clips of whole videos, not "
                "of keyframes (DETECTION.ENABLE True). Leave it empty."
            )
