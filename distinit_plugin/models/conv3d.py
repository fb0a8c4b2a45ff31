"""3D convolutions that can run in several formulations, chosen per layer.

``conv3d`` is PyTorch's own kernel; ``conv2d`` the same sum written with 2D convolutions (:mod:`.folding`); ``fp32``
PyTorch's kernel with mixed precision switched off. :mod:`.conv` finds which of them is right and fast.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from distinit_plugin.errors import UserError
from distinit_plugin.models.folding import ConvGeometry, Triple, conv3d_as_conv2d, repeat_edge_frames
from distinit_plugin.models.padding import same_padding

Formulation = Literal["conv3d", "conv2d", "fp32"]
TemporalPadding = Literal["zeros", "replicate"]


def _conv3d(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: ConvGeometry) -> Tensor:
    return functional.conv3d(x, weight, bias, *geometry)


def _fp32(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: ConvGeometry) -> Tensor:
    """Compute in fp32 and hand back the type that the surrounding autocast region uses."""
    device_type = x.device.type
    mixed = torch.is_autocast_enabled(device_type)
    out_dtype = torch.get_autocast_dtype(device_type) if mixed else x.dtype
    with torch.autocast(device_type, enabled=False):
        bias = None if bias is None else bias.float()
        return functional.conv3d(x.float(), weight.float(), bias, *geometry).to(out_dtype)


FORMULATIONS: dict[Formulation, Callable[[Tensor, Tensor, Tensor | None, ConvGeometry], Tensor]] = {
    "conv3d": _conv3d,
    "conv2d": conv3d_as_conv2d,
    "fp32": _fp32,
}
"""The ways to compute one convolution: (x, weight, bias, geometry) → result, equal up to rounding."""


class Conv3d(nn.Conv3d):
    """``nn.Conv3d`` (5-D weights, same keys) with a choice of how it is computed and of how time is padded.

    Attributes:
        formulation: A key of :data:`FORMULATIONS`; never changes the value beyond rounding.
        temporal_padding: ``zeros``, or ``replicate``: the first and last frame are repeated.
        pads_same: Whether ``padding`` is TensorFlow's SAME, which depends on the size of the input.
    """

    formulation: Formulation
    temporal_padding: TemporalPadding
    pads_same: bool

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Triple,
        stride: int | Triple = 1,
        padding: str | int | Triple = 0,
        dilation: int | Triple = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: Literal["zeros", "reflect", "replicate", "circular"] = "zeros",
        *,
        temporal_padding: TemporalPadding = "zeros",
        pads_same: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """As ``nn.Conv3d``; ``temporal_padding`` acts on the temporal part of ``padding`` only.

        ``pads_same`` is SAME for any stride, without dilation and instead of ``padding``, which then stays 0.

        Raises:
            UserError: ``temporal_padding`` is not one of those above.
        """
        if temporal_padding not in get_args(TemporalPadding):
            raise UserError(
                f"NETWORK.TEMPORAL_PADDING is '{temporal_padding}'. Allowed: {', '.join(get_args(TemporalPadding))}."
            )
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype
        )
        self.formulation = "conv3d"
        self.temporal_padding = temporal_padding
        assert not pads_same or (self.padding == (0, 0, 0) and self.dilation == (1, 1, 1))
        self.pads_same = pads_same

    @property
    def is_factored(self) -> bool:
        """Whether the kernel acts in time alone, in space alone, or in neither."""
        return self.kernel_size[0] == 1 or self.kernel_size[1:] == (1, 1)

    def forward(self, input: Tensor) -> Tensor:
        """(B,C,T,H,W) → (B,O,T',H',W')."""
        if self.padding_mode != "zeros" or isinstance(self.padding, str):
            mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
            input = functional.pad(input, self._reversed_padding_repeated_twice, mode=mode)
            padding: Triple = (0, 0, 0)
        elif self.pads_same:
            input, padding = self._pad_same(input)
        else:
            padding = _triple(self.padding)
            if self.temporal_padding == "replicate":
                input, padding = repeat_edge_frames(input, padding[0], padding[0]), (0, *padding[1:])
        geometry = ConvGeometry(_triple(self.stride), padding, _triple(self.dilation), self.groups)
        return FORMULATIONS[self.formulation](input, self.weight, self.bias, geometry)

    def _pad_same(self, x: Tensor) -> tuple[Tensor, Triple]:
        """Add what SAME puts unevenly (and repeated frames); what is even on both sides is left to the convolution."""
        sizes = zip(x.shape[2:], self.kernel_size, self.stride, strict=True)
        time, height, width = (same_padding(*size) for size in sizes)
        if self.temporal_padding == "replicate":
            x, time = repeat_edge_frames(x, *time), (0, 0)
        pads = (time, height, width)
        uneven = [amount for pad in reversed(pads) for amount in (pad if pad[0] != pad[1] else (0, 0))]
        if any(uneven):
            x = functional.pad(x, uneven)
        return x, _triple(tuple(before if before == behind else 0 for before, behind in pads))

    def extra_repr(self) -> str:
        """Name the formulation where it is not PyTorch's own."""
        extra = "" if self.formulation == "conv3d" else f", formulation={self.formulation}"
        time = "" if self.temporal_padding == "zeros" else f", temporal_padding={self.temporal_padding}"
        return super().extra_repr() + extra + time + (", pads_same" if self.pads_same else "")


def _triple(value: tuple[int, ...]) -> Triple:
    time, height, width = value
    return time, height, width


def adopt_convolutions(module: nn.Module) -> int:
    """Replace every plain ``nn.Conv3d`` below ``module`` by a :class:`Conv3d` that shares its parameters.

    Keys, values and optimizer references stay as they are. Left alone: convolutions with hooks or parametrisations,
    and subclasses with a forward of their own.

    Returns:
        The number of convolutions replaced.
    """
    adopted: dict[int, Conv3d] = {}
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Conv3d) and _is_plain(child):
                parent.register_module(name, adopted.setdefault(id(child), _adopt(child)))
    return len(adopted)


def _is_plain(conv: nn.Conv3d) -> bool:
    kind = type(conv)
    own_code = kind.forward is not nn.Conv3d.forward or kind._conv_forward is not nn.Conv3d._conv_forward
    hooked = any((conv._forward_hooks, conv._forward_pre_hooks, conv._backward_hooks, conv._backward_pre_hooks))
    return not own_code and not hooked and "weight" in conv._parameters


def _adopt(conv: nn.Conv3d) -> Conv3d:
    new = Conv3d(
        conv.in_channels,
        conv.out_channels,
        _triple(conv.kernel_size),
        _triple(conv.stride),
        conv.padding if isinstance(conv.padding, str) else _triple(conv.padding),
        _triple(conv.dilation),
        conv.groups,
        conv.bias is not None,
        conv.padding_mode,
        device="meta",
    )
    new.weight, new.bias = conv.weight, conv.bias
    return new.train(conv.training)
