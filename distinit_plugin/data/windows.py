"""Sliding windows over whole videos: the clips of the test, one pass over the file, bounded memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from distinit_plugin.types import ViewSpec
from distinit_plugin.video.decode import FrameSource
from distinit_plugin.video.index import FrameIndex, Int64Array
from distinit_plugin.video.sampling import Clip, clip_at, clip_span, dense_starts, resample
from distinit_plugin.video.transforms import arrange, fixed_geometry, frames_shown, render_view

_FALLBACK_DURATION = 1 / 25
"""Seconds that the only frame of a video is shown."""


@dataclass(frozen=True)
class Spacing:
    """How far apart windows are.

    Attributes:
        stride: Frames (after resampling) between the starts of neighbouring windows; 0: their span, so that they touch.
        per_second: Windows that start in each second of the video instead; 0: ``stride`` counts.
    """

    stride: int = 0
    per_second: float = 0.0

    def __str__(self) -> str:
        if self.per_second:
            return f"{self.per_second:g} per second"
        return f"every {self.stride} frames" if self.stride else "side by side"


class Window(NamedTuple):
    """One clip.

    Attributes:
        start: When its first frame appears, seconds from the first frame of the video.
        end: When its last frame disappears.
        views: As in ``Sample``.
    """

    start: float
    end: float
    views: dict[str, Tensor]


class SlidingWindows:
    """The windows of one open video, first to last."""

    def __init__(
        self, source: FrameSource, specs: Mapping[str, ViewSpec], spacing: Spacing, *, test_scale: int = 0
    ) -> None:
        """Lay the windows out; nothing is decoded yet.

        Args:
            source: The video.
            specs: The network's views by name; the first one defines the clip, as in the test.
            spacing: How far apart windows are.
            test_scale: Short side from which the centre crop is cut, pixels; 0: the crop size.
        """
        self._source = source
        self._specs = {spec.pixels: spec for spec in specs.values()}
        self._clip = next(iter(specs.values()))
        self._scale = test_scale or self._clip.crop_size
        self._timeline = source.index.timeline(self._clip.target_fps)
        self._starts = self._lay_out(source.index, spacing)

    def __len__(self) -> int:
        return len(self._starts)

    def __iter__(self) -> Iterator[Window]:
        """One pass over the video: no frame is decoded, cut out or resized twice.

        Kept at any time are the pictures, at the size of the views, between the first and the last frame of a window.

        Raises:
            VideoError: A frame cannot be decoded.
        """
        index = self._source.index
        shown, hidden = _times(index)
        geometry = fixed_geometry(index.height, index.width, crop_size=self._clip.crop_size, scale=self._scale)
        sizes = {spec.crop_size for spec in self._specs.values()}
        wanted = self._wanted()
        coming = zip(wanted.tolist(), self._source.stream(wanted), strict=True)
        held: dict[int, dict[int, Tensor]] = {}
        newest = -1
        for start in self._starts.tolist():
            clip = self._clip_from(start)
            numbers = {pixels: frames_shown(spec, clip, seed=0).tolist() for pixels, spec in self._specs.items()}
            first, last = min(map(min, numbers.values())), max(map(max, numbers.values()))
            for number in [number for number in held if number < first]:
                del held[number]
            while newest < last:
                newest, frame = next(coming)
                if newest >= first:
                    held[newest] = {size: render_view(frame[None], geometry, size) for size in sizes}
            views = dict(
                arrange(torch.cat([held[number][spec.crop_size] for number in numbers[pixels]], dim=1), spec)
                for pixels, spec in self._specs.items()
            )
            seen = clip.timeline[clip.places]
            yield Window(float(shown[seen].min()), float(hidden[seen].max()), views)

    def _lay_out(self, index: FrameIndex, spacing: Spacing) -> Int64Array:
        """(K,) starts of windows in the timeline, increasing; all windows fit, but for that of a short video."""
        frames, rate = self._clip.num_frames or 1, self._clip.sampling_rate
        total = len(self._timeline)
        if not spacing.per_second:
            return dense_starts(total, frames, rate, spacing.stride or clip_span(frames, rate))
        fps = self._clip.target_fps
        seconds = index.seconds if fps is None else np.arange(total) / fps
        starts = np.unique(resample(seconds, spacing.per_second))
        return starts[starts <= max(total - clip_span(frames, rate), 0)]

    def _clip_from(self, start: int) -> Clip:
        """The frames of a window."""
        places = clip_at(start, len(self._timeline), self._clip.num_frames or 1, self._clip.sampling_rate)
        return Clip(self._timeline, places)

    def _wanted(self) -> Int64Array:
        """Source frames that any window shows, increasing."""
        wanted = np.zeros(self._source.index.num_frames, dtype=np.bool_)
        for start in self._starts.tolist():
            for spec in self._specs.values():
                wanted[frames_shown(spec, self._clip_from(start), seed=0)] = True
        return np.flatnonzero(wanted)


def _times(index: FrameIndex) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """When each frame appears and disappears, seconds from the first one."""
    shown = index.seconds - index.seconds[0]
    intervals = np.diff(shown)
    usual = float(np.median(intervals)) if len(intervals) else _FALLBACK_DURATION
    return shown, np.append(shown[1:], shown[-1] + usual)
