"""This package inside programs that are written around PyTorchVideo: clip samplers, dict transforms, a reader.

Usable in its ``LabeledVideoDataset``; see ``docs/pytorchvideo.md``. Nothing of PyTorchVideo is imported or changed
before one of these names is used.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

from distinit_plugin.errors import UserError

_PLACES = {
    "DenseClips": "samplers",
    "PickedFrames": "samplers",
    "RandomClips": "samplers",
    "UniformClips": "samplers",
    "Videos": "videos",
    "Views": "views",
    "alias_functional_tensor": "alias",
    "needs_functional_tensor": "alias",
}

__all__ = list(_PLACES)


def __getattr__(name: str) -> Any:
    """Import a name when it is first used.

    Raises:
        UserError: It needs PyTorchVideo, which is not installed.
    """
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if _PLACES[name] != "alias" and importlib.util.find_spec("pytorchvideo") is None:
        raise UserError(f"{name} works with PyTorchVideo, which is not installed: pip install pytorchvideo==0.1.5.")
    return getattr(importlib.import_module(f"{__name__}.{_PLACES[name]}"), name)
