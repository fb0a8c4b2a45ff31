"""Any network by name."""

from __future__ import annotations

import importlib
import inspect
from typing import cast

from torch import nn

from distinit_plugin.errors import UserError
from distinit_plugin.models.external import ExternalNetwork
from distinit_plugin.models.network import InputSpec, VideoNetwork
from distinit_plugin.registry import MODELS, PROGRAMS, lookup, near_matches

SWITCHES: dict[str, tuple[str, object]] = {
    "depth": ("RESNET.DEPTH", 18),
    "width": ("NETWORK.WIDTH", 64),
    "variant": ("NETWORK.VARIANT", "vmz"),
    "stem_pool": ("NETWORK.STEM_POOL", False),
    "temporal_padding": ("NETWORK.TEMPORAL_PADDING", "zeros"),
    "padding": ("NETWORK.PADDING", "same"),
    "affine_norm": ("NETWORK.AFFINE_NORM", False),
    "fully_convolutional": ("NETWORK.FULLY_CONVOLUTIONAL", False),
    "stem_frames": ("NETWORK.STEM_FRAMES", 3),
    "separable_stem": ("NETWORK.SEPARABLE_STEM", False),
    "temporal_norm": ("NETWORK.TEMPORAL_NORM", False),
    "temporal_from": ("NETWORK.TEMPORAL_FROM", "2C"),
    "gating_from": ("NETWORK.GATING_FROM", "2C"),
    "streams": ("NETWORK.STREAMS", "both"),
    "last_layer": ("NETWORK.LAST_LAYER", "5C"),
    "decoder": ("NETWORK.DECODER", "pwc"),
    "decoder_norm": ("NETWORK.DECODER_NORM", False),
}
"""Switch → (configuration key, value that asks for nothing)."""


def is_program(name: str) -> bool:
    """Whether a network is of another program (:data:`~distinit_plugin.registry.PROGRAMS`)."""
    return "/" in name and name.partition("/")[0] in PROGRAMS


def build_network(
    name: str,
    *,
    num_classes: int,
    input: InputSpec,
    dropout: float = 0.0,
    description: str = "",
    **switches: object,
) -> VideoNetwork:
    """Build a network with random weights.

    Args:
        name: A name in :data:`~distinit_plugin.registry.MODELS` (``Res3D``, ``S3DG``, …),
            ``torchvision/NAME`` or ``pytorchvideo/NAME``, or ``PROGRAM/NAME`` of a program in
            :data:`~distinit_plugin.registry.PROGRAMS`.
        num_classes: K; 0: no classifier, ``logits`` are ``None``.
        input: The clip that the network is fed.
        dropout: Dropped fraction before the classifier, [0, 1).
        description: Of a program's network: what it is, as the text of a YAML file of that program.
        switches: Of :data:`SWITCHES`, as the network's own class describes them. Those that it does not have may be
            given at their neutral value.

    Raises:
        UserError: An unknown name, a switch that this network does not have, or a value outside its range.
    """
    if not 0.0 <= dropout < 1.0:
        raise UserError(f"MODEL.DROPOUT_RATE is {dropout}. Allowed: 0 up to, not including, 1.")
    if num_classes < 0:
        raise UserError(f"MODEL.NUM_CLASSES is {num_classes}. Allowed: 0 (no classifier) and above.")
    if input.num_frames < 1:
        raise UserError(f"DATA.NUM_FRAMES is {input.num_frames}. Allowed: 1 and above.")
    unknown = [switch for switch in switches if switch not in SWITCHES]
    if unknown:
        raise UserError(
            f"no network has a switch named '{unknown[0]}'.{near_matches(unknown[0], list(SWITCHES))} "
            f"Known: {', '.join(SWITCHES)}."
        )
    if is_program(name):  # what it is made of is in its description; its depth is RESNET.DEPTH there, too
        switches.pop("depth", None)
    external = "/" in name
    builder: type[nn.Module] = ExternalNetwork if external else lookup(MODELS, name, "MODEL.MODEL_NAME")
    accepted = inspect.signature(builder).parameters
    for switch, (key, neutral) in SWITCHES.items():
        if switch not in accepted and switches.get(switch, neutral) != neutral:
            raise UserError(f"{key} is {switches[switch]!r}, but {name} has no such switch. Leave it at {neutral!r}.")
    if is_program(name):
        module = importlib.import_module(PROGRAMS[name.partition("/")[0]])
        return cast(
            VideoNetwork,
            module.build_network(name, num_classes=num_classes, input=input, dropout=dropout, description=description),
        )
    if external:
        return ExternalNetwork(name, num_classes=num_classes, input=input, dropout=dropout)
    own = {switch: value for switch, value in switches.items() if switch in accepted}
    return cast(VideoNetwork, builder(num_classes=num_classes, input=input, dropout=dropout, **own))
