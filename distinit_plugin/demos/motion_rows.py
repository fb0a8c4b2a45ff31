"""How much of the flow of the demonstration's videos can be read from layers of its networks: one seed, four layers."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from rich.console import Console

from distinit_plugin.config.load import load_cfg
from distinit_plugin.demos.runs import pairs_of
from distinit_plugin.engine.motion_report import MotionCurve, plot_motion
from distinit_plugin.engine.results import Row
from distinit_plugin.jobs.motion_probe import probe_motion

CONFIG = "configs/demo_d3d/probe.yaml"
PLOT = "motion.png"

Errors = dict[str, dict[str, float]]
"""Network → layer → end-point error, pixels of the network's input."""


class Probe(NamedTuple):
    """One probe.

    Attributes:
        name: Of the network in tables.
        folder: For the decoders, below that of all runs.
        weights: Of the network.
        options: Overrides of the YAML file.
        flow_network: Weights of a flow stream that is probed in the same way; ``None``: none.
    """

    name: str
    folder: str
    weights: Path
    options: Mapping[str, object]
    flow_network: Path | None = None


def draw_errors(curves: Sequence[MotionCurve], folder: Path) -> Errors:
    """The errors that probes found, under those of no motion at all (``all zeros``); their plot below ``folder``."""
    plot_motion(curves, folder / PLOT)
    zeros = {layer.layer: layer.zeros for layer in curves[0].layers}
    return {"all zeros": zeros, **{curve.name: {layer.layer: layer.epe for layer in curve.layers} for curve in curves}}


def error_rows(errors: Errors) -> list[Row]:
    """The rows of a table."""
    return [Row(name, {layer: f"{value:.3f}" for layer, value in found.items()}) for name, found in errors.items()]


def run_probe(probe: Probe, folder: Path, options: Mapping[str, object]) -> list[MotionCurve]:
    """Train decoders of flow on layers of a frozen network, in this process; of ``flow_network`` as well."""
    cfg, _ = load_cfg(CONFIG, pairs_of({**probe.options, **options, "OUTPUT_DIR": folder / probe.folder}))
    found = probe_motion(
        cfg, probe.weights, flow_network=probe.flow_network or "", name=probe.name, console=Console(file=io.StringIO())
    )
    return [found.curve, *([found.flow_stream] if found.flow_stream else [])]
