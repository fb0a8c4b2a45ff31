"""Draw the curves of one or several runs (their json_stats.log files) as a PNG, with the numbers as CSV and JSON."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="output folders of runs")
    parser.add_argument("--output", type=Path, default=Path("curves.png"), help="the picture to write")


def run(arguments: argparse.Namespace) -> int:
    """Write the picture."""
    from distinit_plugin.jobs.visualize_runs import visualize_curves

    visualize_curves(arguments.runs, arguments.output)
    return 0
