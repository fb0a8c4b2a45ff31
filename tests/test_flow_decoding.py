"""Decoded flow: decoders, their loss, and how flow comes to the grid of features, against loops from the equations."""

from __future__ import annotations

import math

import pytest
import torch
from linear_networks import LinearNetwork
from torch import Tensor, nn

from distinit_plugin.errors import UserError
from distinit_plugin.flow.codes import Quantiser
from distinit_plugin.flow.motion import (
    codes_to_flow,
    enlarge_flow,
    flow_at_slices,
    flow_errors,
    flow_on_grid,
    flow_to_polar,
    flow_to_view,
    polar_to_flow,
)
from distinit_plugin.losses import build_loss
from distinit_plugin.models import InputSpec
from distinit_plugin.models.flow_decoders import FLOW_DECODERS, FlowDecoder
from distinit_plugin.objectives import Objective, Term, build_adapter, on_students_grid
from distinit_plugin.teachers import FlowView
from distinit_plugin.types import Network

BOUND = 20.0


# ------------------------------------------------------------------------------------------------------------ decoders
@pytest.mark.parametrize(("kind", "count"), [("simple", 579), ("spatial", 664_515), ("pwc", 554_275)])
def test_decoders_of_3a_have_the_papers_parameters(kind: str, count: int) -> None:
    with torch.device("meta"):
        decoder = FlowDecoder(kind, 192)
        assert decoder(torch.empty(2, 192, 5, 7, 6)).shape == (2, 3, 5, 7, 6)
    assert sum(parameter.numel() for parameter in decoder.parameters()) == count
    kernels = [module.weight.shape[2:] for module in decoder if isinstance(module, nn.Conv3d)]
    expected = {"simple": [1], "spatial": [3, 3, 1], "pwc": [3] * 6}[kind]
    assert [tuple(kernel) for kernel in kernels] == [(1, size, size) for size in expected]
    assert not isinstance(list(decoder)[-1], nn.LeakyReLU)


@pytest.mark.parametrize("kind", ["spatial", "pwc"])
def test_normalisation_of_decoders_is_a_switch(kind: str) -> None:
    assert not any(isinstance(module, nn.BatchNorm3d) for module in FlowDecoder(kind, 4).modules())
    normalised = FlowDecoder(kind, 4, norm=True)
    assert sum(isinstance(module, nn.BatchNorm3d) for module in normalised) == len(list(normalised)) // 3
    with pytest.raises(UserError, match="simple is one convolution"):
        FlowDecoder("simple", 4, norm=True)
    with pytest.raises(UserError, match="'simple', 'spatial', 'pwc'"):
        FlowDecoder("pcw", 4)


@pytest.mark.parametrize("kind", FLOW_DECODERS)
def test_decoders_see_one_slice_at_a_time(kind: str) -> None:
    torch.manual_seed(0)
    decoder = FlowDecoder(kind, 4)
    features = torch.randn(1, 4, 3, 5, 5)
    other = features.clone()
    other[:, :, 1] += 1
    changed = (decoder(other) - decoder(features)).abs().amax((0, 1, 3, 4))
    assert (changed > 1e-4).tolist() == [False, True, False]


# --------------------------------------------------------------------------------------------------------- arithmetic
def test_flow_and_polar_are_each_others_inverse() -> None:
    torch.manual_seed(1)
    flow = torch.randn(2, 2, 3, 4, 5, dtype=torch.float64)
    flow[0, :, 0, 0, 0] = 0
    polar = flow_to_polar(flow)
    angle = torch.atan2(flow[:, 1], flow[:, 0])
    moves = polar[:, 0] > 0
    assert not moves.all()
    torch.testing.assert_close(polar[:, 1][moves], angle.sin()[moves])
    torch.testing.assert_close(polar[:, 2][moves], angle.cos()[moves])
    assert polar[0, :, 0, 0, 0].tolist() == [0, 0, 0]
    for unit in (False, True):
        torch.testing.assert_close(polar_to_flow(polar, unit_direction=unit), flow)


def test_reconstruction_of_predictions_that_are_no_directions() -> None:
    polar = torch.tensor([[2.0, 0.3, 0.4], [-2.0, 0.3, 0.4], [2.0, 0.0, 0.0]]).view(3, 3, 1, 1, 1)
    raw, unit = (polar_to_flow(polar, unit_direction=unit).view(3, 2) for unit in (False, True))
    torch.testing.assert_close(raw, torch.tensor([[0.8, 0.6], [-0.8, -0.6], [0.0, 0.0]]))
    torch.testing.assert_close(unit, torch.tensor([[1.6, 1.2], [0.0, 0.0], [0.0, 0.0]]))


def test_minimum_of_the_loss_reconstructs_the_mean_flow() -> None:
    """Why reconstruction takes sine and cosine as they are: mag · cos θ is then the mean of u."""
    torch.manual_seed(2)
    flows = torch.randn(50, 2, 1, 1, 1, dtype=torch.float64) + 1
    polar = torch.zeros(1, 3, 1, 1, 1, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([polar], max_iter=50, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = build_loss("flow_decoding")(polar.expand(50, -1, -1, -1, -1), flows).mean()
        value.backward()
        return value

    optimizer.step(loss)
    found = polar.detach()
    torch.testing.assert_close(polar_to_flow(found)[0], flows.mean(0), atol=1e-5, rtol=0)
    assert (polar_to_flow(found, unit_direction=True)[0] - flows.mean(0)).abs().max() > 0.1  # the control


@pytest.mark.parametrize(
    ("frames", "slices", "middles"),
    [(8, 4, [0, 2, 4, 6]), (8, 2, [1, 5]), (4, 1, [1]), (5, 3, [0, 2, 3]), (3, 3, [0, 1, 2])],
)
def test_flow_of_slices(frames: int, slices: int, middles: list[int]) -> None:
    flow = torch.arange(frames, dtype=torch.float32).view(1, 1, -1, 1, 1).expand(1, 2, -1, 2, 2)
    assert flow_at_slices(flow, slices)[0, 0, :, 0, 0].tolist() == middles
    windows = [range(i * frames // slices, math.ceil((i + 1) * frames / slices)) for i in range(slices)]
    means = [sum(window) / len(window) for window in windows]
    torch.testing.assert_close(flow_at_slices(flow, slices, "mean")[0, 1, :, 1, 1], torch.tensor(means))


def test_flow_on_a_grid_stays_in_pixels_of_the_input() -> None:
    flow = torch.full((1, 2, 4, 16, 16), 4.0)
    assert flow_on_grid(flow, (2, 2, 2)).unique().tolist() == [4.0]
    torch.manual_seed(3)
    flow = torch.randn(1, 2, 4, 6, 6)
    expected = torch.stack([flow[0, :, 2, 3:, :3].mean((1, 2)), flow[0, :, 2, :3, 3:].mean((1, 2))])
    found = flow_on_grid(flow, (2, 2, 2))[0, :, 1]
    torch.testing.assert_close(torch.stack([found[:, 1, 0], found[:, 0, 1]]), expected)
    for grid, message in (((5, 2, 2), "5 slices"), ((2, 7, 2), "coarser than the grid of 7×2")):
        with pytest.raises(UserError, match=message):
            flow_on_grid(flow, grid)
    with pytest.raises(UserError, match="Allowed: center, mean"):
        flow_at_slices(flow, 2, "middle")


def test_enlarged_flow_keeps_its_pixels_and_each_slice_serves_its_frames() -> None:
    flow = torch.tensor([1.0, 5.0]).view(1, 1, 2, 1, 1).expand(1, 2, 2, 3, 3)
    enlarged = enlarge_flow(flow, (4, 12, 12))
    assert enlarged.shape == (1, 2, 4, 12, 12)
    assert enlarged[0, 0].amax((1, 2)).tolist() == enlarged[0, 0].amin((1, 2)).tolist() == [1, 1, 5, 5]
    torch.manual_seed(4)
    random = torch.randn(1, 2, 2, 3, 3)
    planes = nn.functional.interpolate(random[:, :, 1], size=(6, 6), mode="bilinear", align_corners=False)
    torch.testing.assert_close(enlarge_flow(random, (5, 6, 6))[:, :, 3], planes)
    # The middle flow of each slice of the enlarged one is what it was made from.
    torch.testing.assert_close(flow_at_slices(enlarge_flow(random, (4, 3, 3)), 2), random)


@pytest.mark.parametrize(("mean", "std"), [(0.5, 0.5), (0.45, 0.225)])
def test_views_of_codes_are_pixels_again(mean: float, std: float) -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(1, 1, 1, 16, 16).expand(1, 2, 1, 16, 16)
    view = (codes.float() / 255 - mean) / std
    flow = codes_to_flow(view, (mean,) * 2, (std,) * 2, BOUND)
    torch.testing.assert_close(flow, Quantiser(BOUND).decode_tensor(codes), atol=1e-5, rtol=0)
    torch.testing.assert_close(flow_to_view(flow, (mean,) * 2, (std,) * 2, BOUND), view, atol=1e-5, rtol=0)
    beyond = flow_to_view(flow * 3, (mean,) * 2, (std,) * 2, BOUND)
    assert [float(beyond.min()), float(beyond.max())] == pytest.approx([float(view.min()), float(view.max())], abs=1e-5)


def test_end_point_errors_of_cells() -> None:
    flow, other = torch.zeros(1, 2, 1, 1, 2), torch.tensor([3.0, 0.0, 4.0, 1.0]).view(1, 2, 1, 1, 2)
    assert flow_errors(flow, other).flatten().tolist() == [5.0, 1.0]


# --------------------------------------------------------------------------------------- the term, value and gradient
def loop_loss(prediction: Tensor, flow: Tensor, weighted_by: str = "target") -> Tensor:
    """D3D §3.1 cell by cell, in float64: the target is the mean of the middle frame's flow over the cell."""
    batch, _, slices, height, width = prediction.shape
    frames = flow.shape[2]
    rows, columns = flow.shape[3] // height, flow.shape[4] // width
    total = torch.zeros((), dtype=torch.float64)
    for b in range(batch):
        for t in range(slices):
            frame = t * frames // slices + (frames // slices - 1) // 2
            for y in range(height):
                for x in range(width):
                    cell = flow[b, :, frame, y * rows : (y + 1) * rows, x * columns : (x + 1) * columns]
                    u, v = (float(part) for part in cell.double().mean((1, 2)))
                    mag, theta = math.hypot(u, v), math.atan2(v, u)
                    m, s, c = prediction[b, :, t, y, x]
                    weight = mag if weighted_by == "target" else m
                    total = total + (m - mag) ** 2
                    total = total + weight * ((s - math.sin(theta)) ** 2 + (c - math.cos(theta)) ** 2)
    return total / (batch * slices * height * width)


class Slices(LinearNetwork):
    """Its layer has half of the frames and of the pixels."""

    def forward(self, views, *, boxes=None, taps=()):
        output = super().forward(views, taps=taps)
        halved = {name: nn.functional.avg_pool3d(tap, 2) for name, tap in output.taps.items()}
        return output._replace(taps=halved)


def flow_term(kind: str, student: Network, alignment: str = "center") -> Objective:
    teacher = FlowView(InputSpec(num_frames=4, train_crop_size=4, flow_bound=BOUND))
    torch.manual_seed(5)
    adapter = build_adapter(kind, student, "stage", teacher, "flow")
    term = Term(
        "FLOW",
        "stage",
        build_loss("flow_decoding"),
        weight=0.3,
        teacher="FLOW",
        teacher_layer="flow",
        match=on_students_grid(alignment),
    )
    return Objective(student, [term], {"FLOW": teacher}, {"FLOW": adapter})


@pytest.mark.parametrize("kind", FLOW_DECODERS)
def test_flow_as_supervision_equals_the_equation(kind: str) -> None:
    torch.manual_seed(6)
    student = Slices(0).double()
    objective = flow_term(kind, student)
    objective.trainable.double()
    codes = torch.randint(0, 256, (2, 2, 4, 4, 4))
    view = (codes.double() / 255 - 0.5) / 0.5
    clip = torch.randn(2, 3, 4, 4, 4, dtype=torch.float64)
    output = objective({"student/rgb": clip, "FLOW/flow": view}, {})
    output.loss.backward()
    found = {name: parameter.grad for name, parameter in objective.trainable.named_parameters()}
    objective.trainable.zero_grad()

    flow = (codes.double() / 255 - 0.5) * 2 * BOUND
    features = nn.functional.avg_pool3d(student.conv(clip), 2)
    prediction = objective.trainable.adapters["FLOW"](features)
    expected = loop_loss(prediction, flow)
    (0.3 * expected).backward()
    torch.testing.assert_close(output.terms["loss/FLOW"], expected.detach(), rtol=1e-6, atol=0)
    torch.testing.assert_close(output.loss, 0.3 * expected, rtol=1e-6, atol=0)
    assert found["student.conv.weight"].abs().sum() > 0
    torch.testing.assert_close(
        found,
        {name: parameter.grad for name, parameter in objective.trainable.named_parameters()},
        rtol=1e-5,
        atol=1e-8,
    )
    # The controls: another weight of the direction, and another alignment, are other losses.
    assert abs(loop_loss(prediction, flow, "prediction") - expected) > 0.01 * expected
    averaged = flow_term(kind, student, "mean")
    averaged.trainable.adapters.load_state_dict(objective.trainable.adapters.state_dict())
    averaged.trainable.double()
    other = averaged({"student/rgb": clip, "FLOW/flow": view}, {})
    assert abs(other.terms["loss/FLOW"] - expected) > 0.01 * expected


def test_the_flow_term_names_other_shapes() -> None:
    loss = build_loss("flow_decoding")
    good = torch.zeros(2, 3, 1, 2, 2), torch.zeros(2, 2, 1, 2, 2)
    assert loss(*good).tolist() == [0, 0]
    for student, target in ((good[1], good[1]), (good[0], good[0]), (good[0], torch.zeros(2, 2, 1, 4, 4))):
        with pytest.raises(UserError, match=r"compares \(mag, sin, cos\)"):
            loss(student, target)


def test_the_flow_of_a_clip_as_a_teacher() -> None:
    clip = InputSpec(num_frames=6, sampling_rate=2, train_crop_size=16, test_crop_size=24, test_num_frames=8)
    teacher = FlowView(clip)
    train, test = teacher.view_specs("train")["flow"], teacher.view_specs("test")["flow"]
    assert (train.modality, train.num_frames, train.sampling_rate, train.crop_size) == ("flow", 6, 2, 16)
    assert (test.num_frames, test.crop_size) == (8, 24)
    assert isinstance(teacher, Network)
    assert not teacher.train().training
    view = torch.tensor([-1.0, 0.5]).view(1, 2, 1, 1, 1)
    assert teacher({"flow": view}, taps=["flow"]).taps["flow"].flatten().tolist() == [-20.0, 10.0]
    assert teacher({"flow": view}).taps == {}
