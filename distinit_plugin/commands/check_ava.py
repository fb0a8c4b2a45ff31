"""Look through a data set of AVA's form before a long job does: annotations, lists, frames, videos."""

from __future__ import annotations

import argparse
from pathlib import Path

from distinit_plugin.commands.common import number, positive, seconds


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    parser.add_argument(
        "path", type=Path, help="the data set's folder, with annotations/, frame_lists/, frames/ and videos/ in it"
    )
    parser.add_argument("--annotations", type=Path, help="folder of csv files and label map; default: PATH/annotations")
    parser.add_argument("--frame-lists", type=Path, help="default: PATH/frame_lists, where it exists")
    parser.add_argument("--frames", type=Path, help="default: PATH/frames, where it exists")
    parser.add_argument("--videos", type=Path, help="default: PATH/videos, where it exists")
    parser.add_argument(
        "--video-start", type=number, default=0.0, help="time stamp of the videos' first picture (900: AVA's, cut)"
    )
    parser.add_argument("--frames-start", type=number, default=900.0, help="time stamp of the first extracted frame")
    parser.add_argument("--fps", type=positive, default=30.0, help="extracted frames per second")
    parser.add_argument(
        "--seconds", type=seconds, nargs=2, default=[902.0, 1798.0], help="first and last time stamp in use"
    )


def run(arguments: argparse.Namespace) -> int:
    """Print the report; the exit code is 1 when something is missing or wrong."""
    from distinit_plugin.jobs.ava_check import check

    report = check(
        arguments.path,
        annotations=arguments.annotations,
        frame_lists=arguments.frame_lists,
        frames=arguments.frames,
        videos=arguments.videos,
        video_start=arguments.video_start,
        frames_start=arguments.frames_start,
        fps=arguments.fps,
        seconds=(arguments.seconds[0], arguments.seconds[1]),
    )
    return 0 if report.usable else 1
