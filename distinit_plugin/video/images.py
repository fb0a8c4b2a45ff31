"""Still images as videos: folders of extracted frames, and single images."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from fractions import Fraction

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from distinit_plugin.errors import VideoError
from distinit_plugin.video.guard import Closing, Deadline, check_size, stat_file, video_errors
from distinit_plugin.video.index import FrameIndex, Int64Array

IMAGE_EXTENSIONS = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".tif", ".tiff"})
"""File name endings, lower case, that are read as still images."""

FRAMES_PER_SECOND = 25
"""Frame rate assumed for extracted frames, which carry no times (it matters for resampling to a target rate only)."""

Window = tuple[slice, slice]
"""Rows and columns of an upright picture."""

WHOLE: Window = (slice(None), slice(None))
"""All of it."""


def window_size(height: int, width: int, window: Window) -> tuple[int, int]:
    """Rows and columns that a window has in a picture of ``height`` × ``width``."""
    rows, columns = window
    return len(range(height)[rows]), len(range(width)[columns])


def natural_key(name: str) -> list[tuple[int, int, str]]:
    """Sorting key under which ``frame2`` comes before ``frame10``."""
    # Only ASCII digits: int() refuses some of what str.isdigit accepts.
    parts = re.split(r"([0-9]+)", name)
    return [(0, int(part), "") if number % 2 else (1, 0, part) for number, part in enumerate(parts)]


def list_frames(folder: str) -> list[str]:
    """Paths of the images directly in a folder, in natural order of their names.

    Raises:
        VideoError: The folder cannot be read or has no images.
    """
    with video_errors(folder, "cannot be opened"):
        names = [name for name in os.listdir(folder) if os.path.splitext(name)[1].lower() in IMAGE_EXTENSIONS]
        if not names:
            raise VideoError(folder, "is a folder without images")
        return [os.path.join(folder, name) for name in sorted(names, key=natural_key)]


class ImageReader(Closing):
    """Image files as the frames of one video, all of one size."""

    def __init__(
        self,
        path: str,
        files: Sequence[str],
        *,
        timeout: float | None = None,
        fps: float = FRAMES_PER_SECOND,
        sized_by: int = 0,
    ) -> None:
        """Look at one image.

        Args:
            path: The folder or the image, for errors.
            files: One image per frame, in order.
            timeout: Seconds allowed from now on; ``None``: no limit.
            fps: Frames per second.
            sized_by: The frame that tells the size of all.

        Raises:
            VideoError: That image is unreadable.
        """
        self.path = path
        self._files = files
        self._deadline = Deadline(path, timeout)
        self._sized_by = sized_by
        height, width, _ = self._load(files[sized_by]).shape
        numbers = np.arange(len(files), dtype=np.int64)
        time_base = 1 / Fraction(fps).limit_denominator(1001)
        self.index = FrameIndex(numbers, numbers, time_base, height, width, 0, numbers, numbers)

    def read(self, indices: Sequence[int] | Int64Array, window: Window = WHOLE) -> npt.NDArray[np.uint8]:
        """Frames by number, in the order asked for, repeats allowed.

        Args:
            indices: (n,) frame numbers.
            window: The part of every frame that is given.

        Returns:
            (n,H,W,3) uint8 RGB, H and W of the window.

        Raises:
            VideoError: An image is unreadable or of another size than the first.
        """
        wanted, inverse = np.unique(np.asarray(indices, dtype=np.int64), return_inverse=True)
        shape = (self.index.height, self.index.width, 3)
        with video_errors(self.path, "cannot be decoded"):
            frames = np.empty((len(wanted), *window_size(shape[0], shape[1], window), 3), dtype=np.uint8)
        for slot, number in enumerate(wanted):
            if not 0 <= number < len(self._files):
                raise VideoError(self.path, f"frame {number} was asked for, but it has {len(self._files)} frames")
            image = self._load(self._files[number])
            if image.shape != shape:
                size = f"{image.shape[1]}×{image.shape[0]}"
                first = f"frame {self._sized_by}" if self._sized_by else "the first frame"
                raise VideoError(
                    self.path,
                    f"frame {number} ({os.path.basename(self._files[number])}) is {size}, "
                    f"{first} is {shape[1]}×{shape[0]}",
                )
            frames[slot] = image[window]
        return frames[inverse]

    def stream(self, indices: Sequence[int] | Int64Array) -> Iterator[npt.NDArray[np.uint8]]:
        """Frames by increasing number, one at a time: (H,W,3) uint8 RGB.

        Raises:
            VideoError: An image is unreadable or of another size than the first.
        """
        for index in indices:
            self._deadline.restart()
            yield self.read([index])[0]

    def _load(self, file: str) -> npt.NDArray[np.uint8]:
        """(H,W,3) uint8 RGB, turned upright as its EXIF data say."""
        self._deadline.check()
        try:
            stat_file(file)
            with video_errors(file, "cannot be decoded"), Image.open(file) as image:
                check_size(*image.size)
                return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
        except VideoError as error:
            if file == self.path:
                raise
            raise VideoError(self.path, f"frame file {os.path.basename(file)} {error.reason}") from error
