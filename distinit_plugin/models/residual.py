"""The residual frame that Res3D and R(2+1)D share, with torchvision's key names.

Sources: VMZ ``c2/lib/models/r3d_model.py``; D. Tran et al., "A Closer Look at Spatiotemporal Convolutions for Action
Recognition" (arXiv 1711.11248); torchvision ``models/video/resnet.py`` for the names.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

from torch import Tensor, nn

from distinit_plugin.errors import UserError
from distinit_plugin.models.conv3d import Conv3d, TemporalPadding
from distinit_plugin.models.network import InputSpec, TrunkNetwork, check_choice, global_average
from distinit_plugin.types import LayerInfo, ModelOutput

Variant = Literal["vmz", "torchvision"]


class Depth(NamedTuple):
    """What a number of layers stands for."""

    num_blocks: tuple[int, int, int, int]  # in each of the four stages
    bottleneck: bool  # blocks of 1, 3, 1 instead of 3, 3
    expansion: int  # channels that leave a block, as a multiple of those of its 3×3×3 convolutions


DEPTHS: Mapping[int, Depth] = {
    10: Depth((1, 1, 1, 1), False, 1),
    16: Depth((2, 2, 2, 1), False, 1),
    18: Depth((2, 2, 2, 2), False, 1),
    26: Depth((2, 2, 2, 2), True, 1),
    34: Depth((3, 4, 6, 3), False, 1),
    50: Depth((3, 4, 6, 3), True, 4),
    101: Depth((3, 4, 23, 3), True, 4),
    152: Depth((3, 8, 36, 3), True, 4),
}
"""VMZ ``c2/lib/models/r3d_model.py``, its tables of blocks and filters. Depth 26 has bottlenecks that do not expand."""

BATCH_NORM_EPS: Mapping[Variant, float] = {"vmz": 1e-3, "torchvision": 1e-5}

MIN_FRAMES_TO_STRIDE = {3: 4, 4: 8}
"""VMZ: stages 3 and 4 keep their frames (temporal stride 1) for clips shorter than this."""


NO_STEM_POOL = (
    "the 2D network pools after its stem and this one does not (NETWORK.STEM_POOL False, as in the paper): features "
    "change scale in space"
)
NO_FACTORS = (
    "its kernels are split into space and time. Use MODEL.MODEL_NAME Res3D, or pre-train it with DISTILL.TEACHERS"
)
"""What is said about inflating 2D ResNets."""


@dataclass(frozen=True)
class Layout:
    """The switches that all convolutions of one network share."""

    variant: Variant
    temporal_padding: TemporalPadding

    def norm(self, channels: int) -> nn.BatchNorm3d:
        """Batch normalisation: 0.9 of the running statistics is kept per step in both variants."""
        return nn.BatchNorm3d(channels, eps=BATCH_NORM_EPS[self.variant], momentum=0.1)

    def conv(
        self, in_channels: int, out_channels: int, kernel: tuple[int, int, int], stride: tuple[int, int, int]
    ) -> Conv3d:
        """A convolution without bias that keeps the size (divided by the stride)."""
        padding = (kernel[0] // 2, kernel[1] // 2, kernel[2] // 2)
        return Conv3d(
            in_channels,
            out_channels,
            kernel,
            stride,
            padding,
            bias=False,
            temporal_padding=self.temporal_padding,
        )


@dataclass(frozen=True)
class ConvShape:
    """A 3×3×3 convolution of a block, or what stands for it."""

    in_channels: int
    channels: int
    temporal_stride: int
    spatial_stride: int
    block_in_channels: int  # of the whole block

    @property
    def stride(self) -> tuple[int, int, int]:
        """(T, H, W)."""
        return self.temporal_stride, self.spatial_stride, self.spatial_stride


@dataclass(frozen=True)
class BlockShape:
    """Channels and strides of a residual block."""

    in_channels: int
    channels: int  # of its 3×3×3 convolutions
    temporal_stride: int
    spatial_stride: int
    expansion: int = 1

    @property
    def out_channels(self) -> int:
        """Channels that leave the block."""
        return self.channels * self.expansion

    def strided_conv(self, in_channels: int) -> ConvShape:
        """The convolution that carries the block's stride."""
        return ConvShape(in_channels, self.channels, self.temporal_stride, self.spatial_stride, self.in_channels)

    def plain_conv(self) -> ConvShape:
        """A convolution without stride after it."""
        return ConvShape(self.channels, self.channels, 1, 1, self.in_channels)


ConvBuilder = Callable[[ConvShape, Layout], nn.Module]
"""Makes a block's 3×3×3 convolutions, or what stands for them."""


class BasicBlock(nn.Module):
    """Two 3×3×3 convolutions and a shortcut: (B,Cin,T,H,W) → (B,C,T',H',W'). The first one carries the stride."""

    def __init__(self, shape: BlockShape, build_conv: ConvBuilder, layout: Layout) -> None:
        """Build from the block's shape."""
        super().__init__()
        channels = shape.channels
        first = build_conv(shape.strided_conv(shape.in_channels), layout)
        self.conv1 = nn.Sequential(first, layout.norm(channels), nn.ReLU(inplace=True))
        self.conv2 = nn.Sequential(build_conv(shape.plain_conv(), layout), layout.norm(channels))
        self.relu = nn.ReLU(inplace=True)
        self.downsample = _shortcut(shape, layout)

    def forward(self, x: Tensor) -> Tensor:
        """Residual sum."""
        shortcut = x if self.downsample is None else self.downsample(x)
        return self.relu(self.conv2(self.conv1(x)) + shortcut)


class Bottleneck(nn.Module):
    """1×1×1, 3×3×3 with the stride, 1×1×1, and a shortcut: (B,Cin,T,H,W) → (B,C·expansion,T',H',W').

    Only the one in the middle is factored in R(2+1)D. Source: VMZ ``c2/lib/models/builder/video_model.py``; torchvision
    ``models/video/resnet.py`` has the same block at expansion 4.
    """

    def __init__(self, shape: BlockShape, build_conv: ConvBuilder, layout: Layout) -> None:
        """Build from the block's shape."""
        super().__init__()
        channels, out_channels, one = shape.channels, shape.out_channels, (1, 1, 1)
        first, last = layout.conv(shape.in_channels, channels, one, one), layout.conv(channels, out_channels, one, one)
        self.conv1 = nn.Sequential(first, layout.norm(channels), nn.ReLU(inplace=True))
        middle = build_conv(shape.strided_conv(channels), layout)
        self.conv2 = nn.Sequential(middle, layout.norm(channels), nn.ReLU(inplace=True))
        self.conv3 = nn.Sequential(last, layout.norm(out_channels))
        self.relu = nn.ReLU(inplace=True)
        self.downsample = _shortcut(shape, layout)

    def forward(self, x: Tensor) -> Tensor:
        """Residual sum."""
        shortcut = x if self.downsample is None else self.downsample(x)
        return self.relu(self.conv3(self.conv2(self.conv1(x))) + shortcut)


def _shortcut(shape: BlockShape, layout: Layout) -> nn.Module | None:
    """1×1×1 with the block's stride and BN wherever the shape changes; ``None``: the identity."""
    if shape.temporal_stride == shape.spatial_stride == 1 and shape.in_channels == shape.out_channels:
        return None
    stride = (shape.temporal_stride, shape.spatial_stride, shape.spatial_stride)
    shortcut = layout.conv(shape.in_channels, shape.out_channels, (1, 1, 1), stride)
    return nn.Sequential(shortcut, layout.norm(shape.out_channels))


class ResidualNetwork(TrunkNetwork):
    """Stem and four stages of residual blocks, global average pool, ``fc``.

    The pool takes whatever map is left, so any clip length and any crop can be run. Strides in time are fixed when the
    network is built: in the ``vmz`` variant the last two stages drop theirs when the clip that the network is declared
    for is short (:data:`MIN_FRAMES_TO_STRIDE`), as VMZ does.
    """

    def __init__(
        self,
        *,
        stem: nn.Module,
        stem_pool: nn.Module,
        build_conv: ConvBuilder,
        layout: Layout,
        num_classes: int,
        input: InputSpec,
        depth: int,
        width: int,
        dropout: float,
    ) -> None:
        """Assemble a network around its stem; ``build_conv`` makes the convolutions of the blocks."""
        super().__init__(input)
        self.stem = stem
        self.stem_pool = stem_pool
        self._variant = layout.variant
        spatial_stride = 2 if isinstance(stem_pool, nn.Identity) else 4
        layers = {"stem": LayerInfo(width, 1, spatial_stride)}
        temporal_stride, in_channels = 1, width
        blocks_of_stages, bottleneck, expansion = DEPTHS[depth]
        build_block = Bottleneck if bottleneck else BasicBlock
        for stage, num_blocks in enumerate(blocks_of_stages, start=1):
            channels = width * 2 ** (stage - 1)
            step = 1 if stage == 1 else 2
            short = layout.variant == "vmz" and input.num_frames < MIN_FRAMES_TO_STRIDE.get(stage, 0)
            blocks = [BlockShape(in_channels, channels, 1 if short else step, step, expansion)]
            in_channels = channels * expansion
            blocks += [BlockShape(in_channels, channels, 1, 1, expansion)] * (num_blocks - 1)
            self.add_module(f"layer{stage}", nn.Sequential(*(build_block(b, build_conv, layout) for b in blocks)))
            temporal_stride *= blocks[0].temporal_stride
            spatial_stride *= step
            layers[f"layer{stage}"] = LayerInfo(in_channels, temporal_stride, spatial_stride)
        self.finish(layers, num_classes, dropout)

    @property
    def image_gaps(self) -> tuple[str, ...]:
        """The pool that the paper leaves out, and VMZ's normalisation."""
        gaps = [NO_STEM_POOL] if isinstance(self.stem_pool, nn.Identity) else []
        eps, image_eps = BATCH_NORM_EPS[self._variant], BATCH_NORM_EPS["torchvision"]
        if eps != image_eps:
            gaps.append(
                f"BN eps is {eps:g} here and {image_eps:g} in the 2D network (NETWORK.VARIANT torchvision has the "
                "latter)"
            )
        return tuple(gaps)

    def run_stage(self, name: str, x: Tensor) -> Tensor:
        """The pool belongs to the stem."""
        x = super().run_stage(name, x)
        return self.stem_pool(x) if name == "stem" else x

    def forward(
        self, views: Mapping[str, Tensor], *, boxes: Tensor | None = None, taps: Collection[str] = ()
    ) -> ModelOutput:
        """Run on the clip (``rgb`` or ``flow``), normalised (B,C,T,H,W)."""
        feature_map, kept = self.run_trunk(views[self.input.modality], taps)
        features = global_average(feature_map)
        return ModelOutput(self.classify(features), features, kept)


def check_switches(depth: int, width: int, variant: str, temporal_padding: str) -> None:
    """Raise :class:`UserError` for a switch outside its range."""
    check_choice("RESNET.DEPTH", depth, list(DEPTHS))
    check_choice("NETWORK.VARIANT", variant, get_args(Variant))
    check_choice("NETWORK.TEMPORAL_PADDING", temporal_padding, get_args(TemporalPadding))
    check_width(width)


def check_width(width: int) -> None:
    """Raise :class:`UserError` for a width that is not a positive integer."""
    if width < 1:
        raise UserError(f"NETWORK.WIDTH is {width}. Allowed: integers from 1; 64 is the papers'.")
