"""Real H.264 videos and still images of handwritten digits over textured backgrounds.

The digits are scikit-learn's ``load_digits`` (1797 images of 8×8 pixels, shipped with that package). Each picture of a
digit belongs to one pool only (stills to train on, stills to test on, unlabeled videos, labelled training videos, test
videos), so that no handwriting of the test was seen before. A video's label is digit × motion: one frame tells the
digit, but never the motion.
"""

from __future__ import annotations

import colorsys
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path
from typing import Literal, NamedTuple

import av
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image

from distinit_plugin.errors import UserError

Pool = Literal["stills_train", "stills_test", "unlabeled", "train", "test"]
Progress = Callable[[int, int], None]

MOTIONS = ("left", "right", "up", "down", "clockwise", "counterclockwise", "zoom_in", "zoom_out")
"""All motions; the unlabeled videos show every one of them."""

LABELED_MOTIONS = ("left", "right")
"""The motions of the labelled task."""

NUM_DIGITS = 10
CLASS_NAMES = tuple(f"{digit} {motion}" for digit in range(NUM_DIGITS) for motion in LABELED_MOTIONS)
"""Names of the labelled classes; the label is the position in this tuple."""

FPS = 25
MANIFEST = "manifest.json"
LAYOUT_VERSION = 1  # raise it when the pictures change, so that folders made before are made again
CONSTANT_RATE_FACTOR = "20"  # of libx264: clearly compressed, digits still readable

_POOL_SHARES: dict[Pool, float] = {
    "stills_train": 0.42,
    "stills_test": 0.08,
    "unlabeled": 0.25,
    "train": 0.09,
    "test": 0.16,
}
_MAX_TEST_STILLS = 300
_STILL_MOMENTS = 9  # moments of a video from which a still's is drawn
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


class Course(NamedTuple):
    """Where a digit is in each frame, in units of half the frame's side; x to the right, y down."""

    x: torch.Tensor  # (T,) centre
    y: torch.Tensor  # (T,)
    angle: torch.Tensor  # (T,) radians, clockwise on the screen
    size: torch.Tensor  # (T,) half the digit's height


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

    Every file is a pure function of the arguments. The manifest is written last, by renaming: without it the folder
    is made again, so that a run that was stopped in the middle does no harm.

    Args:
        folder: Where to write; made if missing. Only files that this function makes are replaced in it.
        seed: Seed of everything.
        num_unlabeled: Videos for pre-training.
        num_labeled_train: Labelled training videos; labels in turn, so that classes are balanced.
        num_labeled_test: Labelled test videos.
        num_stills: Still images for training the image teacher (a tenth more, at most 300, are made to test it).
        size: Height and width of videos and stills, even, pixels.
        num_frames: Frames per video, at 25 per second.
        on_progress: Called as ``on_progress(files_done, files_in_all)`` after each file.

    Raises:
        UserError: A number that makes no sense, or PyAV without an H.264 encoder.
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
    _check(wanted)
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
    manifest = root / MANIFEST
    if _read_manifest(manifest) == wanted:
        return data
    root.mkdir(parents=True, exist_ok=True)
    manifest.unlink(missing_ok=True)
    counts: dict[Pool, int] = {
        "stills_train": num_stills,
        "stills_test": min(_MAX_TEST_STILLS, max(NUM_DIGITS, num_stills // 10)),
        "unlabeled": num_unlabeled,
        "train": num_labeled_train,
        "test": num_labeled_test,
    }
    _write_files(root, counts, seed, size, num_frames, on_progress)
    _write_text(data.class_names, "\n".join(CLASS_NAMES))
    _write_text(data.digit_names, "\n".join(str(digit) for digit in range(NUM_DIGITS)))
    _write_text(manifest, json.dumps(wanted, indent=2))
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


def draw_video(
    digit: NDArray[np.float32],
    motion: str,
    *,
    scraps: NDArray[np.float32],
    size: int,
    num_frames: int,
    rng: np.random.Generator,
) -> NDArray[np.uint8]:
    """Draw one video.

    Args:
        digit: (8,8) in [0, 1].
        motion: One of ``MOTIONS``.
        scraps: (N,8,8) in [0, 1], digits of which pieces lie about in the background.
        size: Height and width, pixels.
        num_frames: T.
        rng: Source of the background, the colours and the course.

    Returns:
        (T,H,W,3) RGB.
    """
    return _draw(digit, _course(motion, num_frames, rng), scraps, size, rng)


def draw_still(
    digit: NDArray[np.float32], *, scraps: NDArray[np.float32], size: int, rng: np.random.Generator
) -> NDArray[np.uint8]:
    """Draw one still image, (H,W,3) RGB: a moment of a video of a random motion, before compression."""
    course = _course(MOTIONS[int(rng.integers(len(MOTIONS)))], _STILL_MOMENTS, rng)
    moment = int(rng.integers(_STILL_MOMENTS))
    return _draw(digit, Course(*(values[moment : moment + 1] for values in course)), scraps, size, rng)[0]


def encode_h264(frames: NDArray[np.uint8], path: Path) -> None:
    """Write (T,H,W,3) RGB frames as H.264 in an mp4 file, to a temporary name first.

    Raises:
        UserError: PyAV was built without libx264.
    """
    temporary = path.with_name(f"{path.stem}.part{path.suffix}")
    with av.open(str(temporary), "w", format="mp4") as container:
        try:
            stream = container.add_stream("libx264", rate=FPS)
        except Exception as error:
            raise UserError(
                "The demonstration encodes its own videos, but this PyAV has no H.264 encoder (libx264). "
                "Install PyAV's binary wheel: pip install --force-reinstall --only-binary av av."
            ) from error
        assert isinstance(stream, av.VideoStream)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        # One thread: the bits must not depend on the machine's number of cores.
        stream.codec_context.thread_count = 1
        stream.codec_context.gop_size = 12
        stream.options = {"crf": CONSTANT_RATE_FACTOR, "preset": "veryfast"}
        for number, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, FPS)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    temporary.replace(path)


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
                digit, motion = divmod(label, len(LABELED_MOTIONS))
                yield _Job(pool, number, f"{pool}/{number:05d}.mp4", digit, LABELED_MOTIONS[motion], label)


def _write_files(
    root: Path, counts: dict[Pool, int], seed: int, size: int, num_frames: int, on_progress: Progress | None
) -> None:
    """Make all files and their lists."""
    images, pools = digit_pools(seed)
    jobs = list(_jobs(counts))
    for pool in counts:
        shutil.rmtree(root / pool, ignore_errors=True)
        (root / pool).mkdir()
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

    # Encoding and drawing leave Python's lock, so threads are enough.
    with ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1)) as executor:
        for done, _ in enumerate(executor.map(make, jobs), start=1):
            if on_progress is not None:
                on_progress(done, len(jobs))
    for pool in counts:
        rows = [job.path if job.label is None else f"{job.path} {job.label}" for job in jobs if job.pool == pool]
        _write_text(root / f"{pool}.{'txt' if pool == 'unlabeled' else 'csv'}", "\n".join(rows))


def _check(wanted: dict[str, int]) -> None:
    minimum = {"seed": 0, "size": 32, "num_frames": 2}
    for name, value in wanted.items():
        least = minimum.get(name, 1)
        if value < least:
            raise UserError(f"{name} is {value}; the demonstration data need at least {least}.")
    if wanted["size"] % 2:
        raise UserError(f"size is {wanted['size']}; H.264 with 4:2:0 colours needs an even number of pixels.")


def _read_manifest(path: Path) -> dict[str, int] | None:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _write_text(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(text + "\n", encoding="utf-8")
    temporary.replace(path)


# ----------------------------------------------------------------------------------------------------------- drawing
def _draw(
    digit: NDArray[np.float32],
    course: Course,
    scraps: NDArray[np.float32],
    size: int,
    rng: np.random.Generator,
) -> NDArray[np.uint8]:
    """Background, digit and a grain that does not move, as (T,H,W,3)."""
    background = _drifting_background(scraps, size, len(course.x), rng)
    colour = _bright_colour(background, rng).view(1, 3, 1, 1)
    grain = torch.from_numpy(rng.normal(0.0, 0.02, (1, 3, size, size)).astype(np.float32))
    frames = torch.lerp(background, colour, _ink(torch.from_numpy(digit), course, size)) + grain
    pixels = frames.clamp_(0, 1).mul_(255).round_().to(torch.uint8)
    return pixels.permute(0, 2, 3, 1).contiguous().numpy()


def _course(motion: str, num_frames: int, rng: np.random.Generator) -> Course:
    """A course that is in its middle frame like that of any other motion: one frame does not tell the motion."""
    time = torch.linspace(-1.0, 1.0, num_frames)
    constant = torch.ones_like(time)
    x, y = rng.uniform(-0.2, 0.2, 2)
    middle = Course(
        x * constant, y * constant, rng.uniform(-0.3, 0.3) * constant, rng.uniform(0.5, 0.66) * constant
    )
    shift = rng.uniform(0.25, 0.45) * time
    turn = math.radians(rng.uniform(25, 45)) * time
    growth = torch.exp(rng.uniform(0.25, 0.4) * time)
    changes = {
        "left": {"x": middle.x - shift},
        "right": {"x": middle.x + shift},
        "up": {"y": middle.y - shift},
        "down": {"y": middle.y + shift},
        "clockwise": {"angle": middle.angle + turn},
        "counterclockwise": {"angle": middle.angle - turn},
        "zoom_in": {"size": middle.size * growth},
        "zoom_out": {"size": middle.size / growth},
    }
    return middle._replace(**changes[motion])


def _ink(images: torch.Tensor, course: Course, size: int) -> torch.Tensor:
    """Opacity (T,1,H,W) of one (8,8) image along a course, or of (T,8,8) images with one place each.

    Smooth up-scaling and the motion are one bicubic resampling.
    """
    cos, sin = course.angle.cos() / course.size, course.angle.sin() / course.size
    to_image = torch.stack(
        [
            torch.stack([cos, sin, -cos * course.x - sin * course.y], dim=1),
            torch.stack([-sin, cos, sin * course.x - cos * course.y], dim=1),
        ],
        dim=1,
    )
    count = len(course.x)
    grid = F.affine_grid(to_image.float(), [count, 1, size, size], align_corners=False)
    ink = F.grid_sample(
        images.expand(count, 8, 8).unsqueeze(1), grid, mode="bicubic", padding_mode="zeros", align_corners=False
    )
    return ((ink - 0.25) * 2.5).clamp(0, 1)  # a pen's edge rather than a blur


def _drifting_background(
    scraps: NDArray[np.float32], size: int, num_frames: int, rng: np.random.Generator
) -> torch.Tensor:
    """Background (T,3,H,W) that drifts slowly in a random direction, whatever the digit does."""
    margin = size // 4
    picture = _scatter(_texture(size + 2 * margin, rng), scraps, rng)
    drift = rng.uniform(-0.4, 0.4, 2) * margin
    time = np.linspace(-1.0, 1.0, num_frames) if num_frames > 1 else np.zeros(1)
    lefts, tops = (margin + np.round(axis * time).astype(int) for axis in drift)
    return torch.stack(
        [picture[:, top : top + size, left : left + size] for top, left in zip(tops, lefts, strict=True)]
    )


def _scatter(picture: torch.Tensor, scraps: NDArray[np.float32], rng: np.random.Generator) -> torch.Tensor:
    """Lay small pieces of digits, in any colour, on a picture (3,H,W); as pens' strokes they distract."""
    count = len(scraps)
    pieces = np.zeros_like(scraps)
    for piece, scrap in zip(pieces, scraps, strict=True):
        extent = int(rng.integers(2, 5))
        top, left = rng.integers(0, 8 - extent, 2)
        piece[2 : 2 + extent, 2 : 2 + extent] = scrap[top : top + extent, left : left + extent]
    place = Course(
        *(
            torch.from_numpy(rng.uniform(-bound, bound, count).astype(np.float32))
            for bound in (0.9, 0.9, math.pi)
        ),
        size=torch.full((count,), 0.45),
    )
    opacity = _ink(torch.from_numpy(pieces), place, picture.shape[-1])
    colours = torch.from_numpy(rng.uniform(0.0, 1.0, (count, 3, 1, 1)).astype(np.float32))
    for cover, colour in zip(opacity, colours, strict=True):
        picture = torch.lerp(picture, colour.expand_as(picture), cover.expand_as(picture))
    return picture


def _texture(size: int, rng: np.random.Generator) -> torch.Tensor:
    """A texture (3,H,W) in [0, 1]: noise of several grain sizes, and stripes, between two colours."""
    pattern = torch.zeros(size, size)
    for cells in (4, 10, 24):
        noise = torch.from_numpy(rng.normal(size=(1, 1, cells, cells)).astype(np.float32))
        grain = F.interpolate(noise, size=(size, size), mode="bicubic", align_corners=False)[0, 0]
        pattern += rng.uniform(0.2, 1.0) * grain
    position = torch.linspace(0.0, 1.0, size)
    direction = rng.uniform(0, math.pi)
    along = position[None, :] * math.cos(direction) + position[:, None] * math.sin(direction)
    stripes = torch.sin(2 * math.pi * rng.uniform(3, 14) * along + rng.uniform(0, 2 * math.pi))
    pattern += rng.choice([0.0, 1.5]) * stripes
    blend = torch.sigmoid(rng.uniform(0.8, 2.0) * pattern)
    hue, value = rng.uniform(), rng.uniform(0.25, 0.5)
    dark = colorsys.hsv_to_rgb(hue, rng.uniform(0.2, 0.9), value - 0.2)
    light = colorsys.hsv_to_rgb((hue + rng.uniform(0.0, 0.4)) % 1.0, rng.uniform(0.2, 0.9), value + 0.2)
    first, second = torch.tensor(dark).view(3, 1, 1), torch.tensor(light).view(3, 1, 1)
    return first + blend * (second - first)


def _bright_colour(background: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """A colour (3,) that is clearly brighter than the mean of the background (T,3,H,W)."""
    brightness = min(0.95, float(background.mean()) + rng.uniform(0.45, 0.6))
    tint = torch.from_numpy(rng.uniform(-0.15, 0.15, 3).astype(np.float32))
    return (brightness + tint - tint.mean()).clamp(0, 1)
