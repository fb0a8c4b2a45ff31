"""Networks whose losses and gradients can be written down, and objectives of two teachers over them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from itertools import pairwise

import torch
from torch import Tensor, nn

from distinit_plugin.losses import build_loss
from distinit_plugin.objectives import Objective, Term, build_adapter, combine_counts
from distinit_plugin.types import LayerInfo, ModelOutput

CHANNELS = 3
LIMITS = {"A": 0.35, "B": 0.1}  # nats; keeps some of the examples, not the same ones for both teachers


class LinearNetwork(nn.Module):
    """A 1×1×1 convolution, a mean and a classifier: no part of the result depends on other examples of the batch."""

    def __init__(self, num_classes: int, width: int = 6, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.conv = nn.Conv3d(CHANNELS, width, 1)
        self.fc = nn.Linear(width, num_classes) if num_classes else None
        self.feature_dim, self.num_classes = width, num_classes
        self.layers = {"stage": LayerInfo(width, 1, 1)}
        self.batch_sizes: list[int] = []
        for parameter in self.parameters():
            nn.init.normal_(parameter, generator=generator)

    def forward(
        self, views: Mapping[str, Tensor], *, boxes: Tensor | None = None, taps: Collection[str] = ()
    ) -> ModelOutput:
        self.batch_sizes.append(len(views["rgb"]))
        maps = self.conv(views["rgb"])
        features = maps.mean((2, 3, 4))
        return ModelOutput(None if self.fc is None else self.fc(features), features, dict.fromkeys(taps, maps))

    def view_specs(self, split: str) -> dict:
        return {}

    def reset_classifier(self, num_classes: int) -> None:
        raise NotImplementedError

    def bare_state_dict(self) -> dict[str, Tensor]:
        return dict(self.state_dict())


class StepNetwork(LinearNetwork):
    """Answers at every frame; the answer to the clip is the last one."""

    def forward(
        self, views: Mapping[str, Tensor], *, boxes: Tensor | None = None, taps: Collection[str] = ()
    ) -> ModelOutput:
        self.batch_sizes.append(len(views["rgb"]))
        states = self.conv(views["rgb"]).mean((3, 4)).transpose(1, 2)
        logits = self.fc(states)
        return ModelOutput(logits[:, -1], states[:, -1], {}, logits.transpose(1, 2) if self.training else None)


def frozen(network: LinearNetwork) -> LinearNetwork:
    return network.eval().requires_grad_(False)


def make_views(
    batch_size: int, consumers: Collection[str] = ("student", "A", "B"), seed: int = 10
) -> dict[str, Tensor]:
    """Noise of a random colour: 4 frames for the student, one for teachers."""
    generator = torch.Generator().manual_seed(seed)
    views = {}
    for name in consumers:
        frames = 4 if name == "student" else 1
        colour = torch.randn(batch_size, CHANNELS, 1, 1, 1, generator=generator)
        views[f"{name}/rgb"] = colour + torch.randn(batch_size, CHANNELS, frames, 5, 5, generator=generator)
    return views


def rows(tensors: Mapping[str, Tensor], start: int, stop: int) -> dict[str, Tensor]:
    return {name: tensor[start:stop] for name, tensor in tensors.items()}


def two_teachers(
    gate: str = "weight", gate_mean: str = "all", limits: tuple = tuple(LIMITS.values()), **arguments
) -> Objective:
    """DistInit with two teachers, a new head each, and a gate each."""
    torch.manual_seed(0)
    student = LinearNetwork(0)
    teachers = {"A": frozen(LinearNetwork(5, seed=1)), "B": frozen(LinearNetwork(4, seed=2))}
    adapters = {
        name: build_adapter("linear", student, "features", teacher, "logits") for name, teacher in teachers.items()
    }
    losses = {"A": build_loss("soft_cross_entropy"), "B": build_loss("mse")}
    terms = [
        Term(name, "features", losses[name], weight, teacher=name, max_entropy=limit)
        for name, weight, limit in zip("AB", (1.0, 0.25), limits, strict=True)
    ]
    return Objective(student, terms, teachers, adapters, gate=gate, gate_mean=gate_mean, **arguments)


def gradients(objective: Objective) -> dict[str, Tensor]:
    return {name: parameter.grad.clone() for name, parameter in objective.trainable.named_parameters()}


def teacher_logits(objective: Objective, name: str, views: Mapping[str, Tensor]) -> Tensor:
    return objective.teachers[name]({"rgb": views[f"{name}/rgb"]}).logits


def run_steps(
    objective: Objective, views: Mapping[str, Tensor], sizes: list[int], ranks: int, position: float | None = None
) -> tuple[Tensor, dict]:
    """One optimizer step from micro-batches of some sizes, dealt to ranks in turn, as a trainer under DDP does it."""
    edges = [sum(sizes[:i]) for i in range(len(sizes) + 1)]
    prepared = [objective.prepare(rows(views, a, b), {}) for a, b in pairwise(edges)]
    by_rank = [prepared[rank::ranks] for rank in range(ranks)]
    own_sums = [
        torch.stack([sum(item.counts[term.name] for item in items) for term in objective.terms]) for items in by_rank
    ]
    total = torch.zeros(())
    objective.trainable.zero_grad()
    for items in by_rank:
        counts = combine_counts(items, ranks, lambda _: sum(own_sums) if ranks > 1 else own_sums[0])
        for item in items:
            loss = objective.step(item, counts, position).loss / ranks  # DDP averages gradients over ranks
            loss.backward()
            total = total + loss.detach()
    return total, gradients(objective)
