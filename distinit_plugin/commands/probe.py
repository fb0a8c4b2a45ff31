"""k-NN and linear probe: how good are the frozen features of a checkpoint on the labelled corpora of a YAML file?"""

from __future__ import annotations

import argparse

from distinit_plugin.commands.common import add_config_arguments, load_from_arguments, whole


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    parser.add_argument("--neighbors", type=whole(1), default=20, help="k of the k-NN classifier")
    add_config_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Extract features of CORPUS.TRAIN and CORPUS.TEST and print both accuracies."""
    cfg = load_from_arguments(arguments, whole_job=False)

    from distinit_plugin.jobs.probing import probe

    probe(cfg, neighbors=arguments.neighbors)
    return 0
