"""One page about runs as an HTML file that needs nothing else: results, published numbers, curves, classes, times."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    parser.add_argument(
        "runs", nargs="*", type=Path, metavar="RUN", help="output folders of runs, or folders of such folders"
    )
    parser.add_argument("--study", type=Path, metavar="FILE.json", help="rows, seeds and baseline of a study's runs")
    parser.add_argument(
        "--output", type=Path, default=Path("report.html"), metavar="FILE.html", help="default: report.html"
    )
    parser.add_argument(
        "--pictures",
        nargs="+",
        default=[],
        type=Path,
        metavar="FILE.png",
        help="also on the page: what distinit visualize drew (tsne, entropy, epe, flow), or any other PNG",
    )
    parser.add_argument(
        "--markdown", action="store_true", help="also as Markdown beside it, with the pictures in a folder"
    )


def run(arguments: argparse.Namespace) -> int:
    """Write the page."""
    from distinit_plugin.jobs.report import report

    report(
        arguments.runs,
        arguments.output,
        study=arguments.study,
        pictures={str(path): path for path in arguments.pictures},
        markdown=arguments.markdown,
    )
    return 0
