"""This package's corpora as a dataset of PySlowFast: finished pathways, and what the teachers will need."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from distinit_plugin import build
from distinit_plugin.data.flow import LiveFlow
from distinit_plugin.data.targets import CachedTargets
from distinit_plugin.data.views import finish_views
from distinit_plugin.detection.keyframes import Keyframes
from distinit_plugin.errors import UserError
from distinit_plugin.hosts.slowfast.networks import is_own
from distinit_plugin.hosts.slowfast.schema import own_cfg
from distinit_plugin.hosts.slowfast.settling import can_classify, has_terms
from distinit_plugin.hosts.slowfast.teachers import Extras, sees_flow, student_specs
from distinit_plugin.types import Crop, Sample, SampleKey, Split, ViewSpec
from distinit_plugin.video.corpus import Mixture

UNLABELED = -1
"""The label in the tuple of a clip that has none: PySlowFast's collate needs a number."""

logger = logging.getLogger(__name__)

Item = tuple[list[Tensor], int, int, Tensor, dict[str, Tensor]]


class Clips(Dataset[Any]):
    """What both datasets share: the student's pathways, normalised, and in training what teachers need (``Extras``).

    An epoch is what this package's own runner makes of it: RUNNER.CLIPS_PER_EPOCH clips, corpora mixed by WEIGHT; the
    sampler of PySlowFast's loader only shuffles them and deals them to the processes.
    """

    _views = 1
    """Of each record in the test."""

    def __init__(self, cfg: Any, split: Split, crop: Crop | None = None) -> None:
        """Find out what is shown; ``open`` says of what.

        Args:
            cfg: PySlowFast's configuration.
            split: ``train``, ``val`` or ``test``.
            crop: ``ViewSpec.crop`` of the student; ``None``: as it is.
        """
        self._cfg, self._own, self._split = cfg, own_cfg(cfg), split
        has_extras = split == "train" and has_terms(self._own)
        self._extras = Extras(self._own) if has_extras else Extras()
        specs = student_specs(self._own, split)
        self._student = {name: replace(spec, crop=crop or spec.crop) for name, spec in specs.items()}
        self._flow = build.build_live_flow(self._own) if sees_flow(self._student) else None

    def open(self, records: Mixture | Keyframes, targets: Mapping[str, CachedTargets] | None = None) -> None:
        """Take the records of the split, and stored targets of teachers."""
        specs = {f"student/{name}": spec for name, spec in self._student.items()} | self._extras.specs
        self._data = build.build_dataset(self._own, records, specs, self._split, targets=targets)
        training = self._split == "train"
        self._sampler = build.build_train_sampler(self._own, records, all_ranks=True) if training else None
        self._set_epoch_num(0)

    def _set_epoch_num(self, epoch: int) -> None:
        """Called by PySlowFast before each epoch, from 0 on."""
        if self._sampler is not None:
            self._epoch, self._indices = epoch, self._sampler.indices(epoch)

    def __len__(self) -> int:
        """Clips of an epoch; all views of a validation or test."""
        return len(self._data) * self._views if self._sampler is None else len(self._indices)

    @property
    def num_videos(self) -> int:
        """As PySlowFast counts: views."""
        return len(self)

    def _key(self, index: int) -> SampleKey:
        """The sample of a number."""
        if self._sampler is not None:
            return SampleKey(self._epoch, index, int(self._indices[index]))
        return self._fixed_key(index)

    def _fixed_key(self, index: int) -> SampleKey:
        """That of a validation or test."""
        raise NotImplementedError

    def _inputs(self, sample: Sample) -> list[Tensor]:
        return pathways_of(self._cfg, sample, self._student, self._flow) + self._extras.of(sample)


class Distinitcorpus(Clips):
    """CORPUS (or ``DATA.PATH_TO_DATA_DIR/{split}.csv``) in PySlowFast's tuple: inputs, label, index, time, meta.

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
        super().__init__(cfg, split)
        needs_labels = split != "train" or not has_terms(own) or own.ACTION.LOSS_WEIGHT > 0
        videos = build.build_corpora(own, split, labeled=True if needs_labels else None)
        if needs_labels:
            videos.check_labels(own.MODEL.NUM_CLASSES)
        targets = {}
        if self._extras.cached:
            targets = build.build_targets(own, videos, split, next(iter(self._student.values())))
        self._views = own.TEST.NUM_ENSEMBLE_VIEWS * own.TEST.NUM_SPATIAL_CROPS if split == "test" else 1
        self.open(videos, targets)

    def __getitem__(self, index: int) -> Item:
        """One clip.

        Raises:
            UserError: A video of a validation or test cannot be read; of a training, too many in a row.
        """
        advice = "take it from the list (distinit check-corpus finds all such files)"
        sample = with_views(self._data[self._key(index)], advice)
        label = sample["targets"].get("label")
        return self._inputs(sample), UNLABELED if label is None else int(label), index, torch.zeros(1), {}

    def _fixed_key(self, index: int) -> SampleKey:
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
