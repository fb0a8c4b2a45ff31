"""Dilated kernels in place of a stride: a network's last stage keeps the resolution of the stage before.

Source: L.-C. Chen et al., "DeepLab" (arXiv 1606.00915) §3.1. At every second cell, in height and width, the map is the
one of the network with its stride, from the same weights (feature gates, which average over the map, aside).
"""

from __future__ import annotations

import torch.nn.functional as functional
from torch import Tensor, nn

from distinit_plugin.errors import UserError
from distinit_plugin.models.conv3d import Conv3d
from distinit_plugin.models.external import ExternalNetwork
from distinit_plugin.models.inception import EndPoints
from distinit_plugin.models.maps import FAST
from distinit_plugin.models.network import TrunkNetwork, VideoNetwork
from distinit_plugin.models.padding import MaxPool3d

FACTOR = 2
"""The stride that is taken out, and the dilation that comes in."""


def dilate_last_stage(network: VideoNetwork) -> EndPoints:
    """Take the last stride in space out of a network, in place; its weights stay as they are.

    Args:
        network: One whose last layers have twice the stride of those before.

    Returns:
        Its layers, with the strides that they have now.

    Raises:
        UserError: There are no such layers, or something in them cannot be dilated.
    """
    layers = {name: network.layers[name] for name in network.layers}
    strides = sorted({info.spatial_stride for info in layers.values()})
    if len(strides) < 2 or strides[-1] != FACTOR * strides[-2]:
        raise _no_stage(network, f"the strides of its layers are {', '.join(map(str, strides))}")
    last = [name for name, info in layers.items() if info.spatial_stride == strides[-1]]
    trunk = network.model if isinstance(network, ExternalNetwork) else network
    if not isinstance(network, ExternalNetwork | TrunkNetwork):
        raise _no_stage(network, "its layers are not run one after the other")
    stages = {name.removesuffix(FAST) for name in last}
    # Through the parents, so that a stage that is a pool itself is found, too.
    taken = [_dilate(trunk, name) for name, _ in list(trunk.named_modules()) if _is_within(name, stages)]
    if not any(taken):
        raise _no_stage(network, "its last stage has no strided convolution or pool")
    return EndPoints(
        {
            name: info._replace(spatial_stride=info.spatial_stride // FACTOR) if name in last else info
            for name, info in layers.items()
        }
    )


class DilatedMaxPool3d(nn.Module):
    """A max-pool that keeps height and width, with dilated windows: (B,C,T,H,W) → (B,C,T',H,W)."""

    def __init__(self, pool: MaxPool3d, dilation: int) -> None:
        """In place of ``pool``, whose stride in space is left out."""
        super().__init__()
        self.pool, self.dilation = pool, dilation
        self.in_time = MaxPool3d((pool.kernel[0], 1, 1), (pool.stride[0], 1, 1), pool.padding)

    def forward(self, x: Tensor) -> Tensor:
        """The maximum of each window."""
        pads: list[int] = []
        for size, width, stride in zip(x.shape[3:], self.pool.kernel[1:], self.pool.stride[1:], strict=True):
            before = self.dilation * self.pool.padding_before(size, width, stride)
            pads = [before, self.dilation * (width - 1) - before, *pads]
        x = functional.pad(self.in_time(x), pads, value=float("-inf"))
        return functional.max_pool3d(x, (1, *self.pool.kernel[1:]), 1, 0, (1, self.dilation, self.dilation))


def _is_within(name: str, stages: set[str]) -> bool:
    return any(name == stage or name.startswith(f"{stage}.") for stage in stages)


def _dilate(trunk: nn.Module, name: str) -> bool:
    """Change one module of the last stage; whether it had the stride."""
    module = trunk.get_submodule(name)
    if isinstance(module, MaxPool3d):
        strided = max(module.stride[1:]) > 1
        parent, _, child = name.rpartition(".")
        pool = DilatedMaxPool3d(module, 1 if strided else FACTOR)
        trunk.get_submodule(parent).register_module(child, pool)
        return strided
    if isinstance(module, Conv3d):
        return _dilate_convolution(module, name)
    if isinstance(module, nn.MaxPool3d | nn.AvgPool3d | nn.Conv2d | nn.MaxPool2d):
        raise UserError(f"ROI.DILATION: True, but {name}, a {type(module).__name__}, cannot be dilated. Set it False.")
    return False


def _dilate_convolution(conv: Conv3d, name: str) -> bool:
    time, *stride = conv.stride
    if max(stride) > 1:
        if conv.pads_same:
            raise UserError(f"ROI.DILATION: True, but {name} pads by the size of its input. Set ROI.DILATION False.")
        conv.stride = (time, 1, 1)
        return True
    if max(conv.kernel_size[1:]) > 1:
        conv.dilation = (conv.dilation[0], *(FACTOR * rate for rate in conv.dilation[1:]))
        if not isinstance(conv.padding, str):
            conv.padding = (conv.padding[0], *(FACTOR * pad for pad in conv.padding[1:]))
    return False


def _no_stage(network: VideoNetwork, reason: str) -> UserError:
    return UserError(
        f"ROI.DILATION: True, but {type(network).__name__} has no last stage that halves the resolution: {reason}. Set "
        "it False."
    )
