"""Rules over the switches of I3D and S3DG, and over what PyTorch cannot do with a network's layers."""

from __future__ import annotations

from collections.abc import Iterator

from distinit_plugin.config.node import CfgNode
from distinit_plugin.config.rules import INCEPTIONS, INFLATABLE, NETWORK_SWITCHES, NETWORKS

Problems = Iterator[str]


def layer_problems(cfg: CfgNode) -> Problems:
    """Layers of the student that do not go together with how it is trained."""
    name, network = cfg.MODEL.MODEL_NAME, cfg.NETWORK
    pools = name in INCEPTIONS or (name == "Res3D" and network.STEM_POOL)
    if pools and cfg.RUNNER.DETERMINISTIC and cfg.NUM_GPUS and cfg.TRAIN.ENABLE:
        yield (
            f"RUNNER.DETERMINISTIC: True, but {name} has 3D max-pools, whose gradient PyTorch cannot reproduce on "
            "GPUs. Set it False, or NUM_GPUS 0."
        )
    if name in INCEPTIONS and not network.AFFINE_NORM and cfg.BN.NORM_TYPE == "sync_batchnorm":
        yield (
            f"BN.NORM_TYPE: sync_batchnorm, but BN of {name} has no factor (NETWORK.AFFINE_NORM False), and PyTorch's "
            "synchronised BN then never trains the summand. Set NETWORK.AFFINE_NORM True, or use batchnorm."
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


def separable_problems(cfg: CfgNode) -> Problems:
    """Switches of S3DG that act on kernels which the others leave out."""
    network = cfg.NETWORK
    if cfg.MODEL.MODEL_NAME != "S3DG":
        return
    if network.SEPARABLE_STEM and network.STEM_FRAMES == 1:
        yield (
            "NETWORK.SEPARABLE_STEM: True, but a first kernel of one frame (NETWORK.STEM_FRAMES 1) has nothing to "
            "split. Set it False, or use 3, 5 or 7 frames."
        )
    splits_stem = network.SEPARABLE_STEM and network.STEM_FRAMES > 1
    if network.TEMPORAL_NORM and network.TEMPORAL_FROM == "none" and not splits_stem:
        yield (
            "NETWORK.TEMPORAL_NORM: True, but there are no temporal convolutions (NETWORK.TEMPORAL_FROM none, stem not "
            "separable). Set it False."
        )
