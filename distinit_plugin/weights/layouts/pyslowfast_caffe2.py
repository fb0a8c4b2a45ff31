"""Caffe2 blobs of PySlowFast's model zoo: into PySlowFast's names, and from these into PyTorchVideo's.

Source: github.com/facebookresearch/SlowFast ``slowfast/utils/c2_model_loading.py``. Despite its name ``riv`` is the
variance itself.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from distinit_plugin.weights.layouts.base import Layout, Translation, rename_all
from distinit_plugin.weights.layouts.pyslowfast import translate_pyslowfast

_LEAF = {"w": "weight", "b": "bias"}
_NORM = {"s": "weight", "b": "bias", "rm": "running_mean", "riv": "running_var"}
_END = r"(?:(bn_)(s|b|rm|riv)|([wb]))$"
_STEM = re.compile(rf"^(t_)?(?:res_conv1_|conv1_(xy_)?){_END}")
_SHORTCUT = re.compile(rf"^(t_)?res(\d)_(\d+)_branch1_{_END}")
_UNIT = re.compile(rf"^(t_)?res(\d)_(\d+)_branch2([abc])_{_END}")
_GATE = re.compile(r"^(t_)?res(\d)_(\d+)_branch2b_bn_fc([12])_([wb])$")
_FUSION = re.compile(rf"^t_(?:pool1|res(\d)_\d+_branch2c_bn)_subsample_{_END}")
_NONLOCAL = re.compile(rf"^nonlocal_conv(\d)_(\d+)_(?:(theta|phi|g|out)_)?{_END}")
_HEAD = re.compile(rf"^(pred|conv_5|lin_5)_{_END}")
_NO_WEIGHTS = re.compile(r"_momentum$|(^|_)lr$|iter$|^epoch$")


def pyslowfast_name(blob: str) -> str | None:
    """PySlowFast's key for a blob; ``None`` for one that it has none for."""
    if found := _STEM.match(blob):
        slow, xy, *end = found.groups()
        return f"s1.pathway{_pathway(slow)}_stem.{_leaf('conv_xy' if xy else 'conv', *end, norm='bn')}"
    if found := _FUSION.match(blob):
        stage, *end = found.groups()
        return f"s{stage or 1}_fuse.{_leaf('conv_f2s', *end, norm='bn')}"
    if found := _GATE.match(blob):
        slow, stage, block, number, leaf = found.groups()
        return f"s{stage}.pathway{_pathway(slow)}_res{block}.branch2.se.fc{number}.{_LEAF[leaf]}"
    if found := _SHORTCUT.match(blob):
        slow, stage, block, *end = found.groups()
        return f"s{stage}.pathway{_pathway(slow)}_res{block}.{_leaf('branch1', *end)}"
    if found := _UNIT.match(blob):
        slow, stage, block, unit, *end = found.groups()
        return f"s{stage}.pathway{_pathway(slow)}_res{block}.branch2.{_leaf(unit, *end)}"
    if found := _NONLOCAL.match(blob):
        stage, block, part, *end = found.groups()
        return f"s{stage}.pathway0_nonlocal{block}.{_leaf(f'conv_{part}', *end, norm='bn')}"
    if found := _HEAD.match(blob):
        part, *end = found.groups()
        return f"head.{_leaf('projection' if part == 'pred' else part, *end)}"
    return None


def _pathway(mark: str | None) -> int:
    return 1 if mark else 0


def _leaf(module: str, is_norm: str | None, norm_leaf: str, leaf: str, *, norm: str = "") -> str:
    """``module.weight``, or ``module_bn.running_mean`` (``norm`` in place of that name)."""
    return f"{norm or f'{module}_bn'}.{_NORM[norm_leaf]}" if is_norm else f"{module}.{_LEAF[leaf]}"


def translate_blobs(tensors: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> Translation | None:
    """Blobs → the keys of PySlowFast's networks, or of PyTorchVideo's."""
    is_theirs = "s1.pathway0_stem.bn.weight" in target
    renamed = rename_all(tensors, target if is_theirs else {}, pyslowfast_name, skip=_NO_WEIGHTS)
    if is_theirs:
        return renamed
    further = translate_pyslowfast(renamed.tensors, target)
    return None if further is None else further._replace(skipped=(*renamed.skipped, *further.skipped))


LAYOUTS = (
    Layout(
        "pyslowfast-c2",
        "PySlowFast's Caffe2 model zoo (.pkl of C2D, I3D, SLOW, SLOWFAST and X3D)",
        "slowfast/ResNet, SlowFast, X3D, and their counterparts of pytorchvideo/",
        (r"^res_conv1_bn_riv$", r"^res2_0_branch2a_w$"),
        translate_blobs,
        mean=(0.45, 0.45, 0.45),
        std=(0.225, 0.225, 0.225),
    ),
)
