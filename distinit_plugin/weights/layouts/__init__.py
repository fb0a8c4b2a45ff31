"""The layouts of public weights files, told by their keys, and their translation into the names of our networks.

A file whose names are the network's own (torchvision's and PyTorchVideo's networks, ig65m-pytorch, VMZ's ``pt/`` tree,
Places365, files of this program) needs none.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from distinit_plugin.errors import UserError
from distinit_plugin.registry import near_matches
from distinit_plugin.weights.keymaps import align_prefix
from distinit_plugin.weights.layouts import caffe2, inception, pyslowfast, pyslowfast_caffe2, tensorflow
from distinit_plugin.weights.layouts.base import Layout, Translation

__all__ = ["LAYOUTS", "NATIVE", "Layout", "Translation", "detect", "named"]

LAYOUTS = (*inception.LAYOUTS, *tensorflow.LAYOUTS, *caffe2.LAYOUTS, *pyslowfast.LAYOUTS, *pyslowfast_caffe2.LAYOUTS)

NATIVE = "native"
"""The name of having the network's own keys."""


def detect(tensors: Mapping[str, Tensor]) -> tuple[Layout | None, Mapping[str, Tensor]]:
    """The one layout that the keys show, and the tensors without leading parts that all keys share (``model.``).

    Without a layout, or with several, the tensors come back as they are.
    """
    bare = align_prefix(tensors, ())
    for candidate in (tensors, bare):
        found = [layout for layout in LAYOUTS if layout.recognises(candidate)]
        if len(found) == 1:
            return found[0], candidate
    return None, tensors


def named(name: str) -> Layout | None:
    """A layout by its name; ``None`` for :data:`NATIVE`.

    Raises:
        UserError: There is none of that name.
    """
    if name == NATIVE:
        return None
    for layout in LAYOUTS:
        if layout.name == name:
            return layout
    known = [NATIVE, *(layout.name for layout in LAYOUTS)]
    raise UserError(f"--from: there is no layout '{name}'.{near_matches(name, known)} Known: {', '.join(known)}.")
