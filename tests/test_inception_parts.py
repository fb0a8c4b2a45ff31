"""Parts of the Inception networks: separable convolutions, gates, normalisation, initial values, errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as functional
from inception_networks import SMALL, build
from torch import nn

from distinit_plugin.errors import UserError
from distinit_plugin.models import build_network
from distinit_plugin.models.conv import record_cases
from distinit_plugin.models.inception3d import Layout, Unit
from distinit_plugin.teachers.factory import build_teacher

LAYOUT = Layout("same", "same", "zeros", affine_norm=False)


def test_temporal_halves_start_as_the_identity() -> None:
    network = build("S3DG")
    unit = network.get_submodule("Mixed_3b.b1b")
    assert isinstance(unit, Unit)
    unit.gate = None
    x = torch.randn(2, unit.conv.in_channels, 5, 6, 6)
    expected = functional.relu(unit.bn(unit.conv(x)))
    assert torch.equal(unit(x), expected)
    assert unit.temporal is not None
    with torch.no_grad():
        unit.temporal.weight[:, :, 0].fill_(0.1)
    assert not torch.equal(unit(x), expected)


def test_gates_start_at_one_half() -> None:
    unit = build("S3DG", width=64).get_submodule("Mixed_3b.b0")
    assert isinstance(unit, Unit)
    assert unit.gate is not None
    x = torch.randn(2, unit.conv.in_channels, 3, 6, 6)
    with torch.no_grad():
        gated = unit(x)
        unit.gate.weight.fill_(1e3)  # the mean after the ReLU is positive: wide open
        opened = unit(x)
        gate, unit.gate = unit.gate, None
        plain = unit(x)
        assert torch.equal(opened, plain)
        expected = plain * torch.sigmoid(gate.weight @ plain.mean((2, 3, 4)).T).T[..., None, None, None]
        torch.testing.assert_close(opened, expected)
    seen = gated[plain > 0.1] / plain[plain > 0.1]
    assert 0.45 < float(seen.min()) < float(seen.max()) < 0.55
    assert float(seen.std()) > 1e-4  # the control: a gate, not a constant


def test_normalisation_without_a_factor() -> None:
    """Beta learns as in an affine layer whose gamma is 1, and a thousandth of each batch enters the statistics."""
    plain, affine = LAYOUT.norm(3), nn.BatchNorm3d(3, eps=1e-3)
    x = torch.randn(4, 3, 2, 5, 5) * 3 + 1
    scale = torch.randn(x.shape)
    with torch.no_grad():
        plain.bias.fill_(0.2)
        affine.bias.fill_(0.2)
    (plain(x) * scale).sum().backward()
    expected = affine(x)
    (expected * scale).sum().backward()
    torch.testing.assert_close(plain.bias.grad, affine.bias.grad)
    torch.testing.assert_close(plain.running_mean, 0.001 * x.mean((0, 2, 3, 4)))
    assert set(plain.state_dict()) == {"bias", "running_mean", "running_var", "num_batches_tracked"}


@pytest.mark.parametrize(
    ("temporal", "gated", "expected"),
    [
        ("2C", "none", (["2C", "3B", "3C", "4B", "4C", "4D", "4E", "4F", "5B", "5C"], [])),
        ("Mixed_4e", "5C", (["4E", "4F", "5B", "5C"], ["5C"])),
        ("none", "Conv2d_2c_3x3", ([], ["2C", "3B", "3C", "4B", "4C", "4D", "4E", "4F", "5B", "5C"])),
    ],
)
def test_top_heavy(temporal: str, gated: str, expected: tuple[list[str], list[str]]) -> None:
    keys = list(build("S3DG", temporal_from=temporal, gating_from=gated).bare_state_dict())
    for part, wanted in zip(("temporal", "gate"), expected, strict=True):
        found = {key.split("_")[1][:2].upper() for key in keys if f".{part}.weight" in key}
        assert sorted(found) == wanted
    assert not any(key.startswith(("Conv2d_1a_7x7.temporal", "Conv2d_1a_7x7.gate")) for key in keys)


@pytest.mark.parametrize(("name", "deviation"), [("I3D", (160 * 27) ** -0.5), ("S3DG", 0.01)])
def test_initial_kernels(name: str, deviation: float) -> None:
    """Truncated at twice the deviation, which leaves 0.88 of it."""
    kernel = build(name, width=64).get_submodule("Mixed_4f.b1b.conv").weight.detach()
    assert float(kernel.abs().max()) <= 2 * deviation
    assert float(kernel.std()) == pytest.approx(0.88 * deviation, rel=0.02)


def test_convolution_check_knows_the_padding() -> None:
    network = build("I3D")
    cases = record_cases(network, {"rgb": torch.randn(1, 3, 8, 32, 32)})
    assert [case.names for case in cases if "padding same" in case.key] == [["Conv3d_1a_7x7.conv"]]


@pytest.mark.parametrize("name", ["I3D", "S3DG"])
def test_as_a_teacher_of_clips(name: str) -> None:
    teacher = build_teacher(
        name, "random", num_classes=5, layer="feature_map", num_frames=8, pick="clip", crop_size=32, width=8
    )
    output = teacher({"rgb": torch.randn(1, 3, 8, 32, 32)}, taps=["feature_map"])
    assert output.taps["feature_map"].shape == (1, 128, 1, 1, 1)


@pytest.mark.parametrize(
    ("name", "switches", "message"),
    [
        ("I3D", {"padding": "valid"}, "NETWORK.PADDING is 'valid'. Allowed: 'same', 'symmetric'"),
        ("S3DG", {"temporal_padding": "reflect"}, "NETWORK.TEMPORAL_PADDING"),
        ("S3DG", {"stem_frames": 4}, "NETWORK.STEM_FRAMES is 4. Allowed: 1, 3, 5, 7"),
        ("S3DG", {"temporal_from": "4G"}, "NETWORK.TEMPORAL_FROM is '4G'. Allowed: 2C, 3B"),
        ("S3DG", {"temporal_from": "Mixed_4g"}, "Did you mean Mixed_4"),
        ("S3DG", {"gating_from": "3A"}, "NETWORK.GATING_FROM is '3A'. Allowed: 2C, 3B"),
        ("S3DG", {"gating_from": "Conv2d_2b_1x1"}, "Did you mean Conv2d_2c_3x3"),
        ("S3DG", {"gating_from": "nowhere"}, "(or TF-slim's names), none"),
        ("I3D", {"width": 0}, "NETWORK.WIDTH"),
        ("I3D", {"gating_from": "4B"}, "NETWORK.GATING_FROM is '4B', but I3D has no such switch"),
        ("I3D", {"stem_frames": 7}, "NETWORK.STEM_FRAMES"),
        ("Res3D", {"padding": "symmetric"}, "NETWORK.PADDING"),
        ("R2Plus1D", {"affine_norm": True}, "NETWORK.AFFINE_NORM"),
    ],
)
def test_errors(name: str, switches: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        build_network(name, num_classes=2, input=SMALL, **switches)
    assert message in str(caught.value)
