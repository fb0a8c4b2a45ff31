"""The files and folders that a configuration names: are they there, and can the output be written?"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from distinit_plugin.config.node import CfgNode

_WEIGHT_SUFFIXES = (".pth", ".pt", ".pyth", ".tar", ".pkl", ".bin", ".safetensors")


def path_problems(cfg: CfgNode) -> Iterator[str]:
    """One sentence for each file or folder that the job needs and that is not there or cannot be written."""
    yield from unwritable("OUTPUT_DIR", cfg.OUTPUT_DIR, "--opts OUTPUT_DIR FOLDER")
    if cfg.CORPUS.INDEX_CACHE:
        yield from unwritable("CORPUS.INDEX_CACHE", cfg.CORPUS.INDEX_CACHE, "--opts CORPUS.INDEX_CACHE FOLDER")
    yield from _corpora(cfg)
    yield from _weights(cfg)
    yield from _missing("FLOW.STORE", cfg.FLOW.STORE, "Run distinit extract-flow first")


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


def _weights(cfg: CfgNode) -> Iterator[str]:
    if cfg.TRAIN.ENABLE:
        yield from _missing("TRAIN.CHECKPOINT_FILE_PATH", cfg.TRAIN.CHECKPOINT_FILE_PATH, "Run the pre-training first")
        for key in ("FLOW_NET_WEIGHTS", "STREAM_WEIGHTS"):
            yield from _missing(f"INIT.{key}", cfg.INIT[key], "Train that part first")
        if _is_file_name(cfg.INIT.INFLATE_WEIGHTS):
            yield from _missing("INIT.INFLATE_WEIGHTS", cfg.INIT.INFLATE_WEIGHTS, "Put the weights there")
        for name, entry in cfg.DISTILL.TEACHERS.items():
            if entry.LOSS_WEIGHT > 0 and _is_file_name(entry.WEIGHTS):
                yield from _missing(f"DISTILL.TEACHERS.{name}.WEIGHTS", entry.WEIGHTS, "Put the weights there")
    if _is_file_name(cfg.FLOW.WEIGHTS):
        yield from _missing("FLOW.WEIGHTS", cfg.FLOW.WEIGHTS, "Put the weights there")
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
