"""PySlowFast: where it is, what of it works here, and what had to be cured for that."""

from __future__ import annotations

import importlib
import importlib.util
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from distinit_plugin.doctor.findings import Finding, first_line
from distinit_plugin.doctor.media import pictures, write_tiny
from distinit_plugin.errors import UserError

BACKENDS = ("pyav", "torchvision")
"""Values of DATA.DECODING_BACKEND."""


def look_at_pyslowfast() -> list[Finding]:
    """Everything of it that can be told without a configuration; this process is changed for good."""
    from distinit_plugin.hosts.slowfast import boot
    from distinit_plugin.hosts.slowfast.checkout import ROOT_VARIABLE, find_checkout
    from distinit_plugin.hosts.slowfast.patches import WITHOUT_VARIABLE

    try:
        root = find_checkout()
    except UserError as error:
        promised = bool(os.environ.get(ROOT_VARIABLE))
        text, _, advice = str(error).partition(". ")
        return [Finding("checkout", "broken" if promised else "absent", f"{text}.", advice)]
    findings = [Finding("checkout", "works", f"{root}, {_commit(root)}")]
    try:
        applied = {patch.name for patch in boot.boot()}
    except UserError as error:
        return [*findings, Finding("start", "broken", str(error), "")]
    except Exception as error:
        without = os.environ.get(WITHOUT_VARIABLE, "")
        advice = (
            f"Do not switch its cures off ({WITHOUT_VARIABLE} is {without})."
            if without
            else "This tree differs from those that are known: take PySlowFast's main, or report it with this text."
        )
        return [*findings, Finding("start", "broken", first_line(error), advice)]
    findings += [look_at_patch(patch, patch.name in applied) for patch in boot.PATCHES]
    return [*findings, *_parts()]


def look_at_patch(patch: Any, cured: bool) -> Finding:
    """Whether a defect is here, and what became of it.

    Args:
        patch: One of ``boot.PATCHES``, after the start.
        cured: It was applied.
    """
    from distinit_plugin.hosts.slowfast.patches import WITHOUT_VARIABLE, given_names

    name = f"patch {patch.name}"
    if cured:
        return Finding(name, "works", f"cured here: {patch.symptom}")
    if patch.name not in given_names():
        return Finding(name, "works", "not needed")
    try:
        here = patch.present()
    except Exception as error:
        return Finding(name, "note", f"switched off; {first_line(error)}", f"Unset {WITHOUT_VARIABLE} to have it.")
    text = f"switched off, and needed: {patch.symptom}" if here else "switched off, and not needed"
    return Finding(name, "note", text, f"Unset {WITHOUT_VARIABLE} to have it cured." if here else "")


def _commit(root: Path) -> str:
    """The commit of the checkout, and whether it was changed."""

    def git(*words: str) -> str:
        command = ["git", "--no-optional-locks", "-C", str(root), "-c", f"safe.directory={root}", *words]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()

    try:
        changed = ", changed since" if git("status", "--porcelain") else ""
        return f"commit {git('log', '-1', '--format=%h of %cs')}{changed}"
    except (OSError, subprocess.SubprocessError):
        return "commit unknown"


def _parts() -> list[Finding]:
    checks: tuple[tuple[str, Callable[[], Finding]], ...] = (
        ("its run_net", _run_net),
        ("its networks", _networks),
        ("its datasets", _datasets),
        *((f"DATA.DECODING_BACKEND {name}", partial(_decoding, name)) for name in BACKENDS),
        ("detectron2", _detectron2),
        ("fairscale", _fairscale),
        ("BN.NORM_TYPE sync_batchnorm", _sync_norm),
        ("ContrastiveModel", _contrastive),
    )
    findings = []
    for name, check in checks:
        try:
            findings.append(check())
        except Exception as error:
            advice = "This part of PySlowFast cannot be used here; report it with this text."
            findings.append(Finding(name, "broken", first_line(error), advice))
    return findings


def _run_net() -> Finding:
    from distinit_plugin.hosts.slowfast.missing import TOOLS

    importlib.import_module(f"{TOOLS}.run_net")
    return Finding("its run_net", "works", "can be imported: training, validation, test")


def _networks() -> Finding:
    from slowfast.models.build import MODEL_REGISTRY

    from distinit_plugin.registry import MODELS

    names = [name for name, _ in MODEL_REGISTRY if name not in MODELS]
    return Finding("its networks", "works", f"{', '.join(sorted(names))}; and {len(list(MODELS))} of this package")


def _datasets() -> Finding:
    from slowfast.datasets.build import DATASET_REGISTRY

    names = sorted(name for name, _ in DATASET_REGISTRY)
    if not any(name.startswith("Ptv") for name in names):
        advice = "Its Ptv datasets need PyTorchVideo's transforms: see PyTorchVideo above."
        return Finding("its datasets", "note", f"{', '.join(names)}; no Ptv ones", advice)
    return Finding("its datasets", "works", ", ".join(names))


def _decoding(backend: str) -> Finding:
    """A tiny video through its own functions, whoever decodes behind them."""
    from slowfast.datasets import decoder, video_container

    name = f"DATA.DECODING_BACKEND {backend}"
    with tempfile.TemporaryDirectory(prefix="distinit-") as folder:
        path = Path(folder) / "tiny.mp4"
        write_tiny(path, "mpeg4", pictures())
        container = video_container.get_video_container(str(path), False, backend)
        frames, *_ = decoder.decode(container, [1], [4], -1, 1, video_meta={}, target_fps=25, backend=backend)
    if frames is None or tuple(frames[0].shape[:1]) != (4,):
        return Finding(name, "broken", "no frames", "Do not switch the patch decoder off.")
    return Finding(name, "works", "reads a video")


def _detectron2() -> Finding:
    module = sys.modules.get("detectron2")
    if module is not None and getattr(module, "__file__", None) is not None:  # a stand-in has no file
        return Finding("detectron2", "works", "is here")
    advice = "For its demonstrations and visualizations alone: build detectron2 from source."
    return Finding("detectron2", "absent", "torchvision's RoIAlign stands in: AVA works, its demo does not", advice)


def _fairscale() -> Finding:
    if importlib.util.find_spec("fairscale") is None:
        return Finding("fairscale", "absent", "for MODEL.ACT_CHECKPOINT", "If you want that: pip install fairscale.")
    return Finding("fairscale", "works", "MODEL.ACT_CHECKPOINT")


def _sync_norm() -> Finding:
    from distinit_plugin.hosts.slowfast.defects import sync_norm_fails

    name = "BN.NORM_TYPE sync_batchnorm"
    if sync_norm_fails():
        return Finding(name, "note", "cannot be built with PyTorchVideo 0.1.5", "Leave BN.NORM_TYPE at batchnorm.")
    return Finding(name, "works")


def _contrastive() -> Finding:
    import torch

    if torch.cuda.is_available():
        return Finding("ContrastiveModel", "works", "there is a GPU (not tried)")
    return Finding("ContrastiveModel", "absent", "runs on GPUs only", "Use another network on this machine.")
