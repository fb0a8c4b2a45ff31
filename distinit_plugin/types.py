"""The contracts that the parts of the program share.

Shapes in every docstring: B batch, C channels, T frames, H height, W width, K classes, D feature dimension.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple, NotRequired, Protocol, TypedDict, runtime_checkable

from torch import Tensor

Modality = Literal["rgb", "flow"]
Pick = Literal["clip", "center", "keyframe", "random", "uniform"]
Crop = Literal["shared", "center", "whole"]
Split = Literal["train", "val", "test"]


@dataclass(frozen=True)
class ViewSpec:
    """What a network must be fed; the data side builds exactly this.

    Attributes:
        modality: ``rgb`` or ``flow``.
        num_frames: Frames in the view (1 for an image teacher that sees one frame); ``None``: the whole video.
        sampling_rate: Distance between neighbouring frames of the clip, in frames, after ``target_fps``.
        target_fps: Frame rate to which the video is resampled first; ``None``: native.
        pick: ``clip``: the clip itself. ``center``, ``keyframe``, ``random``, ``uniform``: ``num_frames`` frames chosen
            from the frames of the student's clip.
        stack: Consecutive frames folded into channels (flow of Two-Stream: 10); 1 elsewhere. Frame t of such a view is
            the frames t, t + 1, … of the (resampled) video, one after the other along channels: channel 2k is u of the
            k-th of them and 2k + 1 is v. ``mean`` and ``std`` have an entry for each channel.
        crop_size: Height and width of the view, pixels; of a ``whole`` one its short side.
        mean: Per-channel mean, in units of [0, 1].
        std: Per-channel standard deviation, in units of [0, 1].
        crop: ``shared``: the student's crop and flip. ``center``: the centre crop of the same frames, not mirrored.
            ``whole``: all of the picture in its own proportions.
        pick_from: Evenly spaced frames of the clip among which ``pick`` chooses; 0: all of them.
    """

    modality: Modality = "rgb"
    num_frames: int | None = 8
    sampling_rate: int = 1
    target_fps: float | None = None
    pick: Pick = "clip"
    stack: int = 1
    crop_size: int = 112
    mean: tuple[float, ...] = (0.45, 0.45, 0.45)
    std: tuple[float, ...] = (0.225, 0.225, 0.225)
    crop: Crop = "shared"
    pick_from: int = 0

    @property
    def pixels(self) -> str:
        """The identity of the view's raw pixels: two specs that differ in mean and std alone share one tensor."""
        fps = "native" if self.target_fps is None else f"{self.target_fps:g}fps"
        frames = "all" if self.num_frames is None else str(self.num_frames)
        stack = "" if self.stack == 1 else f"_stack{self.stack}"
        choice = f"_of{self.pick_from}" if self.pick_from else ""
        crop = "" if self.crop == "shared" else f"_{self.crop}"
        return (
            f"{self.modality}_{self.pick}_{frames}x{self.sampling_rate}_{fps}_{self.crop_size}px{stack}{choice}{crop}"
        )

    @property
    def pairs(self) -> str:
        """The identity of the pairs of frames from which a view of flow is computed."""
        return f"{self.pixels}_pairs"

    @property
    def channels(self) -> int:
        """C: red, green, blue, or u and v of each frame of a stack."""
        return (3 if self.modality == "rgb" else 2) * self.stack


class SampleKey(NamedTuple):
    """Names one sample. A sample is a pure function of (seed, key): worker count and history never matter."""

    epoch: int
    position: int
    index: int  # type: ignore[assignment]  # hides tuple.index, which nobody needs here
    clip: int = 0
    crop: int = 0


class BadVideo(NamedTuple):
    """A file that could not give the frames asked for."""

    path: str
    reason: str


BOXES = "boxes"
"""Target of keyframes: persons' boxes float32 (N,4), x1, y1, x2, y2 in pixels of the student's view; of a batch (R,5),
R the sum of N, with the number of the example in column 0 (torchvision's form for RoIAlign)."""

ACTIONS = "actions"
"""Target of keyframes: what the persons do, float32 of 0 and 1, (N,K); of a batch (R,K). Rows go with ``BOXES``."""


RAGGED = (BOXES, ACTIONS)
"""Targets of which each example has a number of rows of its own."""


class ViewRegion(NamedTuple):
    """What the student's view shows of the source picture, so that boxes can be brought there and back.

    Attributes:
        frame_height: Rows of the source picture.
        frame_width: Columns of the source picture.
        top: First row of the region, source pixels.
        left: First column.
        height: Rows of the region.
        width: Columns of the region.
        flip: Whether the view is mirrored left to right.
        view_height: Rows of the view.
        view_width: Columns of the view.
    """

    frame_height: int
    frame_width: int
    top: int
    left: int
    height: int
    width: int
    flip: bool
    view_height: int
    view_width: int


class Sample(TypedDict):
    """What the dataset returns for one key."""

    views: dict[str, Tensor]  # ViewSpec.pixels → uint8 (C,T,H,W), or ViewSpec.pairs → uint8 (6,T·stack,H,W) where flow
    # is still to be computed; equal specs share a tensor
    key: SampleKey
    path: str  # the file that was really read (a replacement when the one asked for is bad)
    targets: dict[str, Tensor]  # "label" (0-dim int64) when labelled; absent = unlabeled, never a fake 0 or -1; and one
    # per cached teacher by its name, (P,…): a row for each frame that it was shown, or one for the clip
    bad: list[BadVideo]  # files met on the way that had to be skipped
    region: NotRequired[ViewRegion]  # of a keyframe: where ``BOXES`` are measured


class Batch(TypedDict):
    """Samples joined along a new first dimension; ``views`` are still uint8."""

    views: dict[str, Tensor]  # as in ``Sample``, with a first dimension B
    keys: list[SampleKey]
    paths: list[str]
    targets: dict[str, Tensor]  # "label": (B,) int64; of cached teachers (B,P,…); ``BOXES`` (R,5), ``ACTIONS`` (R,K)
    bad: list[BadVideo]
    regions: NotRequired[list[ViewRegion]]  # of keyframes, as ``keys``


class LayerInfo(NamedTuple):
    """Geometry of a named layer's output, relative to the network's input."""

    channels: int
    temporal_stride: int
    spatial_stride: int


STORED = "stored"
"""The one view of a cached teacher: what was stored of its outputs, (B,P,…)."""


class ModelOutput(NamedTuple):
    """What every network returns."""

    logits: Tensor | None  # (B,K), always before softmax, in train and in eval; None without a classifier. Of a network
    # that classifies boxes (R,K), before the sigmoid
    features: Tensor | None  # (B,D), pooled over space and time
    taps: dict[str, Tensor]  # the named layers that were asked for
    logits_over_time: Tensor | None = None  # (B,K,T), in training, of a network whose losses act at every time step
    boxes: Tensor | None = None  # (R,5) as in ``BOXES``: what the rows of ``logits`` are of, where that is boxes
    offsets: Tensor | None = None  # (R,4): learned corrections of ``boxes`` (dx, dy, dw, dh of Faster R-CNN)


class StepOutput(NamedTuple):
    """What an objective returns for one batch."""

    loss: Tensor  # scalar, requires grad
    terms: dict[str, Tensor]  # each part, unweighted, detached
    report: dict[str, Tensor]  # logged only (teacher entropy, kept fraction, agreement, top-1, …)
    normalizer: Tensor  # number of examples that the mean is over
    report_weights: dict[str, Tensor]  # of each entry of the report: the number of examples that it is a mean over


@runtime_checkable
class Network(Protocol):
    """Student and teacher alike. Implementations are ``torch.nn.Module``s."""

    @property
    def layers(self) -> Mapping[str, LayerInfo]:
        """The layers that can be tapped."""
        ...

    @property
    def feature_dim(self) -> int:
        """D, the size of the pooled features."""
        ...

    @property
    def num_classes(self) -> int:
        """K, the outputs of the classifier; 0 without one."""
        ...

    def view_specs(self, split: Split) -> Mapping[str, ViewSpec]:
        """The views that ``forward`` expects, by the network's own names (mostly one, ``rgb``)."""
        ...

    def forward(
        self, views: Mapping[str, Tensor], *, boxes: Tensor | None = None, taps: Collection[str] = ()
    ) -> ModelOutput:
        """Run on normalised views (B,C,T,H,W)."""
        ...

    def reset_classifier(self, num_classes: int) -> None:
        """Put a fresh classifier with ``num_classes`` outputs; 0 removes it (``logits`` is then ``None``)."""
        ...

    def bare_state_dict(self) -> dict[str, Tensor]:
        """The network's weights under the keys that every host knows."""
        ...
