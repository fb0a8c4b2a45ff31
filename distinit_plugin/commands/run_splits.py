"""Run a fine-tuning on all three splits of UCF-101 or HMDB-51 and print their average and deviation."""

from __future__ import annotations

import argparse

from distinit_plugin.commands.common import add_config_arguments, add_dry_run, dry_run_words, load_from_arguments


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    parser.add_argument("--splits", type=int, nargs="+", default=[1, 2, 3], choices=[1, 2, 3], help="which splits")
    add_dry_run(parser)
    add_config_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Train and test once per split, in OUTPUT_DIR/split_N, and print one table; or only check each split."""
    cfg = load_from_arguments(arguments, dry_run_words(arguments))

    from distinit_plugin.jobs.splits import run_splits

    run_splits(cfg, tuple(arguments.splits))
    return 0
