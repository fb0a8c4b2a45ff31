"""Which parts of a network are in training mode."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


def set_train_mode(trainable: nn.Module, frozen_trunk: bool, frozen_norm: bool = False) -> None:
    """Training mode; with ``frozen_trunk`` not for modules whose parameters are all frozen, nor for what is in them.

    A frozen trunk thus runs as it will at test time: its BN statistics neither move nor come from the batch. Parts
    without parameters of their own (dropout before the classifier) follow the module that they are in. With
    ``frozen_norm`` all of BN uses the statistics that it has, while its parameters train.
    """
    trainable.train()
    if frozen_trunk:
        _freeze_modes(trainable)
    if frozen_norm:
        for module in trainable.modules():
            if isinstance(module, _BatchNorm):
                module.eval()


def _freeze_modes(module: nn.Module) -> None:
    parameters = list(module.parameters())
    if parameters and not any(parameter.requires_grad for parameter in parameters):
        module.eval()
        return
    for child in module.children():
        _freeze_modes(child)
