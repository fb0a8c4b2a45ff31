"""Batch-norm statistics of the finished weights instead of a running average over changing ones.

Wu and Johnson, "Rethinking 'Batch' in BatchNorm" (arXiv 2105.07576), section 3 and appendix. fvcore has the same
estimator; this one also sums over ranks, takes a layer that is used twice or data that ends early, and leaves the
network as it was when a batch fails.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from distinit_plugin.engine import distributed


class _Moments:
    """Sums over everything that a layer has seen: count, Σx and Σx² per channel, and what it was before."""

    def __init__(self, layer: _BatchNorm) -> None:
        self.layer = layer
        self._momentum = layer.momentum
        self._buffers = {name: buffer.clone() for name, buffer in layer.named_buffers(recurse=False)}
        zeros = torch.zeros_like(self._buffers["running_mean"], dtype=torch.float64)
        self._count, self._total, self._squares = zeros.new_zeros(1), zeros, zeros.clone()

    def add(self, _: nn.Module, inputs: tuple[Tensor, ...], __: Tensor) -> None:
        """Forward hook: read the statistics of one batch, which momentum 1 has left in the layer's buffers."""
        buffers = dict(self.layer.named_buffers(recurse=False))
        mean, variance = buffers["running_mean"].double(), buffers["running_var"].double()
        count = inputs[0].numel() // inputs[0].shape[1]
        # The buffer holds the unbiased variance (÷ (n − 1)); a synchronised layer's is over all ranks, which have
        # equally many clips.
        number = count * (distributed.world_size() if isinstance(self.layer, nn.SyncBatchNorm) else 1)
        self._count += count
        self._total += count * mean
        self._squares += count * (variance * (number - 1) / number + mean.square())

    def restore(self) -> None:
        """Put the layer back to what it was."""
        self.layer.momentum = self._momentum
        self._write(self._buffers)

    def finish(self, all_reduce_sum: Callable[[Tensor], Tensor] | None) -> None:
        """Write the statistics of everything seen, on all ranks; a layer that did not run keeps its own."""
        packed = torch.cat([self._count, self._total, self._squares])
        if all_reduce_sum is not None:
            packed = all_reduce_sum(packed)
        count, (total, squares) = packed[0], packed[1:].chunk(2)
        if count == 0:
            return
        mean = total / count
        self._write({"running_mean": mean, "running_var": (squares / count - mean.square()).clamp(min=0)})

    def _write(self, values: Mapping[str, Tensor]) -> None:
        """Into the buffers themselves: whoever holds them (DDP, a compiled graph) sees the new values."""
        buffers = dict(self.layer.named_buffers(recurse=False))
        for name, value in values.items():
            buffers[name].copy_(value)


def update_bn_statistics(
    network: nn.Module,
    batches: Iterable[Mapping[str, Tensor]],
    num_batches: int,
    *,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    all_reduce_sum: Callable[[Tensor], Tensor] | None = None,
) -> int:
    """Set running mean and variance of batch-norm layers to those of all values in some batches.

    The mean is that of all values over all batches and ranks, the variance the population's. Only layers in training
    mode that keep running statistics change: frozen ones, in eval mode, do not. The network's modes are the caller's.

    Args:
        network: Called with one batch of views at a time.
        batches: Views of each batch; no more than ``num_batches`` are taken.
        num_batches: At least 1; data that ends earlier is used as far as it goes.
        autocast: Context of the forward passes.
        all_reduce_sum: Sums a tensor over ranks; every rank must have at least one batch.

    Returns:
        Batches used on this rank; with 0 nothing has changed.
    """
    moments = [
        _Moments(module)
        for module in network.modules()
        if isinstance(module, _BatchNorm) and module.training and module.running_mean is not None
    ]
    if not moments:
        return 0
    used = 0
    hooks = [moment.layer.register_forward_hook(moment.add) for moment in moments]
    try:
        for moment in moments:
            moment.layer.momentum = 1.0
        with torch.no_grad():
            for views in islice(batches, num_batches):
                with autocast():
                    network(views)
                used += 1
    finally:
        for hook in hooks:
            hook.remove()
        for moment in moments:
            moment.restore()
    for moment in moments:
        moment.finish(all_reduce_sum)
    return used
