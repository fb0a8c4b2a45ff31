"""Networks of PySlowFast (``slowfast/ResNet``) as students and teachers of this package's own runner.

Their code is PySlowFast's, built by its registry from its configuration; what this package adds is outside of them, so
that a state dictionary is the one that PySlowFast saves and loads.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as functional
from fvcore.common.config import CfgNode as FvcoreNode
from torch import Tensor, nn

from distinit_plugin.config.pyslowfast_keys import PYSLOWFAST_DEFAULTS
from distinit_plugin.config.theirs import PREFIX, is_architecture
from distinit_plugin.config.yaml_files import parse_yaml
from distinit_plugin.errors import UserError
from distinit_plugin.hosts.slowfast.boot import make_importable
from distinit_plugin.hosts.slowfast.schema import nested, with_floats
from distinit_plugin.hosts.slowfast.stages import cut_pathways, trace_stages
from distinit_plugin.models.conv3d import adopt_convolutions
from distinit_plugin.models.maps import kept_maps
from distinit_plugin.models.network import InputSpec, VideoNetwork, new_classifier
from distinit_plugin.registry import MODELS, near_matches
from distinit_plugin.types import LayerInfo, ModelOutput

OTHER_TASKS = ("ContrastiveModel", "MaskMViT")
"""Names of its registry that do not classify clips."""

Joins = Callable[[Tensor], Tensor]


def build_network(
    name: str, *, num_classes: int, input: InputSpec, dropout: float = 0.0, description: str = ""
) -> BorrowedNetwork:
    """Build a network of PySlowFast with random weights.

    Args:
        name: ``slowfast/NAME``, a name of its registry.
        num_classes: K; 0: there are no logits, and the classifier (of ``MODEL.NUM_CLASSES``) does not train.
        input: The clip that the network is fed.
        dropout: Dropped fraction before the classifier.
        description: Text of a YAML file with PySlowFast's keys; those that are not of networks are passed over.

    Raises:
        UserError: There is no PySlowFast, it has no such network, or it does not build it so.
    """
    own = own_name(name)
    _check_input(name, input)
    make_importable()
    registry: Any = importlib.import_module("slowfast.models.build").MODEL_REGISTRY
    importlib.import_module("slowfast.models")
    builders = {key: builder for key, builder in registry if key not in OTHER_TASKS and key not in MODELS}
    if own not in builders:
        known = sorted(builders)
        task = " It does not classify clips." if own in OTHER_TASKS else ""
        raise UserError(
            f"MODEL.MODEL_NAME: PySlowFast has no network '{own}' for this.{task}{near_matches(own, known)} Known: "
            f"{', '.join(f'slowfast/{key}' for key in known)}."
        )
    cfg = _configuration(name, description)
    if num_classes:
        cfg.MODEL.NUM_CLASSES = num_classes
    cfg.MODEL.MODEL_NAME, cfg.MODEL.DROPOUT_RATE = own, dropout
    cfg.DATA.NUM_FRAMES = input.num_frames
    cfg.DATA.TRAIN_CROP_SIZE, cfg.DATA.TEST_CROP_SIZE = input.train_crop_size, input.test_crop_size
    cfg.DATA.INPUT_CHANNEL_NUM = [3] * (2 if cfg.MODEL.ARCH in cfg.MODEL.MULTI_PATHWAY_ARCH else 1)
    cfg.NUM_GPUS = 0  # it would move the network there by itself
    return BorrowedNetwork(name, _build(name, builders[own], cfg), cfg, input=input, classifies=num_classes > 0)


class BorrowedNetwork(VideoNetwork):
    """A network of PySlowFast behind this package's contract: logits, never probabilities, in training and evaluation.

    In evaluation its heads classify every place of maps that are larger than their pool, and average probabilities. The
    logits of such a clip are those whose softmax (or sigmoid) is that average.

    Attributes:
        model: PySlowFast's own, unchanged.
    """

    def __init__(self, name: str, model: nn.Module, cfg: Any, *, input: InputSpec, classifies: bool) -> None:
        """Take what ``build_network`` has built.

        Raises:
            UserError: It ends in no linear layer.
        """
        super().__init__(input)
        self.name = name
        self.model = model
        linear = [path for path, module in model.named_modules() if isinstance(module, nn.Linear)]
        if not linear:
            raise UserError(f"MODEL.MODEL_NAME: {name} ends in no linear layer, so it has neither logits nor features.")
        self._path = linear[-1]
        self._joins = _JOINS.get(str(cfg.MODEL.HEAD_ACT), _mean)
        self._alpha = int(cfg.SLOWFAST.ALPHA) if cfg.MODEL.ARCH in cfg.MODEL.MULTI_PATHWAY_ARCH else 0
        self._reversed = bool(cfg.DATA.REVERSE_INPUT_CHANNEL)
        self._layers: Mapping[str, LayerInfo] | None = None
        adopt_convolutions(model)
        self._classifies = classifies
        self.projection.requires_grad_(classifies)  # else nothing would train it
        names: Collection[str] = getattr(model, "no_weight_decay", tuple)()
        self.names_without_decay = tuple(names)

    @property
    def projection(self) -> nn.Linear:
        """The last linear layer."""
        layer = self.model.get_submodule(self._path)
        assert isinstance(layer, nn.Linear)
        return layer

    @property
    def layers(self) -> Mapping[str, LayerInfo]:
        """Its stages whose output is a map (B,C,T,H,W); of a second pathway ``NAME.fast``. Traced on first use."""
        if self._layers is None:
            clip = (3, self.input.num_frames, self.input.train_crop_size)
            self._layers = trace_stages(self.model, self._alpha, clip)
        return self._layers

    @property
    def feature_dim(self) -> int:
        """Inputs of the classifier."""
        return self.projection.in_features

    @property
    def num_classes(self) -> int:
        """Outputs of the classifier; 0 where it gives no logits."""
        return self.projection.out_features if self._classifies else 0

    @property
    def no_counterpart(self) -> str:
        """Its weights come from PySlowFast's files."""
        return "it is PySlowFast's. Start it from a file of its model zoo with TRAIN.CHECKPOINT_FILE_PATH"

    def forward(
        self, views: Mapping[str, Tensor], *, boxes: Tensor | None = None, taps: Collection[str] = ()
    ) -> ModelOutput:
        """Run on ``views["rgb"]``, normalised (B,3,T,H,W). Features are what the classifier is given."""
        if taps:
            self.check_taps(taps)
        seen: list[Tensor] = []
        handle = self.projection.register_forward_hook(lambda _, inputs, output: seen.extend((*inputs, output)))
        try:
            with kept_maps(self.model, taps) as kept:
                self.model(self._pathways(views["rgb"]))
        finally:
            handle.remove()
        features, logits = seen
        return ModelOutput(self._joins(_places(logits)) if self._classifies else None, _mean(_places(features)), kept)

    def reset_classifier(self, num_classes: int) -> None:
        """Put a fresh classifier, N(0, 0.01²) with zero bias; 0: the one that is there gives no logits and stays."""
        self._classifies = num_classes > 0
        if num_classes:
            parent, _, name = self._path.rpartition(".")
            fresh = new_classifier(self.feature_dim, num_classes, self.projection.weight)
            self.model.get_submodule(parent).register_module(name, fresh)
        self.projection.requires_grad_(self._classifies)

    def bare_state_dict(self) -> dict[str, Tensor]:
        """What PySlowFast saves as ``model_state``."""
        return dict(self.model.state_dict())

    def _pathways(self, clip: Tensor) -> list[Tensor]:
        """[clip], or [slow, fast]."""
        return cut_pathways(clip.flip(1) if self._reversed else clip, self._alpha)


def own_name(name: str) -> str:
    """``slowfast/NAME`` → ``NAME``; any other as it is."""
    return name.removeprefix(PREFIX)


def _check_input(name: str, input: InputSpec) -> None:
    if input.modality != "rgb":
        raise UserError(f"NETWORK.MODALITY is {input.modality}, but {name} takes rgb only. Use rgb.")
    if input.test_num_frames not in (None, input.num_frames):
        raise UserError(
            f"{name} is built for clips of DATA.NUM_FRAMES {input.num_frames}, but CORPUS.TEST_NUM_FRAMES is "
            f"{input.test_num_frames}. Set that to 0."
        )
    if own_name(name).endswith("MViT") and input.train_crop_size != input.test_crop_size:
        raise UserError(
            f"{name} has position embeddings of one size: set DATA.TRAIN_CROP_SIZE and DATA.TEST_CROP_SIZE to the same "
            f"number; they are {input.train_crop_size} and {input.test_crop_size}."
        )


def _configuration(name: str, description: str) -> Any:
    """PySlowFast's configuration with what a description says about the network.

    Raises:
        UserError: A value is not of the type that it has there.
    """
    cfg: Any = importlib.import_module("slowfast.config.defaults").get_cfg()
    values = parse_yaml(description, f"the description of {name}", repeats=True) or {}
    for key, value in _leaves(values, ""):
        if not (is_architecture(key) or key in ("RESNET.DEPTH", "MODEL.NUM_CLASSES")):
            continue
        tree = with_floats(nested(key.split("."), value), cfg)
        try:
            FvcoreNode.merge_from_other_cfg(cfg, FvcoreNode(tree))
        except (KeyError, ValueError, AssertionError) as error:
            raise UserError(
                f"{key}: {value!r} is not what PySlowFast takes ({str(error.args[0]).splitlines()[0][:200]}). Its "
                f"default is {PYSLOWFAST_DEFAULTS[key]!r}."
            ) from error
    return cfg


def _leaves(values: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        key = f"{prefix}{name}"
        if isinstance(value, Mapping) and key not in PYSLOWFAST_DEFAULTS:
            yield from _leaves(value, f"{key}.")
        else:
            yield key, value


def _build(name: str, builder: Callable[[Any], nn.Module], cfg: Any) -> nn.Module:
    place = torch.get_default_device()
    try:
        if place.type != "meta":
            return builder(cfg)
        with torch.device("cpu"):  # some read values of tensors, which a build on the meta device has not
            return builder(cfg).to(place)
    except (ArithmeticError, AssertionError, LookupError, RuntimeError, TypeError, ValueError) as error:
        said = (str(error).splitlines() or [""])[0][:200]
        raise UserError(
            f"PySlowFast does not build {name} so ({type(error).__name__}: {said}): check its keys "
            f"(MODEL.ARCH, RESNET, MVIT, X3D, SLOWFAST), DATA.NUM_FRAMES {cfg.DATA.NUM_FRAMES} and crops of "
            f"{cfg.DATA.TRAIN_CROP_SIZE}."
        ) from error


def _places(x: Tensor) -> Tensor:
    """(B,D) or (B,T,H,W,D) → (B,P,D), P the number of places."""
    return x.reshape(x.shape[0], -1, x.shape[-1])


def _mean(places: Tensor) -> Tensor:
    return places.mean(dim=1)


def _mean_softmax(logits: Tensor) -> Tensor:
    """(B,P,K) → (B,K) whose softmax is the mean over P of those of ``logits``; with one place the same logits.

    Their mean over classes is that of all places, which is near 0 mostly, so that nothing is lost to rounding.
    """
    if logits.shape[1] == 1:
        return logits[:, 0]
    joined = logits.log_softmax(dim=2).logsumexp(dim=1)
    return joined - joined.mean(dim=1, keepdim=True) + logits.mean(dim=(1, 2)).unsqueeze(1)


def _mean_sigmoid(logits: Tensor) -> Tensor:
    """The same for sigmoids."""
    if logits.shape[1] == 1:
        return logits[:, 0]
    return functional.logsigmoid(logits).logsumexp(dim=1) - functional.logsigmoid(-logits).logsumexp(dim=1)


_JOINS: dict[str, Joins] = {"softmax": _mean_softmax, "sigmoid": _mean_sigmoid}
"""MODEL.HEAD_ACT → logits of places → logits of clips."""
