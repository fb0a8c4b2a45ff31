"""PySlowFast's checkpoints with new heads beside the student: one further entry, with their share of the optimizer."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from distinit_plugin import build
from distinit_plugin.engine.checkpoint import is_of_runner
from distinit_plugin.engine.checkpoint import load_checkpoint as read_checkpoint
from distinit_plugin.engine.checkpoint import save_checkpoint as write_checkpoint
from distinit_plugin.engine.optim import parameter_groups
from distinit_plugin.engine.optimizer_layouts import in_order, joint, renumbered
from distinit_plugin.errors import WeightsError, naming
from distinit_plugin.hosts.slowfast.distillation import HEADS, Heads, current, heads_of
from distinit_plugin.hosts.slowfast.networks import Hosted
from distinit_plugin.hosts.slowfast.settling import LOSS
from distinit_plugin.hosts.slowfast.traps import TEMPORARY
from distinit_plugin.weights import load_weights

logger = logging.getLogger(__name__)

ENTRY = "distinit"
"""The further entry: ``adapters`` (as in this package's own checkpoints) and ``optimizer``."""

OWN_GROUP = "distinit"
"""Mark of the optimizer's groups that hold heads."""


def split_optimizer(state: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The student's and the heads' part of an optimizer's state."""
    groups = state["param_groups"]
    parts = []
    for own in (False, True):
        chosen = [group for group in groups if bool(group.get(OWN_GROUP)) == own]
        numbers = {number for group in chosen for number in group["params"]}
        slots = {number: slot for number, slot in state["state"].items() if number in numbers}
        parts.append({"state": slots, "param_groups": chosen})
    return parts[0], parts[1]


def join_optimizer(student: Mapping[str, Any], heads: Mapping[str, Any]) -> dict[str, Any]:
    """Undo ``split_optimizer``."""
    return {
        "state": {**student["state"], **heads["state"]},
        "param_groups": [*student["param_groups"], *heads["param_groups"]],
    }


def save_checkpoint(
    path_to_job: str, model: nn.Module, optimizer: Any, epoch: int, cfg: Any, scaler: Any = None
) -> str | None:
    """In place of ``slowfast.utils.checkpoint.save_checkpoint``: the same entries, written so that no half file stays.

    Raises:
        UserError: The folder cannot be written or the disk is full.
    """
    from slowfast.utils import checkpoint, distributed

    if not distributed.is_master_proc(cfg.NUM_GPUS * cfg.NUM_SHARDS):
        return None
    bare = cast(nn.Module, model.module if cfg.NUM_GPUS > 1 else model)
    heads = heads_of(bare)
    student, own = split_optimizer(optimizer.state_dict())
    state = {
        "epoch": epoch,
        "model_state": checkpoint.sub_to_normal_bn(bare.state_dict()),
        "optimizer_state": student,
        "cfg": cfg.dump(),
    }
    if scaler is not None:
        state["scaler_state"] = scaler.state_dict()
    if heads is not None:
        state[ENTRY] = {"adapters": heads.adapters.state_dict(), "optimizer": own}
    path: str = checkpoint.get_path_to_checkpoint(path_to_job, epoch + 1, cfg.TASK)
    write_checkpoint(path, state)
    return path


class _JoinedOptimizer:
    """An optimizer that is given the student's state and takes the heads' from the same file."""

    def __init__(self, optimizer: Any, own: Mapping[str, Any]) -> None:
        self._optimizer, self._own = optimizer, own

    def load_state_dict(self, student: Mapping[str, Any]) -> None:
        """Load both."""
        self._optimizer.load_state_dict(join_optimizer(student, self._own))


class _RenumberedOptimizer:
    """An optimizer that is given the state of this package's own runner."""

    def __init__(self, optimizer: Any, model: nn.Module) -> None:
        self._optimizer, self._model = optimizer, model

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Load it under PySlowFast's numbers.

        Raises:
            WeightsError: It is not of what trains here.
        """
        groups = self._optimizer.param_groups
        norms = {
            id(parameter)
            for module in self._model.modules()
            if isinstance(module, _NormBase)
            for parameter in module.parameters(recurse=False)
        }
        student, heads = ([group for group in groups if bool(group.get(OWN_GROUP)) == own] for own in (False, True))
        order = joint(student, heads, norms)
        current = self._optimizer.state_dict()["param_groups"]
        self._optimizer.load_state_dict(renumbered(saved, order, in_order(groups), current))


def with_heads(theirs: Callable[..., int]) -> Callable[..., int]:
    """``slowfast.utils.checkpoint.load_checkpoint``, which also puts back the heads where a training continues.

    From a file of this package's own runner it continues as well.
    """

    def load_checkpoint(
        path_to_checkpoint: str,
        model: nn.Module,
        data_parallel: bool = True,
        optimizer: Any = None,
        scaler: Any = None,
        **options: Any,
    ) -> int:
        bare = getattr(model, "module", model)
        if isinstance(bare, Hosted) and takes_weights_alone(optimizer, options):
            load_whole(bare, path_to_checkpoint, starts=optimizer is not None)
            return -1
        continues = optimizer is not None and not options.get("epoch_reset") and not options.get("convert_from_caffe2")
        if continues and (heads_of(model) is not None or os.path.isfile(path_to_checkpoint)):
            state = read_checkpoint(path_to_checkpoint)
            if isinstance(bare, Hosted):
                refuse_other_network(path_to_checkpoint, cast(nn.Module, bare).state_dict(), state["model_state"])
            optimizer = _with_file(optimizer, path_to_checkpoint, state, model)
            if scaler is not None and "scaler_state" not in state:
                logger.warning("%s was trained without fp16: its scale starts anew", path_to_checkpoint)
                scaler = None
        return theirs(path_to_checkpoint, model, data_parallel, optimizer, scaler, **options)

    return load_checkpoint


def takes_weights_alone(optimizer: Any, options: Mapping[str, Any]) -> bool:
    """Whether a call of ``load_checkpoint`` asks for the network's own weights, and for nothing beside or with them."""
    changes = ("inflation", "clear_name_pattern", "image_init")
    alone = optimizer is None or any(options.get(name) for name in ("epoch_reset", "convert_from_caffe2"))
    return alone and not any(options.get(name) for name in changes)


def load_whole(network: Any, path: str, *, starts: bool) -> None:
    """Put a file into a network of this package, as ``distinit run`` does, so that nothing goes missing unnoticed.

    Args:
        network: Without DDP.
        path: Any file that this package reads.
        starts: A training starts from it, and the classifier may be of other classes; else all must be there.

    Raises:
        WeightsError: The file is unreadable or of another network.
    """
    with naming("TRAIN.CHECKPOINT_FILE_PATH") if starts else nullcontext():
        report = load_weights(network, path, strict=not starts)
        if starts:
            build.refuse_part_of_a_trunk(report)
    logger.info("%s", report)


def refuse_other_network(path: str, own: Mapping[str, Tensor], saved: Mapping[str, Any]) -> None:
    """Raise :class:`WeightsError` where PySlowFast would continue with what a file has by the same name, and no more.

    Args:
        path: Of the file.
        own: The state of the network that continues.
        saved: The network's state in the file.
    """
    counters = "num_batches_tracked"
    missing = [
        key for key, value in own.items() if not key.endswith(counters) and shape_of(saved.get(key)) != value.shape
    ]
    if missing:
        raise WeightsError(
            f"{path} lacks {len(missing)} of {len(own)} tensors of this network ({', '.join(missing[:3])}, …), or has "
            "them in other sizes, so training cannot continue from it. Set TRAIN.CHECKPOINT_EPOCH_RESET True to start "
            "from its weights, in any layout."
        )


def shape_of(value: Any) -> torch.Size | None:
    """Of a tensor."""
    return value.shape if isinstance(value, Tensor) else None


def _with_file(optimizer: Any, path: str, state: Mapping[str, Any], model: nn.Module) -> Any:
    """Fill the heads from what a file holds; returns what takes the optimizer's state that is in it."""
    heads = heads_of(model)
    own = state.get(ENTRY)
    is_runners = is_of_runner(state)
    if heads is None:
        return _RenumberedOptimizer(optimizer, model) if is_runners else optimizer
    share = _load_heads(path, heads, own, is_runners)
    return _RenumberedOptimizer(optimizer, model) if is_runners else _JoinedOptimizer(optimizer, share)


def _load_heads(path: str, heads: Heads, own: Any, is_runners: bool) -> Mapping[str, Any]:
    """Fill the heads; returns their share of the optimizer's state, empty where that is not kept apart."""
    if not isinstance(own, Mapping) or "adapters" not in own or not (is_runners or "optimizer" in own):
        raise WeightsError(
            f"{path} has no heads for the terms {', '.join(heads.adapters)} with their share of the optimizer, so "
            "training cannot continue from it here. Set TRAIN.CHECKPOINT_EPOCH_RESET True to start from its weights."
        )
    try:
        heads.adapters.load_state_dict(own["adapters"])
    except RuntimeError as error:
        raise WeightsError(
            f"{path} holds heads of other terms ({str(error).splitlines()[0]}): set DISTILL as it was, or "
            "TRAIN.CHECKPOINT_EPOCH_RESET True."
        ) from error
    return cast(Mapping[str, Any], own.get("optimizer", {}))


def with_head_groups(theirs: Callable[[nn.Module, Any], Any]) -> Callable[[nn.Module, Any], Any]:
    """``slowfast.models.optimizer.construct_optimizer``, with the heads in groups of their own."""

    def construct_optimizer(model: nn.Module, cfg: Any) -> Any:
        heads = heads_of(model)
        if heads is None:
            return theirs(model, cfg)
        inner = cast(nn.Module, model.module if cfg.NUM_GPUS > 1 else model)
        del inner._modules[HEADS]
        try:
            optimizer = theirs(model, cfg)
        finally:
            inner.add_module(HEADS, heads)
        groups = parameter_groups(
            heads,
            weight_decay=cfg.SOLVER.WEIGHT_DECAY,
            bn_weight_decay=cfg.BN.WEIGHT_DECAY,
            zero_wd_1d=cfg.SOLVER.ZERO_WD_1D_PARAM,
        )
        for group in groups:
            optimizer.add_param_group({**group, OWN_GROUP: True})
        return optimizer

    return construct_optimizer


def with_position(theirs: Callable[[float, Any], float]) -> Callable[[float, Any], float]:
    """``slowfast.models.optimizer.get_epoch_lr``, which tells terms that warm up where the training stands."""

    def get_epoch_lr(cur_epoch: float, cfg: Any) -> float:
        if cfg.MODEL.LOSS_FUNC == LOSS:
            current().position = float(cur_epoch)
        return theirs(cur_epoch, cfg)

    return get_epoch_lr


class WholeFiles:
    """PySlowFast's path manager, which does not list what a killed process left of a file.

    The newest name in a folder of checkpoints would otherwise be such a one, and be loaded.
    """

    def __init__(self, theirs: Any) -> None:
        """In place of ``theirs``."""
        self._theirs = theirs

    def __getattr__(self, name: str) -> Any:
        return getattr(self._theirs, name)

    def ls(self, path: str, **options: Any) -> list[str]:
        """Names of whole files."""
        return [name for name in self._theirs.ls(path, **options) if not name.endswith(TEMPORARY)]


def replace_functions() -> None:
    """Put all of these in place of PySlowFast's."""
    from slowfast.models import optimizer
    from slowfast.utils import checkpoint

    module: Any = checkpoint
    module.pathmgr = WholeFiles(checkpoint.pathmgr)
    module.save_checkpoint = save_checkpoint
    module.load_checkpoint = with_heads(checkpoint.load_checkpoint)
    optimizer.construct_optimizer = with_head_groups(optimizer.construct_optimizer)
    optimizer.get_epoch_lr = with_position(optimizer.get_epoch_lr)
