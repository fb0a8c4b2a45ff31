"""The files and folders that a configuration names: are they there, and can the output be written?"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from distinit_plugin.config.node import CfgNode
from distinit_plugin.config.rules import FLOW, TWO_STREAM_NETWORKS
from distinit_plugin.config.validate_keyframes import given_boxes

_WEIGHT_SUFFIXES = (".pth", ".pt", ".pyth", ".tar", ".pkl", ".bin", ".safetensors")


def path_problems(cfg: CfgNode) -> Iterator[str]:
    """One sentence for each file or folder that the job needs and that is not there or cannot be written."""
    yield from unwritable("OUTPUT_DIR", cfg.OUTPUT_DIR, "--opts OUTPUT_DIR FOLDER")
    if cfg.CORPUS.INDEX_CACHE:
        yield from unwritable("CORPUS.INDEX_CACHE", cfg.CORPUS.INDEX_CACHE, "--opts CORPUS.INDEX_CACHE FOLDER")
    yield from _keyframes(cfg) if cfg.DETECTION.ENABLE else _corpora(cfg)
    yield from _weights(cfg)
    if _sees_flow(cfg):
        yield from _missing("FLOW.STORE", cfg.FLOW.STORE, "Run distinit extract-flow first")
        if _is_file_name(cfg.FLOW.WEIGHTS):
            yield from _missing("FLOW.WEIGHTS", cfg.FLOW.WEIGHTS, "Put the weights there")


def _sees_flow(cfg: CfgNode) -> bool:
    """Whether the student sees flow, or a teacher that this job asks does (a test asks none)."""
    if cfg.NETWORK.MODALITY == "flow":
        return True
    if cfg.MODEL.MODEL_NAME in TWO_STREAM_NETWORKS and cfg.NETWORK.STREAMS != "rgb":
        return True
    asked = (entry for entry in cfg.DISTILL.TEACHERS.values() if entry.LOSS_WEIGHT > 0 and not entry.CACHE)
    return cfg.TRAIN.ENABLE and any(entry.ARCH == FLOW or entry.NETWORK.MODALITY == "flow" for entry in asked)


def _corpora(cfg: CfgNode) -> Iterator[str]:
    used = {"TRAIN": cfg.TRAIN.ENABLE, "VAL": cfg.TRAIN.ENABLE, "TEST": cfg.TEST.ENABLE}
    for use in (use for use, wanted in used.items() if wanted):
        for name, entry in cfg.CORPUS[use].items():
            where = f"CORPUS.{use}.{name}"
            yield from _missing(f"{where}.PATH", entry.PATH, "Put the corpus there")
            yield from _missing(f"{where}.ROOT", entry.ROOT, "Put the videos there")
            yield from _missing(f"{where}.CLASSES", entry.CLASSES, "Put the file of class names there")
    folder = cfg.DATA.PATH_TO_DATA_DIR
    if folder:
        for use in (use for use in ("TRAIN", "TEST") if used[use]):
            path = os.path.join(folder, f"{use.lower()}.csv")
            yield from _missing("DATA.PATH_TO_DATA_DIR", path, "Write that csv of 'path label' rows")


def _keyframes(cfg: CfgNode) -> Iterator[str]:
    ava = cfg.AVA
    if cfg.KEYFRAMES.VIDEO_DIR:
        yield from _missing("KEYFRAMES.VIDEO_DIR", cfg.KEYFRAMES.VIDEO_DIR, "Put the videos there")
    else:
        yield from _missing("AVA.FRAME_DIR", ava.FRAME_DIR, "Extract the frames")
        yield from _missing("AVA.FRAME_LIST_DIR", ava.FRAME_LIST_DIR, "Put the lists there")
    folder_is_missing = list(_missing("AVA.ANNOTATION_DIR", ava.ANNOTATION_DIR, "Put the csv files there"))
    yield from folder_is_missing
    if folder_is_missing:
        return
    files = {"GROUNDTRUTH_FILE": [ava.GROUNDTRUTH_FILE]}
    files |= {key: [ava[key]] for key in ("LABEL_MAP_FILE", "EXCLUSION_FILE") if ava[key]}
    if cfg.TRAIN.ENABLE:
        files |= {key: ava[key] for key in ("TRAIN_GT_BOX_LISTS", "TRAIN_PREDICT_BOX_LISTS")}
    if given_boxes(cfg) == "predicted":
        files["TEST_PREDICT_BOX_LISTS"] = ava.TEST_PREDICT_BOX_LISTS
    for key, names in files.items():
        for name in names:
            yield from _missing(f"AVA.{key}", os.path.join(ava.ANNOTATION_DIR, name), "Put the file there")


def _weights(cfg: CfgNode) -> Iterator[str]:
    if cfg.TRAIN.ENABLE:
        yield from _missing("TRAIN.CHECKPOINT_FILE_PATH", cfg.TRAIN.CHECKPOINT_FILE_PATH, "Run the pre-training first")
        for key in ("FLOW_NET_WEIGHTS", "STREAM_WEIGHTS"):
            yield from _missing(f"INIT.{key}", cfg.INIT[key], "Train that part first")
        if _is_file_name(cfg.INIT.INFLATE_WEIGHTS):
            yield from _missing("INIT.INFLATE_WEIGHTS", cfg.INIT.INFLATE_WEIGHTS, "Put the weights there")
        for name, entry in cfg.DISTILL.TEACHERS.items():
            if entry.LOSS_WEIGHT > 0 and not entry.CACHE:
                yield from _missing(f"DISTILL.TEACHERS.{name}.CFG", entry.CFG, "Name PySlowFast's YAML file of it")
            if entry.LOSS_WEIGHT > 0 and entry.CACHE:
                yield from _missing(f"DISTILL.TEACHERS.{name}.CACHE", entry.CACHE, "Run distinit cache-targets first")
            elif entry.LOSS_WEIGHT > 0 and _is_file_name(entry.WEIGHTS):
                yield from _missing(f"DISTILL.TEACHERS.{name}.WEIGHTS", entry.WEIGHTS, "Put the weights there")
    if cfg.TEST.ENABLE:
        yield from _missing("TEST.CHECKPOINT_FILE_PATH", cfg.TEST.CHECKPOINT_FILE_PATH, "Train first")


def _is_file_name(weights: str) -> bool:
    """A file, not a torchvision tag or another word."""
    return "/" in weights or os.sep in weights or weights.lower().endswith(_WEIGHT_SUFFIXES)


def _missing(key: str, path: str, fix: str) -> Iterator[str]:
    if path and not os.path.exists(os.path.expanduser(path)):
        beside = "" if os.path.isabs(os.path.expanduser(path)) else f" (looked from {os.getcwd()})"
        yield f"{key}: {path} does not exist{beside}. {fix}, or say where it is: --opts {key} PLACE."


def unwritable(key: str, folder: str, fix: str) -> Iterator[str]:
    """The sentence for a folder that cannot be written; nothing where it, or its nearest existing parent, can.

    Args:
        key: What names it.
        folder: It.
        fix: What to write to name another one.
    """
    place = Path(folder).expanduser().absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    if not place.is_dir():
        yield f"{key}: {folder} cannot be a folder, {place} is a file. Choose another folder: {fix}."
    elif not os.access(place, os.W_OK | os.X_OK):
        yield f"{key}: {folder} cannot be written, {place} is not writable. Choose another folder: {fix}."
