"""Res2D: torchvision's 2D ResNet, at any width, as a network that sees frames.

Source: K. He et al. (arXiv 1512.03385); torchvision ``models/resnet.py``, whose ``resnet18`` … ``resnet152`` state
dicts it loads at width 64. Bottlenecks have their stride in the 3×3 convolution, as there.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from distinit_plugin.models.network import InputSpec, TrunkNetwork, check_choice
from distinit_plugin.models.residual import DEPTHS, check_width
from distinit_plugin.registry import MODELS
from distinit_plugin.types import LayerInfo, ModelOutput, Split, ViewSpec

IMAGE_DEPTHS = (10, 18, 34, 50, 101, 152)
"""Those of image networks: VMZ's 16 and 26 are its own."""


@MODELS.register()
class Res2D(TrunkNetwork):
    """2D ResNet; each frame of the view is an image, logits and features are averaged over frames."""

    averages_frames = True

    def __init__(
        self, *, num_classes: int, input: InputSpec, depth: int = 18, width: int = 64, dropout: float = 0.0
    ) -> None:
        """Build.

        Args:
            num_classes: K; 0: no classifier.
            input: The clip from which frames are taken.
            depth: 10, 18 or 34 (basic blocks); 50, 101 or 152 (bottlenecks).
            width: Channels of the first stage; torchvision's networks have 64.
            dropout: Dropped fraction before the classifier.

        Raises:
            UserError: A switch outside its range.
        """
        check_choice("RESNET.DEPTH", depth, IMAGE_DEPTHS)
        check_width(width)
        super().__init__(input)
        self.conv1 = nn.Conv2d(input.channels, width, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        layers = {"stem": LayerInfo(width, 1, 4)}
        in_channels = width
        block = Bottleneck if DEPTHS[depth].bottleneck else BasicBlock
        for stage, num_blocks in enumerate(DEPTHS[depth].num_blocks, start=1):
            channels, stride = width * 2 ** (stage - 1), 1 if stage == 1 else 2
            self.add_module(f"layer{stage}", _stage(block, in_channels, channels, stride, num_blocks))
            in_channels = channels * block.expansion
            layers[f"layer{stage}"] = LayerInfo(in_channels, 1, 2 ** (stage + 1))
        self.finish(layers, num_classes, dropout)

    @property
    def no_counterpart(self) -> str:
        """It is one itself."""
        return "it is an image network itself. Load its weights with TRAIN.CHECKPOINT_FILE_PATH"

    def view_specs(self, split: Split) -> Mapping[str, ViewSpec]:
        """One frame: the middle one of the clip."""
        return {name: replace(spec, num_frames=1, pick="center") for name, spec in super().view_specs(split).items()}

    def run_stage(self, name: str, x: Tensor) -> Tensor:
        """Frames are already folded into the batch."""
        return self.maxpool(self.relu(self.bn1(self.conv1(x)))) if name == "stem" else super().run_stage(name, x)

    def forward(
        self, views: Mapping[str, Tensor], *, boxes: Tensor | None = None, taps: Collection[str] = ()
    ) -> ModelOutput:
        """Run on the clip (``rgb`` or ``flow``), normalised (B,C,T,H,W) with any T; taps are (B,C,T,H',W')."""
        clip = views[self.input.modality]
        batch_and_time = (clip.shape[0], clip.shape[2])
        feature_map, kept = self.run_trunk(clip.transpose(1, 2).flatten(0, 1), taps)
        per_frame = feature_map.mean(dim=(2, 3)).unflatten(0, batch_and_time)
        logits = self.classify(per_frame)
        maps = {name: x.unflatten(0, batch_and_time).transpose(1, 2) for name, x in kept.items()}
        return ModelOutput(None if logits is None else logits.mean(dim=1), per_frame.mean(dim=1), maps)


def _stage(
    block: type[BasicBlock | Bottleneck], in_channels: int, channels: int, stride: int, num_blocks: int
) -> nn.Sequential:
    out_channels = channels * block.expansion
    shortcut: nn.Module | None = None
    if stride != 1 or in_channels != out_channels:
        shortcut = nn.Sequential(
            nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False), nn.BatchNorm2d(out_channels)
        )
    blocks = [block(in_channels, channels, stride, shortcut)]
    blocks += [block(out_channels, channels) for _ in range(num_blocks - 1)]
    return nn.Sequential(*blocks)
