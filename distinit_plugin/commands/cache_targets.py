"""What a teacher gives for every clip and crop of the training grid, computed once and read back in training.

From the YAML file that trains (DISTILL.GRID says which clips and crops). Interrupted by whatever, the same command goes
on where it was. Targets for CORPUS.VAL are made, too, where it is set.
"""

from __future__ import annotations

import argparse
import sys

from distinit_plugin.commands.common import add_config_arguments, load_from_arguments, whole


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    parser.add_argument("--teacher", required=True, metavar="NAME", help="below DISTILL.TEACHERS")
    parser.add_argument("--output", default="", metavar="FOLDER", help="of the targets; default: the teacher's CACHE")
    parser.add_argument(
        "--dtype", default="float16", choices=["float16", "float32"], help="of the stored values; default: float16"
    )
    parser.add_argument(
        "--shard-videos",
        type=whole(1),
        default=64,
        metavar="N",
        help="videos of one file, which a kill costs; default: 64",
    )
    add_config_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Make the targets; the exit code is 1 when a video could not be read (the others are done)."""
    cfg = load_from_arguments(arguments, whole_job=False)

    from distinit_plugin.jobs.caching import cache_targets  # imports torch: only once the configuration is right

    parts = cache_targets(
        cfg, arguments.teacher, arguments.output, dtype=arguments.dtype, shard_videos=arguments.shard_videos
    )
    for part in parts:
        print(part.to_text())
        for path, reason in part.bad:
            print(f"error: {path}: {reason}", file=sys.stderr)
    return 1 if any(part.bad for part in parts) else 0
