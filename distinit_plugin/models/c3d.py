"""C3D with batch normalisation: the "3D-ConvNet" of Quo Vadis.

Sources: D. Tran et al., "Learning Spatiotemporal Features with 3D Convolutional Networks" (arXiv 1412.0767) figure 3;
J. Carreira and A. Zisserman, "Quo Vadis" (arXiv 1705.07750) §2.2, which adds BN after every convolution and fully
connected layer and a temporal stride to the first pool. Layer names are those of VMZ ``c2/lib/models/c3d_model.py``.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from distinit_plugin.errors import UserError
from distinit_plugin.models.conv3d import Conv3d
from distinit_plugin.models.network import ClassifiedNetwork, InputSpec
from distinit_plugin.models.residual import check_width
from distinit_plugin.registry import MODELS
from distinit_plugin.types import LayerInfo, ModelOutput

CONVS = {
    "conv1a": 64,
    "conv2a": 128,
    "conv3a": 256,
    "conv3b": 256,
    "conv4a": 512,
    "conv4b": 512,
    "conv5a": 512,
    "conv5b": 512,
}
"""The 3×3×3 convolutions and their outputs. A pool follows the last one of each number."""

FULLY_CONNECTED = 4096
FIXED_MAP = (1, 4, 4)
"""What the fully connected layers take: pool5's map of 16 frames at 112², which is why pool5 pads space by 1."""

BATCH_NORM_EPS = 1e-3
KERNEL_DEVIATION, FULLY_CONNECTED_DEVIATION = 0.01, 0.005  # VMZ's Gaussians


@MODELS.register()
class C3D(ClassifiedNetwork):
    """Eight convolutions, five pools, two fully connected layers, ``fc``; 79.6 M parameters.

    Every pool is 2×2×2 with stride 2, sizes rounded up. Neither the paper nor its counts say how pool5 pads; 79 M
    parameters need its map to be 4×4, so it pads space by 1. Clips of other sizes are averaged (or repeated, where they
    are smaller) to that map, so that any crop and length can be run; at the paper's size that is the identity.
    """

    def __init__(self, *, num_classes: int, input: InputSpec, width: int = 64, dropout: float = 0.0) -> None:
        """Build.

        Args:
            num_classes: K; 0: no classifier.
            input: The clip that the network is fed; in the paper 16 frames at 112².
            width: Channels of the first convolution; 64 in the papers. All layers scale with it.
            dropout: Dropped fraction before the classifier.

        Raises:
            UserError: A switch outside its range.
        """
        check_width(width)
        super().__init__(input)
        layers: dict[str, LayerInfo] = {}
        channels = input.channels
        for name, outputs in CONVS.items():
            outputs = outputs * width // 64
            conv = Conv3d(channels, outputs, 3, padding=1, bias=False)
            norm = nn.BatchNorm3d(outputs, eps=BATCH_NORM_EPS)
            self.add_module(name, nn.Sequential(conv, norm, nn.ReLU(inplace=True)))
            stride = 2 ** (int(name[4]) - 1)
            layers[name], channels = LayerInfo(outputs, stride, stride), outputs
        self._layers: Mapping[str, LayerInfo] = layers
        self._feature_dim = hidden = FULLY_CONNECTED * width // 64
        self.fc6 = _fully_connected(channels * FIXED_MAP[0] * FIXED_MAP[1] * FIXED_MAP[2], hidden)
        self.fc7 = _fully_connected(hidden, hidden)
        self.dropout_rate = dropout
        for module in self.modules():
            if isinstance(module, (Conv3d, nn.Linear)):
                fully_connected = isinstance(module, nn.Linear)
                nn.init.normal_(module.weight, 0.0, FULLY_CONNECTED_DEVIATION if fully_connected else KERNEL_DEVIATION)
        self.reset_classifier(num_classes)

    @property
    def layers(self) -> Mapping[str, LayerInfo]:
        """``conv1a`` … ``conv5b``."""
        return self._layers

    @property
    def feature_dim(self) -> int:
        """Outputs of the second fully connected layer."""
        return self._feature_dim

    def forward(
        self, views: Mapping[str, Tensor], *, boxes: Tensor | None = None, taps: Collection[str] = ()
    ) -> ModelOutput:
        """Run on the clip (``rgb`` or ``flow``), normalised (B,C,T,H,W).

        Raises:
            UserError: Training on a single clip, which the fully connected layers cannot normalise.
        """
        self.check_taps(taps)
        x = views[self.input.modality]
        check_several_clips(self, x, self.fc6[1].training)
        kept: dict[str, Tensor] = {}
        names = list(CONVS)
        for name, following in zip(names, [*names[1:], ""], strict=True):
            x = self.get_submodule(name)(x)
            if name in taps:
                kept[name] = x
            if name[:5] != following[:5]:
                space = 1 if name == "conv5b" else 0
                x = functional.max_pool3d(x, _window(x, space), 2, (0, space, space), ceil_mode=True)
        features = self.fc7(self.fc6(self.fixed_map(x)))
        return ModelOutput(self.classify(features), features, kept)

    @staticmethod
    def fixed_map(x: Tensor) -> Tensor:
        """(B,D,T,H,W) → (B,16·D): averaged (or repeated) to the map that the fully connected layers take."""
        for dim, size in zip((2, 3, 4), FIXED_MAP, strict=True):
            x = _averages(x, dim, size)
        return x.flatten(1)


def _fully_connected(in_features: int, out_features: int) -> nn.Sequential:
    linear = nn.Linear(in_features, out_features, bias=False)
    return nn.Sequential(linear, nn.BatchNorm1d(out_features, eps=BATCH_NORM_EPS), nn.ReLU(inplace=True))


def _window(x: Tensor, space: int) -> tuple[int, int, int]:
    """2×2×2, or what is left of it on a map of one frame or pixel."""
    frames, height, width = x.shape[2:]
    return min(2, frames), min(2, height + 2 * space), min(2, width + 2 * space)


def _averages(x: Tensor, dim: int, size: int) -> Tensor:
    """Adaptive average pooling of one axis to ``size``: window i is from ⌊i·L/size⌋ to ⌈(i+1)·L/size⌉ of its length L.

    ``adaptive_avg_pool3d`` is that along all axes; but ONNX has no such operator, and it has slices and means.
    """
    length = x.shape[dim]
    if length == size:
        return x
    bounds = [(place * length // size, -(-(place + 1) * length // size)) for place in range(size)]
    return torch.cat([x.narrow(dim, start, end - start).mean(dim, keepdim=True) for start, end in bounds], dim)


def check_several_clips(network: nn.Module, view: Tensor, training: bool) -> None:
    """Raise :class:`UserError` when vectors are to be normalised over a batch of one."""
    if training and len(view) < 2:
        raise UserError(
            f"{type(network).__name__} normalises vectors over the clips of a batch, so it cannot be trained on one "
            "clip at a time. Give every micro-batch of a rank (TRAIN.BATCH_SIZE ÷ GPUs ÷ RUNNER.ACCUMULATE) 2 or more; "
            "with a gate, set DISTILL.GATE weight."
        )
