"""TV-L1 in torch against OpenCV's DualTVL1: how far apart, and how fast; the other back ends beside them.

    python benchmarks/flow.py --videos FILE [FILE …] [--pairs FOLDER] [--sizes 224 112] [--threads 1 2] [--device cuda]

* Agreement on pairs with ground truth (``--pairs``: folders with frame10.png, frame11.png, Middlebury's flow10.flo) and
  on neighbouring frames of videos: mean and 99th percentile of the end-point differences of all valid pixels.
* Speed: every back end on the same frames in one process, taking turns, with equal numbers of threads, on the CPU. With
  ``--device cuda`` ours runs there, too, in batches of 1, 16 and 128.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import torch
from common import ROUNDS, environment, interleave, ratio, spread, table, verdict
from PIL import Image
from torch import Tensor

from distinit_plugin.flow import FlowBackend, build_flow_backend
from distinit_plugin.flow.measures import end_point_differences, end_point_error, known_flow, read_flo
from distinit_plugin.video.decode import open_video

FRAMES = (3, 7)
"""Neighbouring pairs of a video that are compared, and the number of the first frame."""

GPU_BATCHES = (1, 16, 128)


def set_threads(count: int) -> None:
    """Of both libraries."""
    torch.set_num_threads(count)
    cv2.setNumThreads(count)


def truth_pairs(folder: Path) -> Iterator[tuple[str, Tensor, Tensor, Tensor]]:
    """Name, frames (1,3,H,W) and true flow (2,H,W) of every pair in a folder."""
    for place in sorted(folder.iterdir()):
        if (place / "flow10.flo").is_file():
            frames = [_picture(place / f"frame{number}.png") for number in (10, 11)]
            yield place.name, frames[0], frames[1], read_flo(place / "flow10.flo")


def _picture(path: Path) -> Tensor:
    return torch.from_numpy(np.array(Image.open(path).convert("RGB"))).permute(2, 0, 1)[None].contiguous()


def video_frames(path: Path, size: int, count: int, begin: int = 0) -> Tensor:
    """``count`` frames (count,3,size,size), uint8; a short video begins again."""
    with open_video(str(path)) as reader:
        total = reader.index.num_frames
        numbers = [(begin + number) % total for number in range(count)]
        frames = {number: reader.read([number])[0] for number in sorted(set(numbers))}
    resized = [cv2.resize(np.asarray(frames[number]), (size, size), interpolation=cv2.INTER_AREA) for number in numbers]
    return torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2).contiguous()


def agreement(name: str, ours: Tensor, theirs: Tensor, truth: Tensor | None = None) -> list[str]:
    """A row: differences, and errors against the truth where there is one."""
    valid = torch.ones_like(ours[:, 0], dtype=torch.bool) if truth is None else known_flow(truth)[None]
    differences = end_point_differences(ours, theirs)[valid].double().numpy()
    mean, high = float(differences.mean()), float(np.percentile(differences, 99))
    row = [name, f"{mean:.4f} {verdict(mean, at_most=0.05)}", f"{high:.3f} {verdict(high, at_most=1)}"]
    if truth is None:
        return [*row, f"{theirs.norm(dim=1).mean():.2f}", "", ""]
    errors = [end_point_error(flow[0], truth) for flow in (theirs, ours)]
    quotient = errors[1] / errors[0]
    return [*row, "", f"{errors[0]:.4f}, {errors[1]:.4f}", f"{quotient:.3f} {verdict(quotient, at_most=1.02)}"]


def compare(arguments: argparse.Namespace) -> str:
    """The table of agreement."""
    set_threads(max(arguments.threads))
    ours, theirs = build_flow_backend("tvl1"), build_flow_backend("dual_tvl1")
    rows = []
    for name, first, second, truth in truth_pairs(arguments.pairs) if arguments.pairs else ():
        rows.append(agreement(name, _on(ours, first, second, arguments.device), theirs(first, second), truth))
    pairs, begin = FRAMES
    for path in arguments.videos:
        for size in arguments.sizes:
            frames = video_frames(path, size, pairs + 1, begin)
            flow = _on(ours, frames[:-1], frames[1:], arguments.device)
            rows.append(agreement(f"{path.name}, {size}²", flow, theirs(frames[:-1], frames[1:])))
    header = ["pair", "difference, mean px", "99th percentile", "mean flow", "EPE of OpenCV, of ours", "ours / OpenCV"]
    return table(header, rows)


def _on(backend: FlowBackend, first: Tensor, second: Tensor, device: str) -> Tensor:
    return backend(first.to(device), second.to(device)).cpu()


def speed(arguments: argparse.Namespace) -> str:
    """The table of speeds."""
    rows = []
    names = ["dual_tvl1", "tvl1", *arguments.others]
    backends = {name: build_flow_backend(name) for name in names}
    for size in arguments.sizes:
        batch = arguments.batch or max(4, round(8 * (112 / size) ** 2))
        frames = video_frames(arguments.videos[0], size, batch + 1)
        for threads in arguments.threads:
            set_threads(threads)
            runs = {name: _runner(backend, frames, "cpu") for name, backend in backends.items()}
            seconds = interleave(runs, arguments.rounds)
            for name in names:
                quotient = ratio(seconds["dual_tvl1"], seconds[name])
                judged = f" {verdict(quotient.median, at_least=0.8)}" if name == "tvl1" else ""
                rate = spread(batch / value for value in seconds[name])
                rows.append(
                    [f"{size}², {threads} threads, {batch} pairs, {name}", rate.text(), quotient.text() + judged]
                )
    if arguments.device == "cuda":
        rows += gpu_speed(backends["tvl1"], arguments)
    return table(["size, threads, batch, back end", "pairs / s (quartiles)", "× DualTVL1 (quartiles)"], rows)


def gpu_speed(backend: FlowBackend, arguments: argparse.Namespace) -> list[list[str]]:
    """Rows of ours on a GPU."""
    rows = []
    for size in arguments.sizes:
        for batch in GPU_BATCHES:
            run = _runner(backend, video_frames(arguments.videos[0], size, batch + 1), "cuda")
            seconds = interleave({"tvl1": run}, arguments.rounds)["tvl1"]
            rows.append([f"{size}², GPU, {batch} pairs, tvl1", spread(batch / value for value in seconds).text(), ""])
    return rows


def _runner(backend: FlowBackend, frames: Tensor, device: str) -> Callable[[int], object]:
    frames = frames.to(device)

    def run(number: int) -> None:
        backend(frames[:-1], frames[1:]).cpu()

    return run


def main(words: Sequence[str] | None = None) -> int:
    """Compare and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=Path, help="folder of folders with ground truth")
    parser.add_argument("--videos", type=Path, nargs="+", required=True)
    parser.add_argument("--sizes", type=int, nargs="+", default=[224, 112])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--batch", type=int, help="pairs of a call; by default 4 of 224², 8 of 112²")
    parser.add_argument("--others", nargs="*", choices=("dis_medium", "dis_fast"), default=["dis_medium", "dis_fast"])
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", choices=("agreement", "speed"))
    chosen = parser.parse_args(words)
    print(environment(opencv=cv2.__version__))
    parts: dict[str, Callable[[], str]] = {"agreement": partial(compare, chosen), "speed": partial(speed, chosen)}
    for name, part in parts.items():
        if chosen.only in (None, name):
            print(f"\n{part()}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
