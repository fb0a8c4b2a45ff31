"""The stages of PySlowFast's networks, as layers that can be tapped. PySlowFast is not needed."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from torch import Tensor, nn

from distinit_plugin.models.maps import FAST, trace_maps, two_pathways
from distinit_plugin.types import LayerInfo


def cut_pathways(clip: Tensor, alpha: int) -> list[Tensor]:
    """[clip], or [slow, fast] where SLOWFAST.ALPHA is above 0."""
    return two_pathways(clip, alpha) if alpha else [clip]


def trace_stages(model: nn.Module, alpha: int, clip_size: tuple[int, int, int]) -> dict[str, LayerInfo]:
    """Its stages whose output is a map (B,C,T,H,W); of a second pathway ``NAME.fast``. MViT has tokens, and no maps.

    Args:
        model: The network.
        alpha: SLOWFAST.ALPHA of networks of two pathways, else 0.
        clip_size: Channels, frames, and pixels of a side.
    """
    if type(model).__name__.endswith("MViT"):
        return {}
    endings = ("", FAST) if alpha else ("",)
    names = [f"{name}{ending}" for name in _names(model) for ending in endings]
    return trace_maps(model, names, partial(cut_pathways, alpha=alpha), clip_size)


def _names(model: nn.Module) -> Iterator[str]:
    """Children of the network, and of PyTorchVideo's list of blocks within."""
    for name, child in model.named_children():
        if name == "model":
            yield from (f"model.blocks.{key}" for key, _ in child.get_submodule("blocks").named_children())
        elif not name.endswith(("_fuse", "head")):
            yield name
