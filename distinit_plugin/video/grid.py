"""An enumerated grid of the clips and crops of each video, from which training samples may be drawn."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Int64Array = npt.NDArray[np.int64]


class Place(NamedTuple):
    """A clip and a crop by their numbers; ``None``: a random one.

    Attributes:
        clip: Of uniformly spaced clips.
        crop: Of fixed crops; from their number on they are mirrored.
    """

    clip: int | None = None
    crop: int | None = None


@dataclass(frozen=True)
class Grid:
    """Which clips and crops of a video a training shows.

    Attributes:
        clips: Uniformly spaced clips, as in a test; 0: any clip, and no crop is fixed.
        crops: Fixed crops, 1 or 3 as in a test; 0: any crop, scale and flip.
        scale: Short side from which fixed crops (centre crops, too) are cut, pixels; 0: the crop size.
        flip: Every fixed crop is also there mirrored.
    """

    clips: int = 0
    crops: int = 0
    scale: int = 0
    flip: bool = False

    @property
    def crops_per_clip(self) -> int:
        """Fixed crops, mirrored ones included; 1 where crops are not fixed."""
        return self.crops * (1 + self.flip) if self.crops else 1

    def draw(self, rng: np.random.Generator) -> Place:
        """One of the grid's places, all equally likely; two draws are taken, always."""
        clip, crop = int(rng.integers(0, max(self.clips, 1))), int(rng.integers(0, self.crops_per_clip))
        return Place(clip if self.clips else None, crop if self.clips and self.crops else None)


def frames_of_grid(num_clip_frames: int, count: int) -> Int64Array:
    """Frames of the clip among which teachers' picks choose: the middles of ``count`` equal parts, 0: all.

    Returns:
        (count,) int64 places in the clip, floor((2i + 1)·T/(2·count)).
    """
    if not count:
        return np.arange(num_clip_frames, dtype=np.int64)
    return (2 * np.arange(count, dtype=np.int64) + 1) * num_clip_frames // (2 * count)
