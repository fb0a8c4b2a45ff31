"""Ranks of one job, with helpers that are also right on one process.

Processes are started by torchrun, by ``jobs/launching.py``, or by anything else that sets torchrun's environment
variables; nothing here launches any.
"""

from __future__ import annotations

import itertools
import os
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from distinit_plugin.errors import UserError

DEFAULT_TIMEOUT = 1800.0
"""Seconds that a rank waits for the others."""

_times_joined = itertools.count()

_on_gpus = False

_TORCHRUN_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def started_by_torchrun() -> bool:
    """Whether the environment names a rank in a job of several processes."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def start(device_type: str, timeout: float = DEFAULT_TIMEOUT) -> bool:
    """Join the job that the environment describes; does nothing outside of one.

    Args:
        device_type: ``cuda`` joins with nccl (and gloo for tensors on the CPU) and takes the GPU of the local rank;
            anything else joins with gloo.
        timeout: Seconds that a rank waits for the others, to join and in each collective.

    Returns:
        True when a process group was started here, and ``stop`` should be called at the end.

    Raises:
        UserError: The environment names a rank but lacks other variables of torchrun, or the others do not answer.
    """
    if not started_by_torchrun() or dist.is_initialized():
        return False
    missing = [name for name in _TORCHRUN_VARIABLES if name not in os.environ]
    if missing:
        raise UserError(
            f"RANK and WORLD_SIZE are set in the environment but {', '.join(missing)} is not: start several "
            "processes with torchrun, or unset RANK and WORLD_SIZE."
        )
    global _on_gpus
    _on_gpus = device_type == "cuda"
    if _on_gpus:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    backend = "cpu:gloo,cuda:nccl" if _on_gpus else "gloo"
    wait = timedelta(seconds=timeout)
    try:
        store, number, size = next(dist.rendezvous("env://", timeout=wait))
        # A process that joins a second time, and ranks that torchrun starts again (it keeps its store), must not read
        # the addresses of those before.
        store = dist.PrefixStore(f"distinit/attempt_{_attempt()}/{next(_times_joined)}", store)
        dist.init_process_group(backend, store=store, rank=number, world_size=size, timeout=wait)
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"rank {os.environ['RANK']} of {os.environ['WORLD_SIZE']} could not join the job at "
            f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']} ({str(error).splitlines()[0]}): see that all "
            f"ranks are started and can reach that address.{_old_addresses()}"
        ) from error
    return True


def _old_addresses() -> str:
    """Advice for ranks that torchrun has started again on several machines: they may meet those that are gone."""
    several = int(os.environ.get("GROUP_WORLD_SIZE", "1")) > 1
    shared = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if not (several and shared and int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0):
        return ""
    return (
        " torchrun has started them again, and its store may still have the addresses of those before: set "
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in the environment of every torchrun (tools/slurm_run.sh does) and start "
        "the job again; it goes on from its last state."
    )


def _attempt() -> str:
    """How often torchrun has started the ranks again. Each machine counts for itself, so this is for one machine."""
    alone = os.environ.get("GROUP_WORLD_SIZE", "1") == "1"
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if alone else "0"


def stop(*, failed: bool = False) -> None:
    """Leave the job; does nothing outside of one.

    Args:
        failed: An error or a signal ends this rank. NCCL's group is then left to the end of the process, which aborts
            it: leaving it in order waits for the others, who may be in a collective and wait for this one.
    """
    if _active() and not (failed and _on_gpus):
        dist.destroy_process_group()


def _active() -> bool:
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """Number of this process, 0 … ``world_size()`` − 1."""
    return dist.get_rank() if _active() else 0


def world_size() -> int:
    """Processes of the job."""
    return dist.get_world_size() if _active() else 1


def local_world_size() -> int:
    """Processes of the job on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if _active() else 1


def is_main() -> bool:
    """Whether this process writes logs and files."""
    return rank() == 0


def barrier() -> None:
    """Wait until every process is here."""
    if _active():
        dist.barrier()


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """The sum of ``tensor`` (any shape, on the rank's device) over all ranks, in a new tensor.

    On one process the tensor itself comes back.
    """
    if not _active():
        return tensor
    total = tensor.detach().clone().contiguous()
    dist.all_reduce(total, op=dist.ReduceOp.SUM)
    return total


def share_buffers(module: nn.Module) -> None:
    """Give every rank the main rank's buffers (BN statistics), which are those that a checkpoint holds."""
    if not _active():
        return
    for buffer in module.buffers():
        dist.broadcast(buffer, src=0)


def gather_objects(value: Any) -> list[Any]:
    """``value`` of every rank, in the order of ranks (a list of one on one process). Values are pickled."""
    if not _active():
        return [value]
    gathered: list[Any] = [None] * world_size()
    dist.all_gather_object(gathered, value)
    return gathered
