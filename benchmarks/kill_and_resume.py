"""Does a run that is killed again and again end with the very weights of the run that was not?

    python benchmarks/kill_and_resume.py [--kills 10] [--workers 0 2] [--seed 0] [--folder FOLDER]

Writes tiny videos, trains a tiny network on them once without interruption, then once more in another folder, where
the whole process is ended by ``kill -9`` during steps, while checkpoints are written, during validation and at random,
each time started again by the same command. Compared are the final weights, optimizer and best validation, bit for
bit, and the logged means of every epoch. Then the same with two ranks of torchrun, of which one is killed, and, where
the hardware computes in bf16, losses in that precision. Nothing of a killed job may be left running. Exit status 1:
something differs. Results: benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from distinit_plugin.demos.files import encode_h264
from distinit_plugin.engine.checkpoint import FOLDER, RESUME_NAME, epoch_files, load_checkpoint
from distinit_plugin.models.hardware import hardware_has_bf16

ROOT = Path(__file__).resolve().parents[1]
PATIENCE = 600.0  # seconds: everything that is waited for comes sooner or the script gives up
GONE_SECONDS = 15.0  # that children of a killed process may take to end
TIMES = ("dt", "dt_data", "dt_net", "eta", "RAM", "gpu_mem", "time_diff")  # entries of log lines that may differ
AIMS = ("write", "step", "validation", "start", "random")
"""When to kill: as soon as a checkpoint is being written, some time after a log line of steps, after the end of an
epoch's training, within the start, or some time after the start."""


class KillTestError(Exception):
    """The run did not behave; the text says how."""


# --------------------------------------------------------------------------------------------------------- the job
def write_videos(folder: Path, per_class: int = 6) -> Path:
    """``folder/{train,val}/{bright,dark}/*.mp4``: 12 frames of 48×64."""
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for label, level in (("bright", 170), ("dark", 30)):
            (folder / split / label).mkdir(parents=True, exist_ok=True)
            for number in range(per_class):
                texture = rng.integers(0, 60, (12, 6, 8, 3)).repeat(8, axis=1).repeat(8, axis=2)
                encode_h264((level + texture).astype(np.uint8), folder / split / label / f"{number}.mp4")
    return folder


def settings(videos: Path, output: Path, *, workers: int, **runner: Any) -> dict[str, Any]:
    """A job in which much is state: dropout, momentum, random frames, precise BN, plateau, a best epoch."""
    corpora = {use: {"VIDEOS": {"PATH": str(videos / name), "LABELED": True}} for use, name in SPLITS.items()}
    return {
        "OUTPUT_DIR": str(output),
        "LOG_PERIOD": 3,
        "DATA": {
            "NUM_FRAMES": 4,
            "SAMPLING_RATE": 2,
            "TRAIN_CROP_SIZE": 32,
            "TEST_CROP_SIZE": 32,
            "TRAIN_JITTER_SCALES": [36, 44],
        },
        "DATA_LOADER": {"NUM_WORKERS": workers},
        "MODEL": {"NUM_CLASSES": 2, "DROPOUT_RATE": 0.5},
        "RESNET": {"DEPTH": 10},
        "NETWORK": {"WIDTH": 8},
        "BN": {"USE_PRECISE_STATS": True, "NUM_BATCHES_PRECISE": 2},
        "TRAIN": {"BATCH_SIZE": 4, "CHECKPOINT_PERIOD": 2},
        "TEST": {"ENABLE": False, "BATCH_SIZE": 4},
        "CORPUS": corpora,
        "ACTION": {"LOSS_WEIGHT": 1.0},
        "DISTILL": {"TEACHERS": {"RANDOM": {**TEACHER}}},
        "SOLVER": {"MAX_EPOCH": 8, "BASE_LR": 0.02, "LR_POLICY": "plateau"},
        "RUNNER": {
            "CLIPS_PER_EPOCH": 48,
            "RESUME_MINUTES": 0.005,
            "KEEP_CHECKPOINTS": 2,
            "PLATEAU_PATIENCE": 1,
            "PLATEAU_FACTOR": 0.5,
            "CHECK_CONVOLUTIONS": False,
            "NUM_THREADS": 1,
            **(runner or {"DETERMINISTIC": True}),
        },
    }


SPLITS = {"TRAIN": "train", "VAL": "val"}
TEACHER = {
    "ARCH": "Res2D",
    "WEIGHTS": "random",
    "NUM_CLASSES": 5,
    "DEPTH": 10,
    "NETWORK": {"WIDTH": 8},
    "CROP_SIZE": 32,
    "FRAME_PICK": "random",
}


@dataclass
class Job:
    """One command, started as often as needed, and what it has written so far.

    Attributes:
        config: The YAML file.
        output: OUTPUT_DIR.
        launcher: Words between ``python`` and the script (torchrun's).
        process: The one that was started last.
        killed: How often a kill met each phase.
    """

    config: Path
    output: Path
    launcher: Sequence[str] = ()
    process: subprocess.Popen[bytes] = field(init=False)
    killed: Counter[str] = field(default_factory=Counter)
    _mark: str = field(default_factory=lambda: uuid.uuid4().hex)
    _seen: tuple[int, int] = (0, 0)

    def start(self) -> None:
        """Start the command; all processes that it starts carry a mark in their environment."""
        self._seen = self.lines()
        with open(self.config.with_suffix(".printed"), "ab") as printed:
            self.process = subprocess.Popen(
                [sys.executable, *self.launcher, str(ROOT / "tools" / "run_net.py"), "--cfg", str(self.config)],
                cwd=ROOT,
                env={**os.environ, "OMP_NUM_THREADS": "1", "KILL_TEST": self._mark},
                stdout=printed,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def printed(self) -> str:
        """Everything that all starts printed."""
        return self.config.with_suffix(".printed").read_text(errors="replace")

    @property
    def folder(self) -> Path:
        """Of the checkpoints."""
        return self.output / FOLDER

    def running(self) -> bool:
        """Whether the process that was started last has not ended."""
        return self.process.poll() is None

    def lines(self) -> tuple[int, int]:
        """Lines of steps in the log, and epochs whose training has ended."""
        texts = [path.read_text() if path.is_file() else "" for path in (self.output / "stdout.log", self._epochs)]
        return texts[0].count('"train_iter_"'), texts[1].count('"train_epoch"')

    @property
    def _epochs(self) -> Path:
        return self.output / "json_stats.log"

    def new_lines(self) -> tuple[int, int]:
        """The same since the last start."""
        return tuple(now - before for now, before in zip(self.lines(), self._seen, strict=True))  # type: ignore[return-value]

    def phase(self) -> str:
        """What a frozen process was doing."""
        if writing(self.folder):
            return "checkpoint write"
        steps, epochs = self.new_lines()
        last = self._epochs.read_text().splitlines()[-1:] if self._epochs.is_file() else []
        if epochs and last and '"train_epoch"' in last[0]:
            return "precise BN and validation"
        return "steps" if steps or epochs else "start"

    def kill(self, wanted: str = "") -> bool:
        """Freeze the process, see what it is doing, and kill it, unless it does something else than ``wanted``."""
        os.kill(self.process.pid, signal.SIGSTOP)
        time.sleep(0.005)  # a signal takes effect when the process is next scheduled
        phase = self.phase()
        if wanted and phase != wanted:
            os.kill(self.process.pid, signal.SIGCONT)
            return False
        os.kill(self.process.pid, signal.SIGKILL)
        self.process.wait(timeout=PATIENCE)
        self.killed[phase] += 1
        self.expect_nothing_left()
        return True

    def processes(self) -> Iterator[tuple[int, list[str], dict[str, str]]]:
        """(pid, command, environment) of every process of this job that runs, in whatever group or session."""
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            try:
                environment = (entry / "environ").read_bytes().split(b"\0")
                words = (entry / "cmdline").read_bytes().decode(errors="replace").split("\0")
                state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
            except OSError:
                continue
            if f"KILL_TEST={self._mark}".encode() in environment and state != "Z":
                pairs = (item.decode(errors="replace").partition("=") for item in environment)
                yield int(entry.name), words, {name: value for name, _, value in pairs}

    def expect_nothing_left(self) -> None:
        """Wait for the processes of this job to be gone.

        Raises:
            KillTestError: Some are still there; they are killed.
        """
        end = time.monotonic() + GONE_SECONDS
        while left := list(self.processes()):
            if time.monotonic() > end:
                self.end_all()
                raise KillTestError(f"{len(left)} processes outlived the job: {[pid for pid, _, _ in left]}")
            time.sleep(0.05)

    def end_all(self) -> None:
        """Kill every process of this job."""
        for pid, _, _ in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def finish(self) -> None:
        """Wait for the end of the run.

        Raises:
            KillTestError: It failed.
        """
        try:
            status = self.process.wait(timeout=PATIENCE)
        except subprocess.TimeoutExpired as error:
            self.end_all()
            raise KillTestError(f"the run did not end within {PATIENCE:g} s:\n{self.printed[-3000:]}") from error
        if status:
            raise KillTestError(f"exit status {status}:\n{self.printed[-3000:]}")
        self.expect_nothing_left()

    def run(self) -> float:
        """Start and finish; returns the seconds."""
        begin = time.monotonic()
        self.start()
        self.finish()
        return time.monotonic() - begin


def make_job(
    videos: Path, output: Path, *, workers: int = 0, ranks: int = 1, epochs: int | None = None, **runner: Any
) -> Job:
    """The job with its YAML file beside its folder."""
    values = settings(videos, output, workers=workers, **runner)
    if epochs is not None:
        values["SOLVER"]["MAX_EPOCH"] = epochs
    config = output.with_name(f"{output.name}.yaml")
    config.write_text(yaml.safe_dump(values))
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks), "--max-restarts", "5")
    return Job(config, output, torchrun if ranks > 1 else ())


def writing(folder: Path) -> bool:
    """Whether a checkpoint is being written."""
    return folder.is_dir() and any(name.endswith(".tmp") for name in os.listdir(folder))


def has_state(folder: Path) -> bool:
    """Whether there is a state to go on from."""
    return (folder / RESUME_NAME).exists() or bool(epoch_files(folder))


# ----------------------------------------------------------------------------------------------------------- killing
def kill_once(job: Job, aim: str, rng: random.Random, seconds: float) -> bool:
    """Kill a job that has just been started, when ``aim`` says.

    Args:
        job: The job.
        aim: One of ``AIMS``.
        rng: Draws the moments.
        seconds: Duration of the uninterrupted run.

    Returns:
        False when the run ended before.
    """
    if aim in ("start", "random"):
        time.sleep(rng.uniform(0, 3.0 if aim == "start" else seconds / 3))
    elif aim == "step":
        wanted = rng.randint(1, 4)
        wait_until(job, lambda: job.new_lines()[0] >= wanted)
        time.sleep(rng.uniform(0, 0.2))
    else:
        what = {"write": "checkpoint write", "validation": "precise BN and validation"}[aim]
        skipped = rng.randint(0, 2) if aim == "write" else 0
        longest = 0.3  # seconds after the start of a validation; halved when it was over by then
        while job.running():
            if aim == "write":
                wait_until(job, lambda: writing(job.folder), pause=0.0005)
            else:
                wait_until(job, lambda: job.new_lines()[1] >= 1, pause=0.01)
                time.sleep(rng.uniform(0, longest))
                longest /= 2
            if not job.running():
                return False
            if skipped:
                skipped -= 1
                wait_until(job, lambda: not writing(job.folder), pause=0.0005)
            elif job.kill(what):
                return True
            elif aim == "validation":
                job._seen = job.lines()
        return False
    return job.running() and job.kill()


def wait_until(job: Job, condition: Callable[[], bool], pause: float = 0.02) -> None:
    """Until ``condition()`` or the end of the run.

    Raises:
        KillTestError: Neither comes.
    """
    end = time.monotonic() + PATIENCE
    while job.running() and not condition():
        if time.monotonic() > end:
            job.end_all()
            raise KillTestError(f"nothing happened for {PATIENCE:g} s:\n{job.printed[-3000:]}")
        time.sleep(pause)


def kill_and_restart(job: Job, aims: Sequence[str], rng: random.Random, seconds: float) -> None:
    """Start, kill, start again … once for each aim, then let the run end.

    Raises:
        KillTestError: The run ended before the last kill, or failed.
    """
    for number, aim in enumerate(aims):
        job.start()
        if not kill_once(job, aim, rng, seconds):
            job.finish()
            raise KillTestError(f"the run ended after {number} of {len(aims)} kills: give it more epochs")
    job.run()


def kill_ranks(job: Job, victims: Sequence[int], rng: random.Random, longest: float = 0.3) -> None:
    """Kill one rank after the other, while torchrun starts all ranks again each time.

    Each is killed up to ``longest`` seconds after some log lines and a state to go on from were there.

    Raises:
        KillTestError: The job failed or left something behind.
    """
    job.start()
    for rank in victims:
        job._seen = job.lines()
        wanted = rng.randint(1, 5)
        wait_until(job, lambda: job.new_lines()[0] >= wanted and has_state(job.folder))  # noqa: B023 (called at once)
        time.sleep(rng.uniform(0, longest))
        found = [
            pid
            for pid, words, environment in job.processes()
            if environment.get("RANK") == str(rank) and any("run_net" in word for word in words)
        ]
        if not found:
            raise KillTestError(f"there is no rank {rank} to kill:\n{job.printed[-3000:]}")
        os.kill(min(found), signal.SIGKILL)  # the lowest number: its workers were started later
        job.killed[f"rank {rank}"] += 1
    job.finish()


# --------------------------------------------------------------------------------------------------------- comparing
def differences(one: Any, other: Any, where: str = "") -> list[str]:
    """Places at which two nested structures differ; tensors are compared bit for bit."""
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return [] if one.dtype == other.dtype and torch.equal(one, other) else [where]
    if isinstance(one, dict) and isinstance(other, dict):
        if one.keys() != other.keys():
            return [f"{where}: keys"]
        return [place for key in one for place in differences(one[key], other[key], f"{where}/{key}")]
    if isinstance(one, list | tuple) and isinstance(other, list | tuple) and len(one) == len(other):
        pairs = enumerate(zip(one, other, strict=True))
        return [place for index, pair in pairs for place in differences(*pair, f"{where}/{index}")]
    return [] if one == other else [f"{where}: {one!r} ≠ {other!r}"]


def final_state(output: Path) -> dict[str, Any]:
    """What decides the future in the last and in the best checkpoint of a finished run."""
    folder = output / FOLDER
    if (folder / RESUME_NAME).exists() or writing(folder):
        raise KillTestError(f"{folder} of a finished run holds {sorted(os.listdir(folder))}")
    states = {"last": load_checkpoint(epoch_files(folder)[-1]), "best": load_checkpoint(folder / "best.pyth")}
    for state in states.values():
        state.pop("cfg")  # other OUTPUT_DIR
        state["distinit"].pop("epoch_clock")
    return states


def epoch_lines(output: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """(type, epoch) → the newest such line of ``json_stats.log``, without what is about time and memory."""
    lines = {}
    for text in (output / "json_stats.log").read_text().splitlines():
        stats = json.loads(text.rpartition("json_stats: ")[2])
        lines[stats["_type"], stats["epoch"]] = {key: value for key, value in stats.items() if key not in TIMES}
    return lines


def compare(one: Path, other: Path) -> None:
    """Two finished runs.

    Raises:
        KillTestError: They differ.
    """
    found = differences(final_state(one), final_state(other)) + differences(
        {str(key): value for key, value in epoch_lines(one).items()},
        {str(key): value for key, value in epoch_lines(other).items()},
    )
    if found:
        raise KillTestError(f"{len(found)} differences: {'; '.join(found[:5])}")


def largest_loss_difference(one: Path, other: Path) -> float:
    """Over the training losses of all epochs."""
    ours, theirs = epoch_lines(one), epoch_lines(other)
    return max(abs(ours[key]["loss"] - theirs[key]["loss"]) for key in ours if key[0] == "train_epoch")


# ------------------------------------------------------------------------------------------------------------- main
def one_process(videos: Path, folder: Path, workers: int, kills: int, rng: random.Random) -> None:
    """The first part: whole processes are killed."""
    whole = make_job(videos, folder / f"whole_{workers}", workers=workers)
    seconds = whole.run()
    killed = make_job(videos, folder / f"killed_{workers}", workers=workers)
    aims = ["write", "step", "validation", "write", "step", "validation", "random", "start", "write", "validation"]
    aims = [aims[number % len(aims)] for number in range(kills)]
    rng.shuffle(aims)
    begin = time.monotonic()
    kill_and_restart(killed, aims, rng, seconds)
    compare(whole.output, killed.output)
    print(
        f"{workers} workers: {sum(killed.killed.values())} kills ({_counted(killed.killed)}), equal bit for bit; "
        f"{seconds:.0f} s uninterrupted, {time.monotonic() - begin:.0f} s with kills",
        flush=True,
    )


def two_ranks(videos: Path, folder: Path, rng: random.Random) -> None:
    """The second part: one rank of two is killed, then the other."""
    whole = make_job(videos, folder / "whole_ranks", ranks=2)
    seconds = whole.run()
    killed = make_job(videos, folder / "killed_ranks", ranks=2)
    begin = time.monotonic()
    kill_ranks(killed, (1, 0), rng)
    compare(whole.output, killed.output)
    print(
        f"2 torchrun ranks: {sum(killed.killed.values())} kills ({_counted(killed.killed)}), equal bit for bit; "
        f"{seconds:.0f} s uninterrupted, {time.monotonic() - begin:.0f} s with kills",
        flush=True,
    )


def in_bf16(videos: Path, folder: Path, rng: random.Random) -> None:
    """The third part, where there is such hardware: losses agree to 1e-2."""
    if not hardware_has_bf16("cpu"):
        print("bf16: skipped, this CPU does not compute in bf16")
        return
    whole = make_job(videos, folder / "whole_bf16", PRECISION="bf16", CHECK_CONVOLUTIONS=True)
    seconds = whole.run()
    killed = make_job(videos, folder / "killed_bf16", PRECISION="bf16", CHECK_CONVOLUTIONS=True)
    kill_and_restart(killed, ["step", "validation"], rng, seconds)
    difference = largest_loss_difference(whole.output, killed.output)
    if not difference <= 1e-2:
        raise KillTestError(f"bf16: losses differ by {difference:.4f}")
    print(f"bf16: {sum(killed.killed.values())} kills, losses agree to {difference:.1e}")


def _counted(killed: Counter[str]) -> str:
    return ", ".join(f"{count} × {phase}" for phase, count in sorted(killed.items()))


def main() -> int:
    """Run all parts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=10, help="of each single-process run")
    parser.add_argument("--workers", type=int, nargs="*", default=[0, 2], help="DATA_LOADER.NUM_WORKERS of those runs")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--folder", type=Path, help="where to work; default: a temporary folder")
    arguments = parser.parse_args()
    rng = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory(prefix="kill_and_resume_") as temporary:
        folder = arguments.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        videos = write_videos(folder / "videos")
        try:
            for workers in arguments.workers:
                one_process(videos, folder, workers, arguments.kills, rng)
            two_ranks(videos, folder, rng)
            in_bf16(videos, folder, rng)
        except KillTestError as error:
            print(f"FAILED: {error}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
