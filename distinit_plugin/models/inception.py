"""Inception-v1 as a table: what its 2D trunk and the 3D networks that were made from it share.

Source: C. Szegedy et al., "Going Deeper with Convolutions" (arXiv 1409.4842) table 1, with 3×3 kernels in the third
branch as in TF-slim's ``nets/inception_v1.py``; names and pools over time as in its ``nets/s3dg.py``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Literal, NamedTuple

from distinit_plugin.models.folding import Triple
from distinit_plugin.models.network import InputSpec
from distinit_plugin.types import LayerInfo

Padding = Literal["same", "symmetric"]
"""TensorFlow's, or the same on both sides."""


class MixedChannels(NamedTuple):
    """Outputs of the six units of a Mixed block."""

    b0: int
    b1a: int
    b1b: int
    b2a: int
    b2b: int
    b3b: int

    @property
    def out(self) -> int:
        """Channels of the joined branches."""
        return self.b0 + self.b1b + self.b2b + self.b3b


MIXED: Mapping[str, MixedChannels] = {
    "Mixed_3b": MixedChannels(64, 96, 128, 16, 32, 32),
    "Mixed_3c": MixedChannels(128, 128, 192, 32, 96, 64),
    "Mixed_4b": MixedChannels(192, 96, 208, 16, 48, 64),
    "Mixed_4c": MixedChannels(160, 112, 224, 24, 64, 64),
    "Mixed_4d": MixedChannels(128, 128, 256, 24, 64, 64),
    "Mixed_4e": MixedChannels(112, 144, 288, 32, 64, 64),
    "Mixed_4f": MixedChannels(256, 160, 320, 32, 128, 128),
    "Mixed_5b": MixedChannels(256, 160, 320, 32, 128, 128),
    "Mixed_5c": MixedChannels(384, 192, 384, 48, 128, 128),
}

STEM_CONVS = {"Conv2d_1a_7x7": 64, "Conv2d_2b_1x1": 64, "Conv2d_2c_3x3": 192}
"""Outputs of the convolutions before the first Mixed block."""

POOLS: Mapping[str, tuple[Triple, Triple]] = {
    "MaxPool_2a_3x3": ((1, 3, 3), (1, 2, 2)),
    "MaxPool_3a_3x3": ((1, 3, 3), (1, 2, 2)),
    "MaxPool_4a_3x3": ((3, 3, 3), (2, 2, 2)),
    "MaxPool_5a_2x2": ((2, 2, 2), (2, 2, 2)),
}
"""Kernel and stride of the pools between the blocks."""


def shorthand(end_point: str) -> str:
    """The papers' name of an end-point: ``Mixed_4f`` is ``4F``, ``MaxPool_3a_3x3`` is ``3A``."""
    return end_point.split("_")[1].upper()


END_POINTS = tuple(sorted((*STEM_CONVS, *POOLS, *MIXED), key=shorthand))
"""TF-slim's names, from the input on."""

SLIM_NAMES: Mapping[str, str] = {shorthand(name): name for name in END_POINTS}
"""The papers' names → TF-slim's."""


class EndPoints(Mapping[str, LayerInfo]):
    """Layers by the network's own names; the papers' shorthand and TF-slim's names of end-points find them, too.

    Own names may begin with a stream (``flow.Mixed_4f``); the other names begin with it then (``flow.4F``). A layer
    that is no end-point has its own name alone.
    """

    def __init__(self, layers: Mapping[str, LayerInfo]) -> None:
        """Own names → geometry, in order."""
        self._infos = dict(layers)
        self._others: dict[str, str] = {}
        for name in self._infos:
            stream, dot, end_point = name.rpartition(".")
            short = shorthand(end_point) if "_" in end_point else ""
            if short in SLIM_NAMES:
                self._others |= {f"{stream}{dot}{other}": name for other in (short, SLIM_NAMES[short])}

    def own_name(self, name: str) -> str:
        """The name that the network's module has; raises ``KeyError``."""
        return name if name in self._infos else self._others[name]

    def __getitem__(self, name: str) -> LayerInfo:
        """The geometry under any of the names."""
        return self._infos[self.own_name(name)]

    def __iter__(self) -> Iterator[str]:
        """The own names."""
        return iter(self._infos)

    def __len__(self) -> int:
        """Number of layers."""
        return len(self._infos)


def scaled(channels: int, width: int) -> int:
    """Channels of a layer that has ``channels`` at the papers' width of 64."""
    return max(1, channels * width // 64)


def padding_gaps(padding: str, input: InputSpec, *, symmetric_pools: bool = True) -> tuple[str, ...]:
    """Why a GoogLeNet's maps differ in space from those of a network that has its weights.

    Args:
        padding: NETWORK.PADDING.
        input: The crops, whose size decides what TensorFlow's padding is.
        symmetric_pools: Whether ``symmetric`` gives the network torchvision GoogLeNet's pools, too.
    """
    size = input.test_crop_size
    fits = "a crop of a multiple of 32, less 1 (223), makes NETWORK.PADDING same equal to the image network's"
    if padding == "same" and (size + 1) % 32:
        other = ", as is NETWORK.PADDING symmetric" if symmetric_pools else ""
        return (f"NETWORK.PADDING same pads crops of {size} pixels otherwise than the 2D network does ({fits}{other})",)
    if padding == "symmetric" and not symmetric_pools:
        return (f"NETWORK.PADDING symmetric has the pools of torchvision's S3D, not those of its GoogLeNet ({fits})",)
    return ()
