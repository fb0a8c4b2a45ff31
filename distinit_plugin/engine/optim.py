"""Optimizers with PySlowFast's parameter groups, and gradient clipping."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from distinit_plugin.errors import UserError
from distinit_plugin.registry import near_matches

METHODS = ("sgd", "adamw")


def build_optimizer(
    module: nn.Module,
    method: str,
    *,
    lr: float,
    momentum: float = 0.9,
    dampening: float = 0.0,
    nesterov: bool = True,
    betas: tuple[float, float] = (0.9, 0.999),
    weight_decay: float = 0.0,
    bn_weight_decay: float = -1.0,
    zero_wd_1d: bool = False,
) -> torch.optim.Optimizer:
    """An optimizer over every trainable parameter of ``module``, each exactly once.

    PyTorch chooses its multi-tensor update by itself where that is faster (on accelerators).

    Args:
        module: Its frozen parameters are left out.
        method: ``sgd`` or ``adamw``.
        lr: Learning rate, above 0.
        momentum: Of SGD.
        dampening: Of SGD.
        nesterov: Of SGD; needs momentum and no dampening.
        betas: Of AdamW.
        weight_decay: Of all parameters but those that the next two name. AdamW's is decoupled, SGD's is not.
        bn_weight_decay: Of the parameters of normalisation layers with batch or instance statistics; −1: as the rest.
        zero_wd_1d: No weight decay for biases and other one-dimensional parameters outside of those layers.

    Raises:
        UserError: Nothing is trainable, there is no such method, or a value is out of range.
    """
    if method not in METHODS:
        raise UserError(
            f"SOLVER.OPTIMIZING_METHOD is '{method}'.{near_matches(method, list(METHODS))} Allowed: "
            f"{', '.join(METHODS)}."
        )
    _check_not_negative({"SOLVER.BASE_LR": lr, "SOLVER.WEIGHT_DECAY": weight_decay, "SOLVER.MOMENTUM": momentum})
    if bn_weight_decay != -1:
        _check_not_negative({"BN.WEIGHT_DECAY": bn_weight_decay})
    groups = parameter_groups(module, weight_decay=weight_decay, bn_weight_decay=bn_weight_decay, zero_wd_1d=zero_wd_1d)
    if method == "adamw":
        if not all(0 <= beta < 1 for beta in betas):
            raise UserError(f"SOLVER.BETAS are {betas}; both must be at least 0 and below 1.")
        return torch.optim.AdamW(groups, lr=lr, betas=betas)
    if nesterov and (momentum == 0 or dampening != 0):
        raise UserError(
            f"SOLVER.NESTEROV needs SOLVER.MOMENTUM above 0 and SOLVER.DAMPENING 0, they are {momentum} and "
            f"{dampening}. Set SOLVER.NESTEROV False."
        )
    return torch.optim.SGD(groups, lr=lr, momentum=momentum, dampening=dampening, nesterov=nesterov)


def parameter_groups(
    module: nn.Module, *, weight_decay: float, bn_weight_decay: float, zero_wd_1d: bool
) -> list[dict[str, Any]]:
    """Trainable parameters by weight decay, in PySlowFast's order: normalisation, others, without decay.

    Empty groups are left out; arguments as in ``build_optimizer``. Parameters whose names hold one of a module's
    ``names_without_decay`` have none. Each group also says what PySlowFast reads in it.

    Raises:
        UserError: Nothing is trainable.
    """
    normalisation: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    without_decay: list[nn.Parameter] = []
    seen: set[int] = set()
    exempt = {
        id(parameter)
        for owner in module.modules()
        for parts in [getattr(owner, "names_without_decay", ())]
        for name, parameter in (owner.named_parameters() if parts else ())
        if any(part in name for part in parts)
    }
    for owner in module.modules():
        for name, parameter in owner.named_parameters(recurse=False):
            if not parameter.requires_grad or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            if isinstance(owner, _NormBase):
                normalisation.append(parameter)
            elif id(parameter) in exempt or (zero_wd_1d and (parameter.ndim <= 1 or name == "bias")):
                without_decay.append(parameter)
            else:
                others.append(parameter)
    if not seen:
        raise UserError("nothing is trainable: every parameter of the student and its heads is frozen.")
    groups = [
        {"params": normalisation, "weight_decay": weight_decay if bn_weight_decay == -1 else bn_weight_decay},
        {"params": others, "weight_decay": weight_decay},
        {"params": without_decay, "weight_decay": 0.0},
    ]
    return [{**group, "layer_decay": 1.0, "apply_LARS": False} for group in groups if group["params"]]


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every parameter group this learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def clip_gradients(parameters: Iterable[nn.Parameter], value: float = 0.0, l2norm: float = 0.0) -> Tensor:
    """Clip gradients in place: first each entry to ± ``value``, then all together to the norm ``l2norm``.

    Args:
        parameters: Those without a gradient are passed over.
        value: 0: off.
        l2norm: 0: off.

    Returns:
        The global L2 norm before any clipping, 0-d, on the gradients' device; 0 without gradients.
    """
    with_gradient = [parameter for parameter in parameters if parameter.grad is not None]
    gradients = [parameter.grad for parameter in with_gradient if parameter.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    clipped_norm = norm
    if value > 0:
        torch.nn.utils.clip_grad_value_(with_gradient, value)
        if l2norm > 0:
            clipped_norm = torch.nn.utils.get_total_norm(gradients)
    if l2norm > 0:
        torch.nn.utils.clip_grads_with_norm_(with_gradient, l2norm, clipped_norm)
    return norm


def _check_not_negative(values: dict[str, float]) -> None:
    for key, value in values.items():
        if not (value >= 0 and math.isfinite(value)):
            raise UserError(f"{key} is {value}; it must be a finite number, at least 0.")
