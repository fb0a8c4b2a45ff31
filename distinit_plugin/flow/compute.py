"""From the frames of a video to the codes of its flow: pick frames, resize them, compute, quantise."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from distinit_plugin.errors import UserError, VideoError
from distinit_plugin.flow.backends import FlowBackend
from distinit_plugin.flow.codes import Codes, Quantiser
from distinit_plugin.video.guard import check_size
from distinit_plugin.video.source import Frames, FrameSource

MAX_SIDE = 8192


@dataclass(frozen=True)
class SizeRule:
    """The size at which flow is computed and kept; frames are resized before.

    Attributes:
        short: The short side, pixels, the other in proportion; 0: not by this.
        width: Of all videos, whatever their proportions; 0: not by this.
        height: With ``width``.
    """

    short: int = 0
    width: int = 0
    height: int = 0

    @classmethod
    def parse(cls, text: str) -> SizeRule:
        """``256`` (short side), ``340x256`` (width and height) or ``native``.

        Raises:
            ValueError: Something else.
        """
        if text == "native":
            return cls()
        match = re.fullmatch(r"([0-9]{1,4})(?:[x×]([0-9]{1,4}))?", text)
        numbers = [int(number) for number in match.groups() if number] if match else []
        if not numbers or not all(1 <= number <= MAX_SIDE for number in numbers):
            raise ValueError(
                f"'{text[:40]}' is no size. Allowed: native, the short side (256), or width and height (340x256), "
                f"1 to {MAX_SIDE}"
            )
        return cls(short=numbers[0]) if len(numbers) == 1 else cls(width=numbers[0], height=numbers[1])

    def __str__(self) -> str:
        return str(self.short) if self.short else f"{self.width}x{self.height}" if self.width else "native"

    def of(self, height: int, width: int) -> tuple[int, int]:
        """Height and width at which the flow of such a video is computed."""
        if self.width:
            return self.height, self.width
        if not self.short:
            return height, width
        scale = self.short / min(height, width)
        return max(round(height * scale), 1), max(round(width * scale), 1)


@dataclass
class Tally:
    """Counts of the flows that were made.

    Attributes:
        frames: Frames of the video at its own or the chosen rate.
        values: Components of flow.
        clipped: Those beyond the bound.
    """

    frames: int = 0
    values: int = 0
    clipped: int = 0
    size: tuple[int, int] = field(default=(0, 0))


def video_flow(
    source: FrameSource,
    backend: FlowBackend,
    quantiser: Quantiser,
    *,
    size: SizeRule,
    fps: float | None,
    batch_size: int,
    tally: Tally,
    device: str = "cpu",
) -> Iterator[Codes]:
    """The flow of a whole video in one pass: T − 1 flows of T frames; of a single frame one flow without motion.

    Args:
        source: The video.
        backend: Computes the flow.
        quantiser: Makes codes of it.
        size: Frames are resized so before.
        fps: Rate to which frames are picked before; ``None``: all.
        batch_size: Pairs that are computed together.
        tally: Counts, written as flows are made.
        device: Where the flow is computed.

    Yields:
        (H,W,2) uint8.

    Raises:
        VideoError: A frame cannot be given, or the back end cannot take frames of this size.
        ValueError: The size is beyond all limits, or the flow has values that are not numbers.
    """
    height, width = size.of(source.index.height, source.index.width)
    check_size(width, 2 * height)
    tally.size = height, width
    still = np.full((height, width, 2), quantiser.zero, dtype=np.uint8)
    numbers, times = np.unique(source.index.timeline(fps), return_counts=True)
    repeats = [int(count) - 1 for count in times]  # nothing moves between a frame and itself
    frames = (resize_frame(frame, height, width) for frame in source.stream(numbers))
    place = 0
    tally.frames = 1
    for batch in _batches(frames, batch_size):
        try:
            stacked = torch.stack(batch).to(device)
            flows = backend(stacked[:-1], stacked[1:]).permute(0, 2, 3, 1).cpu().numpy()
        except UserError as error:
            raise VideoError(source.path, f"its flow cannot be computed: {error}") from error
        for flow in flows:
            for codes in [still] * repeats[place]:
                tally.frames, tally.values = tally.frames + 1, tally.values + still.size
                yield codes
            place += 1
            codes = quantiser.encode(flow)
            tally.frames, tally.values = tally.frames + 1, tally.values + codes.size
            tally.clipped += quantiser.clipped(flow)
            yield codes
    ending = repeats[place]
    tally.frames += ending
    for _ in range(max(ending, 1 if tally.values == 0 else 0)):
        tally.values += still.size
        yield still


def _batches(frames: Iterator[Tensor], batch_size: int) -> Iterator[list[Tensor]]:
    """Up to ``batch_size`` + 1 frames in a row; the last one of a batch is the first one of the next."""
    batch: list[Tensor] = []
    for frame in frames:
        batch.append(frame)
        if len(batch) > batch_size:
            yield batch
            batch = [frame]
    if len(batch) > 1:
        yield batch


def resize_frame(frame: Frames, height: int, width: int) -> Tensor:
    """(H,W,3) → (3,height,width) uint8; bilinear with antialiasing, as views are made."""
    picture = torch.from_numpy(np.ascontiguousarray(frame)).permute(2, 0, 1)
    if picture.shape[1:] != (height, width):
        picture = F.interpolate(picture[None], size=(height, width), mode="bilinear", antialias=True)[0]
    return picture
