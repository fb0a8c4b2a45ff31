"""What ``distinit study`` does: list, check, run on this machine or a cluster, one run of an array, the table."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from distinit_plugin.demos.runs import storyteller
from distinit_plugin.engine.results import terminal_table
from distinit_plugin.errors import UserError
from distinit_plugin.registry import near_matches
from distinit_plugin.studies.data import make_data, version_of
from distinit_plugin.studies.execution import do_run, order_of
from distinit_plugin.studies.grid import Plan, Run, plan_study
from distinit_plugin.studies.results import RESULTS_MARKDOWN, STUDY_JSON, Results, states_of
from distinit_plugin.studies.schedule import How, run_all
from distinit_plugin.studies.slurm import scripts, submit
from distinit_plugin.studies.spec import Study
from distinit_plugin.studies.state import FAILED, FINISHED, STARTED, RunState


@dataclass(frozen=True)
class Wish:
    """What is to be done of a study.

    Attributes:
        list_runs: Only say how far each run is.
        dry_run: Only check all configurations and say what would be done.
        only: Names, folders or digests of runs, which are done one after another in this process.
        launch: ``local``, ``torchrun`` or ``slurm``.
        processes: Runs at once; 0: see ``How`` and ``submit``.
        words: For torchrun or sbatch.
    """

    list_runs: bool = False
    dry_run: bool = False
    only: Sequence[str] = ()
    launch: str = "local"
    processes: int = 0
    words: Sequence[str] = ()


def run_study(study: Study, wish: Wish, *, console: Console | None = None) -> bool:
    """Do it.

    Args:
        study: What was written.
        wish: What of it.
        console: Where to print; the standard output when ``None``.

    Returns:
        Whether every run that was asked for is finished (of a list and a dry run: whether none has failed; of runs that
        were queued: yes).

    Raises:
        UserError: Anything that is wrong with the study or its configurations, everything at once.
    """
    console = console or Console()
    plan = plan_study(study, version_of(study.data))
    for warning in plan.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    if wish.list_runs or wish.dry_run:
        return _show(plan, wish, console)
    if study.data is not None:
        make_data(study.data)
    if wish.only:
        done = [_alone(plan, run, wish) for run in _named(plan, wish.only)]
        return all(done)
    say = storyteller(console)
    Results(plan, states_of(plan)).write()  # which rows there are, before the first run ends
    if wish.launch == "slurm":
        submit(plan, processes=wish.processes, words=wish.words, say=say)
    else:
        torchrun = wish.words if wish.launch == "torchrun" else None
        run_all(plan, How(wish.processes, torchrun), say=say)
    return _report(plan, console, queued=wish.launch == "slurm")


def _alone(plan: Plan, run: Run, wish: Wish) -> bool:
    """One run in this process, which prints what any run prints."""
    torchrun = wish.words if wish.launch == "torchrun" else None
    unfinished = [name for name, state in _starts(plan, run) if state.state != FINISHED]
    if unfinished:
        raise UserError(f"{run.name} starts from {', '.join(unfinished)}, which is not finished; do that first.")
    state = do_run(order_of(plan, run, torchrun=torchrun, quiet=False))
    if state.state == FAILED:
        print(f"error: {run.name}: {state.reason} ({state.log})", file=sys.stderr)
    return state.state == FINISHED


def _starts(plan: Plan, run: Run) -> list[tuple[str, RunState]]:
    states = states_of(plan)
    return [(plan.runs[digest].name, states[digest]) for digest in run.starts.values()]


def _named(plan: Plan, names: Sequence[str]) -> list[Run]:
    """The runs that somebody names, in the order of the plan."""
    by_name: dict[str, Run] = {}
    for run in plan.runs.values():
        by_name |= {run.name: run, run.digest: run, run.folder: run, run.folder.rpartition("/")[2]: run}
    for name in names:
        if name not in by_name:
            hint = near_matches(name, [run.name for run in plan.runs.values()])
            raise UserError(f"--only: {plan.study.source} has no run {name!r}.{hint} (--list names them all.)")
    wanted = {by_name[name].digest for name in names}
    return [run for run in plan.runs.values() if run.digest in wanted]


def _show(plan: Plan, wish: Wish, console: Console) -> bool:
    """A table of all runs, or of those that would be done."""
    states = states_of(plan)
    waves = {run.digest: number for number, wave in enumerate(plan.waves(), start=1) for run in wave}
    table = Table(title=f"{plan.study.name}: {len(plan.runs)} runs", title_justify="left")
    for header in ("run", "wave", "state", "folder, reason"):
        table.add_column(header, overflow="fold")
    shown = 0
    for digest, run in plan.runs.items():
        state = states[digest]
        if wish.dry_run and state.state == FINISHED:
            continue
        note = f"{run.folder}: {state.reason} ({state.log})" if state.reason else run.folder
        table.add_row(run.name, str(waves[digest]), state.state, note)
        shown += 1
    console.print(table)
    if wish.dry_run:
        console.print(f"all configurations are right; {shown} of {len(plan.runs)} runs are to be done", highlight=False)
        if wish.launch == "slurm":
            for path, text in scripts(plan, wish.processes):
                console.print(f"{path}:\n{text}", markup=False, highlight=False, soft_wrap=True)
    return not any(state.state == FAILED for state in states.values())


def _report(plan: Plan, console: Console, *, queued: bool) -> bool:
    """The table as far as there are results, and what is missing."""
    states = states_of(plan)
    results = Results(plan, states)
    results.write()
    if results.scores:
        console.print(terminal_table(results.table(), title=results.title, first=results.first))
        full = results.full_table()
        if full:
            title = f"all values of {plan.study.best_of}, %"
            console.print(terminal_table(full, title=title, first=results.first))
    left = {digest: state for digest, state in states.items() if state.state != FINISHED}
    for digest, state in left.items():
        if state.state == FAILED:
            console.print(f"FAILED {state.name}: {state.reason} ({state.log})", markup=False, highlight=False)
        elif not queued:
            missing = [plan.runs[start].name for start in plan.runs[digest].starts.values() if start in left]
            why = "interrupted" if state.state == STARTED else f"it starts from {', '.join(missing)}"
            console.print(f"NOT DONE {plan.runs[digest].name}: {why}", markup=False, highlight=False)
    output = plan.study.output
    console.print(f"logs, checkpoints, study.json, {RESULTS_MARKDOWN}: {output}", markup=False, highlight=False)
    if results.scores:
        page = f"distinit report --study {shlex.quote(str(output / STUDY_JSON))}"
        console.print(f"one page about all of it: {page}", markup=False, highlight=False, soft_wrap=True)
    if left and not queued:
        console.print("the same command does what is left", highlight=False)
    return queued or not left
