"""How much motion is in the features of a network? Decoders of flow are trained on its layers (D3D, section 3).

The YAML file is that of any network: its clips, corpora (without labels), schedule and FLOW are those of the decoders'
training. Printed is the end-point error of the decoded flow on CORPUS.TEST, in pixels, beside that of no motion at all;
OUTPUT_DIR/motion holds the numbers, the plot and pictures.
"""

from __future__ import annotations

import argparse

from distinit_plugin.commands.common import add_config_arguments, load_from_arguments


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    parser.add_argument("--layers", nargs="+", default=[], metavar="LAYER", help="default: those that the YAML names")
    parser.add_argument(
        "--checkpoint",
        default="",
        metavar="FILE",
        help="the network's weights; default: as for distinit probe; random: none, as a control",
    )
    parser.add_argument(
        "--decoder", default="", choices=("simple", "spatial", "pwc"), help="default: the YAML's, or pwc"
    )
    parser.add_argument(
        "--finetune", action="store_true", help="train the network, too, for each layer anew; default: it is frozen"
    )
    parser.add_argument("--controls", action="store_true", help="also evaluate still, reversed and shuffled clips")
    parser.add_argument(
        "--flow-network", default="", metavar="FILE", help="YAML or checkpoint of a network of flow, probed alike"
    )
    parser.add_argument(
        "--unit-direction", action="store_true", help="scale the decoded (sin, cos) to length 1, and no mag below 0"
    )
    parser.add_argument("--name", default="", help="of the network in tables and plots; default: from OUTPUT_DIR")
    parser.add_argument(
        "--beside", nargs="+", default=[], metavar="FOLDER", help="OUTPUT_DIR/motion of earlier probes, for the plot"
    )
    add_config_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Train, evaluate, print."""
    cfg = load_from_arguments(arguments, whole_job=False)

    from distinit_plugin.jobs.motion_probe import probe_motion

    probe_motion(
        cfg,
        arguments.checkpoint,
        arguments.layers,
        decoder=arguments.decoder,
        finetune=arguments.finetune,
        controls=arguments.controls,
        flow_network=arguments.flow_network,
        unit_direction=arguments.unit_direction,
        name=arguments.name,
        beside=arguments.beside,
    )
    return 0
