import numpy as np
import pytest

from distinit_plugin.errors import UserError
from distinit_plugin.registry import FRAME_PICKERS
from distinit_plugin.video.sampling import (
    clip_at,
    clip_span,
    dense_starts,
    keyframe_clip,
    random_clip,
    resample,
    uniform_clip,
)


def _rng(seed=0):
    return np.random.default_rng(seed)


def test_the_span_of_a_clip():
    assert [clip_span(*pair) for pair in ((8, 1), (8, 2), (1, 5), (3, 4))] == [8, 15, 1, 9]


@pytest.mark.parametrize(
    ("start", "video", "frames", "rate", "expected"),
    [
        (0, 10, 4, 1, [0, 1, 2, 3]),
        (2, 10, 4, 2, [2, 4, 6, 8]),
        (0, 3, 8, 1, [0, 1, 2, 0, 1, 2, 0, 1]),  # short videos loop
        (0, 5, 4, 2, [0, 2, 4, 1]),
        (0, 1, 3, 4, [0, 0, 0]),
        (7, 10, 4, 1, [7, 8, 9, 0]),
    ],
)
def test_clips_at_a_frame(start, video, frames, rate, expected):
    clip = clip_at(start, video, frames, rate)
    assert clip.tolist() == expected
    assert clip.dtype == np.int64


@pytest.mark.parametrize(
    ("video", "frames", "rate", "num_clips", "starts"),
    [
        (100, 8, 1, 10, [0, 10, 20, 30, 40, 51, 61, 71, 81, 92]),  # floor(i·92/9), the last reaches the end
        (20, 8, 2, 4, [0, 1, 3, 5]),
        (16, 8, 2, 3, [0, 0, 1]),
        (100, 8, 1, 2, [0, 92]),
        (100, 8, 1, 1, [46]),
        (101, 8, 1, 1, [46]),
        (8, 8, 1, 3, [0, 0, 0]),
        (5, 8, 1, 3, [0, 0, 0]),
    ],
)
def test_uniform_clips(video, frames, rate, num_clips, starts):
    clips = [uniform_clip(video, frames, rate, clip, num_clips) for clip in range(num_clips)]
    assert [int(clip[0]) for clip in clips] == starts
    for clip, start in zip(clips, starts, strict=True):
        assert clip.tolist() == [(start + step * rate) % video for step in range(frames)]
    if video >= (frames - 1) * rate + 1 and num_clips > 1:
        assert clips[-1][-1] == video - 1


def test_uniform_clips_follow_the_formula():
    for video in range(1, 60):
        for num_clips in (2, 3, 10):
            last = max(video - 15, 0)
            expected = [int(np.floor(clip * last / (num_clips - 1))) for clip in range(num_clips)]
            assert [int(uniform_clip(video, 8, 2, clip, num_clips)[0]) for clip in range(num_clips)] == expected


@pytest.mark.parametrize(
    ("video", "frames", "rate", "stride", "expected"),
    [
        (12, 8, 1, 1, [0, 1, 2, 3, 4]),
        (12, 8, 1, 3, [0, 3]),
        (20, 4, 2, 5, [0, 5, 10]),
        (8, 8, 1, 1, [0]),
        (3, 8, 1, 2, [0]),
    ],
)
def test_dense_starts(video, frames, rate, stride, expected):
    starts = dense_starts(video, frames, rate, stride)
    assert starts.tolist() == expected
    assert starts.dtype == np.int64


def test_random_clips_are_exact():
    # A change of these lists changes every experiment.
    rng = _rng(7)
    clips = [random_clip(40, 4, 3, rng).tolist() for _ in range(4)]
    assert clips == [[29, 32, 35, 38], [19, 22, 25, 28], [21, 24, 27, 30], [27, 30, 33, 36]]


def test_random_clips_reach_every_start_equally_often():
    rng = _rng()
    starts = [int(random_clip(12, 4, 2, rng)[0]) for _ in range(3000)]
    counts = np.bincount(starts, minlength=6)
    assert len(counts) == 6  # 0 … 12 − 7
    assert counts.min() > 400


def test_random_clips_take_one_draw_whatever_the_length():
    for video in (3, 8, 100):
        rng = _rng(1)
        random_clip(video, 8, 1, rng)
        reference = _rng(1)
        reference.integers(0, max(video - 8, 0) + 1)
        assert rng.integers(1000) == reference.integers(1000)
    assert random_clip(3, 8, 1, _rng()).tolist() == [0, 1, 2, 0, 1, 2, 0, 1]


@pytest.mark.parametrize(
    "call",
    [
        lambda: clip_at(0, 0, 4, 1),
        lambda: clip_at(0, 5, 0, 1),
        lambda: random_clip(5, 4, 0, _rng()),
        lambda: uniform_clip(5, 4, 1, 3, 3),
        lambda: uniform_clip(5, 4, 1, -1, 3),
        lambda: dense_starts(5, 4, 1, 0),
        lambda: resample(np.arange(3.0), 0.0),
        lambda: resample(np.arange(3.0), float("inf")),
        lambda: resample(np.arange(3.0), float("nan")),
        lambda: resample(np.zeros(0), 5.0),
    ],
)
def test_impossible_requests_are_refused(call):
    with pytest.raises(ValueError, match=r"impossible|does not exist|no frames"):
        call()


@pytest.mark.parametrize(
    ("seconds", "fps", "expected"),
    [
        (np.arange(10) / 30, 30, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]),
        (np.arange(10) / 30, 15, [0, 2, 4, 6, 8]),
        (np.arange(10) / 30, 20, [0, 1, 3, 4, 6, 7, 9]),
        (np.arange(4) / 10, 30, [0, 0, 0, 1, 1, 1, 2, 2, 2, 3]),
        (5.0 + np.arange(6) / 25, 12.5, [0, 2, 4]),  # time does not start at 0
        (np.array([0.0, 0.1, 0.5, 0.6]), 10, [0, 1, 1, 1, 1, 2, 3]),  # a frame stays until the next one
        (np.array([0.033, 0.067, 0.1, 0.133, 0.167, 0.2]), 30, [0, 1, 2, 3, 4, 5]),  # Matroska's milliseconds
        (np.array([0.0, 0.033, 0.067, 0.1, 0.133, 0.167]), 30, [0, 1, 2, 3, 4, 5]),
        (np.array([0.0, 0.033, 0.067, 0.1, 0.133, 0.167]), 15, [0, 2, 4]),
        (np.array([0.0, 0.0, 0.1]), 10, [1, 2]),  # of frames at the same time the last is seen
        (np.array([3.0]), 30, [0]),
        (np.arange(10) / 30, 1e-6, [0]),
    ],
)
def test_resampling_by_time_stamps(seconds, fps, expected):
    indices = resample(seconds, fps)
    assert indices.tolist() == expected
    assert indices.dtype == np.int64


@pytest.mark.parametrize("fps", [24, 25, 29.97, 30, 50, 59.94, 60, 120])
def test_the_videos_own_rate_changes_nothing(fps):
    exact = np.arange(1000) / fps
    assert resample(exact, fps).tolist() == list(range(1000))
    if fps <= 60:
        assert resample(np.round(exact, 3), fps).tolist() == list(range(1000))


@pytest.mark.parametrize(
    ("name", "frames", "count", "expected"),
    [
        ("center", 8, 1, [3]),
        ("center", 9, 1, [4]),
        ("center", 8, 2, [3, 4]),
        ("center", 8, 3, [2, 3, 4]),
        ("center", 1, 1, [0]),
        ("keyframe", 8, 1, [4]),
        ("keyframe", 9, 1, [4]),
        ("keyframe", 8, 2, [3, 4]),
        ("keyframe", 8, 3, [3, 4, 5]),
        ("keyframe", 2, 2, [0, 1]),
        ("keyframe", 1, 1, [0]),
        ("uniform", 8, 1, [4]),
        ("uniform", 8, 2, [2, 6]),
        ("uniform", 9, 3, [1, 4, 7]),
        ("uniform", 8, 8, [0, 1, 2, 3, 4, 5, 6, 7]),
        ("uniform", 8, 3, [1, 4, 6]),
        ("clip", 4, 4, [0, 1, 2, 3]),
        ("random", 4, 4, [0, 1, 2, 3]),
    ],
)
def test_frame_picks(name, frames, count, expected):
    picked = FRAME_PICKERS.get(name)(frames, count, _rng())
    assert picked.tolist() == expected
    assert picked.dtype == np.int64


def test_every_pick_is_sorted_distinct_and_inside():
    assert {name for name, _ in FRAME_PICKERS} == {"clip", "center", "keyframe", "random", "uniform"}
    for name, pick in FRAME_PICKERS:
        for frames in range(1, 20):
            for count in [frames] if name == "clip" else range(1, frames + 1):
                picked = pick(frames, count, _rng(frames))
                assert len(picked) == count
                assert (np.diff(picked) > 0).all()
                assert 0 <= picked[0] <= picked[-1] < frames


def test_random_picks():
    rng = _rng(3)
    assert [FRAME_PICKERS.get("random")(8, 2, rng).tolist() for _ in range(4)] == [[0, 5], [1, 7], [4, 6], [0, 2]]
    rng = _rng()
    counts = np.bincount(np.concatenate([FRAME_PICKERS.get("random")(8, 2, rng) for _ in range(2000)]), minlength=8)
    assert counts.min() > 400
    assert counts.max() < 600


@pytest.mark.parametrize("name", ["center", "keyframe", "random", "uniform"])
@pytest.mark.parametrize("count", [0, 9])
def test_picks_that_a_clip_cannot_give(name, count):
    with pytest.raises(UserError, match=f"{count} frames cannot be picked from a clip of 8: set NUM_PICKED_FRAMES"):
        FRAME_PICKERS.get(name)(8, count, _rng())


def test_the_pick_clip_takes_all():
    with pytest.raises(UserError, match="takes all 8 frames of the clip, but 4 were asked for"):
        FRAME_PICKERS.get("clip")(8, 4, _rng())


def _pyslowfast_sequence(center, half, rate, num_frames):
    """From the description: every ``rate``-th frame from ``half`` before to ``half`` after, held inside the video."""
    return [min(max(frame, 0), num_frames - 1) for frame in range(center - half, center + half, rate)]


@pytest.mark.parametrize("center", [0, 3, 60, 899, 1000])
@pytest.mark.parametrize(("num_frames", "rate"), [(8, 8), (32, 2), (50, 1), (4, 16), (2, 3)])
def test_clips_around_a_keyframe_are_pyslowfasts(center, num_frames, rate):
    clip = keyframe_clip(center, 900, num_frames, rate)
    assert clip.tolist() == _pyslowfast_sequence(center, num_frames * rate // 2, rate, 900)


@pytest.mark.parametrize("num_frames", [1, 3, 7, 8])
def test_the_keyframe_is_in_the_middle_of_its_clip(num_frames):
    assert keyframe_clip(500, 900, num_frames, 3)[FRAME_PICKERS.get("keyframe")(num_frames, 1, _rng())] == [500]
    assert keyframe_clip(5, 1, num_frames, 3).tolist() == [0] * num_frames
    with pytest.raises(ValueError, match="no frames"):
        keyframe_clip(0, 0, 1, 1)
