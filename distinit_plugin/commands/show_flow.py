"""The optical flow of a video as colour (direction: hue, length: saturation) with its frames: a PNG sheet or a video.

The flow is computed, or read from a store with --store.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from distinit_plugin.commands.common import positive, seconds, whole


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    parser.add_argument("video", help="a video file, or a folder of frames")
    parser.add_argument("output", type=Path, help="FILE.png: a sheet of some frames; FILE.mp4: all of the video")
    add_flow_arguments(parser)


def add_flow_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare where flow is from and how it is drawn."""
    parser.add_argument("--store", default="", metavar="FOLDER", help="show the flow that is kept there (extract-flow)")
    parser.add_argument(
        "--backend", default="dual_tvl1", help="otherwise: dual_tvl1, dis_medium, dis_fast (OpenCV), tvl1, raft"
    )
    parser.add_argument("--weights", default="", help="of raft: a file, or a tag of torchvision")
    parser.add_argument("--device", default="cpu", help="where it computes: cpu, cuda, cuda:1")
    parser.add_argument("--size", default="256", help="size of the frames before: short side, WIDTHxHEIGHT, or native")
    parser.add_argument("--frames", type=whole(1), default=8, help="frames of the sheet, evenly spaced")
    parser.add_argument(
        "--largest", type=positive, help="length of the full colour, pixels; default: from the flow, at least 1"
    )
    parser.add_argument(
        "--timeout", type=seconds, default=300.0, help="seconds that the video may take to be indexed or give a frame"
    )


def run(arguments: argparse.Namespace) -> int:
    """Draw."""
    from distinit_plugin.jobs.flow_pictures import show_flow

    show_flow(arguments.video, arguments.output, **flow_options(arguments))
    return 0


def flow_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """The flags of ``add_flow_arguments`` as arguments of the job."""
    return {
        "store": arguments.store,
        "backend": arguments.backend,
        "options": {"weights": arguments.weights} if arguments.weights else {},
        "device": arguments.device,
        "size": arguments.size,
        "num_frames": arguments.frames,
        "largest": arguments.largest,
        "timeout": arguments.timeout,
    }
