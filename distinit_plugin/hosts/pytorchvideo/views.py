"""Views of student and teachers as a dict transform of PyTorchVideo, with the numbers of this package's data path."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from distinit_plugin.data.views import finish_views
from distinit_plugin.errors import UserError
from distinit_plugin.hosts.pytorchvideo.samplers import new_generator
from distinit_plugin.types import ViewSpec
from distinit_plugin.video.sampling import Clip, clip_at, clip_span
from distinit_plugin.video.transforms import Geometry, build_views, fixed_geometry, random_geometry

WHITE = 255


class Views:
    """A callable on samples of a dataset: ``video`` goes, the views come, by the names of their specs.

    One region of the picture and one mirroring for all networks, each at its own size; frames of teachers are picked
    from the student's clip. Everything else in the sample stays.
    """

    def __init__(
        self,
        specs: Mapping[str, ViewSpec],
        *,
        train: bool = True,
        scales: tuple[int, int] = (128, 160),
        flip: bool = True,
        scale: int = 0,
        num_crops: int = 1,
        finish: bool = True,
    ) -> None:
        """Prepare.

        Args:
            specs: Name of each view → what it must be (``build.view_specs(student, teachers, "train")``); one of them
                is the clip itself (``pick`` is ``clip``).
            train: Random crops; else the crop that ``aug_index`` numbers.
            scales: Training: range of the short side from which crops are cut, pixels.
            flip: Training: mirror half of the clips.
            scale: Else: short side from which crops are cut, pixels; 0: the crop size.
            num_crops: Else: 1 (the centre), or 3.
            finish: Normalised float32; else uint8 under ``ViewSpec.pixels``, for ``data.views.finish_views`` on the
                device.

        Raises:
            UserError: A view is of flow, or there is no clip among them.
        """
        flows = [name for name, spec in specs.items() if spec.modality != "rgb"]
        if flows:
            raise UserError(f"{', '.join(flows)}: views of flow need this package's own data path (distinit run).")
        clips = [spec for spec in specs.values() if spec.pick == "clip"]
        if not clips:
            raise UserError("specs: none of the views is the clip itself (pick 'clip'). Give the student's, too.")
        if num_crops not in (1, 3):
            raise UserError(f"num_crops is {num_crops}. Allowed: 1, 3.")
        self.specs, self.clip = dict(specs), clips[0]
        self._train, self._scales, self._flip = train, scales, flip
        self._scale, self._num_crops, self._finish = scale, num_crops, finish

    def __call__(self, sample: Mapping[str, Any]) -> dict[str, Any]:
        """Views of a sample.

        Args:
            sample: With ``video``, (3,T,H,W) in 0 … 255 as decoded, or a list of those.

        Raises:
            UserError: Something came before that changed the values, or there are too few frames for a pick.
        """
        frames, clip = self._clip_of(sample["video"])
        rng = new_generator()
        regions = self._regions(frames.shape[1], frames.shape[2], int(self._crop_of(sample)), rng)
        seed = int(rng.integers(0, 2**63))
        views = build_views(lambda numbers: frames[numbers], clip, self.specs, regions, seed)
        if self._finish:
            batch = {name: view.unsqueeze(0) for name, view in views.items()}
            # A copy each: some share one tensor, into which a later transform may write.
            views = {name: view[0].clone() for name, view in finish_views(batch, self.specs, "cpu").items()}
        return {**{key: value for key, value in sample.items() if key != "video"}, **views}

    def _crop_of(self, sample: Mapping[str, Any]) -> int:
        crop = sample.get("aug_index", 0)
        return crop[0] if isinstance(crop, Sequence) else crop

    def _clip_of(self, video: Tensor | Sequence[Tensor]) -> tuple[npt.NDArray[np.uint8], Clip]:
        """Frames (M,H,W,3), and which of them the clip is.

        A video that is shorter than the clip loops; frames at another rate than the sampler's are thinned out in
        proportion.
        """
        is_list = not isinstance(video, Tensor)
        frames = _as_bytes(torch.cat(list(video), dim=1) if not isinstance(video, Tensor) else video)
        total, wanted, rate = len(frames), self.clip.num_frames, self.clip.sampling_rate
        if is_list or wanted is None:
            places = np.arange(total, dtype=np.int64)
        elif total <= clip_span(wanted, rate):
            places = clip_at(0, total, wanted, rate)
        else:
            places = np.arange(wanted, dtype=np.int64) * rate * total // clip_span(wanted, rate)
        return frames, Clip(np.arange(total, dtype=np.int64), places)

    def _regions(self, height: int, width: int, crop: int, rng: np.random.Generator) -> dict[str, Geometry]:
        """``ViewSpec.crop`` → region."""
        size = self.clip.crop_size
        scale = self._scale or size
        center = fixed_geometry(height, width, crop_size=size, scale=scale)
        if self._train:
            shared = random_geometry(height, width, crop_size=size, scales=self._scales, flip=self._flip, rng=rng)
        else:
            shared = fixed_geometry(height, width, crop_size=size, scale=scale, crop=crop, num_crops=self._num_crops)
        return {"shared": shared, "center": center, "whole": Geometry(0, 0, height, width)}


def _as_bytes(video: Tensor) -> npt.NDArray[np.uint8]:
    """(3,T,H,W) of any type → (T,H,W,3) uint8.

    Raises:
        UserError: The values are not those that a decoder gives.
    """
    if video.ndim != 4 or video.shape[0] != 3:
        raise UserError(f"Views: sample['video'] is {tuple(video.shape)}. Give it (3,T,H,W), as decoded.")
    codes = video.to(torch.uint8)
    if video.dtype != torch.uint8 and not torch.equal(codes.to(video.dtype), video):
        raise UserError(
            f"Views: sample['video'] must hold whole numbers from 0 to {WHITE}, as decoded. Put Views before "
            "transforms that scale, normalise or resize."
        )
    return codes.permute(1, 2, 3, 0).contiguous().numpy()
