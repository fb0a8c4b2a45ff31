"""From a study to its runs: every place of the grid, the steps it comes from, and what makes two runs the same one.

A run is known by a digest of its resolved configuration: the keys that differ from the defaults, without those that
decide nothing about its result (``NEUTRAL``), a step's checkpoint being the digest of that step's run. So a step that
several runs share is one run, a changed configuration is another run with another folder, and renaming changes nothing.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distinit_plugin.config.defaults import get_cfg
from distinit_plugin.config.load import read_cfg
from distinit_plugin.config.node import CfgNode, leaf_keys
from distinit_plugin.errors import ConfigError
from distinit_plugin.jobs.resuming import NEUTRAL
from distinit_plugin.studies.spec import REFERENCE, Options, Step, Study

RUNS_FOLDER = "runs"
DIGITS = 10
"""Of a digest."""


@dataclass(frozen=True)
class Run:
    """One training with its test.

    Attributes:
        name: For people: its place in the grid, or its step.
        step: Of the study; empty: one of the runs that are compared.
        files: YAML files.
        options: Over them; ``$name`` is the checkpoint of a step.
        starts: Step → digest of the run whose checkpoint ``$step`` is.
        digest: Says which run it is.
        folder: Below the study's, with ``/``.
    """

    name: str
    step: str
    files: tuple[str, ...]
    options: Options
    starts: dict[str, str]
    digest: str
    folder: str


@dataclass(frozen=True)
class Cell:
    """A place of the grid.

    Attributes:
        place: Axis → value.
        run: Digest of its run.
    """

    place: dict[str, str]
    run: str


@dataclass
class Plan:
    """All that a study does.

    Attributes:
        study: It.
        runs: By digest, each after those that it starts from.
        cells: The places of the grid, in its order.
        warnings: About keys that are not honoured.
        uses_gpus: A run asks for GPUs.
    """

    study: Study
    runs: dict[str, Run] = field(default_factory=dict)
    cells: list[Cell] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    uses_gpus: bool = False

    def waves(self) -> list[list[Run]]:
        """Runs that start from nothing, those that start from these, and so on."""
        levels: dict[str, int] = {}
        for digest, run in self.runs.items():
            levels[digest] = 1 + max((levels[start] for start in run.starts.values()), default=-1)
        return [
            [self.runs[digest] for digest, level in levels.items() if level == n] for n in sorted({*levels.values()})
        ]


def plan_study(study: Study, data_version: str = "") -> Plan:
    """Resolve and check the configuration of every run.

    Args:
        study: What was written.
        data_version: Changes when the data that are made for it do.

    Raises:
        ConfigError: Everything that is wrong with the configurations, each once, with the first run it is in.
    """
    return _Planner(study, data_version).plan()


class _Planner:
    def __init__(self, study: Study, data_version: str) -> None:
        self._study = study
        self._data_version = data_version
        self._plan = Plan(study)
        self._problems: dict[str, str] = {}
        self._warnings: dict[str, None] = {}
        self._seen: dict[str, CfgNode] = {}
        self._there = _folders_there(study.output)

    def plan(self) -> Plan:
        """The plan.

        Raises:
            ConfigError: Everything that is wrong.
        """
        study = self._study
        for values in itertools.product(*study.axes.values()):
            place = dict(zip(study.axes, values, strict=True))
            if any(place.items() >= left_out.items() for left_out in study.exclude):
                continue
            self._plan.cells.append(Cell(place, self._run(study.last, place).digest))
        self._check_rows()
        used = {run.step for run in self._plan.runs.values()}
        for name in study.steps:
            if name not in used:
                self._problems[f"STEPS.{name}: no run starts from it (${name}); use it, or remove it."] = ""
        if self._problems:
            raise ConfigError([f"{study.source}: {name}{problem}" for problem, name in self._problems.items()])
        self._plan.warnings = list(self._warnings)
        return self._plan

    def _run(self, step: Step, place: Mapping[str, str]) -> Run:
        """The run of a step at a place of the grid, and all that it starts from."""
        options, name = dict(step.options), [step.name] if step.name else []
        for axis, value in place.items():
            choice = self._study.axes[axis][value]
            options |= choice.of_steps.get(step.name, {}) if step.name else choice.options
            if not step.name or step.name in choice.of_steps:
                name.append(value)
        wanted = [
            found[1] for value in options.values() if isinstance(value, str) and (found := REFERENCE.match(value))
        ]
        starts = {start: self._run(self._study.steps[start], place) for start in wanted}
        resolved = {
            key: _stand_in(starts[value[1:]]) if isinstance(value, str) and value[:1] == "$" else value
            for key, value in options.items()
        }
        cfg = self._load(step, resolved, ", ".join(name))
        digest = digest_of(cfg, self._data_version)
        folder = self._there.get(digest) or f"{RUNS_FOLDER}/{slug(', '.join(name))}-{digest}"
        digests = {start: run.digest for start, run in starts.items()}
        run = Run(", ".join(name), step.name, step.files, options, digests, digest, folder)
        return self._plan.runs.setdefault(digest, run)

    def _load(self, step: Step, options: Options, name: str) -> CfgNode:
        key = repr((step.files, options))
        if key in self._seen:
            return self._seen[key]
        reading = read_cfg(step.files, [word for pair in options.items() for word in pair])
        for problem in [*reading.problems, *self._gaps(reading.cfg, step)]:
            self._problems.setdefault(problem.replace("--opts", "OPTS"), f"{name}: ")
        self._warnings |= dict.fromkeys(reading.warnings)
        self._plan.uses_gpus |= reading.cfg.NUM_GPUS > 0
        self._seen[key] = reading.cfg
        return reading.cfg

    def _gaps(self, cfg: CfgNode, step: Step) -> Iterator[str]:
        """What a run of a study must have, beyond what any run must."""
        if step.name:
            if not cfg.TRAIN.ENABLE:
                yield "TRAIN.ENABLE is False, but others start from the weights that this step trains: set it True."
            return
        if not cfg.TEST.ENABLE:
            yield "TEST.ENABLE is False, but the table is made of tests: set it True."
        if self._study.best_of and not (cfg.CORPUS.VAL or cfg.DETECTION.ENABLE):
            yield (
                f"BEST_OF: {self._study.best_of} is chosen by the validation, and there is none: name labelled videos "
                "below CORPUS.VAL, or leave BEST_OF out, and every value has a row."
            )

    def _check_rows(self) -> None:
        """Rows are named by the values of axes: two places must not come to one name."""
        places = Counter(
            (row_of(self._study, cell.place), repeat_of(self._study, cell.place)) for cell in self._plan.cells
        )
        for (row, repeat), times in places.items():
            if times > 1:
                self._problems[f"AXES: {times} places of the grid are named '{row}, {repeat}'; rename a value."] = ""
        if not places:
            self._problems["EXCLUDE: it leaves out every place of the grid; nothing is left to run."] = ""


def row_of(study: Study, place: Mapping[str, str]) -> str:
    """The name of a place's row in the full table: its values of the axes that are not averaged over."""
    return ", ".join(place[axis] for axis in study.row_axes)


def repeat_of(study: Study, place: Mapping[str, str]) -> str:
    """Its values of the axes that are averaged over: ``0`` for a seed; ``only`` without such axes."""
    return ", ".join(place[axis] for axis in study.average) or "only"


def digest_of(cfg: CfgNode, more: str = "") -> str:
    """Which run a configuration describes; see the module's docstring."""
    default = flat(get_cfg())
    values = {
        key: value
        for key, value in flat(cfg).items()
        if not key.startswith(NEUTRAL) and (key not in default or default[key] != value)
    }
    text = json.dumps([values, more], sort_keys=True, default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:DIGITS]


def flat(cfg: CfgNode) -> dict[str, Any]:
    """Full key → value."""
    values = {}
    for key in leaf_keys(cfg):
        value: Any = cfg
        for name in key.split("."):
            value = value[name]
        values[key] = list(value) if isinstance(value, tuple) else value
    return values


def slug(name: str) -> str:
    """A name as a part of a folder's name."""
    return re.sub(r"[^A-Za-z0-9._+-]+", "_", name)[:80].strip("._-") or "run"


def _stand_in(run: Run) -> str:
    """What a step's checkpoint is in the configuration of which the digest is made."""
    return f"study/{run.digest}.pyth"


def _folders_there(output: Path) -> dict[str, str]:
    """Digest → folder of runs that earlier calls began, whatever they were named."""
    try:
        names = sorted(path.name for path in (output / RUNS_FOLDER).iterdir() if path.is_dir())
    except OSError:
        return {}
    return {name.rpartition("-")[2]: f"{RUNS_FOLDER}/{name}" for name in names}
