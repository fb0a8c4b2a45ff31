"""What the machine can compute natively, and its name as a key for what was measured on it."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import torch

from distinit_plugin.models.folding import FOLDING_VERSION

CPU_INFO = Path("/proc/cpuinfo")
BF16_FLAGS = frozenset({"avx512_bf16", "amx_bf16", "bf16"})
"""CPU flags of x86 and Arm that mean bf16 arithmetic in hardware."""


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def hardware_has_bf16(device: torch.device | str) -> bool:
    """Whether bf16 runs in hardware there; emulated bf16 is many times slower than fp32."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu":
        return False
    return bool(BF16_FLAGS & cpu_flags())


def hardware_key(device: torch.device | str, dtype: torch.dtype) -> str:
    """Names all that a measurement of kernels depends on: device, instruction sets, threads, library, formulations."""
    device = torch.device(device)
    if device.type == "cuda":
        name = f"{torch.cuda.get_device_name(device)}, cuDNN {torch.backends.cudnn.version()}"
    else:
        limit = os.environ.get("ONEDNN_MAX_CPU_ISA", "no ISA limit")
        flags = " ".join(sorted(BF16_FLAGS & cpu_flags())) or "no bf16"
        capability = torch.backends.cpu.get_cpu_capability()
        name = f"{cpu_name()}, {capability}, {flags}, {limit}, {torch.get_num_threads()} threads"
    return f"{name}, torch {torch.__version__}, {str(dtype).removeprefix('torch.')}, folding {FOLDING_VERSION}"


def _cpu_lines() -> list[str]:
    try:
        return CPU_INFO.read_text(errors="replace").splitlines()
    except OSError:
        return []


def cpu_flags() -> frozenset[str]:
    """Instruction sets by the names of Linux; empty elsewhere."""
    for line in _cpu_lines():
        name, _, value = line.partition(":")
        if name.strip() in ("flags", "Features"):
            return frozenset(value.split())
    return frozenset()


def cpu_name() -> str:
    """What the system calls its processor."""
    for line in _cpu_lines():
        name, _, value = line.partition(":")
        if name.strip() == "model name":
            return value.strip()
    return platform.processor() or platform.machine()
