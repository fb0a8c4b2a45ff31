"""Print parameters, GMACs and measured latency of networks side by side, with the flow that they need.

Each argument is a row: a YAML file, or several joined by '+' whose scores are averaged (D3D.yaml+S3DG.yaml). A row's
latency is that of one test clip through its networks, one after the other, and of computing that clip's flow where one
of them sees flow, stored or not. No weights, videos or teachers are needed.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from distinit_plugin.commands.common import load_network_cfg, whole
from distinit_plugin.config.load import resolve_config
from distinit_plugin.errors import ConfigError, UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    parser.add_argument("rows", nargs="+", metavar="CONFIG[+CONFIG…]", help="a YAML file, or several joined by '+'")
    parser.add_argument(
        "--flow", nargs="+", default=[], metavar="BACKEND", help="what computes flow, a row each; default: FLOW.BACKEND"
    )
    parser.add_argument("--rounds", type=whole(1), default=9, help="how often everything is measured in turns (9)")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: a GPU where there is one")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers to this file")
    parser.add_argument(
        "--opts",
        nargs=argparse.REMAINDER,
        default=[],
        metavar="KEY VALUE",
        help="over every file, last on the line (CORPUS.TEST_NUM_FRAMES 64)",
    )


def run(arguments: argparse.Namespace) -> int:
    """Print the table."""
    rows = [files_of(row) for row in arguments.rows]
    loaded = {file: load_network_cfg([file], arguments.opts) for row in rows for file in row}

    from distinit_plugin.jobs.costs import compare_costs

    compare_costs(
        rows,
        loaded,
        backends=arguments.flow,
        rounds=arguments.rounds,
        device=arguments.device,
        json_file=arguments.json,
    )
    return 0


def files_of(row: str) -> list[str]:
    """The files of one row; a '+' in the name of a file that exists is part of the name.

    Raises:
        UserError: There is nothing on one side of a '+'.
    """
    try:
        resolve_config(row)
    except ConfigError:
        files = row.split("+")
        if not all(files):
            raise UserError(f"'{row}' has no name beside a '+'. Join YAML files as in D3D.yaml+S3DG.yaml.") from None
        return files
    return [row]
