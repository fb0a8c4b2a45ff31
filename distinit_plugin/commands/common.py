"""What several verbs share: the flags that name a configuration."""

from __future__ import annotations

import argparse
import math
import os
import re
import sys
from collections.abc import Callable

from distinit_plugin.config.load import load_cfg, load_network_cfg, read_cfg
from distinit_plugin.config.node import CfgNode
from distinit_plugin.errors import ConfigError


def whole(least: int, most: int | None = None) -> Callable[[str], int]:
    """The type of a flag that takes whole numbers (of nine digits at most) from ``least`` to ``most``."""
    upper = "" if most is None else f" and ≤ {most}"

    def parse(word: str) -> int:
        value = int(word) if re.fullmatch(r"[-+]?[0-9]{1,9}", word) else None
        if value is None or value < least or (most is not None and value > most):
            raise argparse.ArgumentTypeError(f"'{word[:40]}' is not allowed. Allowed: a whole number ≥ {least}{upper}")
        return value

    return parse


def _real(allowed: str, fits: Callable[[float], bool]) -> Callable[[str], float]:
    """The type of a flag that takes some of the real numbers; ``allowed`` says which."""

    def parse(word: str) -> float:
        try:
            value = float(word)
        except ValueError:
            value = math.nan
        if not fits(value):
            raise argparse.ArgumentTypeError(f"'{word[:40]}' is not allowed. Allowed: {allowed}")
        return value

    return parse


seconds = _real("seconds, a number > 0", lambda value: 0 < value < math.inf)
"""The type of a flag that takes a duration."""

looks = _real("seconds, a number ≥ 0.001", lambda value: 0.001 <= value < math.inf)
"""The type of a flag that takes the time between two looks at a video."""

positive = _real("a number > 0", lambda value: 0 < value < math.inf)
"""The type of a flag that takes any number above 0."""

number = _real("a number", math.isfinite)
"""The type of a flag that takes any finite number."""

probability = _real("a number from 0 to 1", lambda value: 0 <= value <= 1)
"""The type of a flag that takes a number from 0 to 1."""


def add_config_arguments(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    """Declare ``--cfg`` and ``--opts`` (also plain trailing ``KEY VALUE`` pairs)."""
    parser.add_argument(
        "--cfg",
        dest="cfg_files",
        nargs="+",
        action="extend",
        required=required,
        default=None if required else [],
        metavar="YAML",
        help="one or more YAML files, later ones override; a shipped name such as configs/DistInit/X.yaml works too",
    )
    parser.add_argument(
        "--opts", nargs=argparse.REMAINDER, default=[], metavar="KEY VALUE", help="overrides, last on the line"
    )


def add_dry_run(parser: argparse.ArgumentParser) -> None:
    """Declare ``--dry-run``."""
    parser.add_argument("--dry-run", action="store_true", help="print shapes, cost and expected duration, then stop")


def dry_run_words(arguments: argparse.Namespace) -> list[str]:
    """The ``KEY VALUE`` words that ``--dry-run`` stands for."""
    return ["RUNNER.DRY_RUN", "True"] if arguments.dry_run else []


def add_input_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare ``--opts`` of the verbs that read one file with its network."""
    parser.add_argument(
        "--opts",
        nargs=argparse.REMAINDER,
        default=[],
        metavar="KEY VALUE",
        help="what the network is fed (DATA.NUM_FRAMES 64 DATA.TEST_CROP_SIZE 224) and, where it runs, how it computes "
        "(RUNNER.PRECISION fp32), last on the line; default: what the file says, which converted weights do in part",
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
    files, pairs = split_pairs(arguments.cfg_files)
    reading = read_cfg(files, [*pairs, *arguments.opts, *(extra or [])])
    for warning in (
        reading.warnings if os.environ.get("RANK", "0") == "0" else ()
    ):  # torchrun's other ranks have the same
        print(f"warning: {warning}", file=sys.stderr)
    problems = list(reading.problems)
    if problems and whole_job:
        from distinit_plugin.jobs.corpora import Corpora
        from distinit_plugin.jobs.preflight import job_problems

        problems += job_problems(reading.cfg, Corpora(reading.cfg), reading.wrong)
    if problems:
        raise ConfigError(problems)
    return reading.cfg


def load_network_from_arguments(arguments: argparse.Namespace, words: list[str]) -> CfgNode:
    """As ``load_from_arguments``, where only the network counts: there need be no videos, teachers or purpose.

    Args:
        arguments: With the flags of ``add_config_arguments``, of which ``--cfg`` may be missing.
        words: ``KEY VALUE`` words between the YAML and ``--opts``.

    Raises:
        UserError: Anything wrong with the keys or the network's switches, everything at once.
    """
    files, pairs = split_pairs(arguments.cfg_files)
    return load_network_cfg(files, [*pairs, *words, *arguments.opts])


def load_corpora_from_arguments(arguments: argparse.Namespace) -> CfgNode:
    """As ``load_from_arguments`` of the YAML files alone, where only the videos count.

    Raises:
        UserError: A file cannot be read, or has keys that do not exist.
    """
    return load_cfg(arguments.cfg_files, check=False)[0]


def split_pairs(words: list[str]) -> tuple[list[str], list[str]]:
    """``--cfg a.yaml KEY VALUE`` without ``--opts`` is what people type: the words after the last YAML are pairs."""
    last = max((place for place, word in enumerate(words) if word.endswith((".yaml", ".yml"))), default=len(words) - 1)
    return words[: last + 1], words[last + 1 :]
