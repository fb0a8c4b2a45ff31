"""Image classifiers of torchvision and timm behind the ``Network`` contract.

The frames of a view are folded into the batch; logits are averaged over them before any softmax (DistInit equation 1).

Shapes: B clips, T frames per clip, N = B·T images, K classes, D features, C channels of the feature map.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple, cast

import torch
import torchvision.models
from torch import Tensor, nn

from distinit_plugin.errors import UserError
from distinit_plugin.registry import near_matches
from distinit_plugin.types import LayerInfo, ModelOutput, Split, ViewSpec
from distinit_plugin.weights.sources import build_timm, timm_config

FEATURE_MAP = "feature_map"
"""Name of the one layer of an image network that can be tapped."""

_MAP_MODULES = ("features", "layers", "conv5", "blocks")
"""Child whose output is the last map, in torchvision's classifiers without a module ``avgpool``."""


class FrameOutput(NamedTuple):
    """What a network gives for N images."""

    logits: Tensor | None  # (N,K)
    features: Tensor  # (N,D)
    feature_map: Tensor | None  # (N,C,h,w); None: tokens that are not a grid


class ImageNetwork(nn.Module):
    """Base of the networks that see single frames. A subclass fills in :meth:`run_frames`.

    Attributes:
        averages_frames: See ``teachers.frames``.
    """

    averages_frames = True

    def __init__(self, body: nn.Module, view: ViewSpec, name: str) -> None:
        """Wrap ``body``, which :meth:`run_frames` runs on the frames that ``view`` describes."""
        super().__init__()
        self.body = body
        self.view = view
        self.name = name
        self._layers: dict[str, LayerInfo] = {}
        self._feature_dim = 0

    @property
    def num_classes(self) -> int:
        """K, the outputs of the classifier; 0 without one."""
        return 0

    def run_frames(self, frames: Tensor) -> FrameOutput:
        """Run on normalised images (N,3,H,W)."""
        raise NotImplementedError

    def reset_classifier(self, num_classes: int) -> None:
        """Put a fresh classifier with ``num_classes`` outputs; 0 removes it (``logits`` is then ``None``)."""
        raise NotImplementedError

    def measure(self) -> None:
        """Find the feature map's geometry with one blank frame.

        Raises:
            UserError: The network cannot take frames of this size.
        """
        size = self.view.crop_size
        was_training = self.training
        self.eval()
        try:
            with torch.inference_mode():
                output = self.run_frames(torch.zeros(1, 3, size, size))
        except (RuntimeError, AssertionError, ValueError) as error:
            raise UserError(
                f"teacher {self.name} cannot take frames of {size}×{size} pixels ({error}). Set its CROP_SIZE to the "
                "size that it was trained with, mostly 224."
            ) from error
        finally:
            self.train(was_training)
        self._feature_dim = output.features.shape[1]
        if output.feature_map is not None:
            _, channels, height, _ = output.feature_map.shape
            self._layers = {FEATURE_MAP: LayerInfo(channels, 1, max(1, round(size / height)))}

    @property
    def layers(self) -> Mapping[str, LayerInfo]:
        """``feature_map``: what is pooled into the features."""
        return self._layers

    @property
    def feature_dim(self) -> int:
        """D: inputs of the classifier."""
        return self._feature_dim

    def view_specs(self, split: Split) -> Mapping[str, ViewSpec]:
        """One view named ``rgb``, the same in every split."""
        return {"rgb": self.view}

    def forward(
        self, views: Mapping[str, Tensor], *, boxes: Tensor | None = None, taps: Collection[str] = ()
    ) -> ModelOutput:
        """Run on ``views["rgb"]``, normalised (B,3,T,H,W).

        Returns:
            Logits (B,K) and features (B,D), fp32, averaged over frames; the tap ``feature_map`` (B,C,T,h,w).
        """
        for name in taps:
            if name not in self.layers:
                known = ", ".join(self.layers) or "none"
                raise UserError(f"teacher {self.name} has no layer '{name}'. Known: {known}.")
        clip = views["rgb"]
        shape = (clip.shape[0], clip.shape[2])
        output = self.run_frames(clip.transpose(1, 2).flatten(0, 1))
        kept = {}
        if taps and output.feature_map is not None:
            kept[FEATURE_MAP] = output.feature_map.unflatten(0, shape).transpose(1, 2)
        logits = None if output.logits is None else _average(output.logits, shape)
        return ModelOutput(logits, _average(output.features, shape), kept)

    def bare_state_dict(self) -> dict[str, Tensor]:
        """The weights under the library's own keys."""
        return dict(self.body.state_dict())


def _average(per_frame: Tensor, shape: tuple[int, int]) -> Tensor:
    return per_frame.float().unflatten(0, shape).mean(dim=1)


class TorchvisionClassifier(ImageNetwork):
    """Any image classifier of torchvision."""

    def __init__(self, model: str, num_classes: int, view: ViewSpec, *, transform_input: bool = False) -> None:
        """Build with random weights.

        Args:
            model: torchvision's name.
            num_classes: K.
            view: The frames that it sees.
            transform_input: GoogLeNet and Inception v3 alone: expect ImageNet's mean and std and rescale inside, as
                their published weights need.

        Raises:
            UserError: No such classifier, or a size that it cannot take.
        """
        options: dict[str, Any] = {}
        if model in ("googlenet", "inception_v3"):
            options = {"transform_input": transform_input, "aux_logits": False, "init_weights": False}
        body = build_torchvision(torchvision.models, model, num_classes=num_classes, **options)
        super().__init__(body, view, f"torchvision/{model}")
        self._classifier_path = _classifier_path(body)
        self.measure()

    @property
    def num_classes(self) -> int:
        """Outputs of the last layer."""
        last = self.body.get_submodule(self._classifier_path)
        return 0 if isinstance(last, nn.Identity) else len(cast(Tensor, last.weight))

    def run_frames(self, frames: Tensor) -> FrameOutput:
        """Logits from the whole network, the rest caught on the way."""
        seen: dict[str, Tensor] = {}
        handles = [
            self.body.get_submodule(self._classifier_path).register_forward_pre_hook(_keep_input(seen, "features")),
            _watch_map(self.body, seen),
        ]
        try:
            logits = self.body(frames)
        finally:
            for handle in handles:
                handle.remove()
        features = seen["features"]
        if features.ndim == 4:  # SqueezeNet classifies the map and pools afterwards
            features = features.mean(dim=(2, 3))
        if not isinstance(logits, Tensor):  # in training, GoogLeNet and Inception return auxiliary logits too
            logits = logits[0]
        return FrameOutput(logits if self.num_classes else None, features, _as_map(seen["map"], 1))

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the last layer."""
        parent, _, name = self._classifier_path.rpartition(".")
        like = next(self.body.parameters())
        new: nn.Module = nn.Identity()
        if num_classes and "squeezenet" in self.name:
            new = nn.Conv2d(self.feature_dim, num_classes, 1)
        elif num_classes:
            new = nn.Linear(self.feature_dim, num_classes)
        self.body.get_submodule(parent).register_module(name, new.to(like))


class TimmClassifier(ImageNetwork):
    """Any image network of timm, classifier or backbone."""

    def __init__(self, model: str, num_classes: int | None, view: ViewSpec, *, pretrained: bool = False) -> None:
        """Build.

        Args:
            model: timm's name, with or without the tag of its weights (``vit_small_patch16_224.dino``).
            num_classes: K; ``None``: as the weights have; 0: no classifier.
            view: The frames that it sees. Networks with a fixed input size are built for this one.
            pretrained: Load timm's own weights.

        Raises:
            UserError: No such network, or a size that it cannot take.
            WeightsError: ``pretrained``, and the weights are not to be had.
        """
        options: dict[str, Any] = {} if num_classes is None else {"num_classes": num_classes}
        config = timm_config(model)
        if config is not None and config.fixed_input_size and config.input_size[-1] != view.crop_size:
            options["img_size"] = view.crop_size
        body = build_timm(model, pretrained=pretrained, **options)
        super().__init__(body, view, f"timm/{model}")
        self.measure()

    @property
    def num_classes(self) -> int:
        """Outputs of timm's classifier."""
        return int(self.body.num_classes)  # type: ignore[arg-type]

    def run_frames(self, frames: Tensor) -> FrameOutput:
        """Trunk, then the head with and without its last layer."""
        body: Any = self.body
        trunk = body.forward_features(frames)
        features = body.forward_head(trunk, pre_logits=True)
        logits = body.forward_head(trunk) if self.num_classes else None
        if isinstance(logits, tuple | list):  # distilled transformers, in training
            logits = logits[0]
        prefix_tokens = int(getattr(body, "num_prefix_tokens", 0))
        if trunk.ndim == 4 and trunk.shape[1] != body.num_features and trunk.shape[3] == body.num_features:
            trunk = trunk.permute(0, 3, 1, 2)  # Swin and its kin keep channels last
        return FrameOutput(logits, features, _as_map(trunk, prefix_tokens))

    def reset_classifier(self, num_classes: int) -> None:
        """Ask timm."""
        body: Any = self.body
        body.reset_classifier(num_classes)


def build_torchvision(module: Any, model: str, **options: Any) -> nn.Module:
    """A network of one of torchvision's model modules, with random weights and no download.

    Raises:
        UserError: No such network there.
    """
    known = torchvision.models.list_models(module=module)
    if model not in known:
        raise UserError(f"torchvision has no such teacher: '{model}'.{near_matches(model, known)}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # about the initialisation of GoogLeNet
        return torchvision.models.get_model(model, weights=None, **options)


def _classifier_path(body: nn.Module) -> str:
    """The last linear layer; SqueezeNet has a convolution in its place."""
    paths = [name for name, module in body.named_modules() if isinstance(module, nn.Linear)]
    paths = paths or [name for name, module in body.named_modules() if isinstance(module, nn.Conv2d)]
    return paths[-1]


def _keep_input(seen: dict[str, Tensor], key: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    def hook(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        seen[key] = inputs[0]

    return hook


def _watch_map(body: nn.Module, seen: dict[str, Tensor]) -> torch.utils.hooks.RemovableHandle:
    """Catch what enters the pool, or leaves the trunk where the pool is not a module."""
    children = dict(body.named_children())
    if "avgpool" in children:
        return children["avgpool"].register_forward_pre_hook(_keep_input(seen, "map"))

    def keep_output(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        seen["map"] = output

    if "encoder" in children:  # ViT
        return children["encoder"].register_forward_hook(keep_output)
    trunk = children[next(name for name in _MAP_MODULES if name in children)]
    return (trunk[-1] if isinstance(trunk, nn.ModuleList) else trunk).register_forward_hook(keep_output)


def _as_map(trunk: Tensor, prefix_tokens: int) -> Tensor | None:
    """(N,C,h,w) from a map or from tokens (N, prefix + h², C); ``None`` when the tokens are no square grid."""
    if trunk.ndim == 4:
        return trunk
    if trunk.ndim != 3:
        return None
    tokens = trunk[:, prefix_tokens:]
    side = round(tokens.shape[1] ** 0.5)
    if side * side != tokens.shape[1]:
        return None
    return tokens.transpose(1, 2).unflatten(2, (side, side))
