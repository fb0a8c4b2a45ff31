"""Video networks that learn from frozen image teachers on unlabeled video.

The same as the command line, in a few lines of Python::

    from distinit_plugin import load_cfg, run

    cfg, warnings = load_cfg("configs/DistInit/table1_r2plus1d18_distinit_pretrain.yaml", ["OUTPUT_DIR", "runs/mine"])
    run(cfg)
"""

from __future__ import annotations

import importlib
from typing import Any

from distinit_plugin.version import __version__

_PLACES = {
    "get_cfg": "distinit_plugin.config.defaults",
    "load_cfg": "distinit_plugin.config.load",
    "run": "distinit_plugin.jobs.running",
    "predict": "distinit_plugin.jobs.prediction",
    "build_network": "distinit_plugin.models.factory",
    "InputSpec": "distinit_plugin.models.network",
    "build_teacher": "distinit_plugin.teachers.factory",
    "load_weights": "distinit_plugin.weights",
    "build_loss": "distinit_plugin.losses",
    "build_adapter": "distinit_plugin.objectives",
    "Term": "distinit_plugin.objectives",
    "Objective": "distinit_plugin.objectives",
    "ViewSpec": "distinit_plugin.types",
    "UserError": "distinit_plugin.errors",
}

__all__ = ["__version__", *_PLACES]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: the command line answers ``--help`` without loading torch."""
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_PLACES[name]), name)
