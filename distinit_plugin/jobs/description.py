"""The job of ``distinit describe``: from a configuration to what its network is."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from rich.console import Console
from torch import nn

from distinit_plugin import build
from distinit_plugin.config.node import CfgNode
from distinit_plugin.engine.describe import Description, describe
from distinit_plugin.files import write_text

BOXES_NOTE = "GMACs: of a clip without the head, which comes once a box. An RPN (ROI.PROPOSALS) is not counted."

WIDEST = 1000
"""Columns of the terminal, more than any table takes."""


def describe_network(cfg: CfgNode, *, json_file: Path | None = None, console: Console | None = None) -> Description:
    """Print the student of a configuration; no weights are read and no arithmetic is done.

    A network that classifies boxes is described as one whose boxes are given: an RPN is a network of its own.

    Args:
        cfg: Names the network, its switches, and the clips of the test (DATA).
        json_file: Also written there.
        console: Where to print; the standard output when ``None``.

    Raises:
        UserError: There is no such network, or it cannot take these clips.
    """
    if cfg.DETECTION.ENABLE:
        cfg = cfg.clone()
        cfg.defrost()
        cfg.ROI.PROPOSALS = "given"
    with torch.device("meta"):
        network = build.build_network(cfg, num_classes=cfg.MODEL.NUM_CLASSES)
        assert isinstance(network, nn.Module)
        if cfg.INIT.TRAINABLE != "all":
            network.requires_grad_(False)
        if cfg.INIT.TRAINABLE == "classifier":
            network.reset_classifier(cfg.MODEL.NUM_CLASSES)
    description = describe(cfg.MODEL.MODEL_NAME, network)
    if json_file is not None:
        write_text(json_file, json.dumps(description.as_json(), indent=2, ensure_ascii=False) + "\n")
    console = console or Console()
    print_description(description, console)
    if cfg.DETECTION.ENABLE:
        console.print(BOXES_NOTE, highlight=False, soft_wrap=True)
    return description


def print_description(description: Description, console: Console) -> None:
    """The text, the table, the notes; a screen that is narrower than the table breaks lines, but nothing is cut."""
    table = description.table
    needed = console.measure(table, options=console.options.update(max_width=WIDEST)).maximum
    if needed > console.width:
        table.width = needed
    console.print(description.text, highlight=False, soft_wrap=True)
    console.print(table, crop=False)
    if description.notes:
        console.print(description.notes, highlight=False, soft_wrap=True)
