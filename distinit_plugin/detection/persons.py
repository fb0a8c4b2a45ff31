"""Detectors of persons on single pictures: torchvision's Faster R-CNN, or detectron2's zoo where that is installed."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
import torchvision.models
from torch import Tensor, nn

from distinit_plugin.detection.rpn import modern_detector_keys
from distinit_plugin.errors import UserError, WeightsError
from distinit_plugin.registry import near_matches
from distinit_plugin.weights.keymaps import is_counter
from distinit_plugin.weights.load import load_tensors
from distinit_plugin.weights.sources import source_weights

PERSON = 1
"""Number of persons among the classes of COCO (0: background); the one class of a detector that knows nothing else."""

DETECTRON2 = "detectron2/"
"""Before the name of a configuration in detectron2's zoo."""

TORCHVISION = tuple(
    name
    for name in torchvision.models.list_models(module=torchvision.models.detection)
    if name.startswith("fasterrcnn_")
)


class Found(NamedTuple):
    """Persons on a picture.

    Attributes:
        boxes: (n,4) x1, y1, x2, y2, pixels of the picture.
        scores: (n,) in [0, 1], the best first.
    """

    boxes: Tensor
    scores: Tensor


class PersonDetector(Protocol):
    """Finds persons."""

    def __call__(self, pictures: Sequence[Tensor]) -> list[Found]:
        """Persons on pictures (3,H,W) uint8 RGB, each of any size; results are on the CPU."""
        ...


def build_detector(
    arch: str, weights: str, *, device: torch.device, floor: float = 0.5, most: int = 100, short_side: int = 800
) -> PersonDetector:
    """A detector with its weights.

    Args:
        arch: One of ``TORCHVISION``, or ``detectron2/CONFIG.yaml`` of that library's zoo.
        weights: A tag of torchvision's (COCO_V1) or a file; of detectron2 a file or an address, empty: the zoo's.
        device: Where it runs.
        floor: Least score of a person.
        most: Persons of a picture, at most.
        short_side: To which pictures are scaled for it, pixels.

    Raises:
        UserError: There is no such detector, or detectron2 is not installed.
        WeightsError: The weights are not on disk nor downloadable, unreadable, or of another network.
    """
    if arch.startswith(DETECTRON2):
        return Detectron2Detector(arch.removeprefix(DETECTRON2), weights, device, floor, most, short_side)
    if arch not in TORCHVISION:
        raise UserError(
            f"there is no detector named '{arch}'.{near_matches(arch, list(TORCHVISION))} Allowed: "
            f"{', '.join(TORCHVISION)}, or {DETECTRON2}CONFIG.yaml of its zoo."
        )
    return TorchvisionDetector(arch, weights, device, floor, most, short_side)


class TorchvisionDetector:
    """A Faster R-CNN of torchvision, of any number of classes."""

    def __init__(self, arch: str, weights: str, device: torch.device, floor: float, most: int, short_side: int) -> None:
        """See ``build_detector``."""
        file = source_weights(f"torchvision/{arch}", weights)
        tensors = modern_detector_keys(file.tensors)
        scores = tensors.get("roi_heads.box_predictor.cls_score.weight")
        if scores is None or scores.ndim != 2 or len(scores) <= PERSON:
            raise WeightsError(f"{file.path} holds no Faster R-CNN of torchvision with a class of persons.")
        model = torchvision.models.get_model(
            arch,
            weights=None,
            weights_backbone=None,
            num_classes=len(scores),
            box_score_thresh=floor,
            min_size=short_side,
            max_size=max(1333, 2 * short_side),
        )
        if arch == "fasterrcnn_resnet50_fpn" and not any(is_counter(key) for key in tensors):
            # It was published with a normalisation without the small summand to the variance.
            for module in model.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.eps = 0.0
        load_tensors(model.state_dict(), tensors, file.path, strict=True)
        self._model = model.eval().to(device)
        self._device = device
        self._most = most

    @torch.inference_mode()
    def __call__(self, pictures: Sequence[Tensor]) -> list[Found]:
        """See ``PersonDetector``."""
        inputs = [picture.to(self._device).float() / 255 for picture in pictures]
        results: list[Mapping[str, Tensor]] = self._model(inputs)
        return [
            _persons(result["boxes"], result["scores"], result["labels"] == PERSON, self._most) for result in results
        ]


class Detectron2Detector:
    """A detector of detectron2's zoo."""

    def __init__(
        self, config: str, weights: str, device: torch.device, floor: float, most: int, short_side: int
    ) -> None:
        """See ``build_detector``."""
        zoo, engine, configuration = (_import_detectron2(part) for part in ("model_zoo", "engine", "config"))
        options = configuration.get_cfg()
        try:
            options.merge_from_file(zoo.get_config_file(config))
            options.MODEL.WEIGHTS = weights or zoo.get_checkpoint_url(config)
        except RuntimeError as error:
            raise UserError(f"detectron2's zoo has no '{config}': {error}") from error
        options.MODEL.ROI_HEADS.SCORE_THRESH_TEST = floor
        options.MODEL.DEVICE = str(device)
        options.INPUT.MIN_SIZE_TEST, options.INPUT.MAX_SIZE_TEST = short_side, max(1333, 2 * short_side)
        self._predict = engine.DefaultPredictor(options)
        self._most = most

    def __call__(self, pictures: Sequence[Tensor]) -> list[Found]:
        """See ``PersonDetector``; it takes one picture at a time, blue first."""
        found = []
        for picture in pictures:
            instances = self._predict(picture.flip(0).permute(1, 2, 0).contiguous().numpy())["instances"].to("cpu")
            persons = instances.pred_classes == PERSON - 1  # it does not count the background
            found.append(_persons(instances.pred_boxes.tensor, instances.scores, persons, self._most))
        return found


def _persons(boxes: Tensor, scores: Tensor, chosen: Tensor, most: int) -> Found:
    """The best of the chosen rows."""
    boxes, scores = boxes[chosen].float().cpu(), scores[chosen].float().cpu()
    order = scores.argsort(descending=True, stable=True)[:most]
    return Found(boxes[order], scores[order])


def _import_detectron2(part: str) -> Any:
    try:
        return importlib.import_module(f"detectron2.{part}")
    except ImportError as error:
        raise UserError(
            f"detectors named {DETECTRON2}… need detectron2, which is not installed ({error}). Build it from "
            f"https://github.com/facebookresearch/detectron2, or use one of torchvision's: {', '.join(TORCHVISION)}."
        ) from error
