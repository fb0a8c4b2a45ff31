"""What a layout of a public file is, and what its translations share."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from distinit_plugin.errors import WeightsError

VMZ_MEAN, VMZ_STD = (0.43216, 0.394666, 0.37645), (0.22803, 0.22145, 0.216989)
MINUS_ONE_TO_ONE = (0.5, 0.5, 0.5)
"""Mean and standard deviation that bring [0, 1] to [-1, 1]."""


class Translation(NamedTuple):
    """A file's tensors under the names of a network.

    Attributes:
        tensors: Network's key → tensor; what has no place in the network keeps its name of the file.
        skipped: Names of the file that are no weights (slots of the optimizer).
        filled: Keys of the network that the layout leaves out because they are always the same (BN scales of 1).
        notes: Remarks for the report.
    """

    tensors: dict[str, Tensor]
    skipped: tuple[str, ...] = ()
    filled: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


Translate = Callable[[Mapping[str, Tensor], Mapping[str, Tensor]], Translation | None]
"""(file's tensors, network's tensors) → translation; ``None``: the layout is not one of that network."""


@dataclass(frozen=True)
class Layout:
    """How a public code base names its weights.

    Attributes:
        name: For ``--from`` and messages.
        origin: Whose files have it.
        networks: The networks that it can be translated for.
        marks: Patterns; a file has the layout when each is found in one of its keys. No two layouts share a file.
        translate: See :data:`Translate`.
        switches: Switches of the network that the shapes do not tell.
        mean: Per-channel mean of the input that its networks were trained with, in units of [0, 1].
        std: Per-channel standard deviation.
    """

    name: str
    origin: str
    networks: str
    marks: tuple[str, ...]
    translate: Translate
    switches: Mapping[str, object] = field(default_factory=dict)
    mean: tuple[float, ...] = VMZ_MEAN
    std: tuple[float, ...] = VMZ_STD

    def recognises(self, keys: Mapping[str, object]) -> bool:
        """Whether a file with these keys has this layout."""
        return all(any(re.search(mark, key) for key in keys) for mark in self.marks)


def rename_all(
    tensors: Mapping[str, Tensor],
    target: Mapping[str, Tensor],
    rename: Callable[[str], str | None],
    *,
    skip: re.Pattern[str] | None = None,
    change: Callable[[Tensor, str], Tensor] | None = None,
) -> Translation:
    """Give every tensor its key of the network.

    Args:
        tensors: The file's.
        target: The network's, for their shapes: axes of size 1 are added or dropped where that makes them equal.
        rename: File's key → network's key, or ``None``.
        skip: Names that are no weights.
        change: Applied to the tensors that have a place, with their key of the network (order of axes).

    Raises:
        WeightsError: Two tensors for one place.
    """
    renamed: dict[str, Tensor] = {}
    origin: dict[str, str] = {}
    skipped = []
    for key, value in tensors.items():
        if skip is not None and skip.search(key):
            skipped.append(key)
            continue
        ours = rename(key)
        if ours is not None and change is not None:
            value = change(value, ours)
        name = key if ours is None else ours
        if name in origin:
            raise WeightsError(
                f"{origin[name]} and {key} are both for {name}: the file holds two networks; nothing was loaded. Split "
                "it."
            )
        origin[name] = key
        renamed[name] = value if name not in target else _fit_axes(value, target[name])
    return Translation(renamed, tuple(skipped))


def fill_scales(translation: Translation, target: Mapping[str, Tensor]) -> Translation:
    """BN scales of 1 where the network has them and the file, trained without, does not."""
    tensors = dict(translation.tensors)
    filled = []
    for key, wanted in target.items():
        module, _, leaf = key.rpartition(".")
        if leaf == "weight" and key not in tensors and f"{module}.running_mean" in tensors:
            tensors[key] = torch.ones(wanted.shape)
            filled.append(key)
    if not filled:
        return translation
    note = f"{len(filled)} BN scales are 1: the file's network was trained without"
    return translation._replace(tensors=tensors, filled=tuple(filled), notes=(*translation.notes, note))


def _fit_axes(value: Tensor, wanted: Tensor) -> Tensor:
    """As many axes as the network has: a 1×1×1 convolution as a matrix, statistics (1,1,1,1,C) as a vector."""
    if value.shape == wanted.shape:
        return value
    shape = list(value.shape)
    while len(shape) > wanted.ndim and shape[-1] == 1:
        shape.pop()
    while len(shape) > wanted.ndim and shape[0] == 1:
        shape.pop(0)
    if all(size == 1 for size in wanted.shape[len(shape) :]):
        shape += [1] * (wanted.ndim - len(shape))
    return value.reshape(shape)
