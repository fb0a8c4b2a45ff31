"""What every benchmark needs: the machine in words, interleaved rounds, medians with quartiles, Markdown tables."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable, Sequence

import av
import torch

from distinit_plugin.engine.timing import ROUNDS, Spread, interleave, ratio, spread
from distinit_plugin.models.hardware import cpu_flags, cpu_name

__all__ = ["ROUNDS", "Spread", "interleave", "ratio", "spread"]


def environment(**more: object) -> str:
    """One line on the machine and the versions; ``more`` is added (``precision="fp32"``)."""
    parts = [
        _cpu(),
        f"{len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()} cores",
        f"{torch.get_num_threads()} threads",
        f"load {os.getloadavg()[0]:.1f}",
        f"Python {platform.python_version()}",
        f"torch {torch.__version__}",
        f"av {av.__version__}",
    ]
    if torch.cuda.is_available():
        parts.append(torch.cuda.get_device_name())
    return ", ".join([*parts, *(f"{name.replace('_', ' ')} {value}" for name, value in more.items())])


def _cpu() -> str:
    """Its name, and whether it computes in bf16."""
    flags = cpu_flags()
    known = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in flags]
    return f"{cpu_name()} ({', '.join(known) or 'no vector units known'})"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Markdown; the first column is text, the others are numbers."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def verdict(value: float, *, at_least: float | None = None, at_most: float | None = None) -> str:
    """``≥ 0.95: yes``."""
    if at_least is not None:
        return f"≥ {at_least:g}: {'yes' if value >= at_least else 'NO'}"
    assert at_most is not None
    return f"≤ {at_most:g}: {'yes' if value <= at_most else 'NO'}"


def peak_memory(pid: int | str = "self") -> int:
    """Largest resident memory of a process so far (VmHWM), bytes; Linux."""
    return _status(pid, "VmHWM")


def _status(pid: int | str, field: str) -> int:
    with open(f"/proc/{pid}/status", encoding="utf-8") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(f"{field}:"))


def proportional_memory(pid: int) -> int:
    """Resident memory of a process in which shared pages count in shares (PSS), bytes; Linux."""
    with open(f"/proc/{pid}/smaps_rollup", encoding="utf-8") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("Pss:"))
