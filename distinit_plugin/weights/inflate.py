"""2D kernels repeated along time and divided by its extent.

Source: J. Carreira and A. Zisserman, "Quo Vadis" (arXiv 1705.07750) §2.4. DistInit (arXiv 1901.09244) describes the
repetition alone; without the division activations explode, so it is always done.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor, nn

from distinit_plugin.errors import UserError
from distinit_plugin.models.residual import BATCH_NORM_EPS, ResidualNetwork
from distinit_plugin.types import Network
from distinit_plugin.weights.keymaps import is_counter, resnet_2d_to_res3d
from distinit_plugin.weights.load import compare, copy_tensors, match_keys, only_classifier
from distinit_plugin.weights.report import LoadReport, shorten
from distinit_plugin.weights.sources import source_weights

STEM_KERNEL = "stem.0.weight"

_FACTORED = re.compile(r"conv\d\.0\.0\.weight$")
_2D_FIRST_KERNEL = "conv1.weight"


def inflate_kernel(kernel: Tensor, in_channels: int, num_taps: int) -> Tensor:
    """(O,I,h,w) → (O,I',N,h,w): each tap is the 2D kernel divided by N.

    For another number of input channels I' (flow has 2) every one of them gets the mean of the image channels, as in
    DistInit table 5.
    """
    if kernel.shape[1] != in_channels:
        kernel = kernel.mean(dim=1, keepdim=True).expand(-1, in_channels, -1, -1)
    return kernel.unsqueeze(2).expand(-1, -1, num_taps, -1, -1) / num_taps


def inflate_state_dict(
    state_2d: Mapping[str, Tensor], network_3d: Network, source: str = "the 2D network"
) -> LoadReport:
    """Inflate a 2D ResNet's weights into a Res3D of the same depth and width, in place.

    BN parameters and statistics are copied as they are. The classifier is copied when it has as many classes, else
    left at its initialisation and reported.

    Args:
        state_2d: State dict with torchvision's or timm's ResNet keys.
        network_3d: The network to fill.
        source: Where ``state_2d`` is from, for the report.

    Raises:
        UserError: ``network_3d`` is not the 3D counterpart of the 2D network; it is untouched.
    """
    target = network_3d.bare_state_dict()
    _refuse_factored(target)
    if STEM_KERNEL not in target:
        raise UserError(
            f"INIT.INFLATE_FROM: {type(network_3d).__name__} is not a 3D ResNet with an image counterpart. "
            "Inflation is for Res3D (and torchvision/r3d_18, torchvision/mc3_18); clear INIT.INFLATE_FROM."
        )
    renamed = {
        resnet_2d_to_res3d(key): value for key, value in match_keys(state_2d, [_2D_FIRST_KERNEL, "bn1", "fc"]).items()
    }
    inflated = {key: _fit(key, value, target.get(key)) for key, value in renamed.items()}
    report = compare(target, inflated, source)
    _refuse_unequal(report, target)
    report = replace(report, notes=_notes(network_3d, report))
    copy_tensors(target, inflated, report)
    return report


def inflate(network: Network, source_name: str, weights: str) -> LoadReport:
    """Fill a 3D network from the weights of a 2D one by name.

    Args:
        network: The network to fill.
        source_name: ``torchvision/NAME``, ``timm/NAME`` or ``Res2D``.
        weights: torchvision tag, ``timm``, or a file.

    Raises:
        UserError: No counterpart (see :func:`inflate_state_dict`).
        WeightsError: The weights cannot be had or read.
    """
    _refuse_factored(network.bare_state_dict())
    if weights in ("", "random"):
        raise UserError(
            f"INIT.INFLATE_WEIGHTS is '{weights}': inflating {source_name} needs trained weights. Give a torchvision "
            "tag (IMAGENET1K_V1), 'timm', or a file."
        )
    file = source_weights(source_name, weights)
    return inflate_state_dict(file.tensors, network, f"{source_name} ({file.path}), inflated")


def _fit(key: str, value: Tensor, wanted: Tensor | None) -> Tensor:
    """Inflate a convolution kernel to the shape that the network wants where that is possible."""
    if wanted is None or value.ndim != 4 or wanted.ndim != 5:
        return value
    fits = key == STEM_KERNEL or value.shape[1] == wanted.shape[1]
    return inflate_kernel(value, wanted.shape[1] if fits else value.shape[1], wanted.shape[2])


def _refuse_factored(target: Mapping[str, Tensor]) -> None:
    if any(_FACTORED.search(key) for key in target):
        raise UserError(
            "INIT.INFLATE_FROM: R(2+1)D has no 2D counterpart (its kernels are split into space and time), so nothing "
            "can be inflated into it. Use MODEL.MODEL_NAME Res3D, or pre-train R2Plus1D with DISTILL.TEACHERS instead."
        )


def _refuse_unequal(report: LoadReport, target: Mapping[str, Tensor]) -> None:
    """Everything but the classifier must have its counterpart, in both directions."""
    classifier = {mismatch.name for mismatch in report.mismatched} if only_classifier(report.mismatched) else set()
    classifier |= {key for key in (*report.missing, *report.unexpected) if key.startswith("fc.")}
    problems = [
        f"{label}: {shorten(names)}"
        for label, names in (
            ("only in 3D", tuple(key for key in report.missing if key not in classifier)),
            ("only in 2D", tuple(key for key in report.unexpected if key not in classifier)),
            ("of another shape", tuple(str(m) for m in report.mismatched if m.name not in classifier)),
        )
        if names
    ]
    if problems or not any(not is_counter(key) for key in report.loaded):
        raise UserError(
            f"INIT.INFLATE_FROM: {report.source} is not the 2D counterpart of the network ({'; '.join(problems)}). "
            "It must be a ResNet with the same RESNET.DEPTH and NETWORK.WIDTH: resnet18 for depth 18, resnet50 for 50."
        )


def _notes(network: Network, report: LoadReport) -> tuple[str, ...]:
    notes = []
    if report.mismatched or any(key.startswith("fc.") for key in report.missing):
        notes.append("the classifier keeps its random initialisation")
    if isinstance(network, ResidualNetwork):
        if isinstance(network.stem_pool, nn.Identity):
            notes.append(
                "the 2D network pools after its stem and this one does not (NETWORK.STEM_POOL False, as in the paper): "
                "features change scale in space, a still video does not give the image's logits"
            )
        norm = network.stem[1] if isinstance(network.stem, nn.Sequential) else None
        if isinstance(norm, nn.BatchNorm3d) and norm.eps != BATCH_NORM_EPS["torchvision"]:
            notes.append(
                f"BN eps is {norm.eps:g} here and {BATCH_NORM_EPS['torchvision']:g} in the 2D network "
                "(NETWORK.VARIANT torchvision has the latter)"
            )
    return tuple(notes)
