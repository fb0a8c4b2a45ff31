"""The last layer of a network as a network of its own, which sees features instead of clips.

With a frozen trunk (the *Fixed* protocol of Quo Vadis, arXiv 1705.07750 §5) nothing else moves: features are extracted
once, and the one training loop and the one test loop run on them.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

from distinit_plugin.data.features import FEATURES
from distinit_plugin.engine.evaluate import evaluation_mode
from distinit_plugin.errors import UserError
from distinit_plugin.types import LayerInfo, ModelOutput, Network, Split, ViewSpec


class FeatureClassifier(nn.Module):
    """Dropout and a linear layer; the ``Network`` contract with the one view ``features`` (B,D)."""

    layers: Mapping[str, LayerInfo]

    def __init__(self, network: Network, dropout: float, views: Mapping[str, Tensor]) -> None:
        """Start from the classifier of a network.

        Args:
            network: All of it frozen, but for its classifier.
            dropout: Dropped fraction before the classifier.
            views: Some normalised views, with which is checked that its logits follow from its features.

        Raises:
            UserError: They do not: its logits are no linear layer of its pooled features.
        """
        super().__init__()
        assert isinstance(network, nn.Module)
        self.layers = {}
        self.dropout_rate = dropout
        self._owner = [parameter for parameter in network.parameters() if parameter.requires_grad]
        with evaluation_mode(network):
            output: ModelOutput = network(views)
        fits = output.features is not None and output.logits is not None and len(self._owner) == 2
        if fits:
            weight, bias = self._owner
            self.fc = nn.Linear(network.feature_dim, network.num_classes).to(weight)
            fits = weight.numel() == self.fc.weight.numel() and bias.shape == self.fc.bias.shape
        if fits:
            with torch.no_grad():
                self.fc.weight.copy_(weight.reshape(self.fc.weight.shape))
                self.fc.bias.copy_(bias)
                assert output.features is not None
                assert output.logits is not None
                fits = torch.allclose(self.fc(output.features), output.logits, rtol=1e-3, atol=1e-5)
        if not fits:
            raise UserError(
                f"the logits of {type(network).__name__} are no linear layer of its pooled features, so features "
                "cannot be extracted once. Use distinit run with INIT.TRAINABLE classifier."
            )

    @property
    def feature_dim(self) -> int:
        """D."""
        return self.fc.in_features

    @property
    def num_classes(self) -> int:
        """K."""
        return self.fc.out_features

    def view_specs(self, split: Split) -> Mapping[str, ViewSpec]:
        """None: features are no view of a video."""
        return {}

    def forward(
        self, views: Mapping[str, Tensor], *, boxes: Tensor | None = None, taps: Collection[str] = ()
    ) -> ModelOutput:
        """Logits (B,K) of features (B,D)."""
        features = views[FEATURES]
        return ModelOutput(self.fc(functional.dropout(features, self.dropout_rate, self.training)), features, {})

    def reset_classifier(self, num_classes: int) -> None:
        """Not offered: the layer is that of another network."""
        raise NotImplementedError

    def bare_state_dict(self) -> dict[str, Tensor]:
        """The layer's weights."""
        return dict(self.state_dict())

    def write_back(self) -> None:
        """Put the weights into the classifier that this one started from."""
        with torch.no_grad():
            for own, target in zip((self.fc.weight, self.fc.bias), self._owner, strict=True):
                target.copy_(own.reshape(target.shape))
