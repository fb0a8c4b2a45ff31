"""The part of a configuration that a PySlowFast without this package reads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from distinit_plugin.config.node import CfgNode, leaf_keys
from distinit_plugin.config.pyslowfast_keys import PYSLOWFAST_DEFAULTS
from distinit_plugin.config.theirs import PREFIX

FINE_TUNING = {"MODEL.LOSS_FUNC": "cross_entropy", "TRAIN.CHECKPOINT_EPOCH_RESET": True}
"""Keys by which PySlowFast starts from the weights of a checkpoint and trains on labels."""

_OFF_IS_NULL = ("SOLVER.CLIP_GRAD_VAL", "SOLVER.CLIP_GRAD_L2NORM")
"""Here 0 means off, there nothing does."""


def plain_yaml(cfg: CfgNode, unhonoured: Mapping[str, Any]) -> str:
    """A YAML file for PySlowFast: all of its keys that differ from its defaults, none of this package's nodes.

    Args:
        cfg: The configuration.
        unhonoured: PySlowFast's keys that the configuration gives and this package does not read → value.
    """
    values: dict[str, Any] = {key: _value(cfg, key) for key in leaf_keys(cfg) if key in PYSLOWFAST_DEFAULTS}
    values |= dict(unhonoured) | FINE_TUNING
    values["MODEL.MODEL_NAME"] = cfg.MODEL.MODEL_NAME.removeprefix(PREFIX)
    tree: dict[str, Any] = {}
    for key, value in sorted(values.items()):
        if _same(value, PYSLOWFAST_DEFAULTS[key]) or (key in _OFF_IS_NULL and value == 0):
            continue
        *nodes, name = key.split(".")
        inner = tree
        for node in nodes:
            inner = inner.setdefault(node, {})
        inner[name] = list(value) if isinstance(value, tuple) else value
    return yaml.safe_dump(tree, sort_keys=True, default_flow_style=None)


def _value(cfg: CfgNode, key: str) -> Any:
    value: Any = cfg
    for name in key.split("."):
        value = value[name]
    return value


def _same(value: Any, default: Any) -> bool:
    both_lists = isinstance(value, list | tuple) and isinstance(default, list | tuple)
    return list(value) == list(default) if both_lists else bool(value == default)
