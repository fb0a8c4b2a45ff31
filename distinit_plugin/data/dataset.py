"""Key → sample: choose a clip, decode its frames once, make every network's view of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial, reduce
from typing import Any, Literal

import numpy as np
import torch
from torch.utils.data import Dataset

from distinit_plugin.data.flow import StoredFlow
from distinit_plugin.data.loader import read_items
from distinit_plugin.data.records import Records
from distinit_plugin.data.targets import CachedTargets
from distinit_plugin.errors import UserError, VideoError
from distinit_plugin.types import BadVideo, Sample, SampleKey, Split, ViewRegion, ViewSpec
from distinit_plugin.video.corpus import Corpus, Mixture
from distinit_plugin.video.decode import FrameSource, open_video
from distinit_plugin.video.grid import Grid, Place
from distinit_plugin.video.index import FrameIndex, IndexCache
from distinit_plugin.video.sampling import Clip, clip_at, dense_starts, random_clip, uniform_clip
from distinit_plugin.video.transforms import Geometry, build_views, fixed_geometry, random_geometry, view_size

# First word of the entropy of each random stream; the sampler has 1 and 2.
_REPLACEMENT_STREAM = 3
_VIEW_STREAM = 4
_GRID_STREAM = 5

MEMORY_BYTES = 256 * 2**20
"""Decoded frames that a worker keeps of the video it tests, so that overlapping clips and crops decode once."""


class FrameMemory:
    """The decoded frames of one video, so that no frame is decoded twice in a row."""

    def __init__(self, max_bytes: int = MEMORY_BYTES) -> None:
        """Keep at most ``max_bytes`` beyond what one request needs."""
        self._max_bytes = max_bytes
        self._path = ""
        self._frames: dict[int, np.ndarray] = {}

    def choose(self, path: str) -> None:
        """Forget everything unless the frames are those of ``path``."""
        if path != self._path:
            self._path = path
            self._frames = {}

    def read(self, indices: Sequence[int] | np.ndarray, fetch: Callable[[list[int]], np.ndarray]) -> np.ndarray:
        """Frames uint8 (n,H,W,3); only those not kept are fetched, each once."""
        wanted = [int(index) for index in indices]
        missing = sorted(set(wanted) - self._frames.keys())
        if missing:
            fetched = fetch(missing)
            if (len(self._frames) + len(missing)) * fetched[0].nbytes > self._max_bytes:
                needed = set(wanted)
                self._frames = {index: frame for index, frame in self._frames.items() if index in needed}
            # Copies: a view would keep the whole fetched block alive.
            self._frames |= {index: frame.copy() for index, frame in zip(missing, fetched, strict=True)}
        return np.stack([self._frames[index] for index in wanted])


class ClipDataset(Dataset[Sample]):
    """Samples of one or several corpora. ``dataset[key]`` is a pure function of (seed, key).

    Training: a random clip, crop and flip, or one of a grid's. A bad video is named in ``sample["bad"]`` and replaced
    by another of the same corpus, chosen by (seed, key, attempt). Validation and test: the clip and crop that the key
    numbers; a bad video is named and its sample has no views, so that ``collate`` leaves it out.

    Attributes:
        videos: The corpora under one index.
        specs: The views that each sample holds, by the caller's names.
        has_dense_clips: The number of test clips of a video depends on its length.
    """

    def __init__(
        self,
        corpora: Records | Sequence[Corpus],
        specs: Mapping[str, ViewSpec],
        *,
        clip_spec: ViewSpec,
        split: Split,
        seed: int,
        scales: tuple[int, int] = (128, 160),
        flip: bool = True,
        test_scale: int = 0,
        num_clips: int = 1,
        num_crops: int = 1,
        test_clips: Literal["uniform", "dense"] = "uniform",
        dense_stride: int = 1,
        timeout: float | None = 30.0,
        index_cache: str | None = None,
        max_replacements: int = 10,
        flow: StoredFlow | None = None,
        grid: Grid | None = None,
        targets: Mapping[str, CachedTargets] | None = None,
    ) -> None:
        """Prepare; nothing is read yet.

        Args:
            corpora: Where the videos come from.
            specs: The caller's name (``student/rgb``, ``IMAGENET/rgb``) → what that network must be fed.
            clip_spec: The spec that defines the clip (the student's first view).
            split: ``train``: random clips. ``val``, ``test``: the clips that keys number.
            seed: Integer ≥ 0.
            scales: Training: range of the short side from which crops are cut, pixels.
            flip: Training: mirror half of the clips.
            test_scale: Test: short side from which crops are cut, pixels; 0: the crop size.
            num_clips: Test: uniformly spaced clips of a video.
            num_crops: Test: crops of a clip, 1 or 3; keys number them, and from their number on the mirrored ones.
            test_clips: ``uniform``, or ``dense``: a clip every ``dense_stride`` frames.
            dense_stride: Frames (after resampling) between the starts of dense clips.
            timeout: Seconds that one file may take; ``None``: any time.
            index_cache: Folder for time stamps of videos already seen; ``None`` or empty: in memory only.
            max_replacements: Training: bad videos in a row that end the job.
            flow: Where views of flow are read; ``None``: samples hold the pairs of frames to compute it from.
            grid: Training: the clips and crops that are shown, and how centre crops are cut; ``None``: any.
            targets: Teacher → its stored outputs, which samples hold as targets.
        """
        self.videos: Records = Mixture(corpora) if isinstance(corpora, Sequence) else corpora
        self.specs = dict(specs)
        self._clip_spec = clip_spec
        self._train = split == "train"
        self._seed = seed
        self._scales = scales
        self._flip = flip
        self._grid = grid or Grid()
        self._fixed_scale = (self._grid.scale if self._train else test_scale) or clip_spec.crop_size
        self._num_clips = self._grid.clips if self._train else num_clips
        self._num_crops = max(self._grid.crops, 1) if self._train else num_crops
        self.has_dense_clips = test_clips == "dense" and not self._train
        self._dense_stride = dense_stride
        self._timeout = timeout
        self._cache = IndexCache(index_cache or None)
        self._max_replacements = max_replacements
        self._flow = flow
        self._targets = dict(targets or {})
        self._memory = FrameMemory()
        self._known_bad: dict[str, str] = {}

    def __len__(self) -> int:
        """Number of videos (not of samples, which a sampler decides)."""
        return len(self.videos)

    def __getitem__(self, key: SampleKey) -> Sample:
        """The sample of a key.

        Raises:
            UserError: Training only: every replacement was bad too.
        """
        key = SampleKey(*key)
        bad: list[BadVideo] = []
        for attempt in range(self._max_replacements + 1 if self._train else 1):
            index = self._replacement(key, attempt) if attempt else key.index
            record = self.videos[index]
            rng = np.random.default_rng([_VIEW_STREAM, self._seed, key.epoch, key.position, index, attempt])
            place = self._place(key, index, attempt)
            sample: Sample = {"views": {}, "key": key, "path": record.path, "targets": {}, "bad": bad}
            try:
                self._fill(sample, index, place, rng)
            except VideoError as error:
                self._known_bad[self._name(index)] = error.reason
                bad.append(BadVideo(record.path, error.reason))
            else:
                return sample
        if self._train:
            reasons = "; ".join(f"{video.path}: {video.reason}" for video in bad[:3])
            raise UserError(
                f"{len(bad)} videos in a row are bad, the last tried in place of the first ({reasons}; …). Check the "
                "corpus with distinit check-corpus."
            )
        return sample

    def clips_per_video(
        self,
        *,
        num_workers: int = 0,
        rank: int = 0,
        world_size: int = 1,
        gather_objects: Callable[[Any], list[Any]] = lambda value: [value],
        on_video: Callable[[int], None] = lambda done: None,
    ) -> np.ndarray:
        """Number of test clips of each video, int64 (len(self),), for ``ViewSampler``.

        Uniform clips: known at once. Dense clips: the time stamps of every video are read first (no frame is decoded;
        ``index_cache`` keeps them for the test itself). A bad video counts one clip, which then reports it.

        Args:
            num_workers: Processes that read.
            rank: This rank; it reads each ``world_size``-th video, those that ``ViewSampler`` deals to it.
            world_size: Number of ranks, all of which must call this.
            gather_objects: The objects of all ranks.
            on_video: Called with the videos that this rank has done.

        Raises:
            UserError: A process died.
        """
        if not self.has_dense_clips:
            return np.full(len(self), self._num_clips, dtype=np.int64)
        own = range(rank, len(self), world_size)
        counts = np.ones(len(own), dtype=np.int64)
        for place, count in enumerate(read_items(self.count_clips, own, num_workers=num_workers)):
            counts[place] = count
            on_video(place + 1)
        joined = np.ones(len(self), dtype=np.int64)
        for number, part in enumerate(gather_objects(counts)):
            joined[number::world_size] = part
        return joined

    def count_clips(self, index: int) -> int:
        """Number of dense test clips of one video; 1 when it is bad."""
        try:
            with open_video(self.videos[index].path, cache=self._cache, timeout=self._timeout) as reader:
                return len(self._dense_starts(len(reader.index.timeline(self._clip_spec.target_fps))))
        except VideoError:
            return 1

    def remember(self, bad: Iterable[BadVideo]) -> None:
        """Take files as bad without opening them again; samples stay what they were, only sooner."""
        self._known_bad |= dict(bad)

    # ------------------------------------------------------------------------------------------------ parts

    def _replacement(self, key: SampleKey, attempt: int) -> int:
        """Another video of the same corpus, so that the weights of the mixture hold."""
        corpus, local = self.videos.locate(key.index)
        rng = np.random.default_rng([_REPLACEMENT_STREAM, self._seed, key.epoch, key.position, key.index, attempt])
        return key.index - local + int(rng.integers(self.videos.sizes[corpus]))

    def _place(self, key: SampleKey, index: int, attempt: int) -> Place:
        """The clip and crop of a sample; random ones are drawn with its views."""
        if not self._train:
            return Place(key.clip, key.crop)
        if not self._grid.clips:
            return Place()
        return self._grid.draw(
            np.random.default_rng([_GRID_STREAM, self._seed, key.epoch, key.position, index, attempt])
        )

    def _name(self, index: int) -> str:
        """What is bad when a record cannot be read: its video."""
        return self.videos[index].path

    def _open(self, index: int) -> FrameSource:
        """The video of a record."""
        return open_video(self.videos[index].path, cache=self._cache, timeout=self._timeout)

    def _fill(self, sample: Sample, index: int, place: Place, rng: np.random.Generator) -> None:
        """Put views and targets into a sample."""
        name = self._name(index)
        if name in self._known_bad:
            raise VideoError(sample["path"], self._known_bad[name])
        with self._open(index) as reader:
            clip = self._clip(reader.index, index, place, rng)
            regions = self._regions(reader.index.height, reader.index.width, place, rng)
            seed = int(rng.integers(0, 2**63))
            targets = {
                teacher: cached.read(sample["path"], index, place, len(clip), seed)
                for teacher, cached in self._targets.items()
            }
            sample["views"] = self._views(reader, clip, regions, seed)
        sample["targets"].update(targets)
        self._annotate(sample, index, self._view_region(reader.index, regions))

    def _annotate(self, sample: Sample, index: int, region: ViewRegion) -> None:
        """Add what is known of the record."""
        self._label(sample, index)

    def _label(self, sample: Sample, index: int) -> None:
        label = self.videos[index].label
        if label is not None:
            sample["targets"]["label"] = torch.tensor(label)

    def _views(
        self, reader: FrameSource, clip: Clip, regions: Mapping[str, Geometry], seed: int
    ) -> dict[str, torch.Tensor]:
        flow, specs = self._stored_flow(reader, clip, regions, seed)
        if not specs:
            return flow
        if not self._train:
            self._memory.choose(reader.path)
            read = partial(self._memory.read, fetch=reader.read)
            return flow | self._decoded(read, clip, specs, regions, seed)
        outer = reduce(Geometry.joined, regions.values())
        inside = {crop: region.inside(outer) for crop, region in regions.items()}
        return flow | self._decoded(partial(reader.read, window=outer.window), clip, specs, inside, seed)

    def _stored_flow(
        self, reader: FrameSource, clip: Clip, regions: Mapping[str, Geometry], seed: int
    ) -> tuple[dict[str, torch.Tensor], dict[str, ViewSpec]]:
        """The views that the store of flow gives, and the specs that are left."""
        wanted = {name: spec for name, spec in self.specs.items() if spec.modality == "flow"}
        if self._flow is None or not wanted:
            return {}, self.specs
        stored = self._flow.open(reader.path, len(clip.timeline))
        if stored is None:
            return {}, self.specs
        size = (reader.index.height, reader.index.width)
        views: dict[str, torch.Tensor] = {}
        with stored:
            for crop, region in regions.items():
                specs = {name: spec for name, spec in wanted.items() if spec.crop == crop}
                if specs:
                    views |= self._flow.views(stored, clip, specs, region, size, seed)
        return views, {name: spec for name, spec in self.specs.items() if name not in wanted}

    def _decoded(
        self,
        read: Callable[[np.ndarray], np.ndarray],
        clip: Clip,
        specs: Mapping[str, ViewSpec],
        regions: Mapping[str, Geometry],
        seed: int,
    ) -> dict[str, torch.Tensor]:
        """Views from frames. Where others come from a store, flow is computed here: all samples hold the same views."""
        views = build_views(read, clip, specs, regions, seed)
        if self._flow is not None:
            for spec in specs.values():
                if spec.pairs in views:
                    views[spec.pixels] = self._flow.compute(views.pop(spec.pairs), spec.stack)
        return views

    def _clip(self, frames: FrameIndex, index: int, place: Place, rng: np.random.Generator) -> Clip:
        """The student's clip of a record, from the frames of its video."""
        spec = self._clip_spec
        timeline = frames.timeline(spec.target_fps)
        total = len(timeline)
        if spec.num_frames is None:
            return Clip(timeline, np.arange(total))
        if place.clip is None:
            places = random_clip(total, spec.num_frames, spec.sampling_rate, rng)
        elif self.has_dense_clips:
            start = int(self._dense_starts(total)[place.clip])
            places = clip_at(start, total, spec.num_frames, spec.sampling_rate)
        else:
            places = uniform_clip(total, spec.num_frames, spec.sampling_rate, place.clip, self._num_clips)
        return Clip(timeline, places)

    def _dense_starts(self, total: int) -> np.ndarray:
        spec = self._clip_spec
        if spec.num_frames is None:
            return np.zeros(1, dtype=np.int64)
        return dense_starts(total, spec.num_frames, spec.sampling_rate, self._dense_stride)

    def _regions(self, height: int, width: int, place: Place, rng: np.random.Generator) -> dict[str, Geometry]:
        """``ViewSpec.crop`` → region, of the crops that views ask for."""
        size = self._clip_spec.crop_size
        fixed = partial(fixed_geometry, height, width, crop_size=size, scale=self._fixed_scale)
        if place.crop is None:
            shared = random_geometry(height, width, crop_size=size, scales=self._scales, flip=self._flip, rng=rng)
        else:
            mirrored, crop = divmod(place.crop, self._num_crops)
            shared = replace(fixed(crop=crop, num_crops=self._num_crops), flip=bool(mirrored))
        asked = {self._clip_spec.crop, *(spec.crop for spec in self.specs.values())}
        others = {"center": fixed(), "whole": Geometry(0, 0, height, width, place.crop is not None and shared.flip)}
        return {"shared": shared} | {crop: region for crop, region in others.items() if crop in asked}

    def _view_region(self, frames: FrameIndex, regions: Mapping[str, Geometry]) -> ViewRegion:
        """What the student's view shows."""
        shown = regions[self._clip_spec.crop]
        height, width = view_size(self._clip_spec, shown)
        return ViewRegion(
            frame_height=frames.height,
            frame_width=frames.width,
            top=shown.top,
            left=shown.left,
            height=shown.height,
            width=shown.width,
            flip=shown.flip,
            view_height=height,
            view_width=width,
        )
