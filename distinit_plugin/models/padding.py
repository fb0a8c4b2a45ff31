"""TensorFlow's SAME padding, and max-pools that pad without copying their input.

SAME keeps ⌈size / stride⌉ outputs and puts the odd one of the padding behind. How much there is depends on the size of
the input: a strided layer over an even size is padded unevenly. Source: https://www.tensorflow.org/api_docs/python/tf/nn
("Notes on padding").
"""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as functional
from torch import Tensor, nn

from distinit_plugin.models.folding import Triple

PoolPadding = Literal["same", "ceil", "symmetric"]


def same_padding(size: int, kernel: int, stride: int) -> tuple[int, int]:
    """What SAME adds before and behind one dimension."""
    outputs = -(-size // stride)
    total = max((outputs - 1) * stride + kernel - size, 0)
    return total // 2, total - total // 2


class MaxPool3d(nn.Module):
    """Max-pool whose padding never wins: (B,C,T,H,W) → (B,C,T',H',W').

    What SAME adds behind is what ``ceil_mode`` lets the last window reach over the edge, so nothing is copied. Kernels
    shrink to maps that are smaller than they are.
    """

    def __init__(self, kernel: Triple, stride: Triple, padding: PoolPadding) -> None:
        """Build.

        Args:
            kernel: (T, H, W).
            stride: (T, H, W), at most the kernel.
            padding: ``same``: TensorFlow's. ``ceil``: none, but the last window may reach over the edge, as in
                torchvision's GoogLeNet. ``symmetric``: half of an odd kernel on both sides, none of an even one, as in
                torchvision's S3D. With stride 1 all of them keep the size.
        """
        super().__init__()
        self.kernel, self.stride, self.padding = kernel, stride, padding

    def forward(self, x: Tensor) -> Tensor:
        """The maximum of each window."""
        kernel, padding = [], []
        for size, width, stride in zip(x.shape[2:], self.kernel, self.stride, strict=True):
            before = self.padding_before(size, width, stride)
            padding.append(before)
            kernel.append(min(width, size + 2 * before))
        return functional.max_pool3d(x, kernel, self.stride, padding, ceil_mode=self.padding != "symmetric")

    def padding_before(self, size: int, width: int, stride: int) -> int:
        """What is added before one dimension of ``size``, for a kernel and stride there."""
        if self.padding == "same":
            return same_padding(size, width, stride)[0]
        if self.padding == "ceil" and stride > 1:
            return 0
        return width // 2 if width % 2 else 0

    def extra_repr(self) -> str:
        """The geometry."""
        return f"{self.kernel}, stride={self.stride}, padding={self.padding}"
