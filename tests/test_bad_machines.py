"""What befalls a job from outside: full disks, closed pipes, signals, dead workers, and defects of the program."""

import contextlib
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from bad_inputs import Place, World

from distinit_plugin import cli
from distinit_plugin.config.defaults import get_cfg
from distinit_plugin.engine.checkpoint import load_checkpoint
from distinit_plugin.engine.progress import RunLog
from distinit_plugin.errors import UserError
from distinit_plugin.jobs.session import open_session
from distinit_plugin.refusals import explain_refusal

SECONDS = 240  # that any of these may take on a busy machine


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    return World(tmp_path_factory.mktemp("world"))


def start(words: Sequence[str], shell: str = 'exec "$@"') -> subprocess.Popen[str]:
    """The command line in a process group of its own, started by a line of a shell."""
    command = ["bash", "-c", shell, "-", sys.executable, "-m", "distinit_plugin.cli", *words]
    pipe = subprocess.PIPE
    # A shell's background job has Ctrl-C switched off, and its children inherit that.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, text=True, start_new_session=True
        )
    finally:
        signal.signal(signal.SIGINT, before)


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    """Its status and what it printed; nothing of its group is left, however this ends."""
    try:
        out, err = process.communicate(timeout=SECONDS)
    finally:
        end_group(process)
    assert "Traceback" not in out + err, out + err
    return process.returncode, out, err


def end_group(process: subprocess.Popen[str]) -> None:
    """Kill what is left of a process and all that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def wait_for_steps(process: subprocess.Popen[str]) -> None:
    """Until a few steps are done."""
    assert process.stdout is not None
    try:
        for line in process.stdout:
            if "step 3/" in line:
                return
    except BaseException:  # the test's time is over
        end_group(process)
        raise
    pytest.fail(process.communicate()[1])


def workers_of(pid: int) -> list[int]:
    """The processes that a process has started."""
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def long_job(place: Place) -> list[str]:
    return place.job("SOLVER.MAX_EPOCH", 10_000, "RUNNER.CLIPS_PER_EPOCH", 400, "DATA_LOADER.NUM_WORKERS", 2)


def test_a_disk_that_fills_up_leaves_the_earlier_checkpoint(world, tmp_path, capsys):
    place = Place(world, tmp_path)
    assert cli.main(place.job()) == 0
    first = place.output / "checkpoints" / "checkpoint_epoch_00001.pyth"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (first.stat().st_size // 2, before[1]))
    try:
        status = cli.main(place.job("SOLVER.MAX_EPOCH", 2))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert status == 1
    printed = capsys.readouterr()
    assert "Traceback" not in printed.out + printed.err
    error = next(line for line in printed.err.splitlines() if line.startswith("error: "))
    assert "checkpoint_epoch_00002.pyth" in error
    assert "Free space" in error
    assert sorted(path.name for path in first.parent.glob("checkpoint*")) == [first.name]
    assert load_checkpoint(first)["epoch"] == 0


@pytest.mark.parametrize("shell", ['"$@" >&-', '"$@" | head -n 1; exit ${PIPESTATUS[0]}'], ids=["closed", "head"])
def test_a_run_outlives_its_reader(shell, world, tmp_path):
    place = Place(world, tmp_path)
    status, _, err = finish(start(place.job("SOLVER.MAX_EPOCH", 3), shell))
    assert (status, err) == (0, "")
    assert (place.output / "checkpoints" / "checkpoint_epoch_00003.pyth").is_file()
    assert "step 9/9" in (place.output / "stdout.log").read_text()


def test_ctrl_c_ends_with_130_and_without_a_traceback(world, tmp_path):
    process = start(long_job(Place(world, tmp_path)))
    wait_for_steps(process)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: workers get it, too
    status, _, err = finish(process)
    assert status == 130
    assert "interrupted" in err.splitlines()[-1]


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
def test_a_killed_worker_ends_the_run_with_a_sentence(world, tmp_path, capsys):
    place, ended = Place(world, tmp_path), threading.Event()
    others = set(workers_of(os.getpid()))

    def kill_workers():
        log, deadline = place.output / "stdout.log", time.monotonic() + SECONDS
        while not ended.wait(0.01) and time.monotonic() < deadline:
            if log.is_file() and "step 3/" in log.read_text():
                for worker in set(workers_of(os.getpid())) - others:  # they come and go with the epochs
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(worker, signal.SIGKILL)

    killer = threading.Thread(target=kill_workers)
    killer.start()
    try:
        status = cli.main(long_job(place))
    finally:
        ended.set()
        killer.join()
    printed = capsys.readouterr()
    assert "Traceback" not in printed.out + printed.err
    assert status == 1, printed.err
    (error,) = printed.err.splitlines()
    assert error.startswith("error: A decoding process died")
    assert "DATA_LOADER.NUM_WORKERS" in error


@pytest.mark.parametrize("said", ["DataLoader worker (pid 7) is killed by signal: Killed. ", "another thing"])
def test_a_dead_worker_is_a_sentence_also_while_the_job_cleans_up(said, tmp_path, monkeypatch):
    """torch tells it by a signal, wherever the process is at that moment."""
    cfg = get_cfg()
    cfg.OUTPUT_DIR = str(tmp_path / "run")
    close = RunLog.close

    def closed(log):
        close(log)
        raise RuntimeError(said)

    monkeypatch.setattr(RunLog, "close", closed)
    expected = (UserError, "A decoding process died") if "worker" in said else (RuntimeError, "another thing")
    with pytest.raises(expected[0], match=expected[1]), open_session(cfg):
        raise UserError("the first")


@pytest.mark.parametrize("before_the_run", [False, True])
def test_a_defect_is_one_sentence_and_a_traceback_in_a_file(before_the_run, world, tmp_path, capsys, monkeypatch):
    def defect(*_, **__):
        raise ZeroDivisionError("a defect for this test")

    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    place = "check_job" if before_the_run else "train_in_session"
    monkeypatch.setattr(f"distinit_plugin.jobs.running.{place}", defect)
    assert cli.main(Place(world, tmp_path).job()) == cli.EXIT_DEFECT == 3
    printed = capsys.readouterr()
    assert "Traceback" not in printed.out + printed.err
    (line,) = printed.err.splitlines()
    assert "this is a defect of distinit-plugin" in line
    assert "ZeroDivisionError: a defect for this test" in line
    (log,) = tmp_path.glob("distinit-*.log") if before_the_run else [tmp_path / "run" / "stdout.log"]
    assert f"The traceback is in {log}" in line
    text = log.read_text()
    assert "Traceback" in text
    assert "in defect" in text


@pytest.mark.parametrize(
    ("error", "part"),
    [
        (MemoryError(), "not enough memory"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "Tried to allocate 2 GiB"),
        (
            RuntimeError("CUDA error: out of memory\nCompile with TORCH_USE_CUDA_DSA"),
            "memory (CUDA error: out of memory)",
        ),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), "not enough memory"),
        (RuntimeError("NCCL error: Cuda failure 2 'out of memory'"), "not enough memory"),
        (
            RuntimeError("adaptive_avg_pool3d_backward_cuda does not have a deterministic implementation"),
            "DETERMINISTIC: adaptive_avg_pool3d_backward_cuda has",
        ),
        (OSError(24, "Too many open files", "/x"), "/x: too many open files. Raise the limit"),
        (RuntimeError("anything else"), None),
        (FileNotFoundError(2, "No such file"), None),
    ],
)
def test_what_the_machine_refuses_is_no_defect(error, part):
    sentence = explain_refusal(error)
    assert (sentence is None) if part is None else (part in str(sentence))


# ----------------------------------------------------------------------------------------------------- full disks
def test_a_full_disk_under_the_log_is_said_once(world, tmp_path, capsys):
    place = Place(world, tmp_path)
    place.output.mkdir()
    (place.output / "stdout.log").symlink_to("/dev/full")
    assert cli.main(place.job()) == 0
    printed = capsys.readouterr()
    assert "Traceback" not in printed.out + printed.err
    (line,) = printed.err.splitlines()
    assert "stdout.log cannot be written: no space left on device. The run goes on." in line
    assert (place.output / "checkpoints" / "checkpoint_epoch_00001.pyth").is_file()


def test_a_full_disk_under_the_figures_is_said(world, tmp_path, capsys):
    """The run's log has them, too; where nothing can be written any more, the state says so and ends the run."""
    place = Place(world, tmp_path)
    place.output.mkdir()
    (place.output / "json_stats.log").symlink_to("/dev/full")
    assert cli.main(place.job()) == 0
    printed = capsys.readouterr()
    assert "json_stats.log cannot be written: no space left on device. The run goes on" in printed.out
    assert printed.err == ""
    assert (place.output / "stdout.log").read_text().count('"train_epoch"') == 1
