"""What came out of a study: the rows of its table, paired differences, and files that others read.

``study.json``::

    {"name": …, "metric": "top1",
     "axes": {axis: [value, …]}, "average": [axis, …],
     "rows": {row: {repeat: "runs/FOLDER"}},        every place of the grid; below the study's folder
     "shown": [row, …],                             of BEST_OF the best ones; without it all
     "baseline": row or null,                       null: none, or one of its own for each row:
     "baselines": {row: row it is compared with},
     "results": {row: {repeat: fraction}},          of the runs that are finished
     "validation": {row: {repeat: fraction}},
     "differences": {row: {"values": {repeat: fraction}, "mean": …, "standard_error": … or null}},
     "steps": {"name (digest)": "runs/FOLDER"},     what the rows' runs start from
     "failed": {"runs/FOLDER": sentence}}
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

from distinit_plugin.engine.results import Row, Value, markdown_table, paired, paired_text, standard_error
from distinit_plugin.files import write_csv, write_json, write_text
from distinit_plugin.studies.grid import Plan, repeat_of, row_of
from distinit_plugin.studies.spec import METRICS
from distinit_plugin.studies.state import FAILED, FINISHED, RunState, read_state

STUDY_JSON, RESULTS_CSV, RESULTS_MARKDOWN = "study.json", "results.csv", "results.md"

MAX_COLUMNS = 10
"""Repeats that have a column each."""

Scores = dict[str, dict[str, float]]
"""Row → repeat → fraction."""


def states_of(plan: Plan) -> dict[str, RunState]:
    """What is known of each run, by digest.

    Raises:
        UserError: A state cannot be read.
    """
    output = plan.study.output
    return {digest: read_state(output / run.folder, run.name, digest) for digest, run in plan.runs.items()}


class Results:
    """The numbers of a study as far as it is done."""

    def __init__(self, plan: Plan, states: Mapping[str, RunState]) -> None:
        """Gather them.

        Args:
            plan: Of the study.
            states: Of its runs.
        """
        self.plan, self._study, self._states = plan, plan.study, states
        self.rows: dict[str, dict[str, str]] = {}
        self.scores: Scores = {}
        self.validation: Scores = {}
        self._places: dict[str, dict[str, str]] = {}
        for cell in plan.cells:
            row, repeat = row_of(self._study, cell.place), repeat_of(self._study, cell.place)
            self.rows.setdefault(row, {})[repeat] = plan.runs[cell.run].folder
            self._places[row] = {axis: cell.place[axis] for axis in self._study.row_axes}
            state = states[cell.run]
            found = state.metrics.get(self._study.metric) if state.state == FINISHED else None
            if found is not None:
                self.scores.setdefault(row, {})[repeat] = found
            if state.state == FINISHED and state.validation is not None:
                self.validation.setdefault(row, {})[repeat] = state.validation
        self.shown = self._choose()
        self.baselines = self._baselines()

    def _choose(self) -> list[str]:
        """Of rows that differ in BEST_OF alone the one with the best mean validation; all while a run is missing."""
        best_of = self._study.best_of
        if not best_of:
            return list(self.rows)
        groups: dict[tuple[str, ...], list[str]] = {}
        for row, place in self._places.items():
            groups.setdefault(tuple(value for axis, value in place.items() if axis != best_of), []).append(row)
        shown = []
        for rows in groups.values():
            whole = all(len(self.validation.get(row, {})) == len(self.rows[row]) for row in rows)
            means = {row: statistics.fmean(self.validation[row].values()) for row in rows} if whole else {}
            shown += [max(means, key=lambda row: means[row])] if whole else rows
        return shown

    def _baselines(self) -> dict[str, str]:
        """Shown row → the shown row that it is compared with; the value of BEST_OF may be another there."""
        wanted = self._study.baseline
        if not wanted:
            return {}
        fixed = [axis for axis in self._study.row_axes if axis != self._study.best_of]
        found = {}
        for row in self.shown:
            target = {**self._places[row], **wanted}
            same = [other for other in self.shown if all(self._places[other][axis] == target[axis] for axis in fixed)]
            if len(same) == 1 and same[0] != row:
                found[row] = same[0]
        return found

    def differences(self, row: str) -> dict[str, float]:
        """Repeat → row less its baseline, where both have one."""
        return paired(self.scores.get(row, {}), self.scores.get(self.baselines.get(row, ""), {}))

    # ------------------------------------------------------------------------------------------------------- tables
    def table(self) -> list[Row]:
        """The rows that are shown."""
        return [Row(row, self._values(row)) for row in self.shown]

    def full_table(self) -> list[Row]:
        """All rows, with their validation, where BEST_OF leaves some out."""
        if len(self.shown) == len(self.rows):
            return []
        rows = []
        for row in self.rows:
            chosen = "yes" if row in self.shown else ""
            values: dict[str, Value] = {"shown": chosen, "validation": list(self.validation.get(row, {}).values())}
            rows.append(Row(row, {**values, METRICS[self._study.metric]: list(self.scores.get(row, {}).values())}))
        return rows

    def _values(self, row: str) -> dict[str, Value]:
        scores = self.scores.get(row, {})
        values: dict[str, Value] = {METRICS[self._study.metric]: list(scores.values())}
        if self._study.baseline:
            title = f"− {', '.join(self._study.baseline.values())}"
            values[title] = paired_text(list(self.differences(row).values()))
        repeats = list(dict.fromkeys(repeat for found in self.rows.values() for repeat in found))
        if self._study.average and len(repeats) <= MAX_COLUMNS:
            axes = ", ".join(self._study.average)
            values |= {f"{axes} {repeat}": scores.get(repeat, "") for repeat in repeats}
        return values

    @property
    def first(self) -> str:
        """Header of the column of names."""
        return ", ".join(self._study.row_axes)

    @property
    def title(self) -> str:
        """Above the table."""
        what = f"{self._study.name}: test {METRICS[self._study.metric]}, % (mean ± deviation"
        return f"{what}; differences: mean ± standard error, pair by pair)" if self._study.baseline else f"{what})"

    # -------------------------------------------------------------------------------------------------------- files
    def write(self) -> None:
        """Write ``study.json``, ``results.csv`` and ``results.md`` to the study's folder; others may do so, too."""
        output = self._study.output
        write_json(output / STUDY_JSON, self.numbers(), shared=True)
        write_csv(output / RESULTS_CSV, self._csv(), shared=True)
        text = f"{self.title}\n\n{markdown_table(self.table(), first=self.first)}"
        full = self.full_table()
        if full:
            text += f"\nAll values of {self._study.best_of}:\n\n{markdown_table(full, first=self.first)}"
        write_text(output / RESULTS_MARKDOWN, text, shared=True)

    def numbers(self) -> dict[str, Any]:
        """See the module's docstring."""
        baselines = set(self.baselines.values())
        compared = {row: self.differences(row) for row in self.baselines}
        runs = self.plan.runs
        return {
            "name": self._study.name,
            "metric": self._study.metric,
            "axes": {axis: list(values) for axis, values in self._study.axes.items()},
            "average": list(self._study.average),
            "rows": self.rows,
            "shown": self.shown,
            "baseline": baselines.pop() if len(baselines) == 1 else None,
            "baselines": self.baselines,
            "results": self.scores,
            "validation": self.validation,
            "differences": {
                row: {
                    "values": found,
                    "mean": statistics.fmean(found.values()),
                    "standard_error": standard_error(list(found.values())),
                }
                for row, found in compared.items()
                if found
            },
            "steps": {f"{run.name} ({run.digest})": run.folder for run in runs.values() if run.step},
            "failed": {
                runs[digest].folder: state.reason for digest, state in self._states.items() if state.state == FAILED
            },
        }

    def _csv(self) -> list[list[Any]]:
        """A row for each run of the grid."""
        axes = list(self._study.axes)
        rows: list[list[Any]] = [[*axes, "state", self._study.metric, "validation", "seconds", "folder", "reason"]]
        for cell in self.plan.cells:
            state = self._states[cell.run]
            values = [state.metrics.get(self._study.metric), state.validation, state.seconds]
            numbers = ["" if value is None else value for value in values]
            rows.append([*cell.place.values(), state.state, *numbers, self.plan.runs[cell.run].folder, state.reason])
        return rows
