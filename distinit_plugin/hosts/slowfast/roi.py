"""This package's networks for boxes in PySlowFast: the keys of every other host, and what no box reaches."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn

from distinit_plugin.detection.network import OWN_PREFIXES, RoiNetwork
from distinit_plugin.objectives import Trainable, action_term
from distinit_plugin.registry import LOSSES

TRUNK = "backbone."
"""Start of the backbone's keys in a RoiNetwork; its checkpoints have none."""

logger = logging.getLogger(__name__)


def use_bare_keys(network: RoiNetwork) -> None:
    """Let ``state_dict`` and ``load_state_dict`` of a network speak of its keys as its checkpoints do."""
    network._register_state_dict_hook(_shorten)
    network._register_load_state_dict_pre_hook(_lengthen)
    network.register_load_state_dict_post_hook(_shorten_names)


def _shorten(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    """``backbone.conv`` → ``conv``, in the order of before."""
    entries = [(key, state.pop(key)) for key in list(state) if key.startswith(prefix)]
    trunk = prefix + TRUNK
    state.update((prefix + key[len(trunk) :] if key.startswith(trunk) else key, value) for key, value in entries)


def _lengthen(state: dict[str, Any], prefix: str, *_: Any) -> None:
    """``conv`` → ``backbone.conv``."""
    for key in [key for key in state if key.startswith(prefix)]:
        name = key[len(prefix) :]
        if not name.startswith((TRUNK, *OWN_PREFIXES)):
            state[f"{prefix}{TRUNK}{name}"] = state.pop(key)


def _shorten_names(module: nn.Module, incompatible: Any) -> None:
    for names in (incompatible.missing_keys, incompatible.unexpected_keys):
        names[:] = [name.replace(TRUNK, "", 1) for name in names]


def freeze_unreached(network: RoiNetwork) -> None:
    """Layers behind the last one of which boxes are cut stay as they are; processes would wait for their gradients."""
    reached = Trainable(network, [action_term(LOSSES.get("bce"), 1.0)], {})
    views = {
        name: torch.zeros(1, spec.channels, spec.num_frames or 1, spec.crop_size, spec.crop_size)
        for name, spec in network.view_specs("train").items()
    }
    unreached = set(reached.parameters_without_gradient(views))
    for name, parameter in reached.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and name not in unreached)
    if unreached:
        logger.info("no box reaches %d parameters (%s, …): they stay as they are", len(unreached), min(unreached))
