"""One process per GPU, or several on a CPU: started by torch's own launcher, where torchrun has not done it."""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from distinit_plugin.config.node import CfgNode
from distinit_plugin.engine import distributed
from distinit_plugin.errors import UserError
from distinit_plugin.jobs.session import choose_device
from distinit_plugin.models.hardware import num_cores
from distinit_plugin.refusals import explain_refusal

RUN_ID = "distinit"
"""The shards of a job find each other by address; this name must only be the same for all of them."""

SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT", "SIGUSR1")
"""Handed on to the ranks, which may save their state before they end (``SHUTDOWN_SECONDS``)."""

SHUTDOWN_SECONDS = 90
"""Seconds that ranks have to end after a signal, before they are killed."""

RETRY_SECONDS = 0.5
"""Between two attempts to reach shard 0."""

_LOUD = ("torch.distributed.elastic", "torch.distributed.launcher", "torch.multiprocessing")
"""Loggers of the launcher (and those below them), which report a failed rank with tracebacks of their own."""

Job = Callable[[CfgNode], Any]


def starts_ranks(cfg: CfgNode) -> bool:
    """Whether this process must start the job's ranks on this machine, instead of being one itself."""
    return (_num_local_ranks(cfg) > 1 or cfg.NUM_SHARDS > 1) and not distributed.started_by_torchrun()


def launch(cfg: CfgNode, job: Job) -> Any:
    """Run ``job(cfg)`` on every rank of this machine and wait for all.

    Args:
        cfg: A configuration for which ``starts_ranks`` is true.
        job: A function at the top level of a module; it finds torchrun's variables in its environment.

    Returns:
        What it returned on the first rank of this machine.

    Raises:
        UserError: A rank failed (its own message), was killed (which one and how), or the shards did not meet.
    """
    _check(cfg)
    with tempfile.TemporaryDirectory(prefix="distinit_ranks_") as folder, _quiet(), _same_signal_handlers():
        run = elastic_launch(_launch_config(cfg, folder), _run_rank)
        try:
            results = run(job, cfg, folder, os.getpid())
        except ChildFailedError as error:
            raise _explain_failure(*error.get_first_failure(), Path(folder)) from None
        except SignalException as error:
            if error.sigval == signal.SIGINT:
                raise KeyboardInterrupt from None
            raise SystemExit(128 + error.sigval) from None  # as a shell reports a process that a signal ended
        except (dist.DistError, TimeoutError) as error:
            raise _explain_meeting(cfg, error) from error
    return results[min(results)]


def _num_local_ranks(cfg: CfgNode) -> int:
    return int(cfg.NUM_GPUS or cfg.RUNNER.CPU_RANKS)


def _check(cfg: CfgNode) -> None:
    choose_device(cfg)  # the GPUs are there
    if cfg.NUM_SHARDS > 1 and not cfg.RUNNER.INIT_METHOD:
        raise UserError(
            f"NUM_SHARDS is {cfg.NUM_SHARDS}, but where they meet is not said: give all of them --init_method "
            "tcp://ADDRESS:PORT (RUNNER.INIT_METHOD), the address of shard 0 and a free port on it."
        )
    if cfg.SHARD_ID > 0:
        _wait_for_shard_0(cfg)


def _wait_for_shard_0(cfg: CfgNode) -> None:
    """Until something answers at its address: torch's own wait fills the screen with stack frames when nothing does."""
    host, _, port = cfg.RUNNER.INIT_METHOD.removeprefix("tcp://").rpartition(":")
    end = time.monotonic() + cfg.RUNNER.JOIN_TIMEOUT
    while True:
        try:
            left = max(end - time.monotonic(), 0.1)
            socket.create_connection((host.strip("[]"), int(port)), timeout=left).close()
            return
        except OSError as error:
            if time.monotonic() + RETRY_SECONDS > end:
                raise _explain_meeting(cfg, error) from error
            time.sleep(RETRY_SECONDS)


def _launch_config(cfg: CfgNode, folder: str) -> LaunchConfig:
    """Shards meet at INIT_METHOD; a shard that is alone meets nobody, on a port that the system picks."""
    meeting: dict[str, Any] = {"rdzv_backend": "c10d", "rdzv_endpoint": "127.0.0.1:0", "local_addr": "127.0.0.1"}
    if cfg.RUNNER.INIT_METHOD:
        meeting = {
            "rdzv_backend": "static",
            "rdzv_endpoint": cfg.RUNNER.INIT_METHOD.removeprefix("tcp://"),
            "rdzv_configs": {"rank": cfg.SHARD_ID, "timeout": int(cfg.RUNNER.JOIN_TIMEOUT)},
        }
    return LaunchConfig(
        min_nodes=cfg.NUM_SHARDS,
        max_nodes=cfg.NUM_SHARDS,
        nproc_per_node=_num_local_ranks(cfg),
        run_id=RUN_ID,
        max_restarts=0,
        start_method="spawn",
        logs_specs=DefaultLogsSpecs(log_dir=folder),
        signals_to_handle=",".join(SIGNALS),
        shutdown_timeout=SHUTDOWN_SECONDS,
        **meeting,
    )


def _run_rank(job: Job, cfg: CfgNode, folder: str, launcher: int) -> Any:
    """What each process does; only the first on this machine returns something."""
    if os.getppid() != launcher:  # it was killed meanwhile; from here on torch ends this process with it
        raise SystemExit(1)
    if not cfg.RUNNER.NUM_THREADS and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, num_cores() // _num_local_ranks(cfg)))
    try:
        result = job(cfg)
    except Exception as error:
        sentence = str(error) if isinstance(error, UserError) else explain_refusal(error)
        report = {"text": sentence or traceback.format_exc(), "expected": sentence is not None}
        _failure_file(Path(folder), int(os.environ["RANK"])).write_text(json.dumps(report), encoding="utf-8")
        raise
    return result if os.environ["LOCAL_RANK"] == "0" else None


def _failure_file(folder: Path, rank: int) -> Path:
    return folder / f"failed_{rank}.json"


def _explain_failure(rank: int, failure: ProcessFailure, folder: Path) -> Exception:
    """The sentence of the rank that failed first; a ``RuntimeError`` with its traceback for a defect of ours."""
    path = _failure_file(folder, rank)
    if path.is_file():
        report = json.loads(path.read_text(encoding="utf-8"))
        if report["expected"]:
            return UserError(report["text"])
        return RuntimeError(f"rank {rank}: {report['text'].strip().splitlines()[-1]}\n\n{report['text']}")
    if failure.exitcode < 0:
        name = signal.Signals(-failure.exitcode).name
        hint = " (the system kills processes that way when memory runs out)" if name == "SIGKILL" else ""
        return UserError(f"rank {rank} (process {failure.pid}) was killed by {name}{hint}; the other ranks were ended.")
    return UserError(f"rank {rank} (process {failure.pid}) ended with exit status {failure.exitcode}.")


def _explain_meeting(cfg: CfgNode, error: Exception) -> UserError:
    where, reason = cfg.RUNNER.INIT_METHOD or "a free port of this machine", str(error).splitlines()[0]
    if "EADDRINUSE" in str(error) or "already in use" in str(error):
        return UserError(
            f"RUNNER.INIT_METHOD: the port of {where} is taken on this machine: choose another one, the same on all "
            "shards (a job of one shard needs none)."
        )
    if cfg.SHARD_ID == 0:
        return UserError(
            f"RUNNER.INIT_METHOD: at {where} shard 0 waited {cfg.RUNNER.JOIN_TIMEOUT:g} s (RUNNER.JOIN_TIMEOUT) for "
            f"the other {cfg.NUM_SHARDS - 1} in vain ({reason}): start the same command with --shard_id 1 … on "
            "the other machines, and see that they can reach that address."
        )
    return UserError(
        f"RUNNER.INIT_METHOD: shard {cfg.SHARD_ID} could not meet shard 0 at {where} within "
        f"{cfg.RUNNER.JOIN_TIMEOUT:g} s (RUNNER.JOIN_TIMEOUT; {reason}): see that shard 0 is started, that this is its "
        "address, and that no firewall is between."
    )


@contextmanager
def _quiet() -> Iterator[None]:
    names = {*_LOUD, *(name for name in logging.root.manager.loggerDict if name.startswith(_LOUD))}
    loggers = [logging.getLogger(name) for name in names]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)


@contextmanager
def _same_signal_handlers() -> Iterator[None]:
    """The launcher takes over signals for good; a program that called ``run`` wants its own back."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {name: signal.getsignal(getattr(signal, name)) for name in SIGNALS}
    try:
        yield
    finally:
        for name, handler in before.items():
            signal.signal(getattr(signal, name), handler)
