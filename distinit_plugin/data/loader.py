"""Worker processes that decode, and the care that they need."""

from __future__ import annotations

import gc
import multiprocessing
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import TracebackType
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from distinit_plugin.data.collate import collate
from distinit_plugin.errors import UserError
from distinit_plugin.types import Sample, SampleKey
from distinit_plugin.video.isolated import end_with_parent

_LAST_SECONDS = 1.0
"""In which a worker whose parent is gone is killed."""


def start_worker(worker: int) -> None:
    """Prepare a worker process: one thread each (the workers are the parallelism), and it lives as its parent wishes.

    Ctrl-C and schedulers signal all processes of a job: the parent decides what follows.
    """
    torch.set_num_threads(1)
    for name in ("SIGINT", "SIGUSR1"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is not None and parent.pid is not None and sys.platform == "linux":
        _serve_only(parent.pid)


def _serve_only(parent: int) -> None:
    """End with the parent process, even when it is killed, and on SIGTERM only when the parent itself sends it."""
    end_with_parent(parent)
    sys.excepthook = _print_unless_orphaned
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # threads to come inherit this

    def wait() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
            pass
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()


def _print_unless_orphaned(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Print an error that nobody caught; of a lost connection only if this process lives on.

    A killed parent closes its sockets a moment before its workers are killed for it, and Python's own thread that hands
    over batches would tell of that.
    """
    if issubclass(kind, ConnectionError | EOFError):
        time.sleep(_LAST_SECONDS)
    sys.__excepthook__(kind, error, trace)


def explain_dead_worker(error: Exception) -> UserError | None:
    """The sentence for a worker process that died; ``None``: the error is another one.

    torch raises this wherever the main thread happens to be when it hears of the death, not only between batches; while
    a batch is handed over, its connection breaks.
    """
    text = str(error) or type(error).__name__
    told = "DataLoader worker" in text and ("is killed by signal" in text or "exited unexpectedly" in text)
    if not told and not isinstance(error, ConnectionError | EOFError):
        return None
    if re.search("Segmentation fault|Bus error|Aborted|Floating point exception", text):
        return UserError(
            f"A decoding process died ({text.splitlines()[0].rstrip('. ')}), mostly of a damaged file: distinit "
            "check-corpus says of which."
        )
    return UserError(
        f"A decoding process died ({text.splitlines()[0].rstrip('. ')}). Mostly it was ended for lack of memory: "
        "lower DATA_LOADER.NUM_WORKERS or TRAIN.BATCH_SIZE, or give the container more shared memory (/dev/shm)."
    )


def worker_context(num_workers: int) -> str | None:
    """How workers start: forked on Linux (the corpus is shared, not copied), spawned elsewhere; ``None`` without."""
    if not num_workers:
        return None
    return "fork" if sys.platform == "linux" else "spawn"


class ClipLoader(DataLoader[Any]):
    """A DataLoader whose workers cannot inherit open videos, and whose dead workers end in a sentence."""

    def __iter__(self) -> Any:
        """Start the workers (anew in each epoch) and yield batches.

        Raises:
            UserError: A worker process died (mostly killed for memory).
        """
        # A container that is only freed in a forked child waits for decoder threads that the child does not have.
        gc.collect()
        return self._guard(super().__iter__())

    @staticmethod
    def _guard(batches: Iterator[Any]) -> Iterator[Any]:
        while True:
            try:
                batch = next(batches)
            except StopIteration:
                return
            except UserError as error:
                # From a worker the text comes wrapped in a traceback; the user is owed the sentence alone.
                raise UserError(str(error).rpartition("errors.UserError: ")[2].strip()) from error
            except (RuntimeError, ConnectionError, EOFError) as error:
                raise explain_dead_worker(error) or error from error.__cause__
            yield batch
            del batch  # or two would be alive while the next is fetched


class _Function(Dataset[Any]):
    def __init__(self, function: Callable[[int], Any]) -> None:
        self._function = function

    def __getitem__(self, index: int) -> Any:
        return self._function(index)


def _as_it_is(item: Any) -> Any:
    return item


def read_items(function: Callable[[int], Any], indices: Sequence[int], *, num_workers: int = 0) -> Iterator[Any]:
    """``function(index)`` for each index, in their order, computed by worker processes like those of ``build_loader``.

    Raises:
        UserError: A worker process died.
    """
    return iter(
        ClipLoader(
            _Function(function),
            sampler=indices,
            batch_size=None,
            collate_fn=_as_it_is,
            num_workers=num_workers,
            worker_init_fn=start_worker,
            multiprocessing_context=worker_context(num_workers),
            generator=torch.Generator(),
        )
    )


def build_batch_loader(
    dataset: Dataset[Sample],
    batches: Iterable[list[SampleKey]],
    *,
    num_workers: int = 0,
    pin_memory: bool = False,
) -> ClipLoader:
    """As ``build_loader``, where the caller says which keys are in each batch."""
    return ClipLoader(
        dataset,
        batch_sampler=batches,
        num_workers=num_workers,
        collate_fn=collate,
        pin_memory=pin_memory and torch.cuda.is_available(),
        worker_init_fn=start_worker,
        multiprocessing_context=worker_context(num_workers),
        generator=torch.Generator(),
    )


def build_loader(
    dataset: Dataset[Sample],
    sampler: Sampler[SampleKey],
    batch_size: int,
    *,
    num_workers: int = 0,
    pin_memory: bool = False,
    drop_last: bool = False,
) -> ClipLoader:
    """Batches of a dataset in the order of a sampler.

    Workers live for one iteration, so that a sampler's new epoch reaches them. The global random state is neither read
    nor moved. On Linux workers are forked: the corpus is shared with them, not copied.

    Args:
        dataset: Indexed by SampleKey.
        sampler: Keys of this rank.
        batch_size: Clips of one batch (a micro-batch of this rank).
        num_workers: Decoding processes; 0: decode in this process.
        pin_memory: Page-lock batches; only done where there is a GPU.
        drop_last: Leave out an incomplete last batch.

    Returns:
        An iterable of ``Batch``.
    """
    return ClipLoader(
        dataset,
        batch_size=batch_size,
        sampler=sampler,
        num_workers=num_workers,
        collate_fn=collate,
        pin_memory=pin_memory and torch.cuda.is_available(),
        drop_last=drop_last,
        worker_init_fn=start_worker,
        multiprocessing_context=worker_context(num_workers),
        generator=torch.Generator(),
        persistent_workers=False,
    )
