"""What several verbs share: the flags that name a configuration."""

from __future__ import annotations

import argparse
import os
import sys

from distinit_plugin.config.load import load_cfg
from distinit_plugin.config.node import CfgNode


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


def load_from_arguments(arguments: argparse.Namespace, extra: list[str] | None = None) -> CfgNode:
    """Load and check the configuration that the flags name; warnings go to standard error.

    Raises:
        UserError: Anything wrong with it, everything at once.
    """
    files, pairs = _split_pairs(arguments.cfg_files)
    cfg, warnings = load_cfg(files, [*pairs, *arguments.opts, *(extra or [])])
    for warning in warnings if os.environ.get("RANK", "0") == "0" else ():  # torchrun's other ranks have the same
        print(f"warning: {warning}", file=sys.stderr)
    return cfg


def _split_pairs(words: list[str]) -> tuple[list[str], list[str]]:
    """``--cfg a.yaml KEY VALUE`` without ``--opts`` is what people type: the words after the last YAML are pairs."""
    last = max((place for place, word in enumerate(words) if word.endswith((".yaml", ".yml"))), default=len(words) - 1)
    return words[: last + 1], words[last + 1 :]
