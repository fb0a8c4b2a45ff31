"""This package's keyframes as a dataset of PySlowFast, and what its meter compares detections with."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable
from functools import wraps
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from distinit_plugin import build
from distinit_plugin.detection.geometry import to_fractions
from distinit_plugin.detection.keyframes import Keyframes
from distinit_plugin.errors import UserError
from distinit_plugin.hosts.slowfast.corpora import Clips, with_views
from distinit_plugin.hosts.slowfast.patches import replaced
from distinit_plugin.hosts.slowfast.schema import own_cfg
from distinit_plugin.hosts.slowfast.settling_boxes import KEYFRAMES
from distinit_plugin.types import ACTIONS, BOXES, Sample, SampleKey, Split

logger = logging.getLogger(__name__)

Item = tuple[list[Tensor], npt.NDArray[np.float32], int, Tensor, dict[str, Any]]

_videos: dict[str, tuple[str, ...]] = {}
"""Videos of the dataset that was built last for a use, in the order of the numbers in its metadata."""


class Distinitava(Clips):
    """AVA and KEYFRAMES in PySlowFast's tuple: inputs, actions (N,K), index, time, boxes.

    ``inputs`` are as of ``Distinitcorpus``. ``boxes`` float64 (N,4) are in pixels of the view, ``ori_boxes`` (N,4) in
    fractions of the picture, ``metadata`` holds the number of the video and the second for each box. Validation and
    test see whole pictures.

    The name has one capital because PySlowFast looks for ``name.capitalize()``.
    """

    def __init__(self, cfg: Any, split: Split) -> None:
        """Read the annotations.

        Args:
            cfg: PySlowFast's configuration.
            split: ``train``, ``val`` or ``test``.

        Raises:
            UserError: A file is missing or wrong, no keyframe is left, or one is not at a whole second.
        """
        super().__init__(cfg, split, None if split == "train" else "whole")
        self._keyframes = build.build_keyframes(self._own, split)
        _check_seconds(self._keyframes)
        _videos[split] = self._keyframes.videos
        self.open(self._keyframes)

    def __getitem__(self, index: int) -> Item:
        """One keyframe.

        Raises:
            UserError: One of a validation or test cannot be read; of a training, too many in a row.
        """
        advice = "take its rows from AVA.TEST_PREDICT_BOX_LISTS (distinit check-ava finds what is missing)"
        sample = with_views(self._data[self._key(index)], advice)
        boxes = sample["targets"][BOXES].double().numpy()
        number = sample["key"].index
        actions = np.zeros((len(boxes), self._own.MODEL.NUM_CLASSES), dtype=np.float32)
        if ACTIONS in sample["targets"]:
            actions = sample["targets"][ACTIONS].numpy()
        place = [int(self._keyframes.video[number]), int(self._keyframes.seconds[number])]
        meta = {"boxes": boxes, "ori_boxes": self._fractions(sample, boxes), "metadata": [place] * len(boxes)}
        return self._inputs(sample), actions, index, torch.zeros(1), meta

    def _fractions(self, sample: Sample, boxes: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """(N,4) as the file has them; in training, where nobody looks, as far as they are in the view."""
        if self._split != "train":
            return self._keyframes.boxes(sample["key"].index)
        return to_fractions(boxes, sample["region"])

    def _fixed_key(self, index: int) -> SampleKey:
        return SampleKey(0, index, index, 0, int(self._own.AVA.TEST_FORCE_FLIP))


def _check_seconds(keyframes: Keyframes) -> None:
    broken = np.flatnonzero(keyframes.seconds % 1)
    if len(broken):
        moment = keyframes.moment(int(broken[0]))
        raise UserError(
            f"{keyframes.name}: {moment.video} has a keyframe at {moment.second:g} s, but PySlowFast's evaluation "
            "knows whole seconds alone. Use distinit run."
        )


# -------------------------------------------------------------------------------------------------------- the meter

Rows = tuple[dict[str, list[Any]], dict[str, list[Any]], dict[str, list[Any]]]


def their_truth(judge: build.Judge) -> Rows:
    """Ground truth as ``slowfast.utils.ava_eval_helper.read_csv`` gives it: boxes (y1, x1, y2, x2), actions, scores."""
    boxes: dict[str, list[Any]] = defaultdict(list)
    actions: dict[str, list[Any]] = defaultdict(list)
    scores: dict[str, list[Any]] = defaultdict(list)
    truth = judge.truth
    for row in np.flatnonzero(np.isin(truth.actions, list(judge.label_map))):
        key = moment_key(truth.videos[truth.video[row]], truth.seconds[row])
        x1, y1, x2, y2 = truth.boxes[row].tolist()
        boxes[key].append([y1, x1, y2, x2])
        actions[key].append(int(truth.actions[row]))
        scores[key].append(1.0)
    return boxes, actions, scores


def moment_key(video: str, second: float) -> str:
    """How its evaluation calls a keyframe."""
    return f"{video},{int(second):04d}"


def with_own_files(theirs: Callable[..., None]) -> Callable[..., None]:
    """``AVAMeter.__init__``: with this package's keyframes, its files are read by this package's readers."""

    @wraps(theirs)
    def start(self: Any, overall_iters: int, cfg: Any, mode: str) -> None:
        if (cfg.TEST if mode == "test" else cfg.TRAIN).DATASET != KEYFRAMES:
            theirs(self, overall_iters, cfg, mode)
            return
        from slowfast.utils import meters

        judge = build.build_judge(own_cfg(cfg), "test")
        excluded = {moment_key(video, second) for video, second in judge.excluded}
        categories = [{"id": number, "name": name} for number, name in sorted(judge.label_map.items())]
        truth: Rows = ({}, {}, {}) if mode == "train" else their_truth(judge)
        with (
            replaced(
                meters,
                read_exclusions=lambda _: excluded,
                read_labelmap=lambda _: (categories, set(judge.label_map)),
                read_csv=lambda *_: truth,
            ),
            replaced(meters.ava_helper, load_image_lists=lambda *_: ([], list(_videos[mode]))),
        ):
            theirs(self, overall_iters, cfg, mode)

    return start


def one_by_one(theirs: Callable[..., Any]) -> Callable[..., Any]:
    """``construct_loader``: keyframes of a validation are whole pictures of any size, one at a time per process."""

    @wraps(theirs)
    def construct_loader(cfg: Any, split: Split, is_precise_bn: bool = False) -> Any:
        if split == "val" and cfg.TRAIN.DATASET == KEYFRAMES:
            cfg = cfg.clone()
            cfg.defrost()
            cfg.TRAIN.BATCH_SIZE = max(1, cfg.NUM_GPUS)
        return theirs(cfg, split, is_precise_bn)

    return construct_loader


def replace_functions() -> None:
    """Put these in place of PySlowFast's."""
    from slowfast.datasets import loader
    from slowfast.utils import meters

    loader.construct_loader = one_by_one(loader.construct_loader)
    meters.AVAMeter.__init__ = with_own_files(meters.AVAMeter.__init__)
