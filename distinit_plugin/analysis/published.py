"""The papers' numbers, by the name of the configuration that repeats them (``published.csv``; projects/*/README.md)."""

from __future__ import annotations

import csv
import functools
from importlib import resources
from pathlib import PurePath
from typing import NamedTuple

MEASURES = ("clip_top1", "top1", "top5", "map")
"""Columns of the file with numbers, as tests call them."""

_FILE = "published.csv"


class Published(NamedTuple):
    """One row of a paper.

    Attributes:
        config: ``DistInit/table1_res3d18_scratch``: the file that is tested, without its ending.
        paper: Short name.
        place: ``Table 1``.
        row: As the paper calls it.
        protocol: On what; empty where the paper does not say.
        values: Measure → percent, as printed.
    """

    config: str
    paper: str
    place: str
    row: str
    protocol: str
    values: dict[str, float]


@functools.cache
def published_rows() -> tuple[Published, ...]:
    """All rows of the file."""
    text = resources.files(__package__).joinpath(_FILE).read_text("utf-8")
    return tuple(
        Published(
            row["config"],
            row["paper"],
            row["place"],
            row["row"],
            row["protocol"],
            {name: float(row[name]) for name in MEASURES if row[name]},
        )
        for row in csv.DictReader(text.splitlines())
    )


def rows_of(config: str) -> list[Published]:
    """What is published of one configuration."""
    return [row for row in published_rows() if row.config == config]


def config_name(path: str) -> str:
    """``DistInit/table1_res3d18_scratch`` of ``configs/DistInit/table1_res3d18_scratch.yaml``, from wherever."""
    parts = PurePath(path).parts[-2:]
    return "/".join(parts).removesuffix(".yaml").removesuffix(".yml")
