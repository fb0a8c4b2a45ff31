"""Teachers are frozen by construction."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from distinit_plugin.teachers.frames import as_examples, averages_frames, joined
from distinit_plugin.types import LayerInfo, ModelOutput, Network, Split, ViewSpec


class Frozen(nn.Module):
    """A network that nothing can train.

    The network is not a registered child: its parameters are in no optimizer, checkpoint or DDP wrap of a module that
    holds this one, and ``train()`` does not reach it. It is in eval mode for good, so BN counters never move.
    ``to()`` and its kin do reach it. Outputs are ordinary tensors without a graph.

    Attributes:
        one_at_a_time: Run each example (of an image network each frame) alone. The last bits of what a network gives
            for an example depend on how many others are in the batch; alone they do not.
    """

    def __init__(self, network: Network) -> None:
        """Freeze ``network``, in place."""
        super().__init__()
        module = cast(nn.Module, network)
        module.requires_grad_(False)
        module.eval()
        self._held = (network,)  # inside a tuple, nn.Module does not adopt it
        self.one_at_a_time = False
        self.train(False)

    @property
    def network(self) -> Network:
        """The frozen network."""
        return self._held[0]

    @property
    def layers(self) -> Mapping[str, LayerInfo]:
        """The layers that can be tapped."""
        return self.network.layers

    @property
    def feature_dim(self) -> int:
        """D, the size of the pooled features."""
        return self.network.feature_dim

    @property
    def num_classes(self) -> int:
        """K, the outputs of the classifier; 0 without one."""
        return self.network.num_classes

    def view_specs(self, split: Split) -> Mapping[str, ViewSpec]:
        """The views that ``forward`` expects."""
        return self.network.view_specs(split)

    def forward(
        self, views: Mapping[str, Tensor], *, boxes: Tensor | None = None, taps: Collection[str] = ()
    ) -> ModelOutput:
        """Run on normalised views (B,C,T,H,W); mixed precision is the caller's."""
        with torch.inference_mode():
            if self.one_at_a_time and boxes is None:
                output = self._alone(views, taps)
            else:
                output = self.network.forward(views, boxes=boxes, taps=taps)
        # Copies made outside may be saved for the backward pass of a loss; inference tensors may not.
        return ModelOutput(
            _ordinary(output.logits),
            _ordinary(output.features),
            {name: tap.clone() for name, tap in output.taps.items()},
        )

    def _alone(self, views: Mapping[str, Tensor], taps: Collection[str]) -> ModelOutput:
        by_frame = averages_frames(self.network)
        shape = next(iter(views.values())).shape
        examples = as_examples(views) if by_frame else dict(views)
        count = len(next(iter(examples.values())))
        outputs = [
            self.network.forward({name: view[number : number + 1] for name, view in examples.items()}, taps=taps)
            for number in range(count)
        ]
        logits = _stacked([output.logits for output in outputs])
        features = _stacked([output.features for output in outputs])
        kept = {name: torch.cat([output.taps[name] for output in outputs]) for name in taps}
        if not by_frame:
            return ModelOutput(logits, features, kept)
        parts = (shape[0], shape[2])
        return ModelOutput(
            None if logits is None else joined(logits.unflatten(0, parts)),
            None if features is None else joined(features.unflatten(0, parts)),
            {name: joined(tap.squeeze(2).unflatten(0, parts)) for name, tap in kept.items()},
        )

    def train(self, mode: bool = True) -> Self:
        """Stay in eval mode, whatever ``mode`` says."""
        return super().train(False)

    def reset_classifier(self, num_classes: int) -> None:
        """A teacher keeps its classifier.

        Raises:
            TypeError: Always.
        """
        raise TypeError("a frozen network keeps its classifier")

    def bare_state_dict(self) -> dict[str, Tensor]:
        """The network's weights (``state_dict`` is empty: they belong into no checkpoint)."""
        return self.network.bare_state_dict()

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:
        cast(nn.Module, self.network)._apply(fn, recurse)
        return super()._apply(fn, recurse)


def module_of(network: Network | nn.Module) -> nn.Module:
    """The module that has the parameters: of a frozen network the one that it holds."""
    return cast(nn.Module, network.network if isinstance(network, Frozen) else network)


def freeze(network: Network) -> Frozen:
    """Make a teacher of ``network``; a frozen one is returned as it is."""
    return network if isinstance(network, Frozen) else Frozen(network)


def _stacked(parts: list[Tensor | None]) -> Tensor | None:
    found = [part for part in parts if part is not None]
    return torch.cat(found) if found else None


def _ordinary(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.clone()
