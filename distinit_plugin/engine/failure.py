"""How the ranks of a job end together: when one fails the others stop too, and only the first one says why."""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch.distributed as dist

from distinit_plugin.engine import distributed
from distinit_plugin.errors import UserError

GRACE = 5.0
"""Seconds that a rank which lost another one waits to be ended by its launcher, which knows what really happened."""

STORE_TIMEOUT = timedelta(seconds=5)

_LOST = re.compile(r"gloo|NCCL|Connection (closed|reset)|Broken pipe|Timed out|Socket Timeout", re.IGNORECASE)


class LostRankError(UserError):
    """Another rank of the job went away, or did not answer in time."""


@contextmanager
def ending_together(timeout: float) -> Iterator[None]:
    """Around the work of one rank: its error becomes the job's, or makes way for the one that came first.

    Args:
        timeout: Seconds that the ranks wait for one another, for the message.

    Raises:
        LostRankError: A collective failed because of another rank.
    """
    try:
        yield
    except Exception as error:
        if distributed.world_size() == 1:
            raise
        if _lost_another(error):
            _wait_to_be_ended()
            raise LostRankError(_explain(error, timeout)) from error
        speaks()  # before this rank leaves and the others notice
        raise


_speaks: bool | None = None


def speaks() -> bool:
    """Whether this process should print why it failed: on one of the ranks that torchrun starts, the first to ask.

    The ranks ask the store through which torchrun brought them together; without it every rank speaks.
    """
    global _speaks
    if _speaks is None:
        _speaks = not distributed.started_by_torchrun() or _is_first()
    return _speaks


def _is_first() -> bool:
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return True
    try:
        address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = dist.TCPStore(*address, is_master=False, timeout=STORE_TIMEOUT, wait_for_workers=False)
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        return store.add(f"distinit/failed/{os.environ.get('TORCHELASTIC_RUN_ID')}/{attempt}", 1) == 1
    except (KeyError, ValueError, RuntimeError):
        return True


def _lost_another(error: Exception) -> bool:
    return isinstance(error, RuntimeError) and (
        isinstance(error, dist.DistError) or _LOST.search(str(error)) is not None
    )


def _explain(error: Exception, timeout: float) -> str:
    reason = str(error).strip().splitlines()[0]
    here = f"rank {distributed.rank()}"
    if re.search("timed out|timeout", reason, re.IGNORECASE):
        return (
            f"{here} waited {timeout:g} s for another rank in vain ({reason}): raise RUNNER.COLLECTIVE_TIMEOUT if a "
            "rank may take that long, or look at what the others were doing."
        )
    return (
        f"{here} lost another rank of the job ({reason}): what that rank printed, or its machine's log "
        "(out of memory?), says why."
    )


def _wait_to_be_ended() -> None:
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    time.sleep(GRACE)
