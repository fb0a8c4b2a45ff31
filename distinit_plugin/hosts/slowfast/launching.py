"""PySlowFast's processes: each is made ready before anything of PySlowFast reaches it, and they meet on a free port."""

from __future__ import annotations

import importlib
import socket
from collections.abc import Callable
from typing import Any

import torch
from torch.multiprocessing import ProcessRaisedException

from distinit_plugin.errors import UserError

FIXED_METHOD = "tcp://localhost:9999"
"""PySlowFast's default, which a second job on the same machine finds taken."""

Job = Callable[..., Any]


def launch_job(cfg: Any, init_method: str, func: Job, daemon: bool = False) -> None:
    """In place of ``slowfast.utils.misc.launch_job``: run ``func(cfg)`` here, or in NUM_GPUS processes.

    Raises:
        UserError: What a process raised as one; other errors come with that process's traceback.
    """
    if cfg.NUM_GPUS <= 1:
        func(cfg=cfg)
        return
    method = free_port() if init_method == FIXED_METHOD and cfg.NUM_SHARDS == 1 else init_method
    arguments = (
        f"{func.__module__}:{func.__qualname__}",
        (cfg.NUM_GPUS, method, cfg.SHARD_ID, cfg.NUM_SHARDS, cfg.DIST_BACKEND),
        cfg,
    )
    try:
        torch.multiprocessing.spawn(run_rank, nprocs=cfg.NUM_GPUS, args=arguments, daemon=daemon)
    except ProcessRaisedException as error:
        sentence = _told(str(error))
        if sentence is None:
            raise
        raise UserError(sentence) from None


def run_rank(local_rank: int, name: str, place: tuple[int, str, int, int, str], cfg: Any) -> None:
    """What each process does.

    Args:
        local_rank: Its number on this machine.
        name: ``module:function`` to be run.
        place: Processes of a machine, where they meet, this machine's number, machines, back end.
        cfg: The configuration.
    """
    from distinit_plugin.hosts.slowfast.boot import boot

    boot()
    from slowfast.utils import multiprocessing

    module, _, function = name.partition(":")
    num_processes, *others = place
    multiprocessing.run(local_rank, num_processes, getattr(importlib.import_module(module), function), *others, cfg)


def free_port() -> str:
    """An address on this machine where nothing listens."""
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return f"tcp://localhost:{found.getsockname()[1]}"


def _told(text: str) -> str | None:
    """The sentence of an error meant for people, from the traceback of a process."""
    marks = [f"distinit_plugin.errors.{kind}: " for kind in ("UserError", "ConfigError", "WeightsError")]
    for mark in marks:
        if mark in text:
            return text.rpartition(mark)[2].strip()
    return None
