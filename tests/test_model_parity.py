"""Equality with the public implementations, by copied weights with calibrated normalisation, and parameter counts.

At default initialisation a wrong padding changes the logits by 3e-7 only; with calibrated normalisation and random
gammas it shows. Every comparison has a control that must fail.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import resnet18
from torchvision.models.video import mc3_18, r2plus1d_18, r3d_18, s3d

from distinit_plugin.models import InputSpec, VideoNetwork, build_network
from distinit_plugin.models.conv import Conv3d

CLIP = InputSpec()

PARAMETERS = [
    ("Res3D", 18, "vmz", {400: 33_371_472, 51: 33_192_435, 101: 33_218_085, 365: 33_353_517, 1000: 33_679_272}),
    ("Res3D", 18, "torchvision", {400: 33_371_472}),
    ("Res3D", 34, "vmz", {400: 63_681_104}),
    ("R2Plus1D", 18, "vmz", {400: 33_370_839, 51: 33_191_802, 101: 33_217_452, 365: 33_352_884, 1000: 33_678_639}),
    (
        "R2Plus1D",
        18,
        "torchvision",
        {400: 31_505_325, 51: 31_326_288, 101: 31_351_938, 365: 31_487_370, 1000: 31_813_125},
    ),
    ("R2Plus1D", 34, "vmz", {400: 63_697_175}),
    ("R2Plus1D", 34, "torchvision", {400: 61_831_661}),
]


@pytest.mark.parametrize(
    ("name", "depth", "variant", "num_classes", "count"),
    [(name, depth, variant, k, count) for name, depth, variant, counts in PARAMETERS for k, count in counts.items()],
)
def test_parameter_counts(name: str, depth: int, variant: str, num_classes: int, count: int) -> None:
    with torch.device("meta"):
        network = build_network(name, num_classes=num_classes, input=CLIP, depth=depth, variant=variant)
    assert sum(parameter.numel() for parameter in network.parameters()) == count


def calibrated(builder: Callable[..., nn.Module], *shape: int, **arguments: Any) -> nn.Module:
    """A network with random gammas and betas whose running statistics fit its weights, in evaluation mode."""
    generator = torch.Generator().manual_seed(1)
    torch.manual_seed(1)
    network = builder(**arguments).train()
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, (nn.BatchNorm2d, nn.BatchNorm3d)):
                module.weight.uniform_(0.5, 1.5, generator=generator)
                module.bias.normal_(0.0, 0.3, generator=generator)
                module.momentum = None  # the average of all batches
            if isinstance(module, nn.Linear):
                module.weight.normal_(0.0, 0.1, generator=generator)
        for _ in range(2):
            trunk = getattr(network, "features", network)  # s3d's own pool cannot take a small map
            trunk(torch.randn(shape, generator=generator))
    return network.eval()


def build_empty(name: str, num_frames: int = 8, **switches: Any) -> VideoNetwork:
    """A network without values: those that it shows come from the state dict."""
    with torch.device("meta"):
        return build_network(name, num_classes=10, input=InputSpec(num_frames=num_frames), **switches)


def largest_difference(ours: VideoNetwork, theirs: nn.Module, clip: Tensor, reference: Tensor) -> float:
    """Strict loading, then the largest difference of a logit, relative to the largest logit if that is above 1."""
    ours.load_state_dict(theirs.state_dict(), strict=True, assign=True)
    with torch.no_grad():
        logits = ours.eval()({"rgb": clip}).logits
    assert logits is not None
    return float((logits - reference).abs().max() / reference.abs().max().clamp_min(1.0))


@pytest.mark.parametrize(("name", "builder"), [("Res3D", r3d_18), ("R2Plus1D", r2plus1d_18)])
def test_torchvision_weights(name: str, builder: Callable[..., nn.Module]) -> None:
    theirs = calibrated(builder, 2, 3, 8, 56, 56, weights=None, num_classes=10)
    clip = torch.randn(1, 3, 8, 112, 112)
    with torch.no_grad():
        reference = theirs(clip)

    ours = build_empty(name, variant="torchvision")
    assert list(ours.bare_state_dict()) == list(theirs.state_dict())
    assert len(ours.bare_state_dict()) == {"Res3D": 122, "R2Plus1D": 224}[name]
    assert largest_difference(ours, theirs, clip, reference) <= 1e-5
    for module in ours.modules():
        if isinstance(module, Conv3d):
            module.formulation = "conv2d"
    assert largest_difference(ours, theirs, clip, reference) <= 1e-5

    wrong = build_empty(name, variant="torchvision", temporal_padding="replicate")
    assert largest_difference(wrong, theirs, clip, reference) > 1e-2
    other = build_empty(name, variant="vmz")
    if name == "R2Plus1D":
        with pytest.raises(RuntimeError, match="size mismatch"):
            other.load_state_dict(theirs.state_dict(), assign=True)
    else:  # the same shapes, another eps
        assert largest_difference(other, theirs, clip, reference) > 1e-4


@pytest.mark.parametrize(
    ("name", "builder", "shape"),
    [
        ("torchvision/mc3_18", mc3_18, (1, 3, 8, 112, 112)),
        ("torchvision/s3d", s3d, (1, 3, 22, 224, 224)),  # the smallest clip with two positions of its 2×7×7 pool
    ],
)
def test_external_torchvision(name: str, builder: Callable[..., nn.Module], shape: tuple[int, ...]) -> None:
    theirs = calibrated(builder, 2, 3, 16, 64, 64, weights=None, num_classes=10)
    clip = torch.randn(shape)
    with torch.no_grad():
        reference = theirs(clip)
    ours = build_empty(name, num_frames=shape[2])
    assert set(ours.bare_state_dict()) == set(theirs.state_dict())
    assert largest_difference(ours, theirs, clip, reference) <= 1e-5
    assert largest_difference(ours, theirs, clip.flip(2), reference) > 1e-3  # the control: another clip


def test_torchvision_image_weights() -> None:
    theirs = calibrated(resnet18, 4, 3, 96, 96, weights=None, num_classes=10)
    frames = torch.randn(2, 3, 96, 96)
    with torch.no_grad():
        reference = theirs(frames)
        flipped = theirs(frames.flip(3))
    ours = build_empty("Res2D")
    assert list(ours.bare_state_dict()) == list(theirs.state_dict())
    assert largest_difference(ours, theirs, frames[:, :, None], reference) <= 1e-5
    assert largest_difference(ours, theirs, frames[:, :, None], flipped) > 1e-2
