"""Features and logits of long videos by sliding windows, one file per video; a stopped job goes on where it was."""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

from distinit_plugin.commands.common import add_input_arguments, seconds, whole
from distinit_plugin.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    parser.add_argument("videos", nargs="*", metavar="VIDEO", help="video files")
    parser.add_argument(
        "--list", default="", metavar="FILE", help="file with one path per line, from its own folder on"
    )
    parser.add_argument(
        "--checkpoint", required=True, help="of distinit run or distinit convert-weights (it says what its network is)"
    )
    parser.add_argument("--output", type=Path, required=True, help="folder of the files")
    spacing = parser.add_mutually_exclusive_group()
    spacing.add_argument(
        "--stride", type=whole(1), default=0, help="frames between the starts of windows; default: side by side"
    )
    spacing.add_argument("--fps", type=_rate, default=0.0, help="windows per second of video, instead")
    parser.add_argument(
        "--layer",
        action="append",
        default=[],
        metavar="NAME",
        help="features, logits, or a layer (see distinit describe), averaged over space and time; may be repeated; "
        "default: features, and logits where there is a classifier",
    )
    parser.add_argument("--format", default="npy", choices=["npy", "parquet"], help="of the files")
    parser.add_argument("--batch-size", type=whole(1), default=0, help="windows per forward pass")
    parser.add_argument(
        "--timeout", type=seconds, default=300.0, help="seconds that a file may take to be indexed or give a frame"
    )
    add_input_arguments(parser)


def _rate(word: str) -> float:
    try:
        value = float(word)
    except ValueError:
        value = math.nan
    if not 0 < value <= 1000:
        raise argparse.ArgumentTypeError(f"'{word[:40]}' is not allowed. Allowed: a number > 0 and ≤ 1000")
    return value


def run(arguments: argparse.Namespace) -> int:
    """Extract; the exit code is 1 when a video could not be read (the others are done)."""
    if not arguments.videos and not arguments.list:
        raise UserError("there are no videos: name some, or a file with one path per line by --list.")

    from distinit_plugin.data.windows import Spacing
    from distinit_plugin.jobs.extraction import extract
    from distinit_plugin.video.corpus import load_corpus

    listed = [record.path for record in load_corpus("list", "--list", path=arguments.list)] if arguments.list else []
    result = extract(
        [*arguments.videos, *listed],
        checkpoint=arguments.checkpoint,
        output=arguments.output,
        spacing=Spacing(arguments.stride, arguments.fps),
        layers=arguments.layer,
        fmt=arguments.format,
        batch_size=arguments.batch_size,
        timeout=arguments.timeout,
        opts=arguments.opts,
    )
    print(f"{len(result.done)} videos done, {len(result.skipped)} were there: {arguments.output}")
    for path, reason in result.bad:
        print(f"error: {path}: {reason}", file=sys.stderr)
    return 1 if result.bad else 0
