"""Labelled videos of digits in motion in which only the order of the frames tells the label.

Every sequence that is drawn is kept twice, forwards and backwards, under the two labels of a pair of opposite motions.
Each frame is coded by itself with a fixed quantiser, so that the two files decode to the same pictures, in opposite
orders: whatever a single frame or any unordered set of frames tells, it tells of both. Backgrounds drift in directions
of their own. Handwritings of the test are in no other video. More videos of the same kind have no labels.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from distinit_plugin.demos.digits import NUM_DIGITS, NUM_SCRAPS, digit_pools
from distinit_plugin.demos.drawing import draw_video
from distinit_plugin.demos.files import Progress, check_numbers, encode_h264, fill_folder, make_files
from distinit_plugin.files import write_file, write_text
from distinit_plugin.flow.pictures import Picture, colour_flow, picture_rows
from distinit_plugin.flow.store import FlowStore
from distinit_plugin.video.decode import open_video

PAIRS = (("left", "right"), ("up", "down"), ("clockwise", "counterclockwise"), ("zoom_in", "zoom_out"))
"""A motion, and what it looks like backwards."""

CLASS_NAMES = tuple(name for pair in PAIRS for name in pair)
"""Names of the classes; the label is the position in this tuple."""

NUM_TRAIN, NUM_TEST, NUM_MORE = 112, 320, 512
"""Videos: few with labels to learn from, enough to tell differences of a few points, and many without labels."""

LAYOUT_VERSION = 2  # raise it when the pictures change, so that folders made before are made again

EACH_FRAME_ALIKE = {"qp": "20", "preset": "veryfast", "tune": "fastdecode"}
"""Options of libx264, with groups of one frame: what a frame decodes to depends on that frame alone."""

Pool = Literal["train", "test", "more"]

_STREAMS: dict[Pool, int] = {"train": 1, "test": 2, "more": 3}
"""Second word of the seed of each video's random numbers."""

_FULL_COLOUR = 2.0
"""Pixels of motion that get the full colour in pictures."""


@dataclass(frozen=True)
class MotionData:
    """Where the videos lie. All paths in the lists are relative to ``folder``.

    Attributes:
        folder: Root of all files.
        train: Csv of ``path label`` rows.
        test: The same, other digits.
        unlabeled: List of paths: the training videos, and more of their kind.
        class_names: File with the names of the labels, one per line.
    """

    folder: Path
    train: Path
    test: Path
    unlabeled: Path
    class_names: Path


class _Job(NamedTuple):
    """One sequence, of which two files are made."""

    pool: Pool
    number: int
    pair: int
    paths: tuple[str, str]  # relative to the root: forwards, backwards


def make_motions(
    folder: str | os.PathLike[str],
    *,
    seed: int = 0,
    num_train: int = NUM_TRAIN,
    num_test: int = NUM_TEST,
    num_more: int = NUM_MORE,
    size: int = 64,
    num_frames: int = 12,
    on_progress: Progress | None = None,
) -> MotionData:
    """Write the videos, or return at once when the same ones are there already.

    Every file is a pure function of the arguments.

    Args:
        folder: Where to write; made if missing. It must be empty or hold data that this function made, which are
            replaced when they were made with other arguments.
        seed: Seed of everything.
        num_train: Training videos; two of each sequence, pairs of motions in turn.
        num_test: Test videos.
        num_more: Videos without labels, beside those of the training.
        size: Height and width, even, pixels.
        num_frames: Frames per video, at 25 per second.
        on_progress: Called as ``on_progress(sequences_done, sequences_in_all)``.

    Raises:
        UserError: A number that makes no sense, a folder with other files, or PyAV without an H.264 encoder.
    """
    wanted = {
        "motions_layout": LAYOUT_VERSION,
        "seed": seed,
        "num_train": num_train,
        "num_test": num_test,
        "num_more": num_more,
        "size": size,
        "num_frames": num_frames,
    }
    check_numbers(wanted, {"seed": 0, "num_train": 2, "num_test": 2, "num_more": 0, "size": 32, "num_frames": 2})
    root = Path(folder)
    data = MotionData(root, root / "train.csv", root / "test.csv", root / "unlabeled.txt", root / "classes.txt")
    counts: dict[Pool, int] = {"train": num_train // 2, "test": num_test // 2, "more": num_more // 2}

    def fill() -> None:
        jobs = list(_jobs(counts))
        _write_videos(root, jobs, seed, size, num_frames, on_progress)
        for labelled in (data.train, data.test):
            rows = [
                f"{path} {2 * job.pair + backwards}"
                for job in jobs
                if job.pool == labelled.stem
                for backwards, path in enumerate(job.paths)
            ]
            write_text(labelled, "\n".join(rows) + "\n")
        paths = [path for job in jobs if job.pool != "test" for path in job.paths]
        write_text(data.unlabeled, "\n".join(paths) + "\n")
        write_text(data.class_names, "\n".join(CLASS_NAMES) + "\n")

    fill_folder(root, wanted, counts, fill)
    return data


def draw_classes(data: MotionData, store: Path, output: Path, *, num_frames: int = 4) -> None:
    """A sheet of the first test video of every class, with its flow from a store.

    Args:
        data: The videos.
        store: Folder of their flow.
        output: The PNG.
        num_frames: Of each video.
    """
    first: dict[int, str] = {}
    for row in data.test.read_text(encoding="utf-8").splitlines():
        path, _, label = row.rpartition(" ")
        first.setdefault(int(label), str(data.folder / path))
    columns: list[list[Picture]] = []
    kept = FlowStore.open(store)
    for _, path in sorted(first.items()):
        with open_video(path) as video, kept.reader(path) as reader:
            places = np.linspace(0, reader.num_flows - 1, num_frames).round().astype(int).tolist()
            flows = reader.quantiser.decode(reader.read(places))
            columns.append(
                [
                    picture
                    for frame, flow in zip(video.read(places), flows, strict=True)
                    for picture in (frame, colour_flow(flow, _FULL_COLOUR))
                ]
            )
    sheet = picture_rows(
        list(zip(*columns, strict=True)),
        [CLASS_NAMES[label] for label in sorted(first)],
        "frames of one test video of each class, and their flow",
        _FULL_COLOUR,
    )
    file = BytesIO()
    sheet.save(file, format="PNG")
    write_file(output, lambda target: target.write(file.getvalue()))


def _jobs(counts: dict[Pool, int]) -> Iterator[_Job]:
    for pool, count in counts.items():
        for number in range(count):
            names = (f"{pool}/{number:04d}_forwards.mp4", f"{pool}/{number:04d}_backwards.mp4")
            yield _Job(pool, number, number % len(PAIRS), names)


def _write_videos(
    root: Path, jobs: list[_Job], seed: int, size: int, num_frames: int, on_progress: Progress | None
) -> None:
    """Make all videos."""
    images, pools = digit_pools(seed)

    def make(job: _Job) -> None:
        rng = np.random.default_rng(np.random.SeedSequence([seed, _STREAMS[job.pool], job.number]))
        handwritings = pools["test" if job.pool == "test" else "train"]
        digit = images[rng.choice(handwritings[int(rng.integers(NUM_DIGITS))])]
        # Other pictures of the same pool, so that training and test share nothing.
        scraps = images[rng.choice(np.concatenate(handwritings), NUM_SCRAPS)]
        frames = draw_video(digit, PAIRS[job.pair][0], scraps=scraps, size=size, num_frames=num_frames, rng=rng)
        for path, ordered in zip(job.paths, (frames, frames[::-1]), strict=True):
            encode_h264(np.ascontiguousarray(ordered), root / path, group=1, options=EACH_FRAME_ALIKE)

    make_files(make, jobs, on_progress)
