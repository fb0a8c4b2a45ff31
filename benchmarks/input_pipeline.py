"""Clips per second of one process: our dataset against a bare PyAV loop, decord and PyTorchVideo, on the same frames.

    python benchmarks/input_pipeline.py [--videos FOLDER] [--rounds 9] [--clips 6] [--cpu-time]

Two parts. Synthetic videos (340×256, 300 frames, x264's defaults) with a key frame every 12 or 250 frames, 8 frames
of each clip that are 1 or 8 apart; and every video below ``--videos`` (``$DISTINIT_TEST_ASSETS/videos``) at 8×1.

What is compared, each on one thread, each opening the file anew for every clip:

* ``dataset``: ``ClipDataset[key]`` as training calls it, frame indices known: student view 112² and teacher view 224².
* ``dataset, student only``: the same with the student's view alone.
* ``dataset, first epoch``: the same as ``dataset``, but every clip also indexes its file.
* ``frames``: our reader alone, the same frames as RGB, no views.
* ``PyAV``: open, seek to the key frame before the first frame, decode to the last frame, convert the wanted ones to
  RGB with one scaler; no threads, no index, time stamps computed from the known frame rate, no views.
  ``PyAV + views``: and our two views of the result, which is what ``dataset`` gives.
* ``decord``: ``VideoReader(num_threads=1)`` and ``get_batch``; ``decord + views``: and our views of the result.
* ``PyTorchVideo``: ``LabeledVideoDataset`` (PyAV) with the same two views by torchvision, resized as uint8, which is
  faster than the floats that it gives. decord and PyTorchVideo are left out where they are not installed.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from fractions import Fraction
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import av
import numpy as np
import torch
from av.video.reformatter import VideoReformatter
from clips import FPS, write_clip
from common import ROUNDS, environment, interleave, ratio, spread, table, verdict
from torchvision.transforms.v2 import functional as tvf

from distinit_plugin.data.dataset import ClipDataset
from distinit_plugin.engine.memory import keep_freed_memory
from distinit_plugin.errors import UserError
from distinit_plugin.types import SampleKey, ViewSpec
from distinit_plugin.video import sampling
from distinit_plugin.video.corpus import load_corpus
from distinit_plugin.video.decode import open_video
from distinit_plugin.video.grid import Place
from distinit_plugin.video.index import FrameIndex, IndexCache
from distinit_plugin.video.transforms import Geometry, render_view

NUM_FRAMES, STUDENT, TEACHER = 8, 112, 224
VIDEO_KINDS = (".mp4", ".mov", ".avi", ".mkv")
COLUMNS = ("dataset", "student only", "first epoch", "frames", "PyAV")
Clock = Callable[[], float]


class Clip(NamedTuple):
    """What the dataset chose for a key."""

    path: str
    frames: np.ndarray
    geometry: Geometry


class Recorder(ClipDataset):
    """Notes the frames and the region that a key stands for, so that the peers decode the same."""

    def _clip(self, frames: FrameIndex, index: int, place: Place, rng: np.random.Generator) -> sampling.Clip:
        chosen = super()._clip(frames, index, place, rng)
        self.frames = chosen.timeline[chosen.places]
        return chosen

    def _regions(self, height: int, width: int, place: Place, rng: np.random.Generator) -> dict[str, Geometry]:
        regions = super()._regions(height, width, place, rng)
        self.geometry = regions["shared"]
        return regions

    def clip(self, key: SampleKey) -> Clip:
        """Frames and region of a key."""
        return Clip(self[key]["path"], self.frames, self.geometry)


def dataset(path: Path, rate: int, *, teacher: bool = True, kind: type[ClipDataset] = ClipDataset) -> Any:
    """The training dataset of a list with one video."""
    listing = path.with_suffix(".txt")
    listing.write_text(f"{path}\n")
    student = ViewSpec(num_frames=NUM_FRAMES, sampling_rate=rate, crop_size=STUDENT)
    specs = {"student/rgb": student}
    if teacher:
        specs["TEACHER/rgb"] = ViewSpec(num_frames=1, sampling_rate=rate, pick="center", crop_size=TEACHER)
    corpus = load_corpus("list", "VIDEOS", path=str(listing))
    return kind([corpus], specs, clip_spec=student, split="train", seed=0)


def pyav_frames(path: str, numbers: Sequence[int]) -> list[np.ndarray]:
    """The bare loop, for files whose frames lie at number/FPS seconds."""
    with av.open(path) as container:
        stream = container.streams.video[0]
        stream.thread_type = "NONE"
        assert stream.time_base is not None
        ticks = 1 / (FPS * stream.time_base)
        begin = stream.start_time or 0
        slots = {begin + int(number * ticks): slot for slot, number in enumerate(numbers)}
        container.seek(min(slots), stream=stream)
        scaler = VideoReformatter()
        frames: list[Any] = [None] * len(numbers)
        for frame in container.decode(stream):
            slot = slots.pop(frame.pts, None)
            if slot is not None:
                frames[slot] = scaler.reformat(frame, format="rgb24", threads=1).to_ndarray()
                if not slots:
                    break
        return frames


def views(frames: np.ndarray, geometry: Geometry) -> tuple[torch.Tensor, torch.Tensor]:
    """Our two views of decoded frames."""
    middle = (len(frames) - 1) // 2
    return render_view(frames, geometry, STUDENT), render_view(frames[middle : middle + 1], geometry, TEACHER)


def decord_frames(path: str, numbers: Sequence[int]) -> np.ndarray:
    """(n,H,W,3) by decord."""
    import decord

    try:
        frames: np.ndarray = decord.VideoReader(path, num_threads=1).get_batch(list(numbers)).asnumpy()
    except decord.DECORDError as error:
        raise RuntimeError("decord cannot read it") from error
    return frames


def pytorchvideo_clip(clip: Clip, rate: int) -> dict[str, torch.Tensor]:
    """One sample of a ``LabeledVideoDataset`` whose sampler gives just this clip."""
    from pytorchvideo.data import LabeledVideoDataset
    from pytorchvideo.data.clip_sampling import ClipInfo, ClipSampler

    first, last = int(clip.frames[0]), int(clip.frames[-1])
    begin, end = Fraction(2 * first - 1, 2 * FPS), Fraction(2 * last + 1, 2 * FPS)

    class Fixed(ClipSampler):
        def __call__(self, *arguments: Any) -> ClipInfo:
            return ClipInfo(begin, end, 0, 0, True)

        def reset(self) -> None:
            pass

    def transform(sample: dict[str, Any]) -> dict[str, torch.Tensor]:
        frames = sample["video"][:, ::rate].to(torch.uint8).transpose(0, 1)  # (T,3,H,W)
        assert len(frames) == NUM_FRAMES
        box = clip.geometry.top, clip.geometry.left, clip.geometry.height, clip.geometry.width
        if clip.geometry.flip:
            frames = frames.flip(-1)
            box = box[0], frames.shape[-1] - box[1] - box[3], box[2], box[3]
        middle = (NUM_FRAMES - 1) // 2
        student = tvf.resized_crop(frames, *box, [STUDENT, STUDENT], antialias=True)
        teacher = tvf.resized_crop(frames[middle : middle + 1], *box, [TEACHER, TEACHER], antialias=True)
        return {"student": student.transpose(0, 1).contiguous(), "teacher": teacher.transpose(0, 1).contiguous()}

    samples = LabeledVideoDataset(
        [(clip.path, {})], Fixed(1), torch.utils.data.SequentialSampler, transform, decode_audio=False
    )
    result: dict[str, torch.Tensor] = next(iter(samples))
    return result


def same_pixels(clip: Clip, rate: int, ours: Any, key: SampleKey) -> None:
    """Refuse to compare what is not the same: PyTorchVideo's student view must be ours up to its colour rounding."""
    view = next(value for name, value in ours[key]["views"].items() if value.shape[1] == NUM_FRAMES)
    other = pytorchvideo_clip(clip, rate)["student"]
    difference = (view.float() - other.float()).abs().mean()
    assert difference < 2, f"frames {clip.frames} of {clip.path} differ by {difference}"


def compare_settings(
    folder: Path, rounds: int, clips: int, gops: Sequence[int], rates: Sequence[int], clock: Clock
) -> None:
    """Print the table of the synthetic videos."""
    rows = []
    for gop in gops:
        path = write_clip(folder / f"gop{gop}.mp4", gop=gop)
        for rate in rates:
            rows.append([f"GOP {gop}, {NUM_FRAMES}×{rate}", *compare_setting(path, rate, rounds, clips, clock)])
    ratios = ["dataset / PyAV", "dataset / (PyAV + views)", "frames / PyAV", "dataset / PyTorchVideo"]
    print(table(["clips/s", *COLUMNS, *ratios], rows))
    print()


def compare_setting(path: Path, rate: int, rounds: int, clips: int, clock: Clock) -> list[str]:
    """One row of it."""
    recorder, ours, alone = (
        dataset(path, rate, kind=Recorder),
        dataset(path, rate),
        dataset(path, rate, teacher=False),
    )
    cache = IndexCache()
    keys = {number: [SampleKey(0, number * clips + n, 0) for n in range(clips)] for number in range(rounds)}
    keys[-1] = keys[0]
    chosen = {key: recorder.clip(key) for group in keys.values() for key in group}

    def each(one: Callable[[SampleKey, Clip], object]) -> Callable[[int], None]:
        def run(number: int) -> None:
            for key in keys[number]:
                one(key, chosen[key])

        return run

    def frames(key: SampleKey, clip: Clip) -> None:
        with open_video(clip.path, cache=cache) as reader:
            reader.read(clip.frames)

    def pyav_views(key: SampleKey, clip: Clip) -> None:
        views(np.stack(pyav_frames(clip.path, clip.frames.tolist())), clip.geometry)

    variants = {
        "dataset": each(lambda key, clip: ours[key]),
        "PyAV + views": each(pyav_views),
        "PyAV": each(lambda key, clip: pyav_frames(clip.path, clip.frames.tolist())),
        "frames": each(frames),
        "student only": each(lambda key, clip: alone[key]),
        "first epoch": each(lambda key, clip: dataset(path, rate)[key]),
    }
    if find_spec("pytorchvideo"):
        same_pixels(chosen[keys[0][0]], rate, ours, keys[0][0])
        variants["PyTorchVideo"] = each(lambda key, clip: pytorchvideo_clip(clip, rate))
    seconds = interleave(variants, rounds, clock)
    speed = {name: f"{spread(clips / value for value in values).median:.1f}" for name, values in seconds.items()}
    row = [speed[name] for name in COLUMNS]
    for peer, name in (("PyAV", "dataset"), ("PyAV + views", "dataset"), ("PyAV", "frames")):
        value = ratio(seconds[peer], seconds[name])
        row.append(f"{value.text()} {verdict(value.median, at_least=0.95)}")
    if "PyTorchVideo" not in seconds:
        return [*row, "not installed"]
    other = ratio(seconds["PyTorchVideo"], seconds["dataset"])
    return [*row, f"{other.text()} {verdict(other.median, at_least=1.4 if rate == 1 else 2.0)}"]


def compare_videos(folder: Path, links: Path, rounds: int, most: int, clock: Clock) -> None:
    """Print medians over real videos, ours against decord's."""
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in VIDEO_KINDS)[:most]
    with_views, decoding, slowest, left_out = [], [], [], []
    for number, path in enumerate(paths):
        link = links / f"{number}{path.suffix}"
        link.symlink_to(path)
        try:
            whole, alone = compare_video(link, rounds, clock)
        except (UserError, RuntimeError) as error:
            reader = "decord" if isinstance(error, RuntimeError) else "we"
            left_out.append(f"{path.name} ({reader} cannot)")
            continue
        with_views.append(whole)
        decoding.append(alone)
        slowest.append((whole, path.name))
    if not with_views:
        print(f"No video below {folder} can be read by both.")
        return
    rows = [
        [name, spread(values).text(), verdict(spread(values).median, at_least=0.9), f"{min(values):.2f}"]
        for name, values in (("dataset / decord + views", with_views), ("frames / decord", decoding))
    ]
    print(table([f"{len(with_views)} real videos, 8×1", "median (quartiles)", "target", "lowest"], rows))
    print("lowest: " + ", ".join(f"{name} {value:.2f}" for value, name in sorted(slowest)[:5]))
    if left_out:
        print(f"left out: {', '.join(left_out)}")


def compare_video(path: Path, rounds: int, clock: Clock) -> tuple[float, float]:
    """Clips/s of ours over decord's: with views, and frames alone; medians over the rounds."""
    recorder, ours, cache = dataset(path, 1, kind=Recorder), dataset(path, 1), IndexCache()
    chosen = {number: recorder.clip(SampleKey(0, max(number, 0), 0)) for number in range(-1, rounds)}
    decord_frames(str(path), chosen[0].frames)

    def frames(number: int) -> None:
        with open_video(path, cache=cache) as reader:
            reader.read(chosen[number].frames)

    def decord_views(number: int) -> None:
        clip = chosen[number]
        views(decord_frames(clip.path, clip.frames), clip.geometry)

    seconds = interleave(
        {
            "dataset": lambda number: ours[SampleKey(0, max(number, 0), 0)],
            "decord + views": decord_views,
            "frames": frames,
            "decord": lambda number: decord_frames(chosen[number].path, chosen[number].frames),
        },
        rounds,
        clock,
    )
    whole = ratio(seconds["decord + views"], seconds["dataset"])
    return whole.median, ratio(seconds["decord"], seconds["frames"]).median


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    assets = os.environ.get("DISTINIT_TEST_ASSETS")
    parser.add_argument("--videos", default=f"{assets}/videos" if assets else "", help="folder of real videos")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--clips", type=int, default=6, help="clips of a round of the synthetic videos")
    parser.add_argument("--gops", type=int, nargs="*", default=[12, 250])
    parser.add_argument("--rates", type=int, nargs="*", default=[1, 8])
    parser.add_argument("--cpu-time", action="store_true", help="processor time, where other jobs run beside")
    parser.add_argument("--most", type=int, default=1000, help="real videos at most")
    chosen = parser.parse_args(arguments)
    clock = time.process_time if chosen.cpu_time else time.perf_counter
    torch.set_num_threads(1)  # as in a worker
    keep_freed_memory()  # as in a training on a CPU; it holds for the peers too
    print(environment())
    with tempfile.TemporaryDirectory() as folder:
        compare_settings(Path(folder), chosen.rounds, chosen.clips, chosen.gops, chosen.rates, clock)
        if not chosen.videos:
            print("No real videos: name a folder by --videos.")
        elif not find_spec("decord"):
            print("decord is not installed (pip install decord): no comparison on real videos.")
        else:
            links = Path(folder) / "links"
            links.mkdir()
            compare_videos(Path(chosen.videos), links, chosen.rounds, chosen.most, clock)
    return 0


if __name__ == "__main__":
    sys.exit(main())
