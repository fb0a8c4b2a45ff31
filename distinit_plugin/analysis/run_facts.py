"""What a run's folder says, read so that nothing in it can do harm: what is damaged becomes a sentence."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distinit_plugin.engine.curves import RunCurves, curves_of
from distinit_plugin.engine.logs import KINDS, LogLine, read_log
from distinit_plugin.engine.meters import JSON_FILE
from distinit_plugin.engine.progress import LOG_FILE
from distinit_plugin.engine.run_record import OUTCOME_FILE, RECORD_FILE, RunPart, RunRecord, read_failure, read_record
from distinit_plugin.errors import Problems, UserError
from distinit_plugin.files import read_json, why_unusable

METRICS_FILE = "metrics.json"

MEASURES = {
    "top1": "top-1",
    "top5": "top-5",
    "clip_top1": "per clip",
    "mean_class_accuracy": "class mean",
    "map": "frame-mAP",
    "mean_iou": "mean IoU",
    "recall50": "recall at 0.5",
    "recall70": "recall at 0.7",
}
"""Fractions of ``metrics.json`` that are shown → what they are called."""

COUNTS = {"num_videos": "videos", "num_keyframes": "keyframes"}
"""What was tested → its unit."""

MAX_BAD = 100_000
_MAX_BYTES = 64 * 1024**2


@dataclass(frozen=True)
class Described:
    """What a configuration says, in words; empty where it is not known.

    Attributes:
        network: Student.
        start: Where its weights came from.
        teaching: What it learnt from.
        corpus: Training videos.
        seed: RNG_SEED.
        config: ``DistInit/table1_res3d18_scratch``: the file, in the way of ``published.config_name``.
        step_clips: Clips of an optimizer step; 0: not known.
    """

    network: str = ""
    start: str = ""
    teaching: str = ""
    corpus: str = ""
    seed: str = ""
    config: str = ""
    step_clips: int = 0


@dataclass
class Timing:
    """How long training took, from its logs.

    Attributes:
        step_seconds: Mean of a step; NaN: not logged.
        wait_share: Fraction of it spent waiting for data.
        validation_seconds: Mean of a validation; NaN: there was none.
        gpu_gib: Largest memory of the GPU; 0 without one.
        epoch: The last one that was logged; 0: none.
        epochs: How many there would be; 0: not logged.
    """

    step_seconds: float = math.nan
    wait_share: float = math.nan
    validation_seconds: float = math.nan
    gpu_gib: float = 0.0
    epoch: int = 0
    epochs: int = 0


@dataclass
class RunFacts:
    """One run.

    Attributes:
        name: How the report calls it.
        folder: Its OUTPUT_DIR.
        record: What it says of itself; ``None``: an older program wrote it, or another.
        described: What was run.
        settings: All keys of its configuration → values as text; empty where it is not known.
        config: The configuration as YAML.
        metrics: Measure → fraction.
        tested: ``400 videos``; empty without a test.
        per_class: Class → accuracy or average precision, fractions.
        curves: Of its logs; ``None``: it has not trained.
        timing: Of its logs.
        bad: Videos that could not be used → why.
        problems: Sentences about what could not be read.
        is_there: Whether the folder holds a run; one of a study may not have started.
        failure: Why it failed, as its study says; empty: it did not, or is of none.
    """

    name: str
    folder: Path
    record: RunRecord | None = None
    described: Described = field(default_factory=Described)
    settings: dict[str, str] = field(default_factory=dict)
    config: str = ""
    metrics: dict[str, float] = field(default_factory=dict)
    tested: str = ""
    per_class: dict[str, float] = field(default_factory=dict)
    curves: RunCurves | None = None
    timing: Timing = field(default_factory=Timing)
    bad: dict[str, str] = field(default_factory=dict)
    problems: Problems = field(default_factory=Problems)
    is_there: bool = True
    failure: str = ""

    @property
    def last_part(self) -> RunPart | None:
        """The process that worked on it last."""
        return self.record.parts[-1] if self.record is not None and self.record.parts else None

    @property
    def state(self) -> str:
        """``done``, ``failed``, ``stopped``, ``unfinished`` or ``not started``."""
        if not self.is_there:
            return "not started"
        if self.failure and (self.last_part is None or self.last_part.state != "done"):
            return "failed"
        if self.last_part is not None:
            return "unfinished" if self.last_part.state == "running" else self.last_part.state
        return "done" if self.metrics or 0 < self.timing.epoch == self.timing.epochs else "unfinished"

    @property
    def error(self) -> str:
        """Why it failed or stopped; empty where it did not."""
        if self.state not in ("failed", "stopped"):
            return ""
        return (self.last_part.error if self.last_part is not None else "") or self.failure

    @property
    def environment(self) -> dict[str, str]:
        """Of the last process."""
        return self.last_part.environment if self.last_part is not None else {}


def is_run(folder: Path, results: str, checkpoints: str) -> bool:
    """Whether a folder is that of a run.

    Args:
        folder: It.
        results: Name of the folder of a test in it.
        checkpoints: Of checkpoints.
    """
    return (folder / checkpoints).is_dir() or any(
        (folder / name).is_file()
        for name in (RECORD_FILE, OUTCOME_FILE, JSON_FILE, LOG_FILE, f"{results}/{METRICS_FILE}")
    )


def read_facts(name: str, folder: Path, results: Path, bad_videos: Path) -> RunFacts:
    """Read all but the configuration, which is not this module's to understand.

    Args:
        name: How the report calls the run.
        folder: OUTPUT_DIR.
        results: Folder of its test.
        bad_videos: Its list of bad videos.
    """
    facts = RunFacts(name, folder, failure=read_failure(folder))
    with facts.problems.collect():
        facts.record = read_record(folder)
    with facts.problems.collect():
        _read_metrics(facts, results / METRICS_FILE)
    try:
        lines = read_log(folder)
        facts.timing, facts.curves = timing_of(lines), curves_of(lines)
    except OSError as error:
        facts.problems.append(f"its logs cannot be read ({why_unusable(error)}).")
    _read_bad(facts, bad_videos)
    return facts


def _read_metrics(facts: RunFacts, path: Path) -> None:
    if not path.is_file():
        return
    try:
        values = read_json(path, _MAX_BYTES)
        metrics = {name: _fraction(values[name], name) for name in MEASURES if name in values}
        per_class = {str(name): _fraction(value, name) for name, value in _object(values, "per_class").items()}
        counts = [f"{_count(values[key], key)} {unit}" for key, unit in COUNTS.items() if key in values]
        bad = {str(video["path"]): str(video["reason"]) for video in _list(values, "bad")}
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{path} cannot be read as the result of a test ({why_unusable(error)}).") from error
    facts.metrics = {name: value for name, value in metrics.items() if not math.isnan(value)}
    facts.per_class, facts.tested = per_class, ", ".join(counts)
    facts.bad |= bad


def _fraction(value: Any, name: str) -> float:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return math.nan
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise ValueError(f"'{name[:60]}' is no number from 0 to 1")
    return float(value)


def _count(value: Any, name: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 10**12:
        raise ValueError(f"'{name}' is no number of examples")
    return value


def _object(values: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = values.get(name, {})
    if not isinstance(found, Mapping):
        raise ValueError(f"'{name}' is no object")
    return found


def _list(values: Mapping[str, Any], name: str) -> list[Any]:
    found = values.get(name, [])
    if not isinstance(found, list) or not all(isinstance(item, Mapping) for item in found):
        raise ValueError(f"'{name}' is no list of objects")
    return found


def _read_bad(facts: RunFacts, path: Path) -> None:
    if not path.is_file():
        return
    try:
        with open(path, encoding="utf-8", errors="replace", newline="") as file:
            for number, row in enumerate(csv.reader(file)):
                if number > MAX_BAD:
                    break
                if len(row) == 2 and row != ["path", "reason"]:
                    facts.bad[row[0]] = row[1]
    except (OSError, csv.Error) as error:
        facts.problems.append(f"{path} cannot be read as a list of videos ({why_unusable(error)}).")


# ------------------------------------------------------------------------------------------------------- timings
def timing_of(lines: Iterable[LogLine]) -> Timing:
    """What the lines of logs say of time: means of epochs, or of steps where no epoch is done."""
    kinds: dict[str, list[LogLine]] = {kind: [] for kind in KINDS}
    for line in lines:
        kinds[line.kind].append(line)
    trained = kinds["train_epoch"] or kinds["train_iter"]
    seconds, waited = _numbers(trained, "dt"), _numbers(trained, "dt_data")
    timing = Timing(gpu_gib=max(_numbers(trained, "gpu_mem"), default=0.0))
    if seconds and len(seconds) == len(waited) and sum(seconds) > 0:
        timing.step_seconds = math.fsum(seconds) / len(seconds)
        timing.wait_share = min(math.fsum(waited) / math.fsum(seconds), 1.0)
    if validations := _numbers(kinds["val_epoch"], "time_diff"):
        timing.validation_seconds = math.fsum(validations) / len(validations)
    if trained:
        timing.epoch, timing.epochs = trained[-1].epoch, trained[-1].epochs
    return timing


def _numbers(lines: Iterable[LogLine], key: str) -> list[float]:
    return [line.values[key] for line in lines if 0 <= line.values.get(key, -1) < 1e12]
