"""Small tables of numbers on a device, without waiting for it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def constant(values: Sequence[float], device: torch.device | str, dtype: torch.dtype = torch.float32) -> Tensor:
    """The values on a device; ``torch.tensor(values, device=device)`` would wait for all that a GPU has been given.

    CUDA takes a copy of ordinary memory before it returns, so that the source may go at once
    (https://docs.nvidia.com/cuda/cuda-runtime-api/api-sync-behavior.html).

    Args:
        values: (n,).
        device: Where to.
        dtype: Of the result; ``torch.int64`` for places to select.

    Returns:
        (n,).
    """
    return torch.tensor(values, dtype=dtype, device="cpu").to(device, non_blocking=True)
