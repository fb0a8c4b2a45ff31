"""Print a network's parameters, GMACs, and the shape, strides and receptive field of its layers; needs no weights."""

from __future__ import annotations

import argparse
from pathlib import Path

from distinit_plugin.commands.common import add_config_arguments, load_network_from_arguments, whole
from distinit_plugin.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    parser.add_argument(
        "model", nargs="?", metavar="MODEL", help="a network by name (torchvision/NAME, too); default: that of --cfg"
    )
    parser.add_argument("--frames", type=whole(1), help="frames of the clip (DATA.NUM_FRAMES)")
    parser.add_argument("--crop", type=whole(8), help="its height and width, pixels (DATA.TEST_CROP_SIZE)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write everything to this file")
    add_config_arguments(parser, required=False)


def run(arguments: argparse.Namespace) -> int:
    """Print the description."""
    if not arguments.model and not arguments.cfg_files:
        raise UserError("name a network (distinit describe Res3D), or give a YAML file by --cfg.")
    words: list[str] = []
    if arguments.model:
        words += ["MODEL.MODEL_NAME", arguments.model]
    if arguments.frames:
        words += ["DATA.NUM_FRAMES", str(arguments.frames)]
    if arguments.crop:
        words += [word for key in ("TRAIN", "TEST") for word in (f"DATA.{key}_CROP_SIZE", str(arguments.crop))]
    cfg = load_network_from_arguments(arguments, words)

    from distinit_plugin.jobs.description import describe_network

    describe_network(cfg, json_file=arguments.json)
    return 0
