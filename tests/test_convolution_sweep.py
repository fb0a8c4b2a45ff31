"""Every convolution of every registered network: formulations agree at training size."""

from __future__ import annotations

import copy
import os
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distinit_plugin.models import InputSpec, build_network
from distinit_plugin.models.conv import (
    Conv3d,
    ConvCase,
    ConvVerdict,
    check_convolutions,
    hardware_has_bf16,
    record_cases,
)
from distinit_plugin.registry import MODELS

CPU = torch.device("cpu")
SLOW = bool(os.environ.get("DISTINIT_TEST_SLOW"))


@pytest.fixture(autouse=True)
def one_seed() -> None:
    torch.manual_seed(0)


RESNETS = [
    (name, {"depth": depth, "variant": variant}, InputSpec())
    for name in ("Res3D", "R2Plus1D")
    for depth in (18, 26, 50)  # 10, 34, 101 and 152 have the same blocks, more of them
    for variant in ("vmz", "torchvision")
]
FULL_LENGTH = InputSpec(num_frames=64, train_crop_size=224)
SEPARABLE = {"separable_stem": True, "stem_frames": 7, "temporal_norm": True}
OWN = [
    *RESNETS,
    ("C3D", {}, InputSpec(num_frames=16, train_crop_size=112)),
    ("I3D", {}, FULL_LENGTH),
    ("I3D", {"padding": "symmetric"}, FULL_LENGTH),
    ("S3DG", {}, FULL_LENGTH),
    ("S3DG", SEPARABLE, FULL_LENGTH),
    ("Fused3D", {}, InputSpec(num_frames=5, train_crop_size=224)),
    ("PredictedFlow3D", {}, FULL_LENGTH),
]
FORMATS = [
    pytest.param(True, id="as_it_runs"),
    pytest.param(
        False,
        id="channels_last_off",
        marks=pytest.mark.skipif(not SLOW, reason="RUNNER.CHANNELS_LAST off: minutes; DISTINIT_TEST_SLOW=1 runs it"),
    ),
]
WITHOUT_3D = {"Res2D", "TwoStream", "ConvLSTM"}
EXTERNAL = [
    ("torchvision/mc3_18", {}, InputSpec()),
    ("torchvision/s3d", {}, InputSpec(num_frames=16, train_crop_size=224)),
    ("pytorchvideo/csn_r101", {}, InputSpec(num_frames=8, train_crop_size=112)),
    ("pytorchvideo/slow_r50", {}, InputSpec(num_frames=8, train_crop_size=224)),
    ("pytorchvideo/slowfast_r50", {}, InputSpec(num_frames=32, train_crop_size=224)),
    ("pytorchvideo/x3d_s", {}, InputSpec(num_frames=13, train_crop_size=160)),
]


def distinct_cases(
    networks: list[tuple[str, dict[str, Any], InputSpec]], batch: int, most_frames: int = 64
) -> dict[str, ConvCase]:
    """All distinct convolutions at the networks' training sizes, found without arithmetic."""
    cases: dict[str, ConvCase] = {}
    for name, switches, spec in networks:
        spec = replace(spec, num_frames=min(spec.num_frames, most_frames))
        with torch.device("meta"):
            network = build_network(name, num_classes=10, input=spec, **switches)
            views = {
                view: torch.empty(batch, len(own.mean), own.num_frames, own.crop_size, own.crop_size)
                for view, own in network.view_specs("train").items()
            }
        cases.update({case.key: case for case in record_cases(network, views)})
    return cases


def test_no_registered_network_is_forgotten() -> None:
    assert {name for name, _, _ in OWN} | WITHOUT_3D == {name for name, _ in MODELS}
    for name in WITHOUT_3D:
        assert distinct_cases([(name, {}, InputSpec(num_frames=2, train_crop_size=64))], batch=1) == {}


def shrink(case: ConvCase, size: int) -> ConvCase:
    """The same convolution on a smaller and shorter map of one clip."""
    _, channels, frames, height, width = case.input_shape
    small = (1, channels, min(frames, size + 1), min(height, size), min(width, size))
    return ConvCase(case.key, case.sample, small, case.channels_last)


class OneConvolution(nn.Module):
    def __init__(self, layer: Conv3d) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, views: dict[str, Tensor]) -> Tensor:
        return self.layer(views["x"])


def run(layer: Conv3d, x: Tensor) -> list[Tensor]:
    """Output, input gradient and weight gradient for a fixed output gradient, in fp32."""
    leaf = x.clone().requires_grad_(True)
    layer.zero_grad()
    y = layer(leaf)
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(7)).to(y.dtype))
    assert leaf.grad is not None
    assert layer.weight.grad is not None
    return [tensor.detach().float().clone() for tensor in (y, leaf.grad, layer.weight.grad)]


def worst_error(found: list[Tensor], exact: list[Tensor]) -> float:
    return max(float((a - b).norm() / b.norm()) for a, b in zip(found, exact, strict=True))


def with_values(case: ConvCase) -> tuple[Conv3d, Tensor]:
    """The case's convolution and an input for it, filled with random numbers (not those of the check)."""
    layer = copy.deepcopy(case.sample).to_empty(device=CPU)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, 0.0, 0.05)
    memory_format = torch.channels_last_3d if case.channels_last else torch.contiguous_format
    layer.to(memory_format=memory_format)
    return layer, torch.randn(case.input_shape).contiguous(memory_format=memory_format)


def error_between_formulations(case: ConvCase) -> float:
    layer, x = with_values(case)
    exact = run(layer, x)
    layer.formulation = "conv2d"
    return worst_error(run(layer, x), exact)


def error_of_bf16_as_run(case: ConvCase) -> tuple[float, ConvVerdict]:
    """Let the check choose, then compare bf16 with fp32 on other numbers than the check's."""
    layer, x = with_values(case)
    exact = run(layer, x)
    report = check_convolutions(OneConvolution(layer), {"x": x}, dtype=torch.bfloat16, device=CPU, timing=False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return worst_error(run(layer, x), exact), report.verdicts[0]


@pytest.mark.parametrize(
    ("networks", "count", "limit", "frames"),
    [
        # the widest sums (the stems of I3D and of SlowFast's fast path: 32 × 112 × 112 terms in a weight's gradient)
        # reach 1.1e-5 in fp32
        pytest.param(OWN, 100, 2e-5 if SLOW else 1e-5, 4, id="own"),
        pytest.param(EXTERNAL, 180, 2e-5, 8, id="external"),
    ],
)
def test_formulations_agree_in_fp32_at_training_size(
    networks: list[Any], count: int, limit: float, frames: int
) -> None:
    """Every distinct convolution, one clip at its network's training size: conv2d equals conv3d up to rounding.

    Clips are cut to ``frames`` unless DISTINIT_TEST_SLOW is set.
    """
    cases = distinct_cases(networks, batch=1, most_frames=64 if SLOW else frames)
    assert len(cases) > count
    errors = {key: error_between_formulations(case) for key, case in cases.items()}
    print(f"{sum(e > 1e-5 for e in errors.values())} of {len(errors)} above 1e-5, worst {max(errors.values()):.2e}")
    assert {key: error for key, error in errors.items() if not error < limit} == {}


def test_bf16_is_right_on_small_maps() -> None:
    """bf16 as the runner computes it, for every kind of convolution of our own networks, on maps of 3×3 pixels.

    CPUs without bf16 instructions emulate it some thirty times slower than fp32, and the runner computes in fp32 there
    (``RUNNER.PRECISION auto``). So on such a machine the formulations are shown to be right at training size in fp32
    (the test above) and in bf16 on small maps (here). The sweep at training size in bf16 is the next test: it runs by
    itself where the hardware has bf16, and anywhere (in half an hour or so) with DISTINIT_TEST_SLOW=1.
    """
    layers = {case.sample: case for case in reversed(distinct_cases(OWN, batch=1).values())}  # the first of a kind
    kinds = {(layer.kernel_size, layer.stride, layer.padding, layer.groups): case for layer, case in layers.items()}
    assert len(kinds) > 10
    for kind, case in kinds.items():
        assert error_of_bf16_as_run(shrink(case, 3))[0] < 1e-2, kind


@pytest.mark.timeout(2 * 60 * 60)
@pytest.mark.parametrize("channels_last", FORMATS)
@pytest.mark.skipif(
    not (hardware_has_bf16("cpu") or SLOW),
    reason="this CPU emulates bf16, far too slowly for full size (DISTINIT_TEST_SLOW=1 runs it nevertheless)",
)
def test_bf16_is_right_at_training_size(channels_last: bool) -> None:
    """bf16 as the runner computes it, for every distinct convolution of every listed network.

    Emulated, clips of more than 32 frames are cut to 8: Inception's third layer alone would take ten minutes.
    """
    fast = hardware_has_bf16("cpu")
    cases = distinct_cases(RESNETS + EXTERNAL, batch=2 if fast else 1)
    cases |= distinct_cases(OWN, batch=1, most_frames=64 if fast else 8)
    if channels_last:
        last = ((key.replace("contiguous", "channels last"), case) for key, case in cases.items())
        cases = {key: replace(case, key=key, channels_last=True) for key, case in last}
    wrong, replaced = {}, 0
    for number, (key, case) in enumerate(cases.items(), start=1):
        error, verdict = error_of_bf16_as_run(case)
        if not error < 1e-2:
            wrong[key] = error
        plain = max(verdict.errors["conv3d"])  # the control: what PyTorch's own kernel does
        if not plain < 1e-2:
            replaced += 1
            assert verdict.formulation != "conv3d", key
        print(f"{number}/{len(cases)} {key}: {verdict.formulation} {error:.2g}, conv3d {plain:.2g}", flush=True)
    print(f"conv3d alone would be wrong in {replaced} of {len(cases)}")
    assert wrong == {}
