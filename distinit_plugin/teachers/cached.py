"""A teacher whose outputs are stored: it has no weights, sees no view, and gives what the cache holds."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from torch import Tensor, nn

from distinit_plugin.errors import UserError
from distinit_plugin.teachers.cache import TargetLayout
from distinit_plugin.teachers.frames import joined
from distinit_plugin.types import STORED, LayerInfo, ModelOutput, Split, ViewSpec


class CachedNetwork(nn.Module):
    """Stands in for the network whose outputs were stored; its one input is them."""

    def __init__(self, layout: TargetLayout) -> None:
        """Describe the network as the layout says."""
        super().__init__()
        self._layout = layout

    @property
    def layers(self) -> Mapping[str, LayerInfo]:
        """The one that was stored, where it is a map."""
        layout = self._layout
        if layout.layer in ("logits", "features"):
            return {}
        return {layout.layer: LayerInfo(layout.shape[0], layout.temporal_stride, layout.spatial_stride)}

    @property
    def feature_dim(self) -> int:
        """D of the network."""
        return self._layout.feature_dim

    @property
    def num_classes(self) -> int:
        """K where logits were stored, else 0."""
        return self._layout.shape[0] if self._layout.layer == "logits" else 0

    def view_specs(self, split: Split) -> Mapping[str, ViewSpec]:
        """None."""
        return {}

    def forward(
        self, views: Mapping[str, Tensor], *, boxes: Tensor | None = None, taps: Collection[str] = ()
    ) -> ModelOutput:
        """Run on what was stored, ``views["stored"]`` (B,P,…); of several frames as the network joins them."""
        stored = views[STORED].float()
        output = joined(stored) if self._layout.each_frame else stored.squeeze(1)
        layer = self._layout.layer
        return ModelOutput(
            logits=output if layer == "logits" else None,
            features=output if layer == "features" else None,
            taps={layer: output} if layer in taps else {},
        )

    def reset_classifier(self, num_classes: int) -> None:
        """What is stored stays.

        Raises:
            UserError: Always.
        """
        raise UserError("a teacher whose outputs are stored keeps its classifier.")

    def bare_state_dict(self) -> dict[str, Tensor]:
        """No weights."""
        return {}
