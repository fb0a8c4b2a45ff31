"""Videos of PyTorchVideo's datasets, read by this package's reader.

Its own reader leaves FFmpeg's threads running in videos that are not yet closed; a worker that is forked then waits for
them for ever, or crashes. This one has no threads, decodes what a clip needs, and says why a file cannot be read.
"""

from __future__ import annotations

import logging
import os
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
from pytorchvideo.data.video import Video, VideoPathHandler
from torch import Tensor

from distinit_plugin.errors import UserError, VideoError
from distinit_plugin.video.decode import open_video
from distinit_plugin.video.index import IndexCache

_ROUNDING = 1e-6
"""Seconds by which a time that stands for a frame may miss it."""

logger = logging.getLogger(__name__)


class Videos(VideoPathHandler):
    """Give it to a dataset: ``dataset.video_path_handler = Videos(fps=30)``. There is no sound."""

    def __init__(self, fps: float | None = None, *, timeout: float | None = 30.0) -> None:
        """Prepare; nothing is read yet.

        Args:
            fps: Frame rate to which every video is resampled by its time stamps (``CORPUS.TARGET_FPS``); ``None``: as
                it is.
            timeout: Seconds that one file may take; ``None``: any time.

        Raises:
            UserError: No video has such a rate.
        """
        super().__init__()
        if fps is not None and not 0 < fps < float("inf"):
            raise UserError(f"fps is {fps}. Allowed: a number above 0, or None.")
        self._fps, self._timeout, self._cache = fps, timeout, IndexCache(None)

    def video_from_path(
        self, filepath: str | os.PathLike[str], decode_audio: bool = False, decoder: str = "pyav", fps: int = 30
    ) -> OpenVideo:
        """Open a file or a folder of frames; the other arguments are PyTorchVideo's own reader's.

        Raises:
            VideoError: It cannot be read; the reason is in the log, too, because datasets hide it.
        """
        try:
            return OpenVideo(filepath, self._fps, self._timeout, self._cache)
        except VideoError as error:
            logger.warning("%s", error)
            raise


class OpenVideo(Video):
    """A video that is read by this package's reader."""

    def __init__(
        self, path: str | os.PathLike[str], fps: float | None, timeout: float | None, cache: IndexCache
    ) -> None:
        """Open it; see ``Videos``."""
        self._path = Path(path)
        self._reader = open_video(path, cache=cache, timeout=timeout)
        index = self._reader.index
        self._timeline = index.timeline(fps)
        if fps is not None:
            self._times = np.arange(len(self._timeline)) / fps
            frame = 1 / fps
        else:
            self._times = np.asarray(index.seconds, dtype=np.float64) - index.seconds[0]
            frame = float(np.median(np.diff(self._times))) if len(self._times) > 1 else 0.04
        self._duration = float(self._times[-1]) + frame

    @property
    def name(self) -> str:
        """The file's name."""
        return self._path.name

    @property
    def duration(self) -> float:
        """Seconds, the last frame included."""
        return self._duration

    def get_clip(self, start_sec: float | Fraction, end_sec: float | Fraction) -> dict[str, Tensor | None]:
        """Frames from ``start_sec`` up to, but not at, ``end_sec``.

        Returns:
            ``video``: float32 (3,T,H,W) in 0 … 255 as PyTorchVideo's, or ``None`` when there are no frames or they
            cannot be read (the reason is in the log); ``audio``: ``None``.
        """
        first, last = np.searchsorted(self._times, [float(start_sec) - _ROUNDING, float(end_sec) - _ROUNDING])
        if first == last:
            return {"video": None, "audio": None}
        try:
            frames = self._reader.read(self._timeline[first:last])
        except VideoError as error:
            logger.warning("%s", error)
            return {"video": None, "audio": None}
        return {"video": torch.from_numpy(frames).permute(3, 0, 1, 2).to(torch.float32), "audio": None}

    def close(self) -> None:
        """Close the file."""
        self._reader.close()
