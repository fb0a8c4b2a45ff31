"""Where the pictures of annotated videos are: the videos themselves, or frames that were extracted from them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Protocol, overload

from distinit_plugin.errors import UserError, VideoError
from distinit_plugin.video.decode import open_video
from distinit_plugin.video.guard import describe
from distinit_plugin.video.images import ImageReader, list_frames
from distinit_plugin.video.index import IndexCache
from distinit_plugin.video.source import FrameSource

VIDEO_EXTENSIONS = (".mp4", ".mkv", ".webm", ".avi", ".mov", ".m4v", ".flv", ".mpg", ".mpeg", ".ts")
"""File name endings of videos, lower case; of several files of one name the first of these is taken."""

_LISTED_FOLDERS = 8
"""Folders of frames whose names a process keeps."""


class Sources(Protocol):
    """The pictures of some videos, by the videos' names."""

    @property
    def start(self) -> float:
        """The time stamp of the first picture, seconds."""
        ...

    def path(self, name: str) -> str:
        """The file or folder of a video, which need not exist."""
        ...

    def has(self, name: str) -> bool:
        """Whether there is anything at all of a video."""
        ...

    def open(self, name: str, second: float, *, cache: IndexCache | None, timeout: float | None) -> FrameSource:
        """The frames of a video.

        Args:
            name: The video.
            second: A time stamp around which frames will be read.
            cache: Frame indices already known.
            timeout: Seconds that it may take; ``None``: any time.

        Raises:
            VideoError: There are none, or they cannot be read.
        """
        ...


class VideoFiles:
    """A folder with one video file for each name, whatever its ending."""

    def __init__(self, folder: str | os.PathLike[str], *, start: float = 0.0) -> None:
        """Look which files there are.

        Args:
            folder: Of the videos.
            start: The time stamp of the first picture of each file, seconds: 0 for whole videos.

        Raises:
            UserError: The folder cannot be read, or has no videos.
        """
        self.start = start
        self._folder = os.fspath(folder)
        try:
            names = os.listdir(folder)
        except OSError as error:
            raise UserError(f"{folder} cannot be read: {describe(error)}. Name the folder of the videos.") from error
        ranks = {ending: rank for rank, ending in enumerate(VIDEO_EXTENSIONS)}
        parts = [os.path.splitext(name) for name in names]
        found = [(ranks[ending.lower()], stem, ending) for stem, ending in parts if ending.lower() in ranks]
        self._endings = {stem: ending for _, stem, ending in sorted(found, reverse=True)}
        if not self._endings:
            raise UserError(f"{folder} has no videos (files that end in {', '.join(VIDEO_EXTENSIONS)}).")

    def path(self, name: str) -> str:
        """The file of a video; where there is none, the name that it would begin with."""
        return os.path.join(self._folder, f"{name}{self._endings.get(name, '')}")

    def has(self, name: str) -> bool:
        """Whether there is a file of that name."""
        return name in self._endings

    def open(self, name: str, second: float, *, cache: IndexCache | None, timeout: float | None) -> FrameSource:
        """See ``Sources``."""
        if name not in self._endings:
            raise VideoError(self.path(name), f"there is no video of this name ({', '.join(VIDEO_EXTENSIONS)})")
        return open_video(self.path(name), cache=cache, timeout=timeout)


class FrameFiles:
    """Frames extracted at a constant rate: from lists, or each video's in a folder of its name."""

    def __init__(
        self,
        folder: str | os.PathLike[str],
        lists: Mapping[str, Sequence[str]] | None = None,
        *,
        start: float = 900.0,
        fps: float = 30.0,
    ) -> None:
        """Take lists.

        Args:
            folder: Of the frames; paths of lists start from there.
            lists: Video → the paths of its frames in order; ``None``: the images of ``folder``/VIDEO by their names.
            start: The time stamp of the first frame, seconds.
            fps: Frames per second.
        """
        self.start = start
        self._folder = os.fspath(folder)
        self._fps = fps
        self._lists = None if lists is None else {name: _Below(self._folder, paths) for name, paths in lists.items()}
        self._listed: dict[str, Sequence[str]] = {}

    def path(self, name: str) -> str:
        """The folder of a video's frames; where it is not the video's own, the first frame."""
        frames = (self._lists or {}).get(name)
        if not frames:
            return os.path.join(self._folder, name)
        folder = os.path.dirname(frames[0])
        return folder if os.path.basename(folder) == name else frames[0]

    def has(self, name: str) -> bool:
        """Whether frames are listed, or there is a folder."""
        return bool(self._lists.get(name)) if self._lists is not None else os.path.isdir(self.path(name))

    def open(self, name: str, second: float, *, cache: IndexCache | None, timeout: float | None) -> FrameSource:
        """See ``Sources``; the frame at ``second`` tells the size, so that no other than those asked for must exist."""
        path = self.path(name)
        frames = self._frames_in(path) if self._lists is None else self._lists.get(name)
        if not frames:
            raise VideoError(path, f"no frames of {name} are listed")
        near = min(max(int((second - self.start) * self._fps), 0), len(frames) - 1)
        return ImageReader(path, frames, timeout=timeout, fps=self._fps, sized_by=near)

    def _frames_in(self, folder: str) -> Sequence[str]:
        """The images of a folder."""
        if folder not in self._listed:
            while len(self._listed) >= _LISTED_FOLDERS:
                del self._listed[next(iter(self._listed))]
            self._listed[folder] = list_frames(folder)
        return self._listed[folder]


class _Below(Sequence[str]):
    """Paths that start from a folder, joined when they are asked for."""

    def __init__(self, folder: str, paths: Sequence[str]) -> None:
        self._folder = folder
        self._paths = paths

    def __len__(self) -> int:
        return len(self._paths)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [os.path.join(self._folder, path) for path in self._paths[index]]
        return os.path.join(self._folder, self._paths[index])
