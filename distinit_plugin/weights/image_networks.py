"""Image classifiers by name, as modules: what is inflated, and what an inflated network is compared with."""

from __future__ import annotations

import warnings
from typing import Any

import torchvision.models
import torchvision.models.video
from torch import nn

from distinit_plugin.errors import UserError
from distinit_plugin.registry import MODELS, near_matches
from distinit_plugin.weights.sources import build_timm, torchvision_tags

LIBRARIES = ("torchvision", "timm")


def is_image_network(name: str) -> bool:
    """Whether a name is that of another library's image network (torchvision has video networks, too)."""
    library, _, model = name.partition("/")
    if library == "timm":
        return True
    return library == "torchvision" and model not in torchvision.models.list_models(torchvision.models.video)


def check_name(name: str) -> None:
    """Raise :class:`UserError` for a name that no image network can have."""
    library, slash, model = name.partition("/")
    if slash and (library not in LIBRARIES or not model):
        raise UserError(
            f"INIT.INFLATE_FROM is '{name}'.{near_matches(library, list(LIBRARIES))} Allowed: torchvision/NAME, "
            "timm/NAME, or a registered image network (Res2D)."
        )
    if not slash and name not in MODELS:
        known = sorted(key for key, _ in MODELS)
        raise UserError(
            f"INIT.INFLATE_FROM: there is no network named '{name}'.{near_matches(name, known)} Allowed: "
            "torchvision/NAME, timm/NAME, or a registered image network (Res2D)."
        )


def build_library_network(name: str, num_classes: int = 1000) -> nn.Module:
    """A classifier of torchvision or timm, with random weights and no download.

    GoogLeNet comes without its extra classifiers and without the rescaling of its input.

    Raises:
        UserError: No such network, or timm is not installed.
    """
    library, _, model = name.partition("/")
    if library == "timm":
        return build_timm(model, pretrained=False, num_classes=num_classes)
    torchvision_tags(model)  # an unknown name fails here, with its near matches
    options: dict[str, Any] = {"num_classes": num_classes}
    if model == "googlenet":
        options |= {"aux_logits": False, "transform_input": False}
    if model not in torchvision.models.list_models(torchvision.models):
        raise UserError(f"INIT.INFLATE_FROM: torchvision/{model} is no image classifier. Give one, such as resnet18.")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # about the initialisation of GoogLeNet
        return torchvision.models.get_model(model, weights=None, **options)
