"""Optical flow as a teacher: it returns its view, in pixels."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Self

from torch import Tensor, nn

from distinit_plugin.flow.motion import codes_to_flow
from distinit_plugin.models.network import InputSpec
from distinit_plugin.types import LayerInfo, ModelOutput, Split, ViewSpec

FLOW = "flow"
"""The ARCH of this teacher, its view, and its one layer."""

MEAN, STD = (0.5, 0.5), (0.5, 0.5)
"""Codes come to [-1, 1], as networks of flow see them: one tensor serves both."""


class FlowView(nn.Module):
    """The flow of the student's own clip; the ``Network`` contract with the one layer ``flow`` (B,2,T,H,W), pixels.

    The crop is the student's, so that pixels are those of the picture that the student sees. There is nothing to train
    and nothing to load, and it is in eval mode for good.
    """

    def __init__(self, clip: InputSpec) -> None:
        """Show the flow of ``clip``, what the student is fed."""
        super().__init__()
        self._clip = replace(clip, modality="flow", mean=MEAN, std=STD)
        self.train(False)

    @property
    def layers(self) -> Mapping[str, LayerInfo]:
        """The flow: one vector for each frame and pixel."""
        return {FLOW: LayerInfo(2, 1, 1)}

    @property
    def feature_dim(self) -> int:
        """None."""
        return 0

    @property
    def num_classes(self) -> int:
        """None."""
        return 0

    def view_specs(self, split: Split) -> Mapping[str, ViewSpec]:
        """The flow of all frames of the student's clip."""
        return self._clip.view_specs(split)

    def forward(
        self, views: Mapping[str, Tensor], *, boxes: Tensor | None = None, taps: Collection[str] = ()
    ) -> ModelOutput:
        """Pixels of ``views["flow"]``, fp32."""
        flow = codes_to_flow(views[FLOW], MEAN, STD, self._clip.flow_bound)
        return ModelOutput(None, None, {FLOW: flow} if FLOW in taps else {})

    def train(self, mode: bool = True) -> Self:
        """Stay in eval mode, whatever ``mode`` says."""
        return super().train(False)

    def reset_classifier(self, num_classes: int) -> None:
        """Flow has no classifier.

        Raises:
            TypeError: Always.
        """
        raise TypeError("flow has no classifier")

    def bare_state_dict(self) -> dict[str, Tensor]:
        """Nothing."""
        return {}
