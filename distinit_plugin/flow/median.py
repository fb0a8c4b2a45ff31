"""The 5×5 median of many planes at once, by minima and maxima of whole shifted planes: no sorting, no indexing."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

SIZE = 5
"""Side of the window, pixels."""

_SORT5 = ((0, 1), (3, 4), (2, 4), (2, 3), (1, 4), (0, 3), (0, 2), (1, 3), (1, 2))
"""Nine exchanges that sort five values."""

_CANDIDATES = ((2, 3), (4, 1), (3, 1), (0, 3), (1, 3), (2, 1), (3, 2), (2, 2), (1, 2), (4, 0), (3, 0), (0, 4), (1, 4))
"""(row, rank in the row) of the 13 values that can be the median of a 5×5 whose rows and columns are sorted: the others
have more than 12 that are not above, or not below them. Their order is the order in which ``_SELECTION`` takes them."""

_RANKS = tuple(sorted(rank for row, rank in _CANDIDATES if row == number) for number in range(5))

# fmt: off
_SELECTION = (
    (min, 1, 6), (min, 7, 13), (max, 7, 13), (max, 5, 3), (min, 2, 0), (min, 16, 17), (max, 16, 17), (min, 8, 14),
    (max, 8, 14), (max, 20, 18), (min, 4, 15), (min, 21, 9), (max, 21, 9), (min, 23, 19), (max, 23, 19), (min, 24, 22),
    (max, 24, 22), (max, 28, 26), (min, 27, 25), (min, 29, 10), (max, 29, 10), (max, 32, 30), (min, 31, 33),
    (max, 31, 33), (min, 34, 11), (max, 34, 11), (max, 37, 35), (min, 36, 38), (min, 39, 12), (max, 41, 40),
)
# fmt: on
"""Steps to the median of the candidates (0 … 12); every step adds a value, the last is the median. Of eight candidates
the least and the greatest are left out, the next is added, and so on; what the order of rows and columns already says
is not compared."""


def median5(planes: Tensor) -> Tensor:
    """The median of every pixel's 5×5 window; beyond the border the nearest pixel is repeated.

    The columns of all windows are sorted first (one sort serves five windows), then their rows, which leaves the
    columns sorted.

    Args:
        planes: (M,H,W), floating.

    Returns:
        (M,H,W), a new tensor.
    """
    height = planes.shape[-2]
    border = SIZE // 2
    padded = F.pad(planes[None], (border, border, border, border), mode="replicate")[0]
    rows = [padded[:, offset : offset + height] for offset in range(SIZE)]
    for low, high in _SORT5:
        rows[low], rows[high] = torch.minimum(rows[low], rows[high]), torch.maximum(rows[low], rows[high])
    sorted_rows = [_order_statistics(row, ranks) for row, ranks in zip(rows, _RANKS, strict=True)]
    values = [sorted_rows[row][rank] for row, rank in _CANDIDATES]
    for choose, left, right in _SELECTION:
        values.append((torch.minimum if choose is min else torch.maximum)(values[left], values[right]))
    return values[-1]


def _order_statistics(row: Tensor, ranks: list[int]) -> dict[int, Tensor]:
    """Values of some ranks (0: the smallest) of every five neighbours.

    Two pairs, (x, x+1) and (x+2, x+3), are merged, and the fifth value finds its place; a pair is compared once for
    both of its roles.

    Args:
        row: (M,H,W+4).
        ranks: Of 0 … 4.

    Returns:
        Rank → (M,H,W).
    """
    width = row.shape[-1] - SIZE + 1
    low, high = torch.minimum(row[..., :-1], row[..., 1:]), torch.maximum(row[..., :-1], row[..., 1:])
    last = row[..., 4:]
    lower, upper = torch.minimum(high[..., :width], high[..., 2:-1]), torch.maximum(low[..., :width], low[..., 2:-1])
    merged = {}
    if {0, 1} & set(ranks):
        merged[0] = torch.minimum(low[..., :width], low[..., 2:-1])
    if {1, 2} & set(ranks):
        merged[1] = torch.minimum(lower, upper)
    if {2, 3} & set(ranks):
        merged[2] = torch.maximum(lower, upper)
    if {3, 4} & set(ranks):
        merged[3] = torch.maximum(high[..., :width], high[..., 2:-1])
    found = {}
    for rank in ranks:
        value = last if rank == 0 else torch.maximum(merged[rank - 1], last)
        found[rank] = value if rank == 4 else torch.minimum(merged[rank], value)
    return found
