"""Frame-mAP@0.5 of detections in AVA's csv form, as the official evaluator computes it; needs nothing but the files."""

from __future__ import annotations

import argparse
from pathlib import Path

from distinit_plugin.detection.variants import VARIANTS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    parser.add_argument(
        "--gt", required=True, metavar="CSV", help="ground truth: video,second,x1,y1,x2,y2,action,person"
    )
    parser.add_argument(
        "--dets", required=True, metavar="CSV", help="detections: video,second,x1,y1,x2,y2,action,score"
    )
    parser.add_argument("--label-map", required=True, metavar="PBTXT", help="the actions that count")
    parser.add_argument("--excluded", default="", metavar="CSV", help="keyframes that do not count: video,second")
    parser.add_argument(
        "--variant",
        nargs="+",
        choices=list(VARIANTS),
        default=["official"],
        help="whose evaluator; several may be given: "
        + "; ".join(f"{name}: {variant.difference}" for name, variant in VARIANTS.items()),
    )
    parser.add_argument("--output", type=Path, metavar="JSON", help="also write mAP, APs and counts to this file")


def run(arguments: argparse.Namespace) -> int:
    """Evaluate and print."""
    from distinit_plugin.jobs.ava_evaluation import evaluate_files

    evaluate_files(
        arguments.gt,
        arguments.dets,
        arguments.label_map,
        excluded=arguments.excluded,
        variants=list(dict.fromkeys(arguments.variant)),
        output=arguments.output,
    )
    return 0
