"""What PySlowFast takes without a word and does otherwise than was meant, or dies of much later.

``traps`` are refused before a job starts (``settling.settle``) and by ``distinit doctor``; ``surprises`` only the
latter tells. Needs a configuration, not PySlowFast.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from distinit_plugin.hosts.slowfast.defects import sync_norm_fails

CLASSIFIER = re.compile(r"(head\.projection|roi_head\.projection|blocks\.\d+\.proj|fc)\.weight")
"""Keys of last layers: of PySlowFast's own networks, of its PTV ones without ``model.``, of this package's."""

TEMPORARY = ".tmp"
"""Ending of files that ``distinit slowfast`` has not written to their end; it does not take them for checkpoints."""

CLASSES_OF_TOP_5 = 5
"""Below this many classes PySlowFast's top-5 has nothing to choose from."""


class Cure(NamedTuple):
    """Something of a configuration that works only because of a patch.

    Attributes:
        patch: Its name.
        key: The key, and its value.
    """

    patch: str
    key: str


def traps(cfg: Any) -> Iterator[str]:
    """What must not be started, one sentence each that begins with its key.

    Args:
        cfg: PySlowFast's configuration.
    """
    if cfg.BN.NORM_TYPE == "sync_batchnorm" and sync_norm_fails():
        yield "BN.NORM_TYPE: sync_batchnorm cannot be built with PyTorchVideo 0.1.5. Set it to batchnorm."
    if cfg.NUM_GPUS == 0 and (cfg.MULTIGRID.SHORT_CYCLE or cfg.MULTIGRID.LONG_CYCLE):
        yield "MULTIGRID: it divides by NUM_GPUS, which is 0. Switch SHORT_CYCLE and LONG_CYCLE off."
    histogram = cfg.TENSORBOARD.HISTOGRAM
    if cfg.TENSORBOARD.ENABLE and histogram.ENABLE and histogram.TOPK > cfg.MODEL.NUM_CLASSES:
        yield f"TENSORBOARD.HISTOGRAM.TOPK: {histogram.TOPK} of {cfg.MODEL.NUM_CLASSES} classes. Lower it."
    if cfg.TRAIN.ENABLE:
        yield from _start_traps(cfg)
    if cfg.TEST.ENABLE:
        yield from _test_traps(cfg)


def surprises(cfg: Any) -> Iterator[str]:
    """What is done without a word and may be meant, one sentence each that begins with its key."""
    folder = _Checkpoints(cfg)
    weights = cfg.TRAIN.CHECKPOINT_FILE_PATH
    if cfg.TRAIN.ENABLE and cfg.TRAIN.AUTO_RESUME and folder.newest is not None:
        if weights:
            yield f"TRAIN.CHECKPOINT_FILE_PATH: it is not read, because training goes on from {folder.newest}."
        epochs = _epochs_of(_state(folder.newest))
        if epochs is not None and epochs >= cfg.SOLVER.MAX_EPOCH:
            yield f"SOLVER.MAX_EPOCH: nothing is left to train, {folder.newest} has {epochs} epochs behind it."
    elif cfg.TRAIN.ENABLE and weights and cfg.TRAIN.CHECKPOINT_TYPE == "pytorch":
        classes = _classes_of(_state(Path(weights)))
        if classes is not None and classes != cfg.MODEL.NUM_CLASSES:
            yield (
                f"MODEL.NUM_CLASSES: {cfg.MODEL.NUM_CLASSES}, but the last layer in {weights} has {classes}: it is "
                "left out and starts at random, as it should when fine-tuning."
            )
    if cfg.TEST.ENABLE and cfg.TRAIN.ENABLE and cfg.TEST.CHECKPOINT_FILE_PATH:
        yield f"TEST.CHECKPOINT_FILE_PATH: {cfg.TEST.CHECKPOINT_FILE_PATH} is tested, not what is trained."
    if cfg.TEST.ENABLE and not cfg.TRAIN.ENABLE and not (cfg.TEST.CHECKPOINT_FILE_PATH or weights or folder.names):
        yield "TEST.CHECKPOINT_FILE_PATH: none, and OUTPUT_DIR has no checkpoint: random weights are tested."
    if cfg.SOLVER.CLIP_GRAD_VAL and cfg.SOLVER.CLIP_GRAD_L2NORM:
        yield "SOLVER.CLIP_GRAD_L2NORM: it does nothing beside CLIP_GRAD_VAL. Leave one of them out."
    if cfg.NUM_GPUS * cfg.NUM_SHARDS > 1 and cfg.TRAIN.ENABLE:
        yield (
            "NUM_GPUS: on several processes PySlowFast's validation counts some videos twice, so its accuracy is a "
            "little off. Take the test's."
        )


def needed_cures(cfg: Any) -> list[Cure]:
    """What PySlowFast alone would stop at here, or do wrong, of a configuration; the patches that cure it, where so."""
    classes, backend = cfg.MODEL.NUM_CLASSES, cfg.DATA.DECODING_BACKEND
    method = cfg.SOLVER.OPTIMIZING_METHOD
    datasets = {use: str(cfg[use].DATASET).lower() for use in ("TRAIN", "TEST") if cfg[use].ENABLE}
    ptv = [f"{use}.DATASET {name}" for use, name in datasets.items() if name.startswith("ptv")]
    boxes, ranks = cfg.DETECTION.ENABLE, f"NUM_GPUS {cfg.NUM_GPUS}, NUM_SHARDS {cfg.NUM_SHARDS}"
    few = classes < CLASSES_OF_TOP_5 and not (cfg.DATA.MULTI_LABEL or cfg.DETECTION.ENABLE)
    needs = (
        (few, Cure("few_classes", f"MODEL.NUM_CLASSES {classes}")),
        (cfg.SOLVER.CLIP_GRAD_VAL, Cure("clip_value", f"SOLVER.CLIP_GRAD_VAL {cfg.SOLVER.CLIP_GRAD_VAL}")),
        (method == "mt_adamw", Cure("multi_tensor", f"SOLVER.OPTIMIZING_METHOD {method}")),
        (cfg.NUM_GPUS == 0, Cure("synchronize", "NUM_GPUS 0")),
        (cfg.TRAIN.MIXED_PRECISION, Cure("infinite_stats", "TRAIN.MIXED_PRECISION True")),
        ("kinetics" in datasets.values() and not boxes, Cure("decoder", f"DATA.DECODING_BACKEND {backend}")),
        *((True, Cure(patch, key)) for key in ptv[:1] for patch in ("ptv_fields", "ptv_decoder")),
        (boxes, Cure("detection_files", "DETECTION.ENABLE True")),
        (boxes and cfg.TEST.ENABLE, Cure("detection_test", "DETECTION.ENABLE True, TEST.ENABLE True")),
        (boxes and cfg.NUM_GPUS * cfg.NUM_SHARDS > 1, Cure("padded_keyframes", f"DETECTION.ENABLE True, {ranks}")),
    )
    return [cure for needed, cure in needs if needed]


# ------------------------------------------------------------------------------------------------- checkpoints
class _Checkpoints:
    """``OUTPUT_DIR/checkpoints`` as PySlowFast sees it (``slowfast/utils/checkpoint.py``).

    Attributes:
        names: Files that make it believe that there is something to go on from.
        newest: The one that it then takes; ``None``: none of them is of this TASK.
    """

    def __init__(self, cfg: Any) -> None:
        folder = Path(cfg.OUTPUT_DIR) / "checkpoints"
        try:
            found = sorted(path.name for path in folder.iterdir() if path.suffix != TEMPORARY)
        except OSError:
            found = []
        self.folder = folder
        self.names = [name for name in found if "checkpoint" in name]
        own = [
            name for name in found if (f"{cfg.TASK}_checkpoint" in name if cfg.TASK else name.startswith("checkpoint"))
        ]
        self.newest = folder / own[-1] if own else None


def _start_traps(cfg: Any) -> Iterator[str]:
    """Where training begins."""
    folder, weights = _Checkpoints(cfg), cfg.TRAIN.CHECKPOINT_FILE_PATH
    if cfg.TRAIN.AUTO_RESUME and folder.names:
        if folder.newest is None:
            if weights and "ssl_eval" not in cfg.TASK:
                yield (
                    f"TRAIN.CHECKPOINT_FILE_PATH: it would be ignored, because OUTPUT_DIR holds checkpoints of another "
                    f"TASK ({folder.names[0]}), and training would start at random. Name another OUTPUT_DIR."
                )
        elif is_cut_off(folder.newest):
            yield _cut_off("TRAIN.AUTO_RESUME", folder.newest)
        elif weights and Path(weights).absolute().parent == folder.folder.absolute():
            yield (
                f"TRAIN.CHECKPOINT_FILE_PATH: it lies in OUTPUT_DIR, where training goes on from {folder.newest.name} "
                "instead. Name another OUTPUT_DIR."
            )
        return
    if not weights or "://" in weights:
        return
    yield from _file_traps("TRAIN.CHECKPOINT_FILE_PATH", Path(weights))
    if cfg.TRAIN.CHECKPOINT_EPOCH_RESET or cfg.TRAIN.CHECKPOINT_TYPE != "pytorch":
        return
    epochs = _epochs_of(_state(Path(weights)))
    if epochs is not None and epochs >= cfg.SOLVER.MAX_EPOCH:
        yield (
            f"TRAIN.CHECKPOINT_EPOCH_RESET: False, and {weights} has {epochs} epochs behind it of SOLVER.MAX_EPOCH "
            f"{cfg.SOLVER.MAX_EPOCH}: nothing would be trained. Set it True to fine-tune."
        )


def _test_traps(cfg: Any) -> Iterator[str]:
    """What is tested, where that is there before the job."""
    key, place = "TEST.CHECKPOINT_FILE_PATH", cfg.TEST.CHECKPOINT_FILE_PATH
    kind = cfg.TEST.CHECKPOINT_TYPE
    if not place and not cfg.TRAIN.ENABLE:
        folder = _Checkpoints(cfg)
        if folder.newest is not None:
            key, place, kind = "OUTPUT_DIR", str(folder.newest), "pytorch"
        elif folder.names:
            yield (
                f"OUTPUT_DIR: it holds checkpoints of another TASK only ({folder.names[0]}). Give the one to be tested "
                "as TEST.CHECKPOINT_FILE_PATH."
            )
        else:
            key, place, kind = "TRAIN.CHECKPOINT_FILE_PATH", cfg.TRAIN.CHECKPOINT_FILE_PATH, cfg.TRAIN.CHECKPOINT_TYPE
    if not place or "://" in place:
        return
    yield from _file_traps(key, Path(place))
    classes = _classes_of(_state(Path(place))) if kind == "pytorch" else None
    if classes is not None and classes != cfg.MODEL.NUM_CLASSES:
        yield (
            f"MODEL.NUM_CLASSES: {cfg.MODEL.NUM_CLASSES}, but the last layer in {place} has {classes} classes: it "
            "would be left out, and a random one tested. Set it as it was trained."
        )


def _file_traps(key: str, path: Path) -> Iterator[str]:
    if not path.is_file():
        yield f"{key}: there is no file {path}. Name one that exists."
    elif is_cut_off(path):
        yield _cut_off(key, path)


def is_cut_off(path: Path) -> bool:
    """Whether a checkpoint is empty, or ends before its table of contents: its job was killed while writing it.

    Files of PyTorch before 1.6, which have no such table, count as whole.
    """
    try:
        with open(path, "rb") as file:
            start = file.read(2)
        return not start or (start == b"PK" and not zipfile.is_zipfile(path))
    except OSError:
        return False


def _cut_off(key: str, path: Path) -> str:
    return f"{key}: {path} is cut off (its job was killed while writing it). Remove it to go on from the one before."


def _state(path: Path) -> Mapping[str, Any]:
    """What a checkpoint holds, without its numbers; empty when it cannot be read so."""
    try:
        state = torch.load(path, map_location="meta", mmap=True, weights_only=True)
    except Exception:  # PySlowFast reads it itself, in more ways than this one, and says what is wrong
        return {}
    return state if isinstance(state, Mapping) else {}


def _epochs_of(state: Mapping[str, Any]) -> int | None:
    epoch = state.get("epoch")
    return epoch + 1 if isinstance(epoch, int) else None


def _classes_of(state: Mapping[str, Any]) -> int | None:
    """Outputs of the last layer; ``None``: there is none whose name is known."""
    weights = state.get("model_state", state)
    if not isinstance(weights, Mapping):
        return None
    sizes = [
        value.shape[0]
        for key, value in weights.items()
        if isinstance(key, str) and CLASSIFIER.fullmatch(key.removeprefix("model.")) and isinstance(value, torch.Tensor)
    ]
    return int(sizes[-1]) if sizes else None
