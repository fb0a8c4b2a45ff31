"""Networks that classify persons' boxes, and the terms that they are trained on."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from distinit_plugin.building.keyframes import VALIDATED_SECONDS, annotation
from distinit_plugin.building.proposers import proposer_builder
from distinit_plugin.config.node import CfgNode
from distinit_plugin.detection.files import read_excluded, read_label_map, read_truth
from distinit_plugin.detection.frame_map import FrameMap, frame_map
from distinit_plugin.detection.matching import Sampling
from distinit_plugin.detection.network import PROPOSAL_LOSS, RoiNetwork
from distinit_plugin.detection.results import Selection
from distinit_plugin.detection.tables import BoxTable
from distinit_plugin.errors import UserError, naming
from distinit_plugin.losses import Loss
from distinit_plugin.models.maps import FAST
from distinit_plugin.models.network import VideoNetwork
from distinit_plugin.objectives import Term, action_term, offset_term, proposal_term
from distinit_plugin.types import Split


def build_roi_network(cfg: CfgNode, backbone: VideoNetwork) -> RoiNetwork:
    """A RoI head, and what proposes boxes, around a backbone.

    Raises:
        UserError: The backbone has no such layer, or one of another stride.
    """
    proposer = proposer_builder(cfg, backbone.input)
    return RoiNetwork(
        backbone,
        roi_layers(backbone, cfg.ROI.LAYER),
        num_classes=cfg.MODEL.NUM_CLASSES,
        pool=cfg.ROI.POOL,
        resolution=cfg.DETECTION.ROI_XFORM_RESOLUTION,
        aligned=cfg.DETECTION.ALIGNED,
        stride=cfg.DETECTION.SPATIAL_SCALE_FACTOR,
        dilated=cfg.ROI.DILATION,
        dropout=cfg.MODEL.DROPOUT_RATE,
        build_proposer=proposer,
        sampling=None if proposer is None else build_sampling(cfg),
        refines=cfg.ROI.REFINE_BOXES,
    )


def roi_layers(backbone: VideoNetwork, text: str) -> list[str]:
    """The layers that ROI.LAYER names; for an empty one the last, of SlowFast in both pathways.

    Raises:
        UserError: The backbone has no layers of which boxes could be cut.
    """
    if text:
        return [name.strip() for name in text.split("+")]
    names = list(backbone.layers)
    if not names:
        raise UserError(
            "MODEL.MODEL_NAME: the network has no feature maps with height and width, of which boxes could be cut "
            "(DETECTION.ENABLE True). Use S3DG, I3D, Res3D, R2Plus1D, or a convolutional one of PyTorchVideo."
        )
    last = names[-1].removesuffix(FAST)
    return [name for name in names if name.removesuffix(FAST) == last]


def build_sampling(cfg: CfgNode) -> Sampling:
    """Which proposals a training step learns from."""
    return Sampling(cfg.ROI.SAMPLES, cfg.ROI.POSITIVE_SHARE, cfg.ROI.MATCH_IOU)


def build_selection(cfg: CfgNode) -> Selection:
    """Which detections of a test are kept."""
    proposed = cfg.ROI.PROPOSALS != "given"
    return Selection(
        floor=cfg.ROI.SCORE_FLOOR, nms=cfg.ROI.NMS if proposed else 1.0, most=cfg.ROI.MAX_DETECTIONS or None
    )


def box_terms(cfg: CfgNode, loss: Loss) -> list[Term]:
    """The actions of boxes and, as far as there are any, corrections of boxes and the loss of an own RPN."""
    samples = 0 if cfg.ROI.PROPOSALS == "given" else cfg.ROI.SAMPLES
    terms: list[Term] = [action_term(loss, cfg.ACTION.LOSS_WEIGHT, samples=samples, iou=cfg.ROI.MATCH_IOU)]
    if cfg.ROI.REFINE_BOXES:
        terms.append(offset_term(cfg.ROI.BOX_LOSS_WEIGHT, samples=samples, iou=cfg.ROI.MATCH_IOU))
    if cfg.ROI.PROPOSALS == "own":
        terms.append(proposal_term(PROPOSAL_LOSS, cfg.ROI.PROPOSAL_LOSS_WEIGHT))
    return terms


class Judge(NamedTuple):
    """What detections are compared with."""

    truth: BoxTable
    label_map: dict[int, str]
    excluded: set[tuple[str, float]]
    evaluator: str

    def __call__(self, detections: BoxTable) -> FrameMap:
        """Frame-mAP of detections."""
        return frame_map(self.truth, detections, self.label_map, variant=self.evaluator, excluded=self.excluded)


def build_judge(cfg: CfgNode, split: Split) -> Judge:
    """Ground truth, label map and excluded keyframes of a validation or test.

    What counts are the keyframes of KEYFRAMES.SECONDS, in a validation of every fourth second unless
    AVA.FULL_TEST_ON_VAL, as in PySlowFast. Without a label map all actions 1 … MODEL.NUM_CLASSES count.

    Raises:
        UserError: A file is missing or wrong.
    """
    ava = cfg.AVA
    first, last = cfg.KEYFRAMES.SECONDS
    with naming("AVA.GROUNDTRUTH_FILE"):
        truth = read_truth(annotation(cfg, ava.GROUNDTRUTH_FILE))
    truth = within(truth, first, last, VALIDATED_SECONDS if split == "val" and not ava.FULL_TEST_ON_VAL else 0)
    label_map = {number: str(number) for number in range(1, cfg.MODEL.NUM_CLASSES + 1)}
    if ava.LABEL_MAP_FILE:
        with naming("AVA.LABEL_MAP_FILE"):
            label_map = read_label_map(annotation(cfg, ava.LABEL_MAP_FILE))
    excluded = set()
    if ava.EXCLUSION_FILE:
        with naming("AVA.EXCLUSION_FILE"):
            excluded = read_excluded(annotation(cfg, ava.EXCLUSION_FILE))
    return Judge(truth, label_map, excluded, cfg.ROI.EVALUATOR)


def within(truth: BoxTable, first: float, last: float, every: int) -> BoxTable:
    """The rows and empty keyframes of seconds from ``first`` to ``last`` that ``every`` divides (0: all)."""

    def kept(seconds: npt.NDArray[np.float64]) -> npt.NDArray[np.bool_]:
        inside = (seconds >= first) & (seconds <= last)
        return inside & (seconds % every == 0) if every else inside

    rows = kept(truth.seconds)
    return replace(
        truth,
        video=truth.video[rows],
        seconds=truth.seconds[rows],
        boxes=truth.boxes[rows],
        actions=truth.actions[rows],
        scores=truth.scores[rows],
        keyframes=truth.keyframes[kept(truth.keyframes[:, 1])],
        persons=None if truth.persons is None else truth.persons[rows],
    )
