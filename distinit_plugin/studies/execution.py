"""One run of a study: alone on its folder, never twice, its end written down whatever it is."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from distinit_plugin.config.load import load_cfg
from distinit_plugin.config.node import CfgNode
from distinit_plugin.engine import checkpoint
from distinit_plugin.engine.curves import read_curves
from distinit_plugin.engine.progress import LOG_FILE
from distinit_plugin.engine.signals import SIGNALS, StopSignals
from distinit_plugin.errors import UserError, log_of
from distinit_plugin.files import read_json, why_unusable, write_text, writing_alone
from distinit_plugin.jobs.running import run as run_job
from distinit_plugin.jobs.testing import RESULTS_FOLDER
from distinit_plugin.refusals import explain_refusal, first_line
from distinit_plugin.studies.grid import Plan, Run
from distinit_plugin.studies.state import FAILED, FINISHED, STARTED, STATE_FILE, RunState, read_state, write_state
from distinit_plugin.version import __version__
from distinit_plugin.video.isolated import end_with_parent

CONFIG_FILE = "config.yaml"
"""Below a run's folder: its whole configuration."""

INDEX_FOLDER = "frame_index"
"""Below the study's folder: frames of the videos, which its runs mostly share."""

OUTPUT_FILE = "output.log"
"""Below a run's folder: what it printed."""

TORCHRUN = (sys.executable, "-m", "torch.distributed.run")
TORCHRUN_PATIENCE = 100.0
"""Seconds that torchrun has to end after a signal; its ranks save meanwhile."""

_MAX_METRICS = 20_000_000


@dataclass(frozen=True)
class Order:
    """What a process needs to know to do a run.

    Attributes:
        run: It.
        output: Folder of the study.
        starts: Step → (name, folder) of the run whose checkpoint ``$step`` is.
        num_threads: RUNNER.NUM_THREADS where the configuration leaves it open; 0: all.
        torchrun: Words for torchrun; ``None``: the runner starts ranks itself, where there are several.
        quiet: What is printed goes to ``OUTPUT_FILE``, and signals are those of a process that was forked for this.
    """

    run: Run
    output: Path
    starts: Mapping[str, tuple[str, str]]
    num_threads: int = 0
    torchrun: Sequence[str] | None = None
    quiet: bool = True


def order_of(plan: Plan, run: Run, **how: Any) -> Order:
    """The order for a run of a plan; ``how``: its last attributes."""
    starts = {step: (plan.runs[digest].name, plan.runs[digest].folder) for step, digest in run.starts.items()}
    return Order(run, plan.study.output, starts, **how)


def do_run(order: Order) -> RunState:
    """Train and test, unless it is done; the outcome is in the run's folder, too.

    Raises:
        UserError: Another process is at it, or the folder cannot be written.
        Stopped: A signal came; what is needed to continue is saved.
    """
    folder = order.output / order.run.folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder} cannot be made: {error.strerror}. Name another OUTPUT_DIR.") from error
    if order.quiet:
        for name in SIGNALS:
            signal.signal(getattr(signal, name), signal.SIG_DFL)  # those of the process that forked this one
    with writing_alone(folder, f"the run {order.run.name}"):
        state = read_state(folder, order.run.name, order.run.digest)
        if state.state == FINISHED:
            return state
        state = RunState(order.run.name, order.run.digest, STARTED, version=__version__)
        write_state(folder, state)
        with _printing_to(folder / OUTPUT_FILE if order.quiet else None):
            state = _attempt(order, folder, state)
        write_state(folder, state)
    return state


def _attempt(order: Order, folder: Path, state: RunState) -> RunState:
    """Do it; whatever goes wrong becomes a sentence."""
    begin = time.monotonic()
    try:
        cfg = _configuration(order, folder)
        write_text(folder / CONFIG_FILE, cfg.dump())
        if order.torchrun is None:
            run_job(cfg, console=Console(file=sys.stdout))
        else:
            _run_torchrun(order.torchrun, folder)
        metrics = {} if order.run.step else read_metrics(folder)
        done = replace(state, state=FINISHED, metrics=metrics, validation=_validation(folder))
    except UserError as error:
        done = replace(state, state=FAILED, reason=" ".join(str(error).split()), log=_log_in(folder))
    except Exception as error:
        reason = explain_refusal(error) or f"a defect of the program ({type(error).__name__}: {first_line(error)})"
        traceback.print_exc()
        done = replace(state, state=FAILED, reason=reason, log=log_of(error) or _log_in(folder))
    return replace(done, seconds=round(time.monotonic() - begin, 1))


def _configuration(order: Order, folder: Path) -> CfgNode:
    """The run's configuration, with the checkpoints that it starts from.

    Raises:
        UserError: One of them is not there.
    """
    options = dict(order.run.options)
    for key, value in options.items():
        if isinstance(value, str) and value.startswith("$"):
            name, start = order.starts[value[1:]]
            found = checkpoint.newest_checkpoint(order.output / start / checkpoint.FOLDER)
            if found is None:
                raise UserError(f"{key}: it starts from the run {name}, which has no checkpoint in {start}.")
            options[key] = found
    options |= {"OUTPUT_DIR": folder, "RUNNER.DRY_RUN": False}
    cfg, _ = load_cfg(order.run.files, [word for pair in options.items() for word in pair])
    cfg.defrost()
    cfg.RUNNER.NUM_THREADS = cfg.RUNNER.NUM_THREADS or order.num_threads
    cfg.CORPUS.INDEX_CACHE = cfg.CORPUS.INDEX_CACHE or str(order.output / INDEX_FOLDER)
    cfg.freeze()
    return cfg


def read_metrics(folder: Path) -> dict[str, float]:
    """The numbers of a run's test.

    Raises:
        UserError: It has none.
    """
    path = folder / RESULTS_FOLDER / "metrics.json"
    try:
        values = read_json(path, _MAX_METRICS)
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"there is no result of a test in {path} ({why_unusable(error)}): name labelled videos below CORPUS.TEST."
        ) from error
    return {key: value for key, value in values.items() if isinstance(value, int | float)}


def _validation(folder: Path) -> float | None:
    """The last validation of a run: top-1 or frame-mAP, a fraction; ``None`` without one."""
    try:
        curves = read_curves(folder)
    except UserError:
        return None
    curve = curves.val_top1 or curves.val_map
    return round(curve[max(curve)] / 100, 6) if curve else None


def _log_in(folder: Path) -> str:
    names = (LOG_FILE, OUTPUT_FILE, STATE_FILE)
    return next((str(folder / name) for name in names if (folder / name).is_file()), str(folder / STATE_FILE))


def _run_torchrun(words: Sequence[str], folder: Path) -> None:
    """The same run, its ranks started by torchrun.

    Raises:
        UserError: It failed; the last error that it printed.
    """
    command = [*TORCHRUN, *words, "-m", "distinit_plugin.cli", "run", "--cfg", str(folder / CONFIG_FILE)]
    with StopSignals(), open(folder / OUTPUT_FILE, "ab") as output:
        begin = output.tell()
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, preexec_fn=partial(end_with_parent, os.getpid())
        )
        try:
            status = process.wait()
        finally:
            if process.poll() is None:
                process.terminate()
                try:
                    process.wait(TORCHRUN_PATIENCE)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
    if status:
        with open(folder / OUTPUT_FILE, encoding="utf-8", errors="replace") as file:
            file.seek(begin)
            errors = [line.strip() for line in file if line.startswith("error: ")]
        raise UserError(errors[-1].removeprefix("error: ") if errors else f"torchrun ended with exit status {status}")


@contextmanager
def _printing_to(path: Path | None) -> Iterator[None]:
    """Send what this process and those that it starts print to a file; ``None``: leave it."""
    if path is None:
        yield
        return
    sys.stdout.flush()
    sys.stderr.flush()
    before = os.dup(1), os.dup(2)
    try:
        with open(path, "ab") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for number, handle in zip((1, 2), before, strict=True):
            os.dup2(handle, number)
            os.close(handle)
