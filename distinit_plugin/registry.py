"""Registries of parts, and one look-up whose error names the near matches."""

from __future__ import annotations

import difflib
from typing import Any

from fvcore.common.registry import Registry

from distinit_plugin.errors import UserError

MODELS = Registry("model")
"""Video and image networks: ``build(…typed arguments…) -> Network``."""

LOSSES = Registry("loss")
"""Per-example losses, see ``distinit_plugin.losses``."""

FRAME_PICKERS = Registry("frame picker")
"""Which frames of the student's clip a teacher sees, see ``distinit_plugin.video.sampling``."""

CORPORA = Registry("corpus format")
"""Readers of lists and folders of videos, see ``distinit_plugin.video.corpus``."""

FLOW_BACKENDS = Registry("flow back end")
"""Optical flow between two frames, see ``distinit_plugin.flow.backends``."""

PROGRAMS = {"slowfast": "distinit_plugin.hosts.slowfast.borrowed"}
"""Networks of other programs (``PROGRAM/NAME``) → the module that builds them, by a function ``build_network``.

It is imported when such a network is asked for, never before: the program need not be there.
"""


def near_names(name: str, allowed: list[str]) -> list[str]:
    """The one or two of ``allowed`` that somebody who wrote ``name`` may have meant."""
    folded = {option.lower(): option for option in allowed}
    return [folded[match] for match in difflib.get_close_matches(name.lower()[:100], list(folded), n=2, cutoff=0.6)]


def near_matches(name: str, allowed: list[str]) -> str:
    """``" Did you mean A or B?"``, or nothing when nothing is near."""
    found = near_names(name, allowed)
    return f" Did you mean {' or '.join(found)}?" if found else ""


def lookup(registry: Registry, name: str, where: str) -> Any:
    """Return the object registered as ``name``.

    Args:
        registry: One of the registries of this module.
        name: The name that the user gave.
        where: The configuration key that the name came from, for the error.

    Raises:
        UserError: No such name; the text lists the names there are.
    """
    known = sorted(key for key, _ in registry)
    if name not in registry:
        kind = registry._name
        raise UserError(
            f"{where}: there is no {kind} named '{name}'.{near_matches(name, known)} Known: {', '.join(known)}."
        )
    return registry.get(name)
