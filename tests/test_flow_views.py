"""Views of flow: which frames they are made from, the same geometry as RGB, and codes that say the same either way."""

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from distinit_plugin.data.flow import LiveFlow, StoredFlow, in_store, render_flow
from distinit_plugin.data.views import finish_views
from distinit_plugin.flow.codes import Quantiser
from distinit_plugin.flow.source import MissingFlowError
from distinit_plugin.types import ViewSpec
from distinit_plugin.video.sampling import Clip
from distinit_plugin.video.transforms import Geometry, build_views

FLOW = ViewSpec(modality="flow", num_frames=3, crop_size=16, mean=(0.5, 0.5), std=(0.5, 0.5))
STACKED = replace(FLOW, stack=2, mean=(0.5,) * 4, std=(0.5,) * 4)
WHOLE = Geometry(0, 0, 16, 16)


def clip(places, length=8):
    return Clip(timeline=np.arange(length) * 10, places=np.asarray(places))


# ------------------------------------------------------------------------------------------------------ which frames
@pytest.mark.parametrize(
    ("places", "length", "stack", "first", "second"),
    [
        ([0, 2, 4], 8, 1, [0, 20, 40], [10, 30, 50]),
        ([5, 6, 7], 8, 1, [50, 60, 60], [60, 70, 70]),  # nothing leads on from the last frame
        ([6, 7, 0], 8, 1, [60, 60, 0], [70, 70, 10]),  # a looped clip: no flow from the last frame to the first
        ([4], 8, 4, [40, 50, 60, 60], [50, 60, 70, 70]),
        ([1, 3], 8, 2, [10, 20, 30, 40], [20, 30, 40, 50]),
        ([0, 0], 1, 1, [0, 0], [0, 0]),  # one frame: no motion
    ],
)
def test_pairs_of_frames(places, length, stack, first, second):
    pairs = clip(places, length).pairs(np.arange(len(places)), stack)
    assert pairs.tolist() == [first, second]


def frame(number, height=20, width=24):
    """Red is the frame's number."""
    picture = np.zeros((height, width, 3), dtype=np.uint8)
    picture[..., 0] = number
    picture[..., 1] = np.arange(width)
    return picture


def read(numbers):
    return np.stack([frame(number) for number in numbers])


def test_a_view_of_flow_ships_where_it_begins_and_where_it_ends():
    rgb = replace(FLOW, modality="rgb", mean=(0.5,) * 3, std=(0.5,) * 3)
    regions = {"shared": Geometry(2, 3, 16, 16, True)}
    views = build_views(read, clip([1, 2, 7]), {"rgb": rgb, "flow": FLOW, "two": STACKED}, regions, 0)
    assert set(views) == {rgb.pixels, FLOW.pairs, STACKED.pairs}
    assert views[FLOW.pairs].shape == (6, 3, 16, 16)
    assert views[FLOW.pairs][0, :, 0, 0].tolist() == [10, 20, 60]
    assert views[FLOW.pairs][3, :, 0, 0].tolist() == [20, 30, 70]
    assert views[STACKED.pairs].shape == (6, 6, 16, 16)
    assert views[STACKED.pairs][0, :, 0, 0].tolist() == [10, 20, 20, 30, 60, 60]
    # The same region and flip as RGB.
    assert torch.equal(views[FLOW.pairs][:3, 0], views[rgb.pixels][:, 0])
    assert views[FLOW.pairs][1, 0, 0].tolist() == list(range(18, 2, -1))


class NumbersAsFlow:
    """A back end that tells which frames it was given."""

    identity = "numbers"

    def __call__(self, first, second):
        return torch.stack([first[:, 0], second[:, 0]], dim=1).float() / 10


def test_channels_of_a_stack_are_u_and_v_of_each_flow():
    views = build_views(read, clip([1, 4, 6]), {"two": STACKED}, {"shared": WHOLE}, 0)
    live = LiveFlow(NumbersAsFlow(), Quantiser(20.0))
    batch = {name: view[None] for name, view in views.items()}
    found = finish_views(batch, {"two": STACKED}, "cpu", flow=live)["two"]
    assert found.shape == (1, 4, 3, 16, 16)
    pixels = 20 * found[0, :, :, 0, 0]  # [-1, 1] → pixels
    expected = torch.tensor([[1, 4, 6], [2, 5, 7], [2, 5, 6], [3, 6, 7]])
    torch.testing.assert_close(pixels, expected.float(), atol=20 / 255, rtol=0)
    assert live.seconds() > 0
    assert live.seconds() == 0


def test_pairs_without_a_back_end_are_refused():
    views = build_views(read, clip([1, 4, 6]), {"flow": FLOW}, {"shared": WHOLE}, 0)
    with pytest.raises(KeyError, match="flow_clip_3x1"):
        finish_views({name: view[None] for name, view in views.items()}, {"flow": FLOW}, "cpu")


# ------------------------------------------------------------------------------------------------------- stored flow
@dataclass
class Kept:
    """The flow of one video in memory."""

    codes: np.ndarray  # (F,H,W,2)
    quantiser: Quantiser
    path: str = "video.mp4"
    closed: bool = False

    @property
    def num_flows(self):
        return len(self.codes)

    @property
    def height(self):
        return self.codes.shape[1]

    @property
    def width(self):
        return self.codes.shape[2]

    def read(self, indices, window=(slice(None), slice(None))):
        return self.codes[np.minimum(indices, len(self.codes) - 1)][:, window[0], window[1]]

    def close(self):
        self.closed = True


class Store:
    def __init__(self, kept):
        self.kept = kept

    def reader(self, path):
        if path != self.kept.path:
            raise MissingFlowError(path, "it is not in the store")
        return self.kept


def ramp(height, width, bound=20.0, flows=7):
    """u grows to the right, v downwards; the flow's number is added to both."""
    flow = np.zeros((flows, height, width, 2), dtype=np.float32)
    flow[..., 0] = 8 * (np.arange(width) + 0.5) / width - 4
    flow[..., 1] = 8 * (np.arange(height)[:, None] + 0.5) / height - 4
    flow += 0.5 * np.arange(flows)[:, None, None, None]
    return Kept(Quantiser(bound).encode(flow), Quantiser(bound))


def views_of(kept, specs, geometry, size, places=(0, 2, 7), bound=20.0):
    return StoredFlow(Store(kept), bound).views(kept, clip(places), specs, geometry, size, 0)


def test_codes_are_cut_as_they_are():
    kept = ramp(20, 24)
    view = views_of(kept, {"a": FLOW}, Geometry(2, 3, 16, 16), (20, 24))[FLOW.pixels]
    expected = kept.codes[[0, 2, 6], 2:18, 3:19].transpose(3, 0, 1, 2)
    assert view.is_contiguous()
    assert np.array_equal(view.numpy(), expected)
    stacked = views_of(kept, {"a": STACKED}, Geometry(2, 3, 16, 16), (20, 24))[STACKED.pixels]
    assert stacked.shape == (4, 3, 16, 16)
    assert np.array_equal(stacked[2:, 0].numpy(), kept.codes[1, 2:18, 3:19].transpose(2, 0, 1))


def test_a_flip_negates_u_exactly():
    kept, quantiser = ramp(20, 24), Quantiser(20.0)
    straight, mirrored = (
        quantiser.decode_tensor(views_of(kept, {"a": FLOW}, Geometry(2, 3, 16, 16, flip), (20, 24))[FLOW.pixels])
        for flip in (False, True)
    )
    torch.testing.assert_close(mirrored[0], -straight[0].flip(-1), atol=1e-5, rtol=0)
    torch.testing.assert_close(mirrored[1], straight[1].flip(-1), atol=0, rtol=0)


@pytest.mark.parametrize("scale", [0.5, 2.0])
def test_values_scale_with_the_picture(scale):
    """The store is smaller or larger than the source; the view's flow is in the view's pixels."""
    kept = ramp(round(20 * scale), round(24 * scale))
    view = views_of(kept, {"a": FLOW}, Geometry(2, 4, 16, 16), (20, 24))[FLOW.pixels]
    same = views_of(ramp(20, 24), {"a": FLOW}, Geometry(2, 4, 16, 16), (20, 24))[FLOW.pixels]
    found, expected = (Quantiser(20.0).decode_tensor(codes) for codes in (view, same))
    inner = (slice(None), slice(None), slice(2, -2), slice(2, -2))
    assert (found[inner] - expected[inner] / scale).abs().max() < 0.4


def test_another_bound_is_coded_anew():
    codes = torch.full((1, 2, 4, 4), 255, dtype=torch.uint8)
    assert render_flow(codes, Quantiser(10.0), 20.0, (4, 4), flip=False).unique().tolist() == [191]
    assert render_flow(codes, Quantiser(20.0), 20.0, (4, 4), flip=False).unique().tolist() == [255]
    assert render_flow(codes, Quantiser(40.0), 20.0, (4, 4), flip=False).unique().tolist() == [255]  # clipped


def test_regions_in_a_store_of_another_size():
    assert in_store(Geometry(0, 0, 20, 24), (20, 24), (10, 12)) == Geometry(0, 0, 10, 12)
    assert in_store(Geometry(10, 20, 5, 5, True), (20, 25), (40, 50)) == Geometry(20, 40, 10, 10, True)
    assert in_store(Geometry(19, 24, 1, 1), (20, 25), (2, 2)) == Geometry(1, 1, 1, 1)


def test_flow_of_another_length_is_refused_by_name():
    kept = ramp(20, 24)
    stored = StoredFlow(Store(kept), 20.0)
    assert stored.open("video.mp4", 8) is kept
    assert stored.open("video.mp4", 7) is kept
    with pytest.raises(MissingFlowError, match="has 9 frames, but 7 flows"):
        stored.open("video.mp4", 9)
    assert kept.closed
    with pytest.raises(MissingFlowError, match="not in the store"):
        stored.open("other.mp4", 8)
    assert StoredFlow(Store(kept), 20.0, LiveFlow(NumbersAsFlow(), Quantiser())).open("other.mp4", 8) is None
