"""The demonstration: digits in motion, from raw videos to a table of results, without any download."""

from __future__ import annotations

import argparse
from pathlib import Path

from distinit_plugin.commands.common import whole


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    parser.add_argument("--output", type=Path, default=Path("runs/quickstart"), help="where everything is written")
    parser.add_argument("--seeds", type=whole(0), nargs="+", default=[0, 1, 2], help="seeds of the fine-tunings")
    parser.add_argument("--processes", type=whole(0), default=0, help="runs at once (default: one per core)")


def run(arguments: argparse.Namespace) -> int:
    """Run it and print the table."""
    from distinit_plugin.demos.distinit import run_quickstart

    run_quickstart(arguments.output, seeds=arguments.seeds, processes=arguments.processes)
    return 0
