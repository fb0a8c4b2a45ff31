"""The terms of DISTILL and ACTION on a network that PySlowFast trains.

PySlowFast calls ``model(inputs)``, then ``loss(preds, labels)``, and neither sees more than that. So hooks on the model
take the teachers' tensors off its inputs and keep what the terms need of its output, and the loss of the same process
takes it from there. The student keeps its class, names and state dictionary: new heads are a submodule of it, so that
they move, train and are averaged over processes with it, but one that no state dictionary shows. Teachers are outside.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence
from functools import cached_property, partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from distinit_plugin import build
from distinit_plugin.config.node import CfgNode
from distinit_plugin.detection.network import RoiNetwork
from distinit_plugin.engine import distributed
from distinit_plugin.errors import UserError
from distinit_plugin.hosts.slowfast.corpora import UNLABELED
from distinit_plugin.hosts.slowfast.networks import Hosted, pathways
from distinit_plugin.hosts.slowfast.schema import own_cfg
from distinit_plugin.hosts.slowfast.stages import cut_pathways, trace_stages
from distinit_plugin.hosts.slowfast.teachers import Extras, student_specs
from distinit_plugin.models.maps import keep_map, kept_maps
from distinit_plugin.objectives import Objective, combine_counts
from distinit_plugin.objectives.adapters import layer_output, tapped_layers
from distinit_plugin.types import ACTIONS, BOXES, LayerInfo, ModelOutput, Network, Split, ViewSpec

HEADS = "distinit_heads"
"""Name of the submodule with the new heads."""

logger = logging.getLogger(__name__)

_current: list[Distillation] = []


class Heads(nn.Module):
    """New heads below a student, which no state dictionary of it shows."""

    def __init__(self, adapters: nn.ModuleDict) -> None:
        """Hold ``adapters``."""
        super().__init__()
        self.adapters = adapters
        self.register_load_state_dict_post_hook(_forget_heads)

    def state_dict(  # type: ignore[override]
        self, *_: Any, destination: dict[str, Any] | None = None, **__: Any
    ) -> dict[str, Any]:
        """Nothing."""
        return OrderedDict() if destination is None else destination


def _forget_heads(module: nn.Module, incompatible: Any) -> None:
    """Nobody misses them in a file."""
    missing = incompatible.missing_keys
    missing[:] = [key for key in missing if f"{HEADS}." not in key]


class HostStudent:
    """A network of PySlowFast, as far as terms must know it: its logits, what its classifier sees, and its stages.

    Attributes:
        classifier: Its last linear layer.
    """

    def __init__(self, model: nn.Module, specs: Mapping[str, ViewSpec], alpha: int) -> None:
        """Find the classifier.

        Args:
            model: PySlowFast's.
            specs: The clip.
            alpha: SLOWFAST.ALPHA of networks of two pathways, else 0.

        Raises:
            UserError: There is none.
        """
        linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
        if not linear:
            raise UserError(
                f"MODEL.MODEL_NAME: {type(model).__name__} ends in no linear layer, so no term can read it."
            )
        self.classifier = linear[-1]
        self._model, self._specs, self._alpha = model, specs, alpha
        (clip,) = specs.values()
        self._clip_size = (clip.channels, clip.num_frames or 1, clip.crop_size)

    @cached_property
    def layers(self) -> Mapping[str, LayerInfo]:
        """Stages whose output is a map; traced on first use."""
        return trace_stages(self._model, self._alpha, self._clip_size)

    @property
    def feature_dim(self) -> int:
        """Inputs of the classifier."""
        return self.classifier.in_features

    @property
    def num_classes(self) -> int:
        """Outputs of the classifier."""
        return self.classifier.out_features

    def view_specs(self, split: Split) -> Mapping[str, ViewSpec]:
        """The clip."""
        return self._specs

    def freeze_unreached(self, layers: Collection[str]) -> None:
        """Let what is behind the last of these layers stay as it is: processes would wait for its gradients."""
        channels, num_frames, size = self._clip_size
        trained = [parameter for parameter in self._model.parameters() if parameter.requires_grad]
        modes = {module: module.training for module in self._model.modules()}
        self._model.eval()  # so that nothing moves
        try:
            with torch.enable_grad(), kept_maps(self._model, layers) as kept:
                self._model(cut_pathways(torch.zeros(1, channels, num_frames, size, size), self._alpha))
        finally:
            for module, training in modes.items():
                module.training = training
        total = torch.stack([found.sum() for found in kept.values()]).sum()
        gradients = torch.autograd.grad(total, trained, allow_unused=True)
        for parameter, gradient in zip(trained, gradients, strict=True):
            parameter.requires_grad_(gradient is not None)


class _Replay(nn.Module):
    """In place of the student's forward pass, which has been."""

    def __init__(self, owner: Distillation) -> None:
        super().__init__()
        self._owner = [owner]

    def forward(
        self, views: Mapping[str, Tensor], boxes: Tensor | None = None
    ) -> tuple[ModelOutput, dict[str, Tensor]]:
        """What the pass gave."""
        return self._owner[0].take_predictions()


class Distillation:
    """The objective of the model that this process trains, with what its last forward pass left for the loss.

    Attributes:
        position: Where the training stands, in epochs.
        heads: The new heads.
    """

    def __init__(self, cfg: CfgNode, model: nn.Module, num_pathways: int, alpha: int = 0) -> None:
        """Build teachers and terms, put the heads below the model, watch it.

        Args:
            cfg: This package's view of the configuration.
            model: What PySlowFast will train.
            num_pathways: Tensors that it is given.
            alpha: SLOWFAST.ALPHA of PySlowFast's networks of two pathways, else 0.

        Raises:
            UserError: A term does not fit, or a teacher cannot be built.
        """
        self.position = 0.0
        self._extras = Extras(cfg)
        self._num_pathways = num_pathways
        self._flow = build.build_live_flow(cfg) if self._extras.computes_flow else None
        self._teachers = build.build_teachers(cfg)
        is_hosted = isinstance(model, Hosted)
        student: Any = model if is_hosted else HostStudent(model, student_specs(cfg, "train"), alpha)
        self._objective: Objective = build.build_objective(cfg, cast(Network, student), self._teachers)
        self._layers = {term.name: term.student_layer for term in self._objective.terms}
        self.names = list(self._layers)
        self.heads = Heads(self._objective.trainable.adapters)
        self._objective.wrap(lambda _: _Replay(self))
        self._own_logits = build.needs_own_logits(cfg)
        self._shown = next(  # the term whose target the output is compared with, for top1_err
            (
                term.name
                for term in self._objective.terms
                if term.teacher is not None and term.student_layer == "logits"
            ),
            None,
        )
        self._needs_labels = cfg.ACTION.LOSS_WEIGHT > 0
        self._seen: ModelOutput | None = None  # of the pass that is under way
        self._maps: dict[str, Tensor] = {}  # likewise, of PySlowFast's networks
        self._output: ModelOutput | None = None  # of the pass whose loss comes next
        self._tensors: Sequence[Tensor] = ()
        self._clip: Tensor | None = None
        self._boxes: Tensor | None = None  # of a network that classifies boxes
        self._predictions: dict[str, Tensor] | None = None
        self._watch(model, student, is_hosted)

    def _watch(self, model: nn.Module, student: Any, is_hosted: bool) -> None:
        taps = tapped_layers(self._layers.values())
        if is_hosted:
            student.taps = taps
            student.on_output = self._keep_output
            self._freeze_unreached(student)
        else:
            if not self._own_logits:  # it would never learn, and processes would wait for its gradient
                student.classifier.requires_grad_(False)
            if not {"logits", "features"}.intersection(self._layers.values()):
                student.freeze_unreached(taps)
            student.classifier.register_forward_pre_hook(self._keep_features)
            student.classifier.register_forward_hook(self._keep_logits)
            for name in taps:
                keep_map(model, name, partial(self._keep_map, model, name))
        if any(True for _ in self.heads.parameters()):
            model.add_module(HEADS, self.heads)
        model.register_forward_pre_hook(self._before)
        model.register_forward_hook(self._after)

    def _freeze_unreached(self, student: Any) -> None:
        """Layers behind the last one that is read stay as they are; processes would wait for their gradients."""
        if {"logits", "features"}.intersection(self._layers.values()) and not isinstance(student, RoiNetwork):
            return
        views = {
            name: torch.zeros(1, spec.channels, spec.num_frames or 1, spec.crop_size, spec.crop_size)
            for name, spec in student.view_specs("train").items()
        }
        unreached = set(self._objective.trainable.parameters_without_gradient(views))
        for name, parameter in self._objective.trainable.named_parameters():
            parameter.requires_grad_(parameter.requires_grad and name not in unreached)

    # -------------------------------------------------------------------------------------------- during the pass

    def _before(self, model: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        inputs = arguments[0]
        self._clip, self._tensors = inputs[0], inputs[self._num_pathways :]
        self._boxes = arguments[1] if len(arguments) > 1 else None
        return (inputs[: self._num_pathways], *arguments[1:])

    def _keep_output(self, output: ModelOutput) -> None:
        self._seen = output

    def _keep_features(self, classifier: nn.Module, arguments: tuple[Any, ...]) -> None:
        seen: Tensor = arguments[0]  # (B,D), or (B,T,H,W,D) of a head that classifies every place and averages
        features = seen if seen.ndim == 2 else seen.mean(dim=tuple(range(1, seen.ndim - 1)))
        self._seen = ModelOutput(None, features, {})

    def _keep_map(self, model: nn.Module, name: str, found: Tensor) -> None:
        if model.training and torch.is_grad_enabled():
            self._maps[name] = found

    def _keep_logits(self, classifier: nn.Module, arguments: tuple[Any, ...], logits: Tensor) -> None:
        if self._boxes is not None:  # of which PySlowFast's networks give probabilities
            assert self._seen is not None
            self._seen = self._seen._replace(logits=logits, boxes=self._boxes)

    def _after(self, model: nn.Module, arguments: tuple[Any, ...], preds: Tensor) -> Tensor | None:
        """Predictions of the terms; where nothing trains the student's own logits, the first of them are its output."""
        output, self._seen = self._seen, None
        maps, self._maps = self._maps, {}
        if not (model.training and torch.is_grad_enabled()):
            return None
        assert output is not None, "the classifier was not run"
        if not isinstance(model, Hosted):
            output = output._replace(logits=preds if output.logits is None else output.logits, taps=maps)
        predictions = {}
        for name, layer in self._layers.items():
            prediction = layer_output(output, layer, "the student")
            adapters = self.heads.adapters
            predictions[name] = adapters[name](prediction) if name in adapters else prediction
        self._output, self._predictions = output, predictions
        if self._own_logits:
            return None
        self._shown = next((name for name, prediction in predictions.items() if prediction.ndim == 2), None)
        return None if self._shown is None else predictions[self._shown]

    # -------------------------------------------------------------------------------------------- in the loss

    def take_predictions(self) -> tuple[ModelOutput, dict[str, Tensor]]:
        """What the last pass gave, once."""
        assert self._output is not None, "the loss was asked for before the model ran"
        assert self._predictions is not None
        output, predictions = self._output, self._predictions
        self._output = self._predictions = None
        logits = None if output.logits is None or not self._own_logits else output.logits.detach()
        return ModelOutput(logits, None, {}, boxes=output.boxes), predictions

    def loss(self, preds: Tensor, labels: Tensor) -> tuple[Tensor, list[float]]:
        """The weighted sum, and the mean of each term over the processes, unweighted, in the order of ``names``.

        Labels that say nothing about ``preds`` are replaced in place (``_set_labels``).
        """
        assert self._clip is not None, "the loss was asked for before the model ran"
        device = self._clip.device
        for teacher in self._teachers.values():
            cast(nn.Module, teacher).to(device)
        views, targets = self._extras.finish(self._tensors, self._flow)
        if self._boxes is not None:
            targets = {**targets, BOXES: self._boxes, ACTIONS: labels}
        elif self._needs_labels:
            targets = {**targets, "label": labels}
        prepared = self._objective.prepare({"student/clip": self._clip, **views}, targets)
        counts = None
        if self._objective.counts_vary:
            counts = combine_counts([prepared], distributed.world_size(), distributed.all_reduce_sum)
        if labels.ndim == 1:
            self._set_labels(labels, prepared.targets)
        step = self._objective.step(prepared, counts, self.position)
        terms = torch.stack([step.terms[f"loss/{name}"] for name in self.names])
        means = distributed.all_reduce_sum(terms) / distributed.world_size()
        self._tensors, self._clip, self._boxes = (), None, None
        return step.loss, means.tolist()

    def _set_labels(self, labels: Tensor, targets: Mapping[str, Any]) -> None:
        """Let PySlowFast's ``top1_err`` say how often the student disagrees with the first teacher of its classes.

        Labels of the corpus stay where they are the classes of ``preds``, which are the student's own logits then.
        """
        target = None if self._shown is None else targets[self._shown]
        best = target.argmax(dim=1) if target is not None and target.ndim == 2 else torch.full_like(labels, UNLABELED)
        labels.copy_(torch.where(labels == UNLABELED, best, labels) if self._own_logits else best)


class DistinitLoss(nn.Module):
    """MODEL.LOSS_FUNC ``distinit``: the terms of the model that this process trains."""

    def __init__(self, reduction: str = "mean") -> None:
        """``reduction`` is always mean there."""
        super().__init__()

    def forward(self, preds: Tensor, labels: Tensor) -> tuple[Tensor, list[float]]:
        """The loss, and its terms, which PySlowFast logs as ``loss_0``, ``loss_1``."""
        return current().loss(preds, labels)


def attach(cfg: Any, model: nn.Module) -> nn.Module:
    """Put the terms of a configuration of PySlowFast on a model that it will train; returns the model."""
    own = own_cfg(cfg)
    count = pathways(cfg, student_specs(own, "train"))
    is_two = count > 1 and not isinstance(model, Hosted)
    distillation = Distillation(own, model, count, int(cfg.SLOWFAST.ALPHA) if is_two else 0)
    _current[:] = [distillation]
    for number, name in enumerate(distillation.names):
        logger.info("loss_%d: %s", number, name)
    return model


def current() -> Distillation:
    """Of the model that was built last in this process."""
    assert _current, "no model was built with terms of DISTILL or ACTION"
    return _current[0]


def heads_of(model: nn.Module) -> Heads | None:
    """The new heads below a model, DDP or not; ``None`` without any."""
    inner = getattr(model, "module", model)
    found = inner._modules.get(HEADS)
    return found if isinstance(found, Heads) else None
