"""Many small runs below one folder, as many at once as there are cores, and what becomes of them.

Every run is a YAML file through the real runner; a demonstration only chooses seeds, paths and initialisations.
"""

from __future__ import annotations

import io
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from rich.console import Console

from distinit_plugin.analysis.study_table import Study
from distinit_plugin.config.load import load_cfg
from distinit_plugin.config.paths import unwritable
from distinit_plugin.engine import checkpoint
from distinit_plugin.engine.results import Row, markdown_table
from distinit_plugin.errors import UserError
from distinit_plugin.files import write_text
from distinit_plugin.jobs.report import REPORT_FILE, report
from distinit_plugin.jobs.running import run
from distinit_plugin.models.hardware import num_cores
from distinit_plugin.video.isolated import Crash, run_isolated

Say = Callable[[str], None]
"""Told what is done, one sentence at a time."""

Item = TypeVar("Item")
Result = TypeVar("Result")

RESULTS_JSON = "results.json"
RESULTS_MARKDOWN = "results.md"


@dataclass(frozen=True)
class Task:
    """One run: a YAML file, the name of its folder, and overrides."""

    config: str
    name: str
    options: Mapping[str, object]


class Outcome(NamedTuple):
    """What came out of a run that another process may have done.

    Attributes:
        top1: Of the test, a fraction; ``None`` without one.
        steps: Trained.
        wait_share: Fraction of the training time spent waiting for data.
    """

    top1: float | None
    steps: int
    wait_share: float


class Runs:
    """Runs below one folder. One that is finished is not trained again: only its test is repeated."""

    def __init__(self, folder: Path, *, processes: int = 0) -> None:
        """Choose where.

        Args:
            folder: Everything is written below it.
            processes: Runs at once; 0: one per core.

        Raises:
            UserError: The folder cannot be written.
        """
        for problem in unwritable("--output", str(folder), "--output FOLDER"):
            raise UserError(problem)
        self.folder = folder
        self.processes = processes or num_cores()

    def alone(self, task: Task) -> Outcome:
        """Do one run with all threads; in a process of its own, so that this one has none when it forks others."""
        (outcome,) = self._isolated(run_task, [task], {"RUNNER.NUM_THREADS": num_cores()}, processes=1)
        return outcome

    def all(self, tasks: Sequence[Task]) -> Iterator[Outcome]:
        """Do runs in processes of one thread each; outcomes in their order."""
        yield from self.spread(run_task, tasks)

    def spread(
        self, do: Callable[[Item, Path, Mapping[str, object]], Result], items: Sequence[Item]
    ) -> Iterator[Result]:
        """Call ``do(item, folder, options)`` in processes of one thread each (a single one: here); results in order."""
        options = {"RUNNER.NUM_THREADS": 1, "DATA_LOADER.NUM_WORKERS": 0}
        processes = min(self.processes, len(items))
        if processes == 1:
            yield from (do(item, self.folder, options) for item in items)
            return
        yield from self._isolated(do, items, options, processes)

    def _isolated(
        self,
        do: Callable[[Item, Path, Mapping[str, object]], Result],
        items: Sequence[Item],
        options: Mapping[str, object],
        processes: int,
    ) -> Iterator[Result]:
        """Call ``do`` in processes, which end with this one; results in order."""
        job = partial(_answer, do, self.folder, options)
        ended = run_isolated(
            job, enumerate(items), num_workers=processes, max_seconds=math.inf, what="the process of a run", patience=30
        )
        early: dict[int, Result] = {}
        given = 0
        with closing(ended):
            for (number, _), answer in ended:
                if isinstance(answer, Crash):
                    raise UserError(f"{answer.reason}. The same command goes on from there.")
                if isinstance(answer, Exception):
                    raise answer
                early[number] = answer
                while given in early:
                    yield early.pop(given)
                    given += 1

    def newest(self, name: str) -> Path:
        """The checkpoint of a run that is finished.

        Raises:
            UserError: It has none.
        """
        path = checkpoint.newest_checkpoint(self.folder / name / checkpoint.FOLDER)
        if path is None:
            raise UserError(f"{self.folder / name} holds no checkpoint: remove that folder and start again.")
        return path

    def write(self, rows: Sequence[Row], results: Mapping[str, Any], *, first: str) -> None:
        """Write the table as markdown, and the numbers as JSON.

        Args:
            rows: Of the table.
            results: All numbers.
            first: Header of the column of names.
        """
        write_text(self.folder / RESULTS_JSON, json.dumps(results, indent=2) + "\n")
        write_text(self.folder / RESULTS_MARKDOWN, markdown_table(rows, first=first))

    def report(
        self, study: Study, others: Sequence[Path], title: str, pictures: Mapping[str, Path] | None = None
    ) -> None:
        """Write a page about runs.

        Args:
            study: Rows and seeds.
            others: Folders of further runs.
            title: Of the page.
            pictures: Further ones, caption → PNG.
        """
        quiet = Console(file=io.StringIO())
        report(list(others), self.folder / REPORT_FILE, study=study, title=title, pictures=pictures, console=quiet)


def _answer(
    do: Callable[[Item, Path, Mapping[str, object]], Result],
    folder: Path,
    options: Mapping[str, object],
    numbered: tuple[int, Item],
) -> Result | Exception:
    """What ``do`` returns, or the error that the calling process is to raise."""
    try:
        return do(numbered[1], folder, options)
    except Exception as error:
        return error


def run_task(task: Task, folder: Path, options: Mapping[str, object]) -> Outcome:
    """Do one run in this process; its log lines go to its ``stdout.log`` alone, where they do not bury the story."""
    pairs: dict[str, object] = {
        **task.options,
        **options,
        "OUTPUT_DIR": folder / task.name,
        "CORPUS.INDEX_CACHE": folder / "frame_index",
    }
    cfg, _ = load_cfg(task.config, pairs_of(pairs))
    result = run(cfg, console=Console(file=io.StringIO()))
    top1 = None if result.evaluation is None else result.evaluation.top_k(1)
    if result.training is None:
        return Outcome(top1, 0, 0.0)
    return Outcome(top1, result.training.steps, result.training.wait_share)


def pairs_of(options: Mapping[str, object]) -> list[str]:
    """Overrides as words of a command line."""
    return [str(word) for pair in options.items() for word in pair]


def by_seed(seeds: Sequence[int], values: Sequence[float]) -> dict[str, float]:
    """Columns of a table, one a seed."""
    return {f"seed {seed}": value for seed, value in zip(seeds, values, strict=True)}


def percents(values: Sequence[float]) -> str:
    """Fractions as text: ``71.3, 70.0 %``."""
    return ", ".join(f"{100 * value:.1f}" for value in values) + " %"


def storyteller(console: Console) -> Say:
    """Prints sentences with the seconds since now in front."""
    begin = time.monotonic()

    def say(sentence: str) -> None:
        console.print(f"[{time.monotonic() - begin:5.0f} s] {sentence}", markup=False, highlight=False)

    return say
