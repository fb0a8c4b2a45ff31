"""Families of image networks whose weights fill video networks: what corresponds to what.

Sources: torchvision ``models/resnet.py`` (timm's plain ResNets have the same keys) and ``models/googlenet.py``, whose
blocks count their letters from a where TF-slim's count from b.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from distinit_plugin.models.inception2d import END_POINTS
from distinit_plugin.weights.keymaps import resnet_2d_to_res3d

CLASSIFIER = "fc."
"""Where both families, and the networks that are wholly made of one, have their classifier."""

_GOOGLENET_STEM = {"conv1": "Conv2d_1a_7x7", "conv2": "Conv2d_2b_1x1", "conv3": "Conv2d_2c_3x3"}
_GOOGLENET_MODULES = (
    *("conv1", "maxpool1", "conv2", "conv3", "maxpool2", "inception3a", "inception3b", "maxpool3"),
    *(f"inception4{letter}" for letter in "abcde"),
    *("maxpool4", "inception5a", "inception5b"),
)
_GOOGLENET_BRANCHES = {
    "branch1": "b0",
    "branch2.0": "b1a",
    "branch2.1": "b1b",
    "branch3.0": "b2a",
    "branch3.1": "b2b",
    "branch4.1": "b3b",
}
_GOOGLENET_BLOCK = re.compile(r"inception(\d)([a-e])\.(branch1|branch[23]\.[01]|branch4\.1)\.")


@dataclass(frozen=True)
class Family:
    """Image networks of one kind.

    Attributes:
        title: What people call it.
        example: A member that a message can name.
        rename: Its key for a part of the network → the key in a video network's trunk (TF-slim's end-point names); a
            key without counterpart comes back as it is.
        kernels: Keys of 4-D kernels by which a member is known.
        stem: The trunk's key of the first kernel: the one whose number of input channels may be another.
        unused: Starts of keys that serve the image network's training alone.
        layers: Layer of the trunk → the image network's module with the same map.
        advice: What must be equal on both sides.
    """

    title: str
    example: str
    rename: Callable[[str], str]
    kernels: tuple[str, ...]
    stem: str
    unused: tuple[str, ...]
    layers: Mapping[str, str]
    advice: str


def googlenet_to_inception(key: str) -> str:
    """The key under TF-slim's end-points for a key of torchvision's GoogLeNet; ``fc`` has the same name in both."""
    stem, dot, rest = key.partition(".")
    if stem in _GOOGLENET_STEM:
        return _GOOGLENET_STEM[stem] + dot + rest
    block = _GOOGLENET_BLOCK.match(key)
    if block is None:
        return key
    number, letter, branch = block.groups()
    return f"Mixed_{number}{chr(ord(letter) + 1)}.{_GOOGLENET_BRANCHES[branch]}.{key[block.end() :]}"


FAMILIES: Mapping[str, Family] = {
    "resnet": Family(
        title="ResNet",
        example="torchvision/resnet18",
        rename=resnet_2d_to_res3d,
        kernels=("conv1.weight", "layer1.0.conv1.weight"),
        stem="stem.0.weight",
        unused=(),
        layers={"stem": "maxpool", **{f"layer{stage}": f"layer{stage}" for stage in range(1, 5)}},
        advice="It must be a ResNet with the same RESNET.DEPTH and NETWORK.WIDTH: resnet18 for depth 18, resnet50 for "
        "50.",
    ),
    "googlenet": Family(
        title="GoogLeNet",
        example="torchvision/googlenet",
        rename=googlenet_to_inception,
        kernels=("conv1.conv.weight", "inception3a.branch1.conv.weight"),
        stem="Conv2d_1a_7x7.conv.weight",
        unused=("aux1.", "aux2."),
        layers=dict(zip(END_POINTS, _GOOGLENET_MODULES, strict=True)),
        advice="It must be a GoogLeNet with batch normalisation of the same NETWORK.WIDTH: torchvision/googlenet has "
        "64.",
    ),
}
"""By the names that ``VideoNetwork.image_trunks`` gives."""

_INCEPTION_V3 = ("Conv2d_1a_3x3.conv.weight", "Mixed_7c.branch1x1.conv.weight")


def auxiliary_heads(keys: Collection[str]) -> tuple[str, ...]:
    """Starts of the keys of a file's extra classifiers, which serve training alone: GoogLeNet's and Inception v3's."""
    if all(kernel in keys for kernel in FAMILIES["googlenet"].kernels):
        return FAMILIES["googlenet"].unused
    return ("AuxLogits.",) if all(kernel in keys for kernel in _INCEPTION_V3) else ()
