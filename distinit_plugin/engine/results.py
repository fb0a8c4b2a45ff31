"""Tables of results: several splits or seeds become mean ± deviation, on the terminal and as markdown."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from rich.table import Table

Value = float | str | Sequence[float]
"""A fraction, several of them (one per split or seed), or text that is printed as it is."""


@dataclass(frozen=True)
class Row:
    """One line of a table.

    Attributes:
        name: What was run.
        values: Column name → value; a column that is missing stays empty.
    """

    name: str
    values: Mapping[str, Value] = field(default_factory=dict)


def percent(value: Value) -> str:
    """``71.3``; ``71.3 ± 0.4`` (sample standard deviation) for several values; ``–`` for NaN or none."""
    if isinstance(value, str):
        return value
    numbers = [float(value)] if isinstance(value, int | float) else [float(number) for number in value]
    if not numbers or any(math.isnan(number) for number in numbers):
        return "–"
    mean = f"{100 * statistics.fmean(numbers):.1f}"
    return f"{mean} ± {100 * statistics.stdev(numbers):.1f}" if len(numbers) > 1 else mean


def columns_of(rows: Sequence[Row]) -> list[str]:
    """Every column of any row, in order of first appearance."""
    return list(dict.fromkeys(name for row in rows for name in row.values))


def terminal_table(rows: Sequence[Row], *, title: str = "", first: str = "") -> Table:
    """The rows as a rich table, in percent.

    Args:
        rows: Lines.
        title: Above the table.
        first: Header of the column of names.
    """
    table = Table(title=title or None, title_justify="left")
    table.add_column(first, overflow="fold")
    columns = columns_of(rows)
    for column in columns:
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(row.name, *(percent(row.values.get(column, "")) for column in columns))
    return table


def markdown_table(rows: Sequence[Row], *, first: str = "") -> str:
    """The rows as a markdown table, in percent; ends with a newline."""
    columns = columns_of(rows)
    lines = [[first, *columns], ["---", *("---:" for _ in columns)]]
    lines += [[row.name, *(percent(row.values.get(column, "")) for column in columns)] for row in rows]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)


def differences(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    """Of each seed."""
    return [one - other for one, other in zip(ours, theirs, strict=True)]


def paired(own: Mapping[str, float], base: Mapping[str, float]) -> dict[str, float]:
    """Repeat (seed, split) → difference, of those that both have."""
    return {repeat: value - base[repeat] for repeat, value in own.items() if repeat in base}


def standard_error(values: Sequence[float]) -> float | None:
    """Of the mean; one value has none."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def paired_text(found: Sequence[float]) -> str:
    """Mean and standard error of differences seed by seed, in points: ``+3.1 ± 0.8``; empty without any."""
    if not found:
        return ""
    text = f"{100 * statistics.fmean(found):+.1f}"
    error = standard_error(found)
    return text if error is None else f"{text} ± {100 * error:.1f}"
