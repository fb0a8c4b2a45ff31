"""The job of ``distinit export``: from a checkpoint to the student alone."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from distinit_plugin.build import input_spec
from distinit_plugin.config.node import CfgNode
from distinit_plugin.engine.export import FORMATS, export_network
from distinit_plugin.errors import UserError
from distinit_plugin.files import write_file
from distinit_plugin.jobs.trained import Trained, read_trained
from distinit_plugin.version import __version__


def export(checkpoint: str, output: Path, opts: Sequence[str] = ()) -> float:
    """Write the student of a checkpoint; the ending of the file says how.

    Args:
        checkpoint: Of this program, a converted file included.
        output: ``….safetensors``, ``….pt2`` or ``….onnx``; what was there is replaced when the new file agrees.
        opts: ``KEY VALUE …`` of ``trained.INPUT_KEYS`` and ``FURTHER_KEYS`` instead of what the checkpoint says.

    Returns:
        How far what was written is from the network, as a part of the largest output.

    Raises:
        UserError: No such format, a missing library, an operator that cannot be exported, or a file that does not
            agree; nothing is written then.
    """
    fmt = output.suffix.removeprefix(".")
    if fmt not in FORMATS:
        raise UserError(
            f"{output}: the ending says the format, and '{output.suffix}' is none. Allowed: "
            f"{', '.join('.' + name for name in FORMATS)}."
        )
    trained = read_trained(checkpoint, opts)
    network = trained.network()
    content, deviation = export_network(network, fmt, metadata(trained))
    write_file(output, lambda file: file.write(content))
    return deviation


def metadata(trained: Trained) -> dict[str, str]:
    """What a reader of the file has to know, as words and JSON."""
    cfg: CfgNode = trained.cfg
    return {
        "producer": f"distinit-plugin {__version__}, Python {sys.version_info.major}.{sys.version_info.minor}",
        "network": cfg.MODEL.MODEL_NAME,
        "switches": json.dumps(
            {"RESNET.DEPTH": cfg.RESNET.DEPTH, **{f"NETWORK.{k}": v for k, v in cfg.NETWORK.items()}}
        ),
        "input": json.dumps(asdict(input_spec(cfg))),
        "num_classes": str(trained.num_classes),
        "classes": json.dumps(trained.class_names, ensure_ascii=False),
    }
