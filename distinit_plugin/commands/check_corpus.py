"""Decode a corpus in parallel and report what is broken, short, odd or duplicated, before a long job meets it."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from distinit_plugin.commands.common import seconds, whole


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    parser.add_argument("path", help="folder of videos, list, csv, or folder of split files")
    parser.add_argument(
        "--format", default="", help="folder, list, csv, ucf101, hmdb51, kinetics, frames; default: guess"
    )
    parser.add_argument("--root", default="", help="where the videos are, when PATH is a list")
    parser.add_argument("--subset", default="", help="train or test of UCF-101 and HMDB-51")
    parser.add_argument("--split", type=int, default=1, choices=[1, 2, 3], help="split of UCF-101 and HMDB-51")
    parser.add_argument("--min-frames", type=whole(1), default=8, help="videos with fewer frames are called short")
    parser.add_argument("--workers", type=whole(1), default=os.cpu_count() or 1, help="decoding processes")
    parser.add_argument("--timeout", type=seconds, default=300.0, help="seconds that one file may take")
    parser.add_argument("--output", type=Path, help="also write every finding to this csv")


def run(arguments: argparse.Namespace) -> int:
    """Print the report; the exit code is 1 when a file is broken."""
    from distinit_plugin.jobs.corpus_check import check

    report = check(
        arguments.path,
        fmt=arguments.format,
        root=arguments.root,
        subset=arguments.subset,
        split=arguments.split,
        min_frames=arguments.min_frames,
        num_workers=arguments.workers,
        timeout=arguments.timeout,
        output=arguments.output,
    )
    return 1 if report.broken else 0
