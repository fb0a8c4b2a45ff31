"""This package's choice of clips and frames as clip samplers of PyTorchVideo.

PyTorchVideo counts in seconds, this package in frames: a sampler is told the frame rate, and the borders of a clip lie
half a frame before its first and after its last frame, so that rounding cannot move them. A clip of T frames at
sampling rate r spans L = (T − 1)·r + 1 frames, all of which PyTorchVideo decodes; ``Views`` takes each r-th.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

import numpy as np
from pytorchvideo.data.clip_sampling import ClipInfo, ClipInfoList, ClipSampler

from distinit_plugin.errors import UserError
from distinit_plugin.registry import FRAME_PICKERS, lookup
from distinit_plugin.video.sampling import clip_span, dense_starts, random_clip, uniform_clip

_HALF = Fraction(1, 2)

_NTSC = 1001
"""Denominator of rates such as 30000/1001."""


def new_generator() -> np.random.Generator:
    """A generator that follows from Python's own, which PyTorch seeds anew in each worker of a DataLoader."""
    return np.random.default_rng(random.getrandbits(63))


class _Sampler(ClipSampler):
    """What the samplers share.

    Attributes:
        fps: Frames per second of the videos, or of the reader (``Videos``).
        span: L.
    """

    def __init__(self, num_frames: int, sampling_rate: int, fps: float) -> None:
        """Check what was given.

        Raises:
            UserError: No clip is like that.
        """
        if min(num_frames, sampling_rate) < 1 or not 0 < fps < float("inf"):
            raise UserError(
                f"a clip of {num_frames} frames, {sampling_rate} apart, at {fps} frames per second is impossible: all "
                "three must be above 0."
            )
        self.num_frames, self.sampling_rate = num_frames, sampling_rate
        self.span = clip_span(num_frames, sampling_rate)
        self.fps = Fraction(fps).limit_denominator(_NTSC)
        super().__init__(Fraction(self.span) / self.fps)

    def frames_of(self, video_duration: float | Fraction) -> int:
        """N, frames of a video; at least 1."""
        return max(round(Fraction(video_duration) * self.fps), 1)

    def borders(self, start: int, span: int) -> tuple[Fraction, Fraction]:
        """Seconds where ``span`` frames begin and end."""
        return max(Fraction(start) - _HALF, Fraction(0)) / self.fps, (start + span - _HALF) / self.fps

    def reset(self) -> None:
        """The next video begins with its first clip and crop."""
        self._current_clip_index = self._current_aug_index = 0


class RandomClips(_Sampler):
    """A clip at a uniformly random place, as this package trains; a short video gives what it has."""

    def __init__(self, num_frames: int, sampling_rate: int = 1, *, fps: float) -> None:
        """As ``DATA.NUM_FRAMES``, ``DATA.SAMPLING_RATE``, ``CORPUS.TARGET_FPS``."""
        super().__init__(num_frames, sampling_rate, fps)

    def __call__(
        self, last_clip_time: float | Fraction, video_duration: float | Fraction, annotation: Mapping[str, Any]
    ) -> ClipInfo:
        """The one clip of a video."""
        total = self.frames_of(video_duration)
        start = int(random_clip(total, self.num_frames, self.sampling_rate, new_generator())[0])
        return ClipInfo(*self.borders(start, self.span), 0, 0, True)


class _Series(_Sampler):
    """Several clips of a video, each of them once for every crop (``aug_index``), without decoding it again."""

    def __init__(self, num_frames: int, sampling_rate: int, fps: float, num_crops: int) -> None:
        super().__init__(num_frames, sampling_rate, fps)
        if num_crops not in (1, 3):
            raise UserError(f"num_crops is {num_crops}. Allowed: 1, 3.")
        self.num_crops = num_crops

    def starts(self, total: int) -> list[int]:
        """First frames of the clips of a video of ``total`` frames."""
        raise NotImplementedError

    def __call__(
        self, last_clip_time: float | Fraction, video_duration: float | Fraction, annotation: Mapping[str, Any]
    ) -> ClipInfo:
        """The next clip and crop of a video."""
        starts = self.starts(self.frames_of(video_duration))
        clip, crop = self._current_clip_index, self._current_aug_index
        is_last = clip == len(starts) - 1 and crop == self.num_crops - 1
        self._current_clip_index, self._current_aug_index = divmod(clip * self.num_crops + crop + 1, self.num_crops)
        if is_last:
            self.reset()
        return ClipInfo(*self.borders(starts[clip], self.span), clip, crop, is_last)


class UniformClips(_Series):
    """Evenly spaced clips, the first at the start and the last reaching the end; a single one is in the middle."""

    def __init__(
        self, num_frames: int, sampling_rate: int = 1, *, fps: float, num_clips: int = 1, num_crops: int = 1
    ) -> None:
        """As ``TEST.NUM_ENSEMBLE_VIEWS`` and ``TEST.NUM_SPATIAL_CROPS``.

        Raises:
            UserError: There is no such number of clips or crops.
        """
        super().__init__(num_frames, sampling_rate, fps, num_crops)
        if num_clips < 1:
            raise UserError(f"num_clips is {num_clips}. Allowed: 1 and above.")
        self.num_clips = num_clips

    def starts(self, total: int) -> list[int]:
        """Those of ``uniform_clip``."""
        clips = (
            uniform_clip(total, self.num_frames, self.sampling_rate, k, self.num_clips) for k in range(self.num_clips)
        )
        return [int(clip[0]) for clip in clips]


class DenseClips(_Series):
    """A clip every ``stride`` frames, as long as it fits."""

    def __init__(self, num_frames: int, sampling_rate: int = 1, *, fps: float, stride: int, num_crops: int = 1) -> None:
        """As ``CORPUS.DENSE_STRIDE``.

        Raises:
            UserError: The stride is below 1.
        """
        super().__init__(num_frames, sampling_rate, fps, num_crops)
        if stride < 1:
            raise UserError(f"stride is {stride}. Allowed: 1 and above.")
        self.stride = stride

    def starts(self, total: int) -> list[int]:
        """Those of ``dense_starts``."""
        return [int(start) for start in dense_starts(total, self.num_frames, self.sampling_rate, self.stride)]


class PickedFrames(_Sampler):
    """Single frames of a whole video, chosen as a teacher's frames are (``FRAME_PICK``); nothing else is kept.

    One frame is a clip; several are a list of clips, which ``Views`` joins.
    """

    def __init__(self, pick: str = "center", count: int = 1, *, fps: float) -> None:
        """As ``FRAME_PICK`` and ``NUM_PICKED_FRAMES``.

        Raises:
            UserError: There is no such pick.
        """
        super().__init__(1, 1, fps)
        if count < 1:
            raise UserError(f"count is {count}. Allowed: 1 and above.")
        self.picker, self.count = lookup(FRAME_PICKERS, pick, "pick"), count

    def __call__(
        self, last_clip_time: float | Fraction, video_duration: float | Fraction, annotation: Mapping[str, Any]
    ) -> ClipInfo | ClipInfoList:
        """The frames of a video; one that is shorter than ``count`` gives all that it has."""
        total = self.frames_of(video_duration)
        frames = self.picker(total, min(self.count, total), new_generator())
        clips = [ClipInfo(*self.borders(int(frame), 1), 0, 0, True) for frame in frames]
        return clips[0] if self.count == 1 else ClipInfoList(*(list(column) for column in zip(*clips, strict=True)))
