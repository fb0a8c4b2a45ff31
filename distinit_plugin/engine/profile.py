"""What a job will cost, measured on a few real steps before it starts."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from distinit_plugin.engine import distributed
from distinit_plugin.engine.evaluate import evaluation_mode
from distinit_plugin.engine.meters import duration_text, process_peak_memory
from distinit_plugin.engine.train import Trainer
from distinit_plugin.teachers.frozen import module_of

_GIB = 1024**3


@dataclass(frozen=True)
class NetworkCost:
    """Size and cost of one network.

    Attributes:
        parameters: All of them.
        trainable: Those that are trained.
        macs: Multiply-accumulate operations of one forward pass of one clip.
    """

    parameters: int
    trainable: int
    macs: int


@dataclass(frozen=True)
class Profile:
    """The cost of a job.

    Attributes:
        networks: ``student`` (with its heads) and teachers by name.
        views: View → shape of a micro-batch (B,C,T,H,W).
        clips_per_step: Clips of an optimizer step, all ranks together.
        clips_per_second: Of the whole job, training.
        wait_share: Fraction of the time spent waiting for data.
        peak_memory: Largest memory of this process so far, bytes: of the GPU where there is one, else main memory.
        total_steps: Optimizer steps of the job.
        seconds: Expected duration of the training, without validation and test.
    """

    networks: dict[str, NetworkCost]
    views: dict[str, tuple[int, ...]]
    clips_per_step: int
    clips_per_second: float
    wait_share: float
    peak_memory: int
    total_steps: int
    seconds: float

    def __str__(self) -> str:
        lines = [
            f"{name}: {cost.parameters / 1e6:.2f} M parameters ({cost.trainable / 1e6:.2f} M trained), "
            f"{cost.macs / 1e9:.2f} GMACs per clip"
            for name, cost in self.networks.items()
        ]
        lines += [f"view {name}: {' × '.join(map(str, shape))} (B C T H W)" for name, shape in self.views.items()]
        lines += [
            f"peak memory: {self.peak_memory / _GIB:.2f} GiB",
            f"speed: {self.clips_per_second:.1f} clips/s, data wait {100 * self.wait_share:.0f} %",
            f"the whole training: {self.total_steps} steps of {self.clips_per_step} clips, about "
            f"{duration_text(self.seconds)} (without validation and test)",
        ]
        return "\n".join(lines)


def profile_training(trainer: Trainer, steps: int = 4) -> Profile:
    """Run a few real steps of a job and measure.

    The weights move: build the job anew to train. The first step, which starts workers and warms up, is not timed
    unless it is the only one.

    Args:
        trainer: A job that is ready to train.
        steps: Optimizer steps, no more than an epoch has.
    """
    steps = max(1, min(steps, trainer.steps_per_epoch, trainer.total_steps))
    with trainer.open_epoch() as batches:
        first = next(batches)
        views = trainer.finish(first)
        networks = _costs(trainer, views)
        stream = chain([first], batches)
        warm_up = 1 if steps > 1 else 0
        for _ in range(warm_up):
            trainer.run_step(stream)
        wait_for(trainer.device)
        clock, begin = trainer.restart_clock(), time.perf_counter()
        for _ in range(steps - warm_up):
            trainer.run_step(stream)
        wait_for(trainer.device)
        seconds = time.perf_counter() - begin
    clips = clock.clips * distributed.world_size()
    return Profile(
        networks=networks,
        views={name: tuple(view.shape) for name, view in views.items()},
        clips_per_step=clips // clock.steps,
        clips_per_second=clips / seconds,
        wait_share=clock.waited / seconds,
        peak_memory=_peak_memory(trainer.device),
        total_steps=trainer.total_steps,
        seconds=seconds / clock.steps * trainer.total_steps,
    )


def count_macs(network: nn.Module, views: Mapping[str, Tensor]) -> int:
    """Multiply-accumulates of one forward pass of the first clip of ``views`` (convolutions and matrix products)."""
    counter = FlopCounterMode(display=False)
    with evaluation_mode(network), counter:
        network({name: view[:1] for name, view in views.items()})
    return counter.get_total_flops() // 2


def _costs(trainer: Trainer, views: Mapping[str, Tensor]) -> dict[str, NetworkCost]:
    objective = trainer.state.objective
    costs = {}
    for name, network in {"student": objective.trainable, **objective.teachers}.items():
        own = {view.removeprefix(f"{name}/"): value for view, value in views.items() if view.startswith(f"{name}/")}
        if not own:  # its outputs are stored
            continue
        with trainer.state.precision.autocast():
            macs = count_macs(network, own)
        sizes = [(parameter.numel(), parameter.requires_grad) for parameter in module_of(network).parameters()]
        costs[name] = NetworkCost(sum(size for size, _ in sizes), sum(size for size, grad in sizes if grad), macs)
    return costs


def wait_for(device: torch.device) -> None:
    """Wait until a device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _peak_memory(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else process_peak_memory()
