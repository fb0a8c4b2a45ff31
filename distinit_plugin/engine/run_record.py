"""What a run says of itself in ``OUTPUT_DIR/run.json``: its configuration, and each process that worked on it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from distinit_plugin.errors import UserError
from distinit_plugin.files import read_json, why_unusable, write_text

RECORD_FILE = "run.json"
OUTCOME_FILE = "study_run.json"
"""Beside it, what a study knows of the run: also of one that failed before it began, or was killed."""

FORMAT = 1

STATES = ("running", "done", "failed", "stopped")
"""Of a process; one that was killed stays ``running``."""

MAX_PARTS = 50
"""Processes that are remembered, the last ones."""

_MAX_BYTES = 16 * 1024**2
_MOST = 1e12
"""Steps and seconds."""


@dataclass
class RunPart:
    """One process that worked on a run (a continued run has several).

    Attributes:
        started: ISO 8601, UTC.
        ended: The same; empty while it runs, and when it was killed.
        state: One of ``STATES``.
        error: Why it failed or stopped.
        environment: Versions and machine.
        steps: Optimizer steps of the run that were done at its end.
        trained_seconds: That it trained.
        wait_share: Fraction of these spent waiting for data.
    """

    started: str
    ended: str = ""
    state: str = "running"
    error: str = ""
    environment: dict[str, str] = field(default_factory=dict)
    steps: int = 0
    trained_seconds: float = 0.0
    wait_share: float = 0.0


@dataclass
class RunRecord:
    """A run.

    Attributes:
        files: YAML files that it was started with.
        config: All keys, as YAML.
        parts: Its processes, the first one first.
    """

    files: list[str]
    config: str
    parts: list[RunPart] = field(default_factory=list)

    def write(self, folder: Path) -> None:
        """Write it to the run's folder.

        Raises:
            UserError: That cannot be written.
        """
        parts = [asdict(part) for part in self.parts[-MAX_PARTS:]]
        contents = {"format": FORMAT, "files": self.files, "config": self.config, "parts": parts}
        text = json.dumps(contents, indent=2, allow_nan=False) + "\n"
        write_text(folder / RECORD_FILE, text, durable=False)  # after a power cut a report says less


def read_record(folder: Path) -> RunRecord | None:
    """The record of a run's folder; ``None``: it has none.

    Raises:
        UserError: It cannot be read.
    """
    path = folder / RECORD_FILE
    if not path.is_file():
        return None
    try:
        values = read_json(path, _MAX_BYTES)
        if values["format"] != FORMAT:
            raise ValueError(f"its format is not {FORMAT}")
        parts = [_part(part) for part in _list(values["parts"], "parts")]
        return RunRecord([str(name) for name in _list(values["files"], "files")], str(values["config"]), parts)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{path} cannot be read as the record of a run ({why_unusable(error)}).") from error


def read_failure(folder: Path) -> str:
    """Why a study's run failed; empty: it did not, nobody knows, or it is of no study."""
    try:
        values = read_json(folder / OUTCOME_FILE, _MAX_BYTES)
    except (OSError, ValueError, RecursionError):
        return ""
    return str(values.get("reason", "")) if values.get("state") == "failed" else ""


def _list(value: Any, name: str) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError(f"its {name} are no list")
    return value


def _part(values: Any) -> RunPart:
    if not isinstance(values, Mapping) or not isinstance(values.get("environment"), Mapping):
        raise ValueError("a part of it is no object")
    state = str(values["state"])
    if state not in STATES:
        raise ValueError("a part of it has a state that does not exist")
    return RunPart(
        started=str(values["started"]),
        ended=str(values["ended"]),
        state=state,
        error=str(values["error"]),
        environment={str(name): str(value) for name, value in values["environment"].items()},
        steps=int(_number(values["steps"])),
        trained_seconds=_number(values["trained_seconds"]),
        wait_share=min(_number(values["wait_share"]), 1.0),
    )


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= _MOST:
        raise ValueError("a part of it has a number that is none")
    return float(value)
