"""TV-L1 in torch: against known motion, against itself in other batches, and against OpenCV."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from distinit_plugin.flow import tvl1
from distinit_plugin.flow.measures import end_point_differences, end_point_error, known_flow, read_flo
from distinit_plugin.flow.median import median5
from distinit_plugin.flow.resample import resize_linear, warp_cubic
from distinit_plugin.flow.tvl1 import TVL1Settings, tvl1_flow
from distinit_plugin.video.decode import open_video

QUICK = TVL1Settings(scales=2, warps=2, outer_iterations=2)


def texture(height, width, seed=0):
    """A smooth random picture, (H,W), 0 … 255."""
    noise = torch.randn(1, 1, height, width, generator=torch.Generator().manual_seed(seed))
    smooth = F.avg_pool2d(noise, 5, 1, 2, count_include_pad=False)[0, 0]
    return ((smooth - smooth.min()) / (smooth.max() - smooth.min()) * 255).round()


def moved(height, width, right, down, seed=0):
    """Two pictures of a texture that moves by whole pixels, (1,H,W) each."""
    margin = 8
    whole = texture(height + 2 * margin, width + 2 * margin, seed)
    first = whole[margin : margin + height, margin : margin + width]
    second = whole[margin - down : margin - down + height, margin - right : margin - right + width]
    return first[None], second[None]


def centre(flow, border=8):
    return flow[..., border:-border, border:-border]


def constant(flow, right, down):
    return torch.tensor([right, down], dtype=torch.float32)[:, None, None].expand_as(flow)


@pytest.mark.parametrize(("size", "right", "down"), [((48, 64), 2, 0), ((47, 53), 0, -3), ((44, 47), -2, 1)])
def test_known_translations(size, right, down):
    flow = centre(tvl1_flow(*moved(*size, right, down)))
    assert end_point_error(flow, constant(flow, right, down)) < 0.1
    assert end_point_error(flow.flip(1), constant(flow, right, down)) > 1  # u and v swapped
    assert end_point_error(-flow, constant(flow, right, down)) > 1


def test_equal_pictures_do_not_move():
    picture = texture(40, 40)[None]
    assert tvl1_flow(picture, picture).abs().max() == 0
    flat = torch.full((1, 40, 40), 7)
    assert tvl1_flow(flat, flat + 100).isfinite().all()


def test_a_batch_equals_its_pairs_one_by_one():
    """They stop at different iterations; chunks of several sizes, the last one smaller."""
    still = texture(40, 36)[None]
    pairs = [moved(40, 36, 1, 0), (still, still), moved(40, 36, -2, 2, seed=1), moved(40, 36, 3, 1, seed=2)]
    first, second = (torch.cat(side) for side in zip(*pairs, strict=True))
    single = torch.cat([tvl1_flow(*pair, QUICK) for pair in pairs])
    for chunk_pixels in (1, 3 * 36 * 40, 10**6):
        assert (tvl1_flow(first, second, QUICK, chunk_pixels=chunk_pixels) - single).abs().max() < 1e-4
    assert (single[0] - single[2]).abs().max() > 1


def test_a_still_picture_among_moving_ones_has_no_flow():
    """Exactly: the slightest error of the warp would become motion wherever the picture is nearly flat."""
    picture = texture(40, 37)[None]
    first, second = moved(40, 37, 2, 0)
    assert tvl1_flow(torch.cat([first, picture]), torch.cat([second, picture]))[1].abs().max() == 0


def test_looking_rarely_stops_at_the_same_iteration(monkeypatch):
    """As on a GPU: pairs that came to rest are held by a mask until they are taken out."""
    still = texture(40, 36)[None]
    first, second = (torch.cat(side) for side in zip(moved(40, 36, 1, 0), (still, still), strict=False))
    first, second = torch.cat([first, still]), torch.cat([second, still])
    every_step = tvl1_flow(first, second, QUICK)
    monkeypatch.setattr(tvl1, "check_interval", lambda device: 7)
    assert torch.equal(tvl1_flow(first, second, QUICK), every_step)
    monkeypatch.setattr(tvl1._Iteration, "hold", lambda self, moving: None)
    assert not torch.equal(tvl1_flow(first, second, QUICK), every_step)


@pytest.mark.parametrize("size", [(3, 3), (3, 40), (17, 5), (16, 16), (19, 20)])
def test_small_pictures(size):
    flow = tvl1_flow(torch.rand(2, *size) * 255, torch.rand(2, *size) * 255, QUICK)
    assert flow.shape == (2, 2, *size)
    assert flow.isfinite().all()


def test_no_pairs():
    assert tvl1_flow(torch.zeros(0, 20, 24), torch.zeros(0, 20, 24)).shape == (0, 2, 20, 24)


@pytest.mark.parametrize("size", [(1, 1), (3, 5), (17, 12)])
def test_median_is_the_median(size):
    generator = torch.Generator().manual_seed(0)
    planes = torch.randint(0, 9, (3, *size), generator=generator).float()  # with ties
    windows = F.unfold(F.pad(planes[:, None], (2, 2, 2, 2), mode="replicate"), 5)
    assert torch.equal(median5(planes), windows.median(1).values.view(planes.shape))


def test_median_of_every_arrangement_of_ones():
    """By the 0-1 principle; the columns' counts say all, and the rows do not matter after the columns are sorted."""
    counts = torch.cartesian_prod(*[torch.arange(6)] * 5)
    windows = (torch.arange(5)[None, :, None] >= 5 - counts[:, None, :]).float()
    assert torch.equal(median5(windows)[:, 2, 2], (counts.sum(1) >= 13).float())


def test_resizing_and_warping_follow_a_ramp():
    ramp = torch.arange(20.0).expand(1, 1, 20, 20)
    smaller = resize_linear(ramp, 16, 16, 1.25)
    assert torch.allclose(smaller[0, 0, 0], ((torch.arange(16) + 0.5) * 1.25 - 0.5).clamp(0, 19))
    flow = torch.zeros(1, 2, 20, 20)
    flow[:, 0] = 1.5
    warped = warp_cubic(ramp, flow)[0, 0, 5]
    assert torch.allclose(warped[:15], torch.arange(15.0) + 1.5, atol=1e-4)
    assert warped[-1] == 0 or abs(warped[-1]) < 5  # beyond the border there is nothing


# Against OpenCV -----------------------------------------------------------------------------------------------------


def opencv_flow(first, second, **parameters):
    cv2 = pytest.importorskip("cv2")
    if not hasattr(cv2, "optflow"):
        pytest.skip("this OpenCV lacks the contributed modules")
    cv2.setNumThreads(1)
    pairs = zip(first.numpy().astype(np.uint8), second.numpy().astype(np.uint8), strict=True)
    flows = [cv2.optflow.DualTVL1OpticalFlow_create(**parameters).calc(*pair, None) for pair in pairs]
    return torch.from_numpy(np.stack(flows)).permute(0, 3, 1, 2)


def agrees(flow, reference, valid=None):
    """The limits: mean difference 0.05 px, 99th percentile 1 px."""
    differences = end_point_differences(flow, reference)
    differences = differences.flatten() if valid is None else differences[valid]
    return bool(differences.mean() <= 0.05 and differences.quantile(0.99) <= 1)


def test_synthetic_pairs_agree_with_opencv():
    first, second = (torch.cat(s) for s in zip(moved(48, 45, 2, -1), moved(48, 45, -3, 2, seed=3), strict=True))
    reference = opencv_flow(first, second)
    ours = tvl1_flow(first, second)
    assert agrees(ours, reference)
    assert not agrees(ours.flip(1), reference)
    assert not agrees(-ours, reference)


@pytest.fixture(scope="module")
def real_pair(request):
    assets = request.getfixturevalue("assets")
    cv2 = pytest.importorskip("cv2")
    folder = assets / "flow" / "RubberWhale"
    pictures = [cv2.imread(str(folder / f"frame{number}.png"), cv2.IMREAD_GRAYSCALE) for number in (10, 11)]
    window = (slice(120, 232), slice(220, 364))
    first, second = (torch.from_numpy(picture[window].copy())[None] for picture in pictures)
    truth = read_flo(folder / "flow10.flo")[:, window[0], window[1]]
    return first, second, truth, opencv_flow(first, second)


def test_a_real_pair_agrees_with_opencv_and_with_the_truth(real_pair):
    first, second, truth, reference = real_pair
    ours = tvl1_flow(first, second)
    valid = known_flow(truth)
    assert 0.9 < valid.float().mean() < 1
    assert agrees(ours, reference, valid[None])
    assert end_point_error(ours[0], truth) <= 1.02 * end_point_error(reference[0], truth)


@pytest.mark.parametrize(
    "changed", [{"lambda_": 0.05}, {"scales": 1, "warps": 2}, {"scale_step": 0.5}, {"median": False}], ids=str
)
def test_other_parameters_give_another_flow(real_pair, changed):
    """The negative control of the agreement; the mean difference is enough to tell them apart."""
    first, second, _, reference = real_pair
    right = end_point_differences(tvl1_flow(first, second), reference).mean()
    wrong = end_point_differences(tvl1_flow(first, second, TVL1Settings(**changed)), reference).mean()
    assert wrong > 3 * right


def test_frames_of_a_real_video_agree_with_opencv(assets):
    pytest.importorskip("cv2")
    with open_video(str(assets / "videos" / "mmaction2" / "test.avi")) as reader:
        frames = torch.from_numpy(np.stack(reader.read([10, 11])))
    gray = resize_linear(frames.float().mean(-1), 80, 96).round()
    assert agrees(tvl1_flow(gray[:-1], gray[1:]), opencv_flow(gray[:-1], gray[1:]))
