"""The papers' numbers that reports show are those of the tables in projects/*/README.md, and each has its file."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from distinit_plugin.analysis.published import config_name, published_rows, rows_of
from distinit_plugin.config.load import shipped_configs

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = {"distinit": "DistInit", "i3d": "I3D", "d3d": "D3D", "ava": "AVA"}
PAPERS = {"distinit": "DistInit", "i3d": "Quo Vadis", "d3d": "D3D", "ava": "D3D"}
UNIT = re.compile(r"\d+\.\d")


class Printed(NamedTuple):
    """A cell with configurations, and the cell of published numbers at its right."""

    project: str
    place: str
    configs: list[str]
    numbers: list[str]


def cells_of(line: str) -> list[str]:
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


def tables(project: str) -> Iterator[Printed]:
    """Of a README's tables whose numbers are accuracies: a pair for each pair of columns."""
    place, heads = "", []
    for line in (ROOT / "projects" / project / "README.md").read_text("utf-8").splitlines():
        if line.startswith("#"):
            place, heads = re.split("[:,]", line.lstrip("# "))[0], []
        elif line.startswith("|") and not line.startswith("|-"):
            cells = cells_of(line)
            if "published" in " ".join(cells).split():
                heads = cells
                continue
            if len(cells) != len(heads) or heads[0] in ("figure", "decoder") or "EPE" in heads[0]:
                continue
            for column in [number for number, head in enumerate(heads) if "published" in head]:
                source = cells[{"ava": 0, "distinit": 1}.get(project, column - 1)]
                configs = [name for name in re.findall(r"`([^`]+)`", source) if " " not in name]
                names = [name if "/" in name else f"{FOLDERS[project]}/{name}" for name in configs]
                if names and "distinit ensemble" not in source and not source.startswith("– (as"):
                    yield Printed(project, place, names, UNIT.findall(cells[column]))
        elif not line.strip():
            heads = []


PRINTED = [row for project in FOLDERS for row in tables(project)]


def ours(config: str, project: str, place: str) -> set[str]:
    """Numbers of the data file for one configuration in one table."""
    places = {"Alternatives of §4.1": "Table 6"}
    rows = [row for row in rows_of(config) if row.paper == PAPERS[project]]
    if project != "ava":
        rows = [row for row in rows if row.place == places.get(place, place)]
    return {f"{value:.1f}" for row in rows for value in row.values.values()}


def test_tables_were_found():
    assert len(PRINTED) > 90
    assert {row.project for row in PRINTED} == set(FOLDERS)


@pytest.mark.parametrize("project", FOLDERS)
def test_every_printed_number_is_in_the_file(project):
    for row in PRINTED:
        if row.project != project:
            continue
        known = [ours(config, project, row.place) for config in row.configs]
        if project == "distinit":  # what comes first is a pre-training
            assert known[-1] == set(row.numbers), row
            assert not any(known[:-1])
        elif len(row.configs) == len(row.numbers) > 1:  # a number each
            assert known == [{number} for number in row.numbers], row
        elif row.place.startswith("Alternatives"):  # steps of a sequence
            assert set().union(*known) >= set(row.numbers), row
        else:
            assert set().union(*known) == set(row.numbers), row


def test_nothing_else_is_in_the_file():
    printed = {(PAPERS[row.project], config): set[str]() for row in PRINTED for config in row.configs}
    for row in PRINTED:
        for config in row.configs:
            printed[PAPERS[row.project], config] |= set(row.numbers)
    rows = published_rows()
    assert len(rows) > 150
    for row in rows:
        for value in row.values.values():
            assert f"{value:.1f}" in printed[row.paper, row.config], row


def test_every_row_has_a_shipped_file_and_numbers():
    shipped = {config_name(name) for name in shipped_configs()}
    for row in published_rows():
        assert row.config in shipped
        assert row.values
        assert all(0 < value <= 100 for value in row.values.values())
    with_three = [row for row in published_rows() if "clip_top1" in row.values]
    assert all(row.values["clip_top1"] < row.values["top1"] < row.values["top5"] for row in with_three)


def test_names_of_files():
    assert config_name("/a/b/configs/DistInit/table2_random_finetune.yaml") == "DistInit/table2_random_finetune"
    assert rows_of("DistInit/table2_random_finetune")[0].values == {"clip_top1": 39.9, "top1": 43.2, "top5": 73.9}
    assert rows_of("DistInit/nothing") == []
