"""Does the loader stay flat and exact over 100,000 samples of a corpus with broken files?

    python benchmarks/soak.py [--samples 100000] [--videos 400] [--epochs 20] [--workers 2] [--forget]

Writes small H.264 videos, 5 % of the list broken in seven ways, and draws samples as a training does: sampler, dataset,
worker processes that are started anew in each epoch, the account of bad videos. Memory (resident set of the parent,
proportional sets of the workers), open files and processes are sampled; slopes are least squares after a warm-up: a
fifth of the run, half of an epoch. Exit code 1 when a count is wrong, something grows, or nothing comes for two
minutes. Linux only. Results: benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import faulthandler
import gc
import os
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import av
import numpy as np

from distinit_plugin.data.bad import BadVideoLog
from distinit_plugin.data.dataset import ClipDataset
from distinit_plugin.data.loader import build_loader
from distinit_plugin.data.sampler import ClipSampler
from distinit_plugin.types import ViewSpec
from distinit_plugin.video.corpus import Mixture, load_corpus

HEIGHT, WIDTH, FRAMES, GOP = 48, 64, 24, 8
BATCH = 20
BROKEN_SHARE = 0.05
SPECS = {
    "student/rgb": ViewSpec(num_frames=4, sampling_rate=2, crop_size=32),
    "TEACHER/rgb": ViewSpec(num_frames=1, sampling_rate=2, crop_size=48, pick="center"),
}
SECONDS_WITHOUT_A_BATCH = 120
LOOKS = 100
"""How often memory is looked at, in all."""

MAX_SLOPE = 10.0
"""KiB per 1000 samples that count as flat: 1 MiB in 100,000; the batches in flight alone make up 0.4 MiB each."""
LONG_EPOCH = 20_000
"""Samples of an epoch after half of which a worker has met every file, so that growth within it means something."""


# ------------------------------------------------------------------------------------------------------- the corpus
def write_video(path: Path, seed: int) -> None:
    """A few frames of moving blocks."""
    rng = np.random.default_rng(seed)
    texture = rng.integers(0, 255, (6, 8, 3), dtype=np.uint8).repeat(8, axis=0).repeat(8, axis=1)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.height, stream.width, stream.pix_fmt, stream.gop_size = HEIGHT, WIDTH, "yuv420p", GOP
        stream.thread_type = "NONE"
        stream.options = {"preset": "veryfast"}
        for number in range(FRAMES):
            frame = av.VideoFrame.from_ndarray(np.roll(texture, 2 * number, axis=1), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def write_broken(path: Path, kind: int, good: bytes) -> None:
    """One broken file: empty, text, cut off, zeroed, missing, a folder, or a fifo that nobody writes to."""
    if kind == 0:
        path.write_bytes(b"")
    elif kind == 1:
        path.write_text("404 Not Found\n")
    elif kind == 2:
        path.write_bytes(good[: len(good) // 3])
    elif kind == 3:
        path.write_bytes(good[:32] + bytes(len(good) - 32))
    elif kind == 4:
        path.unlink(missing_ok=True)
    elif kind == 5:
        path.mkdir()
    else:
        os.mkfifo(path)


def write_corpus(folder: Path, num_videos: int) -> tuple[Path, set[str]]:
    """A list of videos, and the paths of those that are broken."""
    folder.mkdir(parents=True, exist_ok=True)
    every = round(1 / BROKEN_SHARE)
    write_video(folder / "sample.mp4", 0)
    good = (folder / "sample.mp4").read_bytes()
    broken = set()
    for number in range(num_videos):
        path = folder / f"video{number:05d}.mp4"
        if number % every == every // 2:
            write_broken(path, number // every % 7, good)
            broken.add(str(path))
        else:
            write_video(path, number)
    rows = folder / "list.txt"
    rows.write_text("".join(f"video{number:05d}.mp4\n" for number in range(num_videos)))
    return rows, broken


# ------------------------------------------------------------------------------------------------- what is measured
def memory(pid: int, kind: str) -> float:
    """KiB of a process; 0 when it is gone.

    Args:
        pid: The process.
        kind: ``Rss``: all its pages. ``Pss``: shared pages divided among those that share them.
    """
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0.0
    return float(next((line.split()[1] for line in lines if line.startswith(f"{kind}:")), 0))


def children(but: frozenset[int] = frozenset()) -> list[int]:
    """Processes that this one has started, ended ones that nobody waited for included, ``but`` some others."""
    started = [int(word) for word in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()]
    return [pid for pid in started if pid not in but]


def open_files(enough: int, seconds: float = 3.0) -> int:
    """Open files of this process, the fewest within some seconds: a thread or a worker that ends closes its own late.

    Args:
        enough: Do not wait for fewer than these.
        seconds: To wait at most.
    """
    until = time.monotonic() + seconds
    fewest = len(os.listdir("/proc/self/fd"))
    while fewest > enough and time.monotonic() < until:
        time.sleep(0.05)
        fewest = min(fewest, len(os.listdir("/proc/self/fd")))
    return fewest


def slope(samples: list[int], values: list[float], warm_up: float = 0.2) -> float:
    """Growth per 1000 samples by least squares, without the first part; 0 for fewer than three points."""
    start = int(warm_up * len(samples))
    x, y = np.array(samples[start:], dtype=float), np.array(values[start:], dtype=float)
    if len(x) < 3 or np.ptp(x) == 0:
        return 0.0
    return float(1000 * np.polyfit(x, y, 1)[0])


@dataclass
class Measured:
    """What a soak saw.

    Attributes:
        draws: Position in the corpus → how often its turn came.
        replaced: Samples that stand for a broken file.
        used_broken: Samples that claim to come from a broken file.
        keys: (epochs, positions), how often each key came (made at once, so that it does not grow with the samples).
        bad: The files that the account names.
        looks: Samples so far, at each look.
        parent: KiB of the parent, at each look.
        workers: KiB of all workers, at each look.
        epochs: The epoch of each look.
        descriptors: Open files of the parent after each epoch.
        processes: Child processes after each epoch.
        seconds: Of the whole soak.
    """

    draws: Counter[int] = field(default_factory=Counter)
    replaced: int = 0
    used_broken: int = 0
    keys: np.ndarray = field(default_factory=lambda: np.zeros((0, 0), dtype=np.int16))
    bad: set[str] = field(default_factory=set)
    looks: list[int] = field(default_factory=list)
    parent: list[float] = field(default_factory=list)
    workers: list[float] = field(default_factory=list)
    epochs: list[int] = field(default_factory=list)
    descriptors: list[int] = field(default_factory=list)
    processes: list[int] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def samples(self) -> int:
        """How many came."""
        return sum(self.draws.values())

    def _of_epoch(self, epoch: int) -> slice:
        """The looks of an epoch."""
        first = self.epochs.index(epoch)
        return slice(first, first + self.epochs.count(epoch))

    def worker_slope(self) -> float:
        """Growth of the workers from epoch to epoch: their memory at the last look of each."""
        last = [self._of_epoch(epoch).stop - 1 for epoch in sorted(set(self.epochs))]
        return slope([self.looks[place] for place in last], [self.workers[place] for place in last])

    def worker_slope_within(self) -> float:
        """Growth of the workers inside an epoch: mean over the epochs of the slope over its second half."""
        parts = [self._of_epoch(epoch) for epoch in sorted(set(self.epochs))]
        return float(np.mean([slope(self.looks[part], self.workers[part], 0.5) for part in parts]))


def soak(folder: Path, *, samples: int, videos: int, epochs: int, workers: int, forget: bool = False) -> Measured:
    """Draw samples as a training does, and watch.

    Args:
        folder: With the corpus of ``write_corpus`` in ``folder/videos``; everything else is written beside it.
        samples: In all; rounded down to whole batches per epoch.
        videos: Length of the list.
        epochs: Into how many the samples are divided.
        workers: Processes.
        forget: Do not tell the next epoch's workers which files are bad, as a training does: they open them again.
    """
    rows, broken = write_corpus(folder / "videos", videos)
    corpora = Mixture([load_corpus("list", "SOAK", path=str(rows))])
    sampler = ClipSampler(corpora.sizes, num_clips_per_epoch=samples // epochs, global_batch_size=BATCH, seed=0)
    dataset = ClipDataset(
        corpora,
        SPECS,
        clip_spec=SPECS["student/rgb"],
        split="train",
        seed=0,
        scales=(36, 44),
        index_cache=str(folder / "frame_index"),
    )
    bad_log = BadVideoLog(folder / "bad_videos.csv")
    names = [record.path for record in corpora]
    seen = Measured(keys=np.full((epochs, sampler.clips_per_epoch), 1, dtype=np.int16))
    seen.keys -= 1  # touched, so that the pages are there from the start
    others = frozenset(children())  # of the program that calls this
    begin = time.perf_counter()
    look_every = max(1, sampler.steps_per_epoch * epochs // LOOKS)
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        if not forget:
            dataset.remember(bad_log.videos())
        batches = build_loader(dataset, sampler, BATCH, num_workers=workers, drop_last=True)
        for number, batch in enumerate(batches, start=1):
            faulthandler.dump_traceback_later(SECONDS_WITHOUT_A_BATCH, exit=True)
            bad_log.add(batch["bad"])
            for key, path in zip(batch["keys"], batch["paths"], strict=True):
                seen.draws[key.index] += 1
                seen.keys[key.epoch, key.position] += 1
                seen.replaced += path != names[key.index]
                seen.used_broken += path in broken
            # The last batches find their workers gone.
            if number % look_every == 0 and len(children(others)) == workers:
                seen.looks.append(seen.samples)
                seen.parent.append(memory(os.getpid(), "Rss"))
                seen.workers.append(sum(memory(pid, "Pss") for pid in children(others)))
                seen.epochs.append(epoch)
        del batches, batch  # the tensors of the last batch are open files, too
        gc.collect()  # as the loader does before it starts the next epoch's workers
        seen.descriptors.append(open_files(enough=min(seen.descriptors, default=0)))
        seen.processes.append(len(children(others)))
    faulthandler.cancel_dump_traceback_later()
    seen.bad = {video.path for video in bad_log.videos()}
    seen.seconds = time.perf_counter() - begin
    return seen


def problems(seen: Measured, *, videos: int, expected: int, broken: set[str], names: list[str]) -> list[str]:
    """What is not as it must be.

    Args:
        seen: From ``soak``.
        videos: Length of the list.
        expected: Samples.
        broken: Paths of the broken files.
        names: All paths, in order.
    """
    draws = [seen.draws[index] for index in range(videos)]
    turns_of_broken = sum(count for index, count in enumerate(draws) if names[index] in broken)
    checks = {
        f"{seen.samples} samples came, {expected} were due": seen.samples == expected,
        f"keys came {seen.keys.min()} to {seen.keys.max()} times": bool((seen.keys == 1).all()),
        f"videos were drawn {min(draws)} to {max(draws)} times": max(draws) - min(draws) <= 1,
        f"{seen.replaced} samples were replaced, {turns_of_broken} were due": seen.replaced == turns_of_broken,
        f"{seen.used_broken} samples come from broken files": seen.used_broken == 0,
        f"{len(seen.bad)} files are named as bad, {len(broken)} are broken": seen.bad == broken,
        f"open files after the epochs: {seen.descriptors}": _is_flat(seen.descriptors),
        f"processes after the epochs: {seen.processes}": len(set(seen.processes)) == 1,
    }
    return [text for text, right in checks.items() if not right]


def _is_flat(counts: list[int]) -> bool:
    """No growth: the fewest of the second half are not more than the fewest of the first."""
    half = len(counts) // 2
    return min(counts[half:]) <= min(counts[: max(1, half)])


def growth(seen: Measured) -> dict[str, float]:
    """Slopes, KiB per 1000 samples: those that epochs of this number and length can tell."""
    epochs = len(seen.descriptors)
    slopes = {"parent": slope(seen.looks, seen.parent)}
    if epochs >= 5:
        slopes["workers, from epoch to epoch"] = seen.worker_slope()
    if seen.samples >= LONG_EPOCH * epochs:
        slopes["workers, within an epoch"] = seen.worker_slope_within()
    return slopes


def report(seen: Measured, found: list[str]) -> str:
    """The lines for benchmarks/README.md."""
    counts = sorted(set(seen.draws.values()))
    lines = [
        f"{seen.samples:,} samples in {seen.seconds:.0f} s; {seen.replaced} replaced, {len(seen.bad)} bad files named",
        f"each video drawn {' or '.join(map(str, counts))} times",
        f"parent, MiB: {_course(seen.parent)}",
        f"workers together, MiB: {_course(seen.workers)}",
        f"open files {min(seen.descriptors)} to {max(seen.descriptors)}, processes left {max(seen.processes)}",
        *(f"slope, {name}: {value:+.2f} KiB per 1000 samples" for name, value in growth(seen).items()),
        *(f"WRONG: {text}" for text in found),
    ]
    return "\n".join(lines)


def _course(values: list[float]) -> str:
    mebibytes = np.array(values) / 1024
    return f"{mebibytes[0]:.1f} first, {mebibytes[-1]:.1f} last, {mebibytes.max():.1f} most"


def main() -> int:
    """Write, draw, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=100_000, help="samples in all")
    parser.add_argument("--videos", type=int, default=400, help="length of the list; one of 20 is broken")
    parser.add_argument("--epochs", type=int, default=20, help="the workers are started anew in each")
    parser.add_argument("--workers", type=int, default=2, help="decoding processes")
    parser.add_argument("--forget", action="store_true", help="open known bad files again in each epoch")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        sizes = {"samples": given.samples, "videos": given.videos, "epochs": given.epochs, "workers": given.workers}
        seen = soak(Path(folder), **sizes, forget=given.forget)
        found = verdict(Path(folder), seen, given.samples, given.videos, given.epochs)
    found += [
        f"{name} grows by {value:.1f} KiB per 1000 samples (allowed: {MAX_SLOPE:g})"
        for name, value in growth(seen).items()
        if value > MAX_SLOPE
    ]
    print(report(seen, found))
    return 1 if found else 0


def verdict(folder: Path, seen: Measured, samples: int, videos: int, epochs: int) -> list[str]:
    """``problems`` of a soak in ``folder``."""
    every = round(1 / BROKEN_SHARE)
    names = [str(folder / "videos" / f"video{number:05d}.mp4") for number in range(videos)]
    broken = {name for number, name in enumerate(names) if number % every == every // 2}
    expected = samples // epochs // BATCH * BATCH * epochs
    return problems(seen, videos=videos, expected=expected, broken=broken, names=names)


if __name__ == "__main__":
    sys.exit(main())
