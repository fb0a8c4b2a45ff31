"""PySlowFast's decoding by this package's reader: the frames that its sampling asks for, or the reason why not."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distinit_plugin.errors import VideoError
from distinit_plugin.video.decode import open_video
from distinit_plugin.video.index import IndexCache

TIMEOUT = 30.0
"""Seconds that one file may take."""

_known = IndexCache(None)

logger = logging.getLogger(__name__)


def decode(
    path: str,
    sampling_rate: Sequence[int],
    num_frames: Sequence[int],
    clip_idx: int = -1,
    num_clips_uniform: int = 10,
    video_meta: Any = None,
    target_fps: float = 30,
    backend: str = "pyav",
    max_spatial_scale: int = 0,
    use_offset: bool = False,
    time_diff_prob: float = 0.0,
    gaussian_prob: float = 0.0,
    min_delta: float = -np.inf,
    max_delta: float = np.inf,
    temporally_rnd_clips: bool = True,
) -> tuple[list[Tensor] | None, np.ndarray | None, list[Any] | None]:
    """What ``slowfast.datasets.decoder.decode`` gives, for a file by its name; arguments are its.

    The clips are those that PySlowFast's own functions choose for a video that is decoded as a whole; only their frames
    are decoded.

    Returns:
        Clips uint8 (T,H,W,C), (clips, 3) of start, end and distance in frames, and what was changed in time; three
        times ``None`` for a file that cannot be read, with the reason in the log.
    """
    from slowfast.datasets import decoder, transform

    # Clips come in the order of time and are dealt out at random, which is part of what the host trains on.
    shuffled = len(num_frames) > 1 and temporally_rnd_clips
    owners = np.random.permutation(len(num_frames)) if shuffled else np.arange(len(num_frames))  # noqa: NPY002
    counts = [num_frames[owner] for owner in owners]
    try:
        with open_video(path, cache=_known, timeout=TIMEOUT) as reader:
            total = reader.index.num_frames
            rate = _frame_rate(reader.index.seconds, target_fps)
            spans = decoder.get_multiple_start_end_idx(
                total,
                [max(1.0, sampling_rate[owner] * num_frames[owner] / target_fps * rate) for owner in owners],
                clip_idx,
                num_clips_uniform,
                min_delta=min_delta,
                max_delta=max_delta,
                use_offset=use_offset,
            )
            clips = []
            for (start, end, _), count in zip(spans, counts, strict=True):
                places = torch.linspace(float(start), float(end), count).clamp(0, total - 1).long()
                clips.append(torch.from_numpy(reader.read(places.tolist())))
    except VideoError as error:
        logger.warning("%s", error)
        return None, None, None
    changes: list[Any] = [None] * len(clips)
    if time_diff_prob > 0.0 or gaussian_prob > 0.0:
        for number, clip in enumerate(clips):
            clips[number], changes[number] = transform.augment_raw_frames(clip, time_diff_prob, gaussian_prob)
    places_of = np.argsort(owners)
    return [clips[place] for place in places_of], spans[places_of], [changes[place] for place in places_of]


def _frame_rate(seconds: np.ndarray, unknown: float) -> float:
    """Frames per second by the time stamps; ``unknown`` for a single frame."""
    return float((len(seconds) - 1) / (seconds[-1] - seconds[0])) if len(seconds) > 1 else unknown


def stands_for_container(value: Any) -> bool:
    """Whether this is what ``name_of_video`` gives in place of an open file."""
    return isinstance(value, _Name)


class _Name(str):
    """A file that has not been opened."""


def name_of_video(path: str | os.PathLike[str]) -> str:
    """The file's name in place of an open container, which a forked worker could wait for for ever."""
    if not os.path.exists(path):
        raise FileNotFoundError(f"there is no such file: {os.fspath(path)}")
    return _Name(os.fspath(path))
