"""Any teacher by name, with its weights, frozen."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from typing import Any

import torch
import torchvision.models
import torchvision.models.detection
import torchvision.models.segmentation
import torchvision.models.video
from torch import Tensor

from distinit_plugin.errors import SAME_ON_ALL_RANKS, UserError, WeightsError
from distinit_plugin.models.factory import build_network, is_program
from distinit_plugin.models.network import InputSpec
from distinit_plugin.registry import near_matches
from distinit_plugin.teachers.dense import DetectionBackbone, SegmentationNetwork
from distinit_plugin.teachers.frozen import Frozen
from distinit_plugin.teachers.image import TimmClassifier, TorchvisionClassifier
from distinit_plugin.teachers.video import NetworkTeacher
from distinit_plugin.types import Crop, Modality, Network, Pick, ViewSpec
from distinit_plugin.weights.load import compare, load_tensors, translate
from distinit_plugin.weights.read import CheckpointFile
from distinit_plugin.weights.report import Mismatch
from distinit_plugin.weights.sources import TIMM_DEFAULT, source_weights, timm_config, torchvision_tags

RANDOM = "random"
"""The value of WEIGHTS for an untrained teacher: a control that must not help."""

LOGITS = "logits"
FEATURES = "features"

_AUXILIARY = ("aux1.", "aux2.", "AuxLogits.", "aux_classifier.")
"""Extra classifiers of GoogLeNet, Inception v3 and segmentation networks, for training alone."""

_NORMS_WITHOUT_EPS = (
    "fasterrcnn_resnet50_fpn",
    "keypointrcnn_resnet50_fpn",
    "maskrcnn_resnet50_fpn",
    "retinanet_resnet50_fpn",
)
"""Detectors whose published weights were trained with constant batch normalisation and eps 0 (torchvision's own
builders set it for these weights)."""

logger = logging.getLogger(__name__)


def build_teacher(
    arch: str,
    weights: str,
    *,
    num_classes: int = 1000,
    layer: str = LOGITS,
    num_frames: int = 1,
    pick: Pick = "center",
    crop_size: int = 224,
    mean: tuple[float, ...] = (0.485, 0.456, 0.406),
    std: tuple[float, ...] = (0.229, 0.224, 0.225),
    modality: Modality = "rgb",
    sampling_rate: int = 1,
    target_fps: float | None = None,
    crop: Crop = "shared",
    pick_from: int = 0,
    description: str = "",
    **switches: Any,
) -> Frozen:
    """Build a frozen teacher.

    Args:
        arch: ``torchvision/NAME`` (classification, segmentation, detection or video), ``timm/NAME``,
            ``pytorchvideo/NAME``, ``slowfast/NAME``, or a registered network (``Res2D``, ``R2Plus1D``, …).
        weights: torchvision tag, ``timm`` (timm's own), a file, or ``random`` (untrained).
        num_classes: K of the classifier, read only where ``layer`` is ``logits`` or for segmentation maps.
        layer: What will be matched: ``logits``, ``features``, or one of the network's layers (``feature_map``). For
            all but ``logits`` the classifier is dropped.
        num_frames: Frames that the teacher sees of each clip; ``pick="clip"``: the student's number of frames.
        pick: Which frames.
        crop_size: Pixels of its view.
        mean: Per-channel mean of its input, in units of [0, 1].
        std: Per-channel standard deviation of its input.
        modality: What a registered network sees.
        sampling_rate: The student's, so that equal views share their pixels.
        target_fps: The student's.
        crop: ``shared``: the student's crop and flip; ``center``: the centre crop of the same frames.
        pick_from: Evenly spaced frames of the clip among which ``pick`` chooses; 0: all.
        description: Of ``slowfast/NAME``: the text of its YAML file; empty: the configuration that ``weights`` holds.
        switches: Of a registered network (``models.factory.SWITCHES``: ``depth``, ``width``, …).

    Raises:
        UserError: An unknown name or a switch outside its range.
        WeightsError: The weights cannot be had, are unreadable, or are of another network or number of classes.
    """
    view = ViewSpec(modality, num_frames, sampling_rate, target_fps, pick, 1, crop_size, mean, std, crop, pick_from)
    if is_program(arch):
        switches |= {"description": description}
    if weights == RANDOM:
        logger.warning(
            "teacher %s is UNTRAINED (WEIGHTS: random): its targets mean nothing", arch, extra=SAME_ON_ALL_RANKS
        )
        network = _build(arch, None, view, num_classes, switches)
        _check_layer(network, arch, layer)
        _drop_classifier(network, layer)
        return Frozen(network)
    if weights == TIMM_DEFAULT:
        return _pretrained_timm(arch, view, num_classes, layer)
    file = source_weights(arch, weights)
    with torch.random.fork_rng(devices=[]):  # the student's initial weights do not depend on its teachers
        network = _build(arch, file, view, num_classes, switches)
    _check_layer(network, arch, layer)
    _load(network, file, arch, layer, num_classes)
    return Frozen(network)


def _build(
    arch: str, file: CheckpointFile | None, view: ViewSpec, num_classes: int, switches: Mapping[str, Any]
) -> Network:
    library, _, model = arch.partition("/")
    if library == "timm" and model:
        return TimmClassifier(model, num_classes, view)
    if library == "torchvision" and model and model not in torchvision.models.list_models(torchvision.models.video):
        return _build_torchvision(model, file, view, num_classes)
    if "/" in arch and library not in ("torchvision", "pytorchvideo") and not is_program(arch):
        raise UserError(
            f"teacher {arch}: there is no library '{library}'.{near_matches(library, ['torchvision', 'timm'])} "
            "Write torchvision/NAME, timm/NAME, pytorchvideo/NAME or the name of a registered network."
        )
    if view.num_frames is None:
        raise UserError(f"teacher {arch} needs a number of frames.")
    if is_program(arch) and not switches["description"]:
        switches = {**switches, "description": _description_in(arch, file)}
    clip = InputSpec(
        num_frames=view.num_frames,
        sampling_rate=view.sampling_rate,
        target_fps=view.target_fps,
        train_crop_size=view.crop_size,
        test_crop_size=view.crop_size,
        mean=view.mean,
        std=view.std,
        modality=view.modality,
    )
    return NetworkTeacher(build_network(arch, num_classes=num_classes, input=clip, **switches), view)


def _description_in(arch: str, file: CheckpointFile | None) -> str:
    """What a checkpoint says about its network.

    Raises:
        UserError: Nothing.
    """
    text = "" if file is None else file.details.get("cfg", "")
    if not isinstance(text, str) or not text:
        where = "there are no weights that say" if file is None else f"{file.path} does not say"
        raise UserError(f"teacher {arch}: {where} what its network is. Give its YAML file as CFG.")
    return text


def _build_torchvision(model: str, file: CheckpointFile | None, view: ViewSpec, num_classes: int) -> Network:
    torchvision_tags(model)  # an unknown name fails here, with its near matches
    if model in torchvision.models.list_models(torchvision.models.segmentation):
        return SegmentationNetwork(model, num_classes, view)
    if model in torchvision.models.list_models(torchvision.models.detection):
        has_counters = file is None or any(key.endswith("num_batches_tracked") for key in file.tensors)
        eps = 0.0 if model in _NORMS_WITHOUT_EPS else 1e-5
        return DetectionBackbone(model, view, frozen_norm_eps=None if has_counters else eps)
    return TorchvisionClassifier(model, num_classes, view, transform_input=file is not None)


def _pretrained_timm(arch: str, view: ViewSpec, num_classes: int, layer: str) -> Frozen:
    library, _, model = arch.partition("/")
    if library != "timm":
        raise WeightsError(f"teacher {arch}: WEIGHTS 'timm' is for ARCH timm/NAME. Give a torchvision tag or a file.")
    config = timm_config(model)
    if layer == LOGITS and config is not None and config.num_classes != num_classes:
        if config.num_classes == 0:
            raise UserError(f"teacher {arch} has no classifier. Set LAYER to features.")
        raise WeightsError(
            f"teacher {arch}: its weights are for {config.num_classes} classes, NUM_CLASSES is {num_classes}. Set "
            f"NUM_CLASSES to {config.num_classes}."
        )
    with torch.random.fork_rng(devices=[]):
        network = TimmClassifier(model, None if layer == LOGITS else 0, view, pretrained=True)
    _check_layer(network, arch, layer)
    return Frozen(network)


def _check_layer(network: Network, arch: str, layer: str) -> None:
    if layer == LOGITS and isinstance(network, SegmentationNetwork | DetectionBackbone):
        raise UserError(f"teacher {arch} has a map for every location and no logits. Set LAYER to feature_map.")
    if layer not in (LOGITS, FEATURES) and layer not in network.layers:
        known = [LOGITS, FEATURES, *network.layers]
        raise UserError(f"teacher {arch}: LAYER is '{layer}'.{near_matches(layer, known)} Known: {', '.join(known)}.")


def _drop_classifier(network: Network, layer: str) -> set[str]:
    """Remove a classifier that nothing reads; returns the keys that are gone with it."""
    if layer == LOGITS or isinstance(network, SegmentationNetwork | DetectionBackbone):
        return set()
    before = set(network.bare_state_dict())
    network.reset_classifier(0)
    return before - set(network.bare_state_dict())


def _load(network: Network, file: CheckpointFile, arch: str, layer: str, num_classes: int) -> None:
    """Load strictly, but for parts that the teacher does not use."""
    tensors: dict[str, Tensor] = dict(file.tensors)
    if isinstance(network, DetectionBackbone):
        prefix = "backbone."
        tensors = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
    translation = translate(tensors, network.bare_state_dict())
    gone = _drop_classifier(network, layer)
    target = network.bare_state_dict()
    tensors = _without(translation.tensors, gone)
    report = compare(target, tensors, file.path)
    _refuse_other_classes(report.mismatched, arch, file.path, num_classes)
    report = load_tensors(target, tensors, f"teacher {arch}: {file.path}", strict=True)
    logger.info("teacher %s: %d tensors from %s", arch, len(report.loaded), file.path)
    for note in translation.notes:
        logger.info("teacher %s: %s", arch, note)


def _without(tensors: Mapping[str, Tensor], gone: Collection[str]) -> dict[str, Tensor]:
    return {key: value for key, value in tensors.items() if key not in gone and not key.startswith(_AUXILIARY)}


def _refuse_other_classes(mismatched: Collection[Mismatch], arch: str, path: str, num_classes: int) -> None:
    counts = {file_shape[:1] for _, file_shape, _ in mismatched}
    only_counts = all(
        network_shape[:1] == (num_classes,) and file_shape[1:] == network_shape[1:]
        for _, file_shape, network_shape in mismatched
    )
    if len(counts) == 1 and only_counts:
        (found,) = counts.pop()
        raise WeightsError(
            f"teacher {arch}: {path} has {found} classes, NUM_CLASSES is {num_classes}. Set NUM_CLASSES to {found}, or "
            "give weights for the other number."
        )
