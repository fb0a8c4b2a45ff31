"""Random changes of colour, the same for all frames of a clip, as PySlowFast makes them for AVA."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

_LUMA = (0.299, 0.587, 0.114)
"""Weights of red, green and blue in grey (ITU-R BT.601)."""


@dataclass(frozen=True)
class ColourAugmentation:
    """How much colours change (``slowfast/datasets/cv2_transform.py``: ``color_jitter_list``, ``lighting_list``).

    Attributes:
        jitter: Brightness, contrast and saturation each change by a factor of 1 ± this, in random order; 0: not at all.
        lighting: Standard deviation of the weights of the principal components that are added; 0: none.
        eigenvalues: (3,) of the components.
        eigenvectors: (3,3) one row for each of red, green and blue, one column for each component.
    """

    jitter: float = 0.4
    lighting: float = 0.1
    eigenvalues: Sequence[float] = (0.225, 0.224, 0.229)
    eigenvectors: Sequence[Sequence[float]] = (
        (-0.5675, 0.7192, 0.4009),
        (-0.5808, -0.0045, -0.8140),
        (-0.5836, -0.6948, 0.4203),
    )

    def draw(self, rng: np.random.Generator) -> Callable[[Tensor], Tensor]:
        """One random change, for all views of a sample: uint8 (3,T,H,W) RGB → the same, rounded and cut to bytes.

        Args:
            rng: The same number of draws is taken, always.
        """
        factors = [float(factor) for factor in 1.0 + rng.uniform(-self.jitter, self.jitter, 3)]
        order = rng.permutation(3).tolist() if self.jitter else []
        weights = rng.normal(0.0, 1.0, 3) * self.lighting
        light = torch.from_numpy(np.asarray(self.eigenvectors) @ (weights * np.asarray(self.eigenvalues))).float()
        steps = (_brightness, _contrast, _saturation)

        def change(view: Tensor) -> Tensor:
            pixels = view.float().div_(255.0)
            for step in order:
                pixels = steps[step](pixels, factors[step])
            pixels += light.view(3, 1, 1, 1)
            return pixels.mul_(255.0).round_().clamp_(0, 255).to(torch.uint8)

        return change


def _brightness(pixels: Tensor, factor: float) -> Tensor:
    return pixels.mul_(factor)


def _contrast(pixels: Tensor, factor: float) -> Tensor:
    """Each frame towards its mean grey."""
    mean = _grey(pixels).mean(dim=(-2, -1), keepdim=True)
    return pixels.mul_(factor).add_(mean * (1 - factor))


def _saturation(pixels: Tensor, factor: float) -> Tensor:
    """Each pixel towards its grey."""
    grey = _grey(pixels)
    return pixels.mul_(factor).add_(grey * (1 - factor))


def _grey(pixels: Tensor) -> Tensor:
    """(3,T,H,W) → (1,T,H,W)."""
    return (pixels * torch.tensor(_LUMA).view(3, 1, 1, 1)).sum(dim=0, keepdim=True)
