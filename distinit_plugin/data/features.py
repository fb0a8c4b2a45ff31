"""Training samples whose pixels were replaced by features that a frozen network gave once."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from torch import Tensor

from distinit_plugin.data.dataset import ClipDataset
from distinit_plugin.errors import VideoError
from distinit_plugin.types import Sample, ViewSpec
from distinit_plugin.video.corpus import Mixture
from distinit_plugin.video.grid import Place

FEATURES = "features"
"""The name of the one view."""


class FeatureClips(ClipDataset):
    """As ``ClipDataset`` in training; a random clip of a video is one of those whose features are known."""

    def __init__(self, videos: Mixture, features: Mapping[str, Tensor], *, seed: int) -> None:
        """Prepare.

        Args:
            videos: The corpora.
            features: Path → (n,D), the features of the video's clips; videos that are missing count as bad.
            seed: Integer ≥ 0.
        """
        super().__init__(videos, {}, clip_spec=ViewSpec(), split="train", seed=seed)
        self._features = features

    def _fill(self, sample: Sample, index: int, place: Place, rng: np.random.Generator) -> None:
        clips = self._features.get(sample["path"])
        if clips is None:
            raise VideoError(sample["path"], "no clip could be read when features were extracted")
        sample["views"] = {FEATURES: clips[int(rng.integers(len(clips)))]}
        self._label(sample, index)
