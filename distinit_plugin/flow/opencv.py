"""OpenCV's optical flow: DualTVL1, the choice of the two-stream papers, and the much faster DIS. On the CPU.

DualTVL1: http://www.ipol.im/pub/art/2013/26/. DIS: T. Kroeger et al., "Fast Optical Flow using Dense Inverse Search",
ECCV 2016. How many threads OpenCV uses is the process's own setting (``cv2.setNumThreads``).
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distinit_plugin.errors import UserError
from distinit_plugin.flow.backends import FlowBackend, register_backend, rgb_to_gray


def import_cv2(name: str) -> Any:
    """OpenCV with its contributed modules.

    Args:
        name: The back end that needs it, for the error.

    Raises:
        UserError: It is not installed, or without the contributed modules.
    """
    advice = "pip install 'distinit-plugin[flow]', or use the back end tvl1, which needs no other package."
    try:
        import cv2
    except ImportError as error:
        raise UserError(f"{name}: OpenCV is not installed or cannot be loaded ({error}): {advice}") from error
    if not hasattr(cv2, "optflow"):
        raise UserError(
            f"{name}: the OpenCV that is installed ({cv2.__version__}) lacks the contributed modules: uninstall it, "
            f"then {advice}"
        )
    return cv2


class OpenCVFlow(FlowBackend):
    """Grey frames, one pair after the other."""

    parameters: str
    """In words, for the identity."""

    def __init__(self) -> None:
        """Look for OpenCV.

        Raises:
            UserError: It is not installed.
        """
        self._cv2 = import_cv2(self.name)

    @property
    def identity(self) -> str:
        """See ``FlowBackend``."""
        return f"{self.name}({self.parameters}) opencv {self._cv2.__version__}"

    @abstractmethod
    def _algorithm(self) -> Any:
        """A new object with ``calc``: some keep what an earlier pair left (a start, a number of scales)."""

    def _compute(self, first: Tensor, second: Tensor) -> Tensor:
        found = np.empty((len(first), *first.shape[-2:], 2), np.float32)
        pairs = zip(rgb_to_gray(first).cpu().numpy(), rgb_to_gray(second).cpu().numpy(), strict=True)
        for number, (before, after) in enumerate(pairs):
            try:
                found[number] = self._algorithm().calc(before, after, None)
            except self._cv2.error as error:
                raise UserError(
                    f"{self.name}: OpenCV refuses frames of {before.shape[0]}×{before.shape[1]} pixels "
                    f"({error.err}). Resize them, or choose another back end."
                ) from error
        return torch.from_numpy(found).permute(0, 3, 1, 2).contiguous().to(first.device)


@register_backend
class DualTVL1(OpenCVFlow):
    """``DualTVL1OpticalFlow`` with OpenCV's defaults."""

    name = "dual_tvl1"
    min_side = 3
    parameters = (
        "tau=0.25, lambda=0.15, theta=0.3, nscales=5, warps=5, epsilon=0.01, innerIterations=30, outerIterations=10, "
        "scaleStep=0.8, gamma=0, medianFiltering=5"
    )

    def _algorithm(self) -> Any:
        # Written out: the flow must be what the identity says, whatever a later OpenCV takes as default.
        return self._cv2.optflow.DualTVL1OpticalFlow_create(
            tau=0.25,
            lambda_=0.15,
            theta=0.3,
            nscales=5,
            warps=5,
            epsilon=0.01,
            innnerIterations=30,
            outerIterations=10,
            scaleStep=0.8,
            gamma=0.0,
            medianFiltering=5,
            useInitialFlow=False,
        )


class DIS(OpenCVFlow):
    """``DISOpticalFlow`` with one of its presets."""

    min_side = 16
    preset: str

    def _algorithm(self) -> Any:
        return self._cv2.DISOpticalFlow_create(getattr(self._cv2, f"DISOPTICAL_FLOW_PRESET_{self.preset}"))


@register_backend
class DISMedium(DIS):
    """Some 50 times as fast as DualTVL1 (``benchmarks/README.md``)."""

    name = "dis_medium"
    preset = "MEDIUM"
    parameters = "preset MEDIUM"


@register_backend
class DISFast(DIS):
    """Some 200 times as fast as DualTVL1 (``benchmarks/README.md``)."""

    name = "dis_fast"
    preset = "FAST"
    parameters = "preset FAST"
