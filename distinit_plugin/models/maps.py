"""Maps inside networks whose code is another library's, and the two pathways of SlowFast."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from distinit_plugin.types import LayerInfo

FAST = ".fast"
"""Ending of the names of layers of SlowFast's fast pathway."""


def two_pathways(clip: Tensor, alpha: int) -> list[Tensor]:
    """[slow, fast] of a clip (B,C,T,H,W), cut as PySlowFast does: T // ``alpha`` frames, evenly spaced, with both ends.

    The frames are counted on the CPU, where PySlowFast's loader counts them: a GPU may round others.
    """
    num_frames = clip.shape[2]
    slow = torch.linspace(0, num_frames - 1, num_frames // alpha, device="cpu").long()
    return [clip.index_select(2, slow.to(clip.device, non_blocking=True)), clip]


def keep_map(
    model: nn.Module, name: str, keep: Callable[[Tensor], None], *, channels_last: bool = False
) -> RemovableHandle:
    """Give each map (B,C,T,H,W) that a module of a network puts out to ``keep``; outputs that are none are passed over.

    Args:
        model: The network.
        name: Of the module; ``NAME.fast``: what it puts out for the second of its pathways.
        keep: Called in each run.
        channels_last: Its maps are (B,T,H,W,C).
    """
    pathway = int(name.endswith(FAST))

    def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
        maps = output if isinstance(output, list) else [output]
        found = maps[pathway] if pathway < len(maps) else None
        if isinstance(found, Tensor) and found.ndim == 5:
            keep(found.movedim(-1, 1) if channels_last else found)

    return model.get_submodule(name.removesuffix(FAST)).register_forward_hook(hook)


@contextmanager
def kept_maps(model: nn.Module, names: Collection[str], *, channels_last: bool = False) -> Iterator[dict[str, Tensor]]:
    """Name → map of each layer, filled while the network runs within; arguments as ``keep_map``."""
    kept: dict[str, Tensor] = {}
    handles = [keep_map(model, name, partial(kept.__setitem__, name), channels_last=channels_last) for name in names]
    try:
        yield kept
    finally:
        for handle in handles:
            handle.remove()


def trace_maps(
    model: nn.Module,
    names: Sequence[str],
    cut: Callable[[Tensor], Any],
    clip_size: tuple[int, int, int],
    *,
    channels_last: bool = False,
) -> dict[str, LayerInfo]:
    """Those layers that put out maps of more than one place, with their geometry: one run without arithmetic.

    Args:
        model: The network.
        names: As ``keep_map``.
        cut: A clip → what the network takes.
        clip_size: Channels, frames, and pixels of a side.
        channels_last: As ``keep_map``.
    """
    channels, num_frames, size = clip_size
    state = {key: torch.empty_like(value, device="meta") for key, value in model.state_dict().items()}
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad(), kept_maps(model, names, channels_last=channels_last) as kept:
            clip = torch.empty(1, channels, num_frames, size, size, device="meta")
            torch.func.functional_call(model, state, (cut(clip),), strict=False)
    finally:
        for module, training in modes.items():
            module.training = training
    return {
        name: LayerInfo(kept[name].shape[1], max(1, num_frames // kept[name].shape[2]), size // kept[name].shape[3])
        for name in names
        if name in kept and kept[name].shape[3] > 1
    }
