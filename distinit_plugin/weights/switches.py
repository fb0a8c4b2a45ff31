"""What a network's weights tell of its switches: their names and shapes, under the names of our networks."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

from torch import Tensor

from distinit_plugin.models.inception import shorthand
from distinit_plugin.models.inception3d import NOWHERE, STARTS
from distinit_plugin.models.r2plus1d import mid_channels
from distinit_plugin.models.residual import DEPTHS

_BLOCK = re.compile(r"^layer([1-4])\.(\d+)\.")
_INCEPTION_STEM = re.compile(r"^(Conv[23]d_)1a_7x7\.conv\.weight$")
_TRUNK_STEM = re.compile(r"^(trunk|rgb|flow)\.Conv2d_1a_7x7\.conv\.weight$")
"""Of the networks that run a 2D trunk on each frame: ConvLSTM, and TwoStream and Fused3D with one for each stream."""
_C3D_STEM = "conv1a.0.weight"
_NORMALISED = re.compile(r"\.(bn|temporal_bn)\.weight$")


def switches_of(tensors: Mapping[str, Tensor], filled: Collection[str] = ()) -> dict[str, object]:
    """Switch → value, for those that names and shapes decide; ``modality`` is among them.

    Args:
        tensors: Under the keys of the networks of this package; others give nothing.
        filled: Keys that the file does not have itself.
    """
    kernels = {key: value for key, value in tensors.items() if value.ndim >= 4}
    if stem := next(filter(_INCEPTION_STEM.match, kernels), None):
        return _inception(tensors, kernels, stem, filled)
    if trunk := next(filter(None, map(_TRUNK_STEM.match, kernels)), None):
        seen = {match[1] for match in map(_TRUNK_STEM.match, kernels) if match} - {"trunk"}
        modality = {"streams": "both" if len(seen) > 1 else seen.pop()} if seen else _modality(kernels[trunk[0]])
        return {**modality, "width": len(kernels[trunk[0]]), "affine_norm": _has_factors(tensors, filled)}
    if _C3D_STEM in kernels:
        return {**_modality(kernels[_C3D_STEM]), "width": len(kernels[_C3D_STEM])}
    stem = next((key for key in ("stem.0.weight", "conv1.weight") if key in kernels), None)
    return {} if stem is None or not any(_BLOCK.match(key) for key in tensors) else _residual(kernels, stem)


def _residual(kernels: Mapping[str, Tensor], stem: str) -> dict[str, object]:
    found: dict[str, object] = _modality(kernels[stem])
    found["width"] = len(kernels.get("stem.3.weight", kernels[stem]))  # 3: of a factored stem
    blocks: dict[str, set[str]] = {}
    for key in kernels:
        if match := _BLOCK.match(key):
            blocks.setdefault(match[1], set()).add(match[2])
    counts = tuple(len(blocks.get(stage, ())) for stage in "1234")
    bottleneck = any(key.startswith("layer1.0.conv3.") for key in kernels)
    for depth, blocks_of in DEPTHS.items():
        if (blocks_of.num_blocks, blocks_of.bottleneck) == (counts, bottleneck):
            found["depth"] = depth
    factored = kernels.get("layer2.0.conv2.0.0.weight")
    if factored is not None:  # VMZ has middle channels for each convolution, torchvision for the block's input
        middle, channels = factored.shape[:2]
        found["variant"] = "vmz" if middle == mid_channels(channels, channels) else "torchvision"
    return found


def _inception(
    tensors: Mapping[str, Tensor], kernels: Mapping[str, Tensor], stem: str, filled: Collection[str]
) -> dict[str, object]:
    prefix = stem[: len("Conv3d_")]
    found: dict[str, object] = _modality(kernels[stem])
    temporal = kernels.get(f"{prefix}1a_7x7.temporal.weight")
    found["width"] = len(kernels[stem])
    found["affine_norm"] = _has_factors(tensors, filled)
    found["separable_stem"] = temporal is not None
    found["stem_frames"] = (kernels[stem] if temporal is None else temporal).shape[2]
    found["temporal_norm"] = any(".temporal_bn." in key for key in tensors)
    for switch, part in (("temporal_from", ".temporal.weight"), ("gating_from", ".gate.weight")):
        having = (
            shorthand(start)
            for start in STARTS
            for place in [f"{start.replace('Conv2d_', prefix)}."]
            if any(key.startswith(place) and part in key for key in tensors)
        )
        found[switch] = next(having, NOWHERE)
    return found


def _has_factors(tensors: Collection[str], filled: Collection[str]) -> bool:
    return any(_NORMALISED.search(key) and key not in filled for key in tensors)


def _modality(kernel: Tensor) -> dict[str, object]:
    return {"modality": {2: "flow", 3: "rgb"}[kernel.shape[1]]} if kernel.shape[1] in (2, 3) else {}
