"""Keyframes, their boxes and their pictures, from the nodes AVA and KEYFRAMES."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from functools import partial

from distinit_plugin.building.flow import build_stored_flow
from distinit_plugin.config.node import CfgNode
from distinit_plugin.config.validate_keyframes import given_boxes
from distinit_plugin.data.colour import ColourAugmentation
from distinit_plugin.data.keyframes import KeyframeDataset
from distinit_plugin.detection.files import read_boxes, read_excluded, read_frame_list, read_label_map, read_truth
from distinit_plugin.detection.joining import join
from distinit_plugin.detection.keyframes import Choice, Keyframes, evaluated_keyframes, training_keyframes
from distinit_plugin.detection.sources import FrameFiles, Sources, VideoFiles
from distinit_plugin.errors import UserError, naming
from distinit_plugin.types import Split, ViewSpec

logger = logging.getLogger(__name__)

VALIDATED_SECONDS = 4
"""A validation in training takes the seconds that this divides, as PySlowFast does."""


def build_keyframes(cfg: CfgNode, split: Split) -> Keyframes:
    """The keyframes of a use; what is odd about them is named in the log.

    Raises:
        UserError: A file is missing or wrong, or no keyframe is left.
    """
    keyframes = _training(cfg) if split == "train" else _evaluated(cfg, split)
    for note in keyframes.notes:
        logger.warning("%s: %s", keyframes.name, note)
    return keyframes


def _training(cfg: CfgNode) -> Keyframes:
    ava, keys = cfg.AVA, cfg.KEYFRAMES
    first, last = keys.SECONDS
    with naming("AVA.TRAIN_GT_BOX_LISTS"):
        truth = [read_truth(annotation(cfg, name)) for name in ava.TRAIN_GT_BOX_LISTS]
    with naming("AVA.TRAIN_PREDICT_BOX_LISTS"):
        predicted = [read_boxes(annotation(cfg, name)) for name in ava.TRAIN_PREDICT_BOX_LISTS]
    return training_keyframes(
        ", ".join([*ava.TRAIN_GT_BOX_LISTS, *ava.TRAIN_PREDICT_BOX_LISTS]),
        truth,
        predicted,
        build_sources(cfg, "train"),
        choice=Choice(first, last),
        least_score=ava.DETECTION_SCORE_THRESH,
        label_iou=keys.LABEL_IOU,
        class_names=class_names(cfg),
    )


def _evaluated(cfg: CfgNode, split: Split) -> Keyframes:
    ava = cfg.AVA
    first, last = cfg.KEYFRAMES.SECONDS
    excluded: set[tuple[str, float]] = set()
    if ava.EXCLUSION_FILE:
        with naming("AVA.EXCLUSION_FILE"):
            excluded = read_excluded(annotation(cfg, ava.EXCLUSION_FILE))
    every = VALIDATED_SECONDS if split == "val" and not ava.FULL_TEST_ON_VAL else 0
    evaluated = partial(
        evaluated_keyframes,
        sources=build_sources(cfg, split),
        choice=Choice(first, last, every, excluded),
        least_score=ava.DETECTION_SCORE_THRESH,
        class_names=class_names(cfg),
    )
    boxes = given_boxes(cfg)
    if boxes == "predicted":
        with naming("AVA.TEST_PREDICT_BOX_LISTS"):
            table = join([read_boxes(annotation(cfg, name)) for name in ava.TEST_PREDICT_BOX_LISTS])
        return evaluated(", ".join(ava.TEST_PREDICT_BOX_LISTS), table, boxes="predicted")
    with naming("AVA.GROUNDTRUTH_FILE"):
        table = read_truth(annotation(cfg, ava.GROUNDTRUTH_FILE))
    return evaluated(ava.GROUNDTRUTH_FILE, table, boxes="ground_truth" if boxes == "ground_truth" else "none")


def annotation(cfg: CfgNode, name: str) -> str:
    """A file of AVA.ANNOTATION_DIR."""
    return os.path.join(cfg.AVA.ANNOTATION_DIR, name)


def class_names(cfg: CfgNode) -> list[str] | None:
    """The name of each of MODEL.NUM_CLASSES actions, its number where the label map lacks it; ``None`` without a map.

    Raises:
        UserError: The label map is missing or wrong.
    """
    if not cfg.AVA.LABEL_MAP_FILE:
        return None
    with naming("AVA.LABEL_MAP_FILE"):
        known = read_label_map(annotation(cfg, cfg.AVA.LABEL_MAP_FILE))
    return [known.get(number, str(number)) for number in range(1, cfg.MODEL.NUM_CLASSES + 1)]


def build_sources(cfg: CfgNode, split: Split) -> Sources:
    """Where the pictures of a use are: video files, or extracted frames.

    Raises:
        UserError: The folder has no videos, a list is missing or wrong, or a video stands in two lists.
    """
    ava, keys = cfg.AVA, cfg.KEYFRAMES
    if keys.VIDEO_DIR:
        with naming("KEYFRAMES.VIDEO_DIR"):
            return VideoFiles(keys.VIDEO_DIR, start=keys.VIDEO_START)
    lists: dict[str, Sequence[str]] | None = None
    if ava.FRAME_LIST_DIR:
        key = "TRAIN_LISTS" if split == "train" else "TEST_LISTS"
        lists = {}
        with naming(f"AVA.{key}"):
            for name in ava[key]:
                found = read_frame_list(os.path.join(ava.FRAME_LIST_DIR, name))
                twice = sorted(lists.keys() & found.keys())
                if twice:
                    raise UserError(f"the frames of {twice[0]} stand in {name} and in a list before it. Name one only.")
                lists |= found
    return FrameFiles(ava.FRAME_DIR, lists, start=keys.FRAMES_START, fps=keys.FRAMES_FPS)


def build_keyframe_dataset(
    cfg: CfgNode, keyframes: Keyframes, specs: Mapping[str, ViewSpec], split: Split, *, index_cache: str | None
) -> KeyframeDataset:
    """Clips around keyframes. The clip is that of the student's first view.

    Args:
        cfg: The configuration.
        keyframes: From ``build_keyframes``.
        specs: ``consumer/view`` → what that network must be fed.
        split: Which use.
        index_cache: Folder for the videos' time stamps; ``None``: in memory only.

    Raises:
        UserError: An action is beyond MODEL.NUM_CLASSES.
    """
    low, high = cfg.DATA.TRAIN_JITTER_SCALES
    return KeyframeDataset(
        keyframes,
        specs,
        clip_spec=next(spec for name, spec in specs.items() if name.startswith("student/")),
        split=split,
        seed=cfg.RNG_SEED,
        num_classes=cfg.MODEL.NUM_CLASSES,
        scales=(low, high),
        flip=cfg.DATA.RANDOM_FLIP,
        colour=_colour(cfg) if cfg.AVA.TRAIN_USE_COLOR_AUGMENTATION else None,
        timeout=cfg.CORPUS.DECODE_TIMEOUT or None,
        index_cache=index_cache,
        flow=build_stored_flow(cfg) if any(spec.modality == "flow" for spec in specs.values()) else None,
    )


def _colour(cfg: CfgNode) -> ColourAugmentation:
    jitter = {"jitter": 0.0} if cfg.AVA.TRAIN_PCA_JITTER_ONLY else {}
    return ColourAugmentation(eigenvalues=cfg.DATA.TRAIN_PCA_EIGVAL, eigenvectors=cfg.DATA.TRAIN_PCA_EIGVEC, **jitter)
