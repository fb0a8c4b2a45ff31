"""TV-L1 optical flow of many pairs at once, on the CPU or a GPU.

The method of C. Zach, T. Pock, H. Bischof, "A Duality Based Approach for Realtime TV-L1 Optical Flow", DAGM 2007, in
the form of J. Sánchez Pérez, E. Meinhardt-Llopis, G. Facciolo, "TV-L1 Optical Flow Estimation", IPOL 2013
(http://www.ipol.im/pub/art/2013/26/), with the pyramid, the median filter and the parameters of OpenCV's
``DualTVL1OpticalFlow``, whose flow it gives but for rounding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from distinit_plugin.flow.median import median5
from distinit_plugin.flow.resample import resize_linear, warp_cubic

MIN_SIDE = 3
"""Of a picture, pixels: central differences need neighbours."""

MIN_SCALE_SIDE = 16
"""Of the coarsest scale, pixels; a smaller picture is its own only scale."""

CPU_CHUNK_PIXELS = 50_000
"""Pixels that are iterated together, for each thread: enough that starting an operation costs little, few enough that
what they need stays in the cache."""

GPU_CHUNK_PIXELS = 2**22
"""About 2 GiB."""

GPU_CHECK_EVERY = 10
"""See ``check_interval``."""


@dataclass(frozen=True)
class TVL1Settings:
    """Parameters, named and preset as OpenCV's.

    Attributes:
        tau: Time step of the dual variables.
        lambda_: Weight of the data term: less is smoother.
        theta: Tightness of the coupling between the flow and its auxiliary copy.
        scales: At most; fewer where one would be below 16 pixels.
        warps: Warps of the second picture at each scale.
        epsilon: A warp ends when the flow's mean square update is not above its square; pixels.
        inner_iterations: Between two median filters.
        outer_iterations: Median filters of a warp, at most.
        scale_step: Size of a scale relative to the next finer one.
        median: Filter the flow with a 5×5 median before each run of inner iterations.
    """

    tau: float = 0.25
    lambda_: float = 0.15
    theta: float = 0.3
    scales: int = 5
    warps: int = 5
    epsilon: float = 0.01
    inner_iterations: int = 30
    outer_iterations: int = 10
    scale_step: float = 0.8
    median: bool = True


def check_interval(device: torch.device) -> int:
    """Iterations between two looks at which pairs still move: a look makes the host wait for a GPU."""
    return 1 if device.type == "cpu" else GPU_CHECK_EVERY


@torch.no_grad()
def tvl1_flow(
    first: Tensor, second: Tensor, settings: TVL1Settings | None = None, *, chunk_pixels: int | None = None
) -> Tensor:
    """Flow from ``first`` to ``second``. A pair's flow does not depend on the other pairs.

    Args:
        first: (N,H,W), grey values from 0 to 255, any type; H and W at least ``MIN_SIDE``.
        second: Likewise.
        settings: Parameters.
        chunk_pixels: Pixels that are iterated together; chosen for the device by default.

    Returns:
        (N,2,H,W), float32, (u,v) in pixels: ``first`` at (x, y) looks like ``second`` at (x + u, y + v).
    """
    settings = settings or TVL1Settings()
    if chunk_pixels is None:
        chunk_pixels = CPU_CHUNK_PIXELS * torch.get_num_threads() if first.device.type == "cpu" else GPU_CHUNK_PIXELS
    firsts, seconds = _pyramid(first.float(), settings), _pyramid(second.float(), settings)
    flow = first.new_zeros(len(first), 2, *firsts[-1].shape[-2:], dtype=torch.float32)
    for level in reversed(range(len(firsts))):
        height, width = firsts[level].shape[-2:]
        if level < len(firsts) - 1:
            flow = resize_linear(flow, height, width) / settings.scale_step
        size = max(1, round(chunk_pixels / (height * width)))
        for begin in range(0, len(flow), size):
            chunk = slice(begin, begin + size)
            _solve_scale(firsts[level][chunk], seconds[level][chunk], flow[chunk], settings)
    return flow


def _pyramid(pictures: Tensor, settings: TVL1Settings) -> list[Tensor]:
    """(N,H,W) of every scale, the finest first."""
    scales = [pictures]
    while len(scales) < settings.scales:
        height, width = (round(side * settings.scale_step) for side in scales[-1].shape[-2:])
        if min(height, width) < MIN_SCALE_SIDE:
            break
        scales.append(resize_linear(scales[-1], height, width, 1 / settings.scale_step))
    return scales


def _central_differences(pictures: Tensor) -> tuple[Tensor, Tensor]:
    """Half the difference of the neighbours along x and y; beyond the border the nearest pixel is repeated."""
    found = []
    for dim in (-1, -2):
        length = pictures.shape[dim]
        place = torch.arange(length, device=pictures.device)
        after, before = (place + 1).clamp(max=length - 1), (place - 1).clamp(min=0)
        found.append((pictures.index_select(dim, after) - pictures.index_select(dim, before)).mul_(0.5))
    return found[0], found[1]


def _solve_scale(first: Tensor, second: Tensor, flow: Tensor, settings: TVL1Settings) -> None:
    """All warps of some pairs at one scale; ``flow`` (N,2,H,W) holds the start and is given the result."""
    pictures = torch.stack([second, *_central_differences(second)], dim=1)
    dual_x, dual_y = torch.zeros_like(flow), torch.zeros_like(flow)
    for _ in range(settings.warps):
        warped = warp_cubic(pictures, flow)
        gradient = warped[:, 1:]
        residual = warped[:, 0] - first - (gradient * flow).sum(1)
        _solve_warp(gradient, residual, (flow, dual_x, dual_y), settings)


def _solve_warp(
    gradient: Tensor, residual: Tensor, whole: tuple[Tensor, Tensor, Tensor], settings: TVL1Settings
) -> None:
    """Iterate until each pair's flow moves no more.

    Args:
        gradient: (N,2,H,W), of the warped picture.
        residual: (N,H,W), its difference from the first picture, linearised around zero flow.
        whole: Flow and dual variables (times theta) of its derivatives along x and y, each (N,2,H,W); the results are
            written there.
        settings: Parameters.
    """
    check_every = check_interval(gradient.device)
    places = torch.arange(len(gradient), device=gradient.device)
    state = _Iteration(whole, _data_term(gradient, residual, settings), settings, masked=check_every > 1)
    for _ in range(settings.outer_iterations):
        if settings.median:
            state.flow.copy_(median5(state.flow.flatten(0, 1)).view_as(state.flow))
        for number in range(1, settings.inner_iterations + 1):
            moving = state.step()
            if number % check_every and number < settings.inner_iterations:
                continue
            moving = moving.cpu()
            if moving.all():
                continue
            _write(whole, places, state)
            if not moving.any():
                return
            rows = moving.nonzero().flatten().to(places.device, non_blocking=True)
            places, state = places[rows], state.subset(rows)
    _write(whole, places, state)


def _write(whole: tuple[Tensor, Tensor, Tensor], places: Tensor, state: _Iteration) -> None:
    """The values of some pairs to their places among all."""
    for target, values in zip(whole, (state.flow, state.dual_x, state.dual_y), strict=True):
        target[places] = values


class _DataTerm(NamedTuple):
    """What a warp's iterations read.

    With the residual rho + g·u of the linearised brightness, the minimiser of the data term is
    u − g·clamp((rho + g·u) / |g|², ± lambda theta): all three cases of the papers' thresholding at once.
    """

    gradient: Tensor
    """g, (N,2,HW)."""
    scaled_gradient: Tensor
    """g / |g|², (N,2,HW)."""
    scaled_residual: Tensor
    """rho / |g|², (N,HW)."""


def _data_term(gradient: Tensor, residual: Tensor, settings: TVL1Settings) -> _DataTerm:
    gradient = gradient.flatten(2).contiguous()
    inverse = gradient.square().sum(1).clamp_(min=torch.finfo(gradient.dtype).eps).reciprocal_()
    return _DataTerm(gradient, gradient * inverse[:, None], residual.flatten(1) * inverse)


class _Iteration:
    """Some pairs' variables during a warp, and the memory of a step.

    All planes lie behind one another, so that a neighbour along x is one place away and one along y is W places away,
    whatever the plane: every operation runs over contiguous memory. At a border this meets the next row or plane. The
    derivatives there are set to zero; their dual variables therefore remain zero, and the divergence on the border's
    other side is right as it is. Only before the first and behind the last plane does memory have to be added.

    Attributes:
        flow: (N,2,H,W).
        dual_x: (N,2,H,W), dual variables of the derivatives along x, times theta.
        dual_y: Likewise along y.
    """

    def __init__(
        self, values: tuple[Tensor, Tensor, Tensor], data: _DataTerm, settings: TVL1Settings, *, masked: bool
    ) -> None:
        """Copy the variables.

        Args:
            values: Flow and dual variables.
            data: Of the same pairs.
            settings: Parameters.
            masked: Keep pairs that have come to rest as they are; otherwise the caller takes them out after each step.
        """
        flow = values[0]
        pairs, _, height, width = flow.shape
        length, self.settings, self.data = flow.numel(), settings, data
        flow_memory, x_memory, y_memory = (flow.new_zeros(length + pad) for pad in (width, 1, width))
        self._flow, self._flow_right, self._flow_below = (flow_memory[at : at + length] for at in (0, 1, width))
        self._dual_x, self._dual_x_left = x_memory[1:], x_memory[:-1]
        self._dual_y, self._dual_y_above = y_memory[width:], y_memory[:-width]
        self.flow, self.dual_x, self.dual_y = (
            memory.view(flow.shape) for memory in (self._flow, self._dual_x, self._dual_y)
        )
        for target, source in zip((self.flow, self.dual_x, self.dual_y), values, strict=True):
            target.copy_(source)
        self._u, self._v = self.flow.flatten(2).unbind(1)
        self._move, self._dx, self._dy, self._norm = flow.new_empty(4, length).unbind()
        self._last_column = self._dx.view(flow.shape)[..., -1]
        self._last_row = self._dy.view(flow.shape)[..., -1, :]
        self._step_size = flow.new_empty(pairs, height * width)
        self._one = flow.new_ones(())
        self._limit = settings.epsilon * (height * width) ** 0.5
        self._mask = flow.new_ones(pairs, 1) if masked else None

    def step(self) -> Tensor:
        """One iteration of the flow and of its dual variables; whether each pair still moves, (N,)."""
        settings, data, pairs = self.settings, self.data, len(self._u)
        move, dx, dy, norm, size = self._move, self._dx, self._dy, self._norm, self._step_size
        bound = settings.lambda_ * settings.theta
        torch.addcmul(data.scaled_residual, data.scaled_gradient[:, 0], self._u, out=size)
        size.addcmul_(data.scaled_gradient[:, 1], self._v).clamp_(-bound, bound)
        torch.sub(self._dual_x, self._dual_x_left, out=move)
        move.add_(self._dual_y).sub_(self._dual_y_above)
        move.view(data.gradient.shape).addcmul_(data.gradient, size[:, None], value=-1)
        if self._mask is not None:
            move.view(pairs, -1).mul_(self._mask)
        self._flow.add_(move)
        torch.sub(self._flow_right, self._flow, out=dx)
        torch.sub(self._flow_below, self._flow, out=dy)
        self._last_column.zero_()
        self._last_row.zero_()
        if self._mask is not None:
            dx.view(pairs, -1).mul_(self._mask)
            dy.view(pairs, -1).mul_(self._mask)
        torch.mul(dx, dx, out=norm).addcmul_(dy, dy).sqrt_()
        torch.add(self._one, norm, alpha=settings.tau / settings.theta, out=norm)
        self._dual_x.add_(dx, alpha=settings.tau).div_(norm)
        self._dual_y.add_(dy, alpha=settings.tau).div_(norm)
        moving = torch.linalg.vector_norm(move.view(pairs, -1), dim=1) > self._limit
        self.hold(moving)
        return moving

    def hold(self, moving: Tensor) -> None:
        """Keep what does not move (N,) as it is from now on, where there is a mask."""
        if self._mask is not None:
            self._mask.mul_(moving[:, None])

    def subset(self, rows: Tensor) -> _Iteration:
        """The pairs of these rows, in memory of their own."""
        data = _DataTerm(*(tensor[rows] for tensor in self.data))
        values = (self.flow[rows], self.dual_x[rows], self.dual_y[rows])
        return _Iteration(values, data, self.settings, masked=self._mask is not None)
