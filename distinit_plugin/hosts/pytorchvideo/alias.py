"""The one import of PyTorchVideo 0.1.5 that torchvision no longer answers, and its cure, for those who ask for it."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path

OLD = "torchvision.transforms.functional_tensor"
"""What ``pytorchvideo.transforms.augmentations`` imports."""

NEW = "torchvision.transforms._functional_tensor"
"""Its name since torchvision 0.17."""


def importable(name: str) -> bool:
    """Whether a (dotted) module can be found, without importing the module itself."""
    if name in sys.modules:
        return True
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        return False


def needs_functional_tensor() -> bool:
    """Whether PyTorchVideo is here, asks for the module, and does not get it. Nothing of PyTorchVideo is imported."""
    if importable(OLD):
        return False
    package = importlib.util.find_spec("pytorchvideo")
    folders = package.submodule_search_locations if package is not None else None
    sources = [Path(folder) / "transforms" / "augmentations.py" for folder in folders or ()]
    return any(OLD in path.read_text(encoding="utf-8") for path in sources if path.is_file())


def alias_functional_tensor() -> None:
    """Let ``import pytorchvideo.transforms`` work in this process; nothing happens where it works as it is."""
    if needs_functional_tensor():
        sys.modules[OLD] = importlib.import_module(NEW)
