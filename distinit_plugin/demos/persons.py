"""A small data set in AVA's form: real H.264 videos of drawn figures that do several things at once.

A figure's pose and what it carries can be seen in one frame; whether it climbs, descends or stays, and whether it
flashes, only in several. Its box is exactly what is drawn of it.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from distinit_plugin.demos.files import Progress

ACTION_NAMES = ("stand", "sit", "raise arms", "stay", "climb", "descend", "carry", "flash")
"""Names of the actions; the first has number 1."""

STILL_ACTIONS = (1, 2, 3, 7)
"""Actions that one frame tells."""


@dataclass(frozen=True)
class PersonData:
    """Where the set is. The names of the files in ``annotations`` are the defaults of PySlowFast's AVA node.

    Attributes:
        folder: Root of all.
        videos: One ``NAME.mp4`` for each video, at 25 frames per second; its first picture has the time stamp 900.
        frames: Frames extracted at 30 per second from time stamp 900 on, ``NAME/NAME_000001.png`` and so on (with
            ``extract``; else an empty folder).
        frame_lists: ``train.csv`` and ``val.csv``, which list those.
        annotations: ``ava_train_v2.2.csv`` and ``ava_val_v2.2.csv`` (ground truth), ``ava_val_predicted_boxes.csv``
            and ``ava_train_predicted_boxes.csv`` (as of a detector, with scores), ``ava_val_excluded_timestamps_v2.2.csv``
            and the label map ``ava_action_list_v2.2_for_activitynet_2019.pbtxt``.
    """

    folder: Path
    videos: Path
    frames: Path
    frame_lists: Path
    annotations: Path

    def options(self, source: Literal["videos", "frames"] = "videos") -> list[str]:
        """``KEY VALUE`` pairs that make a configuration read the set."""
        places = ["AVA.ANNOTATION_DIR", str(self.annotations), "MODEL.NUM_CLASSES", str(len(ACTION_NAMES))]
        if source == "videos":
            return [*places, "KEYFRAMES.VIDEO_DIR", str(self.videos), "KEYFRAMES.VIDEO_START", "900.0"]
        return [*places, "AVA.FRAME_DIR", str(self.frames), "AVA.FRAME_LIST_DIR", str(self.frame_lists)]


def make_persons(
    folder: str | os.PathLike[str],
    *,
    seed: int = 0,
    num_train: int = 32,
    num_test: int = 12,
    num_keyframes: int = 10,
    height: int = 96,
    width: int = 128,
    extract: bool = False,
    on_progress: Progress | None = None,
) -> PersonData:
    """Write the set, or return at once when the same one is there already. Every file is a pure function of the arguments.

    Args:
        folder: Where to write; made if missing. It must be empty or hold a set that this function made.
        seed: Seed of everything.
        num_train: Training videos.
        num_test: Validation (and test) videos.
        num_keyframes: Annotated seconds of each video: 902, 903, …
        height: Of the videos, even, pixels.
        width: Of the videos, even, pixels.
        extract: Also write the frames.
        on_progress: Called as ``on_progress(videos_done, videos_in_all)``.

    Raises:
        UserError: A number that makes no sense, a folder with other files, or PyAV without an H.264 encoder.
    """
    raise NotImplementedError
