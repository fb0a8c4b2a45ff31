"""Region proposal networks of persons, from the node RPN."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from distinit_plugin.config.node import CfgNode
from distinit_plugin.config.validate_detection import RANDOM
from distinit_plugin.detection.anchors import Choice
from distinit_plugin.detection.proposals import KeyframeProposer, Proposer
from distinit_plugin.detection.rpn import MapRpn, PersonRpn, load_rpn
from distinit_plugin.errors import naming
from distinit_plugin.models.network import InputSpec
from distinit_plugin.types import LayerInfo
from distinit_plugin.weights import LoadReport


def build_choice(cfg: CfgNode) -> Choice:
    """Which proposals are given."""
    return Choice(count=cfg.RPN.NUM_PROPOSALS, nms=cfg.RPN.NMS, floor=cfg.RPN.SCORE_FLOOR)


def build_person_rpn(cfg: CfgNode, clip: InputSpec) -> PersonRpn:
    """A region proposal network on keyframes, at its random initialisation.

    Args:
        cfg: The configuration.
        clip: Frame rate and sizes of crops.
    """
    spec = replace(clip, modality="rgb", mean=tuple(cfg.RPN.MEAN), std=tuple(cfg.RPN.STD))
    return PersonRpn(
        cfg.RPN.ARCH,
        input=spec,
        anchor_sizes=tuple(cfg.RPN.ANCHOR_SIZES),
        frozen_norm=cfg.RPN.FROZEN_NORM,
        choice=build_choice(cfg),
    )


def load_person_rpn(cfg: CfgNode, rpn: PersonRpn) -> LoadReport | None:
    """Put the weights that RPN.WEIGHTS names into a network; ``None``: it names none.

    Raises:
        WeightsError: They are not on disk nor downloadable, unreadable, or of another network.
    """
    if cfg.RPN.WEIGHTS in RANDOM:
        return None
    with naming("RPN.WEIGHTS"):
        return load_rpn(rpn, cfg.RPN.WEIGHTS)


def proposer_builder(cfg: CfgNode, clip: InputSpec) -> Callable[[LayerInfo], Proposer] | None:
    """What makes the proposer from the geometry of the pooled layer; ``None``: boxes are given."""
    if cfg.ROI.PROPOSALS == "given":
        return None

    def build(layer: LayerInfo) -> Proposer:
        if cfg.ROI.PROPOSALS == "own":
            return MapRpn(layer, anchor_sizes=tuple(cfg.RPN.ANCHOR_SIZES), choice=build_choice(cfg))
        size = cfg.RPN.CROP_SIZE
        rpn = build_person_rpn(cfg, replace(clip, train_crop_size=size, test_crop_size=size))
        load_person_rpn(cfg, rpn)
        return KeyframeProposer(rpn)

    return build
