"""The harness of ``benchmarks/kill_and_resume.py``, with processes that are forked instead of started anew."""

import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from multiprocessing.process import BaseProcess

from rank_processes import ROOT, fork, forked


def _harness():
    spec = importlib.util.spec_from_file_location("kill_and_resume", ROOT / "benchmarks" / "kill_and_resume.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


kills = _harness()


class Forked:
    """A forked process with the methods of ``subprocess.Popen``."""

    def __init__(self, process: BaseProcess) -> None:
        self._process = process
        self.pid = process.pid

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float) -> int:
        self._process.join(timeout)
        status = self._process.exitcode
        if status is None:
            raise subprocess.TimeoutExpired("a forked process", timeout)
        return status


class ForkedJob(kills.Job):
    """A job of the harness; there is one at a time."""

    def start(self) -> None:
        self._seen = self.lines()
        printed = self.config.with_suffix(".printed")
        self.process = Forked(fork(["run", "--cfg", self.config], [printed, printed], self.launcher))

    def processes(self) -> Iterator[tuple[int, list[str], dict[str, str]]]:
        """As the harness reads them of processes with a command line of their own."""
        for pid, name in forked().items():
            yield pid, ["run_net.py"], {"RANK": name.removeprefix("rank ")}
