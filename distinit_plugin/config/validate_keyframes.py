"""Rules over the keys that say where keyframes, boxes and their pictures come from."""

from __future__ import annotations

from collections.abc import Iterator

from distinit_plugin.config.node import CfgNode
from distinit_plugin.errors import shown

Problems = Iterator[str]

KEYFRAME_KEYS = ("DETECTION.ENABLE", "AVA.", "KEYFRAMES.", "CORPUS.", "DATA.PATH_TO_DATA_DIR", "TRAIN.", "TEST.")
"""What ``keyframe_problems`` reads, but for proposals and teachers."""


def keyframe_problems(cfg: CfgNode) -> Problems:
    """What is wrong with the keyframes of a configuration; without DETECTION.ENABLE there are none."""
    if not cfg.DETECTION.ENABLE:
        for use in ("TRAIN", "TEST"):
            if cfg[use].DATASET.lower() == "ava":
                yield (
                    f"{use}.DATASET: ava is a set of boxes in keyframes, but DETECTION.ENABLE is False. Set that True, "
                    f"or {use}.DATASET kinetics (the default)."
                )
        return
    yield from _places(cfg)
    yield from _boxes(cfg)
    yield from _without_effect(cfg)


def _places(cfg: CfgNode) -> Problems:
    videos, frames = cfg.KEYFRAMES.VIDEO_DIR, cfg.AVA.FRAME_DIR
    if not cfg.AVA.ANNOTATION_DIR:
        yield "AVA.ANNOTATION_DIR: empty, but DETECTION.ENABLE is True. Name the folder of the csv files."
    if not (videos or frames):
        yield (
            "KEYFRAMES.VIDEO_DIR: empty, and AVA.FRAME_DIR is empty too, so there are no pictures. Name the folder of "
            "the videos, or that of extracted frames."
        )
    if videos and frames:
        yield (
            f"KEYFRAMES.VIDEO_DIR: {shown(videos)}, but AVA.FRAME_DIR is {shown(frames)}: pictures come from "
            "videos or from extracted frames. Leave one of the two empty."
        )


def _boxes(cfg: CfgNode) -> Problems:
    ava, keyframes = cfg.AVA, cfg.KEYFRAMES
    first, last = keyframes.SECONDS
    if first > last:
        yield f"KEYFRAMES.SECONDS: [{first:g}, {last:g}] is not allowed. Allowed: [first, last]."
    if cfg.TRAIN.ENABLE and not (ava.TRAIN_GT_BOX_LISTS or ava.TRAIN_PREDICT_BOX_LISTS):
        yield (
            "AVA.TRAIN_GT_BOX_LISTS: empty, and AVA.TRAIN_PREDICT_BOX_LISTS is empty too, so there is nothing to learn "
            "from. Name a file of annotated boxes."
        )
    if keyframes.LABEL_IOU and not (ava.TRAIN_GT_BOX_LISTS and ava.TRAIN_PREDICT_BOX_LISTS):
        yield (
            f"KEYFRAMES.LABEL_IOU: {keyframes.LABEL_IOU:g} gives predicted boxes (AVA.TRAIN_PREDICT_BOX_LISTS) the "
            "actions of annotated ones (AVA.TRAIN_GT_BOX_LISTS), and one of the two lists is empty. Set it 0, or name "
            "both."
        )
    if not ava.GROUNDTRUTH_FILE:
        yield "AVA.GROUNDTRUTH_FILE: empty, but validation and test compare with it. Name the annotated boxes."
    if given_boxes(cfg) == "predicted" and not ava.TEST_PREDICT_BOX_LISTS:
        yield (
            "AVA.TEST_PREDICT_BOX_LISTS: empty, but KEYFRAMES.TEST_BOXES is predicted. Name a file of predicted boxes "
            "(distinit detect-persons writes one), or set KEYFRAMES.TEST_BOXES ground_truth, which flatters the result."
        )


def _without_effect(cfg: CfgNode) -> Problems:
    named = [f"CORPUS.{use}" for use in ("TRAIN", "VAL", "TEST") if cfg.CORPUS[use]]
    named += ["DATA.PATH_TO_DATA_DIR"] * bool(cfg.DATA.PATH_TO_DATA_DIR)
    for key in named:
        yield f"{key}: with DETECTION.ENABLE True the nodes AVA and KEYFRAMES say what is read. Leave it empty."
    if cfg.CORPUS.TEST_SCALE:
        yield (
            f"CORPUS.TEST_SCALE: {cfg.CORPUS.TEST_SCALE} has no effect with DETECTION.ENABLE True: tests show whole "
            "pictures whose short side is DATA.TEST_CROP_SIZE. Set it 0."
        )
    if cfg.CORPUS.TEST_CLIPS != "uniform":
        yield "CORPUS.TEST_CLIPS: with DETECTION.ENABLE True there is one clip for each keyframe. Set it uniform."
    if cfg.DISTILL.GRID.CLIPS:
        yield "DISTILL.GRID.CLIPS: with DETECTION.ENABLE True there is one clip for each keyframe. Set it 0."


def given_boxes(cfg: CfgNode) -> str:
    """The boxes that a validation or test is given: KEYFRAMES.TEST_BOXES, or ``none`` where the network proposes."""
    return cfg.KEYFRAMES.TEST_BOXES if cfg.ROI.PROPOSALS == "given" else "none"
