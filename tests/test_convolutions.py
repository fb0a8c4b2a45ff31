"""Formulations of 3D convolutions: equal to conv3d in value and gradient, checked against fp32, repaired and cached."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from distinit_plugin.models import conv, conv3d, hardware
from distinit_plugin.models.conv import (
    Conv3d,
    adopt_convolutions,
    check_convolutions,
    hardware_has_bf16,
    record_cases,
)
from distinit_plugin.models.folding import ConvGeometry, conv3d_as_conv2d, repeat_edge_frames

CPU = torch.device("cpu")

KERNELS = [(1, 1, 1), (1, 3, 3), (3, 1, 1), (3, 3, 3), (5, 3, 1)]
STRIDES = [(1, 1, 1), (2, 2, 2), (1, 2, 2), (2, 1, 1)]
PADDINGS = [(0, 0, 0), (1, 1, 1), (2, 0, 1)]


@pytest.fixture(autouse=True)
def one_seed() -> None:
    torch.manual_seed(0)


# ------------------------------------------------------------------------------------------------------- formulations
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("channels_last", [False, True])
def test_folded_convolution_equals_conv3d(kernel: tuple[int, int, int], channels_last: bool) -> None:
    """Value and all three gradients in float64, over strides, paddings, dilations and groups."""
    count = 0
    for stride, padding, dilation, groups in itertools.product(STRIDES, PADDINGS, [(1, 1, 1), (2, 1, 2)], [1, 2, 4]):
        x = torch.randn(2, 4, 5, 7, 6, dtype=torch.float64)
        x = x.to(memory_format=torch.channels_last_3d) if channels_last else x
        leaves = [x, torch.randn(8, 4 // groups, *kernel).double(), torch.randn(8).double()]
        for leaf in leaves:
            leaf.requires_grad_(True)
        if any(
            size + 2 * p < d * (k - 1) + 1 for size, p, d, k in zip((5, 7, 6), padding, dilation, kernel, strict=True)
        ):
            continue
        expected = functional.conv3d(*leaves, stride, padding, dilation, groups)
        found = conv3d_as_conv2d(*leaves, ConvGeometry(stride, padding, dilation, groups))
        grad = torch.randn_like(expected)
        torch.testing.assert_close(found, expected)
        gradients = [torch.autograd.grad(y, leaves, grad) for y in (found, expected)]
        for a, b in zip(*gradients, strict=True):
            torch.testing.assert_close(a, b)
        count += 1
    assert count > 40


def test_kernel_that_reads_padding_only() -> None:
    x, weight = torch.randn(1, 2, 2, 4, 4), torch.randn(3, 2, 2, 3, 3)
    geometry = ConvGeometry((1, 1, 1), (1, 1, 1), (3, 1, 1), 1)
    assert not functional.conv3d(x, weight, None, *geometry).any()
    torch.testing.assert_close(
        conv3d_as_conv2d(x, weight, None, geometry), functional.conv3d(x, weight, None, *geometry)
    )


@pytest.mark.parametrize("stride", [1, 2])
def test_folding_compiles_for_any_number_of_frames(stride: int) -> None:
    """In one graph, with the number of frames as a symbol."""
    layer = Conv3d(4, 6, 3, stride, padding=1, bias=False)
    layer.formulation = "conv2d"
    try:
        compiled = torch.compile(layer, dynamic=True, fullgraph=True, backend="eager")
        for frames in (8, 16, 5):
            x = torch.randn(2, 4, frames, 9, 9)
            torch.testing.assert_close(
                compiled(x), functional.conv3d(x, layer.weight, None, stride, 1), rtol=1e-4, atol=1e-4
            )
    finally:
        torch.compiler.reset()


@pytest.mark.parametrize("kernel", [(1, 3, 3), (3, 1, 1), (1, 1, 1), (3, 3, 3)])
@pytest.mark.parametrize("frames", [1, 2, 4])
@pytest.mark.parametrize("batch", [1, 2])
def test_folding_keeps_the_memory_format(kernel: tuple[int, int, int], frames: int, batch: int) -> None:
    """Of value and gradient, by their strides: those of sizes of 1 decide, too, how later layers see a tensor.

    A contiguous input of a kernel in time alone stays so, too, strides included.
    """

    def strides(shape: torch.Size) -> tuple[int, ...]:
        return torch.empty(shape, memory_format=torch.channels_last_3d).stride()

    for stride in (1, 2):
        layer = Conv3d(8, 16, kernel, stride, padding=tuple(k // 2 for k in kernel))
        layer.formulation = "conv2d"
        x = torch.randn(batch, 8, frames, 6, 6).to(memory_format=torch.channels_last_3d).requires_grad_(True)
        seen: list[tuple[int, ...]] = []
        inner = x * 1
        inner.register_hook(lambda grad, seen=seen: seen.append(grad.stride()))
        y = layer(inner)
        assert y.stride() == strides(y.shape)
        y.backward(torch.ones_like(y))
        assert seen == [strides(x.shape)]
        if kernel[1] == 1:
            assert layer(x.detach().contiguous()).is_contiguous()


def test_replicated_time() -> None:
    x = torch.randn(2, 3, 4, 5, 5)
    padded = functional.pad(x, (0, 0, 0, 0, 1, 1), mode="replicate")
    assert torch.equal(repeat_edge_frames(x, 1, 1), padded)
    for kernel in ((3, 1, 1), (3, 3, 3)):
        spatial = kernel[1] // 2
        layer = Conv3d(3, 4, kernel, padding=(1, spatial, spatial), temporal_padding="replicate")
        expected = functional.conv3d(padded, layer.weight, layer.bias, 1, (0, spatial, spatial))
        for formulation in ("conv3d", "conv2d", "fp32"):
            layer.formulation = formulation
            torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize(
    "options",
    [{"padding": 1, "padding_mode": "replicate"}, {"padding": "same"}, {"padding": "valid"}, {"padding": 1}],
)
def test_every_padding_of_pytorch(options: dict[str, Any]) -> None:
    theirs = nn.Conv3d(3, 4, 3, **options)
    ours = Conv3d(3, 4, 3, **options)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 3, 4, 5, 5)
    for formulation in ("conv3d", "conv2d", "fp32"):
        ours.formulation = formulation
        torch.testing.assert_close(ours(x), theirs(x))


def test_fp32_formulation_under_autocast() -> None:
    layer, x = Conv3d(3, 4, 3), torch.randn(1, 3, 4, 8, 8)
    exact = layer(x)
    layer.formulation = "fp32"
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
        layer.formulation = "conv3d"
        rounded_inputs = layer(x)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, exact.bfloat16())
    assert not torch.equal(y, rounded_inputs)


# ----------------------------------------------------------------------------------------------------------- adoption
class Subclassed(nn.Conv3d):
    """Only the construction differs, as in torchvision's Conv3DSimple."""


class OwnForward(nn.Conv3d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 2


def test_adoption_shares_parameters() -> None:
    network = nn.Sequential(nn.Conv3d(3, 4, 3, stride=2, padding=1, bias=False), nn.ReLU(), Subclassed(4, 6, 1))
    network.eval()
    parameters, keys = list(network.parameters()), list(network.state_dict())
    x = torch.randn(1, 3, 4, 8, 8)
    before = network(x)
    assert adopt_convolutions(network) == 2
    assert [type(module) for module in network] == [Conv3d, nn.ReLU, Conv3d]
    assert all(a is b for a, b in zip(network.parameters(), parameters, strict=True))
    assert list(network.state_dict()) == keys
    assert not any(module.training for module in network.modules())
    assert torch.equal(network(x), before)
    assert adopt_convolutions(network) == 0


def test_adoption_keeps_sharing_and_leaves_strangers_alone() -> None:
    shared, hooked = nn.Conv3d(3, 3, 1), nn.Conv3d(3, 3, 1)
    hooked.register_forward_hook(lambda *_: None)
    network = nn.ModuleDict({"a": shared, "b": shared, "hooked": hooked, "own": OwnForward(3, 3, 1)})
    network["b2"] = nn.Sequential(shared)
    adopt_convolutions(network)
    assert type(network["a"]) is Conv3d
    assert network["a"] is network["b2"][0]
    assert type(network["hooked"]) is nn.Conv3d
    assert type(network["own"]) is OwnForward


# -------------------------------------------------------------------------------------------------------------- check
class Toy(nn.Module):
    """Two factored convolutions, one of them twice, and a full one."""

    def __init__(self) -> None:
        super().__init__()
        self.spatial = Conv3d(3, 8, (1, 3, 3), padding=(0, 1, 1), bias=False)
        self.norm = nn.BatchNorm3d(8)
        self.full = nn.ModuleList(Conv3d(8, 8, 3, padding=1) for _ in range(2))

    def forward(self, views: dict[str, Tensor]) -> Tensor:
        x = self.norm(self.spatial(views["rgb"]))
        for layer in self.full:
            x = layer(x)
        return x


VIEWS = {"rgb": torch.zeros(4, 3, 4, 8, 8)}


class WrongWeightGradient(torch.autograd.Function):
    """The identity on weights whose gradient is off by ``factor``."""

    @staticmethod
    def forward(context: Any, weight: Tensor, factor: float) -> Tensor:
        context.factor = factor
        return weight.view_as(weight)

    @staticmethod
    def backward(context: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * context.factor, None


@pytest.fixture
def break_formulation(monkeypatch: pytest.MonkeyPatch) -> Any:
    def breaks(name: Any, factor: float) -> None:
        right = conv3d.FORMULATIONS[name]
        wrong = lambda x, weight, *rest: right(x, WrongWeightGradient.apply(weight, factor), *rest)  # noqa: E731
        monkeypatch.setitem(conv3d.FORMULATIONS, name, wrong)

    return breaks


def formulations(network: Toy) -> list[str]:
    return [network.spatial.formulation, *(layer.formulation for layer in network.full)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_right_kernels_pass(dtype: torch.dtype) -> None:
    network = Toy()
    report = check_convolutions(network, VIEWS, dtype=dtype, device=CPU, timing=False)
    assert len(report.verdicts) == 2  # the two full ones are alike
    assert report.verdicts[1].names == ("full.0", "full.1")
    assert not report.repaired
    factored = "conv3d" if dtype == torch.float32 else "conv2d"
    assert formulations(network) == [factored, "conv3d", "conv3d"]


@pytest.mark.parametrize("factor", [1.03, float("nan")])
@pytest.mark.parametrize("timing", [False, True])
def test_wrong_weight_gradient_is_caught_and_replaced(break_formulation: Any, factor: float, timing: bool) -> None:
    break_formulation("conv3d", factor)
    network = Toy()
    report = check_convolutions(network, VIEWS, dtype=torch.bfloat16, device=CPU, timing=timing)
    assert formulations(network) == ["conv2d"] * 3
    assert [verdict.names for verdict in report.repaired] == [("spatial",), ("full.0", "full.1")]
    assert "weight gradient off by" in str(report)
    assert "full.0, full.1" in str(report)


def test_a_fault_within_tolerance_passes(break_formulation: Any) -> None:
    break_formulation("conv3d", 1.002)
    network = Toy()
    assert not check_convolutions(network, VIEWS, dtype=torch.bfloat16, device=CPU, timing=False).repaired
    assert network.full[0].formulation == "conv3d"


def test_fp32_is_the_last_resort(break_formulation: Any) -> None:
    break_formulation("conv3d", 1.03)
    break_formulation("conv2d", 0.9)
    network = Toy()
    check_convolutions(network, VIEWS, dtype=torch.bfloat16, device=CPU)
    assert formulations(network) == ["fp32"] * 3
    with torch.autocast("cpu", dtype=torch.bfloat16):
        network(VIEWS).float().square().sum().backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in network.parameters())


def test_a_full_memory_is_no_wrong_kernel(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def full(*_: Any) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    cache = tmp_path / "convolutions.json"
    monkeypatch.setitem(conv3d.FORMULATIONS, "conv2d", full)
    with pytest.raises(torch.OutOfMemoryError):
        check_convolutions(Toy(), VIEWS, dtype=torch.bfloat16, device=CPU, cache_path=str(cache), timing=False)
    assert not cache.exists()


def test_check_leaves_the_network_as_it_was() -> None:
    network = Toy()
    network.full[0].eval()
    state = {key: value.clone() for key, value in network.state_dict().items()}
    check_convolutions(network, VIEWS, dtype=torch.bfloat16, device=CPU)
    assert network.training
    assert network.norm.training
    assert not network.full[0].training
    assert all(torch.equal(value, state[key]) for key, value in network.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in network.parameters())
    assert not any(module._forward_pre_hooks for module in network.modules())


def test_choice_in_fp32() -> None:
    network = Toy()
    report = check_convolutions(network, VIEWS, dtype=torch.float32, device=CPU)
    assert set(formulations(network)) <= {"conv3d", "conv2d"}
    assert not report.repaired
    check_convolutions(network, VIEWS, dtype=torch.float32, device=CPU, timing=False)
    assert formulations(network) == ["conv3d"] * 3


# -------------------------------------------------------------------------------------------------------------- cache
def test_cache_is_used_and_keeps_faults(
    break_formulation: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    break_formulation("conv3d", float("nan"))
    path = tmp_path / "below" / "convolutions.json"
    first = check_convolutions(Toy(), VIEWS, dtype=torch.bfloat16, device=CPU, cache_path=str(path))
    json.loads(path.read_text(), parse_constant=pytest.fail)  # no NaN or Infinity in the file
    assert [child.name for child in path.parent.iterdir()] == [path.name]  # no temporary file is left

    monkeypatch.setattr(conv, "measure_case", None)
    network = Toy()
    second = check_convolutions(network, VIEWS, dtype=torch.bfloat16, device=CPU, cache_path=str(path))
    assert formulations(network) == ["conv2d"] * 3
    assert str(first) == str(second)
    with pytest.raises(TypeError):  # another type is other hardware: measured anew
        check_convolutions(Toy(), VIEWS, dtype=torch.float16, device=CPU, cache_path=str(path))


def damaged_files() -> Iterator[Any]:
    row = {"errors": {"conv3d": [0, 0, 0], "conv2d": [0, 0, 0]}, "seconds": {"conv3d": 1, "conv2d": 1}}
    yield "text", "no json"
    yield "nested", "[" * 100_000
    yield "list", "[]"
    yield "rows", {"HARDWARE": 3}
    for damage in (
        {"errors": None},
        {"seconds": []},
        {"errors": {"conv3d": [0, 0, 0]}},
        {"errors": {"conv3d": [0, 0], "conv2d": [0, 0, 0]}},
        {"errors": {"conv3d": [0, 0, "x"], "conv2d": [0, 0, 0]}},
        {"errors": {"conv3d": [0, 0, -1], "conv2d": [0, 0, 0]}},
        {"seconds": {"conv3d": -1, "conv2d": 1}},
        {"seconds": {"conv3d": 1}},
    ):
        yield str(damage), {"HARDWARE": {"KEY": {**row, **damage}}}


@pytest.mark.parametrize(("content"), [pytest.param(content, id=name) for name, content in damaged_files()])
def test_damaged_cache_is_measured_anew(content: Any, tmp_path: Path) -> None:
    path, network = tmp_path / "convolutions.json", Toy()
    cases = record_cases(network, VIEWS)
    name = hardware.hardware_key(CPU, torch.bfloat16)
    text = content if isinstance(content, str) else json.dumps(content)
    path.write_text(text.replace("HARDWARE", name).replace("KEY", cases[0].key), encoding="utf-8")
    report = check_convolutions(network, VIEWS, dtype=torch.bfloat16, device=CPU, cache_path=str(path))
    assert len(report.verdicts) == 2
    assert set(json.loads(path.read_text())[name]) == {case.key for case in cases}


def test_unwritable_cache_is_only_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    path = tmp_path / "file" / "convolutions.json"
    check_convolutions(Toy(), VIEWS, dtype=torch.bfloat16, device=CPU, cache_path=str(path))
    assert "could not be kept" in caplog.text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("flags\t\t: fpu avx2 avx512_bf16\n", True),
        ("flags : fpu amx_bf16 amx_tile", True),
        ("Features : fp asimd bf16", True),
        ("flags : fpu avx2 avx512f", False),
        ("", False),
    ],
)
def test_bf16_of_cpus(text: str, expected: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cpuinfo").write_text(text)
    monkeypatch.setattr(hardware, "CPU_INFO", tmp_path / "cpuinfo")
    assert hardware_has_bf16("cpu") is expected
    monkeypatch.setattr(hardware, "CPU_INFO", tmp_path / "missing")
    assert hardware_has_bf16("cpu") is False
