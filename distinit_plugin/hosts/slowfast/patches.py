"""What keeps PySlowFast from running here, one object a defect: a test for it and a cure, made in memory."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from distinit_plugin.errors import UserError
from distinit_plugin.registry import near_matches

WITHOUT_VARIABLE = "DISTINIT_SLOWFAST_WITHOUT"
"""Names of cures that are switched off, with commas between; processes that a job starts inherit it."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Patch:
    """One defect.

    Attributes:
        name: By which it is listed and switched off.
        symptom: What happens without the cure, in one line.
        present: Whether the defect is here.
        cure: Removes it from this process. Nothing on disk is changed.
    """

    name: str
    symptom: str
    present: Callable[[], bool]
    cure: Callable[[], None]


def given_names() -> list[str]:
    """What ``DISTINIT_SLOWFAST_WITHOUT`` names, right or wrong."""
    return [name.strip() for name in os.environ.get(WITHOUT_VARIABLE, "").split(",") if name.strip()]


def switched_off(known: Iterable[Patch]) -> frozenset[str]:
    """The names in ``DISTINIT_SLOWFAST_WITHOUT``.

    Raises:
        UserError: One that is no patch's.
    """
    names = [patch.name for patch in known]
    given = given_names()
    for name in given:
        if name not in names:
            raise UserError(
                f"there is no patch named '{name}' to switch off.{near_matches(name, names)} Known: {', '.join(names)}."
            )
    return frozenset(given)


def apply_patches(patches: Sequence[Patch], without: frozenset[str]) -> list[Patch]:
    """Cure what is here and not switched off, in this order; returns what was cured."""
    applied = []
    for patch in patches:
        if patch.name in without:
            logger.warning("patch %s is switched off", patch.name)
        elif patch.present():
            patch.cure()
            applied.append(patch)
    return applied


@contextmanager
def replaced(owner: Any, **values: Any) -> Iterator[None]:
    """Other attributes of a module or class for a while."""
    before = {name: getattr(owner, name) for name in values}
    try:
        for name, value in values.items():
            setattr(owner, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(owner, name, value)
