"""Find persons on keyframes, with a detector that is trained already, and write their boxes as AVA's csv files do.

The pictures are those of videos or of extracted frames. Rows are video,second,x1,y1,x2,y2,-1,score with boxes as
fractions of the picture (AVA.TRAIN_PREDICT_BOX_LISTS, AVA.TEST_PREDICT_BOX_LISTS). A call that was stopped goes on with
the next video.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from distinit_plugin.commands.common import number, positive, probability, seconds, whole
from distinit_plugin.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    place = parser.add_mutually_exclusive_group(required=True)
    place.add_argument("--videos", default="", metavar="FOLDER", help="folder of the videos, named as in the csv files")
    place.add_argument("--frames", default="", metavar="FOLDER", help="folder with a folder of frames for each video")
    parser.add_argument("--frame-list", default="", metavar="CSV", help="of --frames: AVA's frame_lists/….csv")
    parser.add_argument("--start", type=number, help="time of the first picture, seconds; default: 0, --frames 900")
    parser.add_argument("--fps", type=positive, default=30.0, help="of --frames")
    parser.add_argument(
        "--keyframes", nargs="+", default=[], metavar="CSV", help="ground truth, or rows of video,second: the keyframes"
    )
    parser.add_argument(
        "--seconds",
        nargs=2,
        type=whole(0),
        metavar=("FIRST", "LAST"),
        help="without --keyframes: these whole seconds of every video (AVA's: 902 1798); default: all of them",
    )
    parser.add_argument("--output", type=Path, required=True, help="the csv to be")
    parser.add_argument(
        "--arch", default="fasterrcnn_resnet50_fpn", help="detector of torchvision, or detectron2/CONFIG.yaml"
    )
    parser.add_argument("--weights", default="", help="a tag of torchvision or a file; default: COCO_V1, or the zoo's")
    parser.add_argument("--floor", type=probability, default=0.5, help="least score of a person")
    parser.add_argument("--most", type=whole(1), default=100, help="persons of a keyframe, at most")
    parser.add_argument("--short-side", type=whole(32), default=800, help="of the pictures that it sees, pixels")
    parser.add_argument("--batch-size", type=whole(1), default=4, help="keyframes at a time")
    parser.add_argument("--workers", type=whole(0), default=2, help="decoding processes")
    parser.add_argument("--device", default="", help="where it computes: cpu, cuda, cuda:1; default: a GPU if there is")
    parser.add_argument(
        "--timeout", type=seconds, default=60.0, help="seconds that a file may take to give one keyframe"
    )


def run(arguments: argparse.Namespace) -> int:
    """Detect; the exit code is 1 when a keyframe could not be read (the others are done)."""
    if arguments.frame_list and not arguments.frames:
        raise UserError("--frame-list is of --frames, which is missing.")
    if arguments.keyframes and arguments.seconds:
        raise UserError("--keyframes and --seconds are two ways to say the same. Give one of them.")

    from distinit_plugin.jobs.persons import Finder, Reading, detect_from_folder
    from distinit_plugin.jobs.places import Place

    result = detect_from_folder(
        Place(
            arguments.videos,
            arguments.frames,
            arguments.frame_list,
            (900.0 if arguments.frames else 0.0) if arguments.start is None else arguments.start,
            arguments.fps,
        ),
        arguments.output,
        Finder(arguments.arch, arguments.weights, arguments.floor, arguments.most, arguments.device),
        keyframe_files=arguments.keyframes,
        seconds=arguments.seconds,
        reading=Reading(arguments.short_side, arguments.batch_size, arguments.workers, arguments.timeout),
    )
    print(
        f"wrote {arguments.output}: {result.num_boxes} persons on {result.num_keyframes} keyframes; "
        f"{len(result.done)} videos done, {len(result.skipped)} were done before"
    )
    for path, reason in result.bad:
        print(f"error: {path}: {reason}", file=sys.stderr)
    return 1 if result.bad else 0
