"""What the tests of flow share: a back end whose flow is known, and small corpora."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from videos import write_video

from distinit_plugin.flow.store import FlowSettings
from distinit_plugin.registry import FLOW_BACKENDS

ROOT = Path(__file__).resolve().parents[1]


class Difference:
    """u: a tenth of what red gains, v: of what green gains; up to ±25.5 px."""

    identity = "test_difference 1"

    def __call__(self, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        return (second[:, :2].float() - first[:, :2].float()) / 10


@FLOW_BACKENDS.register()
def test_difference(device: str) -> Difference:
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


def run_extraction(corpus: Path, output: Path, *words: str, wait: bool = True, limit: int = 0) -> subprocess.Popen[str]:
    """``extract-flow`` with the test's back end in a process of its own; ``limit``: largest file, bytes."""
    program = (
        "import sys, resource\n"
        f"sys.path.insert(0, {str(ROOT / 'tests')!r})\n"
        "import flows\n"
        "from distinit_plugin.cli import main\n"
        f"limit = {limit}\n"
        "if limit: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    line = ["extract-flow", str(corpus), str(output), "--backend", "test_difference", "--size", "32", "--workers", "2"]
    process = subprocess.Popen(
        [sys.executable, "-c", program, *line, *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    if wait:
        process.told, process.said = process.communicate(timeout=120)  # type: ignore[attr-defined]
    return process


def contents(folder: Path) -> dict[str, bytes]:
    """All files below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def some_flows(count: int = 10, height: int = 17, width: int = 23, seed: int = 0) -> np.ndarray:
    """(count,H,W,2) uint8, noise: what an encoder finds hardest."""
    return np.random.default_rng(seed).integers(0, 256, (count, height, width, 2), dtype=np.uint8)
