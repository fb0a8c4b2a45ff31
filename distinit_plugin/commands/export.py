"""Write the student of a checkpoint alone: .safetensors, .pt2 (torch.export) or .onnx, compared with the network."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="of distinit run (it holds its own configuration)")
    parser.add_argument("output", type=Path, metavar="OUT", help="the file; its ending says the format")


def run(arguments: argparse.Namespace) -> int:
    """Export and print how far the file is from the network."""
    from distinit_plugin.jobs.exporting import export

    deviation = export(arguments.checkpoint, arguments.output)
    print(f"wrote {arguments.output}; largest difference from the network on random clips: {deviation:.1e}")
    return 0
