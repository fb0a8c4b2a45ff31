"""Equality with the public implementations, by copied weights with calibrated normalisation, and parameter counts.

At default initialisation a wrong padding changes the logits by 3e-7 only; with calibrated normalisation and random
gammas it shows. Every comparison has a control that must fail.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models import GoogLeNet, googlenet, resnet18, resnet50
from torchvision.models.resnet import ResNet
from torchvision.models.video import mc3_18, r2plus1d_18, r3d_18, s3d
from torchvision.models.video import resnet as video_resnet

from distinit_plugin.models import InputSpec, VideoNetwork, build_network
from distinit_plugin.models.conv import Conv3d
from distinit_plugin.models.inception import MIXED
from distinit_plugin.models.inception2d import InceptionTrunk2D
from distinit_plugin.types import ModelOutput

CLIP = InputSpec()

FLOW = InputSpec(mean=(0.5, 0.5), std=(0.5, 0.5), modality="flow")
S3D = {  # torchvision's network
    "padding": "symmetric",
    "affine_norm": True,
    "stem_frames": 7,
    "separable_stem": True,
    "temporal_norm": True,
    "gating_from": "none",
}

VMZ, TORCHVISION = {"variant": "vmz"}, {"variant": "torchvision"}
AFFINE = {"affine_norm": True}


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
    # Each class is 4096 + 1, 512 + 1, 2 · (1024 + 1) and 512 + 1 parameters.
    ("C3D", {}, {400: 79_645_520, 51: 79_645_520 - 349 * 4097, 101: 79_645_520 - 299 * 4097}),
    ("ConvLSTM", AFFINE, {400: 8_952_880, 51: 8_952_880 - 349 * 513, 101: 8_952_880 - 299 * 513}),
    ("ConvLSTM", {}, {400: 5_592_624 + 3_147_776 + 400 * 513}),
    ("TwoStream", AFFINE, {400: 12_073_120, 51: 12_073_120 - 349 * 2050, 101: 12_073_120 - 299 * 2050}),
    ("Fused3D", AFFINE, {400: 39_770_896, 51: 39_770_896 - 349 * 513, 101: 39_770_896 - 299 * 513}),
]
"""Network, switches, classes → parameters, as published or counted on the published code.

The recurrent normalisation of ConvLSTM is counted apart: totals are with a plain LSTM of one bias.
"""


@pytest.mark.parametrize(
    ("name", "switches", "num_classes", "count"),
    [(name, switches, k, count) for name, switches, counts in PARAMETERS for k, count in counts.items()],
)
def test_parameter_counts(name: str, switches: dict[str, Any], num_classes: int, count: int) -> None:
    with torch.device("meta"):
        network = build_network(name, **{"num_classes": num_classes, "input": CLIP, **switches})
    sizes = {key: parameter.numel() for key, parameter in network.named_parameters()}
    recurrent = {key: size for key, size in sizes.items() if "lstm." in key and "_norm." in key}
    assert sum(sizes.values()) - sum(recurrent.values()) == count
    assert sum(recurrent.values()) == (5_120 if name == "ConvLSTM" else 0)


@pytest.mark.parametrize(
    ("name", "switches", "count", "first_kernel"),
    [
        ("C3D", {}, 79_645_520, 64 * 27),
        ("ConvLSTM", AFFINE, 8_952_880 + 5_120, 64 * 49),
        ("Res3D", {}, 33_371_472, 64 * 3 * 49),
        ("R2Plus1D", {}, 33_370_839, 45 * 49),
    ],
)
def test_flow_networks_lack_a_channel(name: str, switches: dict[str, Any], count: int, first_kernel: int) -> None:
    with torch.device("meta"):
        network = build_network(name, num_classes=400, input=FLOW, **switches)
    assert sum(parameter.numel() for parameter in network.parameters()) == count - first_kernel


def count_operations(network: VideoNetwork, num_frames: int, size: int) -> tuple[float, ModelOutput]:
    """GMACs of one example on the meta device, and the output with all taps."""
    views = {
        name: torch.empty(2, len(spec.mean), num_frames, size, size, device="meta")
        for name, spec in network.view_specs("train").items()
    }
    with FlopCounterMode(display=False) as counter:
        output = network(views, taps=list(network.layers))
    return counter.get_total_flops() / 2 / len(next(iter(views.values()))) / 1e9, output


@pytest.mark.parametrize(
    ("name", "switches", "num_frames", "size", "gmacs"),
    [
        ("C3D", {}, 16, 112, 19.82),
        ("ConvLSTM", {}, 1, 224, 1.498),  # one frame; the LSTM adds 0.2 %
        ("Res3D", {"depth": 34}, 8, 112, 37.689),
        ("R2Plus1D", {"depth": 18}, 8, 112, 20.748),
        ("R2Plus1D", {"depth": 152}, 32, 128, 329.1),  # VMZ's model zoo
    ],
)
def test_operations(name: str, switches: dict[str, Any], num_frames: int, size: int, gmacs: float) -> None:
    with torch.device("meta"):
        network = build_network(name, num_classes=400, input=InputSpec(num_frames=num_frames), **switches)
    assert count_operations(network, num_frames, size)[0] == pytest.approx(gmacs, rel=0.005)


def test_published_shapes() -> None:
    """Quo Vadis: 5×7×7 grids before the fusion, VMZ: R(2+1)D-152 has 118.0 M weights in convolutions and classifier."""
    with torch.device("meta"):
        fused = build_network("Fused3D", num_classes=400, input=CLIP)
        c3d = build_network("C3D", num_classes=400, input=CLIP)
        deep = build_network("R2Plus1D", num_classes=400, input=CLIP, depth=152)
    taps = count_operations(fused, 5, 224)[1].taps
    assert taps["rgb.Mixed_5c"].shape == taps["flow.Mixed_5c"].shape == (2, 1024, 5, 7, 7)
    assert taps["fusion"].shape == (2, 512, 5, 7, 7)
    assert taps["rgb.Mixed_4f"].shape == (2, 832, 5, 14, 14)
    assert taps["flow.MaxPool_3a_3x3"].shape == (2, 192, 5, 28, 28)
    assert count_operations(c3d, 16, 112)[1].taps["conv5b"].shape == (2, 512, 1, 7, 7)
    weights = sum(p.numel() for m in deep.modules() if isinstance(m, (nn.Conv3d, nn.Linear)) for p in m.parameters())
    assert round(weights / 1e6, 1) == 118.0


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


@pytest.fixture(scope="module")
def torchvision_s3d() -> nn.Module:
    return calibrated(s3d, 2, 3, 16, 64, 64, weights=None, num_classes=10)


@pytest.fixture(scope="module")
def torchvision_mc3() -> nn.Module:
    return calibrated(mc3_18, 2, 3, 8, 56, 56, weights=None, num_classes=10)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("mc3", (1, 3, 8, 56, 56)),
        ("s3d", (1, 3, 22, 224, 224)),  # the smallest clip with two positions of its 2×7×7 pool
    ],
)
def test_external_torchvision(name: str, shape: tuple[int, ...], request: pytest.FixtureRequest) -> None:
    theirs = request.getfixturevalue(f"torchvision_{name}")
    clip = torch.randn(shape)
    with torch.no_grad():
        reference = theirs(clip)
    ours = build_empty({"mc3": "torchvision/mc3_18", "s3d": "torchvision/s3d"}[name], num_frames=shape[2])
    assert set(ours.bare_state_dict()) == set(theirs.state_dict())
    assert largest_difference(ours, theirs, clip, reference) <= 1e-5
    assert largest_difference(ours, theirs, clip.flip(2), reference) > 1e-3  # the control: another clip


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


@pytest.mark.parametrize(("depth", "builder"), [(18, resnet18), (50, resnet50)], ids=["basic blocks", "bottlenecks"])
def test_torchvision_image_weights(depth: int, builder: Callable[..., nn.Module]) -> None:
    theirs = calibrated(builder, 4, 3, 96, 96, weights=None, num_classes=10)
    frames = torch.randn(2, 3, 96, 96)
    with torch.no_grad():
        reference = theirs(frames)
        flipped = theirs(frames.flip(3))
    ours = build_empty("Res2D", depth=depth)
    assert list(ours.bare_state_dict()) == list(theirs.state_dict())
    assert largest_difference(ours, theirs, frames[:, :, None], reference) <= 1e-5
    assert largest_difference(ours, theirs, frames[:, :, None], flipped) > 1e-2


@pytest.mark.parametrize("depth", [101, 152])
def test_deeper_image_networks_have_torchvisions_keys(depth: int) -> None:
    blocks = {101: [3, 4, 23, 3], 152: [3, 8, 36, 3]}[depth]
    with torch.device("meta"):
        theirs = ResNet(torchvision.models.resnet.Bottleneck, blocks)
        ours = build_network("Res2D", num_classes=1000, input=CLIP, depth=depth)
    shapes = {key: value.shape for key, value in ours.bare_state_dict().items()}
    assert shapes == {key: value.shape for key, value in theirs.state_dict().items()}


def video_bottlenecks(factored: bool, blocks: tuple[int, int, int, int]) -> nn.Module:
    """torchvision's own bottlenecks, which none of its published networks uses."""
    conv = video_resnet.Conv2Plus1D if factored else video_resnet.Conv3DSimple
    stem = video_resnet.R2Plus1dStem if factored else video_resnet.BasicStem
    return video_resnet.VideoResNet(video_resnet.Bottleneck, [conv] * 4, list(blocks), stem, num_classes=10)


@pytest.mark.parametrize("name", ["Res3D", "R2Plus1D"])
def test_torchvision_bottlenecks(name: str) -> None:
    theirs = calibrated(video_bottlenecks, 2, 3, 8, 32, 32, factored=name == "R2Plus1D", blocks=(3, 4, 6, 3))
    clip = torch.randn(1, 3, 8, 48, 48)
    with torch.no_grad():
        reference = theirs(clip)
    ours = build_empty(name, depth=50, variant="torchvision")
    assert list(ours.bare_state_dict()) == list(theirs.state_dict())
    assert largest_difference(ours, theirs, clip, reference) <= 1e-5
    wrong = build_empty(name, depth=50, variant="torchvision", temporal_padding="replicate")
    assert largest_difference(wrong, theirs, clip, reference) > 1e-2


def test_blocks_of_depth_26_do_not_expand() -> None:
    """VMZ's 26 layers are bottlenecks with the channels of the shallow networks."""
    with torch.device("meta"):
        network = build_network("Res3D", num_classes=2, input=CLIP, depth=26)
    assert [network.layers[f"layer{stage}"].channels for stage in range(1, 5)] == [64, 128, 256, 512]
    assert "layer1.0.downsample.0.weight" not in network.state_dict()
    convolutions = [key for key, p in network.named_parameters() if p.ndim == 5 and "downsample" not in key]
    assert len(convolutions) + 1 == 26


_GOOGLENET = {"conv1": "Conv2d_1a_7x7", "conv2": "Conv2d_2b_1x1", "conv3": "Conv2d_2c_3x3"}
_BRANCHES = {
    "branch1": "b0",
    "branch2.0": "b1a",
    "branch2.1": "b1b",
    "branch3.0": "b2a",
    "branch3.1": "b2b",
    "branch4.1": "b3b",
}


def inception_key(key: str) -> str:
    """Our key for one of torchvision's GoogLeNet: its blocks count their letters from a, TF-slim's from b."""
    place, _, end = key.rpartition(".")
    place, _, module = place.rpartition(".")
    if place in _GOOGLENET:
        return f"{_GOOGLENET[place]}.{module}.{end}"
    block, _, branch = place.partition(".")
    number, letter = block.removeprefix("inception")
    return f"Mixed_{number}{chr(ord(letter) + 1)}.{_BRANCHES[branch]}.{module}.{end}"


@pytest.mark.parametrize("size", [64, 120], ids=["even maps", "odd maps"])
def test_torchvision_googlenet_trunk(size: int) -> None:
    """At 64 pixels TensorFlow's padding differs in the first convolution alone, at 120 in two pools as well."""
    theirs = calibrated(GoogLeNet, 4, 3, 64, 64, num_classes=10, aux_logits=False, init_weights=False)
    state = {inception_key(key): value for key, value in theirs.state_dict().items() if not key.startswith("fc.")}
    theirs.fc = nn.Identity()
    images = torch.randn(2, 3, size, size)
    with torch.no_grad():
        reference = theirs(images)

    def difference(padding: str) -> float:
        ours = InceptionTrunk2D(3, affine_norm=True, padding=padding).eval()
        ours.load_state_dict(state, strict=True)
        with torch.no_grad():
            found, _ = ours.run_frames(torch.stack([images.flip(3), images], dim=2))
        return float((found[:, :, 1].mean(dim=(2, 3)) - reference).abs().max() / reference.abs().max().clamp_min(1.0))

    assert difference("symmetric") <= 1e-5
    assert difference("same") > 1e-2
    assert set(MIXED) == {key.partition(".")[0] for key in state if key.startswith("Mixed")}
