"""2D weights inflated into 3D networks.

In float64: there the fixed point is exact, while in fp32 17 random layers make 1e-5 of rounding (half of it in the 2D
network itself).
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import resnet18, resnet50

from distinit_plugin.errors import UserError
from distinit_plugin.models.factory import build_network
from distinit_plugin.models.network import InputSpec
from distinit_plugin.weights import inflate, inflate_state_dict
from distinit_plugin.weights.inflate import inflate_kernel

SIZE, FRAMES, CLASSES, WIDTH = 64, 4, 6, 16
CLIP = InputSpec(num_frames=FRAMES, train_crop_size=SIZE, test_crop_size=SIZE)


@pytest.fixture(scope="module")
def image_network() -> nn.Module:
    """A narrow ResNet-18 with torchvision's keys, its BN statistics those of its weights.

    With BN's default statistics a wrong padding would show in 3e-7 only.
    """
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = build_network("Res2D", num_classes=CLASSES, input=CLIP, width=WIDTH)
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = None
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.uniform_(module.bias, -0.3, 0.3)
        with torch.no_grad():
            network.train()({"rgb": torch.randn(8, 3, 1, SIZE, SIZE)})
    return network.eval().double()


@pytest.fixture(scope="module")
def image() -> Tensor:
    return torch.randn(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def res3d(**switches: object) -> nn.Module:
    options: dict = {"variant": "torchvision", "stem_pool": True, "temporal_padding": "replicate", "width": WIDTH}
    options |= switches
    classes = options.pop("num_classes", CLASSES)
    return build_network("Res3D", num_classes=classes, input=CLIP, **options).double().eval()


def relative_error(network: nn.Module, image_network: nn.Module, image: Tensor) -> float:
    clip = image.unsqueeze(2).expand(-1, -1, FRAMES, -1, -1)
    with torch.no_grad():
        expected = image_network({"rgb": image.unsqueeze(2)}).logits
        return float((network({"rgb": clip}).logits - expected).norm() / expected.norm())


def test_boring_video(image_network: nn.Module, image: Tensor) -> None:
    """Quo Vadis §2.4: a still video gives the image's logits, without zero padding in time."""
    network = res3d()
    report = inflate_state_dict(image_network.state_dict(), network)
    assert report.complete
    assert report.notes == ()
    assert relative_error(network, image_network, image) <= 1e-10
    single = build_network("Res2D", num_classes=CLASSES, input=CLIP, width=WIDTH).eval()
    single.load_state_dict(image_network.state_dict())
    assert relative_error(network.float(), single, image.float()) <= 5e-5


def test_boring_video_through_bottlenecks(image: Tensor) -> None:
    flat = build_network("Res2D", num_classes=CLASSES, input=CLIP, depth=50, width=4).double().eval()
    network = res3d(depth=50, width=4)
    assert inflate_state_dict(flat.state_dict(), network).complete
    assert relative_error(network, flat, image) <= 1e-10


def test_boring_video_fails_as_documented(image_network: nn.Module, image: Tensor) -> None:
    padded = res3d(temporal_padding="zeros")
    inflate_state_dict(image_network.state_dict(), padded)
    assert 0.05 < relative_error(padded, image_network, image) < 5.0
    unpooled = res3d(stem_pool=False)
    report = inflate_state_dict(image_network.state_dict(), unpooled)
    assert any("NETWORK.STEM_POOL" in note for note in report.notes)
    assert relative_error(unpooled, image_network, image) > 0.05
    paper = res3d(variant="vmz")
    assert any("BN eps" in note for note in inflate_state_dict(image_network.state_dict(), paper).notes)


def test_division_is_needed(image_network: nn.Module, image: Tensor) -> None:
    network = res3d()
    inflate_state_dict(image_network.state_dict(), network)
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, nn.Conv3d):
                module.weight.mul_(module.weight.shape[2])
    assert relative_error(network, image_network, image) > 10


def test_values(image_network: nn.Module) -> None:
    network = res3d()
    inflate_state_dict(image_network.state_dict(), network)
    for tap in range(3):
        assert torch.equal(network.stem[0].weight[:, :, tap], image_network.conv1.weight / 3)
        assert torch.equal(network.layer3[1].conv2[0].weight[:, :, tap], image_network.layer3[1].conv2.weight / 3)
    assert torch.equal(network.layer2[0].downsample[0].weight[:, :, 0], image_network.layer2[0].downsample[0].weight)
    assert torch.equal(network.layer2[0].conv1[1].running_var, image_network.layer2[0].bn1.running_var)
    assert torch.equal(network.fc.weight, image_network.fc.weight)


def test_flow_stem(image_network: nn.Module) -> None:
    """Two input channels get the mean of three, unscaled (DistInit table 5)."""
    kernel = torch.randn(4, 3, 7, 7)
    inflated = inflate_kernel(kernel, 2, 3)
    assert inflated.shape == (4, 2, 3, 7, 7)
    assert torch.allclose(inflated[:, 1].sum(dim=1), kernel.mean(dim=1), atol=1e-6)

    network = res3d()
    network.stem[0].weight = nn.Parameter(torch.zeros(WIDTH, 2, 3, 7, 7, dtype=torch.float64))
    state = image_network.state_dict()
    assert inflate_state_dict(state, network).complete
    assert torch.allclose(network.stem[0].weight[:, 0, 1], state["conv1.weight"].mean(dim=1) / 3)


def test_other_number_of_classes(image_network: nn.Module) -> None:
    network = res3d(num_classes=4)
    before = network.fc.weight.clone()
    report = inflate_state_dict(image_network.state_dict(), network)
    assert [mismatch.name for mismatch in report.mismatched] == ["fc.weight", "fc.bias"]
    assert "classifier" in report.notes[0]
    assert torch.equal(network.fc.weight, before)
    bare = res3d(num_classes=0)
    assert inflate_state_dict(image_network.state_dict(), bare).unexpected == ("fc.weight", "fc.bias")


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: build_network("R2Plus1D", num_classes=2, input=CLIP), "no 2D counterpart.*Res3D.*DISTILL.TEACHERS"),
        (lambda: build_network("torchvision/r2plus1d_18", num_classes=2, input=CLIP), "no 2D counterpart"),
        (lambda: res3d(depth=34), "only in 3D: layer1.2.*resnet50 for 50"),
        (lambda: res3d(depth=10), "only in 2D: layer1.1"),
        (lambda: res3d(width=32), "of another shape: stem.0.weight"),
        (
            lambda: build_network("Res2D", num_classes=2, input=CLIP),
            "Res2D has no 2D counterpart: it is an image network itself",
        ),
        (lambda: build_network("torchvision/s3d", num_classes=2, input=CLIP), "s3d has no 2D counterpart"),
    ],
)
def test_refusals(image_network: nn.Module, build: object, message: str) -> None:
    network = build()
    before = {key: value.clone() for key, value in network.state_dict().items()}
    with pytest.raises(UserError, match=message):
        inflate_state_dict(image_network.state_dict(), network)
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())


def test_bottlenecks_are_for_networks_of_bottlenecks() -> None:
    with torch.device("meta"):
        state = resnet50().state_dict()
    with pytest.raises(UserError, match=r"same RESNET\.DEPTH"):
        inflate_state_dict(state, res3d())


def test_by_name(tmp_path: Path, image: Tensor) -> None:
    """Res2D and a file, at a small width; DataParallel's names and no batch counters."""
    flat = build_network("Res2D", num_classes=3, input=CLIP, depth=10, width=8).double().eval()
    state = {"module." + key: value for key, value in flat.state_dict().items() if "batches" not in key}
    torch.save({"state_dict": state, "epoch": 1}, tmp_path / "w.pth")
    network = res3d(num_classes=3, depth=10, width=8)
    assert inflate(network, "Res2D", str(tmp_path / "w.pth")).complete
    clip = image.unsqueeze(2).expand(-1, -1, FRAMES, -1, -1)
    with torch.no_grad():
        assert torch.allclose(network({"rgb": clip}).logits, flat({"rgb": clip}).logits, atol=1e-9)
    for weights in ("", "random"):
        with pytest.raises(UserError, match="needs trained weights"):
            inflate(network, "torchvision/resnet18", weights)


@pytest.mark.parametrize("library", ["torchvision", "timm"])
def test_published_names(library: str) -> None:
    flat = pytest.importorskip("timm").create_model("resnet18") if library == "timm" else resnet18()
    network = res3d(width=64, num_classes=1000)
    assert inflate_state_dict(flat.state_dict(), network).complete
    expected = flat.state_dict()["layer4.1.conv1.weight"].double() / 3
    assert torch.allclose(network.layer4[1].conv1[0].weight[:, :, 2], expected, rtol=1e-6)
