"""Train a network that proposes where persons are, on keyframes with boxes, and test how many it finds.

The configuration is that of distinit run: the nodes AVA and KEYFRAMES say where keyframes and boxes are, RPN what the
network is, DATA, SOLVER and the others how it trains. A configuration of a video network serves as well: its network,
teachers and actions do not count here. The checkpoint is what RPN.WEIGHTS takes.
"""

from __future__ import annotations

import argparse

from distinit_plugin.commands.common import (
    add_config_arguments,
    add_dry_run,
    dry_run_words,
    load_from_arguments,
)
from distinit_plugin.config.rules import PERSON_RPN

WORDS = {
    "MODEL.MODEL_NAME": PERSON_RPN,
    "DETECTION.ENABLE": "True",
    "DISTILL.TEACHERS": "{}",
    "ACTION.LOSS_WEIGHT": "0.0",
    "ROI.PROPOSALS": "given",
    "ROI.REFINE_BOXES": "False",
    "KEYFRAMES.TEST_BOXES": "ground_truth",
}
"""What the verb says over any configuration."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    add_dry_run(parser)
    add_config_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Train, then test."""
    words = [word for pair in WORDS.items() for word in pair]
    cfg = load_from_arguments(arguments, [*words, *dry_run_words(arguments)])
    from distinit_plugin.jobs.running import run as run_job

    run_job(cfg)
    return 0
