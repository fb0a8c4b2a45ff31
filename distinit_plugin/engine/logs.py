"""One reader of the ``json_stats:`` lines of this package's runner and of PySlowFast.

The two write the same lines for clips. PySlowFast's AVA lines name the epoch otherwise and do not say how many steps it
has, its self-supervised ones have another ending, and its last line of an AVA test has no name at all.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distinit_plugin.engine.meters import JSON_FILE, JSON_PREFIX
from distinit_plugin.engine.progress import LOG_FILE

KINDS = ("train_iter", "train_epoch", "val_iter", "val_epoch", "test_iter", "test_final")
"""``LogLine.kind``."""

_PLACES = ("epoch", "cur_epoch", "iter", "cur_iter")

_MOST = 10**12
"""Of epochs and of steps."""
_LARGEST = 3.5e38
"""About the largest float32: no value that was computed is larger, and pictures could not be scaled to it."""


@dataclass(frozen=True)
class LogLine:
    """One line.

    Attributes:
        kind: One of :data:`KINDS`.
        epoch: Its number, from 1 on; 0 where the line is of none.
        epochs: How many there will be; 0 where the line does not say.
        step: Steps done of that epoch; 0 where the line is of all of them.
        steps: Steps of that epoch; 0 where the line does not say.
        values: Every number: accuracies and errors in percent, ``map`` as a fraction, ``gpu_mem`` in GiB.
    """

    kind: str
    epoch: int
    epochs: int
    step: int
    steps: int
    values: Mapping[str, float]


def read_log(folder: str | Path) -> list[LogLine]:
    """The lines of a run: first those of ``json_stats.log`` (epochs), then those of ``stdout.log`` (all).

    Lines of others, and lines that were cut off, are passed over.
    """
    lines = []
    for name in (JSON_FILE, LOG_FILE):
        path = Path(folder) / name
        if path.is_file():
            with open(path, encoding="utf-8", errors="replace") as file:
                lines += [line for text in file if (line := parse_line(text)) is not None]
    return lines


def final_test(folder: str | Path) -> dict[str, float]:
    """What the last test of a run ended with: ``top1_acc``, ``top5_acc`` in percent, ``map`` as a fraction."""
    found = [dict(line.values) for line in read_log(folder) if line.kind == "test_final"]
    return found[-1] if found else {}


def parse_line(text: str) -> LogLine | None:
    """One line of a log; ``None`` for any other text."""
    _, found, stats_text = text.rpartition(JSON_PREFIX)  # the last: a kill may have left the line before cut off
    if not found:
        return None
    try:
        stats = json.loads(stats_text)
        kind = _kind(stats)
        epoch, epochs = _pair(stats.get("epoch", stats.get("cur_epoch", "0")))
        step, steps = _pair(stats.get("iter", stats.get("cur_iter", "0")))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    if kind not in KINDS or (kind.startswith(("train", "val")) and epoch < 1):
        return None
    values = {key: number for key, value in stats.items() if (number := _number(key, value)) is not None}
    return LogLine(kind, epoch, epochs, step, steps, values)


def _kind(stats: Mapping[str, Any]) -> str:
    if "_type" in stats:
        return str(stats["_type"]).removesuffix("ssl").rstrip("_")
    if "split" in stats:
        return str(stats["split"])
    return "test_final" if stats.get("mode") == "test" and "map" in stats else ""


def _pair(text: object) -> tuple[int, int]:
    """``3/10`` → (3, 10); ``3`` → (3, 0)."""
    first, _, second = str(text).partition("/")
    numbers = int(first), int(second or 0)
    if not all(0 <= number <= _MOST for number in numbers):
        raise ValueError("no number of epochs or steps")
    return numbers


def _number(key: str, value: object) -> float | None:
    """A finite number; text is what both programs write percents as."""
    if key in _PLACES or isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value.removesuffix("G") if key == "gpu_mem" and isinstance(value, str) else value)
    except (ValueError, OverflowError):
        return None
    if not abs(number) <= _LARGEST:
        return None
    return number / 100 if key == "map" and isinstance(value, str) else number
