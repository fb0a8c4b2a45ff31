"""``study.yaml``: what a person writes about a grid of runs, and what becomes of it in the program.

========== ==========================================================================================================
NAME       of the study, in its table; default: the file's name
OUTPUT_DIR where everything is written; default: ``./runs/studies/`` + the file's name
CFG        YAML file of the runs that are compared, or a list of them (beside the study, from here, or shipped)
OPTS       ``KEY: value`` of these runs
STEPS      name → ``{CFG, OPTS}``: runs that others start from; ``$name`` as a value is the step's newest checkpoint.
           A step that several runs share is done once; one may start from those that are written before it.
AXES       axis → value → ``KEY: value`` of the runs at that place of the grid, and ``step: {KEY: value}`` of the steps
           they come from
EXCLUDE    list of ``{axis: value}``: places that are left out
AVERAGE    axis (or list of axes) over whose values the table gives mean and deviation; default: ``seed``
BEST_OF    axis of which each row of the table shows the value with the best validation accuracy
BASELINE   ``{axis: value}``: each row is compared with the one that has these values, run by run of AVERAGE
METRIC     ``top1``, ``top5``, ``clip_top1``, ``mean_class_accuracy`` or ``map`` of the runs' tests
DATA       ``{MAKER, FOLDER}``: data of this program that are made first
========== ==========================================================================================================
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

METRICS = {
    "top1": "top-1",
    "top5": "top-5",
    "clip_top1": "per clip",
    "mean_class_accuracy": "mean over classes",
    "map": "frame-mAP",
}
"""Name in a test's ``metrics.json`` → in tables."""

MAKERS = ("digits", "motions", "shifted_motions")
"""Data that ``studies.data`` can make."""

REFERENCE = re.compile(r"\$([A-Za-z0-9_-]*)")
"""A value that stands for a step's checkpoint."""

Options = dict[str, Any]
"""KEY → value."""


@dataclass(frozen=True)
class Step:
    """One kind of run.

    Attributes:
        name: Of a step; empty for the runs that are compared.
        files: Its YAML files.
        options: Over these, for all runs of this kind.
    """

    name: str
    files: tuple[str, ...]
    options: Options


@dataclass(frozen=True)
class Choice:
    """What a value of an axis means.

    Attributes:
        options: Of the runs that are compared.
        of_steps: Step → its options.
    """

    options: Options
    of_steps: dict[str, Options]


@dataclass(frozen=True)
class Data:
    """What is made before the first run.

    Attributes:
        maker: One of ``MAKERS``.
        folder: Where.
    """

    maker: str
    folder: str


@dataclass(frozen=True)
class Study:
    """A grid of runs as somebody wrote it down; see the module's docstring.

    Attributes:
        source: The file.
        name: In tables.
        output: Where everything is written.
        last: The runs that are compared.
        steps: What they start from, each after those that it starts from itself.
        axes: Axis → name of a value → its meaning.
        exclude: Places that are left out, axis → value.
        average: Axes over which the table averages.
        best_of: Axis of which the best value is shown; empty: none.
        baseline: Axis → value of the rows that others are compared with; empty: none.
        metric: A key of ``METRICS``.
        data: Made first; ``None``: nothing.
    """

    source: Path
    name: str
    output: Path
    last: Step
    steps: dict[str, Step]
    axes: dict[str, dict[str, Choice]]
    exclude: list[dict[str, str]]
    average: tuple[str, ...]
    best_of: str
    baseline: dict[str, str]
    metric: str
    data: Data | None

    @property
    def row_axes(self) -> list[str]:
        """The axes whose values name a row of the full table."""
        return [axis for axis in self.axes if axis not in self.average]
