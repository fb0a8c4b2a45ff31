"""What a run was computed with: versions, the state of the sources, the machine."""

from __future__ import annotations

import functools
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path

import torch

from distinit_plugin.engine.meters import machine_memory
from distinit_plugin.models.hardware import cpu_name
from distinit_plugin.version import __version__

PACKAGES = ("torch", "torchvision", "numpy", "av", "timm", "pytorchvideo")
"""Whose versions may change numbers."""

_ROOT = Path(__file__).resolve().parents[2]
_GIT_SECONDS = 10


def environment(device: torch.device, ranks: int = 1) -> dict[str, str]:
    """Name → text, in the order in which a person reads it.

    Args:
        device: That this rank computes on.
        ranks: Processes of the job.
    """
    found = {"distinit-plugin": __version__}
    if commit := source_commit():
        found["commit"] = commit
    found["Python"] = platform.python_version()
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    found["system"] = f"{platform.system()} {platform.release()} {platform.machine()}"
    found["processor"] = f"{cpu_name()}, {os.cpu_count() or 1} cores"
    if total := machine_memory()[1]:
        found["memory"] = f"{total / 1024**3:.0f} GiB"
    if device.type == "cuda":
        found["GPU"] = f"{torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda}"
    found["processes"] = f"{ranks}, {torch.get_num_threads()} threads each"
    return found


@functools.cache
def source_commit() -> str:
    """Commit of the checkout that this package runs from, ``-dirty`` when files differ from it; empty: no checkout."""
    if not (_ROOT / ".git").exists():
        return ""
    describe = ["describe", "--always", "--dirty", "--abbrev=12", "--match", ""]
    words = ["git", "--no-optional-locks", "-C", str(_ROOT), *describe]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=_GIT_SECONDS, check=False)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
