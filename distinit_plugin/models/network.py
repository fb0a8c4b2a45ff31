"""What all networks of this package share: what they are fed, taps, and pooled features.

Shapes: B batch, C channels, T frames, H height, W width, K classes, D feature dimension.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import get_args

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from distinit_plugin.errors import UserError
from distinit_plugin.flow.codes import DEFAULT_BOUND
from distinit_plugin.registry import near_matches
from distinit_plugin.types import LayerInfo, Modality, ModelOutput, Split, ViewSpec


@dataclass(frozen=True)
class InputSpec:
    """The clip that a network is fed.

    Attributes:
        num_frames: Frames of the clip in training and validation.
        sampling_rate: Distance between neighbouring frames, in frames, after ``target_fps``.
        target_fps: Frame rate to which videos are resampled first; ``None``: native.
        train_crop_size: Height and width in training, pixels.
        test_crop_size: Height and width in validation and test, pixels.
        mean: Per-channel mean, in units of [0, 1].
        std: Per-channel standard deviation, in units of [0, 1].
        modality: ``rgb`` (3 channels) or ``flow`` (u and v).
        test_num_frames: Frames of the clip in the test, for networks that run on longer clips than they train on (I3D:
            64, then 250); ``None``: ``num_frames``.
        flow_bound: Pixels of flow that the ends of a view's values stand for; more is cut off.

    Raises:
        UserError: ``mean`` or ``std`` have another number of channels than ``modality``.
    """

    num_frames: int = 8
    sampling_rate: int = 1
    target_fps: float | None = None
    train_crop_size: int = 112
    test_crop_size: int = 112
    mean: tuple[float, ...] = (0.45, 0.45, 0.45)
    std: tuple[float, ...] = (0.225, 0.225, 0.225)
    modality: Modality = "rgb"
    test_num_frames: int | None = None
    flow_bound: float = DEFAULT_BOUND

    def __post_init__(self) -> None:
        """Check what belongs together."""
        check_choice("NETWORK.MODALITY", self.modality, get_args(Modality))
        for key, values in (("DATA.MEAN", self.mean), ("DATA.STD", self.std)):
            if len(values) != self.channels:
                raise UserError(
                    f"{key} has {len(values)} entries, but {self.modality} has {self.channels} channels: give one for "
                    "each (NETWORK.MODALITY flow has u and v)."
                )

    @property
    def channels(self) -> int:
        """C of the clip."""
        return 3 if self.modality == "rgb" else 2

    def view_specs(self, split: Split) -> dict[str, ViewSpec]:
        """One view, named by its modality: the clip itself."""
        return {
            self.modality: ViewSpec(
                modality=self.modality,
                num_frames=(self.test_num_frames or self.num_frames) if split == "test" else self.num_frames,
                sampling_rate=self.sampling_rate,
                target_fps=self.target_fps,
                pick="clip",
                crop_size=self.train_crop_size if split == "train" else self.test_crop_size,
                mean=self.mean,
                std=self.std,
            )
        }


class VideoNetwork(nn.Module):
    """Base of the networks that see one clip; implements the shared part of the ``Network`` contract.

    A subclass fills in :meth:`forward`, :meth:`reset_classifier`, :attr:`layers` and :attr:`feature_dim`.
    """

    def __init__(self, input: InputSpec) -> None:
        """Remember what the network is fed."""
        super().__init__()
        self.input = input

    @property
    def layers(self) -> Mapping[str, LayerInfo]:
        """The layers that can be tapped."""
        raise NotImplementedError

    @property
    def feature_dim(self) -> int:
        """D, the size of the pooled features."""
        raise NotImplementedError

    @property
    def num_classes(self) -> int:
        """K, the outputs of the classifier; 0 without one."""
        raise NotImplementedError

    def view_specs(self, split: Split) -> Mapping[str, ViewSpec]:
        """The views that ``forward`` expects: one, ``rgb`` or ``flow``."""
        return self.input.view_specs(split)

    def forward(
        self, views: Mapping[str, Tensor], *, boxes: Tensor | None = None, taps: Collection[str] = ()
    ) -> ModelOutput:
        """Run on normalised views (B,C,T,H,W)."""
        raise NotImplementedError

    def reset_classifier(self, num_classes: int) -> None:
        """Put a fresh classifier with ``num_classes`` outputs; 0 removes it (``logits`` is then ``None``)."""
        raise NotImplementedError

    @property
    def image_trunks(self) -> Mapping[str, str]:
        """The parts that an image network's weights can fill: prefix of their keys → its family.

        Families are those of ``distinit_plugin.weights.families``; empty: there is no 2D counterpart.
        """
        return {}

    @property
    def no_counterpart(self) -> str:
        """Why :attr:`image_trunks` is empty, and what to do instead."""
        return "no image classifier has its layers. Train it from scratch, or with DISTILL.TEACHERS"

    @property
    def image_gaps(self) -> tuple[str, ...]:
        """Why a still clip does not give the image network's maps, even with replicate padding in time."""
        return ()

    @staticmethod
    def own_name(end_point: str) -> str:
        """The network's name for a layer (or a key of it) of the image network's family."""
        return end_point

    def bare_state_dict(self) -> dict[str, Tensor]:
        """The weights under the keys of the public implementation of this network."""
        return dict(self.state_dict())

    def check_taps(self, taps: Collection[str]) -> None:
        """Raise :class:`UserError` when a layer that was asked for does not exist."""
        for name in taps:
            if name not in self.layers:
                known = list(self.layers)
                raise UserError(
                    f"{type(self).__name__} has no layer named '{name}'.{near_matches(name, known)} "
                    f"Known: {', '.join(known) or 'none'}."
                )


class ClassifiedNetwork(VideoNetwork):
    """A network whose logits are a linear layer ``fc`` on its features."""

    fc: nn.Linear | None
    dropout_rate: float

    @property
    def num_classes(self) -> int:
        """Outputs of ``fc``."""
        return 0 if self.fc is None else self.fc.out_features

    def reset_classifier(self, num_classes: int) -> None:
        """Put a fresh ``fc``; 0 removes it."""
        self.fc = new_classifier(self.feature_dim, num_classes, next(self.parameters()))

    def classify(self, features: Tensor) -> Tensor | None:
        """Logits of pooled features (…,D), or ``None`` without a classifier."""
        if self.fc is None:
            return None
        return self.fc(functional.dropout(features, self.dropout_rate, self.training))


class TrunkNetwork(ClassifiedNetwork):
    """Stages one after the other and a linear classifier ``fc``; tapped by stage.

    Subclasses build the stages (the residual ones: ``stem`` and ``layer1`` … ``layer4``), override :meth:`run_stage`
    where a stage is more than the module of its name, and pass the stages' geometry in their order to :meth:`finish`.
    """

    def finish(self, layers: Mapping[str, LayerInfo], num_classes: int, dropout: float) -> None:
        """Declare the stages, add the classifier, initialise everything.

        The classifier gets N(0, 0.01²) and a bias of 0, normalisation the identity; see :meth:`initialize`.
        """
        self._layers = layers
        self.dropout_rate = dropout
        self.reset_classifier(num_classes)
        self.initialize()

    def initialize(self) -> None:
        """Caffe2's MSRA fill of the convolutions (normal, variance 2 / fan-out), as in VMZ and torchvision."""
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Conv3d)):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    @property
    def layers(self) -> Mapping[str, LayerInfo]:
        """The stages, in their order."""
        return self._layers

    @property
    def feature_dim(self) -> int:
        """Channels of the last stage."""
        return list(self._layers.values())[-1].channels

    def run_stage(self, name: str, x: Tensor) -> Tensor:
        """Run one of :attr:`layers`."""
        return self.get_submodule(name)(x)

    def run_trunk(self, x: Tensor, taps: Collection[str]) -> tuple[Tensor, dict[str, Tensor]]:
        """The last stage's feature map and the tapped ones."""
        self.check_taps(taps)
        kept: dict[str, Tensor] = {}
        for name in self._layers:
            x = self.run_stage(name, x)
            if name in taps:
                kept[name] = x
        return x, kept


def new_classifier(feature_dim: int, num_classes: int, like: Tensor) -> nn.Linear | None:
    """A linear classifier, N(0, 0.01²) with zero bias, on the device and of the type of ``like``; ``None`` for 0."""
    if not num_classes:
        return None
    classifier = nn.Linear(feature_dim, num_classes, device=like.device, dtype=like.dtype)
    nn.init.normal_(classifier.weight, 0.0, 0.01)
    nn.init.zeros_(classifier.bias)
    return classifier


def global_average(feature_map: Tensor) -> Tensor:
    """(B,D,T,H,W) → (B,D)."""
    return torch.mean(feature_map, dim=(2, 3, 4))


def check_choice(key: str, value: object, allowed: Collection[object]) -> None:
    """Raise :class:`UserError` when ``value`` is not one of ``allowed``."""
    if value not in allowed:
        raise UserError(f"{key} is {value!r}. Allowed: {', '.join(repr(option) for option in allowed)}.")
