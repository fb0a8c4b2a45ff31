"""Checks each distinct 3D convolution of a network against fp32 and picks a formulation that is right and fast.

bf16 ``conv3d`` silently returns wrong weight gradients on some hardware, so it is compared, never assumed.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from distinit_plugin.models.conv3d import Conv3d, Formulation, TemporalPadding, adopt_convolutions
from distinit_plugin.models.conv_cache import Errors, Measurement, read_measurements, write_measurements
from distinit_plugin.models.hardware import hardware_has_bf16, hardware_key

__all__ = [
    "Conv3d",
    "ConvCase",
    "ConvVerdict",
    "ConvolutionReport",
    "Formulation",
    "TemporalPadding",
    "adopt_convolutions",
    "check_convolutions",
    "hardware_has_bf16",
    "measure_case",
    "record_cases",
]

CANDIDATES: tuple[Formulation, Formulation] = ("conv3d", "conv2d")
PARTS = ("output", "input gradient", "weight gradient")
CHECKED_BATCH = 2  # clips per check: the kernels are the same for larger batches
NOT_SLOWER = 1.1  # a preferred formulation may take this many times the fastest one's time (noise)


@dataclass
class ConvCase:
    """One distinct convolution: its weights' shape, how it walks, what it is fed; and where it occurs.

    Attributes:
        key: Text that two convolutions share only when they are computed alike.
        sample: One of the convolutions.
        input_shape: (B,C,T,H,W) seen by it, B at most :data:`CHECKED_BATCH`.
        channels_last: Its input was in ``channels_last_3d``.
        names: Module names of all convolutions of this kind.
        modules: Those convolutions.
    """

    key: str
    sample: Conv3d
    input_shape: tuple[int, ...]
    channels_last: bool
    names: list[str] = field(default_factory=list)
    modules: list[Conv3d] = field(default_factory=list)


@dataclass(frozen=True)
class ConvVerdict:
    """What was found for one case: the formulation it runs in, and how far each candidate was from fp32."""

    key: str
    names: tuple[str, ...]
    formulation: Formulation
    errors: Mapping[str, Errors]

    def is_wrong(self, tolerance: float) -> bool:
        """Whether PyTorch's own kernel fails here."""
        return _worst(self.errors.get("conv3d", (0.0, 0.0, 0.0))) > tolerance


@dataclass(frozen=True)
class ConvolutionReport:
    """The formulation of every convolution of a network; ``str()`` names those that were repaired."""

    hardware: str
    tolerance: float
    verdicts: tuple[ConvVerdict, ...]

    @property
    def repaired(self) -> tuple[ConvVerdict, ...]:
        """The cases in which ``conv3d`` is wrong."""
        return tuple(verdict for verdict in self.verdicts if verdict.is_wrong(self.tolerance))

    def __str__(self) -> str:
        """A summary line, then one line for each repaired case."""
        counts = {name: sum(v.formulation == name for v in self.verdicts) for name in (*CANDIDATES, "fp32")}
        chosen = ", ".join(f"{count} as {name}" for name, count in counts.items() if count)
        lines = [f"{len(self.verdicts)} distinct convolutions ({self.hardware}): {chosen or 'none'}"]
        for verdict in self.repaired:
            error, part = max(zip(verdict.errors["conv3d"], PARTS, strict=True))
            where = ", ".join(verdict.names[:3]) + (", …" if len(verdict.names) > 3 else "")
            lines.append(
                f"  conv3d is wrong ({part} off by {error:.2g}), {verdict.formulation} runs: {where}; {verdict.key}"
            )
        return "\n".join(lines)


def check_convolutions(
    network: nn.Module,
    views: Mapping[str, Tensor],
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    cache_path: str | None = None,
    tolerance: float = 1e-2,
    timing: bool = True,
) -> ConvolutionReport:
    """Compare each distinct convolution, computed in ``dtype``, with fp32, and set every one's formulation.

    Compared are the output and the gradients of input and weights, as relative Frobenius errors; a NaN fails. Of the
    formulations that pass, the fastest is taken; a factored kernel prefers ``conv2d`` and a full one ``conv3d`` where
    that is not slower. Where none passes, the convolution runs in fp32.

    Args:
        network: A network with :class:`Conv3d` convolutions (see :func:`adopt_convolutions`), on ``device``.
        views: Normalised views of the training size on ``device``, as ``network.forward`` takes them.
        dtype: The autocast type; ``torch.float32`` chooses by time alone.
        device: Where the network runs.
        cache_path: JSON file of measurements, kept for each hardware and library version; ``None``: measure anew.
        tolerance: Largest relative error that passes.
        timing: False: the preferred formulation whenever it passes, so that the choice never depends on a clock.
    """
    device = torch.device(device)
    cases = record_cases(network, views)
    hardware = hardware_key(device, dtype)
    known = {} if cache_path is None else read_measurements(cache_path, hardware)
    fresh: dict[str, Measurement] = {}
    verdicts = []
    for case in cases:
        found = known.get(case.key)
        if found is None or (timing and not found.seconds):
            found = fresh[case.key] = measure_case(case, dtype=dtype, device=device, timing=timing)
        formulation = _choose(found, _preferred(case, dtype), tolerance, timing)
        for module in case.modules:
            module.formulation = formulation
        verdicts.append(ConvVerdict(case.key, tuple(case.names), formulation, found.errors))
    if cache_path is not None and fresh:
        write_measurements(cache_path, hardware, fresh)
    return ConvolutionReport(hardware, tolerance, tuple(verdicts))


def record_cases(network: nn.Module, views: Mapping[str, Tensor]) -> list[ConvCase]:
    """The distinct convolutions that one forward meets, in their order; the network's state is left as it was."""
    cases: dict[str, ConvCase] = {}
    names: dict[nn.Module, str] = {m: name for name, m in network.named_modules() if isinstance(m, Conv3d)}

    def record(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        assert isinstance(module, Conv3d)
        case = _case_of(module, inputs[0])
        case = cases.setdefault(case.key, case)
        if module not in case.modules:
            case.modules.append(module)
            case.names.append(names[module])

    training = {module: module.training for module in network.modules()}
    handles = [module.register_forward_pre_hook(record) for module in names]
    for module in names:
        assert isinstance(module, Conv3d)
        module.formulation = "conv3d"
    network.eval()
    try:
        with torch.no_grad():
            network({name: view[:CHECKED_BATCH] for name, view in views.items()})
    finally:
        for handle in handles:
            handle.remove()
        for module, was_training in training.items():
            module.training = was_training
    return list(cases.values())


def _case_of(conv: Conv3d, x: Tensor) -> ConvCase:
    shape = (min(x.shape[0], CHECKED_BATCH), *x.shape[1:])
    channels_last = not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last_3d)
    padding = conv.padding if isinstance(conv.padding, str) else _times(conv.padding)
    padding = "same" if conv.pads_same else padding
    parts = [
        f"{conv.in_channels}→{conv.out_channels} {_times(conv.kernel_size)}",
        f"stride {_times(conv.stride)} padding {padding} dilation {_times(conv.dilation)} groups {conv.groups}",
        f"{conv.padding_mode} {conv.temporal_padding} {'bias' if conv.bias is not None else 'no bias'}",
        f"input {_times(shape)} {'channels last' if channels_last else 'contiguous'}",
    ]
    return ConvCase(", ".join(parts), conv, shape, channels_last)


def measure_case(case: ConvCase, *, dtype: torch.dtype, device: torch.device, timing: bool = True) -> Measurement:
    """Run every candidate of one case on fixed random tensors and compare it with fp32."""
    generator = torch.Generator().manual_seed(0)
    conv = copy.deepcopy(case.sample).to_empty(device=device).float().requires_grad_(True)
    with torch.no_grad():
        conv.weight.copy_(torch.randn(conv.weight.shape, generator=generator) * (2 / conv.weight[0].numel()) ** 0.5)
        if conv.bias is not None:
            conv.bias.copy_(torch.randn(conv.bias.shape, generator=generator))
    memory_format = torch.channels_last_3d if case.channels_last else torch.contiguous_format
    x = torch.randn(case.input_shape, generator=generator).to(device).contiguous(memory_format=memory_format)
    with torch.no_grad():
        grad = torch.randn(conv(x).shape, generator=generator).to(device).contiguous(memory_format=memory_format)
    with _exact_fp32(device):
        exact = _run(conv, x, grad, "fp32", torch.float32)
    errors: dict[str, Errors] = {}
    seconds: dict[str, float] = {}
    for formulation in CANDIDATES:
        try:
            found = _run(conv, x, grad, formulation, dtype)
        except torch.OutOfMemoryError:  # tells nothing about the kernel
            raise
        except RuntimeError:  # no kernel for it
            errors[formulation] = (float("inf"),) * 3
            continue
        errors[formulation] = _relative_errors(found, exact)
        if timing:
            seconds[formulation] = min(_seconds(conv, x, grad, formulation, dtype) for _ in range(2))
    return Measurement(errors, seconds)


def _run(conv: Conv3d, x: Tensor, grad: Tensor, formulation: Formulation, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Output and gradients of input and weights, in fp32."""
    conv.formulation = formulation
    conv.zero_grad(set_to_none=True)
    x = x.detach().requires_grad_(True)
    with torch.autocast(x.device.type, dtype=dtype, enabled=dtype != torch.float32):
        y = conv(x)
    y.backward(grad.to(y.dtype))
    assert x.grad is not None
    assert conv.weight.grad is not None
    return y.detach().float(), x.grad.float(), conv.weight.grad.float()


def _seconds(conv: Conv3d, x: Tensor, grad: Tensor, formulation: Formulation, dtype: torch.dtype) -> float:
    _synchronize(x.device)
    start = time.perf_counter()
    _run(conv, x, grad, formulation, dtype)
    _synchronize(x.device)
    return time.perf_counter() - start


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def _exact_fp32(device: torch.device) -> Iterator[None]:
    """No TF32 in the reference."""
    if device.type != "cuda":
        yield
        return
    convolutions: Any = getattr(torch.backends.cudnn, "conv", None)
    if not hasattr(convolutions, "fp32_precision"):  # torch before 2.9
        with torch.backends.cudnn.flags(enabled=torch.backends.cudnn.enabled, allow_tf32=False):
            yield
        return
    before, convolutions.fp32_precision = convolutions.fp32_precision, "ieee"
    try:
        yield
    finally:
        convolutions.fp32_precision = before


def _relative_errors(found: tuple[Tensor, ...], exact: tuple[Tensor, ...]) -> Errors:
    output, input_grad, weight_grad = (_relative_error(a, b) for a, b in zip(found, exact, strict=True))
    return output, input_grad, weight_grad


def _relative_error(found: Tensor, exact: Tensor) -> float:
    error = float((found - exact).norm() / exact.norm().clamp_min(torch.finfo(torch.float32).tiny))
    return error if error == error else float("inf")


def _worst(errors: Errors) -> float:
    return max(errors)


def _preferred(case: ConvCase, dtype: torch.dtype) -> Formulation:
    return "conv2d" if case.sample.is_factored and dtype != torch.float32 else "conv3d"


def _choose(found: Measurement, preferred: Formulation, tolerance: float, timing: bool) -> Formulation:
    passing = [name for name in CANDIDATES if name in found.errors and _worst(found.errors[name]) <= tolerance]
    if not passing:
        return "fp32"
    if not timing:
        return preferred if preferred in passing else passing[0]
    fastest = min(passing, key=lambda name: found.seconds[name])
    if preferred in passing and found.seconds[preferred] <= NOT_SLOWER * found.seconds[fastest]:
        return preferred
    return fastest


def _times(sizes: tuple[int, ...]) -> str:
    return "×".join(str(size) for size in sizes)
