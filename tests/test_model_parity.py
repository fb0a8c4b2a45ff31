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
from torchvision.models import googlenet, resnet18
from torchvision.models.video import mc3_18, r2plus1d_18, r3d_18, s3d

from distinit_plugin.models import InputSpec, VideoNetwork, build_network
from distinit_plugin.models.conv import Conv3d

CLIP = InputSpec()

FLOW = InputSpec(mean=(0.5, 0.5), std=(0.25, 0.25), modality="flow")
S3D = {  # torchvision's network
    "padding": "symmetric",
    "affine_norm": True,
    "stem_frames": 7,
    "separable_stem": True,
    "temporal_norm": True,
    "gating_from": "none",
}


def with_classifier(trunk: int, features: int) -> dict[int, int]:
    """Classes → parameters, of a trunk and a linear classifier."""
    return {classes: trunk + classes * (features + 1) for classes in (0, 51, 101, 400)}


PARAMETERS: list[tuple[str, dict[str, Any], dict[int, int]]] = [
    (
        "Res3D",
        {"depth": 18, "variant": "vmz"},
        {400: 33_371_472, 51: 33_192_435, 101: 33_218_085, 365: 33_353_517, 1000: 33_679_272},
    ),
    ("Res3D", {"depth": 18, "variant": "torchvision"}, {400: 33_371_472}),
    ("Res3D", {"depth": 34, "variant": "vmz"}, {400: 63_681_104}),
    (
        "R2Plus1D",
        {"depth": 18, "variant": "vmz"},
        {400: 33_370_839, 51: 33_191_802, 101: 33_217_452, 365: 33_352_884, 1000: 33_678_639},
    ),
    (
        "R2Plus1D",
        {"depth": 18, "variant": "torchvision"},
        {400: 31_505_325, 51: 31_326_288, 101: 31_351_938, 365: 31_487_370, 1000: 31_813_125},
    ),
    ("R2Plus1D", {"depth": 34, "variant": "vmz"}, {400: 63_697_175}),
    ("R2Plus1D", {"depth": 34, "variant": "torchvision"}, {400: 61_831_661}),
    ("S3DG", {}, {400: 9_518_848, 600: 9_723_848, **with_classifier(9_108_848, 1024)}),
    ("S3DG", {"input": FLOW}, with_classifier(9_509_440 - 400 * 1025, 1024)),
    ("S3DG", {"affine_norm": True}, {400: 9_526_128}),
    ("S3DG", {"stem_frames": 7}, {400: 9_556_480}),
    ("S3DG", {"gating_from": "none"}, {400: 8_299_520}),
    ("S3DG", {"gating_from": "none", "stem_frames": 7}, {400: 8_337_152}),
    ("S3DG", {**S3D, "gating_from": "2C"}, {400: 9_539_376}),
    ("S3DG", {"temporal_norm": True, "affine_norm": True}, {400: 9_529_392}),
    ("S3DG", S3D, {400: 8_320_048}),
    ("S3DG", {"temporal_from": "3B", "gating_from": "3B"}, {400: 9_371_200}),
    ("I3D", {}, with_classifier(12_689_984 - 400 * 1025, 1024)),
    ("I3D", {"input": FLOW}, with_classifier(12_668_032 - 400 * 1025, 1024)),
    ("I3D", {"affine_norm": True}, {400: 12_697_264}),
    ("I3D", {"affine_norm": True, "input": FLOW}, {400: 12_675_312}),
]
"""Network, switches, classes → parameters, as published or counted on the published code."""


@pytest.mark.parametrize(
    ("name", "switches", "num_classes", "count"),
    [(name, switches, k, count) for name, switches, counts in PARAMETERS for k, count in counts.items()],
)
def test_parameter_counts(name: str, switches: dict[str, Any], num_classes: int, count: int) -> None:
    with torch.device("meta"):
        network = build_network(name, **{"num_classes": num_classes, "input": CLIP, **switches})
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


@pytest.fixture(scope="module")
def torchvision_s3d() -> nn.Module:
    return calibrated(s3d, 2, 3, 16, 64, 64, weights=None, num_classes=10)


def test_torchvision_s3d(torchvision_s3d: nn.Module) -> None:
    """Both state dicts have the same entries in the same order, under other names."""
    theirs = torchvision_s3d.state_dict()
    keys = list(build_empty("S3DG", **S3D).bare_state_dict())
    assert len(keys) == len(theirs) == 464
    renamed = dict(zip(keys, theirs.values(), strict=True))
    renamed["fc.weight"] = renamed["fc.weight"].flatten(1)

    def logits(clip: Tensor, **switches: Any) -> Tensor:
        ours = build_empty("S3DG", **{**S3D, **switches})
        ours.load_state_dict(renamed, strict=True, assign=True)
        with torch.no_grad():
            output = ours.eval()({"rgb": clip}).logits
        assert output is not None
        return output

    def difference(found: Tensor, reference: Tensor) -> float:
        return float((found - reference).abs().max() / reference.abs().max())

    clip = torch.randn(1, 3, 22, 224, 224)  # the smallest clip with two positions of their 2×7×7 pool
    with torch.no_grad():
        assert difference(logits(clip), torchvision_s3d(clip)) <= 1e-5
        small = clip[:, :, :16, :64, :64]
        trunk = torchvision_s3d.get_submodule("features")(small)
        head = torchvision_s3d.get_submodule("classifier")
        reference = head(trunk.mean(dim=(2, 3, 4), keepdim=True)).flatten(1)
    assert difference(logits(small), reference) <= 1e-5
    assert difference(logits(small, padding="same"), reference) > 1e-2
    assert difference(logits(small, temporal_padding="replicate"), reference) > 1e-2


def test_i3d_is_torchvision_googlenet_on_still_clips() -> None:
    """Kernels repeated and divided, in the same order; the control: TensorFlow's padding."""
    theirs = calibrated(
        googlenet,
        4,
        3,
        96,
        96,
        weights=None,
        num_classes=10,
        aux_logits=False,
        init_weights=True,
        transform_input=False,
    )
    theirs.double()  # calibrated random weights amplify rounding
    frames = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        reference = theirs(frames)
    difference = {}
    for padding in ("symmetric", "same"):
        ours = build_empty("I3D", padding=padding, temporal_padding="replicate", affine_norm=True)
        target = ours.bare_state_dict()
        inflated = {}
        for (key, wanted), value in zip(target.items(), theirs.state_dict().values(), strict=True):
            depth = wanted.shape[2] if wanted.dim() == 5 else 0
            inflated[key] = value.unsqueeze(2).expand(-1, -1, depth, -1, -1) / depth if depth else value
        ours.load_state_dict(inflated, strict=True, assign=True)
        with torch.no_grad():
            logits = ours.eval()({"rgb": frames.unsqueeze(2).expand(-1, -1, 16, -1, -1)}).logits
        assert logits is not None
        difference[padding] = float((logits - reference).abs().max() / reference.abs().max())
    assert difference["symmetric"] <= 1e-9
    assert difference["same"] > 1e-2


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
