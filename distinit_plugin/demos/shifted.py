"""Data of a study: an image teacher's stills, videos without labels, and labelled videos of another look.

Stills and unlabeled videos are those of the quickstart: bright digits over dark textures. The labelled videos are
negatives (dark digits over bright textures, colours turned round), which no teacher and no pre-training has seen, and
their labels are motions that only the order of the frames tells, as in the demonstration of D3D: each sequence is there
twice, forwards and backwards, under opposite labels. Handwritings of validation and test are in no other video.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from PIL import Image

from distinit_plugin.demos.digits import NUM_DIGITS, NUM_SCRAPS, digit_pools
from distinit_plugin.demos.digits import Pool as Handwritings
from distinit_plugin.demos.drawing import MOTIONS, draw_still, draw_video
from distinit_plugin.demos.files import Progress, check_numbers, encode_h264, fill_folder, make_files
from distinit_plugin.demos.motions import CLASS_NAMES, EACH_FRAME_ALIKE, PAIRS
from distinit_plugin.files import write_text

LAYOUT_VERSION = 1  # raise it when the pictures change, so that folders made before are made again

Pool = Literal["stills_train", "stills_test", "stills_negative", "unlabeled", "train", "val", "test"]

_STREAMS: dict[Pool, int] = {
    "stills_train": 1,
    "stills_test": 2,
    "stills_negative": 2,  # the same pictures
    "unlabeled": 3,
    "train": 4,
    "val": 5,
    "test": 6,
}
"""Second word of the seed of each file's random numbers."""

_HANDWRITINGS: dict[Pool, Handwritings] = {
    "stills_train": "stills_train",
    "stills_test": "stills_test",
    "stills_negative": "stills_test",
    "unlabeled": "unlabeled",
    "train": "train",
    "val": "stills_test",
    "test": "test",
}
_STILLS = ("stills_train", "stills_test", "stills_negative")


@dataclass(frozen=True)
class ShiftedData:
    """Where the files lie. All paths in the lists are relative to ``folder``.

    Attributes:
        folder: Root of all files.
        stills_train: Csv of ``path digit`` rows, PNG files for the image teacher.
        stills_test: The same, other digits.
        stills_negative: The negatives of the test stills.
        unlabeled: List of videos that look like the stills.
        train: Csv of ``path motion`` rows, negatives.
        val: The same, other digits.
        test: The same, yet other digits.
        class_names: File with the names of the motions, one per line.
    """

    folder: Path
    stills_train: Path
    stills_test: Path
    stills_negative: Path
    unlabeled: Path
    train: Path
    val: Path
    test: Path
    class_names: Path


class _Job(NamedTuple):
    """A still, an unlabeled video, or one sequence of which two labelled files are made."""

    pool: Pool
    number: int
    digit: int
    motion: str
    rows: tuple[tuple[str, int | None], ...]  # path relative to the root, label


def make_shifted(
    folder: str | os.PathLike[str],
    *,
    seed: int = 0,
    num_stills: int = 3000,
    num_unlabeled: int = 400,
    num_train: int = 32,
    num_val: int = 80,
    num_test: int = 320,
    size: int = 64,
    num_frames: int = 12,
    on_progress: Progress | None = None,
) -> ShiftedData:
    """Write the data, or return at once when the same ones are there already.

    Every file is a pure function of the arguments.

    Args:
        folder: Where to write; made if missing. It must be empty or hold data that this function made, which are
            replaced when they were made with other arguments.
        seed: Seed of everything.
        num_stills: Still images to train the teacher on; a tenth as many, at least 10, to test it.
        num_unlabeled: Videos for pre-training, all motions in turn.
        num_train: Labelled training videos; two of each sequence, pairs of motions in turn.
        num_val: Validation videos.
        num_test: Test videos.
        size: Height and width, even, pixels.
        num_frames: Frames per video, at 25 per second.
        on_progress: Called as ``on_progress(done, in_all)``.

    Raises:
        UserError: A number that makes no sense, a folder with other files, or PyAV without an H.264 encoder.
    """
    wanted = {
        "shifted_layout": LAYOUT_VERSION,
        "seed": seed,
        "num_stills": num_stills,
        "num_unlabeled": num_unlabeled,
        "num_train": num_train,
        "num_val": num_val,
        "num_test": num_test,
        "size": size,
        "num_frames": num_frames,
    }
    check_numbers(wanted, {"seed": 0, "num_train": 2, "num_val": 2, "num_test": 2, "size": 32, "num_frames": 2})
    root = Path(folder)
    data = ShiftedData(
        root,
        **{pool: root / f"{pool}.{'txt' if pool == 'unlabeled' else 'csv'}" for pool in _STREAMS},
        class_names=root / "classes.txt",
    )
    test_stills = max(NUM_DIGITS, num_stills // 10)
    counts: dict[Pool, int] = {
        "stills_train": num_stills,
        "stills_test": test_stills,
        "stills_negative": test_stills,
        "unlabeled": num_unlabeled,
        "train": num_train // 2,
        "val": num_val // 2,
        "test": num_test // 2,
    }

    def fill() -> None:
        jobs = list(_jobs(counts))
        _write_files(root, jobs, seed, size, num_frames, on_progress)
        for pool in counts:
            rows = [row for job in jobs if job.pool == pool for row in job.rows]
            lines = [path if label is None else f"{path} {label}" for path, label in rows]
            write_text(getattr(data, pool), "\n".join(lines) + "\n")
        write_text(data.class_names, "\n".join(CLASS_NAMES) + "\n")

    fill_folder(root, wanted, counts, fill)
    return data


def _jobs(counts: dict[Pool, int]) -> Iterator[_Job]:
    for pool, count in counts.items():
        for number in range(count):
            digit = number % NUM_DIGITS
            if pool in _STILLS:
                yield _Job(pool, number, digit, "", ((f"{pool}/{number:05d}.png", digit),))
            elif pool == "unlabeled":
                motion = MOTIONS[(number // NUM_DIGITS) % len(MOTIONS)]
                yield _Job(pool, number, digit, motion, ((f"{pool}/{number:05d}.mp4", None),))
            else:
                pair = number % len(PAIRS)
                names = (f"{pool}/{number:05d}_forwards.mp4", f"{pool}/{number:05d}_backwards.mp4")
                rows = tuple((name, 2 * pair + backwards) for backwards, name in enumerate(names))
                yield _Job(pool, number, (number // len(PAIRS)) % NUM_DIGITS, PAIRS[pair][0], rows)


def _write_files(
    root: Path, jobs: list[_Job], seed: int, size: int, num_frames: int, on_progress: Progress | None
) -> None:
    """Make all pictures and videos."""
    images, pools = digit_pools(seed)

    def make(job: _Job) -> None:
        rng = np.random.default_rng(np.random.SeedSequence([seed, _STREAMS[job.pool], job.number]))
        handwritings = pools[_HANDWRITINGS[job.pool]]
        digit = images[rng.choice(handwritings[job.digit])]
        # Other pictures of the same pool, so that the pools share nothing.
        scraps = images[rng.choice(np.concatenate(handwritings), NUM_SCRAPS)]
        places = [root / path for path, _ in job.rows]
        if job.pool in _STILLS:
            still = draw_still(digit, scraps=scraps, size=size, rng=rng)
            still = 255 - still if job.pool == "stills_negative" else still
            Image.fromarray(still).save(places[0], compress_level=1)
            return
        frames = draw_video(digit, job.motion, scraps=scraps, size=size, num_frames=num_frames, rng=rng)
        if job.pool == "unlabeled":
            encode_h264(frames, places[0])
            return
        for place, ordered in zip(places, (255 - frames, 255 - frames[::-1]), strict=True):
            encode_h264(np.ascontiguousarray(ordered), place, group=1, options=EACH_FRAME_ALIKE)

    make_files(make, jobs, on_progress)
