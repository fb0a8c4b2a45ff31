"""A weights file of any code base, recognised: its layout, and its tensors under the names of a network."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from distinit_plugin.errors import WeightsError
from distinit_plugin.weights.families import auxiliary_heads
from distinit_plugin.weights.layouts import LAYOUTS, NATIVE, Layout, Translation, detect, named
from distinit_plugin.weights.load import layout_hint, match_keys, translate
from distinit_plugin.weights.read import read_checkpoint


@dataclass(frozen=True)
class PublicFile:
    """What was read, and how it is to be understood.

    Attributes:
        path: The file.
        tensors: Under its own names, without leading parts that all of them share.
        layout: Of these names; ``None``: they are the network's own.
        details: The file's other plain values.
    """

    path: str
    tensors: Mapping[str, Tensor]
    layout: Layout | None
    details: Mapping[str, str | int | float | bool]

    @property
    def title(self) -> str:
        """The file and its layout."""
        return f"{self.path} ({self.layout.name if self.layout else NATIVE})"

    def translate(self, target: Mapping[str, Tensor]) -> Translation:
        """The tensors under the names of a network; what it has no place for keeps its name.

        Extra classifiers that serve an image network's training alone are skipped where the network has none.

        Raises:
            WeightsError: The file holds two networks.
        """
        if self.layout is not None:
            return translate(self.tensors, target, self.layout)
        tensors = match_keys(self.tensors, target)
        heads = auxiliary_heads(tensors)
        gone = tuple(key for key in tensors if key.startswith(heads) and key not in target)
        if not gone:
            return Translation(tensors)
        names = ", ".join(head.rstrip(".") for head in heads if any(key.startswith(head) for key in gone))
        note = f"{names}: extra classifiers for training alone, which the network has not, were skipped"
        return Translation({key: value for key, value in tensors.items() if key not in gone}, gone, notes=(note,))

    def refusal(self, network: str, target: Mapping[str, Tensor]) -> str:
        """The sentence for a network that no tensor has a place in."""
        found, own = (", ".join(list(keys)[:3]) for keys in (self.tensors, target))
        candidates = "; ".join(f"{candidate.name} for {candidate.networks}" for candidate in LAYOUTS)
        known = f" Layouts that are known: {candidates}; and {NATIVE} names."
        return (
            f"no tensor of {self.path} ({found}, …) has a place in {network} ({own}, …); nothing was written."
            f"{layout_hint(self.layout) if self.layout else known} Give another network with --to, or the layout with "
            "--from."
        )


def read_public(source: str, layout_name: str = "") -> PublicFile:
    """Read a file and find out its layout.

    Args:
        source: Anything that ``read_checkpoint`` reads.
        layout_name: Overrides the detection; ``native``: the names are the network's own.

    Raises:
        UserError: There is no such layout.
        WeightsError: The file is unreadable, or has not the keys of that layout.
    """
    layout = named(layout_name) if layout_name else None
    file = read_checkpoint(source)
    if layout_name == NATIVE:
        return PublicFile(file.path, file.tensors, None, file.details)
    found, tensors = detect(file.tensors)
    if layout is not None and not layout.recognises(tensors):
        shown = ", ".join(list(file.tensors)[:3])
        raise WeightsError(f"--from {layout.name}: {file.path} has not the keys of that layout (it has {shown}, …).")
    return PublicFile(file.path, tensors, layout or found, file.details)
