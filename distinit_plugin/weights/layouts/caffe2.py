"""VMZ's Caffe2 blobs of R(2+1)D and R3D.

Sources: github.com/facebookresearch/VMZ ``c2/lib/models/{r3d_model,builder/video_model}.py``;
github.com/moabitcoin/ig65m-pytorch ``ig65m/cli/convert.py``. Despite its name ``riv`` is the variance itself.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from distinit_plugin.weights.layouts.base import Layout, Translation, rename_all

_NORM = {"s": "weight", "b": "bias", "rm": "running_mean", "riv": "running_var"}
_BLOCK_CONV = re.compile(r"^comp_(\d+)_conv_(\d)(_middle)?_w$")
_BLOCK_NORM = re.compile(r"^comp_(\d+)_spatbn_(\d)(_middle)?_(s|b|rm|riv)$")
_SHORTCUT = re.compile(r"^shortcut_projection_(\d+)_(?:w|spatbn_(s|b|rm|riv))$")
_STEM = re.compile(r"^conv1(_middle)?_(?:w|spatbn_relu_(s|b|rm|riv))$")
_CLASSIFIER = re.compile(r"^last_out_L\d+_([wb])$")
_NO_WEIGHTS = re.compile(r"_momentum$|(^|_)lr$|iter$|^epoch$")


def translate_blobs(tensors: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> Translation | None:
    """Blobs → Res3D's and R2Plus1D's keys. Blocks are counted through; those with a shortcut begin a stage."""
    if "stem.0.weight" not in target:
        return None
    blobs = {key.rpartition("/")[2]: value for key, value in tensors.items()}  # gpu_0/NAME
    starts = sorted({0, *(int(found[1]) for key in blobs if (found := _SHORTCUT.match(key)))})
    factored = {(found[1], found[2]) for key in blobs if (found := _BLOCK_CONV.match(key)) and found[3]}
    factored_stem = "conv1_middle_w" in blobs

    def block(number: str) -> str:
        stage = sum(start <= int(number) for start in starts)
        return f"layer{stage}.{int(number) - starts[stage - 1]}"

    def rename(key: str) -> str | None:
        if found := _STEM.match(key):
            first = 0 if found[1] or not factored_stem else 3
            return f"stem.{first}.weight" if found[2] is None else f"stem.{first + 1}.{_NORM[found[2]]}"
        if found := _BLOCK_CONV.match(key):
            inner = ("0.0" if found[3] else "0.3") if (found[1], found[2]) in factored else "0"
            return f"{block(found[1])}.conv{found[2]}.{inner}.weight"
        if found := _BLOCK_NORM.match(key):
            return f"{block(found[1])}.conv{found[2]}.{'0.1' if found[3] else '1'}.{_NORM[found[4]]}"
        if found := _SHORTCUT.match(key):
            return f"{block(found[1])}.downsample.{'0.weight' if found[2] is None else f'1.{_NORM[found[2]]}'}"
        if found := _CLASSIFIER.match(key):
            return "fc.weight" if found[1] == "w" else "fc.bias"
        return None

    return rename_all(blobs, target, rename, skip=_NO_WEIGHTS)


LAYOUTS = (
    Layout(
        "vmz-caffe2",
        "VMZ's Caffe2 model zoo (.pkl of r2plus1d and r3d)",
        "R2Plus1D, Res3D",
        (r"(^|/)conv1_w$", r"(^|/)comp_0_conv_1_w$", r"(^|/)comp_0_spatbn_1_riv$"),
        translate_blobs,
        {"variant": "vmz"},
    ),
)
