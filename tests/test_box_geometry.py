"""Boxes through crop, resize and flip, checked with pictures whose pixels say where they are."""

from dataclasses import replace

import numpy as np
import pytest

from distinit_plugin.detection.geometry import clip_boxes, has_area, to_fractions, to_view
from distinit_plugin.types import ViewRegion, ViewSpec
from distinit_plugin.video.transforms import Geometry, fixed_geometry, random_geometry, render_view, view_size

HEIGHT, WIDTH = 90, 140


def picture() -> np.ndarray:
    """(1,H,W,3): the red of a pixel is the x of its centre, the green is its y, in half pixels."""
    frame = np.zeros((1, HEIGHT, WIDTH, 3), dtype=np.uint8)
    frame[..., 0] = np.arange(WIDTH) + 0.5
    frame[..., 1] = (2 * np.arange(HEIGHT) + 1)[:, None]
    return frame


def region_of(geometry: Geometry, size: tuple[int, int]) -> ViewRegion:
    shown = (geometry.top, geometry.left, geometry.height, geometry.width, geometry.flip)
    return ViewRegion(HEIGHT, WIDTH, *shown, *size)


def largest_error(geometry: Geometry, size: tuple[int, int], region: ViewRegion) -> float:
    """Source pixels between where a view's inner pixels say that they are and where the geometry puts them."""
    view = render_view(picture(), geometry, size)[:, 0].numpy().astype(float)
    ys, xs = np.mgrid[4 : size[0] - 4, 4 : size[1] - 4]
    points = np.stack([xs, ys, xs + 1, ys + 1], axis=-1).reshape(-1, 4)  # the boxes of single pixels
    found = to_fractions(points, region) * [WIDTH, HEIGHT, WIDTH, HEIGHT]
    x, y = (found[:, 0] + found[:, 2]) / 2, (found[:, 1] + found[:, 3]) / 2
    told = view[:2, 4:-4, 4:-4].reshape(2, -1)
    return float(max(np.abs(told[0] + 0.5 - x).max(), np.abs(told[1] / 2 - y).max()))


GEOMETRIES = [
    (
        random_geometry(HEIGHT, WIDTH, crop_size=64, scales=(64, 80), flip=True, rng=np.random.default_rng(seed)),
        (64, 64),
    )
    for seed in range(8)
]
GEOMETRIES += [
    (fixed_geometry(HEIGHT, WIDTH, crop_size=48, scale=60), (48, 48)),
    (Geometry(0, 0, HEIGHT, WIDTH), (HEIGHT, WIDTH)),
    (Geometry(0, 0, HEIGHT, WIDTH), (45, 70)),
    (Geometry(0, 0, HEIGHT, WIDTH, True), (120, 187)),
    (Geometry(7, 11, 50, 50, True), (100, 100)),
]


@pytest.mark.parametrize(("geometry", "size"), GEOMETRIES)
def test_boxes_are_where_the_pixels_are(geometry, size):
    assert largest_error(geometry, size, region_of(geometry, size)) < 1.0  # half a level of rounding, twice


def test_wrong_geometry_is_noticed():
    """The negative controls of the test above."""
    assert any(geometry.flip for geometry, _ in GEOMETRIES[:8])
    assert any(not geometry.flip for geometry, _ in GEOMETRIES[:8])
    geometry, size = Geometry(7, 11, 50, 60, True), (100, 120)
    right = region_of(geometry, size)
    assert largest_error(geometry, size, right) < 1.0
    for wrong in (
        right._replace(flip=False),
        right._replace(left=13),
        right._replace(top=5),
        right._replace(width=58),
        right._replace(view_width=123),
    ):
        assert largest_error(geometry, size, wrong) > 1.4


@pytest.mark.parametrize(("geometry", "size"), GEOMETRIES)
def test_there_and_back(geometry, size):
    rng = np.random.default_rng(0)
    corner = rng.uniform(-0.2, 0.9, (50, 2))
    boxes = np.concatenate([corner, corner + rng.uniform(0.01, 0.5, (50, 2))], axis=1)
    region = region_of(geometry, size)
    view = to_view(boxes, region)
    assert has_area(view).all()
    np.testing.assert_allclose(to_fractions(view, region), boxes, rtol=0, atol=1e-12)


def test_the_arithmetic_of_one_box():
    region = ViewRegion(100, 200, 10, 40, 50, 50, False, 100, 100)
    boxes = np.array([[0.25, 0.2, 0.4, 0.5]])  # pixels 50, 20, 80, 50
    assert to_view(boxes, region).tolist() == [[20.0, 20.0, 80.0, 80.0]]
    boxes[0, 0] += 0.05
    assert to_view(boxes, region._replace(flip=True)).tolist() == [[20.0, 20.0, 60.0, 80.0]]
    assert to_view(np.zeros((0, 4)), region).shape == (0, 4)
    assert to_fractions(np.zeros((0, 4)), region).shape == (0, 4)


def test_boxes_are_cut_at_the_borders():
    boxes = np.array([[-5.0, 2, 8, 30], [20, 1, 30, 5], [3, -9, 4, -1], [2, 2, 6, 6]])
    cut = clip_boxes(boxes, 10, 20)
    assert cut.tolist() == [[0, 2, 8, 10], [20, 1, 20, 5], [3, 0, 4, 0], [2, 2, 6, 6]]
    assert has_area(cut).tolist() == [True, False, False, True]
    odd = np.array([[0, 0, np.nan, 1], [0, 0, np.inf, 1], [1, 0, 0, 1], [0, 1, 1, 0], [0, 0, 1, 1]])
    assert has_area(odd).tolist() == [False, False, False, False, True]


def test_whole_views_keep_their_proportions():
    spec = ViewSpec(crop_size=64, crop="whole")
    assert view_size(spec, Geometry(0, 0, 90, 140)) == (64, 100)
    assert view_size(spec, Geometry(0, 0, 140, 90)) == (100, 64)
    assert view_size(spec, Geometry(0, 0, 64, 64)) == (64, 64)
    assert view_size(replace(spec, crop_size=8), Geometry(0, 0, 1000, 1)) == (8000, 8)
    assert view_size(replace(spec, crop="shared"), Geometry(0, 0, 90, 140)) == (64, 64)
    assert spec.pixels != replace(spec, crop="shared").pixels
