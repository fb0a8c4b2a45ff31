"""Make PySlowFast ready in this process, and run its own ``tools/run_net.py``."""

from __future__ import annotations

import importlib
import logging
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from distinit_plugin.errors import UserError
from distinit_plugin.hosts.slowfast import launching
from distinit_plugin.hosts.slowfast.checkout import check_packages, find_checkout
from distinit_plugin.hosts.slowfast.defects import DEFECTS
from distinit_plugin.hosts.slowfast.detection_defects import DETECTION_DEFECTS
from distinit_plugin.hosts.slowfast.missing import MISSING, TOOLS
from distinit_plugin.hosts.slowfast.patches import Patch, apply_patches, switched_off
from distinit_plugin.hosts.slowfast.registration import register
from distinit_plugin.hosts.slowfast.schema import add_nodes

PATCHES = (*MISSING, *DEFECTS, *DETECTION_DEFECTS)

logger = logging.getLogger(__name__)

_applied: list[Patch] | None = None
_importable: list[list[Patch]] = []


def boot() -> list[Patch]:
    """Find the checkout, cure what is broken, register everything; once in a process.

    Returns:
        What was cured, in the order in which it was.

    Raises:
        UserError: There is no checkout, or packages that it imports are missing.
    """
    global _applied
    if _applied is None:
        without = switched_off(PATCHES)
        applied = make_importable()
        add_nodes(importlib.import_module("slowfast.config.defaults")._C)
        importlib.import_module("slowfast.models")
        importlib.import_module("slowfast.datasets")
        _applied = applied + apply_patches((*DEFECTS, *DETECTION_DEFECTS), without)
        register()
        misc: Any = importlib.import_module("slowfast.utils.misc")
        misc.launch_job = launching.launch_job
    return _applied


def make_importable() -> list[Patch]:
    """Let ``slowfast`` be imported in this process, and nothing more; twice is as once.

    Returns:
        What was cured.

    Raises:
        UserError: There is no checkout, or packages that it imports are missing.
    """
    if not _importable:
        root = find_checkout()
        check_packages()
        _put_on_path(root)
        _importable.append(apply_patches(MISSING, switched_off(PATCHES)))
    return _importable[0]


def run_net(words: Sequence[str]) -> None:
    """Run PySlowFast's own main with the words of its command line."""
    applied = boot()
    print(f"PySlowFast in {find_checkout()}; patched: {', '.join(patch.name for patch in applied) or 'nothing'}")
    module = importlib.import_module(f"{TOOLS}.run_net")
    before = sys.argv
    sys.argv = [str(module.__file__), *words]
    try:
        module.main()
    except Exception as error:
        told = launching.told(str(error)) if isinstance(error, UserError) else None
        if told is not None:  # raised by a worker of a loader
            raise UserError(told) from error
        place = _place_in(find_checkout(), error)
        if place is None:
            raise
        traceback.print_exception(error)
        raise UserError(
            f"PySlowFast stopped in {place} ({type(error).__name__}: {error}); the traceback is above."
        ) from error
    finally:
        sys.argv = before


def _place_in(root: Path, error: Exception) -> str | None:
    """``file, line N`` where PySlowFast's own code raised an error; ``None``: raised elsewhere, or meant for people."""
    frames = traceback.extract_tb(error.__traceback__)
    if isinstance(error, UserError | OSError | MemoryError) or not frames:
        return None
    last = Path(frames[-1].filename)
    return f"{last.relative_to(root)}, line {frames[-1].lineno}" if last.is_relative_to(root) else None


def _put_on_path(root: Path) -> None:
    """Before anything else of its name, and without a trace: compiled files would lie in the checkout."""
    sys.dont_write_bytecode = True
    sys.path[:] = [str(root), *(path for path in sys.path if path != str(root))]
