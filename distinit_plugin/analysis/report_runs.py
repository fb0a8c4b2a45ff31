"""Sections of a report: what was run, on what machine, how long it took, which videos were bad, classes."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from distinit_plugin.analysis.page import MISSING, Block, Cell, Code, Column, Fold, Heading, Section, Table, Text
from distinit_plugin.analysis.report_results import number_cell, percent_cell, state_cell, text_cell
from distinit_plugin.analysis.run_facts import RunFacts
from distinit_plugin.engine.meters import duration_text

OWN_COLUMNS = ("OUTPUT_DIR", "RNG_SEED")
"""Keys that differ between runs by their nature, and are shown anyway."""

MOST_KEYS = 80
MOST_BAD = 300
MOST_CLASSES = 1000
BESIDE = 6
"""Runs up to which keys and classes are rows and runs are columns."""


def runs_section(runs: Sequence[RunFacts]) -> Section:
    """What was run: an overview, what differs, versions and machines, and each configuration."""
    columns = [
        Column("run"),
        Column("state"),
        Column("file"),
        Column("network"),
        Column("start"),
        Column("learns from"),
        Column("training videos"),
        Column("seed", numeric=True),
        Column("began (UTC)"),
        Column("folder"),
    ]
    rows = [
        [
            Cell(facts.name),
            state_cell(facts),
            text_cell(facts.described.config),
            text_cell(facts.described.network),
            text_cell(facts.described.start),
            text_cell(facts.described.teaching),
            text_cell(facts.described.corpus),
            number_cell(facts.described.seed),
            text_cell(_began(facts)),
            Cell(str(facts.folder)),
        ]
        for facts in runs
    ]
    blocks: list[Block] = [Table("Runs", columns, rows), *_differences(runs), *_environments(runs)]
    configured = [facts for facts in runs if facts.config]
    if configured:
        blocks.append(Heading("Whole configurations"))
        blocks += [Fold(facts.name, [Code(facts.config)]) for facts in configured]
    return Section("runs", "What was run", blocks)


def _began(facts: RunFacts) -> str:
    if facts.record is None or not facts.record.parts:
        return ""
    return facts.record.parts[0].started[:16].replace("T", " ")


def _differences(runs: Sequence[RunFacts]) -> list[Block]:
    known = [facts for facts in runs if facts.settings]
    if len(known) < 2:
        return []
    found = _differing([facts.settings for facts in known])
    if not found:
        return [Text("All configurations are the same, but for seeds and folders.", "soft")]
    shown = list(found)[:MOST_KEYS]
    cells = {facts.name: [text_cell(found[key][place]) for key in shown] for place, facts in enumerate(known)}
    blocks: list[Block] = [_table("What differs between the configurations", "key", shown, cells)]
    if len(found) > len(shown):
        blocks.append(Text(f"{len(found) - len(shown)} more keys differ; they are in the whole configurations."))
    return blocks


def _differing(settings: Sequence[Mapping[str, str]]) -> dict[str, list[str]]:
    """Key → value in each run, of keys that differ, those that all runs have first; an entry that some lack is one."""
    keys = dict.fromkeys(key for own in settings for key in own if key not in OWN_COLUMNS)
    absent = {key for key in keys if any(key not in own for own in settings)}
    entries = {name for name, count in Counter(key.rpartition(".")[0] for key in absent).items() if name and count > 1}
    found: dict[str, list[str]] = {}
    for key in keys:
        entry = next((name for name in _parents(key) if name in entries), "") if key in absent else ""
        if entry:
            found.setdefault(entry, ["there" if key in own else "" for own in settings])
        if len({own.get(key) for own in settings if key in own or not entry}) > 1:
            found[key] = [own.get(key, "") for own in settings]
    return dict(sorted(found.items(), key=lambda item: (item[1].count(""), item[0])))


def _parents(key: str) -> list[str]:
    """``A``, ``A.B`` of ``A.B.C``."""
    parts = key.split(".")[:-1]
    return [".".join(parts[: count + 1]) for count in range(len(parts))]


def _table(
    title: str, first: str, names: Sequence[str], cells: Mapping[str, list[Cell]], *, numeric: bool = False
) -> Table:
    """Runs as columns where they are few, else as rows; ``cells``: run → one cell each of ``names``."""
    if len(cells) <= BESIDE:
        columns = [Column(first), *(Column(run, numeric=numeric) for run in cells)]
        rows = [[Cell(name), *(own[place] for own in cells.values())] for place, name in enumerate(names)]
        return Table(title, columns, rows)
    columns = [Column("run"), *(Column(name, numeric=numeric) for name in names)]
    return Table(title, columns, [[Cell(run), *own] for run, own in cells.items()])


def _environments(runs: Sequence[RunFacts]) -> list[Block]:
    groups: dict[tuple[tuple[str, str], ...], list[str]] = {}
    for facts in runs:
        if facts.environment:
            groups.setdefault(tuple(facts.environment.items()), []).append(facts.name)
    if not groups:
        return []
    names = dict.fromkeys(name for group in groups for name, _ in group)
    title = "Versions and machine" if len(groups) == 1 else "Versions and machines"
    heads = ["value"] if len(groups) == 1 else [_some(found) for found in groups.values()]
    columns = [Column("what"), *map(Column, heads)]
    rows = [[Cell(name), *(text_cell(dict(group).get(name, "")) for group in groups)] for name in names]
    return [Table(title, columns, rows)]


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


# -------------------------------------------------------------------------------------------------------- timings
def timings_section(runs: Sequence[RunFacts]) -> Section:
    """How long trainings took, and what share of it they waited for data."""
    timed = [facts for facts in runs if not math.isnan(facts.timing.step_seconds)]
    if not timed:
        return Section("timings", "Timings")
    has_gpu = any(facts.timing.gpu_gib for facts in timed)
    columns = [
        Column("run"),
        Column("training", numeric=True),
        Column("steps", numeric=True),
        Column("s per step", numeric=True),
        Column("clips per s", numeric=True),
        Column("data wait, %", numeric=True),
        Column("s per validation", numeric=True),
        *([Column("GPU memory, GiB", numeric=True)] if has_gpu else []),
    ]
    rows = []
    for facts in timed:
        timing, parts = facts.timing, facts.record.parts if facts.record is not None else []
        seconds = math.fsum(part.trained_seconds for part in parts)
        steps = max((part.steps for part in parts), default=0)
        clips = facts.described.step_clips / timing.step_seconds if timing.step_seconds else 0.0
        cells = [
            Cell(facts.name),
            Cell(duration_text(seconds), seconds) if seconds else Cell(MISSING),
            Cell(str(steps), float(steps)) if steps else Cell(MISSING),
            Cell(f"{timing.step_seconds:.3g}", timing.step_seconds),
            Cell(f"{clips:.1f}", clips) if clips else Cell(MISSING),
            percent_cell(timing.wait_share),
            _seconds(timing.validation_seconds),
        ]
        cells += [Cell(f"{timing.gpu_gib:.2f}", timing.gpu_gib)] if has_gpu else []
        rows.append(cells)
    note = (
        "Data wait is the share of the training time in which the network had no clips to work on. Times are those of "
        "the machine as it was, other jobs included."
    )
    return Section("timings", "Timings", [Text(note), Table("Time of trainings", columns, rows)])


def _seconds(value: float) -> Cell:
    return Cell(MISSING) if math.isnan(value) else Cell(f"{value:.1f}", value)


# ----------------------------------------------------------------------------------------------------- bad videos
class _Bad(NamedTuple):
    reason: str
    runs: list[str]


def bad_section(runs: Sequence[RunFacts]) -> Section:
    """Videos that could not be used."""
    found: dict[str, _Bad] = {}
    for facts in runs:
        for path, reason in facts.bad.items():
            found.setdefault(path, _Bad(reason, [])).runs.append(facts.name)
    if not found:
        return Section("bad", "Bad videos", [Text("All videos that were met could be used.", "soft")])
    rows = [[Cell(path), Cell(bad.reason), Cell(_some(bad.runs))] for path, bad in list(found.items())[:MOST_BAD]]
    columns = [Column("video"), Column("reason"), Column("runs")]
    blocks: list[Block] = [Table("Videos that could not be used", columns, rows)]
    if len(found) > MOST_BAD:
        blocks.append(Text(f"{len(found) - MOST_BAD} more are in the runs' bad_videos.csv."))
    return Section("bad", "Bad videos", blocks)


# -------------------------------------------------------------------------------------------------------- classes
def class_blocks(runs: Sequence[RunFacts]) -> list[Block]:
    """Accuracy or average precision of each class, for runs that share their classes, ``BESIDE`` of them at most."""
    tested = [facts for facts in runs if facts.per_class]
    groups: dict[tuple[str, ...], list[RunFacts]] = {}
    for facts in tested:
        groups.setdefault(tuple(facts.per_class), []).append(facts)
    blocks: list[Block] = []
    titles: set[str] = set()
    for names, own in groups.items():
        shown = own[:BESIDE]
        what = "Average precision" if "map" in shown[0].metrics else "Accuracy"
        title = f"{what} of each class, %" if len(groups) == 1 else f"{what} of each of {len(names)} classes, %"
        title += f" ({len(titles) + 1})" if title in titles else ""
        titles.add(title)
        cells = {facts.name: [percent_cell(facts.per_class[name]) for name in names[:MOST_CLASSES]] for facts in shown}
        blocks.append(_table(title, "class", names[:MOST_CLASSES], cells, numeric=True))
        if len(own) > len(shown):
            blocks.append(Text(f"The first {len(shown)} of {len(own)} runs with these classes.", "soft"))
    return blocks[: 2 * BESIDE]
