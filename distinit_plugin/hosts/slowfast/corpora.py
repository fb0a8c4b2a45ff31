"""This package's corpora as a dataset of PySlowFast: finished pathways, and what the teachers will need."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from distinit_plugin import build
from distinit_plugin.data.flow import LiveFlow
from distinit_plugin.data.views import finish_views
from distinit_plugin.errors import UserError
from distinit_plugin.hosts.slowfast.networks import is_own
from distinit_plugin.hosts.slowfast.schema import own_cfg
from distinit_plugin.hosts.slowfast.settling import can_classify, has_terms
from distinit_plugin.hosts.slowfast.teachers import Extras, sees_flow, student_specs
from distinit_plugin.types import Sample, SampleKey, Split, ViewSpec

UNLABELED = -1
"""The label in the tuple of a clip that has none: PySlowFast's collate needs a number."""

logger = logging.getLogger(__name__)

Item = tuple[list[Tensor], int, int, Tensor, dict[str, Tensor]]


class Distinitcorpus(Dataset[Item]):
    """CORPUS (or ``DATA.PATH_TO_DATA_DIR/{split}.csv``) in PySlowFast's tuple: inputs, label, index, time, meta.

    ``inputs`` are the student's pathways, normalised, and in training what the teachers will need (``Extras``).
    An epoch is what this package's own runner makes of it: RUNNER.CLIPS_PER_EPOCH clips, corpora mixed by WEIGHT; the
    sampler of PySlowFast's loader only shuffles them and deals them to the processes.

    The name has one capital because PySlowFast looks for ``name.capitalize()``.
    """

    def __init__(self, cfg: Any, split: Split) -> None:
        """Read the lists.

        Args:
            cfg: PySlowFast's configuration.
            split: ``train``, ``val`` or ``test``.

        Raises:
            UserError: There are no videos, or labels are missing.
        """
        own = own_cfg(cfg)
        if split == "val" and not can_classify(own, "val"):
            split = "train"  # PySlowFast builds a loader in any case; it is never read
        self._cfg, self._own, self._split = cfg, own, split
        needs_labels = split != "train" or not has_terms(own) or own.ACTION.LOSS_WEIGHT > 0
        videos = build.build_corpora(own, split, labeled=True if needs_labels else None)
        if needs_labels:
            videos.check_labels(own.MODEL.NUM_CLASSES)
        self._extras = Extras(own) if split == "train" and has_terms(own) else Extras()
        self._student = student_specs(own, split)
        specs = {f"student/{name}": spec for name, spec in self._student.items()} | self._extras.specs
        targets = {}
        if self._extras.cached:
            targets = build.build_targets(own, videos, split, next(iter(self._student.values())))
        self._data = build.build_dataset(own, videos, specs, split, targets=targets)
        self._views = own.TEST.NUM_ENSEMBLE_VIEWS * own.TEST.NUM_SPATIAL_CROPS if split == "test" else 1
        self._sampler = build.build_train_sampler(own, videos, all_ranks=True) if split == "train" else None
        self._flow = build.build_live_flow(own) if sees_flow(self._student) else None
        self._set_epoch_num(0)

    def _set_epoch_num(self, epoch: int) -> None:
        """Called by PySlowFast before each epoch, from 0 on."""
        if self._sampler is not None:
            self._epoch, self._indices = epoch, self._sampler.indices(epoch)

    def __len__(self) -> int:
        """Clips of an epoch; all views of all videos in the test."""
        return len(self._indices) if self._sampler is not None else len(self._data) * self._views

    @property
    def num_videos(self) -> int:
        """As PySlowFast counts: views of videos."""
        return len(self)

    def __getitem__(self, index: int) -> Item:
        """One clip.

        Raises:
            UserError: A video of a validation or test cannot be read; of a training, too many in a row.
        """
        advice = "take it from the list (distinit check-corpus finds all such files)"
        sample = with_views(self._data[self._key(index)], advice)
        label = sample["targets"].get("label")
        inputs = pathways_of(self._cfg, sample, self._student, self._flow) + self._extras.of(sample)
        return inputs, UNLABELED if label is None else int(label), index, torch.zeros(1), {}

    def _key(self, index: int) -> SampleKey:
        if self._sampler is not None:
            return SampleKey(self._epoch, index, int(self._indices[index]))
        video, view = divmod(index, self._views)
        clip, crop = divmod(view, self._own.TEST.NUM_SPATIAL_CROPS if self._split == "test" else 1)
        return SampleKey(0, index, video, clip, crop)


def with_views(sample: Sample, advice: str) -> Sample:
    """The sample, if it holds anything; what was bad on the way to it is named in the log, with what to do.

    Raises:
        UserError: It holds nothing.
    """
    for video in sample["bad"]:
        logger.warning("%s: %s", video.path, video.reason)
    if not sample["views"]:
        video = sample["bad"][0]
        raise UserError(f"{video.path}: {video.reason}. PySlowFast's evaluation cannot leave a video out: {advice}.")
    return sample


def pathways_of(cfg: Any, sample: Sample, specs: Mapping[str, ViewSpec], flow: LiveFlow | None) -> list[Tensor]:
    """What a network of PySlowFast's configuration is given: normalised views (C,T,H,W) of a sample.

    Args:
        cfg: PySlowFast's configuration.
        sample: With its views.
        specs: The network's views by its own names.
        flow: Computes flow, where it sees any.
    """
    batch = {name: view.unsqueeze(0) for name, view in sample["views"].items()}
    views = [view[0] for view in finish_views(batch, specs, "cpu", flow=flow).values()]
    if is_own(cfg.MODEL.MODEL_NAME):
        return views
    from distinit_plugin.hosts.slowfast.boot import boot

    boot()  # a worker that was not forked knows nothing of PySlowFast yet
    from slowfast.datasets.utils import pack_pathway_output

    packed: list[Tensor] = pack_pathway_output(cfg, views[0])
    return packed
