"""What the tests of flow share: a back end whose flow is known, and small corpora."""

import multiprocessing
import os
import resource
import sys
from pathlib import Path

import numpy as np
import torch
from videos import write_video

from distinit_plugin.cli import main
from distinit_plugin.flow.backends import FlowBackend
from distinit_plugin.flow.store import FlowSettings
from distinit_plugin.registry import FLOW_BACKENDS


class Difference(FlowBackend):
    """u: a tenth of what red gains, v: of what green gains; up to ±25.5 px."""

    name = "test_difference"
    min_side = 1
    identity = "test_difference 1"

    def _compute(self, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        return (second[:, :2].float() - first[:, :2].float()) / 10


@FLOW_BACKENDS.register()
def test_difference() -> Difference:
    return Difference()


test_difference.__test__ = False  # a back end, not a test


def settings(**values: object) -> FlowSettings:
    return FlowSettings(**{"backend": Difference.identity, "size": "32", **values})  # type: ignore[arg-type]


def write_flow_corpus(folder: Path) -> Path:
    """Four good videos in two folders, one of odd size, one of a single frame, and one that is broken."""
    for name in ("one", "two"):
        (folder / name).mkdir(parents=True)
    write_video(folder / "one" / "a.mp4", 12, 32, 40)
    write_video(folder / "one" / "b.avi", 9, 48, 32, codec="mpeg4")
    write_video(folder / "two" / "a.mp4", 7, 38, 50, options={"crf": "20"})
    write_video(folder / "two" / "single.mp4", 1, 32, 40)
    (folder / "two" / "broken.mp4").write_bytes(b"no video")
    return folder


class Extraction:
    """``extract-flow`` with the test's back end in a process of its own, forked: nothing is imported again.

    Attributes:
        said: Its standard error, once it has ended.
    """

    def __init__(self, corpus: Path, output: Path, log: Path, limit: int = 0) -> None:
        """Start it.

        Args:
            corpus: Videos.
            output: The store.
            log: File for what it says.
            limit: Largest file that it may write, bytes; 0: any.
        """
        line = [
            "extract-flow",
            str(corpus),
            str(output),
            "--backend",
            "test_difference",
            "--size",
            "32",
            "--workers",
            "2",
        ]

        def work() -> None:
            handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(handle, 1)
            os.dup2(handle, 2)
            sys.stdout = sys.stderr = os.fdopen(2, "w", closefd=False)
            if limit:
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            code = main(line)
            sys.stdout.flush()
            os._exit(code)

        self._log = log
        self.process = multiprocessing.get_context("fork").Process(target=work)
        self.process.start()

    def end(self) -> int:
        """Wait for it; its exit code."""
        self.process.join(60)
        self.said = self._log.read_text()
        assert self.process.exitcode is not None, "it hangs"
        return self.process.exitcode


def contents(folder: Path) -> dict[str, bytes]:
    """All files below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def some_flows(count: int = 10, height: int = 17, width: int = 23, seed: int = 0) -> np.ndarray:
    """(count,H,W,2) uint8, noise: what an encoder finds hardest."""
    return np.random.default_rng(seed).integers(0, 256, (count, height, width, 2), dtype=np.uint8)
