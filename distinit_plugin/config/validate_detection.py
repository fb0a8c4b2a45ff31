"""Rules over the keys of networks that classify persons' boxes."""

from __future__ import annotations

from collections.abc import Iterator

from distinit_plugin.config.node import CfgNode
from distinit_plugin.config.rules import BOX_LOSS, PERSON_RPN
from distinit_plugin.errors import shown

Problems = Iterator[str]

RANDOM = ("", "random")
"""Values of RPN.WEIGHTS that ask for random weights."""


def detection_problems(cfg: CfgNode) -> Problems:
    """What DETECTION.ENABLE demands of the loss, the boxes and the teachers."""
    if cfg.MODEL.MODEL_NAME == PERSON_RPN:
        yield from _person_rpn(cfg)
        return
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
    if cfg.ROI.PROPOSALS == "rpn" and cfg.RPN.WEIGHTS in RANDOM:
        yield (
            "RPN.WEIGHTS: empty, but ROI.PROPOSALS is rpn, which is not trained here. Name a file of distinit "
            "train-rpn, of a Faster R-CNN of torchvision, or its tag (COCO_V1)."
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


def _person_rpn(cfg: CfgNode) -> Problems:
    """A network that finds persons learns nothing but that."""
    if not cfg.DETECTION.ENABLE:
        yield f"DETECTION.ENABLE: False, but {PERSON_RPN} is trained on boxes in keyframes. Set it True."
    if cfg.ACTION.LOSS_WEIGHT or any(entry.LOSS_WEIGHT > 0 for entry in cfg.DISTILL.TEACHERS.values()):
        yield (
            f"ACTION.LOSS_WEIGHT: {cfg.ACTION.LOSS_WEIGHT:g}, or a teacher in DISTILL.TEACHERS, but {PERSON_RPN} has "
            "no classes and no layers. Set it 0.0, and name no teacher."
        )
    if cfg.ROI.PROPOSALS != "given" or cfg.KEYFRAMES.TEST_BOXES != "ground_truth":
        yield (
            f"KEYFRAMES.TEST_BOXES: {shown(cfg.KEYFRAMES.TEST_BOXES)} with ROI.PROPOSALS {cfg.ROI.PROPOSALS}, but what "
            f"{PERSON_RPN} finds is compared with annotated boxes. Set them ground_truth and given."
        )
    if cfg.RPN.FROZEN_NORM and cfg.TRAIN.ENABLE and cfg.RPN.WEIGHTS in RANDOM and not cfg.TRAIN.CHECKPOINT_FILE_PATH:
        yield (
            "RPN.FROZEN_NORM: True, but RPN.WEIGHTS is empty: random weights need batch normalisation that learns. Set "
            "it False, or name weights."
        )
    if cfg.SOLVER.LR_POLICY == "plateau":
        yield "SOLVER.LR_POLICY: plateau is not for proposals. Use steps_with_relative_lrs or cosine."
