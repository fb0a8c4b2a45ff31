"""Print the top classes of videos by name, from a checkpoint of this program or converted weights."""

from __future__ import annotations

import argparse

from distinit_plugin.commands.common import add_input_arguments, whole


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    parser.add_argument("videos", nargs="+", metavar="VIDEO", help="video files")
    parser.add_argument(
        "--checkpoint", required=True, help="fine-tuned by distinit run, or of distinit convert-weights"
    )
    parser.add_argument("--classes", default="", help="file of class names, one per line; default: from the checkpoint")
    parser.add_argument("--top", type=whole(1), default=5, help="classes to print per video")
    parser.add_argument("--clips", type=whole(1, 10_000), default=10, help="uniform clips per video")
    add_input_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Print a short table per video; the exit code is 1 when a video could not be read."""
    from distinit_plugin.jobs.prediction import predict

    predictions = predict(
        arguments.videos,
        checkpoint=arguments.checkpoint,
        class_file=arguments.classes,
        top=arguments.top,
        num_clips=arguments.clips,
        opts=arguments.opts,
    )
    for prediction in predictions:
        print(prediction)
    return 0 if all(prediction.reason is None for prediction in predictions) else 1
