"""A network from a checkpoint of this program, which holds its own configuration, on any machine."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from distinit_plugin import build
from distinit_plugin.config.load import parse_cfg
from distinit_plugin.config.node import CfgNode
from distinit_plugin.engine.checkpoint import load_checkpoint
from distinit_plugin.errors import UserError
from distinit_plugin.types import Network
from distinit_plugin.weights import load_weights


@dataclass(frozen=True)
class Trained:
    """What a checkpoint says about itself.

    Attributes:
        path: The file.
        cfg: Of its training, with the device and precision of this machine.
        class_names: Of its classes; empty where they are not known.
    """

    path: str
    cfg: CfgNode
    class_names: list[str]

    @property
    def has_classifier(self) -> bool:
        """Whether the network gives logits."""
        return build.needs_own_logits(self.cfg)

    def network(self) -> Network:
        """The network with its weights.

        Raises:
            WeightsError: They do not fit it.
        """
        network = build.build_network(self.cfg)
        load_weights(network, self.path, strict=True)
        return network


def read_trained(checkpoint: str) -> Trained:
    """Read a checkpoint's configuration.

    Args:
        checkpoint: A file that ``distinit run`` or ``distinit probe`` wrote.

    Raises:
        UserError: The file is unreadable or of another program.
    """
    state = load_checkpoint(checkpoint)
    text, own = state.get("cfg"), state.get("distinit")
    if not isinstance(text, str) or not isinstance(own, dict):
        raise UserError(
            f"{checkpoint} was not written by this program, so how to feed it is not known: give a checkpoint of "
            "distinit run."
        )
    cfg, _ = parse_cfg(text, f"the configuration in {checkpoint}", check=False)
    cfg.defrost()
    cfg.DATA_LOADER.NUM_WORKERS = 0
    # This machine need not be the one that trained.
    cfg.NUM_GPUS = int(torch.cuda.is_available())
    cfg.NUM_SHARDS, cfg.SHARD_ID = 1, 0
    cfg.TRAIN.MIXED_PRECISION, cfg.RUNNER.PRECISION = False, "auto"
    cfg.freeze()
    return Trained(checkpoint, cfg, [str(name) for name in own.get("class_names", [])])
