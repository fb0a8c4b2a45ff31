"""Write the student of a checkpoint alone: .safetensors, .pt2 (torch.export) or .onnx, compared with the network."""

from __future__ import annotations

import argparse
from pathlib import Path

from distinit_plugin.commands.common import add_input_arguments


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    parser.add_argument(
        "checkpoint",
        metavar="CHECKPOINT",
        help="of distinit run or distinit convert-weights (it says what its network is)",
    )
    parser.add_argument("output", type=Path, metavar="OUT", help="the file; its ending says the format")
    add_input_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Export and print how far the file is from the network."""
    from distinit_plugin.jobs.exporting import export

    deviation = export(arguments.checkpoint, arguments.output, arguments.opts)
    print(f"wrote {arguments.output}; largest difference from the network on random clips: {deviation:.1e}")
    return 0
