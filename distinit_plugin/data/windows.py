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
from distinit_plugin.video.sampling import clip_at, clip_span, dense_starts, resample
from distinit_plugin.video.transforms import fixed_geometry, render_view, view_positions

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
        views: ``ViewSpec.pixels`` → uint8 (3,T,size,size).
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
        index = source.index
        fps = self._clip.target_fps
        self._timeline = np.arange(index.num_frames) if fps is None else resample(index.seconds, fps)
        self._starts = self._lay_out(index, spacing)

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
        places = self._places()
        wanted = self._wanted(places)
        coming = zip(wanted.tolist(), self._source.stream(wanted), strict=True)
        held: dict[int, dict[int, Tensor]] = {}
        newest = -1
        for start in self._starts.tolist():
            clip = self._clip_from(start)
            numbers = {pixels: clip[places[pixels]].tolist() for pixels in self._specs}
            first, last = min(map(min, numbers.values())), max(map(max, numbers.values()))
            for number in [number for number in held if number < first]:
                del held[number]
            while newest < last:
                newest, frame = next(coming)
                if newest >= first:
                    held[newest] = {size: render_view(frame[None], geometry, size) for size in sizes}
            views = {
                pixels: torch.cat([held[number][spec.crop_size] for number in numbers[pixels]], dim=1)
                for pixels, spec in self._specs.items()
            }
            yield Window(float(shown[clip].min()), float(hidden[clip].max()), views)

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

    def _clip_from(self, start: int) -> Int64Array:
        """(T,) source frames of a window."""
        places = clip_at(start, len(self._timeline), self._clip.num_frames or 1, self._clip.sampling_rate)
        clip: Int64Array = self._timeline[places]
        return clip

    def _places(self) -> dict[str, Int64Array]:
        """Which frames of a window each view shows."""
        frames = self._clip.num_frames or 1
        return {pixels: view_positions(spec, frames, seed=0) for pixels, spec in self._specs.items()}

    def _wanted(self, places: Mapping[str, Int64Array]) -> Int64Array:
        """Source frames that any window shows, increasing."""
        wanted = np.zeros(self._source.index.num_frames, dtype=np.bool_)
        for place in np.unique(np.concatenate(list(places.values()))):
            wanted[self._timeline[(self._starts + place * self._clip.sampling_rate) % len(self._timeline)]] = True
        return np.flatnonzero(wanted)


def _times(index: FrameIndex) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """When each frame appears and disappears, seconds from the first one."""
    shown = index.seconds - index.seconds[0]
    intervals = np.diff(shown)
    usual = float(np.median(intervals)) if len(intervals) else _FALLBACK_DURATION
    return shown, np.append(shown[1:], shown[-1] + usual)
