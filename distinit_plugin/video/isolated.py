"""Run a function on many items in processes that may crash or hang: the item is named, the others go on.

``concurrent.futures`` breaks the whole pool when one process dies and does not say for which item, so here each
process has its own pipe and one item at a time.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection, wait
from typing import Any, Generic, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

_POLL_SECONDS = 1.0
_ORPHAN_SECONDS = 5.0
_PARENT_DEATH_SIGNAL = 1
"""PR_SET_PDEATHSIG of Linux's ``prctl``."""
_OMP_PAUSE_HARD = 2


def end_with_parent(parent: int) -> None:
    """From now on this process is killed when its parent is gone, however that ended (Linux)."""
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(_PARENT_DEATH_SIGNAL, signal.SIGKILL)
    if os.getppid() != parent:  # it died before that
        os._exit(1)


@dataclass(frozen=True)
class Crash:
    """The process that worked on an item came to an end without a result.

    Attributes:
        reason: One clause.
    """

    reason: str


@dataclass
class _Worker(Generic[Item]):
    process: multiprocessing.process.BaseProcess
    pipe: Connection
    item: Item | None = None
    begun: float = 0.0


def run_isolated(
    function: Callable[[Item], Result],
    items: Iterable[Item],
    *,
    num_workers: int,
    max_seconds: float,
    on_wait: Callable[[], None] = lambda: None,
    what: str = "the decoder",
    patience: float | None = None,
) -> Generator[tuple[Item, Result | Crash], None, None]:
    """Yield (item, result) as results come, in any order.

    Args:
        function: What to do; importable, its argument and result can be pickled.
        items: What to do it to (none may be ``None``).
        num_workers: Processes; 0: in this process, without protection.
        max_seconds: A process that takes longer for one item is ended.
        on_wait: Called about once a second while results are awaited.
        what: The subject of a crash's reason.
        patience: Seconds that processes have to end by SIGTERM when the caller ends early; they may then have processes
            of their own. ``None``: they are killed, and may not.
    """
    if num_workers <= 0:
        for item in items:
            yield item, function(item)
        return
    gc.collect()  # no open video may be inherited by a fork
    todo = iter(items)
    workers: list[_Worker[Item]] = []
    try:
        for _ in range(num_workers):
            worker = _start(function, daemon=patience is None)
            workers.append(worker)
            _give(worker, todo)
        while any(worker.item is not None for worker in workers):
            yield from _collect(workers, partial(_start, function, daemon=patience is None), todo, max_seconds, what)
            on_wait()
    finally:
        if patience is not None:
            _end_gently(workers, patience)
        for worker in workers:
            _end(worker)


def _collect(
    workers: list[_Worker[Item]],
    start: Callable[[], _Worker[Item]],
    todo: Iterator[Item],
    max_seconds: float,
    what: str,
) -> Iterator[tuple[Item, Any]]:
    """Wait a little; yield what has come, and replace processes that died or hang."""
    busy = {worker.pipe: place for place, worker in enumerate(workers) if worker.item is not None}
    ready = wait(list(busy), timeout=_POLL_SECONDS)
    for pipe, place in busy.items():
        worker = workers[place]
        item = worker.item
        assert item is not None
        answer: Any = None
        if pipe in ready:
            try:
                answer = pipe.recv()
            except (EOFError, OSError):
                worker.process.join()
                answer = Crash(f"{what} {_name_exit(worker.process.exitcode)}")
        elif time.monotonic() - worker.begun > max_seconds:
            answer = Crash(f"{what} hangs (no end after {max_seconds:g} s)")
        if answer is None:
            continue
        if isinstance(answer, Crash):
            _end(worker)
            worker = workers[place] = start()
        _give(worker, todo)
        yield item, answer


@contextlib.contextmanager
def _no_threads_of_opencv() -> Iterator[None]:
    """A process that was forked beside threads of OpenCV hangs when it first asks for their number: end them before."""
    cv2 = sys.modules.get("cv2")
    if cv2 is None:
        yield
        return
    count = cv2.getNumThreads()
    cv2.setNumThreads(1)
    try:
        yield
    finally:
        cv2.setNumThreads(count)


def _end_threads_of_openmp() -> None:
    """A process that was forked beside threads of GNU OpenMP waits for them when it computes with several: end them.

    They come back when they are asked for. Where there is no such call, the library starts afresh in each process.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).omp_pause_resource_all(_OMP_PAUSE_HARD)


def _start(function: Callable[[Item], Any], *, daemon: bool) -> _Worker[Item]:
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    here, there = context.Pipe()
    process = context.Process(target=_serve, args=(function, there, os.getpid()), daemon=daemon)  # type: ignore[attr-defined]
    _end_threads_of_openmp()
    with _no_threads_of_opencv():
        process.start()
    there.close()  # so that the death of the process ends the pipe
    return _Worker(process, here)


def _serve(function: Callable[[Any], Any], pipe: Connection, parent: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with_parent(parent)
    if "torch" in sys.modules:  # as many processes as there are cores: one thread each, unless the function wants more
        sys.modules["torch"].set_num_threads(1)
    while True:
        try:
            # Sisters hold copies of the parent's end, so that a killed parent does not end the pipe.
            while not pipe.poll(_ORPHAN_SECONDS):
                if os.getppid() != parent:
                    return
            item = pipe.recv()
        except (EOFError, OSError):
            return
        if item is None:
            return
        pipe.send(function(item))


def _give(worker: _Worker[Item], todo: Iterator[Item]) -> None:
    """Hand over the next item, or send the process home."""
    worker.item = next(todo, None)
    worker.begun = time.monotonic()
    try:
        worker.pipe.send(worker.item)
    except OSError:
        # It died between two items: the pipe ends, and waiting for it reports that.
        return


def _end_gently(workers: list[_Worker[Any]], patience: float) -> None:
    """Ask those that work to end, and wait for them."""
    busy = [worker for worker in workers if worker.item is not None]
    for worker in busy:
        worker.process.terminate()
    end = time.monotonic() + patience
    for worker in busy:
        worker.process.join(max(end - time.monotonic(), 0.0))


def _end(worker: _Worker[Any]) -> None:
    worker.pipe.close()
    if worker.item is not None:
        worker.process.kill()
    worker.process.join()


def _name_exit(code: int | None) -> str:
    if code is not None and code < 0:
        try:
            return f"crashed ({signal.Signals(-code).name})"
        except ValueError:
            return f"crashed (signal {-code})"
    return f"ended its process (exit code {code})"
