"""What every reader of frames can do: video files, folders of frames, single images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Protocol, Self

import numpy as np
import numpy.typing as npt

from distinit_plugin.video.images import WHOLE, Window
from distinit_plugin.video.index import FrameIndex, Int64Array

Frames = npt.NDArray[np.uint8]


class FrameSource(Protocol):
    """A video file, a folder of frames or a single image: frames by number."""

    path: str
    index: FrameIndex

    def read(self, indices: Sequence[int] | Int64Array, window: Window = WHOLE) -> Frames:
        """That part of frames by number, in the order asked for, repeats allowed: (n,H,W,3) uint8 RGB.

        Raises:
            VideoError: A frame cannot be given; the reason names it.
        """
        ...

    def stream(self, indices: Sequence[int] | Int64Array) -> Iterator[Frames]:
        """Frames by increasing number, each (H,W,3) uint8 RGB, one at a time in one pass; none is kept.

        The time that the source may take starts anew with each frame.

        Raises:
            VideoError: A frame cannot be given; the reason names it.
        """
        ...

    def close(self) -> None:
        """Close the files; more than once is fine."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...
