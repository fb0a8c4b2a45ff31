"""PySlowFast's names of its ResNets (C2D, I3D, SLOW, SLOWFAST) and X3D, translated into PyTorchVideo's.

Sources: github.com/facebookresearch/SlowFast ``slowfast/models/{stem,resnet,head}_helper.py``; PyTorchVideo
``models/{resnet,slowfast,x3d}.py``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from distinit_plugin.weights.layouts.base import Layout, Translation, rename_all

_STAGE = re.compile(r"^blocks\.(\d+)\.(multipathway_blocks\.0\.)?res_blocks\.0\.branch2\.")
_EPS = 1e-5  # of PySlowFast's BN
_X3D_STEM = "blocks.0.conv.conv_t.weight"

_IN_STEM = re.compile(r"^s1\.pathway([01])_stem\.(conv_xy|conv|bn)\.(\w+)$")
_IN_STAGE = re.compile(r"^s([2-5])\.pathway([01])_res(\d+)\.(.+)$")
_IN_FUSION = re.compile(r"^s([1-4])_fuse\.(conv_f2s|bn)\.(\w+)$")
_IN_HEAD = re.compile(r"^head\.(projection|conv_5|conv_5_bn|lin_5)\.(\w+)$")
_SHORTCUT = re.compile(r"^branch1(_bn)?\.(\w+)$")
_UNIT = re.compile(r"^branch2\.([abc])(_bn)?\.(\w+)$")
_GATE = re.compile(r"^branch2\.se\.fc([12])\.(\w+)$")


def translate_pyslowfast(tensors: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> Translation | None:
    """PySlowFast's keys → PyTorchVideo's, whose blocks are counted through, pools and the head included."""
    stages: dict[int, int] = {}
    for key in target:
        if (found := _STAGE.match(key)) and int(found[1]) not in stages.values():
            stages[len(stages) + 2] = int(found[1])
    if len(stages) != 4:
        return None
    is_x3d = _X3D_STEM in target
    two_pathways = any(key.startswith("blocks.0.multipathway_blocks.") for key in target)
    head = next((key.split(".")[1] for key in target if ".proj." in key or ".pool.pre_conv." in key), "head")

    def pathway(block: int, number: str) -> str:
        return f"blocks.{block}.multipathway_blocks.{number}" if two_pathways else f"blocks.{block}"

    def rename(key: str) -> str | None:
        if found := _IN_STEM.match(key):
            part = {"bn": "norm", "conv": "conv"}.get(found[2])
            if is_x3d and found[2] != "bn":  # PyTorchVideo's names of these two are exchanged
                part = "conv.conv_t" if found[2] == "conv_xy" else "conv.conv_xy"
            return None if part is None else f"{pathway(0, found[1])}.{part}.{found[3]}"
        if found := _IN_STAGE.match(key):
            inner = _in_block(found[4], is_x3d)
            return inner and f"{pathway(stages[int(found[1])], found[2])}.res_blocks.{found[3]}.{inner}"
        if found := _IN_FUSION.match(key):
            block = 0 if found[1] == "1" else stages[int(found[1])]
            part = "norm" if found[2] == "bn" else "conv_fast_to_slow"
            return f"blocks.{block}.multipathway_fusion.{part}.{found[3]}"
        if found := _IN_HEAD.match(key):
            parts = {"conv_5": "pool.pre_conv", "conv_5_bn": "pool.pre_norm", "lin_5": "pool.post_conv"}
            return f"blocks.{head}.{parts.get(found[1], 'proj')}.{found[2]}"
        return None

    return _fold_shortcuts(rename_all(tensors, target, rename), target)


def _fold_shortcuts(translation: Translation, target: Mapping[str, Tensor]) -> Translation:
    """BN of shortcuts that PyTorchVideo's X3D does not have (in its first stage), put into what is added up there.

    ``scale · conv(x) + shift`` becomes a scaled kernel and a shift of the other summand's last BN: the same network in
    evaluation.
    """
    tensors, notes = dict(translation.tensors), []
    for mean in [key for key in tensors if key.endswith(".branch1_norm.running_mean") and key not in target]:
        block = mean.removesuffix(".branch1_norm.running_mean")
        names = [f"{block}.branch1_norm.{leaf}" for leaf in ("weight", "bias", "running_mean", "running_var")]
        kernel, other = f"{block}.branch1_conv.weight", f"{block}.branch2.norm_c.bias"
        if not all(name in tensors for name in (*names, kernel, other)):
            continue
        gamma, beta, average, variance = (tensors.pop(name) for name in names)
        tensors.pop(f"{block}.branch1_norm.num_batches_tracked", None)
        scale = gamma / (variance + _EPS).sqrt()
        tensors[kernel] = tensors[kernel] * scale[:, None, None, None, None]
        tensors[other] = tensors[other] + beta - average * scale
        notes.append(
            f"{block}: PyTorchVideo's shortcut has no BN, so the file's is folded into branch1_conv and norm_c: the "
            "same in evaluation, not the same to fine-tune"
        )
    return translation._replace(tensors=tensors, notes=(*translation.notes, *notes))


def _in_block(key: str, is_x3d: bool) -> str | None:
    if found := _SHORTCUT.match(key):
        return f"branch1_{'norm' if found[1] else 'conv'}.{found[2]}"
    if found := _UNIT.match(key):
        wrapped = ".0" if is_x3d and found[1] == "b" and found[2] else ""  # in a sequence with the gate
        return f"branch2.{'norm' if found[2] else 'conv'}_{found[1]}{wrapped}.{found[3]}"
    if found := _GATE.match(key):
        return f"branch2.norm_b.1.block.{0 if found[1] == '1' else 2}.{found[2]}"
    return None


LAYOUTS = (
    Layout(
        "pyslowfast",
        "PySlowFast's C2D, I3D, SLOW, SLOWFAST and X3D (.pyth)",
        "pytorchvideo/c2d_r50, i3d_r50, slow_r50, slowfast_*, x3d_*",
        (r"^s1\.pathway0_stem\.", r"^s2\.pathway0_res0\.branch2\.a\.weight$"),
        translate_pyslowfast,
        mean=(0.45, 0.45, 0.45),
        std=(0.225, 0.225, 0.225),
    ),
)
