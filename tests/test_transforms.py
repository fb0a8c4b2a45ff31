from dataclasses import replace

import numpy as np
import pytest
import torch
from torchvision.transforms.v2 import functional as tvf

from distinit_plugin.errors import UserError
from distinit_plugin.types import ViewSpec
from distinit_plugin.video.sampling import Clip
from distinit_plugin.video.transforms import Geometry, build_views, fixed_geometry, random_geometry, render_view


def _rng(seed=0):
    return np.random.default_rng(seed)


def _positions(num_frames, height, width):
    """(T,H,W,3): red is the column, green the row, blue the frame."""
    frames = np.zeros((num_frames, height, width, 3), dtype=np.uint8)
    frames[..., 0] = np.arange(width)
    frames[..., 1] = np.arange(height)[:, None]
    frames[..., 2] = 10 * np.arange(num_frames)[:, None, None]
    return frames


def test_a_region_of_the_views_size_is_cut_exactly():
    view = render_view(_positions(3, 40, 60), Geometry(5, 7, 16, 16), 16)
    assert (view.shape, view.dtype, view.is_contiguous()) == ((3, 3, 16, 16), torch.uint8, True)
    assert view[0, 0, 0].tolist() == list(range(7, 23))
    assert view[1, 0, :, 0].tolist() == list(range(5, 21))
    assert view[2, :, 3, 3].tolist() == [0, 10, 20]


def test_a_mirrored_region():
    straight = render_view(_positions(2, 40, 60), Geometry(5, 7, 16, 16), 16)
    mirrored = render_view(_positions(2, 40, 60), Geometry(5, 7, 16, 16, flip=True), 16)
    assert mirrored[0, 0, 0].tolist() == list(range(22, 6, -1))
    assert torch.equal(mirrored, straight.flip(-1))
    assert mirrored.is_contiguous()


@pytest.mark.parametrize("size", [8, 24, 112])
def test_resizing_is_torchvisions_on_the_region_alone(size):
    frames = _rng().integers(0, 256, (2, 50, 70, 3), dtype=np.uint8)
    view = render_view(frames, Geometry(3, 11, 40, 40), size)
    region = torch.from_numpy(frames[:, 3:43, 11:51]).permute(0, 3, 1, 2)
    expected = tvf.resize(region, [size, size], antialias=True).permute(1, 0, 2, 3)
    assert torch.equal(view, expected)
    # Nothing outside the region has any influence.
    outside = frames.copy()
    outside[:, :3] = outside[:, 43:] = 0
    outside[:, :, :11] = outside[:, :, 51:] = 255
    assert torch.equal(render_view(outside, Geometry(3, 11, 40, 40), size), view)


def test_frames_cut_to_the_window_give_the_same_view():
    frames = _rng().integers(0, 256, (2, 50, 70, 3), dtype=np.uint8)
    geometry = Geometry(3, 11, 40, 40, flip=True)
    cut = frames[(slice(None), *geometry.window)]
    assert torch.equal(render_view(cut, geometry.inside_window, 24), render_view(frames, geometry, 24))
    assert not torch.equal(render_view(frames, geometry.inside_window, 24), render_view(frames, geometry, 24))


def test_resized_pixels_stay_where_they_were():
    view = render_view(_positions(1, 80, 120), Geometry(20, 30, 40, 40), 10).float()
    centres = torch.arange(10) * 4 + 1.5  # of groups of four source pixels
    # Antialiasing reaches over the edge of the region at its border only.
    assert (view[0, 0, 5] - (30 + centres))[1:-1].abs().max() <= 1
    assert (view[1, 0, :, 5] - (20 + centres))[1:-1].abs().max() <= 1


@pytest.mark.parametrize(
    ("height", "width", "crop_size", "scale", "crop", "num_crops", "expected"),
    [
        (240, 320, 112, 128, 0, 1, (15, 55, 210, 210)),  # 112·240/128 = 210 source pixels
        (240, 320, 112, 112, 0, 1, (0, 40, 240, 240)),
        (240, 320, 112, 112, 0, 3, (0, 0, 240, 240)),
        (240, 320, 112, 112, 1, 3, (0, 40, 240, 240)),
        (240, 320, 112, 112, 2, 3, (0, 80, 240, 240)),
        (320, 240, 112, 112, 0, 3, (0, 0, 240, 240)),
        (320, 240, 112, 112, 2, 3, (80, 0, 240, 240)),
        (320, 240, 112, 128, 2, 3, (110, 15, 210, 210)),
        (60, 60, 30, 60, 0, 3, (15, 0, 30, 30)),
        (20, 30, 112, 100, 0, 1, (0, 5, 20, 20)),  # the crop would be larger than the picture
        (1, 1, 112, 128, 0, 1, (0, 0, 1, 1)),
        (10, 3000, 1, 256, 2, 3, (4, 2999, 1, 1)),  # less than a pixel: one pixel
    ],
)
def test_test_crops(height, width, crop_size, scale, crop, num_crops, expected):
    geometry = fixed_geometry(height, width, crop_size=crop_size, scale=scale, crop=crop, num_crops=num_crops)
    assert geometry == Geometry(*expected)


@pytest.mark.parametrize(("crop", "num_crops"), [(1, 1), (3, 3), (-1, 3), (0, 2)])
def test_crops_that_do_not_exist(crop, num_crops):
    with pytest.raises(ValueError, match="1 or 3 crops"):
        fixed_geometry(20, 30, crop_size=8, scale=8, crop=crop, num_crops=num_crops)


def test_random_crops_cover_their_range_and_stay_inside():
    rng = _rng()
    found = [random_geometry(120, 160, crop_size=112, scales=(112, 160), flip=True, rng=rng) for _ in range(2000)]
    sides = {geometry.height for geometry in found}
    assert sides == {round(112 * 120 / scale) for scale in range(112, 161)}
    assert all(geometry.width == geometry.height for geometry in found)
    smallest = [geometry for geometry in found if geometry.height == min(sides)]
    assert {geometry.top for geometry in smallest} <= set(range(120 - min(sides) + 1))
    assert all(0 <= geometry.top <= 120 - geometry.height for geometry in found)
    assert all(0 <= geometry.left <= 160 - geometry.width for geometry in found)
    assert max(geometry.left + geometry.width for geometry in found) == 160
    assert min(geometry.left for geometry in found) == 0
    assert 850 < sum(geometry.flip for geometry in found) < 1150


def test_random_crops_of_pictures_of_any_size_stay_inside():
    rng = _rng(1)
    for height, width in ((1, 1), (2, 50), (50, 2), (90, 90)):
        for _ in range(50):
            geometry = random_geometry(height, width, crop_size=112, scales=(64, 256), flip=True, rng=rng)
            assert 0 <= geometry.top <= height - geometry.height
            assert 0 <= geometry.left <= width - geometry.width
            assert 1 <= geometry.height == geometry.width


def test_random_crops_are_exact_and_flip_can_be_off():
    # A change of these numbers changes every experiment.
    found = [
        random_geometry(240, 320, crop_size=112, scales=(128, 160), flip=True, rng=_rng(seed)) for seed in (5, 6, 7)
    ]
    assert found == [
        Geometry(49, 3, 179, 179, True),
        Geometry(27, 68, 189, 189, False),
        Geometry(45, 103, 169, 169, True),
    ]
    for seed in range(20):
        rngs = _rng(seed), _rng(seed)
        on, off = (
            random_geometry(240, 320, crop_size=112, scales=(128, 160), flip=flip, rng=rng)
            for flip, rng in zip((True, False), rngs, strict=True)
        )
        assert off == replace(on, flip=False)
        assert rngs[0].integers(1000) == rngs[1].integers(1000)


def _clip(places):
    return Clip(timeline=np.arange(20), places=np.asarray(places))


class _Video:
    """A video whose pixels tell frame and position; counts its reads."""

    def __init__(self):
        self.calls = []
        self.frames = _positions(20, 60, 80)

    def read(self, indices):
        self.calls.append(indices.tolist())
        return self.frames[indices]


def _frames_of(view):
    return (view[2, :, 0, 0] // 10).tolist()


_STUDENT = ViewSpec(num_frames=4, crop_size=16)
_REGION = Geometry(2, 3, 32, 32)


def test_views_share_one_read_and_one_region():
    video = _Video()
    specs = {
        "student/rgb": _STUDENT,
        "OTHER/rgb": replace(_STUDENT, mean=(0.0, 0.0, 0.0)),
        "IMAGENET/rgb": ViewSpec(num_frames=1, pick="center", crop_size=32),
        "PAIR/rgb": ViewSpec(num_frames=2, pick="uniform", crop_size=8),
    }
    views = build_views(video.read, _clip(np.array([4, 6, 8, 10])), specs, {"shared": _REGION}, 0)
    assert video.calls == [[4, 6, 8, 10]]
    assert set(views) == {spec.pixels for spec in specs.values()}
    assert len(views) == 3
    assert _frames_of(views[_STUDENT.pixels]) == [4, 6, 8, 10]
    assert _frames_of(views[specs["IMAGENET/rgb"].pixels]) == [6]
    assert _frames_of(views[specs["PAIR/rgb"].pixels]) == [6, 10]
    for spec in specs.values():
        view = views[spec.pixels]
        assert view.shape == (3, spec.num_frames, spec.crop_size, spec.crop_size)
        assert torch.equal(view, render_view(video.frames[_frames_of(view)], _REGION, spec.crop_size))


def test_looped_and_unsorted_clips_are_read_once_per_frame():
    video = _Video()
    views = build_views(video.read, _clip(np.array([2, 0, 1, 2])), {"a": _STUDENT}, {"shared": _REGION}, 0)
    assert video.calls == [[0, 1, 2]]
    assert _frames_of(views[_STUDENT.pixels]) == [2, 0, 1, 2]


def test_only_frames_that_somebody_sees_are_read():
    video = _Video()
    spec = ViewSpec(num_frames=1, pick="center", crop_size=16)
    build_views(video.read, _clip(np.arange(4, 12)), {"a": spec}, {"shared": _REGION}, 0)
    assert video.calls == [[7]]


def test_another_teacher_does_not_change_the_picks_of_the_others():
    random_pick = ViewSpec(num_frames=2, pick="random", crop_size=16)
    larger = replace(random_pick, crop_size=24)
    single = ViewSpec(num_frames=1, pick="random", crop_size=16)
    clip = _clip(np.arange(20))
    student = replace(_STUDENT, num_frames=20)
    picks = set()
    for seed in range(20):
        alone = build_views(_Video().read, clip, {"a": random_pick}, {"shared": _REGION}, seed)
        specs = {"s": student, "b": single, "a": random_pick, "c": larger}
        together = build_views(_Video().read, clip, specs, {"shared": _REGION}, seed)
        renamed = build_views(_Video().read, clip, {"z": random_pick, "b": single}, {"shared": _REGION}, seed)
        assert torch.equal(alone[random_pick.pixels], together[random_pick.pixels])
        assert torch.equal(alone[random_pick.pixels], renamed[random_pick.pixels])
        assert _frames_of(together[larger.pixels]) == _frames_of(together[random_pick.pixels])
        picks.add(tuple(_frames_of(alone[random_pick.pixels])))
    assert len(picks) > 10


def test_specs_that_frames_cannot_serve():
    for spec, message in (
        (ViewSpec(num_frames=9), "takes all 4 frames of the clip, but 9"),
        (ViewSpec(num_frames=9, pick="random"), "9 frames cannot be picked from a clip of 4"),
    ):
        with pytest.raises(UserError, match=message):
            build_views(_Video().read, _clip(np.arange(4)), {"a": spec}, {"shared": _REGION}, 0)


def test_a_spec_of_all_frames_takes_the_clip():
    views = build_views(
        _Video().read, _clip(np.arange(5)), {"a": replace(_STUDENT, num_frames=None)}, {"shared": _REGION}, 0
    )
    assert _frames_of(views[replace(_STUDENT, num_frames=None).pixels]) == [0, 1, 2, 3, 4]
