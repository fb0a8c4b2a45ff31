"""Processes that tests start, and that end with the test that started them.

``start`` runs a program in an interpreter of its own, which imports for some five seconds before it does anything.
Where that start is not what a test is about, ``forked_ranks``, ``run_forked`` and ``fork`` take processes that Python's
fork server forks: it has imported everything, computed nothing and started no thread, so that a fork of it is safe.
"""

import contextlib
import gc
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import forkserver, resource_tracker
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch.distributed.run as torchrun
from small_jobs import only_read_curves

from distinit_plugin import cli
from distinit_plugin.config.node import CfgNode
from distinit_plugin.jobs import launching, running

ROOT = Path(__file__).resolve().parents[1]
RUN_NET = str(ROOT / "tools" / "run_net.py")
PATIENCE = 200  # seconds for a process to end, on a busy machine
BOUND = 250  # seconds after which a forked process ends itself, whatever has become of the test
MARK = "DISTINIT_TEST_PROCESS"
SERVER = uuid.uuid4().hex
"""The mark of this process's fork server and of all that comes from it."""
PRELOADED = ("torch._dynamo", "distinit_plugin.cli", "distinit_plugin.jobs.running", "rank_jobs", "rank_processes")


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


# ------------------------------------------------------------------------------------------- interpreters of their own
def start(words: Sequence[object], **environment: str) -> subprocess.Popen[str]:
    """A program; all processes that come from it carry a mark in their environment."""
    mark = uuid.uuid4().hex
    process = subprocess.Popen(
        [str(word) for word in words],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment, MARK: mark},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    process.mark = mark  # type: ignore[attr-defined]
    return process


def ended(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    """Its status and what it printed; nothing of it is left, however this ends."""
    try:
        output, errors = process.communicate(timeout=PATIENCE)
    finally:
        process.kill()
        for pid in marked(process.mark):  # type: ignore[attr-defined]
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    return process.returncode, output, errors


def marked(mark: str) -> list[int]:
    """The processes that ``start`` gave this mark, and those that they started, in whatever group or session."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if f"{MARK}={mark}".encode() in (entry / "environ").read_bytes().split(b"\0"):
                found.append(int(entry.name))
    return found


# -------------------------------------------------------------------------------------------------- forked processes
@contextlib.contextmanager
def forked_ranks() -> Iterator[None]:
    """``launch`` forks its ranks meanwhile; they print where this process prints."""
    if sys.platform != "linux":  # the rest reads /proc
        yield
        return
    _ensure_server()
    with pytest.MonkeyPatch.context() as patch:
        config = launching.LaunchConfig
        patch.setattr(launching, "LaunchConfig", lambda **keys: config(**{**keys, "start_method": "forkserver"}))
        patch.setattr(launching, "_run_rank", _run_forked_rank)
        try:
            yield
        finally:
            _end_forked()


def _ensure_server() -> None:
    """Start this process's fork server, which lasts as long as this process; it takes no folders from ``sys.path``."""
    folders = [str(Path(__file__).parent), str(ROOT), os.environ.get("PYTHONPATH", "")]
    resource_tracker.ensure_running()  # not with the server's mark
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, folders)))
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv(MARK, SERVER)
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
            patch.delenv(name, raising=False)
        multiprocessing.set_forkserver_preload(list(PRELOADED))
        forkserver.ensure_running()


def _begin_forked() -> None:
    """What every forked process does first."""
    signal.alarm(BOUND)
    gc.freeze()  # of what it inherited: see conftest.py
    running.plot_curves = only_read_curves
    state = Path(f"/proc/{os.getppid()}/status").read_text()
    assert "\nThreads:\t1\n" in state, "the fork server has threads: its forks may hang"


def _begin_rank(launcher: int) -> None:
    """The same in a rank, which has other standard streams than its launcher, and tells its number by its name."""
    _begin_forked()
    Path("/proc/self/comm").write_text(f"rank {os.environ['RANK']}")
    for number in (1, 2):
        os.dup2(os.open(f"/proc/{launcher}/fd/{number}", os.O_WRONLY | os.O_APPEND), number)


def _run_forked_rank(job: Callable[[CfgNode], Any], cfg: CfgNode, folder: str, launcher: int) -> Any:
    """``launching._run_rank`` in a child of the fork server."""
    _begin_rank(launcher)
    return launching._run_rank(job, cfg, folder, os.getppid())


def run_forked(
    commands: Sequence[Sequence[object]], folder: Path, launcher: Sequence[str] = ()
) -> list[tuple[int, str, str]]:
    """Command lines that run together, each in a forked process: their status and what they printed."""
    started = []
    try:
        for number, words in enumerate(commands):
            streams = [folder / f"{name}_{number}.txt" for name in ("stdout", "stderr")]
            started.append((fork(words, streams, launcher), streams))
        for process, _ in started:
            process.join(PATIENCE)
    finally:
        _end_forked()
    answers = []
    for process, streams in started:
        process.join()
        assert process.exitcode is not None
        answers.append((process.exitcode, *(path.read_text() for path in streams)))
    return answers


def fork(words: Sequence[object], streams: Sequence[Path], launcher: Sequence[str] = ()) -> BaseProcess:
    """A command line in a forked process and session.

    Args:
        words: After ``distinit``.
        streams: Files behind which it writes its standard output and its errors.
        launcher: The words before a program that torchrun starts (``-m torch.distributed.run …``); its ranks are
            forked, too.
    """
    _ensure_server()
    process = multiprocessing.get_context("forkserver").Process(
        target=_run_command, args=([str(word) for word in words], list(streams), list(launcher))
    )
    process.start()
    return process


def _run_command(words: list[str], streams: list[Path], launcher: list[str]) -> None:
    _begin_forked()
    os.setsid()
    for number, path in enumerate(streams, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT), number)
    # A child of the server knows the server's address, but Python 3.11 would start another server for it.
    forkserver.ensure_running = forkserver._forkserver.ensure_running = lambda: None  # type: ignore[attr-defined]
    if launcher:
        _run_torchrun(launcher, words)
        return
    with forked_ranks():
        sys.exit(cli.main(words))


def _run_torchrun(launcher: list[str], words: list[str]) -> None:
    """torchrun itself, but that it forks what it would start."""
    assert launcher[:2] == ["-m", "torch.distributed.run"]
    launch = torchrun.elastic_launch

    def forking_launch(config: Any, entrypoint: object) -> Callable[..., Any]:
        config.start_method = "forkserver"
        return lambda *_: launch(config, _run_rank_of_torchrun)(words, os.getpid())

    torchrun.elastic_launch = forking_launch
    torchrun.main([*launcher[2:], RUN_NET])


def _run_rank_of_torchrun(words: list[str], launcher: int) -> None:
    _begin_rank(launcher)
    status = cli.main(words)
    if status:
        sys.exit(status)


def forked() -> dict[int, str]:
    """The processes that this process's fork server has forked, and those that they started: number → name."""
    server = forkserver._forkserver._forkserver_pid  # type: ignore[attr-defined]
    names = {}
    for pid in marked(SERVER):
        with contextlib.suppress(OSError):
            names[pid] = Path(f"/proc/{pid}/comm").read_text().strip()
    names.pop(server, None)
    return names


def _end_forked() -> None:
    """Kill what this process's fork server has forked and still runs."""
    if forkserver._forkserver._forkserver_pid is None:  # type: ignore[attr-defined]  # this is itself such a child
        return
    for pid in forked():
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
