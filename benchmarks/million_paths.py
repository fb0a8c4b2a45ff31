"""Time and memory of a start on a list of a million paths, with two workers, against a start on ten.

    python benchmarks/million_paths.py [--paths 1000000] [--rounds 9]

Every start is a fresh process: read the list, build dataset, sampler and loader, take the first batch of 16 clips.
Measured are the seconds from the first line of that to the batch (imports are before it), the largest resident memory
of the parent, and the proportional memory of both workers while the batch is there. The list holds a million different
spellings of the paths of four real files (``.//././/clip2.mp4``), so that every row exists and no row repeats another.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from clips import write_clip
from common import ROUNDS, environment, interleave, peak_memory, proportional_memory, spread, table, verdict

FILES, BITS, BATCH, WORKERS = 4, 24, 16, 2
MAX_SECONDS, MAX_MEBIBYTES = 5.0, 300.0


def write_list(path: Path, count: int) -> None:
    """``count`` distinct paths of some 60 characters, relative to the list."""
    words = {"0": "./", "1": ".//"}
    with open(path, "w", encoding="utf-8") as file:
        for number in range(count):
            spelling = "".join(words[bit] for bit in f"{number:0{BITS}b}")
            file.write(f"{spelling}clip{number % FILES}.mp4\n")


def start(listing: str) -> dict[str, float]:
    """One start in this process."""
    from distinit_plugin.data.dataset import ClipDataset
    from distinit_plugin.data.loader import build_loader
    from distinit_plugin.data.sampler import ClipSampler
    from distinit_plugin.types import ViewSpec
    from distinit_plugin.video.corpus import Mixture, load_corpus

    begin = time.perf_counter()
    videos = Mixture([load_corpus("list", "VIDEOS", path=listing)])
    read = time.perf_counter()
    spec = ViewSpec()
    dataset = ClipDataset(videos, {"student/rgb": spec}, clip_spec=spec, split="train", seed=0)
    sampler = ClipSampler(videos.sizes, num_clips_per_epoch=0, global_batch_size=BATCH, seed=0)
    loader = build_loader(dataset, sampler, BATCH, num_workers=WORKERS, drop_last=len(videos) > BATCH)
    batches = iter(loader)
    batch = next(batches)
    seconds = time.perf_counter() - begin
    assert not batch["bad"], batch["bad"]
    workers = [process.pid for process in multiprocessing.active_children() if process.pid is not None]
    assert len(workers) == WORKERS
    of_workers = sum(proportional_memory(pid) for pid in workers)
    return {"seconds": seconds, "list": read - begin, "peak": peak_memory(), "workers": of_workers}


def main(words: Sequence[str] | None = None) -> int:
    """Compare and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--paths", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--start", default="", help=argparse.SUPPRESS)  # the fresh process
    chosen = parser.parse_args(words)
    if chosen.start:
        print(json.dumps(start(chosen.start)))
        return 0
    print(f"{environment()}\n")
    with tempfile.TemporaryDirectory() as folder:
        for number in range(FILES):
            write_clip(Path(folder) / f"clip{number}.mp4", num_frames=30, height=128, width=160, seed=number)
        found: dict[int, list[dict[str, float]]] = {}
        for count in (chosen.paths, 10):
            write_list(Path(folder) / f"{count}.txt", count)
            found[count] = []

        def fresh(count: int) -> None:
            command = [sys.executable, __file__, "--start", str(Path(folder) / f"{count}.txt")]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            found[count].append(json.loads(done.stdout.splitlines()[-1]))

        interleave({str(count): lambda number, count=count: fresh(count) for count in found}, chosen.rounds)  # type: ignore[misc]
    many, few = (values[1:] for values in found.values())  # without the round that warms the caches
    _print(chosen.paths, many, few)
    return 0


def _print(count: int, many: Sequence[dict[str, float]], few: Sequence[dict[str, float]]) -> None:
    seconds, listing = (spread(item[name] for item in many) for name in ("seconds", "list"))
    more = {
        name: spread((a[name] - b[name]) / 2**20 for a, b in zip(many, few, strict=True))
        for name in ("peak", "workers")
    }
    together = spread(
        (a["peak"] + a["workers"] - b["peak"] - b["workers"]) / 2**20 for a, b in zip(many, few, strict=True)
    )
    rows = [
        ["seconds to the first batch", seconds.text(), verdict(seconds.median, at_most=MAX_SECONDS)],
        ["of these, reading the list", listing.text(), ""],
        ["seconds to the first batch, ten paths", spread(item["seconds"] for item in few).text(), ""],
        ["MiB of the parent, more than with ten paths", more["peak"].text(0), ""],
        ["MiB of both workers, more than with ten paths", more["workers"].text(0), ""],
        ["MiB together", together.text(0), verdict(together.median, at_most=MAX_MEBIBYTES)],
    ]
    print(table([f"{count:,} paths, {WORKERS} workers", "median (quartiles)", "target"], rows))


if __name__ == "__main__":
    sys.exit(main())
