"""How much motion can be read out of features? End-point errors of decoded flow, with controls.

The measure is D3D's (arXiv 1812.08249 §3.2): the mean distance between the decoded flow and that of a flow algorithm,
in pixels of the network's input, on the grid of the layer. The controls are not in the paper: a decoder could also have
learnt what usually moves, and how, from the looks of single frames.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from distinit_plugin.engine import distributed
from distinit_plugin.engine.evaluate import Finish, evaluation_mode
from distinit_plugin.errors import UserError
from distinit_plugin.flow.motion import flow_errors, polar_to_flow
from distinit_plugin.losses import full_precision
from distinit_plugin.objectives import Objective, Prepared, Term
from distinit_plugin.types import Batch, SampleKey

RGB = "rgb"
"""The student's view that the controls change."""

CONTROLS = ("still", "reversed", "shuffled")
"""What is done to clips: all frames equal the first one, the last frame comes first, frames in a random order."""

_SHUFFLE_STREAM = 5
"""First word of the seed of the random orders."""

OwnFlow = Callable[[Tensor], Tensor]
"""Frames uint8 (B,3,T,H,W) → the flow between them (B,2,T,H,W), pixels."""


class ControlErrors(NamedTuple):
    """End-point errors of the flow that is decoded from a changed clip, pixels.

    Attributes:
        own: Against the flow of the changed clip; NaN where it is not known.
        own_magnitude: Mean magnitude of that flow, what no motion at all would err by.
        original: Against the flow of the clip as it was.
    """

    own: float
    own_magnitude: float
    original: float


@dataclass(frozen=True)
class LayerMotion:
    """What was decoded from one layer.

    Attributes:
        layer: Of the network.
        grid: T', H', W' of its map.
        epe: End-point error, pixels of the network's input, mean over all cells of all clips.
        zeros: That of no motion at all.
        magnitude: Mean magnitude of the target, which ``zeros`` equals.
        controls: By name.
    """

    layer: str
    grid: tuple[int, int, int]
    epe: float
    zeros: float
    magnitude: float
    controls: Mapping[str, ControlErrors] = field(default_factory=dict)


@dataclass(frozen=True)
class MotionSample:
    """One frame of a clip with its flow, for pictures.

    Attributes:
        frame: (3,H,W) uint8.
        flow: (2,H,W), pixels: the target.
        decoded: Layer → (2,H',W'), pixels.
    """

    frame: Tensor
    flow: Tensor
    decoded: Mapping[str, Tensor]


class _Mean:
    """A mean over cells, in float64."""

    def __init__(self) -> None:
        self.total: Tensor | None = None
        self.count = 0

    def add(self, errors: Tensor) -> None:
        total = errors.double().sum()
        self.total = total if self.total is None else self.total + total
        self.count += errors.numel()

    def read(self, device: torch.device, all_reduce_sum: Callable[[Tensor], Tensor]) -> float:
        total = torch.zeros((), dtype=torch.float64, device=device) if self.total is None else self.total
        packed = all_reduce_sum(torch.stack([total, total.new_tensor(self.count)]))
        return float(packed[0] / packed[1]) if packed[1] > 0 else float("nan")


class _Layer:
    """The running means of one term."""

    def __init__(self, term: Term, unit_direction: bool, controls: Sequence[str]) -> None:
        self.term = term
        self.grid: tuple[int, int, int] = (0, 0, 0)
        self._unit_direction = unit_direction
        self._own = {name: _Mean() for name in ("epe", "zeros", "magnitude")}
        self._controls = {name: {kind: _Mean() for kind in ControlErrors._fields} for name in controls}

    def decode(self, prediction: Tensor) -> Tensor:
        """(B,3,T',H',W') → (B,2,T',H',W'), pixels."""
        return polar_to_flow(full_precision(prediction), unit_direction=self._unit_direction)

    def add(self, prediction: Tensor, flow: Tensor) -> None:
        prediction, target = self.term.match(prediction, flow)
        frames, height, width = prediction.shape[2:]
        self.grid = (frames, height, width)
        self._own["epe"].add(flow_errors(self.decode(prediction), target))
        # Through the whole path, and by itself: that both are equal is a check of the path.
        self._own["zeros"].add(flow_errors(self.decode(torch.zeros_like(prediction)), target))
        self._own["magnitude"].add(torch.linalg.vector_norm(target, dim=1))

    def add_control(self, name: str, prediction: Tensor, own: Tensor | None, original: Tensor) -> None:
        means, decoded = self._controls[name], self.decode(prediction)
        _, target = self.term.match(prediction, original)
        means["original"].add(flow_errors(decoded, target))
        if own is not None:
            _, target = self.term.match(prediction, own)
            means["own"].add(flow_errors(decoded, target))
            means["own_magnitude"].add(torch.linalg.vector_norm(target, dim=1))

    def read(
        self, grid: tuple[int, int, int], device: torch.device, all_reduce_sum: Callable[[Tensor], Tensor]
    ) -> LayerMotion:
        """The errors over all ranks; ``grid`` is that of a rank that had clips."""
        own = {name: mean.read(device, all_reduce_sum) for name, mean in self._own.items()}
        controls = {
            name: ControlErrors(**{kind: mean.read(device, all_reduce_sum) for kind, mean in means.items()})
            for name, means in self._controls.items()
        }
        return LayerMotion(self.term.student_layer, grid, controls=controls, **own)


@dataclass(frozen=True)
class Changes:
    """How clips are changed for the controls.

    Attributes:
        own_flow: Of changed clips; ``None``: only that of still clips is known, which is none.
        seed: Of the random orders.
    """

    own_flow: OwnFlow | None = None
    seed: int = 0

    def flow_of(self, name: str, frames: Tensor, order: Tensor) -> Tensor | None:
        """The flow of a changed clip (frames uint8 (B,3,T,H,W) in the order (B,T)); nothing moves in a still one."""
        if name == "still":
            batch, _, count, height, width = frames.shape
            return torch.zeros(batch, 2, count, height, width, device=frames.device)
        return None if self.own_flow is None else self.own_flow(reorder(frames, order))


def measure_motion(
    objective: Objective,
    batches: Iterable[Batch],
    *,
    finish: Finish,
    device: torch.device,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    unit_direction: bool = False,
    pixels: str = "",
    changes: Changes | None = None,
    num_samples: int = 0,
    all_reduce_sum: Callable[[Tensor], Tensor] = distributed.all_reduce_sum,
    gather_objects: Callable[[Any], list[Any]] = distributed.gather_objects,
) -> tuple[list[LayerMotion], list[MotionSample]]:
    """Decode the flow of clips and compare it with the teacher's.

    Args:
        objective: Its terms all decode flow; in eval mode meanwhile.
        batches: Clips.
        finish: Makes the objective's views of a batch.
        device: Where the objective is.
        autocast: Context of the forward pass.
        unit_direction: As in ``polar_to_flow``.
        pixels: ``ViewSpec.pixels`` of the student's frames in a batch, for controls and pictures.
        changes: Also decode the changed clips; the student must see frames.
        num_samples: Clips to be kept for pictures, the first ones of this rank.
        all_reduce_sum: Sum of a tensor over ranks.
        gather_objects: The objects of all ranks.

    Returns:
        Each term's errors, in order, and the pictures.

    Raises:
        UserError: No clip could be read.
    """
    layers = [_Layer(term, unit_direction, CONTROLS if changes is not None else ()) for term in objective.terms]
    samples: list[MotionSample] = []
    with evaluation_mode(objective.trainable):
        for batch in batches:
            if not batch["keys"]:
                continue
            with autocast():
                prepared = objective.prepare(finish(batch), {})
                _, predictions = objective.trainable(prepared.views)
            for layer in layers:
                layer.add(predictions[layer.term.name], prepared.targets[layer.term.name])
            if len(samples) < num_samples and pixels in batch["views"]:
                flow = prepared.targets[layers[0].term.name]
                samples += _samples(layers, predictions, batch["views"][pixels], flow)[: num_samples - len(samples)]
            if changes is not None:
                frames = batch["views"][pixels].to(device)
                _add_controls(objective, layers, prepared, frames, batch["keys"], changes, autocast)
    grids = [grids for grids in gather_objects([layer.grid for layer in layers]) if all(map(all, grids))]
    if not grids:
        raise UserError("none of the test videos could be read: run distinit check-corpus on CORPUS.TEST.")
    rows = [layer.read(grid, device, all_reduce_sum) for layer, grid in zip(layers, grids[0], strict=True)]
    return rows, samples


def _add_controls(
    objective: Objective,
    layers: list[_Layer],
    prepared: Prepared,
    frames: Tensor,
    keys: Sequence[SampleKey],
    changes: Changes,
    autocast: Callable[[], AbstractContextManager[Any]],
) -> None:
    """Decode a batch again with its clips changed."""
    clip = prepared.views[RGB]
    for name in CONTROLS:
        order = frame_order(name, keys, clip.shape[2], changes.seed).to(clip.device)
        own = changes.flow_of(name, frames, order)
        with autocast():
            _, changed = objective.trainable({**prepared.views, RGB: reorder(clip, order)})
        for layer in layers:
            layer.add_control(name, changed[layer.term.name], own, prepared.targets[layer.term.name])


def frame_order(name: str, keys: Iterable[SampleKey], num_frames: int, seed: int) -> Tensor:
    """Which frame of the clip stands at each place of the changed one: (B,T) int64.

    Args:
        name: One of :data:`CONTROLS`.
        keys: Of the clips; random orders follow from seed, video and clip alone.
        num_frames: T.
        seed: Integer ≥ 0.
    """
    rows = []
    for key in keys:
        if name == "still":
            rows.append(torch.zeros(num_frames, dtype=torch.int64))
        elif name == "reversed":
            rows.append(torch.arange(num_frames).flip(0))
        else:
            words = [_SHUFFLE_STREAM, seed, key.index, key.clip, key.crop]
            rows.append(torch.from_numpy(np.random.default_rng(words).permutation(num_frames)))
    return torch.stack(rows)


def reorder(clip: Tensor, order: Tensor) -> Tensor:
    """Frames (B,C,T,H,W) in the order (B,T)."""
    return torch.gather(clip, 2, order[:, None, :, None, None].expand(-1, clip.shape[1], -1, *clip.shape[3:]))


def _samples(
    layers: list[_Layer], predictions: Mapping[str, Tensor], frames: Tensor, flow: Tensor
) -> list[MotionSample]:
    """The middle frame of each clip of a batch."""
    count = frames.shape[2]
    middle = count // 2
    decoded = {}
    for layer in layers:
        maps = layer.decode(predictions[layer.term.name])
        decoded[layer.term.student_layer] = maps[:, :, middle * maps.shape[2] // count].cpu()
    return [
        MotionSample(
            frames[row, :, middle].cpu(),
            flow[row, :, middle].cpu(),
            {name: maps[row] for name, maps in decoded.items()},
        )
        for row in range(len(frames))
    ]
