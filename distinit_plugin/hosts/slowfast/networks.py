"""This package's networks as PySlowFast calls them: a list of pathways in, logits or probabilities out."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping
from functools import cache
from typing import Any, cast

from torch import Tensor, nn

from distinit_plugin import build
from distinit_plugin.config.node import CfgNode
from distinit_plugin.config.theirs import is_borrowed
from distinit_plugin.detection.network import RoiNetwork
from distinit_plugin.hosts.slowfast.roi import freeze_unreached, use_bare_keys
from distinit_plugin.models.network import VideoNetwork
from distinit_plugin.registry import MODELS
from distinit_plugin.types import ModelOutput

logger = logging.getLogger(__name__)

ARCH = "distinit"
"""MODEL.ARCH of this package's networks there: one pathway, whose frames are not thinned out."""

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda logits: logits,
    "softmax": lambda logits: logits.softmax(dim=1),
    "sigmoid": lambda logits: logits.sigmoid(),
}
"""MODEL.HEAD_ACT → what becomes of logits in evaluation."""


class Hosted:
    """In front of one of this package's networks: the call is PySlowFast's, names and weights stay the network's.

    Attributes:
        taps: Layers that ``on_output`` wants to see.
        on_output: Is given what the network returned, each time.
        activation: MODEL.HEAD_ACT, of evaluation.
    """

    taps: Collection[str] = ()
    on_output: Callable[[ModelOutput], None] | None = None
    activation: str = "softmax"

    def forward(self, inputs: Any, bboxes: Tensor | None = None, **own: Any) -> Any:
        """Views (B,C,T,H,W), in the order of ``view_specs`` → (B,K): logits in training, probabilities in evaluation.

        Of boxes (R,5) (``types.BOXES``) → (R,K): always probabilities, as of PySlowFast's RoI heads. A network without
        a classifier gives its features. Views by name are answered as by the network itself.
        """
        network: Any = self
        if isinstance(inputs, Mapping):
            return super().forward(inputs, **own)  # type: ignore[misc]
        views = dict(zip(network.view_specs("train"), inputs, strict=True))
        output: ModelOutput = super().forward(views, boxes=bboxes, taps=self.taps)  # type: ignore[misc]
        if self.on_output is not None:
            self.on_output(output)
        if output.logits is None:
            return output.features
        if network.training and not isinstance(network, RoiNetwork):
            return output.logits
        return ACTIVATIONS[self.activation](output.logits.float())


@cache
def hosted_class(network: type[nn.Module]) -> type[nn.Module]:
    """``network`` with ``Hosted`` in front, under its own name."""
    return type(network.__name__, (Hosted, network), {"__module__": network.__module__, "__doc__": network.__doc__})


def is_own(name: str) -> bool:
    """Whether MODEL.MODEL_NAME is a network of this package (or of a library that it reads), not of PySlowFast."""
    return ("/" in name and not is_borrowed(name)) or name in MODELS


def build_hosted(cfg: CfgNode, *, has_terms: bool, initialize: bool, activation: str) -> nn.Module:
    """A network of this package for PySlowFast.

    Args:
        cfg: This package's view of the configuration.
        has_terms: The loss is this package's, which decides whether there is a classifier.
        initialize: Put in what INIT names (PySlowFast itself loads TRAIN.CHECKPOINT_FILE_PATH).
        activation: MODEL.HEAD_ACT.

    Raises:
        UserError: The network does not exist, or INIT's weights are not to be had.
    """
    network = cast(VideoNetwork, build.build_network(cfg, None if has_terms else cfg.MODEL.NUM_CLASSES))
    if initialize:
        without_file = cfg.clone()
        without_file.TRAIN.CHECKPOINT_FILE_PATH = ""
        for report in build.initialize_network(without_file, network):
            logger.info("%s", report)
    network.__class__ = hosted_class(cast(Any, type(network)))  # type: ignore[assignment]
    hosted: Any = network
    hosted.activation = activation
    if isinstance(network, RoiNetwork):
        hosted.activation = "sigmoid"
        use_bare_keys(network)
        if initialize and not has_terms:
            freeze_unreached(network)
    return network


def pathways(cfg: Mapping[str, Any], view_names: Collection[str]) -> int:
    """Tensors that a network of PySlowFast's configuration is given."""
    model = cfg["MODEL"]
    if is_own(model["MODEL_NAME"]):
        return len(view_names)
    return 2 if model["ARCH"] in model["MULTI_PATHWAY_ARCH"] else 1
