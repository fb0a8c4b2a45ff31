"""Real H.264 videos and still images of handwritten digits over textured backgrounds.

The digits are scikit-learn's ``load_digits`` (1797 images of 8×8 pixels, shipped with that package). Each picture of a
digit belongs to one pool only (stills to train on, stills to test on, unlabeled videos, labelled training videos, test
videos), so that no handwriting of the test was seen before. A video's label is digit × motion: one frame tells the
digit, but never the motion.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from distinit_plugin.demos.drawing import MOTIONS, draw_still, draw_video
from distinit_plugin.demos.files import Progress, check_numbers, encode_h264, fill_folder, make_files
from distinit_plugin.files import write_text

Pool = Literal["stills_train", "stills_test", "unlabeled", "train", "test"]

LABELED_MOTIONS = ("left", "right")
"""The motions of the labelled task."""

NUM_DIGITS = 10
CLASS_NAMES = tuple(f"{digit} {motion}" for digit in range(NUM_DIGITS) for motion in LABELED_MOTIONS)
"""Names of the labelled classes; the label is the position in this tuple."""

LAYOUT_VERSION = 1  # raise it when the pictures change, so that folders made before are made again

_POOL_SHARES: dict[Pool, float] = {
    "stills_train": 0.42,
    "stills_test": 0.08,
    "unlabeled": 0.25,
    "train": 0.09,
    "test": 0.16,
}
_MAX_TEST_STILLS = 300
NUM_SCRAPS = 8  # pieces of other digits in the background of each file, beyond the edges included


@dataclass(frozen=True)
class DigitData:
    """Where the demonstration data lie. All paths in the lists are relative to ``folder``.

    Attributes:
        folder: Root of all files.
        stills_train: Csv of ``path digit`` rows, PNG files for the image teacher.
        stills_test: The same, other digits, to measure the teacher.
        unlabeled: List of videos, one path per line.
        train: Csv of ``path label`` rows, labelled videos for fine-tuning.
        test: The same for the test.
        class_names: File with the names of the labels of ``train`` and ``test``, one per line.
        digit_names: File with the names of the labels of the stills, one per line.
    """

    folder: Path
    stills_train: Path
    stills_test: Path
    unlabeled: Path
    train: Path
    test: Path
    class_names: Path
    digit_names: Path


def make_digits(
    folder: str | os.PathLike[str],
    *,
    seed: int = 0,
    num_unlabeled: int = 400,
    num_labeled_train: int = 160,
    num_labeled_test: int = 400,
    num_stills: int = 3000,
    size: int = 64,
    num_frames: int = 20,
    on_progress: Progress | None = None,
) -> DigitData:
    """Write the demonstration data, or return at once when the same data are there already.

    Every file is a pure function of the arguments.

    Args:
        folder: Where to write; made if missing. It must be empty or hold data that this function made, which are
            replaced when they were made with other arguments.
        seed: Seed of everything.
        num_unlabeled: Videos for pre-training.
        num_labeled_train: Labelled training videos; labels in turn, so that classes are balanced.
        num_labeled_test: Labelled test videos.
        num_stills: Still images for training the image teacher (a tenth more, at most 300, are made to test it).
        size: Height and width of videos and stills, even, pixels.
        num_frames: Frames per video, at 25 per second.
        on_progress: Called as ``on_progress(files_done, files_in_all)`` after each file.

    Raises:
        UserError: A number that makes no sense, a folder with other files, or PyAV without an H.264 encoder.
    """
    wanted = {
        "layout": LAYOUT_VERSION,
        "seed": seed,
        "num_unlabeled": num_unlabeled,
        "num_labeled_train": num_labeled_train,
        "num_labeled_test": num_labeled_test,
        "num_stills": num_stills,
        "size": size,
        "num_frames": num_frames,
    }
    check_numbers(wanted, {"seed": 0, "size": 32, "num_frames": 2})
    root = Path(folder)
    data = DigitData(
        folder=root,
        stills_train=root / "stills_train.csv",
        stills_test=root / "stills_test.csv",
        unlabeled=root / "unlabeled.txt",
        train=root / "train.csv",
        test=root / "test.csv",
        class_names=root / "classes.txt",
        digit_names=root / "digits.txt",
    )
    counts: dict[Pool, int] = {
        "stills_train": num_stills,
        "stills_test": min(_MAX_TEST_STILLS, max(NUM_DIGITS, num_stills // 10)),
        "unlabeled": num_unlabeled,
        "train": num_labeled_train,
        "test": num_labeled_test,
    }

    def fill() -> None:
        _write_files(root, counts, seed, size, num_frames, on_progress)
        write_text(data.class_names, "\n".join(CLASS_NAMES) + "\n")
        write_text(data.digit_names, "\n".join(str(digit) for digit in range(NUM_DIGITS)) + "\n")

    fill_folder(root, wanted, counts, fill)
    return data


def digit_pools(seed: int) -> tuple[NDArray[np.float32], dict[Pool, list[NDArray[np.int64]]]]:
    """Load the digits and share them out.

    Returns:
        Images (1797,8,8) in [0, 1], and per pool a list over the ten digits of rows of that array. No row is in two
        pools; every pool has every digit.
    """
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = (bunch.images / 16.0).astype(np.float32)
    rng = np.random.default_rng(np.random.SeedSequence([seed, 0]))
    pools: dict[Pool, list[NDArray[np.int64]]] = {name: [] for name in _POOL_SHARES}
    for digit in range(NUM_DIGITS):
        rows = rng.permutation(np.flatnonzero(bunch.target == digit))
        ends = np.round(np.cumsum(list(_POOL_SHARES.values())) * len(rows)).astype(int)
        for name, part in zip(pools, np.split(rows, ends[:-1]), strict=True):
            pools[name].append(part.astype(np.int64))
    return images, pools


# ------------------------------------------------------------------------------------------------------------- files
class _Job(NamedTuple):
    """One file to be made."""

    pool: Pool
    number: int
    path: str  # relative to the root
    digit: int
    motion: str  # empty: a still
    label: int | None


def _jobs(counts: dict[Pool, int]) -> Iterator[_Job]:
    for pool, count in counts.items():
        for number in range(count):
            if pool in ("stills_train", "stills_test"):
                digit = number % NUM_DIGITS
                yield _Job(pool, number, f"{pool}/{number:05d}.png", digit, "", digit)
            elif pool == "unlabeled":
                motion = MOTIONS[(number // NUM_DIGITS) % len(MOTIONS)]
                yield _Job(pool, number, f"{pool}/{number:05d}.mp4", number % NUM_DIGITS, motion, None)
            else:
                label = number % len(CLASS_NAMES)
                digit, which = divmod(label, len(LABELED_MOTIONS))
                yield _Job(pool, number, f"{pool}/{number:05d}.mp4", digit, LABELED_MOTIONS[which], label)


def _write_files(
    root: Path, counts: dict[Pool, int], seed: int, size: int, num_frames: int, on_progress: Progress | None
) -> None:
    """Make all files and their lists."""
    images, pools = digit_pools(seed)
    jobs = list(_jobs(counts))
    pool_numbers = {pool: position for position, pool in enumerate(counts, start=1)}

    def make(job: _Job) -> None:
        rng = np.random.default_rng(np.random.SeedSequence([seed, pool_numbers[job.pool], job.number]))
        digit = images[rng.choice(pools[job.pool][job.digit])]
        # Other pictures of the same pool, so that the pools share nothing.
        scraps = images[rng.choice(np.concatenate(pools[job.pool]), NUM_SCRAPS)]
        path = root / job.path
        if job.motion:
            frames = draw_video(digit, job.motion, scraps=scraps, size=size, num_frames=num_frames, rng=rng)
            encode_h264(frames, path)
        else:
            Image.fromarray(draw_still(digit, scraps=scraps, size=size, rng=rng)).save(path, compress_level=1)

    make_files(make, jobs, on_progress)
    for pool in counts:
        rows = [job.path if job.label is None else f"{job.path} {job.label}" for job in jobs if job.pool == pool]
        write_text(root / f"{pool}.{'txt' if pool == 'unlabeled' else 'csv'}", "\n".join(rows) + "\n")
