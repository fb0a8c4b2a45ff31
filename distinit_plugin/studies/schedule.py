"""All runs of a study on one machine: several at once, each in its own process, those that others start from first."""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass

from distinit_plugin.demos.runs import Say
from distinit_plugin.engine.signals import Stopped, StopSignals
from distinit_plugin.errors import UserError
from distinit_plugin.files import writing_alone
from distinit_plugin.models.hardware import num_cores
from distinit_plugin.studies.execution import Order, do_run, order_of
from distinit_plugin.studies.grid import Plan, Run
from distinit_plugin.studies.results import states_of
from distinit_plugin.studies.state import FAILED, FINISHED, RunState, read_state, write_state
from distinit_plugin.video.isolated import Crash, run_isolated

PATIENCE = 120.0
"""Seconds that runs have to save their state when the study is interrupted."""


@dataclass(frozen=True)
class How:
    """How runs are started.

    Attributes:
        processes: Runs at once; 0: one per core, of runs on GPUs one.
        torchrun: Words for torchrun; ``None``: without it.
    """

    processes: int = 0
    torchrun: Sequence[str] | None = None


def run_all(plan: Plan, how: How, *, say: Say) -> None:
    """Do every run that is not finished; what becomes of each is in its folder.

    Args:
        plan: Of the study.
        how: How many at once.
        say: Told how each run ended.

    Raises:
        UserError: The study's folder cannot be written, or another process is at it.
        Stopped: A signal came; the runs have saved what they need to go on.
    """
    alone = plan.uses_gpus or how.torchrun is not None
    processes = how.processes or (1 if alone else num_cores())
    output = plan.study.output
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"OUTPUT_DIR: {output} cannot be made: {error.strerror}. Name another folder.") from error
    with writing_alone(output, f"the study {plan.study.name}"):
        total = len(plan.runs)
        for wave in plan.waves():
            todo = list(_ready(plan, wave))
            at_once = min(processes, len(todo))
            threads = 0 if alone else max(1, num_cores() // max(at_once, 1))
            orders = [order_of(plan, run, num_threads=threads, torchrun=how.torchrun) for run in todo]
            try:
                with StopSignals(), closing(_do(orders, at_once)) as ended:
                    for state in ended:
                        done = sum(found.state == FINISHED for found in states_of(plan).values())
                        say(f"{done}/{total} {_told(state, plan)}")
            except Stopped as stopped:
                say(str(stopped))
                raise


def _ready(plan: Plan, wave: Sequence[Run]) -> Iterator[Run]:
    """Runs that are to be done and can be."""
    states = states_of(plan)
    for run in wave:
        if states[run.digest].state != FINISHED and all(
            states[start].state == FINISHED for start in run.starts.values()
        ):
            yield run


def _do(orders: Sequence[Order], processes: int) -> Generator[RunState, None, None]:
    """States as runs end."""
    if not orders:
        return
    results = run_isolated(
        _attempt, orders, num_workers=processes, max_seconds=math.inf, what="its process", patience=PATIENCE
    )
    with closing(results):  # whatever happens, no process is left behind
        for order, result in results:
            yield _after_crash(order, result) if isinstance(result, Crash) else result


def _after_crash(order: Order, crash: Crash) -> RunState:
    """Write down what the process could not."""
    hint = "; the system kills processes that way when memory runs out" if "SIGKILL" in crash.reason else ""
    folder = order.output / order.run.folder
    state = read_state(folder, order.run.name, order.run.digest)
    if state.state == FINISHED:  # it died after its end
        return state
    state = RunState(order.run.name, order.run.digest, FAILED, f"{crash.reason}{hint}", log=str(folder))
    write_state(folder, state)
    return state


def _attempt(order: Order) -> RunState:
    try:
        return do_run(order)
    except UserError as error:  # nothing could be written there
        return RunState(order.run.name, order.run.digest, FAILED, " ".join(str(error).split()))


def _told(state: RunState, plan: Plan) -> str:
    if state.state == FAILED:
        return f"{state.name}: FAILED, {state.reason} ({state.log})"
    number = state.metrics.get(plan.study.metric)
    score = "" if number is None else f", {100 * number:.1f} %"
    return f"{state.name}: {state.seconds:.0f} s{score}"
