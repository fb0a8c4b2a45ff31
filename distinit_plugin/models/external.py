"""Video networks of torchvision and PyTorchVideo by name, behind the ``Network`` contract.

The final projection is taken out of the network and applied to its globally pooled input, so that features and logits
(before any softmax) are at hand in training and evaluation alike. State dicts keep the original implementation's keys.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as functional
import torchvision.models
from torch import Tensor, nn
from torchvision.models.video.swin_transformer import SwinTransformer3d

from distinit_plugin.errors import UserError
from distinit_plugin.models.conv3d import Conv3d, adopt_convolutions
from distinit_plugin.models.maps import FAST, kept_maps, trace_maps, two_pathways
from distinit_plugin.models.network import InputSpec, VideoNetwork
from distinit_plugin.models.residual import NO_FACTORS, NO_STEM_POOL
from distinit_plugin.registry import near_matches
from distinit_plugin.types import LayerInfo, ModelOutput

PYTORCHVIDEO_NAMES = (
    "c2d_r50",
    "csn_r101",
    "efficient_x3d_s",
    "efficient_x3d_xs",
    "i3d_r50",
    "mvit_base_16x4",
    "mvit_base_32x3",
    "r2plus1d_r50",
    "slow_r50",
    "slowfast_16x8_r101_50_50",
    "slowfast_r101",
    "slowfast_r50",
    "x3d_l",
    "x3d_m",
    "x3d_s",
    "x3d_xs",
)
"""Clip classifiers of ``pytorchvideo.models.hub`` (its detection and still-image networks need other inputs)."""

INFLATABLE = ("torchvision/r3d_18", "torchvision/mc3_18")
"""Networks that a 2D ResNet-18 can be inflated into."""

SLOWFAST_ALPHA = 4
"""Frames of the fast pathway for each frame of the slow one, in all of PyTorchVideo's SlowFast networks."""

TORCHVISION_MVIT_INPUT = (16, 224)
"""Frames and pixels that torchvision's MViT builders are fixed to."""


class ExternalNetwork(VideoNetwork):
    """A network of another library.

    Its global pools adapt to maps smaller than their kernels. SlowFast cuts its own two pathways from the one clip.
    """

    def __init__(self, name: str, *, num_classes: int, input: InputSpec, dropout: float = 0.0) -> None:
        """Build with random weights.

        Args:
            name: ``torchvision/NAME`` or ``pytorchvideo/NAME``.
            num_classes: K; 0: no classifier.
            input: The clip that the network is fed.
            dropout: Dropped fraction before the classifier (the library's own rate is not used).

        Raises:
            UserError: An unknown name, or an input that the network cannot take.
        """
        super().__init__(input)
        if input.modality != "rgb":
            raise UserError(f"NETWORK.MODALITY is {input.modality}, but {name} takes rgb only. Use rgb.")
        self.name = name
        self.dropout_rate = dropout
        self.model = _build(name, input)
        adopt_convolutions(self.model)
        self.projection_path, projection = _take_projection(self.model)
        self._projects_maps = isinstance(projection, nn.Conv3d)
        self._feature_dim = projection.in_channels if isinstance(projection, nn.Conv3d) else projection.in_features
        self._layers: Mapping[str, LayerInfo] | None = None
        self.projection: nn.Conv3d | nn.Linear | None = None
        _adapt_pools(self.model)
        self.register_state_dict_post_hook(_to_original_keys)
        self.register_load_state_dict_pre_hook(_from_original_keys)
        self.reset_classifier(num_classes)

    @property
    def image_trunks(self) -> Mapping[str, str]:
        """The full 3D ResNets of torchvision correspond to its 2D ones."""
        return {"": "resnet"} if self.name in INFLATABLE else {}

    @property
    def no_counterpart(self) -> str:
        """The R(2+1)D of torchvision is as ours."""
        return NO_FACTORS if self.name == "torchvision/r2plus1d_18" else super().no_counterpart

    @property
    def image_gaps(self) -> tuple[str, ...]:
        """Their stem has no pool."""
        return (NO_STEM_POOL,) if self.name in INFLATABLE else ()

    @property
    def layers(self) -> Mapping[str, LayerInfo]:
        """The blocks whose output is a (B,C,T,H,W) map, by module name.

        Of SlowFast's blocks that is the slow pathway's map; the fast one's is ``NAME.fast``.

        Traced on first use, without arithmetic.
        """
        if self._layers is None:
            self._layers = self._trace_layers()
        return self._layers

    @property
    def feature_dim(self) -> int:
        """Inputs of the final projection."""
        return self._feature_dim

    @property
    def num_classes(self) -> int:
        """Outputs of the final projection."""
        if self.projection is None:
            return 0
        return self.projection.weight.shape[0]

    def forward(
        self, views: Mapping[str, Tensor], *, boxes: Tensor | None = None, taps: Collection[str] = ()
    ) -> ModelOutput:
        """Run on ``views["rgb"]``, normalised (B,3,T,H,W)."""
        if taps:
            self.check_taps(taps)
        with kept_maps(self.model, taps, channels_last=self._channels_last) as kept:
            features = self.model(self._pathways(views["rgb"]))
        return ModelOutput(self._classify(features), features, kept)

    def reset_classifier(self, num_classes: int) -> None:
        """Put a fresh projection of the library's own kind, N(0, 0.01²) with zero bias; 0 removes it."""
        self.projection = None
        if num_classes:
            like = next(self.model.parameters())
            place: dict[str, Any] = {"device": like.device, "dtype": like.dtype}
            dim = self._feature_dim
            new = Conv3d(dim, num_classes, 1, **place) if self._projects_maps else nn.Linear(dim, num_classes, **place)
            nn.init.normal_(new.weight, 0.0, 0.01)
            if new.bias is not None:
                nn.init.zeros_(new.bias)
            self.projection = new

    def _classify(self, features: Tensor) -> Tensor | None:
        if self.projection is None:
            return None
        features = functional.dropout(features, self.dropout_rate, self.training)
        if self._projects_maps:
            return self.projection(features[:, :, None, None, None]).flatten(1)
        return self.projection(features)

    def _pathways(self, clip: Tensor) -> Tensor | list[Tensor]:
        """SlowFast's [slow, fast]; any other network's clip as it is."""
        return two_pathways(clip, SLOWFAST_ALPHA) if _is_slowfast(self.name) else clip

    @property
    def _channels_last(self) -> bool:
        return isinstance(self.model, SwinTransformer3d)

    def _trace_layers(self) -> dict[str, LayerInfo]:
        """The geometry of every block's output."""
        fixed = "mvit" in self.name
        num_frames, size = (self.input.num_frames, self.input.train_crop_size) if fixed else (64, 224)
        endings = ("", FAST) if _is_slowfast(self.name) else ("",)
        names = [f"{name}{ending}" for name in _block_names(self.model) for ending in endings]
        return trace_maps(self.model, names, self._pathways, (3, num_frames, size), channels_last=self._channels_last)


class ShrinkingAvgPool3d(nn.Module):
    """An average pool whose kernel shrinks to the map where the map is smaller."""

    def __init__(self, kernel_size: tuple[int, int, int]) -> None:
        """Take the kernel of the pool that is replaced; its stride is 1."""
        super().__init__()
        self.kernel_size = kernel_size

    def forward(self, x: Tensor) -> Tensor:
        """(B,C,T,H,W) → (B,C,T',H',W')."""
        kernel = [min(size, limit) for size, limit in zip(x.shape[2:], self.kernel_size, strict=True)]
        return functional.avg_pool3d(x, kernel, stride=1)


def _is_slowfast(name: str) -> bool:
    return name.startswith("pytorchvideo/slowfast")


def _build(name: str, input: InputSpec) -> nn.Module:
    library, _, model_name = name.partition("/")
    if library == "torchvision":
        known = torchvision.models.list_models(module=torchvision.models.video)
    elif library == "pytorchvideo":
        known = list(PYTORCHVIDEO_NAMES)
    else:
        raise UserError(
            f"MODEL.MODEL_NAME is '{name}': there is no library '{library}'."
            f"{near_matches(library, ['torchvision', 'pytorchvideo'])} Allowed: torchvision/NAME, pytorchvideo/NAME."
        )
    if model_name not in known:
        raise UserError(
            f"MODEL.MODEL_NAME is '{name}': {library} has no video network '{model_name}'."
            f"{near_matches(model_name, known)} Known: {', '.join(known)}."
        )
    arguments = _check_input(name, input)
    if library == "torchvision":
        return torchvision.models.get_model(model_name, weights=None)
    from pytorchvideo.models import hub  # seconds to import, and needed by these networks only

    if not model_name.startswith("mvit"):
        return hub.__dict__[model_name](pretrained=False, **arguments)
    place = torch.get_default_device()
    with torch.device("cpu"):  # its builder reads values of tensors, which a build on the meta device has not
        return hub.__dict__[model_name](pretrained=False, **arguments).to(place)


def _check_input(name: str, input: InputSpec) -> dict[str, Any]:
    """Builder arguments that depend on the clip; raises :class:`UserError` for a clip that cannot be taken."""
    frames, sizes = input.num_frames, {input.train_crop_size, input.test_crop_size}
    test_frames = input.test_num_frames or frames
    if "/mvit" in name and test_frames != frames:
        raise UserError(
            f"{name} has weights for each position in the clip, so CORPUS.TEST_NUM_FRAMES {test_frames} must be "
            f"DATA.NUM_FRAMES {frames}, or 0."
        )
    if _is_slowfast(name) and (frames % SLOWFAST_ALPHA or test_frames % SLOWFAST_ALPHA):
        raise UserError(
            f"{name} needs DATA.NUM_FRAMES and CORPUS.TEST_NUM_FRAMES divisible by {SLOWFAST_ALPHA} (its fast pathway "
            f"has {SLOWFAST_ALPHA} frames for one of the slow pathway); they are {frames} and {test_frames}."
        )
    if name.startswith("torchvision/mvit") and (frames, sizes) != (
        TORCHVISION_MVIT_INPUT[0],
        {TORCHVISION_MVIT_INPUT[1]},
    ):
        raise UserError(
            f"{name} takes clips of {TORCHVISION_MVIT_INPUT[0]} frames at {TORCHVISION_MVIT_INPUT[1]} pixels only; "
            f"DATA.NUM_FRAMES is {frames}, DATA.TRAIN_CROP_SIZE and TEST_CROP_SIZE are {sorted(sizes)}. "
            "pytorchvideo/mvit_base_16x4 takes other sizes."
        )
    if not name.startswith("pytorchvideo/mvit"):
        return {}
    if len(sizes) > 1:
        raise UserError(
            f"{name} has position embeddings of one size: set DATA.TRAIN_CROP_SIZE and DATA.TEST_CROP_SIZE to the same "
            f"number; they are {input.train_crop_size} and {input.test_crop_size}."
        )
    return {"spatial_size": input.train_crop_size, "temporal_size": frames}


def _take_projection(model: nn.Module) -> tuple[str, nn.Conv3d | nn.Linear]:
    """Replace the final projection, and the dropout and softmax around it, by identities.

    Returns:
        The projection's path and the projection.
    """
    found = [(path, module) for path, module in model.named_modules() if isinstance(module, (nn.Linear, nn.Conv3d))]
    path, projection = found[-1]
    parent_path, _, name = path.rpartition(".")
    model.get_submodule(parent_path).register_module(name, nn.Identity())
    if len(model.get_submodule(parent_path)._modules) == 1:  # a wrapper: dropout and softmax are one level up
        parent_path = parent_path.rpartition(".")[0]
    parent = model.get_submodule(parent_path)
    for name, sibling in list(parent.named_children()):
        if isinstance(sibling, (nn.Dropout, nn.Softmax)):
            parent.register_module(name, nn.Identity())
    return path, projection


def _adapt_pools(model: nn.Module) -> None:
    """Let the global average pools take smaller maps; SlowFast's are made to agree on one position."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.AvgPool3d):
                kernel = child.kernel_size
                size = (kernel,) * 3 if isinstance(kernel, int) else kernel
                joined = isinstance(parent, nn.ModuleList)
                new = nn.AdaptiveAvgPool3d(1) if joined else ShrinkingAvgPool3d((size[0], size[1], size[2]))
                parent.register_module(name, new)


def _block_names(model: nn.Module) -> Iterator[str]:
    """Children of the network, and of its list of blocks."""
    for name, child in model.named_children():
        if name in ("blocks", "features"):
            yield from (f"{name}.{key}" for key, _ in child.named_children())
        else:
            yield name


def _to_original_keys(module: nn.Module, state: dict[str, Any], prefix: str, _metadata: Any) -> None:
    """``model.KEY`` → ``KEY``; ``projection.KEY`` → the projection's place in the original."""
    assert isinstance(module, ExternalNetwork)
    renamed = {"model.": prefix, "projection.": f"{prefix}{module.projection_path}."}
    for key in list(state):
        for ours, theirs in renamed.items():
            if key.startswith(prefix + ours):
                state[theirs + key.removeprefix(prefix + ours)] = state.pop(key)
                break


def _from_original_keys(module: nn.Module, state: dict[str, Any], prefix: str, *_rest: Any) -> None:
    """The inverse of :func:`_to_original_keys`, run before loading."""
    assert isinstance(module, ExternalNetwork)
    projection = f"{prefix}{module.projection_path}."
    for key in [key for key in state if key.startswith(prefix)]:
        theirs, ours = (projection, "projection.") if key.startswith(projection) else (prefix, "model.")
        state[prefix + ours + key.removeprefix(theirs)] = state.pop(key)
