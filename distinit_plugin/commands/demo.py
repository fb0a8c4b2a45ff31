"""Draw on a video what a trained network says of it: its classes, or boxes with what each person does.

Every frame is written, at its own time, without sound.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from distinit_plugin.commands.common import add_input_arguments, looks, number, probability, seconds, whole


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    parser.add_argument("video", help="a video file, or a folder of frames")
    parser.add_argument("output", type=Path, nargs="?", help="FILE.mp4; default: NAME_demo.mp4 here")
    parser.add_argument("--checkpoint", required=True, help="trained by distinit run, or of distinit convert-weights")
    parser.add_argument(
        "--classes",
        default="",
        help="names of classes: a file with one per line, or a label map (.pbtxt); default: from the checkpoint",
    )
    parser.add_argument("--top", type=whole(1), default=5, help="classes to show, at most")
    parser.add_argument("--floor", type=probability, default=0.1, help="least probability of a class that is shown")
    parser.add_argument("--every", type=looks, default=1.0, help="seconds between two looks at the video")
    found = parser.add_argument_group("boxes", "of a network that classifies boxes and does not find them")
    found.add_argument("--boxes", default="", metavar="CSV", help="boxes in AVA's form, of a video of this name")
    found.add_argument("--start", type=number, default=0.0, help="time stamp of the first picture in --boxes, seconds")
    found.add_argument("--detector", default="fasterrcnn_resnet50_fpn", help="of persons, as in detect-persons")
    found.add_argument("--detector-weights", default="", help="a tag of torchvision (COCO_V1) or a file")
    found.add_argument("--box-floor", type=probability, default=0.7, help="least score of a box")
    parser.add_argument(
        "--timeout", type=seconds, default=300.0, help="seconds that the video may take to be indexed or give a frame"
    )
    add_input_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Look, then draw."""
    from distinit_plugin.jobs.demo import Shown, demo
    from distinit_plugin.jobs.demo_boxes import BoxSource

    result = demo(
        arguments.video,
        arguments.output or Path(f"{Path(arguments.video).stem}_demo.mp4"),
        checkpoint=arguments.checkpoint,
        class_file=arguments.classes,
        shown=Shown(arguments.top, arguments.floor, arguments.every),
        boxes=BoxSource(
            arguments.boxes, arguments.start, arguments.detector, arguments.detector_weights, arguments.box_floor
        ),
        timeout=arguments.timeout,
        opts=arguments.opts,
    )
    print(f"wrote {result.output} ({result.num_frames} frames, {len(result.moments)} looks)")
    return 0
