"""Which sample comes when: an endless, resumable stream for training, each view once for testing.

Everything is a pure function of (seed, epoch, position), so that a stream can be entered anywhere, with any number of
ranks, and goes on as if it had never been left.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from torch.utils.data import Sampler

from distinit_plugin.errors import UserError
from distinit_plugin.types import SampleKey

# First word of the entropy of each random stream, so that no two streams share their numbers.
_MIX_STREAM = 1
_PASS_STREAM = 2


def allot(num_clips: int, weights: Sequence[float]) -> list[int]:
    """Clips of an epoch for each corpus: proportional to the weights, largest remainders first, at least one each.

    Args:
        num_clips: Clips of the epoch, at least one per corpus.
        weights: Positive shares.

    Returns:
        Integers ≥ 1 that sum to ``num_clips``.
    """
    shares = np.asarray(weights, dtype=np.float64)
    exact = num_clips * shares / shares.sum()
    counts = np.maximum(np.floor(exact).astype(np.int64), 1)
    while counts.sum() < num_clips:
        counts[np.argmax(exact - counts)] += 1
    while counts.sum() > num_clips:  # the minimum of one took more than there was
        counts[np.argmax(counts)] -= 1
    return [int(count) for count in counts]


class ClipSampler(Sampler[SampleKey]):
    """Training keys of one rank.

    Each corpus is passed through in shuffled passes that go on over the epochs, so that after any number of clips two
    of its videos differ by at most one draw. How many clips of an epoch come from which corpus is fixed by the weights;
    their order is shuffled anew each epoch.

    The stream of an epoch is one sequence of positions; rank r takes the positions r, r + world_size, … So the clips
    of an optimizer step are the same set whatever the number of ranks and of micro-batches.

    Attributes:
        clips_per_epoch: Positions of an epoch, all ranks together; a multiple of ``global_batch_size``.
        steps_per_epoch: Optimizer steps of an epoch.
        epoch: The epoch that iteration yields, see ``set_epoch``.
        start: The position at which it begins.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        weights: Sequence[float] | None = None,
        *,
        num_clips_per_epoch: int,
        global_batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        shuffle: bool = True,
    ) -> None:
        """Lay out the stream.

        Args:
            sizes: Videos of each corpus (``Mixture.sizes``).
            weights: Share of each corpus (``Mixture.weights``); ``None``: by size.
            num_clips_per_epoch: Clips of an epoch, all ranks together, rounded down to whole steps (but at least one
                step); 0: as many as there are videos.
            global_batch_size: Clips of one optimizer step, all ranks and micro-batches together.
            seed: Integer ≥ 0.
            rank: This rank.
            world_size: Number of ranks; must divide ``global_batch_size``.
            shuffle: ``False``: the videos in their order, corpus after corpus.

        Raises:
            UserError: ``world_size`` does not divide ``global_batch_size``, or an epoch is too short for the corpora.
        """
        if global_batch_size < 1 or global_batch_size % world_size:
            raise UserError(
                f"A step of {global_batch_size} clips cannot be shared by {world_size} ranks: TRAIN.BATCH_SIZE must be "
                "a multiple of the number of ranks."
            )
        wanted = num_clips_per_epoch or sum(sizes)
        self.steps_per_epoch = max(1, wanted // global_batch_size)
        self.clips_per_epoch = self.steps_per_epoch * global_batch_size
        if self.clips_per_epoch < len(sizes):
            raise UserError(
                f"An epoch of {self.clips_per_epoch} clips is too short for {len(sizes)} corpora: raise "
                "RUNNER.CLIPS_PER_EPOCH."
            )
        self._sizes = list(sizes)
        self._counts = allot(self.clips_per_epoch, sizes if weights is None else weights)
        self._global_batch_size = global_batch_size
        self._seed = seed
        self._rank = rank
        self._world_size = world_size
        self._shuffle = shuffle
        self.epoch = 0
        self.start = 0

    def set_epoch(self, epoch: int, start_step: int = 0) -> None:
        """Choose what the next iteration yields: an epoch from 0, entered before its optimizer step ``start_step``."""
        if not 0 <= start_step <= self.steps_per_epoch:
            raise ValueError(f"step {start_step} is not in an epoch of {self.steps_per_epoch} steps")
        self.epoch = epoch
        self.start = start_step * self._global_batch_size

    def __len__(self) -> int:
        return (self.clips_per_epoch - self.start) // self._world_size

    def __iter__(self) -> Iterator[SampleKey]:
        epoch = self.epoch
        indices = self.indices(epoch)
        for position in range(self.start + self._rank, self.clips_per_epoch, self._world_size):
            yield SampleKey(epoch, position, int(indices[position]))

    def indices(self, epoch: int) -> np.ndarray:
        """The global video number at each position of an epoch, int64 (clips_per_epoch,)."""
        corpus_of = np.repeat(np.arange(len(self._sizes)), self._counts)
        if self._shuffle and len(self._sizes) > 1:
            corpus_of = np.random.default_rng([_MIX_STREAM, self._seed, epoch]).permutation(corpus_of)
        result = np.empty(self.clips_per_epoch, dtype=np.int64)
        first = 0
        for corpus, (size, count) in enumerate(zip(self._sizes, self._counts, strict=True)):
            result[corpus_of == corpus] = first + self._draws(corpus, size, epoch * count, count)
            first += size
        return result

    def _draws(self, corpus: int, size: int, begin: int, count: int) -> np.ndarray:
        """Draws ``begin … begin + count − 1`` of one corpus's endless sequence of passes."""
        parts = []
        while count > 0:
            number, offset = divmod(begin, size)
            taken = min(size - offset, count)
            parts.append(self._pass(corpus, size, number)[offset : offset + taken])
            begin += taken
            count -= taken
        return np.concatenate(parts)

    def _pass(self, corpus: int, size: int, number: int) -> np.ndarray:
        if not self._shuffle:
            return np.arange(size)
        return np.random.default_rng([_PASS_STREAM, self._seed, corpus, number]).permutation(size)


class ViewSampler(Sampler[SampleKey]):
    """Validation and test keys of one rank: every (video, clip, crop) of the corpus exactly once over all ranks.

    Whole videos are dealt to the ranks in turn and their views stay together, so that one rank holds all scores of a
    video. Ranks may therefore differ in length; nothing is padded. Positions number the views of all ranks.
    """

    def __init__(
        self,
        clips_per_video: Sequence[int] | np.ndarray,
        num_crops: int = 1,
        *,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        """Lay out the views.

        Args:
            clips_per_video: Number of clips of each video, of the whole corpus (``dataset.clips_per_video``).
            num_crops: Spatial crops of each clip.
            rank: This rank.
            world_size: Number of ranks.
        """
        self._clips = np.asarray(clips_per_video, dtype=np.int64)
        self._num_crops = num_crops
        self._begins = np.concatenate([[0], np.cumsum(self._clips)]) * num_crops
        self._videos = range(rank, len(self._clips), world_size)

    def __len__(self) -> int:
        return sum(int(self._clips[video]) for video in self._videos) * self._num_crops

    def __iter__(self) -> Iterator[SampleKey]:
        for video in self._videos:
            position = int(self._begins[video])
            for clip in range(int(self._clips[video])):
                for crop in range(self._num_crops):
                    yield SampleKey(0, position, video, clip, crop)
                    position += 1


class KeyframeBatches:
    """Validation and test batches of one rank: every keyframe exactly once over all ranks, no two videos in a batch.

    Pictures of one video have one size, so that whole ones can be joined; and neighbouring keyframes share frames, of
    which a worker then decodes most only once. Batches are dealt to the ranks in turn; these may differ by one.
    Positions number the keyframes.
    """

    def __init__(
        self,
        videos: Sequence[int] | np.ndarray,
        batch_size: int,
        *,
        crop: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        """Lay out the batches.

        Args:
            videos: Of each keyframe, the number of its video; keyframes of a video stand together.
            batch_size: Keyframes of a batch, at most.
            crop: ``SampleKey.crop`` of all keys: 1 mirrors the pictures.
            rank: This rank.
            world_size: Number of ranks.
        """
        videos = np.asarray(videos)
        changes = (np.flatnonzero(np.diff(videos)) + 1).tolist()
        runs = zip([0, *changes], [*changes, len(videos)], strict=True)
        batches = [
            range(first, min(first + batch_size, end)) for start, end in runs for first in range(start, end, batch_size)
        ]
        self._batches = batches[rank::world_size]
        self._crop = crop

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[list[SampleKey]]:
        for batch in self._batches:
            yield [SampleKey(0, keyframe, keyframe, 0, self._crop) for keyframe in batch]
