"""Rules over the switches of networks, the student's and the teachers', and over what PyTorch cannot do with them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib import metadata

from distinit_plugin.config.defaults import get_cfg
from distinit_plugin.config.node import CfgNode
from distinit_plugin.config.rules import (
    INCEPTIONS,
    INFLATABLE,
    NETWORK_DEPTHS,
    NETWORK_SWITCHES,
    NETWORKS,
    TWO_STREAM_NETWORKS,
)
from distinit_plugin.config.theirs import is_borrowed
from distinit_plugin.errors import shown

Problems = Iterator[str]

POOLS_REPRODUCIBLE = (2, 15)
"""The documentation of ``torch.use_deterministic_algorithms`` counts 3D max-pools on GPUs among what it reproduces in
this version of torch."""


def _torch_version() -> tuple[int, ...]:
    """Major and minor number, without the second that importing torch takes."""
    return tuple(int(number) for number in re.findall(r"\d+", metadata.version("torch"))[:2])


def layer_problems(cfg: CfgNode) -> Problems:
    """Layers of the student that do not go together with how it is trained."""
    name, network = cfg.MODEL.MODEL_NAME, cfg.NETWORK
    pools = name in INCEPTIONS or (name == "Res3D" and network.STEM_POOL)
    on_gpus = cfg.NUM_GPUS and cfg.TRAIN.ENABLE
    if pools and cfg.RUNNER.DETERMINISTIC and on_gpus and _torch_version() < POOLS_REPRODUCIBLE:
        yield (
            f"RUNNER.DETERMINISTIC: True, but {name} has 3D max-pools, whose gradient this PyTorch cannot reproduce on "
            f"GPUs. Install torch {'.'.join(map(str, POOLS_REPRODUCIBLE))} or newer, set it False, or NUM_GPUS 0."
        )
    if name in INCEPTIONS and not network.AFFINE_NORM and cfg.BN.NORM_TYPE == "sync_batchnorm":
        yield (
            f"BN.NORM_TYPE: sync_batchnorm, but BN of {name} has no factor (NETWORK.AFFINE_NORM False), and PyTorch's "
            "synchronised BN then never trains the summand. Set NETWORK.AFFINE_NORM True, or use batchnorm."
        )


def norm_problems(cfg: CfgNode) -> Problems:
    """Statistics that are kept, of weights that have none or beside others that are computed."""
    if not (cfg.MODEL.FROZEN_BN and cfg.TRAIN.ENABLE):
        return
    init = cfg.INIT
    if not any((cfg.TRAIN.CHECKPOINT_FILE_PATH, init.INFLATE_FROM, init.STREAM_WEIGHTS, init.FLOW_NET_WEIGHTS)):
        yield (
            "MODEL.FROZEN_BN: True, but the training starts from random weights, whose normalisation has to learn. Set "
            "it False, or name a TRAIN.CHECKPOINT_FILE_PATH."
        )
    for key, on in (("USE_PRECISE_STATS", cfg.BN.USE_PRECISE_STATS), ("NORM_TYPE", cfg.BN.NORM_TYPE != "batchnorm")):
        if on:
            yield (
                f"BN.{key}: {cfg.BN[key]} is about statistics of the training's clips, and MODEL.FROZEN_BN True keeps "
                "those of the weights. Set one of the two to its default."
            )


def inflation_problems(cfg: CfgNode) -> Problems:
    """An image network that cannot become this network, or has no weights."""
    name, source, weights = cfg.MODEL.MODEL_NAME, cfg.INIT.INFLATE_FROM, cfg.INIT.INFLATE_WEIGHTS
    if name not in INFLATABLE and (name in NETWORKS or "/" in name):
        yield (
            f"INIT.INFLATE_FROM: {source} cannot be inflated into {name}, which has no 2D counterpart. Use "
            "Res3D (from a ResNet), I3D or S3DG (from a GoogLeNet), or leave INFLATE_FROM empty."
        )
    elif "AFFINE_NORM" in NETWORK_SWITCHES.get(name, ()) and not cfg.NETWORK.AFFINE_NORM:
        yield (f"INIT.INFLATE_FROM: BN of {name} has no factor, that of {source} has. Set NETWORK.AFFINE_NORM True.")
    if weights in ("", "random"):
        yield (
            f"INIT.INFLATE_WEIGHTS: {weights or 'empty'}, but INIT.INFLATE_FROM is set. Give a torchvision tag, "
            "'timm', or a weights file."
        )
    if weights == "timm" and not source.startswith("timm/"):
        yield f"INIT.INFLATE_WEIGHTS: timm, but {source} is not of timm. Give a torchvision tag or a weights file."


def part_problems(cfg: CfgNode) -> Problems:
    """Weights of the parts of a network that has none, or that gets all of its weights from one file."""
    for key in ("FLOW_NET_WEIGHTS", "STREAM_WEIGHTS"):
        value, name = cfg.INIT[key], cfg.MODEL.MODEL_NAME
        if value and name != "PredictedFlow3D" and (name in NETWORKS or "/" in name):
            yield (
                f"INIT.{key}: {shown(value)} is a part of PredictedFlow3D, not of {name}. Use "
                "TRAIN.CHECKPOINT_FILE_PATH."
            )
        elif value and cfg.TRAIN.CHECKPOINT_FILE_PATH:
            yield (
                f"INIT.{key}: {shown(value)} would be overwritten by TRAIN.CHECKPOINT_FILE_PATH, which holds the whole "
                "network. Leave one of the two empty."
            )


def head_problems(cfg: CfgNode) -> Problems:
    """New heads that train alone."""
    if cfg.INIT.TRAINABLE != "heads":
        return
    active = [entry for entry in cfg.DISTILL.TEACHERS.values() if entry.LOSS_WEIGHT > 0]
    if cfg.ACTION.LOSS_WEIGHT > 0 or not active or any(entry.HEAD == "own" for entry in active):
        yield (
            "INIT.TRAINABLE: heads trains new heads of teachers and nothing of the student, so each term needs one. "
            "Name teachers whose HEAD is not own, and set ACTION.LOSS_WEIGHT 0."
        )


def student_problems(cfg: CfgNode) -> Problems:
    """Switches of the student."""
    if is_borrowed(cfg.MODEL.MODEL_NAME) and cfg.DETECTION.ENABLE:
        yield (
            f"DETECTION.ENABLE: {cfg.MODEL.MODEL_NAME} classifies clips in this runner, not boxes. Run it with "
            "distinit slowfast, or use one of pytorchvideo/NAME."
        )
    yield from switch_problems(cfg.MODEL.MODEL_NAME, cfg.RESNET.DEPTH, cfg.NETWORK, "RESNET.DEPTH", "NETWORK")


def switch_problems(name: str, depth: int, switches: CfgNode, depth_key: str, where: str) -> Problems:
    """What a network's name and switches demand of one another.

    Args:
        name: Of the network.
        depth: Its layers.
        switches: The node with the keys of NETWORK.
        depth_key: The key that ``depth`` came from.
        where: The key of ``switches``.
    """
    defaults = get_cfg()
    if name in NETWORK_DEPTHS and depth not in NETWORK_DEPTHS[name]:
        yield f"{depth_key}: {depth} is not allowed for {name}. Allowed: {', '.join(map(str, NETWORK_DEPTHS[name]))}."
    fixed = ("/" in name and not is_borrowed(name)) or (name in NETWORKS and name not in NETWORK_DEPTHS)
    if fixed and depth != defaults.RESNET.DEPTH:
        yield f"{depth_key}: {depth} has no effect on {name}, whose name fixes its depth. Leave it at 18."
    if "/" in name and switches.MODALITY != "rgb":
        yield f"{where}.MODALITY: {switches.MODALITY} is not for {name}, which takes rgb only. Use rgb."
    if name == "PredictedFlow3D":
        if switches.MODALITY != "rgb":
            yield f"{where}.MODALITY: {switches.MODALITY} is not for {name}, which predicts its flow. Use rgb."
        if switches.DECODER_NORM and switches.DECODER == "simple":
            yield f"{where}.DECODER_NORM: True, but DECODER simple is one convolution. Set it False."
    if name in TWO_STREAM_NETWORKS and switches.MODALITY != "rgb":
        yield f"{where}.MODALITY: {switches.MODALITY} is not for {name}, which sees frames and flow. Leave it rgb."
    if name in NETWORKS or "/" in name:
        for key in sorted(set(defaults.NETWORK) - {"MODALITY"} - set(NETWORK_SWITCHES.get(name, ()))):
            if switches[key] != defaults.NETWORK[key]:
                readers = ", ".join(network for network, keys in NETWORK_SWITCHES.items() if key in keys)
                yield (
                    f"{where}.{key}: {switches[key]!r} has no effect on {name}; it is for {readers}. "
                    f"Leave it at {defaults.NETWORK[key]!r}."
                )
    if name in ("PredictedFlow3D", "S3DG"):
        yield from _separable(switches, where)


def flow_problems(cfg: CfgNode) -> Problems:
    """What the keys of FLOW demand of one another."""
    flow = cfg.FLOW
    if flow.MISSING == "live" and not flow.STORE:
        yield "FLOW.MISSING: live is for videos that FLOW.STORE lacks, and FLOW.STORE is empty. Leave it at 'refuse'."
    if flow.WEIGHTS and flow.BACKEND != "raft":
        yield f"FLOW.WEIGHTS: {flow.WEIGHTS!r} has no meaning for FLOW.BACKEND {flow.BACKEND}. Leave it empty."
    if flow.BACKEND == "raft" and not flow.WEIGHTS and (flow.MISSING == "live" or not flow.STORE):
        yield "FLOW.BACKEND: raft needs FLOW.WEIGHTS, which is empty. Give a file, or a torchvision tag."


def _separable(network: CfgNode, where: str) -> Problems:
    """Switches of S3DG that act on kernels which the others leave out."""
    if network.SEPARABLE_STEM and network.STEM_FRAMES == 1:
        yield (
            f"{where}.SEPARABLE_STEM: True, but a first kernel of one frame ({where}.STEM_FRAMES 1) has nothing to "
            "split. Set it False, or use 3, 5 or 7 frames."
        )
    splits_stem = network.SEPARABLE_STEM and network.STEM_FRAMES > 1
    if network.TEMPORAL_NORM and network.TEMPORAL_FROM == "none" and not splits_stem:
        yield (
            f"{where}.TEMPORAL_NORM: True, but there are no temporal convolutions ({where}.TEMPORAL_FROM none, stem "
            "not separable). Set it False."
        )
