"""What works on this machine and what does not, with one sentence each of what to do; exit code 1: something is broken.

With --cfg also whether that job could start, and what PySlowFast would do with it without a word.
"""

from __future__ import annotations

import argparse

from distinit_plugin.commands.common import add_config_arguments, split_pairs


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--program",
        choices=["run", "slowfast"],
        default="",
        help="the verb that --cfg is for; default: slowfast for networks of PySlowFast, else run",
    )
    add_config_arguments(parser, required=False)


def run(arguments: argparse.Namespace) -> int:
    """Print the report."""
    from distinit_plugin.doctor.report import all_checks, print_report

    files, pairs = split_pairs(arguments.cfg_files)
    checks = all_checks(files, [*pairs, *arguments.opts], arguments.program)
    return 0 if print_report(checks, as_json=arguments.json) else 1
