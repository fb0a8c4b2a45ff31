"""The part of a configuration that a PySlowFast without this package reads."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from distinit_plugin.config.node import CfgNode, leaf_keys, same_value, value_at
from distinit_plugin.config.pyslowfast_keys import PYSLOWFAST_DEFAULTS
from distinit_plugin.config.theirs import PREFIX

CLIPS = {"MODEL.LOSS_FUNC": "cross_entropy"}
BOXES = {"MODEL.LOSS_FUNC": "bce", "MODEL.HEAD_ACT": "sigmoid"}
"""Keys by which PySlowFast trains on labels, of clips and of boxes."""

_ZERO_IS_DEFAULT = ("DETECTION.SPATIAL_SCALE_FACTOR", "SOLVER.CLIP_GRAD_L2NORM", "SOLVER.CLIP_GRAD_VAL")
"""Here 0 means off, or whatever it is; there the default does."""


def plain_problems(cfg: CfgNode) -> Iterator[str]:
    """What a configuration says that PySlowFast's keys cannot, one sentence each that begins with its key."""
    if cfg.RUNNER.SCHEDULE_UNIT != "epoch":
        yield (
            f"RUNNER.SCHEDULE_UNIT: {cfg.RUNNER.SCHEDULE_UNIT}, but PySlowFast counts in epochs. Set it to epoch, and "
            "SOLVER.MAX_EPOCH, STEPS and WARMUP_EPOCHS in epochs."
        )
    if cfg.SOLVER.LR_POLICY == "plateau":
        yield "SOLVER.LR_POLICY: PySlowFast has no plateau. Use cosine or steps_with_relative_lrs."


def holds_checkpoints(folder: str | Path) -> bool:
    """Whether PySlowFast would go on from a checkpoint in this OUTPUT_DIR, whatever it is told to start from."""
    return any("checkpoint" in path.name for path in Path(folder, "checkpoints").glob("*"))


def plain_yaml(cfg: CfgNode, unhonoured: Mapping[str, Any]) -> str:
    """A YAML file for PySlowFast: all of its keys that differ from its defaults, none of this package's nodes.

    An OUTPUT_DIR that holds checkpoints is left out.

    Args:
        cfg: The configuration.
        unhonoured: PySlowFast's keys that the configuration gives and this package does not read → value.
    """
    values: dict[str, Any] = {key: value_at(cfg, key) for key in leaf_keys(cfg) if key in PYSLOWFAST_DEFAULTS}
    values |= dict(unhonoured) | (BOXES if cfg.DETECTION.ENABLE else CLIPS)
    values["TRAIN.CHECKPOINT_EPOCH_RESET"] = True
    values["MODEL.MODEL_NAME"] = cfg.MODEL.MODEL_NAME.removeprefix(PREFIX)
    if cfg.BN.WEIGHT_DECAY == -1:
        values["BN.WEIGHT_DECAY"] = cfg.SOLVER.WEIGHT_DECAY
    if cfg.CORPUS.TARGET_FPS:
        values.setdefault("DATA.TARGET_FPS", round(cfg.CORPUS.TARGET_FPS))
    if holds_checkpoints(cfg.OUTPUT_DIR):
        del values["OUTPUT_DIR"]
    tree: dict[str, Any] = {}
    for key, value in sorted(values.items()):
        if same_value(value, PYSLOWFAST_DEFAULTS[key]) or (key in _ZERO_IS_DEFAULT and value == 0):
            continue
        *nodes, name = key.split(".")
        inner = tree
        for node in nodes:
            inner = inner.setdefault(node, {})
        inner[name] = list(value) if isinstance(value, tuple) else value
    return yaml.safe_dump(tree, sort_keys=True, default_flow_style=None)
