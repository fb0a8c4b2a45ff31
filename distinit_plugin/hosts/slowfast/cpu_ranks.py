"""RUNNER.CPU_RANKS in PySlowFast: several processes on a CPU, which its code knows on GPUs alone."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from distinit_plugin.hosts.slowfast.missing import TOOLS

BACKEND = "gloo"


def as_gpus(cfg: Any, ranks: int) -> Any:
    """A copy of a configuration for ``pretend``: as many GPUs as processes."""
    copy = cfg.clone()
    copy.defrost()
    copy.NUM_GPUS, copy.DIST_BACKEND = ranks, BACKEND
    return copy


def pretend() -> None:
    """Let what PySlowFast moves to a GPU stay where it is, and its models be shared by processes on the CPU."""
    from slowfast.models import build

    torch.cuda.set_device = lambda device: None
    torch.Tensor.cuda = _stay  # type: ignore[method-assign,assignment]
    nn.Module.cuda = _stay  # type: ignore[method-assign,assignment]
    theirs = build.build_model

    def build_model(cfg: Any, gpu_id: int | None = None) -> nn.Module:
        ranks, cfg.NUM_GPUS = cfg.NUM_GPUS, 0
        try:
            model = theirs(cfg)
        finally:
            cfg.NUM_GPUS = ranks
        return DistributedDataParallel(model, find_unused_parameters=cfg.MODEL.DETACH_FINAL_FC)

    for name in ("slowfast.models", "slowfast.models.build", f"{TOOLS}.train_net", f"{TOOLS}.test_net"):
        if name in sys.modules:  # its own tools/run_net.py imports the last two before a process gets here
            vars(sys.modules[name])["build_model"] = build_model


def _stay(value: Tensor | nn.Module, *_: Any, **__: Any) -> Tensor | nn.Module:
    return value
