"""Which keyframes a person names, and where their pictures are."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from distinit_plugin.detection.files import read_frame_list, read_truth
from distinit_plugin.detection.keyframes import Moment
from distinit_plugin.detection.sources import VIDEO_EXTENSIONS, FrameFiles, Sources, VideoFiles
from distinit_plugin.errors import UserError, VideoError
from distinit_plugin.types import BadVideo


class Place(NamedTuple):
    """Where the pictures are.

    Attributes:
        videos: Folder of video files; empty: there are frames.
        frames: Folder with a folder of frames for each video.
        frame_list: AVA's list of frames, whose paths start from ``frames``; empty: whatever images there are.
        start: Time stamp of the first picture, seconds.
        fps: Of frames.
    """

    videos: str = ""
    frames: str = ""
    frame_list: str = ""
    start: float = 0.0
    fps: float = 30.0

    def open(self) -> tuple[Sources, list[str]]:
        """The pictures, and the names of the videos.

        Raises:
            UserError: A folder or list cannot be read, or holds nothing.
        """
        if self.videos:
            return VideoFiles(self.videos, start=self.start), names_in(self.videos, frames=False)
        lists = read_frame_list(self.frame_list) if self.frame_list else None
        names = names_in(self.frames, frames=True) if lists is None else sorted(lists)
        return FrameFiles(self.frames, lists, start=self.start, fps=self.fps), names


def names_in(folder: str, *, frames: bool) -> list[str]:
    """Names of the videos of a folder: its files, or its folders of frames.

    Raises:
        UserError: It cannot be read or holds none.
    """
    try:
        with os.scandir(folder) as entries:
            if frames:
                names = [entry.name for entry in entries if entry.is_dir()]
            else:
                split = [os.path.splitext(entry.name) for entry in entries]
                names = [stem for stem, ending in split if ending.lower() in VIDEO_EXTENSIONS]
    except OSError as error:
        raise UserError(f"{folder} cannot be read: {(error.strerror or str(error)).lower()}. Name another.") from error
    if not names:
        raise UserError(f"{folder} holds no {'folders of frames' if frames else 'videos'}. Name another folder.")
    return sorted(set(names))


def moments_between(names: Sequence[str], first: int, last: int) -> list[Moment]:
    """Every whole second of videos from ``first`` to ``last``, both included."""
    return [Moment(name, float(second)) for name in names for second in range(first, last + 1)]


def listed_moments(files: Sequence[str]) -> list[Moment]:
    """The keyframes that files of ground truth, or rows of video and second, name.

    Raises:
        UserError: A file cannot be read, or is no ground truth.
    """
    moments: set[Moment] = set()
    for file in files:
        table = read_truth(file)
        rows = zip(table.video.tolist(), table.seconds.tolist(), strict=True)
        moments |= {Moment(table.videos[video], second) for video, second in rows}
        moments |= {Moment(table.videos[int(video)], second) for video, second in table.keyframes.tolist()}
    return sorted(moments)


def moments_of(sources: Sources, names: Sequence[str], *, timeout: float | None) -> tuple[list[Moment], list[BadVideo]]:
    """Every whole second at which videos have pictures; and the videos that cannot be read."""
    moments, bad = [], []
    for name in names:
        try:
            with sources.open(name, sources.start, cache=None, timeout=timeout) as source:
                length = float(source.index.seconds[-1] - source.index.seconds[0])
        except VideoError as error:
            bad.append(BadVideo(error.path, error.reason))
            continue
        first, last = int(np.ceil(sources.start)), int(np.floor(sources.start + length))
        moments += moments_between([name], first, last)
    return moments, bad
