"""A study: runs in rows that differ in what is asked, each with several seeds, and how the rows compare."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from distinit_plugin.engine.results import paired, paired_text, percent
from distinit_plugin.errors import UserError
from distinit_plugin.files import read_json, why_unusable

_MAX_BYTES = 16 * 1024**2


@dataclass(frozen=True)
class Study:
    """What belongs together.

    Attributes:
        name: Of the study.
        rows: Row → seed → the run's folder.
        baseline: The row that the others are compared with; ``None``: no comparison.
        metric: Of ``metrics.json``.
        baselines: Row → the one that it is compared with, where rows have different ones.
        shown: Rows that were chosen by their validation; empty: all of them stand for themselves.
        steps: Name → folder of what the rows' runs start from.
        repeats: What a row has several of, as seeds; empty: each row is one run.
    """

    name: str
    rows: Mapping[str, Mapping[str, Path]]
    baseline: str | None = None
    metric: str = "top1"
    baselines: Mapping[str, str] = field(default_factory=dict)
    shown: Sequence[str] = ()
    steps: Mapping[str, Path] = field(default_factory=dict)
    repeats: str = "seed"

    def run_name(self, row: str, repeat: str) -> str:
        """What a report calls a run."""
        return f"{row}, {self.repeats} {repeat}" if self.repeats else row

    def baseline_of(self, row: str) -> str | None:
        """The row that another one is compared with."""
        found = self.baselines.get(row, self.baseline)
        return found if found != row else None

    @property
    def base_folders(self) -> set[Path]:
        """The first run of each row that others are compared with."""
        rows = {name for row in self.rows if (name := self.baseline_of(row)) is not None}
        return {next(iter(self.rows[name].values())) for name in rows if self.rows[name]}


def read_study(path: Path, metrics: Sequence[str]) -> Study:
    """Read the list of a study's runs; folders are relative to it.

    Args:
        path: The file.
        metrics: Names that a metric may have.

    Raises:
        UserError: It cannot be read, or does not say what it must.
    """
    try:
        values = read_json(path, _MAX_BYTES)
        rows = {
            str(name): {str(seed): path.parent / _name(folder, "a folder") for seed, folder in _object(row).items()}
            for name, row in _object(values["rows"]).items()
        }
        if not any(rows.values()):
            raise ValueError("it has no runs")
        baseline = values.get("baseline")
        if baseline is not None and (not isinstance(baseline, str) or baseline not in rows):
            raise ValueError("its baseline is none of its rows")
        baselines = {str(row): str(base) for row, base in _object(values.get("baselines", {})).items()}
        if not {*baselines, *baselines.values()} <= rows.keys():
            raise ValueError("its baselines are none of its rows")
        metric = _name(values.get("metric", "top1"), "its metric")
        if metric not in metrics:
            raise ValueError(f"its metric is none of {', '.join(metrics)}")
        shown = [str(row) for row in _list(values.get("shown", []))]
        if not set(shown) <= rows.keys():
            raise ValueError("what it shows is none of its rows")
        return Study(
            name=_name(values["name"], "its name"),
            rows=rows,
            baseline=baseline,
            metric=metric,
            baselines=baselines,
            shown=shown if len(shown) < len(rows) else [],
            steps={
                str(name): path.parent / _name(folder, "a folder")
                for name, folder in _object(values.get("steps", {})).items()
            },
            repeats=", ".join(map(str, _list(values.get("average", ["seed"])))),
        )
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(
            f"{path} cannot be read as a study ({why_unusable(error)}). It holds name, baseline (a row or null), rows "
            "{row: {seed: folder}} and metric."
        ) from error


def _object(value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ValueError("its rows are no objects {row: {seed: folder}}")
    return value


def _list(value: Any) -> Sequence[Any]:
    if not isinstance(value, list):
        raise ValueError("what it shows, or averages over, is no list")
    return value


def _name(value: Any, what: str) -> str:
    if not isinstance(value, str) or not value or "\0" in value:
        raise ValueError(f"{what} is no text")
    return value


class StudyRow(NamedTuple):
    """One row with its numbers.

    Attributes:
        name: Of the row.
        values: Seed → fraction, of the runs that have one.
        missing: Seeds without.
        gain: ``+3.1 ± 0.8`` over the baseline, points; empty: nothing to compare.
        mean_gain: The number in it, a fraction; ``None`` likewise.
        ahead: ``3 of 3``: seeds in which it is better than the baseline.
    """

    name: str
    values: dict[str, float]
    missing: list[str]
    gain: str
    mean_gain: float | None
    ahead: str

    @property
    def mean(self) -> float | None:
        """Over seeds."""
        return statistics.fmean(self.values.values()) if self.values else None

    @property
    def text(self) -> str:
        """``71.3 ± 0.4``."""
        return percent(list(self.values.values()))


def study_rows(study: Study, results: Mapping[Path, float]) -> list[StudyRow]:
    """The table.

    Args:
        study: Its runs.
        results: Folder → fraction; runs without one are missing.
    """
    values = {
        name: {seed: results[folder] for seed, folder in row.items() if folder in results}
        for name, row in study.rows.items()
    }
    rows = []
    for name, own in values.items():
        found = list(paired(own, values.get(study.baseline_of(name) or "", {})).values())
        rows.append(
            StudyRow(
                name=name,
                values=own,
                missing=[seed for seed in study.rows[name] if seed not in own],
                gain=paired_text(found),
                mean_gain=statistics.fmean(found) if found else None,
                ahead=f"{sum(value > 0 for value in found)} of {len(found)}" if found else "",
            )
        )
    return rows
