"""What a configuration of PySlowFast means in this package's runner.

Networks that only PySlowFast has are written ``slowfast/NAME``; the bare name means the same. The keys that say what
such a network is keep their names (``MODEL.ARCH``, ``RESNET.TRANS_FUNC``, ``MVIT.DEPTH``, …) and are in the
configuration where they were given. A file of PySlowFast starts from PySlowFast's defaults, for which it was written.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from distinit_plugin.config.node import CfgNode, coerce, leaf_keys
from distinit_plugin.config.pyslowfast_keys import PYSLOWFAST_DEFAULTS
from distinit_plugin.config.rules import NETWORKS
from distinit_plugin.registry import MODELS

PREFIX = "slowfast/"
"""Before the names of PySlowFast's networks."""

THEIR_NETWORKS = (
    *("MViT", "PTVCSN", "PTVMViT", "PTVR2plus1D", "PTVResNet", "PTVSlowFast", "PTVX3D"),
    *("ResNet", "SlowFast", "X3D"),
)
"""Its classifiers of clips, as its registry has them at commit 287ec00."""

_ARCHITECTURE_NODES = ("MVIT.", "NONLOCAL.", "RESNET.", "SLOWFAST.", "X3D.")
_ARCHITECTURE_KEYS = (
    *("DATA.INPUT_CHANNEL_NUM", "DATA.REVERSE_INPUT_CHANNEL"),
    *("MODEL.ACT_CHECKPOINT", "MODEL.ARCH", "MODEL.DETACH_FINAL_FC", "MODEL.DROPCONNECT_RATE", "MODEL.FC_INIT_STD"),
    *("MODEL.HEAD_ACT", "MODEL.MULTI_PATHWAY_ARCH", "MODEL.SINGLE_PATHWAY_ARCH"),
)

_DECIDING_NODES = ("BN", "DATA", "MODEL", "RESNET", "RNG_SEED", "SOLVER", "TEST", "TRAIN")
"""Where a default decides about a result; others are about machines and folders."""

TOLD_BY_CONTENTS = ("TEST.CHECKPOINT_TYPE", "TRAIN.CHECKPOINT_TYPE")
"""Keys about what a file says itself."""

OWN_LOSSES = ("cross_entropy", "soft_cross_entropy")
"""MODEL.LOSS_FUNC that is ACTION.LOSS cross_entropy (labels are soft with MIXUP alone, of which a warning speaks)."""


def is_architecture(key: str) -> bool:
    """Whether a key of PySlowFast (or a node of keys) says what a network is, and no key of this package does."""
    if key == "RESNET.DEPTH":
        return False
    return (key in PYSLOWFAST_DEFAULTS and (key.startswith(_ARCHITECTURE_NODES) or key in _ARCHITECTURE_KEYS)) or (
        f"{key}.".startswith(_ARCHITECTURE_NODES) and any(known.startswith(f"{key}.") for known in PYSLOWFAST_DEFAULTS)
    )


def is_borrowed(name: str) -> bool:
    """Whether MODEL.MODEL_NAME or a teacher's ARCH is a network of PySlowFast, by its full name."""
    return name.startswith(PREFIX)


def full_name(name: str) -> str:
    """``slowfast/NAME`` for a name that only PySlowFast has; any other as it is."""
    return f"{PREFIX}{name}" if name in THEIR_NETWORKS and name not in NETWORKS and name not in MODELS else name


def is_their_file(contents: Mapping[str, Any], words: Collection[Any], own_nodes: Collection[str]) -> bool:
    """Whether a file is one of PySlowFast's: it names one of its networks, and has no node of this package.

    Args:
        contents: Of the file and what it inherits.
        words: ``KEY VALUE …`` over them.
        own_nodes: Nodes of this package in the most basic file that it inherits.
    """
    given = dict(zip(list(words)[0::2], list(words)[1::2], strict=False))
    model = contents.get("MODEL")
    named = model.get("MODEL_NAME", "SlowFast" if "ARCH" in model else "") if isinstance(model, Mapping) else ""
    name = str(given.get("MODEL.MODEL_NAME", named))
    return not own_nodes and is_borrowed(full_name(name))


def take_their_defaults(cfg: CfgNode) -> None:
    """Give the keys that decide about a result the values that they have in PySlowFast without being named."""
    for key in leaf_keys(cfg):
        *nodes, name = key.split(".")
        default = PYSLOWFAST_DEFAULTS.get(key)
        if key.split(".")[0] not in _DECIDING_NODES or default is None or default == []:
            continue  # nothing is written otherwise here: 0 for no clipping, one stage for no steps
        node = cfg
        for inner in nodes:
            node = node[inner]
        node[name] = coerce(default, node[name])


def keep_architecture(cfg: CfgNode, given: dict[str, tuple[Any, str]]) -> None:
    """Move what was given of a network of PySlowFast into the configuration, and write the network's full name.

    Args:
        cfg: The configuration.
        given: PySlowFast's keys that this package does not have → value and source. What is moved is gone from it.
    """
    cfg.MODEL.MODEL_NAME = full_name(cfg.MODEL.MODEL_NAME)
    if not is_borrowed(cfg.MODEL.MODEL_NAME):
        return
    for key in [key for key in given if is_architecture(key)]:
        node = cfg
        *nodes, name = key.split(".")
        for inner in nodes:
            if inner not in node:
                node[inner] = CfgNode()
            node = node[inner]
        node[name] = given.pop(key)[0]


def read_their_way(cfg: CfgNode) -> None:
    """Values that PySlowFast writes otherwise than this package, in a file of PySlowFast."""
    for use in ("TRAIN", "TEST"):
        if cfg[use].DATASET.lower() == "ptvkinetics":
            cfg[use].DATASET = "kinetics"  # the same lists; there the videos are read by PyTorchVideo
    solver = cfg.SOLVER
    if solver.LR_POLICY == "steps_with_relative_lrs":  # it has factors, or stages, that are never reached
        solver.STEPS = [start for start in solver.STEPS if start < solver.MAX_EPOCH]
        solver.LRS = solver.LRS[: len(solver.STEPS)]


def train_on_labels(cfg: CfgNode, given: Mapping[str, tuple[Any, str]]) -> tuple[list[str], set[str]]:
    """A file of PySlowFast that names no teachers trains on labels, as there.

    Args:
        cfg: The configuration.
        given: As for ``keep_architecture``.

    Returns:
        What stands against it, and the keys of ``given`` that are honoured so.
    """
    if cfg.ACTION.LOSS_WEIGHT > 0 or any(entry.LOSS_WEIGHT > 0 for entry in cfg.DISTILL.TEACHERS.values()):
        return [], set()
    loss, source = given.get("MODEL.LOSS_FUNC", (PYSLOWFAST_DEFAULTS["MODEL.LOSS_FUNC"], ""))
    if loss not in OWN_LOSSES:
        return [
            f"MODEL.LOSS_FUNC: {loss} (in {source}) is not a loss of this runner. Use cross_entropy, or run the file "
            "with distinit slowfast."
        ], set()
    cfg.ACTION.LOSS_WEIGHT = 1.0
    if any(cfg.CORPUS[use] for use in ("TRAIN", "VAL", "TEST")):
        return [], {"MODEL.LOSS_FUNC"}
    if not cfg.CORPUS.TARGET_FPS:
        rate, _ = given.get("DATA.TARGET_FPS", (PYSLOWFAST_DEFAULTS["DATA.TARGET_FPS"], ""))
        try:
            cfg.CORPUS.TARGET_FPS = coerce(rate, cfg.CORPUS.TARGET_FPS)
        except ValueError as error:
            return [f"DATA.TARGET_FPS: {error}."], {"MODEL.LOSS_FUNC"}
    return [], {"MODEL.LOSS_FUNC", "DATA.TARGET_FPS"}
