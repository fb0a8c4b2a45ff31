"""Share of the time in which the quickstart's pre-training waits for data, with one worker.

    python benchmarks/data_wait.py [--network r2plus1d] [--steps 300] [--threads 1]

Runs ``configs/quickstart/pretrain_NETWORK.yaml`` as the quickstart does, on its own videos (made first), with a random
teacher in place of the trained one, which costs the same. The share is over all steps after the first ten, in which
the worker starts; it is given for every ten steps, too.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from common import environment, spread, table, verdict
from rich.console import Console

from distinit_plugin.config.load import load_cfg
from distinit_plugin.demos.digits import make_digits
from distinit_plugin.jobs.running import run

MAX_SHARE = 0.05
NUM_VIDEOS = 400
PREFIX = "json_stats: "


def windows(log: Path) -> list[tuple[float, float]]:
    """(seconds of a step, seconds of it that were waiting) of every log line of the training."""
    lines = [line.partition(PREFIX)[2] for line in log.read_text().splitlines() if PREFIX in line]
    stats = [entry for entry in map(json.loads, lines) if entry.get("_type") == "train_iter_"]
    return [(entry["dt"], entry["dt_data"]) for entry in stats]


def pretrain(
    folder: Path, network: str, steps: int, threads: int, videos: int
) -> tuple[str, list[tuple[float, float]]]:
    """Train; the precision that it took, and the windows of its log."""
    data = make_digits(folder / "data", num_unlabeled=videos, num_labeled_train=20, num_labeled_test=20, num_stills=40)
    pairs: dict[str, object] = {
        "OUTPUT_DIR": folder / network,
        "CORPUS.TRAIN.UNLABELED.PATH": data.unlabeled,
        "DISTILL.TEACHERS.DIGITS.WEIGHTS": "random",
        "SOLVER.MAX_EPOCH": steps,
        "RUNNER.CLIPS_PER_EPOCH": 16 * steps,
        "RUNNER.NUM_THREADS": threads,
        "DATA_LOADER.NUM_WORKERS": 1,
    }
    cfg, _ = load_cfg(
        f"configs/quickstart/pretrain_{network}.yaml", [str(word) for pair in pairs.items() for word in pair]
    )
    run(cfg, console=Console(file=io.StringIO()))
    log = folder / network / "stdout.log"
    return log.read_text().partition(", precision ")[2].partition(":")[0], windows(log)


def main(words: Sequence[str] | None = None) -> int:
    """Train and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", default="r2plus1d", choices=("r2plus1d", "res3d"))
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--threads", type=int, default=1, help="of the training; the quickstart's runs have one each")
    parser.add_argument("--videos", type=int, default=NUM_VIDEOS)
    chosen = parser.parse_args(words)
    with tempfile.TemporaryDirectory() as folder:
        precision, found = pretrain(Path(folder), chosen.network, chosen.steps, chosen.threads, chosen.videos)
    later = found[1:] or found
    total = sum(wait for _, wait in later) / sum(step for step, _ in later)
    shares = spread(100 * wait / step for step, wait in later)
    rows = [
        ["waiting, % of the time", f"{100 * total:.2f}", verdict(100 * total, at_most=100 * MAX_SHARE)],
        ["of each ten steps, median (quartiles), %", shares.text(), ""],
        ["in the first ten steps, %", f"{100 * found[0][1] / found[0][0]:.2f}", ""],
        ["s / step", spread(step for step, _ in later).text(3), ""],
    ]
    print(f"{environment(precision=precision, training_threads=chosen.threads)}\n")
    print(table([f"{chosen.network}, {chosen.steps} steps of 16 clips, 1 worker", "value", "target"], rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
