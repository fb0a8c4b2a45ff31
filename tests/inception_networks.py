"""Inception networks with random weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from distinit_plugin.models import InputSpec, VideoNetwork, build_network

CLIP = InputSpec(num_frames=64, train_crop_size=224, test_crop_size=224)
FLOW = InputSpec(
    num_frames=64, train_crop_size=224, test_crop_size=224, mean=(0.5, 0.5), std=(0.25, 0.25), modality="flow"
)
SMALL = InputSpec(num_frames=8, train_crop_size=64, test_crop_size=64)
TORCHVISION = {
    "padding": "symmetric",
    "affine_norm": True,
    "stem_frames": 7,
    "separable_stem": True,
    "temporal_norm": True,
}


def build(name: str, spec: InputSpec = SMALL, num_classes: int = 5, **switches: Any) -> VideoNetwork:
    torch.manual_seed(0)
    return build_network(name, num_classes=num_classes, input=spec, **{"width": 8, **switches})


def randomized(name: str, **switches: Any) -> VideoNetwork:
    """A narrow network in float64 whose values all matter: fitting norms, random temporal halves and gates."""
    network = build(name, **switches).double()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for key, value in network.named_parameters():
            if key.endswith("bias"):
                value.normal_(0.0, 0.3, generator=generator)
            elif ".temporal." in key or ".gate." in key:
                value.normal_(0.0, (2 / value[0].numel()) ** 0.5, generator=generator)
            elif "bn." in key:
                value.uniform_(0.5, 1.5, generator=generator)
            else:
                value.normal_(0.0, 0.3, generator=generator)
        norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm3d)]
        for norm in norms:
            norm.momentum = None
        for _ in range(2):
            network.train()({"rgb": torch.randn(2, 3, 16, 48, 48, generator=generator, dtype=torch.float64)})
    return network.eval()
