"""Optical flow of a corpus: computed by several processes, kept as one small lossless file per video.

Interrupted by whatever, the same command goes on where it was. Flow that is missing, damaged or older than its video is
made again.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from distinit_plugin.commands.common import positive, seconds, whole


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    parser.add_argument("corpus", help="folder of videos, list, csv, or folder of split files")
    parser.add_argument("output", type=Path, help="folder of the flow")
    parser.add_argument(
        "--backend", default="dual_tvl1", help="dual_tvl1, dis_medium, dis_fast (OpenCV), tvl1, raft (torch)"
    )
    parser.add_argument("--weights", default="", help="of raft: a file, or a tag of torchvision")
    parser.add_argument("--device", default="cpu", help="where it computes: cpu, cuda, cuda:1")
    parser.add_argument(
        "--size", default="256", help="size of the frames before: short side, WIDTHxHEIGHT, or native; default: 256"
    )
    parser.add_argument("--bound", type=positive, default=20.0, help="largest motion that is kept, pixels; default: 20")
    parser.add_argument(
        "--rounding",
        default="round",
        choices=["round", "floor"],
        help="to the nearest code (denseflow, mmaction2) or down (MediaPipe, I3D)",
    )
    parser.add_argument("--fps", type=positive, help="pick frames at this rate before; default: the video's own")
    parser.add_argument(
        "--format",
        default="store",
        choices=["store", "jpg"],
        help="one video file per video, or folders of flow_x_00001.jpg as denseflow writes them (large, not lossless)",
    )
    parser.add_argument(
        "--codec",
        default="h264",
        choices=["h264", "ffv1"],
        help="of the video files; ffv1: a third smaller, slower to read",
    )
    parser.add_argument("--quality", type=whole(1), default=95, help="of the pictures of --format jpg, at most 100")
    parser.add_argument(
        "--workers", type=whole(1), help="processes, of one thread each; default: one per core, on a GPU one"
    )
    parser.add_argument("--batch-size", type=whole(1), default=8, help="pairs that the back end gets at once")
    parser.add_argument("--verify", action="store_true", help="decode all of the flow that is there, not only its end")
    parser.add_argument(
        "--timeout", type=seconds, default=300.0, help="seconds that a video may take to be indexed or give a frame"
    )
    parser.add_argument(
        "--corpus-format", default="", help="folder, list, csv, ucf101, hmdb51, kinetics, frames; default: guess"
    )
    parser.add_argument("--root", default="", help="where the videos are, when CORPUS is a list")
    parser.add_argument("--subset", default="", help="train or test of UCF-101 and HMDB-51")
    parser.add_argument("--split", type=int, default=1, choices=[1, 2, 3], help="split of UCF-101 and HMDB-51")


def run(arguments: argparse.Namespace) -> int:
    """Extract; the exit code is 1 when a video could not be read (the others are done)."""
    from distinit_plugin.jobs.corpus_check import read_corpus
    from distinit_plugin.jobs.flow_extraction import extract_flow, make_settings

    options = {"weights": arguments.weights} if arguments.weights else {}
    settings = make_settings(
        arguments.backend,
        options,
        bound=arguments.bound,
        rounding=arguments.rounding,
        size=arguments.size,
        fps=arguments.fps,
        layout=arguments.format,
        codec=arguments.codec,
        quality=arguments.quality,
    )
    corpus = read_corpus(
        arguments.corpus,
        fmt=arguments.corpus_format,
        root=arguments.root,
        subset=arguments.subset,
        split=arguments.split,
    )
    result = extract_flow(
        corpus,
        arguments.output,
        settings,
        backend=arguments.backend,
        options=options,
        device=arguments.device,
        num_workers=arguments.workers or (os.cpu_count() or 1 if arguments.device == "cpu" else 1),
        batch_size=arguments.batch_size,
        timeout=arguments.timeout,
        verify=arguments.verify,
    )
    print(f"{arguments.output}: {result.to_text()}")
    for path, reason in result.bad:
        print(f"error: {path}: {reason}", file=sys.stderr)
    return 1 if result.bad else 0
