"""PySlowFast's checkpoints with new heads beside the student: one further entry, with their share of the optimizer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

from torch import nn

from distinit_plugin.engine.checkpoint import load_checkpoint as read_checkpoint
from distinit_plugin.engine.checkpoint import save_checkpoint as write_checkpoint
from distinit_plugin.errors import WeightsError
from distinit_plugin.hosts.slowfast.distillation import HEADS, Heads, current, heads_of
from distinit_plugin.hosts.slowfast.settling import LOSS
from distinit_plugin.hosts.slowfast.traps import TEMPORARY

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


def with_heads(theirs: Callable[..., int]) -> Callable[..., int]:
    """``slowfast.utils.checkpoint.load_checkpoint``, which also puts back the heads where a training continues."""

    def load_checkpoint(
        path_to_checkpoint: str,
        model: nn.Module,
        data_parallel: bool = True,
        optimizer: Any = None,
        scaler: Any = None,
        **options: Any,
    ) -> int:
        heads = heads_of(model)
        if heads is not None and optimizer is not None and not options.get("epoch_reset"):
            optimizer = _JoinedOptimizer(optimizer, _load_heads(path_to_checkpoint, heads))
        return theirs(path_to_checkpoint, model, data_parallel, optimizer, scaler, **options)

    return load_checkpoint


def _load_heads(path: str, heads: Heads) -> Mapping[str, Any]:
    """Fill the heads; returns their share of the optimizer's state."""
    own = read_checkpoint(path).get(ENTRY)
    if not isinstance(own, Mapping) or not {"adapters", "optimizer"} <= own.keys():
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
    return cast(Mapping[str, Any], own["optimizer"])


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
        parameters = [parameter for parameter in heads.parameters() if parameter.requires_grad]
        flat = [parameter for parameter in parameters if cfg.SOLVER.ZERO_WD_1D_PARAM and parameter.ndim == 1]
        known = {id(parameter) for parameter in flat}
        others = [parameter for parameter in parameters if id(parameter) not in known]
        for group, decay in ((others, cfg.SOLVER.WEIGHT_DECAY), (flat, 0.0)):
            if group:
                settings = {"weight_decay": decay, "layer_decay": 1.0, "apply_LARS": False, OWN_GROUP: True}
                optimizer.add_param_group({"params": group, **settings})
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
