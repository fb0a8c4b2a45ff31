"""Keyframe → sample: the clip around it, the boxes in it, and what the persons do."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import torch

from distinit_plugin.data.colour import ColourAugmentation
from distinit_plugin.data.dataset import ClipDataset
from distinit_plugin.data.flow import StoredFlow
from distinit_plugin.detection.geometry import clip_boxes, has_area, to_view
from distinit_plugin.detection.keyframes import Keyframes
from distinit_plugin.errors import VideoError
from distinit_plugin.types import ACTIONS, BOXES, BadVideo, Sample, Split, ViewRegion, ViewSpec
from distinit_plugin.video.decode import FrameSource
from distinit_plugin.video.grid import Place
from distinit_plugin.video.index import FrameIndex
from distinit_plugin.video.sampling import Clip, keyframe_clip
from distinit_plugin.video.transforms import Geometry

# First word of the entropy of a random stream; the dataset of clips has 3 to 5.
_COLOUR_STREAM = 6

# A keyframe may lie this far behind the last frame, seconds: annotations are made to whole seconds.
_BEYOND_END = 1.0

# As video.sampling: a frame counts as presented this much before its time stamp, seconds.
_CLOCK_TOLERANCE = 1e-3


class KeyframeDataset(ClipDataset):
    """Clips around annotated moments. ``dataset[key]`` is a pure function of (seed, key); ``key.index`` is a keyframe.

    Samples have ``region``, where there are boxes ``targets["boxes"]`` float32 (N,4), pixels of the student's view, and
    where these come with actions ``targets["actions"]`` float32 (N,K). Training: boxes of which the crop leaves nothing
    are dropped with their actions, so that N may be 0; bad videos are replaced as in ``ClipDataset``. Validation and
    test: row i is ``keyframes.boxes(key.index)[i]``; ``key.crop`` 1 mirrors the view.
    """

    def __init__(
        self,
        keyframes: Keyframes,
        specs: Mapping[str, ViewSpec],
        *,
        clip_spec: ViewSpec,
        split: Split,
        seed: int,
        num_classes: int,
        scales: tuple[int, int] = (256, 320),
        flip: bool = True,
        colour: ColourAugmentation | None = None,
        timeout: float | None = 30.0,
        index_cache: str | None = None,
        max_replacements: int = 10,
        flow: StoredFlow | None = None,
    ) -> None:
        """Prepare; nothing is read yet.

        Args:
            keyframes: Which there are.
            specs: The caller's name (``student/rgb``) → what that network must be fed.
            clip_spec: The spec that defines the clip, and the view in whose pixels boxes are.
            split: ``train``: random crops. ``val``, ``test``: as ``ViewSpec.crop`` says.
            seed: Integer ≥ 0.
            num_classes: K.
            scales: Training: range of the short side from which crops are cut, pixels.
            flip: Training: mirror half of the clips.
            colour: Training: random changes of colour.
            timeout: Seconds that one file may take; ``None``: any time.
            index_cache: Folder for time stamps of videos already seen; ``None`` or empty: in memory only.
            max_replacements: Training: bad keyframes in a row that end the job.
            flow: Where views of flow are read; ``None``: samples hold the pairs of frames to compute it from.

        Raises:
            UserError: An action is not 1 … K.
        """
        super().__init__(
            keyframes,
            specs,
            clip_spec=clip_spec,
            split=split,
            seed=seed,
            scales=scales,
            flip=flip,
            timeout=timeout,
            index_cache=index_cache,
            max_replacements=max_replacements,
            flow=flow,
        )
        if keyframes.has_actions:
            keyframes.check_labels(num_classes)
        self.keyframes = keyframes
        self._num_classes = num_classes
        self._colour = colour if split == "train" else None

    def remember(self, bad: Iterable[BadVideo]) -> None:
        """Nothing: a video that is bad at one keyframe may be good at the others."""

    def _name(self, index: int) -> str:
        """What is bad when a record cannot be read: the one keyframe of its video."""
        moment = self.keyframes.moment(index)
        return f"{self.videos[index].path} at {moment.second} s"

    def _open(self, index: int) -> FrameSource:
        moment = self.keyframes.moment(index)
        return self.keyframes.sources.open(moment.video, moment.second, cache=self._cache, timeout=self._timeout)

    def _clip(self, frames: FrameIndex, index: int, place: Place, rng: np.random.Generator) -> Clip:
        """The clip around the keyframe, which is number T//2 of it."""
        spec = self._clip_spec
        timeline = frames.timeline(spec.target_fps)
        second = self.keyframes.seconds[index] - self.keyframes.sources.start
        times = frames.seconds - frames.seconds[0]
        if second < 0 or second > times[-1] + _BEYOND_END:
            start = self.keyframes.sources.start
            raise VideoError(
                self.videos[index].path,
                f"its pictures are of {start:g} to {start + times[-1]:g} s, but a keyframe is at "
                f"{self.keyframes.seconds[index]:g} s (see KEYFRAMES.VIDEO_START and KEYFRAMES.FRAMES_START)",
            )
        if spec.target_fps is None:
            center = int(np.searchsorted(times, second + _CLOCK_TOLERANCE, side="right")) - 1
        else:
            center = int((second + min(_CLOCK_TOLERANCE, 0.25 / spec.target_fps)) * spec.target_fps)
        places = keyframe_clip(center, len(timeline), spec.num_frames or 1, spec.sampling_rate)
        return Clip(timeline, places)

    def _views(
        self, reader: FrameSource, clip: Clip, regions: Mapping[str, Geometry], seed: int
    ) -> dict[str, torch.Tensor]:
        views = super()._views(reader, clip, regions, seed)
        if self._colour is not None:
            change = self._colour.draw(np.random.default_rng([_COLOUR_STREAM, seed]))
            coloured = {spec.pixels for spec in self.specs.values() if spec.modality == "rgb"}
            views |= {pixels: change(views[pixels]) for pixels in coloured}
        return views

    def _annotate(self, sample: Sample, index: int, region: ViewRegion) -> None:
        sample["region"] = region
        if not self.keyframes.has_boxes:
            return
        boxes = clip_boxes(to_view(self.keyframes.boxes(index), region), region.view_height, region.view_width)
        kept = has_area(boxes) if self._train else np.ones(len(boxes), dtype=bool)
        sample["targets"][BOXES] = torch.from_numpy(boxes[kept].astype(np.float32))
        if self.keyframes.has_actions:
            sample["targets"][ACTIONS] = torch.from_numpy(self.keyframes.actions(index, self._num_classes)[kept])
