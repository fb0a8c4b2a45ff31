"""Print a configuration as it is after all its files and words: ``--cfg X.yaml [KEY VALUE …]``.

With ``--plain``: the YAML file by which a PySlowFast without this package fine-tunes what was trained here, from the
checkpoint in TRAIN.CHECKPOINT_FILE_PATH.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from distinit_plugin.commands.common import add_config_arguments, split_pairs
from distinit_plugin.config.load import read_cfg
from distinit_plugin.config.plain import holds_checkpoints, plain_problems, plain_yaml
from distinit_plugin.config.rules import NETWORK_SWITCHES
from distinit_plugin.config.theirs import is_borrowed
from distinit_plugin.errors import ConfigError, UserError
from distinit_plugin.files import write_text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    parser.add_argument("--plain", action="store_true", help="PySlowFast's keys alone, for fine-tuning there")
    parser.add_argument("--output", metavar="YAML", help="file to write; default: the standard output")
    add_config_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Print or write it."""
    files, pairs = split_pairs(arguments.cfg_files)
    reading = read_cfg(files, [*pairs, *arguments.opts], check=not arguments.plain)
    if reading.problems:
        raise ConfigError(reading.problems)
    text = reading.cfg.dump()
    if arguments.plain:
        name = reading.cfg.MODEL.MODEL_NAME
        if problems := list(plain_problems(reading.cfg)):
            raise ConfigError(problems)
        if not is_borrowed(name) and ("/" in name or name in NETWORK_SWITCHES):
            raise UserError(
                f"MODEL.MODEL_NAME: {name} is a network of this package, which PySlowFast alone does not have. Give "
                "one of PySlowFast's, or run distinit slowfast, which has them all."
            )
        if any(reading.cfg.CORPUS[use] for use in ("TRAIN", "VAL", "TEST")):
            print("warning: CORPUS is left out: give PySlowFast lists by DATA.PATH_TO_DATA_DIR", file=sys.stderr)
        if holds_checkpoints(reading.cfg.OUTPUT_DIR):
            text = "it holds checkpoints, from which PySlowFast would go on instead of fine-tuning; give it another"
            print(f"warning: OUTPUT_DIR {reading.cfg.OUTPUT_DIR} is left out: {text}", file=sys.stderr)
        text = plain_yaml(reading.cfg, reading.unhonoured)
    if arguments.output:
        write_text(Path(arguments.output), text)
    else:
        print(text, end="")
    return 0
