"""Sections of a report: results, published numbers, a study."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence

from distinit_plugin.analysis.page import MISSING, Block, Cell, Column, Section, Table, Text, Tile, Tiles
from distinit_plugin.analysis.published import Published, rows_of
from distinit_plugin.analysis.run_facts import MEASURES, RunFacts
from distinit_plugin.analysis.study_table import Study, StudyRow
from distinit_plugin.engine.meters import duration_text

_TONES = {"done": "", "failed": "bad", "stopped": "warn", "unfinished": "warn", "not started": "warn"}
T_QUANTILES = "± 12.7 (of 2), ± 4.3 (of 3), ± 3.2 (of 4), ± 2.8 (of 5), ± 2.3 (of 10)"
"""97.5 % of Student's distribution with one degree of freedom less than there are differences."""
_LEADING = ("top1", "map", "recall50")
"""Measures that a run is known by, the first one that it has."""


def percent_cell(value: float | None) -> Cell:
    """A fraction in percent, with its bar."""
    if value is None or math.isnan(value):
        return Cell(MISSING)
    return Cell(f"{100 * value:.1f}", value, share=value)


def text_cell(text: str) -> Cell:
    """A text, or the sign for none."""
    return Cell(text or MISSING)


def number_cell(text: str) -> Cell:
    """A text that sorts as a number where it is one."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    return Cell(text, value) if math.isfinite(value) else text_cell(text)


def state_cell(facts: RunFacts) -> Cell:
    """What became of a run; of one that is not done how far it came."""
    state = facts.state
    far = f", epoch {facts.timing.epoch}/{facts.timing.epochs}" if state != "done" and facts.timing.epoch else ""
    return Cell(f"{state}{far}", tone=_TONES[state])


def results_section(runs: Sequence[RunFacts]) -> Section:
    """The numbers of all runs, and what went wrong."""
    measures = [name for name in MEASURES if any(name in facts.metrics for facts in runs)]
    columns = [
        Column("run"),
        *([] if all(facts.state == "done" for facts in runs) else [Column("state")]),
        *(Column(f"{MEASURES[name]}, %", numeric=True) for name in measures),  # first: a phone shows few columns
        Column("seed", numeric=True),
        Column("network"),
        Column("start"),
        Column("tested on"),
    ]
    rows = []
    for facts in runs:
        cells = [Cell(facts.name)]
        cells += [state_cell(facts)] if columns[1].name == "state" else []
        cells += [percent_cell(facts.metrics.get(name)) for name in measures]
        cells += [number_cell(facts.described.seed)]
        rows.append([*cells, *map(text_cell, (facts.described.network, facts.described.start, facts.tested))])
    blocks: list[Block] = [Tiles(_tiles(runs)), Table("Test results", columns, rows)]
    for facts in runs:
        if facts.error:
            blocks.append(Text(f"{facts.name} {facts.state}: {facts.error}", _TONES[facts.state]))
        blocks += [Text(f"{facts.name}: {problem}", "warn") for problem in facts.problems]
    return Section("results", "Results", blocks)


def _tiles(runs: Sequence[RunFacts]) -> list[Tile]:
    states = Counter(facts.state for facts in runs)
    tiles = [Tile("runs", str(len(runs)), ", ".join(f"{count} {state}" for state, count in states.items()))]
    for measure in _LEADING:
        tested = _comparable([facts for facts in runs if measure in facts.metrics])
        if tested:
            best = max(tested, key=lambda facts: facts.metrics[measure])
            value = f"{100 * best.metrics[measure]:.1f} %"
            title = f"best {MEASURES[measure]}" if len(tested) > 1 else MEASURES[measure]
            tiles.append(Tile(title, value, best.name if len(runs) > 1 else ""))
    parts = [part for facts in runs if facts.record is not None for part in facts.record.parts]
    seconds = math.fsum(part.trained_seconds for part in parts)
    if seconds > 0:
        waited = math.fsum(part.trained_seconds * part.wait_share for part in parts)
        note = f"{100 * waited / seconds:.0f} % of it waiting for data"
        tiles.append(Tile("training, all together", duration_text(seconds), note))
    bad = {path for facts in runs for path in facts.bad}
    tiles.append(Tile("bad videos", str(len(bad))))
    return tiles


def _comparable(tested: Sequence[RunFacts]) -> list[RunFacts]:
    """Those that were tested on the classes that most were tested on."""
    classes = Counter(tuple(facts.per_class) for facts in tested)
    return [facts for facts in tested if tuple(facts.per_class) == classes.most_common(1)[0][0]]


# ---------------------------------------------------------------------------------------------- published numbers
def published_section(runs: Sequence[RunFacts], changes: Mapping[str, list[str]]) -> Section:
    """Runs whose configuration is a row of a paper, beside its numbers.

    Args:
        runs: All.
        changes: Name of a run → what it changes in the file of that name.
    """
    rows = [
        _published_row(facts, measure, same, changes.get(facts.name, []))
        for facts in runs
        for measure, same in _published(facts)
    ]
    if not rows:
        return Section("published", "Published numbers")
    columns = [
        Column("run"),
        Column("paper"),
        Column("row"),
        Column("of"),
        Column("measure"),
        Column("published, %", numeric=True),
        Column("here, %", numeric=True),
        Column("difference", numeric=True),
        Column("changed in the file"),
    ]
    note = (
        "A difference means something only where data, split and recipe are the published ones. The last column names "
        "the keys in which a run differs from the file of that row; places of data and weights are left out."
    )
    return Section("published", "Published numbers", [Text(note), Table("Against published numbers", columns, rows)])


def _published(facts: RunFacts) -> list[tuple[str, list[Published]]]:
    """Measure and the places that print one number for it."""
    found: dict[tuple[str, float, str], list[Published]] = {}
    for row in rows_of(facts.described.config):
        for measure, value in row.values.items():
            found.setdefault((measure, value, row.protocol), []).append(row)
    return [(measure, rows) for (measure, _, _), rows in found.items()]


def _published_row(facts: RunFacts, measure: str, same: list[Published], changes: list[str]) -> list[Cell]:
    value, ours = same[0].values[measure], facts.metrics.get(measure)
    places = ", ".join(dict.fromkeys(f"{row.paper}, {row.place}" for row in same))
    shown = "; ".join(changes[:12]) + (f"; and {len(changes) - 12} more" if len(changes) > 12 else "")
    return [
        Cell(facts.name),
        Cell(places),
        Cell(same[0].row),
        text_cell(same[0].protocol),
        Cell(MEASURES[measure]),
        Cell(f"{value:.1f}", value),
        Cell(MISSING) if ours is None else Cell(f"{100 * ours:.1f}", 100 * ours),
        Cell(MISSING) if ours is None else Cell(f"{100 * ours - value:+.1f}", 100 * ours - value),
        Cell(shown or "nothing"),
    ]


# ---------------------------------------------------------------------------------------------------------- study
def study_section(study: Study, rows: Sequence[StudyRow]) -> Section:
    """Rows with mean ± deviation, and their differences from the baseline, seed by seed."""
    repeats = list(dict.fromkeys(name for row in study.rows.values() for name in row)) if study.repeats else []
    what = study.repeats or "run"
    compared = any(row.gain for row in rows)
    columns = [Column("row"), *([Column("chosen")] if study.shown else [])]
    columns += [Column(f"{MEASURES[study.metric]}, %", numeric=True), Column(f"{what}s", numeric=True)]
    bases = {name for row in rows if (name := study.baseline_of(row.name)) is not None}
    if len(bases) > 1:
        columns.append(Column("compared with"))
    if compared:
        columns += [Column("difference, points", numeric=True), Column(f"{what}s ahead", numeric=True)]
    columns += [Column(f"{what} {name}", numeric=True) for name in repeats]
    table = []
    for row in rows:
        cells = [Cell(row.name), *([text_cell("yes" if row.name in study.shown else "")] if study.shown else [])]
        cells.append(Cell(row.text, row.mean, share=row.mean))
        cells.append(Cell(str(len(row.values)), float(len(row.values))))
        cells += [text_cell(study.baseline_of(row.name) or "")] if len(bases) > 1 else []
        if compared:
            cells.append(Cell(row.gain or MISSING, row.mean_gain))
            cells.append(Cell(row.ahead, float(row.ahead.split()[0])) if row.ahead else Cell(MISSING))
        cells += [percent_cell(row.values.get(name)) for name in repeats]
        table.append(cells)
    note = _study_note(study, sorted(bases) if compared else [])
    blocks: list[Block] = [Text(note), Table(f"Study: {study.name}", columns, table)]
    for row in rows:
        if row.missing:
            names = f" for {what}{'s'[: len(row.missing) > 1]} {', '.join(row.missing)}" if repeats else ""
            blocks.append(Text(f"{row.name}: no result{names}.", "warn"))
    return Section("study", "Study", blocks)


def _study_note(study: Study, bases: Sequence[str]) -> str:
    """What the numbers of a study's table are; ``bases``: rows that others are compared with."""
    what = study.repeats or "run"
    note = f"Mean ± sample standard deviation over {what}s."
    if study.shown:
        note += " Of rows that differ in one setting alone, the one with the best mean validation is the chosen one."
    if bases:
        base = f"'{bases[0]}'" if len(bases) == 1 else "the row that each is compared with"
        note += (
            f" Differences are those from {base}, {what} by {what}: mean ± standard error of the {what}s that both "
            f"have. A 95 % interval is {T_QUANTILES} of these errors: what it does not leave out may well be chance."
        )
    return note
