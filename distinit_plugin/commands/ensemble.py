"""Average the saved test scores of any number of runs, and print each one's accuracies and those of all together."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    parser.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN", help="output folders of runs with a test, or scores.npz files"
    )
    parser.add_argument(
        "--combine", default="probs", choices=["probs", "logits"], help="what is averaged; default: probabilities"
    )
    parser.add_argument("--weights", type=float, nargs="+", default=[], help="one per run; default: equal")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers to this file")


def run(arguments: argparse.Namespace) -> int:
    """Print the table."""
    from distinit_plugin.jobs.ensembling import ensemble

    ensemble(arguments.runs, combine=arguments.combine, weights=arguments.weights, json_file=arguments.json)
    return 0
