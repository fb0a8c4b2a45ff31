"""What every kept flow can do, whatever kind of file it is in: codes by frame number."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Protocol, Self

import numpy as np

from distinit_plugin.errors import VideoError
from distinit_plugin.flow.codes import Codes, Quantiser
from distinit_plugin.video.images import WHOLE, Window
from distinit_plugin.video.index import Int64Array


class MissingFlowError(VideoError):
    """A video whose flow is not kept, is that of another file, or is damaged: compute it, or leave the video out."""


class FlowSource(Protocol):
    """The flow of one video. Flow i leads from frame i to frame i + 1, forward, in pixels of its own size.

    Attributes:
        path: The video, or the place of the flow where no video is known; for errors.
        num_flows: F; of a video of T frames T − 1, or T where the last one is kept twice.
        height: Pixels.
        width: Pixels.
        quantiser: What the codes mean.
    """

    path: str
    num_flows: int
    height: int
    width: int
    quantiser: Quantiser

    def read(self, indices: Sequence[int] | Int64Array, window: Window = WHOLE) -> Codes:
        """That part of flows by frame number, in the order asked for, repeats allowed: (n,H,W,2) uint8, u before v.

        Frame F, the last frame of a video of F + 1 frames, has the flow of the frame before it.

        Raises:
            MissingFlowError: A flow cannot be given; the reason names it.
        """
        ...

    def close(self) -> None:
        """Close the files; more than once is fine."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def kept_numbers(path: str, indices: Sequence[int] | Int64Array, num_flows: int) -> tuple[Int64Array, Int64Array]:
    """Which kept flows serve frame numbers.

    Args:
        path: For the error.
        indices: (n,) frame numbers, 0 … ``num_flows``.
        num_flows: How many are kept, at least 1.

    Returns:
        (m,) distinct, increasing numbers of kept flows; (n,) places among them.

    Raises:
        MissingFlowError: There is no such frame.
    """
    asked = np.asarray(indices, dtype=np.int64)
    if len(asked) and not 0 <= asked.min() <= asked.max() <= num_flows:
        beyond = int(asked.min() if asked.min() < 0 else asked.max())
        raise MissingFlowError(
            path, f"the flow of frame {beyond} was asked for, but that of {num_flows + 1} frames is kept"
        )
    distinct, places = np.unique(np.minimum(asked, num_flows - 1), return_inverse=True)
    return distinct, places
