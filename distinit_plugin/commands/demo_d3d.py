"""The demonstration of D3D: labels that only motion tells, the flow stream, RGB S3D-G and D3D, without any download."""

from __future__ import annotations

import argparse
from pathlib import Path

from distinit_plugin.commands.common import whole


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    parser.add_argument("--output", type=Path, default=Path("runs/demo_d3d"), help="where everything is written")
    parser.add_argument("--seeds", type=whole(0), nargs="+", default=[0, 1, 2], help="seeds of the trainings")
    parser.add_argument("--processes", type=whole(0), default=0, help="runs at once (default: one per core)")
    parser.add_argument("--controls", action="store_true", help="also without action loss, and from the RGB stream")


def run(arguments: argparse.Namespace) -> int:
    """Run it and print the tables."""
    from distinit_plugin.demos.d3d import run_demo_d3d

    run_demo_d3d(arguments.output, seeds=arguments.seeds, processes=arguments.processes, controls=arguments.controls)
    return 0
