"""Everything of this package in PySlowFast's registries."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial, wraps
from typing import Any

from torch import nn

from distinit_plugin.hosts.slowfast import checkpoints, keyframes
from distinit_plugin.hosts.slowfast.corpora import Distinitcorpus
from distinit_plugin.hosts.slowfast.detection_defects import cure_tools, has_meter
from distinit_plugin.hosts.slowfast.distillation import DistinitLoss, attach
from distinit_plugin.hosts.slowfast.networks import build_hosted
from distinit_plugin.hosts.slowfast.schema import own_cfg
from distinit_plugin.hosts.slowfast.settling import LOSS, can_validate, has_terms
from distinit_plugin.registry import MODELS

logger = logging.getLogger(__name__)

_training: list[bool] = [False]


def register() -> None:
    """Networks, corpora, losses; once in a process, after PySlowFast's own are registered."""
    from slowfast.datasets.build import DATASET_REGISTRY
    from slowfast.models import build, losses

    registry = build.MODEL_REGISTRY
    for name, _ in MODELS:
        if name not in registry:
            registry._do_register(name, _builder(name))
    their_get = registry.get
    registry.get = lambda name: partial(_build, _builder(name) if "/" in name else their_get(name))
    for dataset in (Distinitcorpus, keyframes.Distinitava):
        if dataset.__name__ not in DATASET_REGISTRY:
            DATASET_REGISTRY.register(dataset)
    losses._LOSSES[LOSS] = DistinitLoss
    checkpoints.replace_functions()
    if has_meter():
        keyframes.replace_functions()


def _builder(name: str) -> Callable[[Any], nn.Module]:
    """What MODEL_REGISTRY holds for one of this package's networks."""

    def build_own(cfg: Any) -> nn.Module:
        own = own_cfg(cfg)
        own.MODEL.MODEL_NAME = name
        return build_hosted(own, has_terms=has_terms(own), initialize=_training[0], activation=str(cfg.MODEL.HEAD_ACT))

    return build_own


def _build(builder: Callable[[Any], nn.Module], cfg: Any) -> nn.Module:
    """A model by its builder, with the terms on it where it will be trained."""
    model = builder(cfg)
    return attach(cfg, model) if _training[0] and has_terms(own_cfg(cfg)) else model


@contextmanager
def _for_training() -> Iterator[None]:
    before = _training[0]
    _training[0] = True
    try:
        yield
    finally:
        _training[0] = before


def fit_train_net() -> None:
    """Let ``tools/train_net.py`` train what it builds with terms, and leave out validations that there are none of."""
    cure_tools()
    from vision.fair.slowfast.tools import train_net

    if hasattr(train_net.build_model, "__wrapped__"):
        return
    build_model, eval_epoch = train_net.build_model, train_net.eval_epoch

    @wraps(build_model)
    def build_to_train(*arguments: Any, **options: Any) -> nn.Module:
        with _for_training():
            model: nn.Module = build_model(*arguments, **options)
        return model

    @wraps(eval_epoch)
    def evaluate(val_loader: Any, model: nn.Module, val_meter: Any, cur_epoch: int, cfg: Any, *others: Any) -> None:
        if not can_validate(cfg):
            logger.info("no validation: there are no videos for it (CORPUS.VAL), or no classifier is trained")
            return
        eval_epoch(val_loader, model, val_meter, cur_epoch, cfg, *others)

    train_net.build_model, train_net.eval_epoch = build_to_train, evaluate
