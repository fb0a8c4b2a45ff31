"""Which frames of a video make a clip, and which frames of a clip a teacher sees.

Everything here is integers in, integers out: no pixels, no files. A clip of T frames at sampling rate r spans
L = (T − 1)·r + 1 frames. **Short videos loop**: in a video of N < L frames every clip starts at frame 0 and frame i of
the clip is taken modulo N.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from distinit_plugin.errors import UserError
from distinit_plugin.registry import FRAME_PICKERS
from distinit_plugin.video.grid import frames_of_grid

Int64Array = npt.NDArray[np.int64]

# Matroska rounds time stamps to milliseconds: a frame counts as presented this much before its stamp.
_CLOCK_TOLERANCE = 1e-3


@dataclass(frozen=True, eq=False)
class Clip:
    """The frames of one sample.

    Attributes:
        timeline: (N,) source frame of each frame of the video after resampling.
        places: (T,) the frames of the student's clip, as places in the timeline.
    """

    timeline: Int64Array
    places: Int64Array

    def __len__(self) -> int:
        """T."""
        return len(self.places)

    def frames(self, picked: Int64Array) -> Int64Array:
        """Source frames of some frames of the clip, (n,) → (n,)."""
        shown: Int64Array = self.timeline[self.places[picked]]
        return shown

    def flow_places(self, picked: Int64Array, stack: int) -> Int64Array:
        """Flows that some frames of the clip begin, (n,) → (n·stack,) places in the timeline.

        Flow p leads from frame p of the timeline to frame p + 1. The last frame, from which nothing leads on, takes the
        flow before it; so do stacks that reach beyond the end. A video of one frame has flow 0, from it to itself.
        """
        first = self.places[picked]
        reached = first[:, None] + np.arange(stack, dtype=np.int64)
        return np.minimum(reached, max(len(self.timeline) - 2, 0)).reshape(-1)

    def pairs(self, picked: Int64Array, stack: int) -> Int64Array:
        """(2, n·stack) source frames from which and to which those flows lead."""
        first = self.flow_places(picked, stack)
        second = np.minimum(first + 1, len(self.timeline) - 1)
        return np.stack([self.timeline[first], self.timeline[second]])


def clip_span(num_frames: int, sampling_rate: int) -> int:
    """L, the number of neighbouring video frames that a clip of ``num_frames`` covers."""
    if num_frames < 1 or sampling_rate < 1:
        raise ValueError(f"a clip of {num_frames} frames, {sampling_rate} apart, is impossible: both must be ≥ 1")
    return (num_frames - 1) * sampling_rate + 1


def clip_at(start: int, num_video_frames: int, num_frames: int, sampling_rate: int) -> Int64Array:
    """The clip that starts at a given frame.

    Args:
        start: First frame.
        num_video_frames: N, frames of the video.
        num_frames: T, frames of the clip.
        sampling_rate: Distance between them, in frames.

    Returns:
        (T,) int64 frame indices in [0, N); they wrap around at the end.
    """
    if num_video_frames < 1:
        raise ValueError("the video has no frames")
    clip_span(num_frames, sampling_rate)
    return (start + np.arange(num_frames, dtype=np.int64) * sampling_rate) % num_video_frames


def keyframe_clip(center: int, num_video_frames: int, num_frames: int, sampling_rate: int) -> Int64Array:
    """The clip around a frame, which is number T//2 of it; beyond the video's ends its first or last frame repeats.

    For even T the frames of PySlowFast's ``get_sequence`` (``slowfast/datasets/utils.py``).

    Args:
        center: The frame; one beyond an end counts as that end's clip, too.
        num_video_frames: N, frames of the video.
        num_frames: T, frames of the clip.
        sampling_rate: Distance between them, in frames.

    Returns:
        (T,) int64 frame indices in [0, N), never decreasing.
    """
    if num_video_frames < 1:
        raise ValueError("the video has no frames")
    clip_span(num_frames, sampling_rate)
    places = center + (np.arange(num_frames, dtype=np.int64) - num_frames // 2) * sampling_rate
    return np.clip(places, 0, num_video_frames - 1)


def random_clip(num_video_frames: int, num_frames: int, sampling_rate: int, rng: np.random.Generator) -> Int64Array:
    """A clip at a uniformly random place (training).

    Returns:
        (T,) int64; all starts 0 … N − L are equally likely.
    """
    last = num_video_frames - clip_span(num_frames, sampling_rate)
    # One draw whatever the length, so that what follows from this generator does not depend on it.
    start = int(rng.integers(0, max(last, 0) + 1))
    return clip_at(start, num_video_frames, num_frames, sampling_rate)


def uniform_clip(num_video_frames: int, num_frames: int, sampling_rate: int, clip: int, num_clips: int) -> Int64Array:
    """One of several evenly spaced clips, the first at the start and the last reaching the end (testing).

    start = floor(clip·(N − L)/(num_clips − 1)), as in VMZ (``av_decoder.cc``); a single clip is centred.

    Returns:
        (T,) int64.
    """
    if not 0 <= clip < num_clips:
        raise ValueError(f"clip {clip} of {num_clips} does not exist")
    last = max(num_video_frames - clip_span(num_frames, sampling_rate), 0)
    start = last // 2 if num_clips == 1 else clip * last // (num_clips - 1)
    return clip_at(start, num_video_frames, num_frames, sampling_rate)


def dense_starts(num_video_frames: int, num_frames: int, sampling_rate: int, stride: int) -> Int64Array:
    """Starts of clips every ``stride`` frames, as long as the clip fits (dense testing).

    Returns:
        (num_clips,) int64: 0, stride, 2·stride … ≤ N − L; a short video has the one start 0.
    """
    if stride < 1:
        raise ValueError(f"a stride of {stride} is impossible: it must be ≥ 1")
    last = max(num_video_frames - clip_span(num_frames, sampling_rate), 0)
    return np.arange(0, last + 1, stride, dtype=np.int64)


def resample(seconds: npt.NDArray[np.float64], target_fps: float) -> Int64Array:
    """Frames to show at a constant rate, by time stamps.

    Output k is the frame on the screen at t0 + k/target_fps: the last one with a time stamp at or before that (up to a
    millisecond, which is what containers round to). The last output is at or before the last time stamp.

    Args:
        seconds: (N,) presentation times, never decreasing.
        target_fps: Frames per second wanted.

    Returns:
        (M,) int64 indices of the source frames, never decreasing. At the video's own rate this is 0 … N − 1.
    """
    if not 0 < target_fps < float("inf"):
        raise ValueError(f"a frame rate of {target_fps} is impossible: it must be above 0")
    if len(seconds) == 0:
        raise ValueError("the video has no frames")
    tolerance = min(_CLOCK_TOLERANCE, 0.25 / target_fps)
    elapsed = np.asarray(seconds, dtype=np.float64) - seconds[0]
    count = int(np.floor((elapsed[-1] + tolerance) * target_fps)) + 1
    moments = np.arange(count) / target_fps
    return np.searchsorted(elapsed, moments + tolerance, side="right").astype(np.int64) - 1


def _check_pick(num_clip_frames: int, count: int) -> None:
    if not 1 <= count <= num_clip_frames:
        raise UserError(
            f"{count} frames cannot be picked from a clip of {num_clip_frames}: "
            f"set NUM_PICKED_FRAMES to 1 … {num_clip_frames}."
        )


@FRAME_PICKERS.register()
def clip(num_clip_frames: int, count: int, rng: np.random.Generator) -> Int64Array:
    """All frames of the clip; ``count`` must be their number."""
    if count != num_clip_frames:
        raise UserError(
            f"the pick 'clip' takes all {num_clip_frames} frames of the clip, but {count} were asked for: "
            "choose 'uniform', 'center' or 'random' to take fewer."
        )
    return np.arange(num_clip_frames, dtype=np.int64)


@FRAME_PICKERS.register()
def center(num_clip_frames: int, count: int, rng: np.random.Generator) -> Int64Array:
    """The ``count`` neighbouring frames in the middle: (count,) int64 from (T − count)//2 on."""
    _check_pick(num_clip_frames, count)
    return (num_clip_frames - count) // 2 + np.arange(count, dtype=np.int64)


@FRAME_PICKERS.register()
def keyframe(num_clip_frames: int, count: int, rng: np.random.Generator) -> Int64Array:
    """``count`` neighbouring frames around T//2, where the annotated frame of a keyframe's clip is: (count,) int64.

    One frame is that frame; of an even number, half lie before it.
    """
    _check_pick(num_clip_frames, count)
    first = min(max(num_clip_frames // 2 - count // 2, 0), num_clip_frames - count)
    return first + np.arange(count, dtype=np.int64)


@FRAME_PICKERS.register()
def random(num_clip_frames: int, count: int, rng: np.random.Generator) -> Int64Array:
    """Distinct random frames in increasing order: (count,) int64."""
    _check_pick(num_clip_frames, count)
    return np.sort(rng.choice(num_clip_frames, size=count, replace=False)).astype(np.int64)


@FRAME_PICKERS.register()
def uniform(num_clip_frames: int, count: int, rng: np.random.Generator) -> Int64Array:
    """The middles of ``count`` equal parts: (count,) int64, floor((2i + 1)·T/(2·count))."""
    _check_pick(num_clip_frames, count)
    return frames_of_grid(num_clip_frames, count)
