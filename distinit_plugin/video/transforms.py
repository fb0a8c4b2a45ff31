"""From decoded frames to views: one region of the picture for all networks, resized for each.

The papers scale the picture so that its short side is s and cut a crop of c pixels. That is the same as cutting
c·short/s source pixels and resizing these alone to c, which is what happens here: nothing outside the crop is
resized, and a teacher with another input size sees the same region at its own resolution.

A region never leaves the picture: where the crop would be larger than the picture (s < c), it is the largest square
inside.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from distinit_plugin.registry import FRAME_PICKERS, lookup
from distinit_plugin.types import ViewSpec
from distinit_plugin.video.grid import frames_of_grid
from distinit_plugin.video.sampling import Clip

Int64Array = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Geometry:
    """The region of the source picture that all views of a sample show, in source pixels.

    Attributes:
        top: First row.
        left: First column.
        height: Rows.
        width: Columns.
        flip: Whether it is mirrored left to right.
    """

    top: int
    left: int
    height: int
    width: int
    flip: bool = False

    @property
    def window(self) -> tuple[slice, slice]:
        """Rows and columns of the region."""
        return slice(self.top, self.top + self.height), slice(self.left, self.left + self.width)

    @property
    def inside_window(self) -> Geometry:
        """The same region of pictures of which only ``window`` is left."""
        return self.inside(self)

    def inside(self, outer: Geometry) -> Geometry:
        """The same region of pictures of which only the ``window`` of a larger region is left."""
        return replace(self, top=self.top - outer.top, left=self.left - outer.left)

    def joined(self, other: Geometry) -> Geometry:
        """The smallest region that holds both, not mirrored."""
        top, left = min(self.top, other.top), min(self.left, other.left)
        bottom = max(self.top + self.height, other.top + other.height)
        right = max(self.left + self.width, other.left + other.width)
        return Geometry(top, left, bottom - top, right - left)


def _region_side(height: int, width: int, crop_size: int, scale: float) -> int:
    """Side of the square that becomes ``crop_size`` when the short side becomes ``scale``, at least 1 pixel."""
    short = min(height, width)
    return min(max(round(crop_size * short / scale), 1), short)


def random_geometry(
    height: int,
    width: int,
    *,
    crop_size: int,
    scales: tuple[int, int],
    flip: bool,
    rng: np.random.Generator,
) -> Geometry:
    """A random training crop.

    Args:
        height: Of the source picture, pixels.
        width: Of the source picture, pixels.
        crop_size: Side of the student's crop, pixels after scaling.
        scales: Short side after scaling, drawn uniformly from these integers, both ends included.
        flip: Mirror one half of the crops; False: none.
        rng: Four draws are taken, always.
    """
    scale = int(rng.integers(scales[0], scales[1] + 1))
    side = _region_side(height, width, crop_size, scale)
    top = int(rng.integers(0, height - side + 1))
    left = int(rng.integers(0, width - side + 1))
    mirrored = bool(rng.integers(0, 2))
    return Geometry(top, left, side, side, mirrored and flip)


def fixed_geometry(
    height: int, width: int, *, crop_size: int, scale: int, crop: int = 0, num_crops: int = 1
) -> Geometry:
    """A test crop.

    Args:
        height: Of the source picture, pixels.
        width: Of the source picture, pixels.
        crop_size: Side of the crop, pixels after scaling.
        scale: Short side after scaling, pixels.
        crop: Which crop, 0 … ``num_crops`` − 1.
        num_crops: 1: the centre; 3: first end, middle and other end of the longer side.

    Raises:
        ValueError: Another number of crops, or no such crop.
    """
    if num_crops not in (1, 3) or not 0 <= crop < num_crops:
        raise ValueError(f"there is no crop {crop} of {num_crops}: 1 or 3 crops can be taken")
    side = _region_side(height, width, crop_size, scale)
    place = 1 if num_crops == 1 else crop  # in halves of the free space along the longer side
    along_rows, along_columns = (place, 1) if height > width else (1, place)
    return Geometry((height - side) * along_rows // 2, (width - side) * along_columns // 2, side, side)


def view_size(spec: ViewSpec, geometry: Geometry) -> tuple[int, int]:
    """Height and width of a view that shows a region, pixels."""
    if spec.crop != "whole":
        return spec.crop_size, spec.crop_size
    short = min(geometry.height, geometry.width)
    return (
        max(round(geometry.height * spec.crop_size / short), 1),
        max(round(geometry.width * spec.crop_size / short), 1),
    )


def render_view(frames: npt.NDArray[np.uint8], geometry: Geometry, size: int | tuple[int, int]) -> Tensor:
    """Cut the region, resize it and mirror it.

    Args:
        frames: (T,H,W,3) uint8 RGB.
        geometry: The region.
        size: Height and width of the view, or the side of a square one, pixels.

    Returns:
        (3,T,height,width) uint8, contiguous; bilinear with antialiasing.
    """
    height, width = (size, size) if isinstance(size, int) else size
    rows, columns = geometry.window
    region = torch.from_numpy(np.ascontiguousarray(frames[:, rows, columns])).permute(0, 3, 1, 2)
    if region.shape[-2:] != (height, width):
        # uint8 with the colours last in memory takes torch's vectorised path.
        region = F.interpolate(region, size=(height, width), mode="bilinear", antialias=True)
    if geometry.flip:
        region = region.flip(-1)
    return region.permute(1, 0, 2, 3).contiguous()


def build_views(
    read: Callable[[Int64Array], npt.NDArray[np.uint8]],
    clip: Clip,
    specs: Mapping[str, ViewSpec],
    regions: Mapping[str, Geometry],
    seed: int,
) -> dict[str, Tensor]:
    """All views of one sample from one read of the video.

    Args:
        read: Frame numbers (n,), sorted and distinct → (n,H,W,3) uint8 RGB; called once.
        clip: The frames of the sample.
        specs: What the networks want, by any names. Views of another pick than ``clip`` are frames of the clip.
        regions: ``ViewSpec.crop`` → the region that such views show.
        seed: Random picks follow from it, the pick and the number of frames alone, so that another teacher does not
            change them, and teachers that differ in size see the same frames.

    Returns:
        ``ViewSpec.pixels`` → (3,T',size,size) uint8; specs with equal pixels share one tensor. For flow
        ``ViewSpec.pairs`` → (6,T'·stack,size,size) uint8: the frame where each flow begins, and the one where it ends.

    Raises:
        UserError: A spec cannot be served from the clip.
        VideoError: From ``read``.
    """
    distinct = {spec.pixels: spec for _, spec in sorted(specs.items())}
    numbers = {pixels: frames_shown(spec, clip, seed) for pixels, spec in sorted(distinct.items())}
    needed = np.unique(np.concatenate(list(numbers.values())))
    frames = read(needed)
    views = {}
    for pixels, spec in sorted(distinct.items()):
        shown, slots = np.unique(np.searchsorted(needed, numbers[pixels]), return_inverse=True)
        region = regions[spec.crop]
        pictures = render_view(frames if len(shown) == len(needed) else frames[shown], region, view_size(spec, region))
        if not np.array_equal(slots, np.arange(len(shown))):
            pictures = pictures[:, torch.from_numpy(slots)]
        name, view = arrange(pictures, spec)
        views[name] = view
    return views


def frames_shown(spec: ViewSpec, clip: Clip, seed: int) -> Int64Array:
    """Source frames that a view is made from: (T',), and for flow (2·T'·stack,), where flows begin and where they end.

    Raises:
        UserError: The view has more frames than the clip.
    """
    picked = view_positions(spec, len(clip), seed)
    return clip.frames(picked) if spec.modality == "rgb" else clip.pairs(picked, spec.stack).reshape(-1)


def arrange(pictures: Tensor, spec: ViewSpec) -> tuple[str, Tensor]:
    """The name and the view of pictures (3,n,H,W) of ``frames_shown``."""
    if spec.modality == "rgb":
        return spec.pixels, pictures
    colours, _, height, width = pictures.shape
    pairs = pictures.view(colours, 2, -1, height, width).transpose(0, 1)
    return spec.pairs, pairs.reshape(2 * colours, -1, height, width)


def view_positions(spec: ViewSpec, num_clip_frames: int, seed: int) -> Int64Array:
    """Places in the clip of the frames that a view shows; random picks follow from ``seed``.

    Raises:
        UserError: The view has more frames than the clip.
    """
    return frames_of_grid(num_clip_frames, spec.pick_from)[picked_frames(spec, num_clip_frames, seed)]


def picked_frames(spec: ViewSpec, num_clip_frames: int, seed: int) -> Int64Array:
    """As ``view_positions``, counted among the frames from which a view is picked (``ViewSpec.pick_from``)."""
    count = num_clip_frames if spec.num_frames is None else spec.num_frames
    rng = np.random.default_rng([seed, zlib.crc32(f"{spec.pick} {count}".encode())])
    picker = lookup(FRAME_PICKERS, spec.pick, "FRAME_PICK")
    picked: Int64Array = picker(spec.pick_from or num_clip_frames, count, rng)
    return picked
