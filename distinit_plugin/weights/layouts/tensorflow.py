"""TensorFlow's public checkpoints: DeepMind's I3D, TF-slim's S3D-G and I3D (D3D's are S3D-G's).

Sources: github.com/google-deepmind/kinetics-i3d ``i3d.py`` and its checkpoint indices; github.com/tensorflow/models
``research/slim/nets/{s3dg,i3d_utils}.py``.
"""

from __future__ import annotations

import re

from torch import Tensor

from distinit_plugin.weights.layouts.base import MINUS_ONE_TO_ONE, Layout
from distinit_plugin.weights.layouts.inception import inception

_UNIT = r"(Conv[23]d_(?:1a_7x7|2b_1x1|2c_3x3)|Mixed_\d[b-f]/Branch_[0-3]/Conv[23]d_0[ab]_[13]x[13])"
_DEEPMIND = re.compile(rf"^(?:(?:RGB|Flow)/inception_i3d/)?{_UNIT}/(conv_3d/w|batch_norm/\w+)$")
_DEEPMIND_CLASSIFIER = re.compile(r"^(?:(?:RGB|Flow)/inception_i3d/)?Logits/Conv3d_0c_1x1/conv_3d/([wb])$")
_SLIM = re.compile(rf"^(?:.*/)?InceptionV1/{_UNIT}/((?:BatchNorm/|temporal/|self_gating/transformer_W/)?\w+)$")
_SLIM_CLASSIFIER = re.compile(r"^(?:.*/)?InceptionV1/Logits/Conv2d_0c_1x1/(weights|biases)$")
_IN_BLOCK = re.compile(r"^(Mixed_\d[b-f])/Branch_([0-3])/Conv[23]d_0[ab]_([13])x")

_NORM = {"beta": "bias", "gamma": "weight", "moving_mean": "running_mean", "moving_variance": "running_var"}
_PARTS = {
    "conv_3d/w": "conv.weight",
    "weights": "conv.weight",
    "temporal/weights": "temporal.weight",
    "temporal/biases": "temporal.bias",
    "self_gating/transformer_W/weights": "gate.weight",
    **{f"{scope}/{theirs}": f"bn.{ours}" for scope in ("batch_norm", "BatchNorm") for theirs, ours in _NORM.items()},
}

NO_WEIGHTS = re.compile(
    r"/(?:Momentum|RMSProp(?:_1)?|Adam(?:_1)?|ExponentialMovingAverage|Adagrad)$|(?:^|/)(?:global_step|beta[12]_power)$"
)
"""Slots of the optimizers, moving averages and counters of steps."""


def unit_name(scope: str) -> str:
    """``Mixed_3b/Branch_1/Conv3d_0b_3x3`` → ``Mixed_3b.b1b``; units of the stem keep their name, as I3D writes it.

    Position in the branch follows from the kernel, since in Mixed_5b one 3×3 is named 0a.
    """
    found = _IN_BLOCK.match(scope)
    if not found:
        return "Conv3d_" + scope[len("Conv3d_") :]
    block, branch, size = found.groups()
    position = {"0": "", "3": "b"}.get(branch, "a" if size == "1" else "b")
    return f"{block}.b{branch}{position}"


def from_deepmind(key: str) -> str | None:
    """``RGB/inception_i3d/Mixed_3b/Branch_0/Conv3d_0a_1x1/conv_3d/w`` → ``Mixed_3b.b0.conv.weight``."""
    classifier = _DEEPMIND_CLASSIFIER.match(key)
    if classifier:
        return "fc.weight" if classifier[1] == "w" else "fc.bias"
    return _ours(_DEEPMIND.match(key))


def from_slim(key: str) -> str | None:
    """``InceptionV1/Mixed_3b/Branch_1/Conv2d_0b_3x3/temporal/biases`` → ``Mixed_3b.b1b.temporal.bias``."""
    classifier = _SLIM_CLASSIFIER.match(key)
    if classifier:
        return "fc.weight" if classifier[1] == "weights" else "fc.bias"
    return _ours(_SLIM.match(key))


def channels_first(value: Tensor, key: str) -> Tensor:
    """Kernels (t,h,w,in,out) → (out,in,t,h,w)."""
    return value.permute(4, 3, 0, 1, 2) if value.ndim == 5 and key.endswith(("conv.weight", *_PERMUTED)) else value


_PERMUTED = ("temporal.weight", "gate.weight", "fc.weight")


def _ours(found: re.Match[str] | None) -> str | None:
    if found is None or found[2] not in _PARTS:
        return None
    return f"{unit_name(found[1])}.{_PARTS[found[2]]}"


LAYOUTS = (
    Layout(
        "kinetics-i3d",
        "DeepMind's kinetics-i3d (model.ckpt.index of rgb_imagenet, flow_imagenet, rgb_scratch_kin600, …)",
        "I3D",
        (r"(^|/)Conv3d_1a_7x7/conv_3d/w$", r"(^|/)Mixed_5c/Branch_3/Conv3d_0b_1x1/conv_3d/w$"),
        inception(from_deepmind, skip=NO_WEIGHTS, change=channels_first),
        {"padding": "same"},
        MINUS_ONE_TO_ONE,
        MINUS_ONE_TO_ONE,
    ),
    Layout(
        "tf-slim",
        "TF-slim's S3D-G and I3D, and D3D's checkpoints",
        "S3DG, I3D",
        (r"(^|/)InceptionV1/Conv2d_1a_7x7/weights$", r"(^|/)InceptionV1/Mixed_5c/Branch_3/Conv2d_0b_1x1/weights$"),
        inception(from_slim, skip=NO_WEIGHTS, change=channels_first),
        {"padding": "same"},
        MINUS_ONE_TO_ONE,
        MINUS_ONE_TO_ONE,
    ),
)
