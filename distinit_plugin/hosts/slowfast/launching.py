"""PySlowFast's processes: each is made ready before anything of PySlowFast reaches it, and they meet on a free port."""

from __future__ import annotations

import importlib
import logging
import socket
from collections.abc import Callable
from typing import Any

import torch
from torch.multiprocessing import ProcessRaisedException

from distinit_plugin.errors import UserError
from distinit_plugin.hosts.slowfast.cpu_ranks import as_gpus, pretend
from distinit_plugin.hosts.slowfast.registration import fit_train_net
from distinit_plugin.hosts.slowfast.schema import own_cfg
from distinit_plugin.hosts.slowfast.settling import DATASET, can_classify, settle

FIXED_METHOD = "tcp://localhost:9999"
"""PySlowFast's default, which a second job on the same machine finds taken."""

Job = Callable[..., Any]

logger = logging.getLogger(__name__)


def launch_job(cfg: Any, init_method: str, func: Job, daemon: bool = False) -> None:
    """In place of ``slowfast.utils.misc.launch_job``: run ``func(cfg)`` here, or in several processes.

    Raises:
        UserError: What a process raised as one; other errors come with that process's traceback.
    """
    settle(cfg)
    if func.__name__ == "test" and not can_test(cfg):
        logger.info("no test: there are no videos for it (CORPUS.TEST), or no classifier is trained")
        return
    cpu_ranks = int(own_cfg(cfg).RUNNER.CPU_RANKS) if cfg.NUM_GPUS == 0 else 1
    if max(cfg.NUM_GPUS, cpu_ranks) <= 1:
        fit_train_net()
        func(cfg=cfg)
        return
    if cpu_ranks > 1:
        cfg = as_gpus(cfg, cpu_ranks)
    method = free_port() if init_method == FIXED_METHOD and cfg.NUM_SHARDS == 1 else init_method
    arguments = (
        f"{func.__module__}:{func.__qualname__}",
        cpu_ranks > 1,
        (cfg.NUM_GPUS, method, cfg.SHARD_ID, cfg.NUM_SHARDS, cfg.DIST_BACKEND),
        cfg,
    )
    try:
        torch.multiprocessing.spawn(run_rank, nprocs=cfg.NUM_GPUS, args=arguments, daemon=daemon)
    except ProcessRaisedException as error:
        sentence = told(str(error))
        if sentence is None:
            raise
        raise UserError(sentence) from None


def run_rank(local_rank: int, name: str, on_cpu: bool, place: tuple[int, str, int, int, str], cfg: Any) -> None:
    """What each process does.

    Args:
        local_rank: Its number on this machine.
        name: ``module:function`` to be run.
        on_cpu: It is one of RUNNER.CPU_RANKS.
        place: Processes of a machine, where they meet, this machine's number, machines, back end.
        cfg: The configuration.
    """
    from distinit_plugin.hosts.slowfast.boot import boot

    boot()
    if on_cpu:
        pretend()
    from slowfast.utils import multiprocessing

    fit_train_net()
    module, _, function = name.partition(":")
    num_processes, *others = place
    multiprocessing.run(local_rank, num_processes, getattr(importlib.import_module(module), function), *others, cfg)


def can_test(cfg: Any) -> bool:
    """Whether there is something to test: always with PySlowFast's own corpora and loss."""
    own = own_cfg(cfg)
    return cfg.TEST.DATASET != DATASET or can_classify(own, "test")


def free_port() -> str:
    """An address on this machine where nothing listens."""
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return f"tcp://localhost:{found.getsockname()[1]}"


def told(text: str) -> str | None:
    """The sentence of an error meant for people, from the traceback of a process; ``None``: there is none."""
    marks = [f"distinit_plugin.errors.{kind}: " for kind in ("UserError", "ConfigError", "WeightsError")]
    for mark in marks:
        if mark in text:
            return text.rpartition(mark)[2].strip()
    return None
