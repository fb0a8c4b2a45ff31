"""What several verbs share: the flags that name a configuration."""

from __future__ import annotations

import argparse
import sys

from distinit_plugin.config.load import read_cfg
from distinit_plugin.config.node import CfgNode
from distinit_plugin.errors import ConfigError


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare ``--cfg`` and ``--opts`` (also plain trailing ``KEY VALUE`` pairs)."""
    parser.add_argument(
        "--cfg",
        dest="cfg_files",
        nargs="+",
        action="extend",
        required=True,
        metavar="YAML",
        help="one or more YAML files, later ones override; a shipped name such as configs/DistInit/X.yaml works too",
    )
    parser.add_argument(
        "--opts", nargs=argparse.REMAINDER, default=[], metavar="KEY VALUE", help="overrides, last on the line"
    )


def load_from_arguments(
    arguments: argparse.Namespace, extra: list[str] | None = None, *, whole_job: bool = True
) -> CfgNode:
    """Load and check the configuration that the flags name; warnings go to standard error.

    Args:
        arguments: With the flags of ``add_config_arguments``.
        extra: Further ``KEY VALUE`` words.
        whole_job: When something is wrong with it, also look for what is wrong with the videos and weights that it
            names, so that everything is told at once. (A good one is looked at by the job itself.)

    Raises:
        UserError: Anything wrong with it, everything at once.
    """
    files, pairs = _split_pairs(arguments.cfg_files)
    reading = read_cfg(files, [*pairs, *arguments.opts, *(extra or [])])
    for warning in reading.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    problems = list(reading.problems)
    if problems and whole_job:
        from distinit_plugin.jobs.corpora import Corpora
        from distinit_plugin.jobs.preflight import job_problems

        problems += job_problems(reading.cfg, Corpora(reading.cfg), reading.wrong)
    if problems:
        raise ConfigError(problems)
    return reading.cfg


def _split_pairs(words: list[str]) -> tuple[list[str], list[str]]:
    """``--cfg a.yaml KEY VALUE`` without ``--opts`` is what people type: the words after the last YAML are pairs."""
    last = max((place for place, word in enumerate(words) if word.endswith((".yaml", ".yml"))), default=len(words) - 1)
    return words[: last + 1], words[last + 1 :]
