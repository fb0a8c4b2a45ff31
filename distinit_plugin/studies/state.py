"""What is known of a study's run, in a file of its folder that is either whole or not there."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from distinit_plugin.engine.run_record import OUTCOME_FILE
from distinit_plugin.errors import UserError
from distinit_plugin.files import read_json, why_unusable, write_json

STATE_FILE = OUTCOME_FILE
_MAX_BYTES = 1_000_000

WAITING, STARTED, FINISHED, FAILED = "waiting", "started", "finished", "failed"


@dataclass(frozen=True)
class RunState:
    """How far a run is.

    Attributes:
        name: Of the run, when it was started.
        digest: Which run it is.
        state: ``waiting``, ``started`` (running now, or interrupted), ``finished`` or ``failed``.
        reason: Of a failure, one sentence.
        log: Where more is said of it.
        metrics: Of its test: accuracies as fractions, and counts.
        validation: Its last one, a fraction.
        seconds: From its (last) start to its end.
        version: Of this program.
    """

    name: str
    digest: str
    state: str = WAITING
    reason: str = ""
    log: str = ""
    metrics: dict[str, float] = field(default_factory=dict)
    validation: float | None = None
    seconds: float = 0.0
    version: str = ""


def read_state(folder: Path, name: str, digest: str) -> RunState:
    """What the folder of a run says of it; ``waiting`` when it says nothing.

    Raises:
        UserError: Its file cannot be read, or is of another run.
    """
    path = folder / STATE_FILE
    try:
        values = read_json(path, _MAX_BYTES)
        state = _checked(values)
    except FileNotFoundError:
        return RunState(name, digest)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(
            f"{path} cannot be used ({why_unusable(error)}). Remove that file to do the run again."
        ) from error
    if state.digest != digest:
        raise UserError(f"{path} is of another run ({state.digest}, not {digest}). Remove that folder.")
    return state


def write_state(folder: Path, state: RunState) -> None:
    """Write it, temporary then renamed."""
    write_json(folder / STATE_FILE, asdict(state))


def _checked(values: Mapping[str, Any]) -> RunState:
    metrics, validation, seconds = values["metrics"], values["validation"], values["seconds"]
    texts = {key: values[key] for key in ("name", "digest", "state", "reason", "log", "version")}
    if not all(isinstance(text, str) for text in texts.values()):
        raise ValueError("a text is none")
    if texts["state"] not in (STARTED, FINISHED, FAILED):
        raise ValueError("its state is not known")
    if not isinstance(metrics, dict) or not all(map(_is_number, metrics.values())):
        raise ValueError("a metric is no number")
    if not _is_number(seconds) or not (validation is None or _is_number(validation)):
        raise ValueError("a number is none")
    return RunState(**texts, metrics=metrics, validation=validation, seconds=seconds)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
