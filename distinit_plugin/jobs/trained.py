"""A network from a file of this program, which says itself what it is, on any machine."""

from __future__ import annotations

import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from distinit_plugin import build
from distinit_plugin.config.load import parse_cfg
from distinit_plugin.config.node import CfgNode
from distinit_plugin.config.validate import network_problems, precision_problems
from distinit_plugin.engine.checkpoint import load_checkpoint
from distinit_plugin.errors import ConfigError, UserError, WeightsError, shown
from distinit_plugin.jobs.described import NEUTRAL_RANGE, description_in
from distinit_plugin.types import Network
from distinit_plugin.weights import load_weights, read_checkpoint
from distinit_plugin.weights.image_networks import is_image_network

INPUT_KEYS = ("DATA.NUM_FRAMES", "DATA.SAMPLING_RATE", "DATA.TEST_CROP_SIZE", "DATA.MEAN", "DATA.STD")
"""What a network is fed: the keys that a user of a file may set."""

FURTHER_KEYS = ("CORPUS.TARGET_FPS", "CORPUS.TEST_SCALE", "FLOW.BACKEND", "FLOW.WEIGHTS", "FLOW.BOUND")
"""How videos are read for it: the user may set these, too; a file that does not say them means the defaults."""

COMPUTING_KEYS = ("RUNNER.PRECISION",)
"""How it computes: keys of the verbs that run it."""

ADVICE = "Weights of other programs are translated by distinit convert-weights first."


@dataclass(frozen=True)
class Trained:
    """What a file says about its network.

    Attributes:
        path: The file.
        cfg: Of its training, with the device of this machine, and its precision unless the training was in fp32; of a
            converted file what is known of it.
        num_classes: Outputs of its classifier; 0: it gives no logits.
        class_names: Of its classes; empty where they are not known.
    """

    path: str
    cfg: CfgNode
    num_classes: int
    class_names: list[str] = field(default_factory=list)

    @property
    def has_classifier(self) -> bool:
        """Whether the network gives logits."""
        return self.num_classes > 0

    def network(self) -> Network:
        """The network with its weights.

        Raises:
            WeightsError: They do not fit it.
        """
        network = build.build_network(self.cfg, num_classes=self.num_classes)
        load_weights(network, self.path, strict=True)
        return network


def read_trained(
    checkpoint: str, opts: Sequence[str] = (), *, more_keys: Collection[str] = (), boxes: bool = False
) -> Trained:
    """Read what a file says about its network; what it does not say is assumed, in one line on standard error.

    Args:
        checkpoint: A file that ``distinit run``, ``distinit probe`` or ``distinit convert-weights`` wrote.
        opts: ``KEY VALUE …`` of :data:`INPUT_KEYS` and :data:`FURTHER_KEYS` instead of what the file says.
        more_keys: Keys that are allowed, too.
        boxes: The caller takes networks that see boxes in keyframes.

    Raises:
        UserError: The file is unreadable or of another program, a key or value is not allowed, or the network sees
            boxes and the caller does not take such a one.
    """
    keys = (*INPUT_KEYS, *FURTHER_KEYS, *more_keys)
    for key in opts[0::2]:
        if key not in keys:
            raise UserError(f"--opts: {key} cannot be set here. Allowed: {', '.join(keys)}.")
    text, own = _contents(checkpoint)
    converted = description_in(text) if own is None else None
    if not isinstance(text, str) or (own is None and converted is None):
        raise UserError(f"{checkpoint} does not say what its network is and how to feed it. {ADVICE}")
    cfg, _ = parse_cfg(text, f"the configuration in {checkpoint}", check=False)
    if cfg.DETECTION.ENABLE and not boxes:
        raise UserError(
            f"{checkpoint} holds a network of boxes in keyframes ({cfg.MODEL.MODEL_NAME} with DETECTION.ENABLE), and "
            "this takes one of whole clips. distinit demo shows what it sees in a video, distinit run tests it."
        )
    cfg.defrost()
    assumed: list[str] = []
    if converted is None:
        num_classes = cfg.MODEL.NUM_CLASSES if build.needs_own_logits(cfg) else 0
    else:
        num_classes = cfg.MODEL.NUM_CLASSES if "NUM_CLASSES" in converted["MODEL"] else 0
        assumed = _complete(checkpoint, cfg, converted)
    cfg.DATA_LOADER.NUM_WORKERS = 0
    # This machine need not be the one that trained; what was computed in fp32 can be so anywhere.
    cfg.NUM_GPUS = int(torch.cuda.is_available())
    cfg.NUM_SHARDS, cfg.SHARD_ID = 1, 0
    exact = cfg.RUNNER.PRECISION == "fp32" and not cfg.TRAIN.MIXED_PRECISION
    cfg.TRAIN.MIXED_PRECISION, cfg.RUNNER.PRECISION = False, "fp32" if exact else "auto"
    _override(checkpoint, cfg, opts)
    if told := [f"{key} {_value(cfg, key)}" for key in assumed if key not in opts[0::2]]:
        print(
            f"note: {checkpoint} does not say what its clips are; assumed: {', '.join(told)} (--opts sets them)",
            file=sys.stderr,
        )
    # Flow of videos that anybody names is computed.
    cfg.FLOW.STORE, cfg.FLOW.LAYOUT, cfg.FLOW.MISSING = "", "store", "refuse"
    cfg.freeze()
    names = (own or {}).get("class_names", [])
    if not isinstance(names, list):
        raise WeightsError(f"{checkpoint} is damaged: its class_names are {shown(names)}. Allowed: a list of names.")
    return Trained(checkpoint, cfg, num_classes, [str(name) for name in names])


def _contents(checkpoint: str) -> tuple[object, dict[str, Any] | None]:
    """The text of the configuration, and what a run of this program adds (``None`` in other files)."""
    path = Path(checkpoint)
    if path.suffix == ".safetensors":
        return read_checkpoint(path).details.get("cfg"), None
    try:
        state = load_checkpoint(path)
    except WeightsError as error:
        raise WeightsError(f"{error} {ADVICE}") if path.is_file() else error from error
    own = state.get("distinit")
    return state.get("cfg"), own if isinstance(own, dict) else None


def _complete(checkpoint: str, cfg: CfgNode, nodes: dict[str, Any]) -> list[str]:
    """Check what a converted file says, and name the keys of the input that it does not.

    Raises:
        UserError: It is of an image network, or holds values that are not allowed.
    """
    name = cfg.MODEL.MODEL_NAME
    if is_image_network(name):
        raise UserError(
            f"{checkpoint} holds {name}, an image network. It can be a teacher (DISTILL.TEACHERS) or fill a video "
            "network (INIT.INFLATE_FROM); give the file of a video network here."
        )
    if problems := network_problems(cfg):
        raise ConfigError([f"the configuration in {checkpoint}: {problem}" for problem in problems])
    unknown = [key for key in INPUT_KEYS if key.partition(".")[2] not in (nodes.get("DATA") or {})]
    if cfg.NETWORK.MODALITY == "flow":
        for key in ("DATA.MEAN", "DATA.STD"):
            if key in unknown:
                cfg.DATA[key.partition(".")[2]] = [NEUTRAL_RANGE] * 2
    return unknown


def _override(checkpoint: str, cfg: CfgNode, opts: Sequence[str]) -> None:
    """Set the user's keys, for all that they mean in a test.

    Raises:
        UserError: A value is not allowed.
    """
    if not opts:
        return
    cfg.merge_from_list(opts)
    if problems := [*network_problems(cfg), *precision_problems(cfg)]:
        raise ConfigError(problems)
    if "DATA.NUM_FRAMES" in opts[0::2]:
        cfg.CORPUS.TEST_NUM_FRAMES = 0  # the test has the frames that are asked for
    size, scale = cfg.DATA.TEST_CROP_SIZE, cfg.CORPUS.TEST_SCALE
    if "DATA.TEST_CROP_SIZE" in opts[0::2]:
        cfg.DATA.TRAIN_CROP_SIZE = size  # networks with position embeddings have one size
        if 0 < scale < size:
            raise UserError(
                f"--opts: DATA.TEST_CROP_SIZE {size} does not fit {checkpoint}, whose videos are scaled to a short "
                f"side of {scale}. Allowed: at most {scale}."
            )


def _value(cfg: CfgNode, key: str) -> object:
    node, _, leaf = key.partition(".")
    return cfg[node][leaf]
