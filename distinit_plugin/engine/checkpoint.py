"""Checkpoints: PySlowFast's layout, plain contents, and writes that cannot leave half a file behind.

A file holds ``epoch`` (0-based number of the last finished epoch), ``model_state`` (the bare student),
``optimizer_state``, ``cfg`` (YAML text), ``scaler_state`` with fp16, and everything else that a run needs to continue
under the one extra entry ``distinit``. Contents are tensors and primitives only, so ``torch.load(weights_only=True)``
reads every file that is written here.
"""

from __future__ import annotations

import errno
import logging
import lzma
import os
import pickle
import random
import re
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distinit_plugin.errors import SAME_ON_ALL_RANKS, UserError, WeightsError
from distinit_plugin.files import UNREADABLE_ARCHIVE, move_file, write_file
from distinit_plugin.refusals import is_full_memory

FORMAT_VERSION = 2
"""Version of the ``distinit`` entry; raised when an older reader could not continue from it."""

FOLDER = "checkpoints"
BEST_NAME = "best.pyth"
"""Must not contain "checkpoint": PySlowFast takes the last such name of the folder for the newest state."""
RESUME_NAME = "resume.pyth"
"""State in the middle of an epoch; its name avoids "checkpoint" for the same reason."""

DAMAGED = "damaged"
"""Folder of states that are cut off or have wrong checksums: they are neither counted nor overwritten there."""

_UNREADABLE = (*UNREADABLE_ARCHIVE, pickle.UnpicklingError, lzma.LZMAError)

_EPOCH_NAME = re.compile(r"checkpoint_epoch_(\d{5,})\.pyth")

logger = logging.getLogger(__name__)


def epoch_file_name(epoch: int) -> str:
    """``checkpoint_epoch_00010.pyth`` for the 0-based epoch 9, as PySlowFast names it."""
    return f"checkpoint_epoch_{epoch + 1:05d}.pyth"


def plain(value: Any, where: str = "checkpoint") -> Any:
    """Copy ``value`` into tensors, primitives, lists, tuples and dicts alone; NumPy values become torch's.

    Raises:
        TypeError: Something else is inside; ``where`` and the path to it are named.
    """
    if isinstance(value, Tensor):
        return value.detach()
    if isinstance(value, np.generic):
        return value.item()
    if value is None or type(value) in (bool, int, float, str, bytes):
        return value
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value.copy())
    if isinstance(value, Mapping):
        copied = {plain(key, where): plain(item, f"{where}[{key!r}]") for key, item in value.items()}
        return OrderedDict(copied) if isinstance(value, OrderedDict) else copied
    if isinstance(value, list | tuple):
        items = [plain(item, f"{where}[{index}]") for index, item in enumerate(value)]
        return items if isinstance(value, list) else tuple(items)
    raise TypeError(f"{where} is a {type(value).__name__}; checkpoints hold tensors and primitives only")


def save_checkpoint(path: str | Path, state: Mapping[str, Any]) -> None:
    """Write ``state`` to ``path`` so that the name only ever holds a complete file.

    A crash at any moment leaves the file that was there before.

    Raises:
        UserError: The folder cannot be written or the disk is full.
        TypeError: ``state`` holds something that is neither tensor nor primitive.
    """
    contents = plain(state)
    write_file(path, lambda file: torch.save(contents, file), shared=True)


def load_checkpoint(path: str | Path, map_location: str | torch.device = "cpu") -> dict[str, Any]:
    """Read a checkpoint of this runner or of PySlowFast, safely.

    Raises:
        WeightsError: The file is missing, truncated, needs unsafe loading, or has no ``model_state``.
    """
    path = Path(path)
    if not path.is_file():
        raise WeightsError(f"there is no checkpoint {path}. Give the path of a .pyth file.")
    try:
        state = torch.load(path, map_location=map_location, weights_only=True)
    except _UNREADABLE as error:
        _raise_refusal(path, error)
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise WeightsError(
            f"the checkpoint {path} cannot be read ({reason}). It is truncated or not a checkpoint: delete it or name "
            "another."
        ) from error
    if not isinstance(state, dict) or not isinstance(state.get("model_state"), Mapping):
        raise WeightsError(f"{path} is not a checkpoint: it has no entry 'model_state'.")
    return state


def epoch_files(folder: str | Path) -> list[Path]:
    """The epoch checkpoints of ``OUTPUT_DIR/checkpoints``, oldest first."""
    folder = Path(folder)
    if not folder.is_dir():
        return []
    found = [(int(match[1]), path) for path in folder.iterdir() if (match := _EPOCH_NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def damage(path: str | Path) -> str | None:
    """Why a checkpoint file cannot be complete, or ``None`` when every byte has its right checksum.

    Raises:
        UserError: The system does not let it be read, which says nothing about what is in it.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
    except _UNREADABLE as error:
        _raise_refusal(Path(path), error)
        return str(error) or type(error).__name__
    return None if broken is None else f"wrong checksum of its part {broken}"


def _raise_refusal(path: Path, error: BaseException) -> None:
    """Raise ``UserError`` for what the system refuses.

    Readers of archives raise ``OSError``, too, without a number, and the system calls wrong offsets invalid.
    """
    if is_full_memory(error):
        reason = "too little memory"
    elif isinstance(error, OSError) and error.errno and error.errno not in (errno.EINVAL, errno.EOVERFLOW):
        reason = os.strerror(error.errno).lower()
    else:
        return
    raise UserError(
        f"the checkpoint {path} cannot be read now ({reason}), so that nobody knows whether it is good. Make it "
        "readable, or move it away to do without it."
    ) from error


def newest_checkpoint(folder: str | Path) -> Path | None:
    """The newest complete epoch checkpoint of ``OUTPUT_DIR/checkpoints``, or ``None``.

    Files that are truncated or damaged are named in a warning and passed over.
    """
    for path in reversed(epoch_files(folder)):
        reason = damage(path)
        if reason is None:
            return path
        logger.warning("passing over the damaged checkpoint %s (%s)", path, reason, extra=SAME_ON_ALL_RANKS)
    return None


def newest_state(folder: str | Path) -> tuple[Path, dict[str, Any]] | None:
    """The state furthest in the training: the newest epoch checkpoint or the mid-epoch ``resume.pyth``.

    Files that are damaged or hold something else are named in a warning and passed over. Damaged ones are moved to the
    folder ``damaged``: whoever continues writes states of earlier epochs, among which they would count as the newest.

    Returns:
        Path and contents (on the CPU), or ``None`` when there is nothing complete to continue from.

    Raises:
        UserError: The system does not let a file be read.
    """
    epochs = (_readable(path) for path in reversed(epoch_files(folder)))
    states = [next(filter(None, epochs), None), _readable(Path(folder) / RESUME_NAME)]
    return max(filter(None, states), key=lambda found: (_epoch_of(found[1]), steps_done(found[1])), default=None)


def is_of_runner(state: Mapping[str, Any]) -> bool:
    """Whether this package's runner wrote a state, and not PySlowFast (alone, or with this package's heads)."""
    own = state.get("distinit")
    return isinstance(own, Mapping) and "progress" in own


def _epoch_of(state: Mapping[str, Any]) -> int:
    """0-based number of the last epoch done (PySlowFast's files say no more); −1 for a state that does not say."""
    epoch = state.get("epoch")
    return epoch if isinstance(epoch, int) else -1


def _readable(path: Path) -> tuple[Path, dict[str, Any]] | None:
    if not path.is_file():
        return None
    reason = damage(path)
    if reason is None:
        try:
            return path, load_checkpoint(path)
        except WeightsError as error:
            logger.warning("passing over %s (%s)", path, error)
            return None
    if not _began_as_archive(path):
        logger.warning("passing over %s (%s)", path, reason)
        return None
    place = move_file(path, path.parent / DAMAGED / path.name)
    logger.warning("passing over the damaged checkpoint %s (%s), which is %s now", path, reason, place)
    return None


def _began_as_archive(path: Path) -> bool:
    """Whether a file is (a part of) what this program writes, also an empty one; old versions of torch wrote no zip."""
    with open(path, "rb") as file:
        return file.read(2) in (b"", b"PK")


def steps_done(state: Mapping[str, Any]) -> int:
    """Optimizer steps done in the whole run; −1 for a state that does not say."""
    value: Any = state
    for key in ("distinit", "progress", "step"):
        value = value.get(key) if isinstance(value, Mapping) else None
    return value if isinstance(value, int) else -1


def state_files(folder: str | Path) -> list[Path]:
    """Everything that a run could continue from, damaged or not."""
    resume = Path(folder) / RESUME_NAME
    return [*epoch_files(folder), *([resume] if resume.is_file() else [])]


def remove_unfinished(folder: str | Path) -> list[Path]:
    """Delete what a run left that was killed while it wrote a checkpoint; returns what was deleted."""
    unfinished = sorted([*Path(folder).glob(".*.pyth.*.tmp"), *Path(folder).glob("*.pyth.tmp")])
    for path in unfinished:
        path.unlink(missing_ok=True)
        logger.info("removed %s, which an earlier process did not finish", path)
    return unfinished


def prune(saved: Path, keep: int) -> list[Path]:
    """Delete epoch checkpoints until ``keep`` are left with ``saved`` as the last (0: delete none); returns them.

    Later ones were passed over when the run was continued: they are of no use to it, and not its own to delete.
    """
    files = epoch_files(saved.parent)
    superfluous = files[: files.index(saved) + 1][:-keep] if keep > 0 else []
    for path in superfluous:
        path.unlink(missing_ok=True)
    return superfluous


def rng_state() -> dict[str, Any]:
    """State of every generator that training may draw from: torch on CPU and the current GPU, NumPy, Python."""
    name, keys, position, has_gauss, cached = np.random.get_state()  # noqa: NPY002 (others' code draws from it)
    version, words, gauss = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None,
        "numpy": [str(name), np.asarray(keys).tolist(), int(position), int(has_gauss), float(cached)],
        "python": [version, list(words), gauss],
    }


def set_rng_state(state: Mapping[str, Any]) -> None:
    """Put every generator back to a state of ``rng_state``."""
    torch.set_rng_state(state["torch"].cpu())
    if state["cuda"] is not None and torch.cuda.is_initialized():
        torch.cuda.set_rng_state(state["cuda"].cpu())
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), position, has_gauss, cached))  # noqa: NPY002
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))


@contextmanager
def rng_kept() -> Iterator[None]:
    """Whatever is drawn inside leaves no trace in the generators."""
    state = rng_state()
    try:
        yield
    finally:
        set_rng_state(state)


def saved_config(folder: str | Path) -> str:
    """The configuration (YAML) in the newest epoch checkpoint of a folder, without reading its tensors; else empty."""
    for path in reversed(epoch_files(folder)):
        try:
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except _UNREADABLE:
            continue
        if isinstance(state, dict) and isinstance(state.get("cfg"), str):
            return str(state["cfg"])
    return ""
