"""Time and memory of ``tools/eval_ava.py`` on a set of the size of AVA's validation set, beside the official code.

    AVA_OFFICIAL=…/ActivityNet/Evaluation python benchmarks/frame_map.py [--videos 64] [--rows 2000000] [--rounds 3]

The set: 897 keyframes for each of the videos, one to three persons in each, about 3.7 rows of ground truth; detections
are at persons (moved a little) or anywhere, of the persons' actions or any, with distinct scores, sorted by keyframe.
Every round is a fresh process on one core, from its start to its end: reading both files, evaluating, printing.
``AVA_OFFICIAL`` is the folder of ``get_ava_performance.py`` in a clone of https://github.com/activitynet/ActivityNet
(minutes a round; it is run with the names that NumPy has since dropped); without it, ours runs alone.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from common import Spread, environment, peak_memory, ratio, spread, table, verdict

from distinit_plugin.detection.files import write_rows
from distinit_plugin.detection.tables import BoxTable

TOOL = Path(__file__).resolve().parents[1] / "tools" / "eval_ava.py"
MAX_SECONDS, MAX_MEBIBYTES, MIN_RATIO = 10.0, 1536.0, 30.0
FIRST_SECOND, SECONDS, ACTIONS, COUNTED = 902, 897, 80, 60
_POLL_SECONDS = 0.02
_MAP, _AP = "PascalBoxes_Precision/mAP@0.5IOU", "PascalBoxes_PerformanceByCategory/AP@0.5IOU/"
_OFFICIAL = (
    "import numpy, os, runpy, sys; numpy.float = float; numpy.bool = bool; numpy.NAN = numpy.nan; "
    "folder = sys.argv.pop(1); sys.path[:0] = [folder, os.path.join(folder, 'ava')]; "
    "runpy.run_path(os.path.join(folder, 'get_ava_performance.py'), run_name='__main__')"
)


class Process(NamedTuple):
    """What a finished process printed and took."""

    text: str
    seconds: float
    cpu: float  # seconds of the core, which other jobs on the machine hardly change
    peak: float  # MiB


def write_set(folder: Path, videos: int, rows: int, seed: int = 0) -> list[str]:
    """Ground truth, detections and label map; their paths."""
    random = np.random.default_rng(seed)
    keyframes = videos * SECONDS
    persons = np.repeat(np.arange(keyframes), random.integers(1, 4, keyframes))
    corner = random.uniform(0, 0.6, (len(persons), 2))
    boxes = np.hstack([corner, corner + random.uniform(0.1, 0.4, corner.shape)]).round(3)
    owner = np.repeat(np.arange(len(persons)), random.integers(1, 4, len(persons)))
    actions = random.geometric(0.06, len(owner)).clip(max=ACTIONS)
    truth = _table(videos, persons[owner], boxes[owner], actions, np.zeros(0))

    row = random.integers(0, len(owner), rows)
    row = row[np.argsort(persons[owner[row]], kind="stable")]
    moved = boxes[owner[row]] + random.normal(0, 0.02, (rows, 4))
    corner = random.uniform(0, 0.6, (rows, 2))
    anywhere = np.hstack([corner, corner + random.uniform(0.1, 0.4, corner.shape)])
    moved = np.where(random.random((rows, 1)) < 0.8, moved, anywhere).round(4)
    seen = np.where(random.random(rows) < 0.4, actions[row], random.integers(1, ACTIONS + 1, rows))
    scores = random.permutation(rows) / rows
    detections = _table(videos, persons[owner[row]], moved, seen, scores.round(12))
    write_rows(folder / "truth.csv", truth)
    write_rows(folder / "detections.csv", detections)
    counted = np.sort(random.permutation(ACTIONS)[:COUNTED]) + 1
    items = "".join(f'item {{\n  name: "action {number}"\n  id: {number}\n}}\n' for number in counted)
    (folder / "labels.pbtxt").write_text(items, encoding="utf-8")
    return [str(folder / name) for name in ("truth.csv", "detections.csv", "labels.pbtxt")]


def _table(videos: int, keyframe: np.ndarray, boxes: np.ndarray, actions: np.ndarray, scores: np.ndarray) -> BoxTable:
    return BoxTable(
        videos=tuple(f"video_{number:03d}" for number in range(videos)),
        video=(keyframe // SECONDS).astype(np.int32),
        seconds=(FIRST_SECOND + keyframe % SECONDS).astype(np.float64),
        boxes=boxes,
        actions=actions.astype(np.int32),
        scores=scores if len(scores) else np.ones(len(keyframe)),
        persons=None if len(scores) else np.zeros(len(keyframe), np.int64),
    )


def measured(command: Sequence[str]) -> Process:
    """A command in a process of its own, on one core."""
    single = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    peak = 0
    begin, before = time.perf_counter(), _children()
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.DEVNULL, env={**os.environ, **single})
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(process.pid, {min(os.sched_getaffinity(0))})
        while process.poll() is None:
            with contextlib.suppress(OSError, StopIteration):  # it has just ended
                peak = peak_memory(process.pid)
            time.sleep(_POLL_SECONDS)
        seconds, cpu = time.perf_counter() - begin, _children() - before
        output.seek(0)
        text = output.read()
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with exit code {process.returncode}")
    return Process(text, seconds, cpu, peak / 2**20)


def _children() -> float:
    """Seconds that finished children have computed."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def ours(paths: Sequence[str], output: Path) -> list[str]:
    """The command line of our tool."""
    truth, detections, labels = paths
    files = ["--gt", truth, "--dets", detections, "--label-map", labels, "--output", str(output)]
    return [sys.executable, str(TOOL), *files]


def official(paths: Sequence[str], folder: str) -> list[str]:
    """The command line of the official code."""
    truth, detections, labels = paths
    return [sys.executable, "-c", _OFFICIAL, folder, "-g", truth, "-d", detections, "-l", labels]


def difference(output: Path, text: str) -> float:
    """The largest difference between our mAP and APs and those that the official code printed."""
    found = json.loads(output.read_text(encoding="utf-8"))["official"]
    printed = re.sub(r"np\.float64\(([^)]*)\)", r"\1", text[text.index("{") :])
    expected = ast.literal_eval(re.sub(r"(?<=:)\s+nan\b", " None", printed))
    pairs = [(found["map"], expected[_MAP])]
    pairs += [(value, expected[_AP + name]) for name, value in found["ap"].items()]
    if any((a is None) != (b is None) for a, b in pairs):
        raise SystemExit("an action has an AP in one of both only")
    return max(abs(a - b) for a, b in pairs if a is not None)


def main(words: Sequence[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--videos", type=int, default=64)
    parser.add_argument("--rows", type=int, default=2_000_000)
    parser.add_argument("--rounds", type=int, default=3)
    chosen = parser.parse_args(words)
    folder = os.environ.get("AVA_OFFICIAL", "")
    print(f"{environment()}\n")
    with tempfile.TemporaryDirectory() as place:
        paths = write_set(Path(place), chosen.videos, chosen.rows)
        output = Path(place) / "ours.json"
        found: dict[str, list[Process]] = {"ours": []}
        commands = {"ours": ours(paths, output)}
        if folder:
            found["official"], commands["official"] = [], official(paths, folder)
        else:
            print("AVA_OFFICIAL is not set: the official code is left out.\n")
        for _ in range(chosen.rounds):
            for name, command in commands.items():
                found[name].append(measured(command))
        apart = difference(output, found["official"][-1].text) if folder else 0.0
    _print(chosen.videos * SECONDS, chosen.rows, found, apart)
    return 0


def _print(keyframes: int, rows: int, found: dict[str, list[Process]], apart: float) -> None:
    def over(name: str, what: str) -> Spread:
        return spread(getattr(process, what) for process in found[name])

    def quotient(what: str) -> Spread:
        return ratio(*([getattr(process, what) for process in found[name]] for name in ("official", "ours")))

    seconds, peak = over("ours", "seconds"), over("ours", "peak")
    lines = [
        ["ours, s", seconds.text(), verdict(seconds.median, at_most=MAX_SECONDS)],
        ["ours, s of the core", over("ours", "cpu").text(), ""],
        ["ours, peak MiB", peak.text(0), verdict(peak.median, at_most=MAX_MEBIBYTES)],
    ]
    if "official" in found:
        times = quotient("seconds")
        lines += [
            ["official, s", over("official", "seconds").text(), ""],
            ["official, s of the core", over("official", "cpu").text(), ""],
            ["official, peak MiB", over("official", "peak").text(0), ""],
            ["time, official / ours", times.text(), verdict(times.median, at_least=MIN_RATIO)],
            ["time of the core, official / ours", quotient("cpu").text(), ""],
            ["largest difference of mAP and APs", f"{apart:.1e}", verdict(apart, at_most=1e-9)],
        ]
    print(table([f"{keyframes:,} keyframes, {rows:,} detections", "median (quartiles)", "target"], lines))


if __name__ == "__main__":
    sys.exit(main())
