"""This package's own networks, and other libraries' video networks, as teachers."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from torch import Tensor, nn

from distinit_plugin.errors import UserError
from distinit_plugin.models.inception import EndPoints
from distinit_plugin.models.network import VideoNetwork
from distinit_plugin.teachers.image import FEATURE_MAP
from distinit_plugin.types import LayerInfo, ModelOutput, Split, ViewSpec


class NetworkTeacher(nn.Module):
    """A network that is fed frames, or flow, picked for a teacher; its last layer is also called ``feature_map``."""

    def __init__(self, network: VideoNetwork, view: ViewSpec) -> None:
        """Feed ``network`` with ``view``.

        Raises:
            UserError: The network sees more than one of them.
        """
        views = list(network.view_specs("test"))
        if len(views) != 1:
            raise UserError(
                f"{type(network).__name__} sees {' and '.join(views)}, but a teacher is shown one of them. Choose "
                "another ARCH."
            )
        super().__init__()
        self.inner = network
        self.view = view

    @property
    def averages_frames(self) -> bool:
        """See ``teachers.frames``."""
        return self.inner.averages_frames

    @property
    def layers(self) -> Mapping[str, LayerInfo]:
        """The network's layers, under all their names, and ``feature_map``."""
        layers = self.inner.layers
        return EndPoints({**layers, FEATURE_MAP: layers[self._last]}) if layers else {}

    @property
    def _last(self) -> str:
        return list(self.inner.layers)[-1]

    @property
    def feature_dim(self) -> int:
        """D, the size of the pooled features."""
        return self.inner.feature_dim

    @property
    def num_classes(self) -> int:
        """K, the outputs of the classifier; 0 without one."""
        return self.inner.num_classes

    def view_specs(self, split: Split) -> Mapping[str, ViewSpec]:
        """One view, named by its modality, the same in every split."""
        return {self.view.modality: self.view}

    def forward(
        self, views: Mapping[str, Tensor], *, boxes: Tensor | None = None, taps: Collection[str] = ()
    ) -> ModelOutput:
        """Run on the view, normalised (B,C,T,H,W)."""
        if FEATURE_MAP not in taps:
            return self.inner(views, boxes=boxes, taps=taps)
        wanted = {name for name in taps if name != FEATURE_MAP}
        output: ModelOutput = self.inner(views, boxes=boxes, taps=wanted | {self._last})
        kept = {name: output.taps[name] for name in wanted}
        return output._replace(taps=kept | {FEATURE_MAP: output.taps[self._last]})

    def reset_classifier(self, num_classes: int) -> None:
        """Pass on to the network."""
        self.inner.reset_classifier(num_classes)

    def bare_state_dict(self) -> dict[str, Tensor]:
        """The network's weights under its own keys."""
        return self.inner.bare_state_dict()
