"""How far each layer of a network sees: its receptive field, found by sending coordinates through the network.

Every value of the input is replaced by its own coordinate along one axis (time or height), and every operation by its
effect on what has been seen: a convolution or pool takes the extremes of its window, a sum or concatenation those of
its parts, an activation nothing. Each unit then holds the first and the last coordinate that can reach it, whatever the
weights are. A global average that is multiplied back in (gates, squeeze and excitation) sees everything: it is noted
apart, so that the field of the convolutions and pools stays visible.

For I3D this agrees with Fig. 3 of arXiv 1705.07750 up to MaxPool3d_4a (23 × 75²). Behind it the figure's 59 × 219² is
what four Mixed_4 modules and the pool give; the network has five, so that MaxPool3d_5a sees 67 × 251².
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

from distinit_plugin.engine.evaluate import evaluation_mode
from distinit_plugin.types import ViewSpec

SMALL_SIDE = 32
"""Pixels of the axes that are not looked at; windows act on each axis alone."""

FEW_FRAMES = 16
"""Frames at most while the height is looked at (networks for longer clips run on shorter ones, too)."""

LARGEST = {"time": 1024, "space": 4096}
"""Longest axis that is tried before a field counts as the whole clip."""

_NOWHERE = -math.inf
_AXES = {"time": 2, "space": 3}
_aten = torch.ops.aten


class Extent(NamedTuple):
    """What a central unit of a layer sees along one axis.

    Attributes:
        size: Input positions from the first to the last one that convolutions and pools let through; ``None``: the
            whole clip.
        stride: Distance between neighbouring units; ``None`` where there is one unit only.
        everything: A global average (a gate) lets it see the rest of the clip, too.
    """

    size: int | None
    stride: int | None
    everything: bool


class UntracedError(Exception):
    """The network has an operation whose reach is not known here (attention, for example)."""


class _Coordinates(TorchDispatchMode):
    """Runs a network on coordinates: (3,…) tensors of largest, minus smallest, and whether an average saw all."""

    def __init__(self, views: Sequence[Tensor]) -> None:
        super().__init__()
        self._tracked = WeakIdKeyDictionary()
        for view in views:
            self._tracked[view] = True

    def __torch_dispatch__(
        self, func: Any, types: Collection[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        flat = [item for arg in args for item in (arg if isinstance(arg, list | tuple) else [arg])]
        if not any(self._is_tracked(item) for item in flat):
            return func(*args, **(kwargs or {}))
        rule = _RULES.get(func.overloadpacket)
        if rule is None:
            with self:  # in terms of others, where it is not one of PyTorch's own primitives
                result = func.decompose(*args, **(kwargs or {}))
            if result is NotImplemented:
                raise UntracedError(f"{func.overloadpacket} is not known here")
            return result
        in_place = func.overloadpacket.__name__.endswith("_") and isinstance(args[0], Tensor)
        result = rule(self, func, args, dict(kwargs or {}))
        if in_place:
            result = _write(args[0], result)
        for item in result if isinstance(result, list | tuple) else [result]:
            if isinstance(item, Tensor):
                self._tracked[item] = True
        return result

    def _is_tracked(self, item: Any) -> bool:
        return isinstance(item, Tensor) and item in self._tracked

    def known(self, items: Sequence[Any]) -> list[Tensor]:
        """The coordinates among the operands; weights and constants see nothing."""
        return [item for item in items if self._is_tracked(item)]


def _is_one(x: Tensor) -> bool:
    """Whether all channels are the same memory, which most of them are: nothing is computed twice."""
    return x.ndim > 1 and x.stride(1) == 0


def _one(x: Tensor) -> Tensor:
    """(B,1,…): the extremes over all channels."""
    return x[:, :1] if _is_one(x) else x.amax(1, keepdim=True)


def _write(target: Tensor, result: Tensor) -> Tensor:
    if _is_one(target):
        target[:, :1].copy_(_one(result))
    else:
        target.copy_(result)
    return target


def _native(mode: _Coordinates, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    return func(*args, **kwargs)


def _keep(mode: _Coordinates, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Tensor:
    """Activations: the same coordinates, as a tensor of its own."""
    return args[0].view(args[0].shape)


def _normalise(mode: _Coordinates, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[Tensor, ...]:
    nothing = args[0].new_empty(0)
    return args[0].view(args[0].shape), nothing, nothing


def _merge(mode: _Coordinates, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Tensor:
    """Sums and products: the extremes of both operands; same-valued channels are not written out."""
    shape = torch.broadcast_shapes(*(item.shape for item in args[:2] if isinstance(item, Tensor)))
    parts = mode.known(args[:2])
    if all(part.ndim == len(shape) and _is_one(part) for part in parts):
        parts = [_one(part) for part in parts]
    seen = parts[0] if len(parts) == 1 else torch.maximum(parts[0], parts[1])
    return seen.expand(shape)


def _join(mode: _Coordinates, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Tensor:
    known = mode.known(args[0])
    dim = args[1] if len(args) > 1 else 0
    if func.overloadpacket is _aten.cat and dim == 1 and all(map(_is_one, known)):
        channels = sum(part.shape[1] for part in args[0])
        return (
            torch.cat([_one(part) for part in known], 1).amax(1, keepdim=True).expand(-1, channels, *known[0].shape[2:])
        )
    parts = [
        part if any(part is item for item in known) else known[0].new_full(part.shape, _NOWHERE) for part in args[0]
    ]
    return func(parts, *args[1:], **kwargs)


def _pad(mode: _Coordinates, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Tensor:
    return func(args[0], args[1], _NOWHERE)


def _window(x: Tensor, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], **more: Any) -> Tensor:
    """Extremes of windows over the last axes of (B,C,…)."""
    x = functional.pad(x, [side for size in reversed(padding) for side in (size, size)], value=_NOWHERE)
    pool = {1: functional.max_pool1d, 2: functional.max_pool2d, 3: functional.max_pool3d}[len(kernel)]
    pooled: Tensor = pool(x, list(kernel), list(stride), 0, **more)
    return pooled


def _pool(mode: _Coordinates, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """``max_pool``: its padding never wins."""
    x = args[0]
    seen, places = func(x[:, :1] if _is_one(x) else x, *args[1:], **kwargs)
    return seen.expand(-1, x.shape[1], *seen.shape[2:]), places


def _convolve(mode: _Coordinates, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Tensor:
    x, weight, _, stride, padding, dilation, transposed = args[:7]
    if transposed:
        raise UntracedError("a transposed convolution")
    seen = _window(_one(x), weight.shape[2:], stride, padding, dilation=list(dilation))
    return seen.expand(-1, weight.shape[0], *seen.shape[2:])


def _average(mode: _Coordinates, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Tensor:
    """``avg_pool``: input, kernel, stride, padding, ceil_mode."""
    kernel = args[1]
    stride = args[2] if len(args) > 2 and args[2] else kernel
    padding = args[3] if len(args) > 3 else [0] * len(kernel)
    seen = _window(_one(args[0]), kernel, stride, padding, ceil_mode=len(args) > 4 and args[4])
    return seen.expand(-1, args[0].shape[1], *seen.shape[2:])


def _reduce(mode: _Coordinates, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Tensor:
    """A mean or sum over whole axes."""
    x = args[0]
    dims = [dim % x.ndim for dim in args[1]] if len(args) > 1 and args[1] else list(range(1, x.ndim))
    return _over(x, dims, keepdim=len(args) > 2 and bool(args[2]))


def _pool_adaptively(mode: _Coordinates, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Tensor:
    x, size = args[:2]
    if any(length != 1 for length in size):  # the same windows
        pool = functional.adaptive_max_pool2d if len(size) == 2 else functional.adaptive_max_pool3d
        seen: Tensor = pool(_one(x), size)
        return seen.expand(-1, x.shape[1], *seen.shape[2:])
    return _over(x, list(range(x.ndim - len(size), x.ndim)), keepdim=True)


def _begin(mode: _Coordinates, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Tensor:
    """The first state of a recurrence: nothing has been seen."""
    seen = torch.full(list(args[1]), _NOWHERE)
    seen[2:] = 0.0
    return seen


def _over(x: Tensor, dims: list[int], *, keepdim: bool) -> Tensor:
    """Where the axis that is looked at goes, everything is seen; other axes have the same coordinates all along."""
    seen = x.amax(dims, keepdim=keepdim)
    if not bool((x.amax(dims) != x.amin(dims)).any()):
        return seen
    seen[:2] = _NOWHERE
    seen[2:] = 1.0
    return seen


def _mix(mode: _Coordinates, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Tensor:
    """Matrix products with weights: each output sees all features of its row."""
    left, right = args[-2:]
    if len(mode.known([left])) != 1 or mode.known([right]):
        raise UntracedError(f"{func.overloadpacket} of two activations")
    return left.amax(-1, keepdim=True).expand(*left.shape[:-1], right.shape[-1])


Rule = Callable[[_Coordinates, Any, Sequence[Any], dict[str, Any]], Any]


def _named(rule: Rule, names: str) -> dict[Any, Rule]:
    """The rule for each ``aten`` operation of a list that this PyTorch has."""
    return {getattr(_aten, name): rule for name in names.split() if hasattr(_aten, name)}


_RULES: dict[Any, Rule] = {
    **_named(_keep, "relu sigmoid tanh silu gelu elu hardswish hardsigmoid hardtanh leaky_relu neg exp clamp"),
    **_named(_keep, "relu_ sigmoid_ tanh_ silu_ elu_ hardswish_ hardsigmoid_ hardtanh_ leaky_relu_"),
    **_named(_normalise, "native_batch_norm _native_batch_norm_legit_no_training _batch_norm_no_update"),
    **_named(_merge, "add sub mul div maximum add_ sub_ mul_ div_"),
    **_named(_join, "cat stack"),
    **_named(_pad, "constant_pad_nd"),
    **_named(_convolve, "convolution"),
    **_named(_average, "avg_pool2d avg_pool3d"),
    **_named(_reduce, "mean sum"),
    **_named(_pool_adaptively, "_adaptive_avg_pool2d _adaptive_avg_pool3d"),
    **_named(_begin, "new_zeros"),
    **_named(_mix, "mm addmm bmm"),
    **_named(_pool, "max_pool2d_with_indices max_pool3d_with_indices"),
    # Moves of values.
    **_named(_native, "view _unsafe_view _reshape_alias reshape permute transpose t expand unsqueeze squeeze flatten"),
    **_named(
        _native, "select slice index_select index split split_with_sizes unbind clone _to_copy detach alias copy_"
    ),
}


def receptive_fields(network: nn.Module, specs: Mapping[str, ViewSpec], layers: Collection[str], axis: str) -> Any:
    """What a central unit of each layer sees of each view along one axis.

    Args:
        network: A ``Network``; weights are not read, it may be on the meta device.
        specs: Its views by name.
        layers: Layers that can be tapped.
        axis: ``time`` (positions of the view: frames, or stacks of flow frames) or ``space`` (pixels of the height).

    Returns:
        view → layer → ``Extent``, or ``None`` where the layer does not see the view.

    Raises:
        UntracedError: The network has an operation whose reach is not known, or cannot take other sizes of clips.
    """
    found = {}
    for view in specs:
        factor = 2
        while True:
            extents, clipped = _measure(network, specs, view, layers, axis, factor)
            if not clipped or 2 * _length(specs[view], axis, factor) > LARGEST[axis]:
                break
            factor *= 2
        found[view] = extents
    return found


def _length(spec: ViewSpec, axis: str, factor: int) -> int:
    return (spec.num_frames or 1) * factor if axis == "time" else SMALL_SIDE * factor


def _measure(
    network: nn.Module, specs: Mapping[str, ViewSpec], view: str, layers: Collection[str], axis: str, factor: int
) -> tuple[dict[str, Extent | None], bool]:
    """Extents with an axis of a given length, and whether the edge of the clip cut any of them off."""
    views = {name: _coordinates(spec, axis, factor, known=name == view) for name, spec in specs.items()}
    try:
        with evaluation_mode(network), _Coordinates(list(views.values())):
            taps = network(views, taps=layers).taps
    except (RuntimeError, ValueError, TypeError, IndexError, AssertionError) as error:
        raise UntracedError(f"clips of another size cannot be run ({str(error).splitlines()[0][:100]})") from error
    last = _length(specs[view], axis, factor) - 1
    extents: dict[str, Extent | None] = {}
    clipped = False
    for name in layers:
        extents[name], cut = _extent(taps[name], _AXES[axis], last)
        clipped = clipped or cut
    return extents, clipped


def _coordinates(spec: ViewSpec, axis: str, factor: int, *, known: bool) -> Tensor:
    """(3,C,T,H,W): coordinates along one axis; of a view that is not looked at, none."""
    frames = spec.num_frames or 1
    frames = frames * factor if axis == "time" else min(frames, FEW_FRAMES)
    sides = (SMALL_SIDE * (factor if axis == "space" else 1), SMALL_SIDE)
    shape = [3, spec.channels, frames, *sides]
    if not known:
        return torch.tensor([_NOWHERE, _NOWHERE, 0.0]).view(3, 1, 1, 1, 1).repeat(1, *shape[1:])
    line = torch.arange(shape[_AXES[axis]], dtype=torch.float32)
    rows = torch.stack([line, -line, torch.zeros_like(line)])
    return rows.view(3, *(len(line) if dim == _AXES[axis] else 1 for dim in range(1, 5))).repeat(
        1, *(1 if dim == _AXES[axis] else shape[dim] for dim in range(1, 5))
    )


def _extent(tap: Tensor, dim: int, last: int) -> tuple[Extent | None, bool]:
    """Of the unit in the middle, and whether an edge cuts it off."""
    units = tap.transpose(1, dim).flatten(2).amax(2)  # (3,units)
    middle = units.shape[1] // 2
    high, low, everything = units[0, middle], -units[1, middle], bool(units[2, middle] > 0)
    if math.isinf(high):
        return (Extent(None, None, True) if everything else None), False
    cut = bool(low <= 0 or high >= last)
    stride = int(units[0, middle] - units[0, middle - 1]) if middle else None
    return Extent(None if cut else int(high - low) + 1, stride or None, everything), cut
