"""Reading weights files of any common layout, safely.

Nothing but tensors and plain values is ever unpickled. Every way in which a file can be unusable ends in a
:class:`WeightsError` that names the file and what to do.
"""

from __future__ import annotations

import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distinit_plugin.errors import WeightsError
from distinit_plugin.weights.keymaps import WRAPPER_PREFIXES, strip_common_prefix
from distinit_plugin.weights.pickles import RefusedPickleError, first_object
from distinit_plugin.weights.tensorflow_checkpoint import index_of, is_index, read_variables

STATE_ENTRIES = ("model_state", "state_dict", "model_state_dict", "model", "blobs")
"""Where checkpoints keep their weights: PySlowFast and this package, Places365 and most trainers, timm, others,
Caffe2."""

_TORCH_MAGIC = 0x1950A86A20F9469CFC6C
"""The first of the pickles that torch wrote into one file before it wrote zip files."""

_UNSAFE_GLOBAL = re.compile(r"GLOBAL ([\w.]+)")
_UNPICKLER_SAYS = re.compile(r"WeightsUnpickler error:\s+(.+)")
"""Where torch says what it met, after a paragraph of advice."""

_KNOWN_ORIGINS = {
    "places365": (
        "It is published by the Places365 project (CSAIL, http://places2.csail.mit.edu/models_places365/), as "
        "resnet50_places365.pth.tar for example."
    ),
}


@dataclass(frozen=True)
class CheckpointFile:
    """The weights of one file.

    Attributes:
        path: The file.
        tensors: Key → tensor, flat, on the CPU; ``module.`` and ``_orig_mod.`` before all keys are dropped.
        entry: The entry of the file that held them; empty for a bare state dict.
        details: The file's other plain values (``epoch``, ``arch``, ``best_prec1``, …).
    """

    path: str
    tensors: dict[str, Tensor]
    entry: str
    details: dict[str, str | int | float | bool]


def find_weights_file(name: str | Path) -> Path:
    """The file that ``name`` means: a path, or a bare name in torch's download cache.

    Raises:
        WeightsError: There is none, or it is a folder.
    """
    path = Path(name).expanduser()
    cached = cache_folder() / path.name
    if path.name == str(path) and not path.exists() and cached.is_file():
        return cached
    if path.is_dir():
        raise WeightsError(f"the weights {path} are a folder. Name one file in it.")
    if not path.is_file() or ".data-" in path.name:
        index = index_of(path)  # TensorFlow's checkpoints are several files with one name
        if index is not None and index.is_file():
            return index
    if not path.is_file():
        origin = next((f" {text}" for part, text in _KNOWN_ORIGINS.items() if part in path.name.lower()), "")
        raise WeightsError(
            f"there is no weights file {path}.{origin} Give the right path, or put the file at {cached} and give its "
            "bare name."
        )
    return path


def cache_folder() -> Path:
    """Where torch keeps downloaded weights."""
    return Path(torch.hub.get_dir()) / "checkpoints"


def read_checkpoint(path: str | Path) -> CheckpointFile:
    """Read weights: a ``torch.save`` file of any age, safetensors, a pickle of numpy arrays, a TensorFlow checkpoint.

    Accepted: a bare state dict, or one under an entry of :data:`STATE_ENTRIES`; Python 2 files; files that wrap keys
    in ``module.``. What kind of file it is, its contents say (but for safetensors).

    Raises:
        WeightsError: The file is missing, a folder, empty, text, truncated, damaged, holds more than tensors and plain
            values, or holds no weights.
    """
    path = find_weights_file(path)
    _refuse_impossible(path)
    loaded = _read_any(path)
    entry, state = _find_state(path, loaded)
    tensors = {}
    for key, value in state.items():
        if not isinstance(value, Tensor):
            continue
        if value.layout is not torch.strided or value.is_quantized or value.is_meta:
            raise WeightsError(f"{path}: {key} is a sparse, quantized or empty tensor; only plain ones can be loaded.")
        tensors[str(key)] = value.detach()
    rest = loaded if entry else {}
    details = {str(key): value for key, value in rest.items() if isinstance(value, str | int | float | bool)}
    return CheckpointFile(str(path), strip_common_prefix(tensors, WRAPPER_PREFIXES), entry, details)


def _refuse_impossible(path: Path) -> None:
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            head = file.read(512)
    except OSError as error:
        raise WeightsError(f"the weights file {path} cannot be opened: {error.strerror}.") from error
    if size == 0:
        raise WeightsError(f"the weights file {path} is empty. Download or copy it again.")
    if b"git-lfs" in head:
        raise WeightsError(f"{path} is a Git LFS pointer, not the weights. Fetch the real file with `git lfs pull`.")
    if not any(byte < 9 or byte == 0x80 for byte in head):
        raise WeightsError(
            f"{path} is a text file, not weights (an error page saved by a download?). Download it again."
        )


def _read_any(path: Path) -> Mapping[Any, Any]:
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    if is_index(path):
        return _read_tensorflow(path)
    with open(path, "rb") as file:
        is_pickle = file.read(1) == pickle.PROTO
    first = _read_pickle(path) if is_pickle else _TORCH_MAGIC
    loaded = _read_torch(path) if isinstance(first, int) and first == _TORCH_MAGIC else first
    if not isinstance(loaded, Mapping):
        raise WeightsError(
            f"{path} holds a {type(loaded).__name__}, not a state dict. Save network.state_dict() instead."
        )
    return loaded


def _read_pickle(path: Path) -> Any:
    """The first object of a pickle; torch's older files are several, the first of them a number."""
    try:
        return first_object(path)
    except RefusedPickleError as error:
        raise WeightsError(
            f"{path} is a pickle that holds more than arrays and plain values ({error}): reading it could run code, so "
            "it is refused. If you trust its author, write its arrays anew with torch.save or safetensors."
        ) from error
    except Exception as error:  # a hostile pickle can raise anything
        raise WeightsError(_unreadable(path, error)) from error


def _read_tensorflow(path: Path) -> Mapping[str, Tensor]:
    try:
        return read_variables(path)
    except FileNotFoundError as error:
        raise WeightsError(
            f"{path} is the index of a TensorFlow checkpoint, and its data file {Path(error.filename).name} is not "
            "beside it. Copy that too."
        ) from error
    except (ValueError, OSError) as error:
        raise WeightsError(_unreadable(path, error)) from error


def _read_safetensors(path: Path) -> Mapping[Any, Any]:
    """The tensors as one entry beside the file's metadata."""
    try:
        from safetensors import safe_open
        from safetensors.torch import load_file
    except ImportError as error:
        raise WeightsError(f"{path}: reading .safetensors needs the package safetensors. Install it.") from error
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
        return {**metadata, STATE_ENTRIES[0]: load_file(path)}
    except Exception as error:  # SafetensorError derives from Exception alone
        raise WeightsError(_unreadable(path, error)) from error


def _read_torch(path: Path) -> Any:
    is_zip = zipfile.is_zipfile(path)
    if is_zip:
        _check_sums(path)
    try:
        return _torch_load(path, is_zip)
    except Exception as error:  # a hostile pickle can raise anything
        unsafe = _UNSAFE_GLOBAL.search(str(error))
        if unsafe:
            raise WeightsError(
                f"{path} holds more than tensors and plain values ({unsafe[1]}): reading it could run code, so it is "
                "refused. If you trust its author, convert it once in Python: "
                "torch.save(torch.load(OLD, weights_only=False)['state_dict'], NEW)."
            ) from error
        raise WeightsError(_unreadable(path, error)) from error


def _torch_load(path: Path, is_zip: bool) -> Any:
    """Zip files are mapped into memory; older ones may hold Python 2 strings, which need latin1."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Detected pickle protocol", UserWarning)  # what cannot be read is an error
        warnings.filterwarnings("ignore", "pickle_load_args only works", UserWarning)  # "encoding" works
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
        except UnicodeDecodeError:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip, encoding="latin1")


def _check_sums(path: Path) -> None:
    """PyTorch does not compare the checksums of its files: flipped bytes would become wrong weights."""
    try:
        with zipfile.ZipFile(path) as archive:
            # Files saved with torch.serialization.set_crc32_options(False) have no checksums.
            broken = archive.testzip() if any(part.CRC for part in archive.infolist()) else None
    except Exception as error:
        raise WeightsError(_unreadable(path, error)) from error
    if broken is not None:
        raise WeightsError(f"{path} is damaged: its part {broken} has a wrong checksum. Download or copy it again.")


def _unreadable(path: Path, error: Exception) -> str:
    said = _UNPICKLER_SAYS.search(str(error))
    reason = (said[1] if said else next(iter(str(error).splitlines()), "")) or type(error).__name__
    reason = reason.split(". ")[0][:200].rstrip(".")
    return f"{path} cannot be read as weights ({reason}): truncated or of another kind. Download or copy it again."


def _find_state(path: Path, loaded: Mapping[Any, Any]) -> tuple[str, Mapping[Any, Any]]:
    for entry in STATE_ENTRIES:
        inner = loaded.get(entry)
        if isinstance(inner, Mapping) and any(isinstance(value, Tensor) for value in inner.values()):
            return entry, inner
    if any(isinstance(value, Tensor) for value in loaded.values()):
        return "", loaded
    found = ", ".join(repr(key) for key in list(loaded)[:8]) or "nothing"
    raise WeightsError(
        f"{path} holds no weights: neither tensors nor one of the entries {', '.join(STATE_ENTRIES)} (found: {found})."
    )
