"""I3D and S3DG against the published tables, against a forward written from them, and switch by switch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as functional
from inception_networks import CLIP, FLOW, TORCHVISION, build, randomized
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from distinit_plugin.errors import UserError
from distinit_plugin.models import I3D, S3DG, InputSpec
from distinit_plugin.models.conv3d import Conv3d
from distinit_plugin.models.padding import MaxPool3d
from distinit_plugin.objectives.adapters import layer_size

MIXED = {  # b0, b1a, b1b, b2a, b2b, b3
    "3b": (64, 96, 128, 16, 32, 32),
    "3c": (128, 128, 192, 32, 96, 64),
    "4b": (192, 96, 208, 16, 48, 64),
    "4c": (160, 112, 224, 24, 64, 64),
    "4d": (128, 128, 256, 24, 64, 64),
    "4e": (112, 144, 288, 32, 64, 64),
    "4f": (256, 160, 320, 32, 128, 128),
    "5b": (256, 160, 320, 32, 128, 128),
    "5c": (384, 192, 384, 48, 128, 128),
}

TABLE = [  # the papers' name, TF-slim's, C×T×H×W at 3×64×224², strides in time and space
    ("1A", "Conv2d_1a_7x7", (64, 32, 112, 112), 2, 2),
    ("2A", "MaxPool_2a_3x3", (64, 32, 56, 56), 2, 4),
    ("2B", "Conv2d_2b_1x1", (64, 32, 56, 56), 2, 4),
    ("2C", "Conv2d_2c_3x3", (192, 32, 56, 56), 2, 4),
    ("3A", "MaxPool_3a_3x3", (192, 32, 28, 28), 2, 8),
    ("3B", "Mixed_3b", (256, 32, 28, 28), 2, 8),
    ("3C", "Mixed_3c", (480, 32, 28, 28), 2, 8),
    ("4A", "MaxPool_4a_3x3", (480, 16, 14, 14), 4, 16),
    ("4B", "Mixed_4b", (512, 16, 14, 14), 4, 16),
    ("4C", "Mixed_4c", (512, 16, 14, 14), 4, 16),
    ("4D", "Mixed_4d", (512, 16, 14, 14), 4, 16),
    ("4E", "Mixed_4e", (528, 16, 14, 14), 4, 16),
    ("4F", "Mixed_4f", (832, 16, 14, 14), 4, 16),
    ("5A", "MaxPool_5a_2x2", (832, 8, 7, 7), 8, 32),
    ("5B", "Mixed_5b", (832, 8, 7, 7), 8, 32),
    ("5C", "Mixed_5c", (1024, 8, 7, 7), 8, 32),
]

GMACS = [
    ("S3DG", {}, CLIP, 64.185),
    ("S3DG", {"stem_frames": 7}, CLIP, 79.291),
    ("S3DG", {}, FLOW, 60.408),
    ("S3DG", {"gating_from": "none"}, CLIP, 64.184),
    ("S3DG", {"gating_from": "none", "stem_frames": 7}, CLIP, 79.289),
    ("S3DG", TORCHVISION, CLIP, 71.918),
    ("S3DG", {**TORCHVISION, "gating_from": "none"}, CLIP, 71.916),
    ("S3DG", {"temporal_from": "3B", "gating_from": "3B"}, CLIP, 53.09),
    ("S3DG", {"temporal_from": "3C", "gating_from": "Mixed_3c"}, CLIP, 51.78),
    ("S3DG", {"temporal_from": "Mixed_4b", "gating_from": "4B"}, CLIP, 48.31),
    ("S3DG", {"temporal_from": "4F", "gating_from": "4F"}, CLIP, 45.90),
    ("S3DG", {"temporal_from": "5B", "gating_from": "5B"}, CLIP, 44.78),
    ("I3D", {}, CLIP, 111.153),
    ("I3D", {}, FLOW, 102.341),
]


# ------------------------------------------------------------------------------------------------ tables
@pytest.mark.parametrize(("name", "switches", "spec", "gmacs"), GMACS)
def test_multiply_accumulates(name: str, switches: dict[str, Any], spec: InputSpec, gmacs: float) -> None:
    with torch.device("meta"), FlopCounterMode(display=False) as counter, torch.no_grad():
        network = build(name, spec, 400, width=64, **switches).eval()
        network({spec.modality: torch.empty(1, spec.channels, 64, 224, 224)})
    assert counter.get_total_flops() / 2e9 == pytest.approx(gmacs, rel=1e-3)


@pytest.mark.parametrize("name", ["I3D", "S3DG"])
def test_end_points(name: str) -> None:
    """Every row of the table by each of its names, in order."""
    with torch.device("meta"), torch.no_grad():
        network = build(name, CLIP, width=64).eval()
        own = [
            slim.replace("2d_", "3d_").replace("Pool_", "Pool3d_") if name == "I3D" else slim for _, slim, *_ in TABLE
        ]
        assert list(network.layers) == own
        names = [*own, *(slim for _, slim, *_ in TABLE), *(short for short, *_ in TABLE)]
        output = network({"rgb": torch.empty(1, 3, 64, 224, 224)}, taps=names)
    assert set(output.taps) == set(names)
    for key, (short, slim, shape, temporal_stride, spatial_stride) in zip(own, TABLE, strict=True):
        assert network.layers[key] == (shape[0], temporal_stride, spatial_stride)
        assert network.layers[short] == network.layers[slim] == network.layers[key]
        assert output.taps[key].shape == (1, *shape)
        assert output.taps[short] is output.taps[key] is output.taps[slim]
    assert layer_size(network, "4F", "the student") == 832
    with pytest.raises(UserError, match="no layer named '4G'"):
        network.check_taps(["4G"])
    assert "6A" not in network.layers


def test_names_of_modules() -> None:
    """What converters rely on."""
    network = build("S3DG")
    assert {child for child, module in network.named_children() if list(module.parameters())} == {
        *("Conv2d_1a_7x7", "Conv2d_2b_1x1", "Conv2d_2c_3x3", "fc"),
        *(f"Mixed_{block}" for block in MIXED),
    }
    keys = set(network.bare_state_dict())
    statistics = {f"bn.{name}" for name in ("bias", "running_mean", "running_var", "num_batches_tracked")}
    expected = {"conv.weight", *statistics}
    separable = {"temporal.weight", "temporal.bias"}
    for unit, parts in {
        "Conv2d_1a_7x7": expected,
        "Conv2d_2c_3x3": expected | separable | {"gate.weight"},
        "Mixed_4b.b0": expected | {"gate.weight"},
        "Mixed_4b.b1a": expected,
        "Mixed_4b.b2b": expected | separable | {"gate.weight"},
        "Mixed_5c.b3b": expected | {"gate.weight"},
    }.items():
        assert {key.removeprefix(f"{unit}.") for key in keys if key.startswith(f"{unit}.")} == parts
    normed = set(build("S3DG", temporal_norm=True, affine_norm=True).bare_state_dict())
    unit = {key.removeprefix("Conv2d_2c_3x3.") for key in normed if key.startswith("Conv2d_2c_3x3.")}
    both = {f"{norm}.{key[3:]}" for norm in ("bn", "temporal_bn") for key in (*statistics, "bn.weight")}
    assert unit == {"conv.weight", "temporal.weight", "gate.weight", *both}


# ------------------------------------------------------------------------------------------------ values
def pad_same(x: Tensor, kernel: tuple[int, ...], stride: tuple[int, ...], value: float = 0.0) -> Tensor:
    """TensorFlow's documented rule, in its form with the remainder."""
    pads: list[int] = []
    for size, k, s in zip(reversed(x.shape[2:]), reversed(kernel), reversed(stride), strict=True):
        total = max(k - s, 0) if size % s == 0 else max(k - size % s, 0)
        pads += [total // 2, total - total // 2]
    return functional.pad(x, pads, value=value)


def reference_pool(x: Tensor, kernel: tuple[int, ...], stride: tuple[int, ...]) -> Tensor:
    return functional.max_pool3d(pad_same(x, kernel, stride, float("-inf")), kernel, stride)


def reference_unit(state: dict[str, Tensor], unit: str, x: Tensor, stride: tuple[int, ...] = (1, 1, 1)) -> Tensor:
    def conv(x: Tensor, part: str, stride: tuple[int, ...]) -> Tensor:
        weight = state[f"{unit}.{part}.weight"]
        padded = pad_same(x, tuple(weight.shape[2:]), stride)
        return functional.conv3d(padded, weight, state.get(f"{unit}.{part}.bias"), stride)

    x = conv(x, "conv", stride)
    mean, var, beta = (state[f"{unit}.bn.{key}"] for key in ("running_mean", "running_var", "bias"))
    x = functional.batch_norm(x, mean, var, None, beta, eps=1e-3).relu()
    if f"{unit}.temporal.weight" in state:
        x = conv(x, "temporal", (1, 1, 1)).relu()
    if f"{unit}.gate.weight" in state:
        x = (
            x
            * torch.einsum("oc,bc->bo", state[f"{unit}.gate.weight"], x.mean((2, 3, 4))).sigmoid()[
                ..., None, None, None
            ]
        )
    return x


def reference_logits(state: dict[str, Tensor], x: Tensor, conv: str) -> Tensor:
    """The whole network in evaluation, from the papers' table: 2×7×7 average (of a map not larger), mean over time."""
    x = reference_unit(state, f"{conv}_1a_7x7", x, (2, 2, 2))
    x = reference_pool(x, (1, 3, 3), (1, 2, 2))
    x = reference_unit(state, f"{conv}_2b_1x1", x)
    x = reference_unit(state, f"{conv}_2c_3x3", x)
    x = reference_pool(x, (1, 3, 3), (1, 2, 2))
    for block in MIXED:
        if block == "4b":
            x = reference_pool(x, (3, 3, 3), (2, 2, 2))
        if block == "5b":
            x = reference_pool(x, (2, 2, 2), (2, 2, 2))
        first, second, third = (reference_unit(state, f"Mixed_{block}.{unit}", x) for unit in ("b0", "b1a", "b2a"))
        second, third = (
            reference_unit(state, f"Mixed_{block}.{unit}", y) for unit, y in (("b1b", second), ("b2b", third))
        )
        fourth = reference_unit(state, f"Mixed_{block}.b3b", reference_pool(x, (3, 3, 3), (1, 1, 1)))
        x = torch.cat([first, second, third, fourth], dim=1)
    x = functional.avg_pool3d(x, (2, *x.shape[3:]), stride=1)
    logits = torch.einsum("kc,bctij->bktij", state["fc.weight"], x) + state["fc.bias"][:, None, None, None]
    return logits.mean(dim=(2, 3, 4))


@pytest.mark.parametrize(("name", "conv"), [("I3D", "Conv3d"), ("S3DG", "Conv2d")])
@pytest.mark.parametrize("shape", [(16, 48, 64), (19, 45, 67)])
def test_forward_from_the_papers_table(name: str, conv: str, shape: tuple[int, int, int]) -> None:
    """Even and odd sizes; the control: padding alike on both sides."""
    network = randomized(name)
    clip = torch.randn(2, 3, *shape, dtype=torch.float64)
    state = network.bare_state_dict()
    with torch.no_grad():
        expected = reference_logits(state, clip, conv)
        torch.testing.assert_close(network({"rgb": clip}).logits, expected, rtol=1e-9, atol=1e-9)
        symmetric = build(name, padding="symmetric").double().eval()
        symmetric.load_state_dict(state)
        difference = (symmetric({"rgb": clip}).logits - expected).abs().max() / expected.abs().max()
    assert difference > 1e-2


@pytest.mark.parametrize("kernel", [(7, 7, 7), (1, 7, 7), (7, 1, 1), (3, 3, 3)])
@pytest.mark.parametrize("size", [(8, 9, 12), (9, 8, 7), (1, 2, 3)])
def test_same_padding_of_convolutions(kernel: tuple[int, int, int], size: tuple[int, int, int]) -> None:
    x = torch.randn(2, 3, *size)
    stride = (2, 2, 2)
    conv = Conv3d(3, 4, kernel, stride, pads_same=True)
    expected = functional.conv3d(pad_same(x, kernel, stride), conv.weight, conv.bias, stride)
    assert expected.shape[2:] == tuple(-(-n // 2) for n in size)
    for formulation in ("conv3d", "conv2d", "fp32"):
        conv.formulation = formulation
        torch.testing.assert_close(conv(x), expected)


def test_same_padding_repeats_frames() -> None:
    """64 frames, stem: 2 frames before and 3 behind."""
    x = torch.randn(1, 3, 8, 5, 5)
    conv = Conv3d(3, 4, (7, 3, 3), 2, pads_same=True, temporal_padding="replicate")
    repeated = torch.cat([x[:, :, :1]] * 2 + [x] + [x[:, :, -1:]] * 3, dim=2)
    torch.testing.assert_close(conv(x), functional.conv3d(repeated, conv.weight, conv.bias, 2, (0, 1, 1)))


@pytest.mark.parametrize(
    ("kernel", "stride"),
    [((1, 3, 3), (1, 2, 2)), ((3, 3, 3), (2, 2, 2)), ((2, 2, 2), (2, 2, 2)), ((3, 3, 3), (1, 1, 1))],
)
@pytest.mark.parametrize("size", [(8, 9, 12), (9, 8, 7), (1, 2, 3)])
def test_same_padding_of_pools(kernel: Any, stride: Any, size: tuple[int, int, int]) -> None:
    """Padding never wins, not even over negative values."""
    x = torch.randn(2, 3, *size) - 5
    assert torch.equal(MaxPool3d(kernel, stride, "same")(x), reference_pool(x, kernel, stride))


def test_pools_of_the_torchvision_networks() -> None:
    """``symmetric`` is S3D's, ``ceil`` is GoogLeNet's; kernels shrink to maps smaller than they are."""
    x = torch.randn(1, 2, 6, 9, 10)
    three, two, one = (3, 3, 3), (2, 2, 2), (1, 1, 1)
    assert torch.equal(MaxPool3d(three, two, "symmetric")(x), functional.max_pool3d(x, 3, 2, 1))
    assert torch.equal(MaxPool3d(two, two, "symmetric")(x), functional.max_pool3d(x, 2, 2))
    assert torch.equal(MaxPool3d(three, two, "ceil")(x), functional.max_pool3d(x, 3, 2, ceil_mode=True))
    for padding in ("symmetric", "ceil"):
        assert torch.equal(MaxPool3d(three, one, padding)(x), functional.max_pool3d(x, 3, 1, 1))
        assert MaxPool3d(two, two, padding)(x[:, :, :1, :1, :1]).shape == (1, 2, 1, 1, 1)
        assert MaxPool3d(three, two, padding)(x[:, :, :1, :1, :1]).shape == (1, 2, 1, 1, 1)


@pytest.mark.parametrize("name", ["I3D", "S3DG"])
def test_last_average(name: str) -> None:
    maps = torch.randn(2, 4, 3, 7, 7)
    small, large = maps[..., :3, :5], torch.randn(2, 4, 3, 9, 8)
    for whole in (False, True):
        network = build(name, fully_convolutional=whole)
        assert isinstance(network, I3D | S3DG)
        windows = functional.avg_pool3d(maps, (2, 7, 7), 1).flatten(2).transpose(1, 2)
        torch.testing.assert_close(network.average_windows(maps), windows)
        torch.testing.assert_close(
            network.average_windows(small[:, :, :1]), small[:, :, :1].mean((3, 4)).transpose(1, 2)
        )
        found = network.average_windows(large)
        if whole:
            windows = functional.avg_pool3d(large, (2, 7, 7), 1).flatten(2).transpose(1, 2)
            torch.testing.assert_close(found, windows)
        else:
            assert found.shape == (2, 2, 4)
            torch.testing.assert_close(found[:, 0], large[:, :, :2].mean((2, 3, 4)))


def test_logits_are_the_average_over_positions() -> None:
    """Dropout acts at each position, features are what the classifier sees on average."""
    network = build("I3D", InputSpec(num_frames=24), dropout=0.5).eval()
    clip = torch.randn(1, 3, 24, 32, 32)
    with torch.no_grad():
        output = network({"rgb": clip}, taps=["5C"])
        positions = (output.taps["5C"][:, :, 1:] + output.taps["5C"][:, :, :-1]).mean((3, 4)) / 2
        assert positions.shape[2] == 2
        assert network.fc is not None
        per_position = network.fc(positions.transpose(1, 2))
    torch.testing.assert_close(output.logits, per_position.mean(1))
    torch.testing.assert_close(output.features, positions.mean(2))


@pytest.mark.parametrize(("name", "padding"), [("I3D", "symmetric"), ("I3D", "same"), ("S3DG", "symmetric")])
def test_a_still_video_stays_still(name: str, padding: str) -> None:
    """With repeated frames any length gives the same logits; with zeros it does not."""
    frame = torch.randn(1, 3, 1, 48, 48, dtype=torch.float64)
    state = randomized(name).bare_state_dict()
    difference = {}
    for time in ("replicate", "zeros"):
        network = build(name, padding=padding, temporal_padding=time).double().eval()
        network.load_state_dict(state)
        with torch.no_grad():
            logits = [network({"rgb": frame.expand(-1, -1, frames, -1, -1)}).logits for frames in (1, 16)]
        difference[time] = float((logits[0] - logits[1]).abs().max() / logits[0].abs().max())
    assert difference["replicate"] < 1e-9
    assert difference["zeros"] > 1e-2
