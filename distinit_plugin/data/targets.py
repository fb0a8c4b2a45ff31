"""Stored outputs of teachers as targets of samples."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch import Tensor

from distinit_plugin.errors import UserError, VideoError
from distinit_plugin.teachers.cache import TargetStore
from distinit_plugin.types import ViewSpec
from distinit_plugin.video.corpus import Mixture
from distinit_plugin.video.grid import Place
from distinit_plugin.video.records import shorten
from distinit_plugin.video.transforms import picked_frames


@dataclass(frozen=True)
class CachedTargets:
    """The outputs of one teacher for the videos of a job.

    Attributes:
        store: Where they are.
        rows: (V,) int64, the store's row of each video of the job.
        view: What the teacher would be fed; its picks say which frames' outputs are read.
    """

    store: TargetStore
    rows: npt.NDArray[np.int64]
    view: ViewSpec

    def read(self, path: str, index: int, place: Place, num_clip_frames: int, seed: int) -> Tensor:
        """What the teacher gave for a clip.

        Args:
            path: The video, for errors.
            index: Its number in the job.
            place: Clip and crop.
            num_clip_frames: T of the student's clip.
            seed: As in ``build_views``: the frames are those that the teacher would be shown.

        Returns:
            (P,…) of the store's type.

        Raises:
            VideoError: The teacher could not see this video, or the file is not readable any more.
        """
        assert place.clip is not None, "targets are stored for clips of a grid"
        row = int(self.rows[index])
        if row in self.store.bad:
            raise VideoError(path, f"it has no stored targets: {self.store.bad[row]}")
        crop = 0 if self.view.crop == "center" else place.crop
        assert crop is not None, "targets are stored for crops of a grid"
        frames = picked_frames(self.view, num_clip_frames, seed) if self.store.layout.each_frame else None
        try:
            return self.store.read(row, place.clip * self.store.layout.crops + crop, frames)
        except (OSError, ValueError) as error:
            raise VideoError(path, f"its stored targets cannot be read ({error})") from error


def rows_of(store: TargetStore, videos: Mixture) -> npt.NDArray[np.int64]:
    """The store's row of each video, by their names; a store may hold more videos.

    Raises:
        UserError: It lacks one.
    """
    if store.is_of(videos.names()):
        return np.arange(len(videos), dtype=np.int64)
    known = {name: row for row, name in enumerate(store.names)}
    missing = [name for name in videos.names() if name not in known]
    if missing:
        raise UserError(
            f"corpus: {store.folder} holds targets of {store.layout.videos} videos, {len(missing)} of the "
            f"{len(videos)} of this job are not among them ({shorten(missing[:6], len(missing))}). Take them out of "
            "the list, name them as they were, or make targets for this list (distinit cache-targets)."
        )
    return np.fromiter((known[name] for name in videos.names()), dtype=np.int64, count=len(videos))
