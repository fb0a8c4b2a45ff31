"""Key names of public checkpoints, translated into ours."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import TypeVar

Value = TypeVar("Value")

WRAPPER_PREFIXES = ("module.", "_orig_mod.")
"""Put before every key by DataParallel/DDP and ``torch.compile``."""

_RESNET_2D = (
    (re.compile(r"^conv1\."), "stem.0."),
    (re.compile(r"^bn1\."), "stem.1."),
    (re.compile(r"^(layer\d+\.\d+)\.conv(\d)\."), r"\1.conv\2.0."),
    (re.compile(r"^(layer\d+\.\d+)\.bn(\d)\."), r"\1.conv\2.1."),
)

_OLD_DENSENET = re.compile(r"(denselayer\d+)\.(norm|conv)\.([12])\.")


def is_counter(key: str) -> bool:
    """Whether a key is BN's ``num_batches_tracked``: absent from files older than PyTorch 0.4, and never used here."""
    return key.rpartition(".")[2] == "num_batches_tracked"


def strip_common_prefix(tensors: Mapping[str, Value], prefixes: Collection[str]) -> dict[str, Value]:
    """Drop those ``prefixes`` that every key has, as often as they repeat."""
    result = dict(tensors)
    while result:
        prefix = next((p for p in prefixes if all(key.startswith(p) for key in result)), None)
        if prefix is None:
            break
        result = {key[len(prefix) :]: value for key, value in result.items()}
    return result


def align_prefix(tensors: Mapping[str, Value], wanted: Collection[str]) -> dict[str, Value]:
    """Drop leading parts that all keys share and no key of ``wanted`` starts with (``model.``, ``backbone.``, …)."""
    result = dict(tensors)
    while result:
        first = {key.partition(".")[0] + "." for key in result}
        if len(first) != 1 or any(key.startswith(tuple(first)) for key in wanted):
            break
        prefix = first.pop()
        if not all(len(key) > len(prefix) for key in result):
            break
        result = {key[len(prefix) :]: value for key, value in result.items()}
    return result


def modern_key(key: str) -> str:
    """The key of today's torchvision for one of its old DenseNet names (``denselayer1.norm.1.`` → ``….norm1.``)."""
    return _OLD_DENSENET.sub(r"\1.\2\3.", key)


def resnet_2d_to_res3d(key: str) -> str:
    """Res3D's key for a key of torchvision's or timm's ResNet; shortcuts and ``fc`` have the same name in both."""
    for pattern, replacement in _RESNET_2D:
        key, found = pattern.subn(replacement, key)
        if found:
            break
    return key
