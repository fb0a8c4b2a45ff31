"""`distinit extract-flow` in worker processes against one thread of OpenCV's DualTVL1 in a bare loop.

    python benchmarks/flow_extraction.py --video FILE [--size 112] [--workers 2] [--backends dual_tvl1 tvl1]

The bare loop computes the flow of frames that are decoded and resized already, in a process of its own, and writes
nothing; the tool reads copies of the same video, one for each worker, and encodes. Every round times the loop before
and after each call of the tool; the tool's time is the whole call, start of its workers and end included. Ours is good
when it makes 0.9 × workers × the frames a second of the loop.
"""

from __future__ import annotations

import argparse
import io
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import cv2
from common import environment, spread, table, verdict
from rich.console import Console

from distinit_plugin.flow.compute import SizeRule, resize_frame
from distinit_plugin.jobs.flow_extraction import extract_flow, make_settings
from distinit_plugin.video.corpus import load_corpus
from distinit_plugin.video.decode import open_video

ENOUGH = 0.9
GOLDEN = (5**0.5 - 1) / 2
"""Steps of this part of a length spread evenly over it."""


def bare_loop(video: Path, size: int, seconds: float) -> float:
    """Pairs a second of one thread of OpenCV, on pairs from all over a video (some take longer than others)."""
    cv2.setNumThreads(1)
    with open_video(str(video)) as reader:
        height, width = SizeRule(short=size).of(reader.index.height, reader.index.width)
        frames = reader.read(range(reader.index.num_frames))
    gray = [
        cv2.cvtColor(resize_frame(frame, height, width).permute(1, 2, 0).numpy(), cv2.COLOR_RGB2GRAY)
        for frame in frames
    ]
    computer = cv2.optflow.DualTVL1OpticalFlow_create()
    computer.calc(gray[0], gray[1], None)
    begin, done = time.perf_counter(), 0
    while time.perf_counter() - begin < seconds:
        place = int(done * GOLDEN * (len(gray) - 1)) % (len(gray) - 1)
        cv2.optflow.DualTVL1OpticalFlow_create().calc(gray[place], gray[place + 1], None)
        done += 1
    return done / (time.perf_counter() - begin)


def loop_elsewhere(arguments: argparse.Namespace) -> float:
    """``bare_loop`` in a process that does nothing else."""
    words = [sys.executable, __file__, "--loop", "--video", arguments.video, "--size", arguments.size]
    words += ["--seconds", arguments.seconds]
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, check=True)
    return float(done.stdout)


def extraction(folder: Path, arguments: argparse.Namespace, backend: str) -> float:
    """Frames a second of one whole call of the tool."""
    output = folder / "flow"
    shutil.rmtree(output, ignore_errors=True)
    settings = make_settings(backend, {}, size=str(arguments.size))
    corpus = load_corpus("folder", "copies", path=str(folder / "videos"))
    begin = time.perf_counter()
    result = extract_flow(
        corpus,
        output,
        settings,
        backend=backend,
        num_workers=arguments.workers,
        console=Console(file=io.StringIO()),
    )
    seconds = time.perf_counter() - begin
    assert not result.bad, result.bad
    return sum(outcome.frames for outcome in result.done) / seconds


def main(words: Sequence[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--video", type=Path, required=True)
    parser.add_argument("--size", type=int, default=112, help="short side, pixels")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--copies", type=int, default=0, help="videos; by default one for each worker")
    parser.add_argument("--backends", nargs="+", default=["dual_tvl1", "tvl1"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=15.0, help="of a bare loop")
    parser.add_argument("--loop", action="store_true", help=argparse.SUPPRESS)
    chosen = parser.parse_args(words)
    if chosen.loop:
        print(bare_loop(chosen.video, chosen.size, chosen.seconds))
        return 0
    print(environment(opencv=cv2.__version__), flush=True)
    rates: dict[str, list[float]] = {name: [] for name in ["loop", *chosen.backends]}
    quotients: dict[str, list[float]] = {name: [] for name in chosen.backends}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (folder / "videos").mkdir()
        for number in range(chosen.copies or chosen.workers):
            shutil.copy(chosen.video, folder / "videos" / f"{number}{chosen.video.suffix}")
        for _ in range(chosen.rounds):
            before = loop_elsewhere(chosen)
            rates["loop"].append(before)
            for backend in chosen.backends:
                rates[backend].append(extraction(folder, chosen, backend))
                after = loop_elsewhere(chosen)
                rates["loop"].append(after)
                print(f"{backend}: {rates[backend][-1]:.2f} frames/s; loop {before:.2f}, {after:.2f}", file=sys.stderr)
                quotients[backend].append(rates[backend][-1] / (chosen.workers * (before + after) / 2))
                before = after
    rows = [["one thread of OpenCV, bare", spread(rates["loop"]).text(), ""]]
    for backend in chosen.backends:
        found = spread(quotients[backend])
        judged = f"{found.text()} {verdict(found.median, at_least=ENOUGH)}"
        rows.append([f"extract-flow, {chosen.workers} workers, {backend}", spread(rates[backend]).text(), judged])
    print()
    print(table([f"short side {chosen.size}", "frames / s (quartiles)", "÷ (workers × bare loop)"], rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
