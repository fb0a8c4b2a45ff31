"""Rules over several keys of a teacher's entry, and of the entropy gate."""

from __future__ import annotations

import math
from collections.abc import Iterator

from distinit_plugin.config.defaults import TEACHER_ENTRY
from distinit_plugin.config.node import CfgNode
from distinit_plugin.config.rules import DISTILL_LOSSES, FLOW, FLOW_DECODERS, FLOW_LOSS, SOFTMAX_LOSSES
from distinit_plugin.config.theirs import is_borrowed
from distinit_plugin.config.validate_networks import switch_problems

Problems = Iterator[str]

_VECTORS = ("logits", "features")
"""Layers without positions; all others are maps."""


def teacher_problems(cfg: CfgNode) -> Problems:
    """What the keys of each teacher demand of one another and of the student."""
    for name, entry in cfg.DISTILL.TEACHERS.items():
        if entry.ARCH == FLOW:
            yield from _flow(f"DISTILL.TEACHERS.{name}", entry)
            yield from _teacher_warmup(f"DISTILL.TEACHERS.{name}", entry, cfg)
            continue
        for check in (
            _no_flow,
            _teacher_network,
            _teacher_weights,
            _teacher_layers,
            _teacher_frames,
            _teacher_gate,
            _teacher_warmup,
        ):
            yield from check(f"DISTILL.TEACHERS.{name}", entry, cfg)


_FLOW_KEYS = ("ARCH", "LAYER", "STUDENT_LAYER", "HEAD", "LOSS", "LOSS_WEIGHT", "WARMUP", "ALIGNMENT", "DECODER_NORM")
"""The keys that mean something for flow, which is no network and needs no frames of its own."""


def _flow(where: str, entry: CfgNode) -> Problems:
    """A teacher that is the flow of the student's clip."""
    if entry.LAYER != FLOW:
        yield f"{where}.LAYER: {entry.LAYER}, but ARCH flow has the one layer flow. Set LAYER flow."
    if entry.HEAD not in FLOW_DECODERS:
        yield f"{where}.HEAD: {entry.HEAD} decodes no flow. Allowed with ARCH flow: {', '.join(FLOW_DECODERS)}."
    if entry.LOSS in set(DISTILL_LOSSES) - {FLOW_LOSS}:
        yield f"{where}.LOSS: {entry.LOSS} is not for flow. Use {FLOW_LOSS}."
    if entry.STUDENT_LAYER in ("", "logits", "features"):
        yield (
            f"{where}.STUDENT_LAYER: {entry.STUDENT_LAYER or 'empty'}, but flow is decoded from a map. Name a layer of "
            "the student (distinit describe lists them), 3A of S3DG for example."
        )
    if entry.DECODER_NORM and entry.HEAD == "simple":
        yield f"{where}.DECODER_NORM: True, but HEAD simple is one convolution, with nothing behind it. Set it False."
    for key, default in TEACHER_ENTRY.items():
        if key not in _FLOW_KEYS and entry[key] != default:
            shown = "other switches" if key == "NETWORK" else entry[key]
            yield f"{where}.{key}: {shown}, but ARCH flow is the flow of the student's own clip. Leave the key out."


def _no_flow(where: str, entry: CfgNode, cfg: CfgNode) -> Problems:
    """What only a teacher of ARCH flow can have."""
    for key, words in (("LAYER", (FLOW,)), ("HEAD", FLOW_DECODERS), ("LOSS", (FLOW_LOSS,))):
        if entry[key] in words:
            yield f"{where}.{key}: {entry[key]} is for ARCH flow, ARCH is {entry.ARCH}. Set that, or another {key}."
    for key in ("ALIGNMENT", "DECODER_NORM"):
        if entry[key] != TEACHER_ENTRY[key]:
            yield f"{where}.{key}: {entry[key]} is only read with ARCH flow. Leave it at {TEACHER_ENTRY[key]}."


def _teacher_network(where: str, entry: CfgNode, cfg: CfgNode) -> Problems:
    if entry.CFG and not is_borrowed(entry.ARCH):
        yield f"{where}.CFG: {entry.CFG} describes a network of PySlowFast, ARCH is {entry.ARCH}. Leave it empty."
    if is_borrowed(entry.ARCH) and entry.WEIGHTS == "random" and not entry.CFG:
        yield f"{where}.CFG: empty, and no weights say what {entry.ARCH} is made of. Name its YAML file."
    yield from switch_problems(entry.ARCH, entry.DEPTH, entry.NETWORK, f"{where}.DEPTH", f"{where}.NETWORK")
    modality = entry.NETWORK.MODALITY
    channels = 2 if modality == "flow" else 3
    for key in ("MEAN", "STD"):
        if len(entry[key]) != channels:
            yield (
                f"{where}.{key}: {entry[key]} has {len(entry[key])} entries, but NETWORK.MODALITY {modality} has "
                f"{channels} channels. Give one entry for each."
            )


def _teacher_weights(where: str, entry: CfgNode, cfg: CfgNode) -> Problems:
    package, tag = entry.ARCH.partition("/")[0], entry.WEIGHTS
    is_tag = tag.isupper() and "/" not in tag and "." not in tag
    if tag == "timm" and package != "timm":
        yield f"{where}.WEIGHTS: timm is for timm/NAME, ARCH is {entry.ARCH}. Give a torchvision tag or a weights file."
    if is_tag and package != "torchvision":
        fix = "timm" if package == "timm" else "a weights file, or random"
        yield f"{where}.WEIGHTS: {tag} is a tag of torchvision, ARCH is {entry.ARCH}. Use {fix}."
    if tag.startswith("IMAGENET1K") and is_tag and entry.NUM_CLASSES != 1000 and entry.LAYER == "logits":
        yield (
            f"{where}.NUM_CLASSES: {entry.NUM_CLASSES}, but weights {tag} have 1000 classes. Set 1000, or WEIGHTS to "
            "the file that has these classes."
        )


def _teacher_layers(where: str, entry: CfgNode, cfg: CfgNode) -> Problems:
    if entry.LOSS in SOFTMAX_LOSSES and entry.LAYER not in ("logits", "feature_map"):  # a dense teacher's has classes
        problem = f"{entry.LOSS} compares classes, LAYER is {entry.LAYER}"
        yield f"{where}.LOSS: {problem}. Use mse or cosine, or LAYER logits."
    if entry.LOSS in set(DISTILL_LOSSES) - set(SOFTMAX_LOSSES):
        for key in ("TEMPERATURE", "TEMPER_STUDENT", "SCALE_BY_TEMPERATURE"):
            if entry[key] != TEACHER_ENTRY[key]:
                readers = " and ".join(SOFTMAX_LOSSES)
                default = TEACHER_ENTRY[key]
                yield f"{where}.{key}: {entry[key]} is only read by {readers}, LOSS is {entry.LOSS}. Use {default}."
    if entry.LOSS in set(DISTILL_LOSSES) - {"mse"}:
        for key in ("CLASS_REDUCTION", "NORMALIZE"):
            if entry[key] != TEACHER_ENTRY[key]:
                default = TEACHER_ENTRY[key]
                yield f"{where}.{key}: {entry[key]} is only read by mse, LOSS is {entry.LOSS}. Set it to {default}."
    if entry.HEAD == "own" and entry.LAYER == "logits":
        if entry.NUM_CLASSES != cfg.MODEL.NUM_CLASSES:
            yield (
                f"{where}.HEAD: own compares the student's own {cfg.MODEL.NUM_CLASSES} logits (MODEL.NUM_CLASSES) with "
                f"{entry.NUM_CLASSES} of the teacher. Make them equal, or use HEAD linear."
            )
        if entry.STUDENT_LAYER not in ("", "logits"):
            yield f"{where}.STUDENT_LAYER: {entry.STUDENT_LAYER!r} with HEAD own, which is the logits. Leave it empty."
    if entry.LAYER not in _VECTORS and entry.STUDENT_LAYER in _VECTORS:
        yield f"{where}.STUDENT_LAYER: {entry.STUDENT_LAYER!r} is no map, LAYER is {entry.LAYER}. Name a layer."


def _teacher_frames(where: str, entry: CfgNode, cfg: CfgNode) -> Problems:
    pick, count, frames = entry.FRAME_PICK, entry.NUM_PICKED_FRAMES, cfg.DATA.NUM_FRAMES
    if pick in ("center", "keyframe") and count > 1:
        yield f"{where}.NUM_PICKED_FRAMES: {count}, but FRAME_PICK {pick} is one frame. Set 1, or pick random."
    elif pick == "clip" and count not in (1, frames):
        yield f"{where}.NUM_PICKED_FRAMES: {count}, but FRAME_PICK clip is all {frames} frames. Leave it at 1."
    elif count > frames:
        yield f"{where}.NUM_PICKED_FRAMES: {count} is not allowed. Allowed: 1 … {frames} (DATA.NUM_FRAMES)."


def _teacher_gate(where: str, entry: CfgNode, cfg: CfgNode) -> Problems:
    if entry.MAX_ENTROPY < 0:
        return
    most = math.log(entry.NUM_CLASSES)
    if entry.LAYER != "logits":
        yield f"{where}.MAX_ENTROPY: {entry.MAX_ENTROPY:g} needs class probabilities, LAYER is {entry.LAYER}. Set -1."
    elif most < entry.MAX_ENTROPY:
        yield (
            f"{where}.MAX_ENTROPY: {entry.MAX_ENTROPY:g} nats never gate: {entry.NUM_CLASSES} classes have at most "
            f"{most:.2f}. Use less, or -1 for no gate."
        )


def _teacher_warmup(where: str, entry: CfgNode, cfg: CfgNode) -> Problems:
    if entry.WARMUP and cfg.TRAIN.ENABLE and entry.WARMUP >= cfg.SOLVER.MAX_EPOCH:
        yield (
            f"{where}.WARMUP: {entry.WARMUP:g} leaves nothing of SOLVER.MAX_EPOCH {cfg.SOLVER.MAX_EPOCH} (both count "
            f"in {cfg.RUNNER.SCHEDULE_UNIT}s). Use a smaller value; 0 is no warm-up."
        )


def grid_problems(cfg: CfgNode) -> Problems:
    """What the keys of the grid demand of one another, and targets that are cached of the grid."""
    grid, frames = cfg.DISTILL.GRID, cfg.DATA.NUM_FRAMES
    active = {name: entry for name, entry in cfg.DISTILL.TEACHERS.items() if entry.LOSS_WEIGHT > 0}
    centered = any(entry.VIEW == "center" for entry in active.values())
    if grid.CROPS and not grid.CLIPS:
        yield f"DISTILL.GRID.CROPS: {grid.CROPS} has no effect on random clips. Set DISTILL.GRID.CLIPS, or leave it 0."
    if grid.SCALE and not grid.CROPS and not centered:
        yield (
            f"DISTILL.GRID.SCALE: {grid.SCALE} has no effect on random crops. Set DISTILL.GRID.CROPS, a teacher's VIEW "
            "center, or leave it at 0."
        )
    if 0 < grid.SCALE < cfg.DATA.TRAIN_CROP_SIZE:
        yield (
            f"DISTILL.GRID.SCALE: {grid.SCALE} is smaller than DATA.TRAIN_CROP_SIZE {cfg.DATA.TRAIN_CROP_SIZE}. Use "
            "at least the crop, or 0 for the middle of DATA.TRAIN_JITTER_SCALES."
        )
    if frames < grid.FRAMES:
        yield f"DISTILL.GRID.FRAMES: {grid.FRAMES} is not allowed. Allowed: 0 … {frames} (DATA.NUM_FRAMES)."
    for name, entry in active.items():
        where = f"DISTILL.TEACHERS.{name}"
        if 0 < grid.FRAMES < entry.NUM_PICKED_FRAMES and entry.FRAME_PICK != "clip":
            yield (
                f"{where}.NUM_PICKED_FRAMES: {entry.NUM_PICKED_FRAMES} of DISTILL.GRID.FRAMES {grid.FRAMES} cannot be "
                f"picked. Allowed: 1 … {grid.FRAMES}."
            )
        if entry.CACHE:
            yield from _cached(where, entry, cfg)


def _cached(where: str, entry: CfgNode, cfg: CfgNode) -> Problems:
    """A teacher whose targets are cached."""
    grid = cfg.DISTILL.GRID
    if not grid.CLIPS:
        yield (
            f"{where}.CACHE: targets are cached for the clips of a grid, but DISTILL.GRID.CLIPS is 0 (any clip). Set "
            "it, and the grid's other keys, as they were for distinit cache-targets, or leave CACHE empty."
        )
    elif entry.VIEW == "shared" and not grid.CROPS:
        yield (
            f"{where}.CACHE: targets are cached for fixed crops, but DISTILL.GRID.CROPS is 0 (any crop). Set it to 1 "
            "or 3, or VIEW center, as it was for distinit cache-targets."
        )
    if entry.WEIGHTS == "random":
        yield (
            f"{where}.CACHE: targets of WEIGHTS random are no two times the same. Give the weights that the targets "
            "were made with, or leave CACHE empty."
        )


def gate_problems(cfg: CfgNode) -> Problems:
    """Switches of the entropy gate while no teacher has one."""
    if any(entry.MAX_ENTROPY >= 0 and entry.LOSS_WEIGHT > 0 for entry in cfg.DISTILL.TEACHERS.values()):
        return
    for key, default in (("GATE", "weight"), ("GATE_MEAN", "all")):
        if cfg.DISTILL[key] != default:
            yield (
                f"DISTILL.{key}: {cfg.DISTILL[key]} has no effect without a gate. Set MAX_ENTROPY of a teacher "
                f"(DISTILL.TEACHERS.NAME.MAX_ENTROPY 2.7), or leave it at {default}."
            )
