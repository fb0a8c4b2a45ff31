"""Ways of computing optical flow, by name: OpenCV's on the CPU.

A back end maps uint8 RGB pictures, twice (N,3,H,W), to float32 flow (N,2,H,W) in pixels, forward, u before v.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distinit_plugin.errors import UserError
from distinit_plugin.registry import FLOW_BACKENDS, lookup

_NEEDS_OPENCV = "OpenCV is not installed, or without its optflow module: pip install opencv-contrib-python-headless."


def build_flow_backend(name: str, where: str = "flow back end") -> Any:
    """A back end by name.

    Raises:
        UserError: There is none of this name, or it is not installed.
    """
    return lookup(FLOW_BACKENDS, name, where)()


class OpenCvFlow:
    """Pairs one after the other through an OpenCV algorithm, in one thread.

    Attributes:
        identity: Name, parameters and version.
    """

    def __init__(self, name: str, make: Callable[[Any], Any]) -> None:
        """Make the algorithm.

        Args:
            name: For the identity.
            make: The module → the algorithm.

        Raises:
            UserError: OpenCV or the algorithm is not installed.
        """
        try:
            import cv2

            self._cv2 = cv2
            self._algorithm = make(cv2)
        except (ImportError, AttributeError) as error:
            raise UserError(f"--backend {name}: {_NEEDS_OPENCV}") from error
        self.identity = f"{name} (OpenCV {cv2.__version__})"

    def __call__(self, first: Tensor, second: Tensor) -> Tensor:
        """See the module."""
        self._cv2.setNumThreads(1)
        flows = [
            self._algorithm.calc(self._gray(one), self._gray(two), None) for one, two in zip(first, second, strict=True)
        ]
        return torch.from_numpy(np.stack(flows)).permute(0, 3, 1, 2)

    def _gray(self, picture: Tensor) -> Any:
        rgb = np.ascontiguousarray(picture.permute(1, 2, 0).cpu().numpy())
        return self._cv2.cvtColor(rgb, self._cv2.COLOR_RGB2GRAY)


@FLOW_BACKENDS.register()
def dual_tvl1() -> OpenCvFlow:
    """TV-L1 of OpenCV's contrib modules with its defaults."""
    return OpenCvFlow("dual_tvl1", lambda cv2: cv2.optflow.DualTVL1OpticalFlow_create())


@FLOW_BACKENDS.register()
def dis_medium() -> OpenCvFlow:
    """DIS, medium preset."""
    return OpenCvFlow("dis_medium", lambda cv2: cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM))


@FLOW_BACKENDS.register()
def dis_fast() -> OpenCvFlow:
    """DIS, fast preset."""
    return OpenCvFlow("dis_fast", lambda cv2: cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_FAST))
