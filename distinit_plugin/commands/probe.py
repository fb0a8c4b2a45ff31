"""How good are the frozen features of a checkpoint on the labelled corpora of a YAML file? k-NN and a linear probe.

With INIT.TRAINABLE classifier also the Fixed protocol: features are extracted once, then the last layer is trained on
them with the YAML's schedule and optimizer, and tested; OUTPUT_DIR/fixed holds the results and the network.
"""

from __future__ import annotations

import argparse

from distinit_plugin.commands.common import add_config_arguments, load_from_arguments, whole


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    parser.add_argument("--neighbors", type=whole(1), default=20, help="k of the k-NN classifier")
    add_config_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Extract features of CORPUS.TRAIN and CORPUS.TEST and print the accuracies."""
    cfg = load_from_arguments(arguments, whole_job=False)

    from distinit_plugin.jobs.probing import probe

    probe(cfg, neighbors=arguments.neighbors)
    return 0
