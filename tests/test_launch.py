"""Ranks that the program starts itself, torchrun, SLURM's script: they meet, and they end together with one message."""

import logging
import os
import shutil
import signal
import socket
import sys
import time
from pathlib import Path

import pytest
import torch
from rank_jobs import all_fail, fails, ranks_cfg
from rank_processes import ROOT, RUN_NET, ended, forked_ranks, free_port, run_forked, start
from small_jobs import json_stats, labelled, small_cfg, weights_of

from distinit_plugin import cli
from distinit_plugin.engine import distributed
from distinit_plugin.engine.progress import RunLog
from distinit_plugin.errors import SAME_ON_ALL_RANKS, UserError
from distinit_plugin.jobs import running
from distinit_plugin.jobs.launching import launch, starts_ranks
from distinit_plugin.jobs.running import run
from distinit_plugin.jobs.session import choose_device

SLURM = ROOT / "tools" / "slurm_run.sh"


@pytest.fixture(scope="module")
def alone(videos, tmp_path_factory) -> Path:
    """The folder of a training by one process."""
    output = tmp_path_factory.mktemp("alone") / "run"
    run(small_cfg(videos, output, **classifier_only(videos)))
    return output


def classifier_only(videos: Path) -> dict:
    """With batch norm in eval mode all numbers of ranks are equal."""
    return {**labelled(videos, TRAIN="train", VAL="test"), "INIT": {"TRAINABLE": "classifier"}}


def assert_same_training(one: Path, other: Path) -> None:
    torch.testing.assert_close(weights_of(other), weights_of(one), rtol=1e-4, atol=1e-6)
    for kind in ("train_iter_", "train_epoch", "val_epoch"):
        losses = [[line["loss"] for line in json_stats(folder, kind)] for folder in (one, other)]
        assert losses[0] == pytest.approx(losses[1], abs=2e-4)


# ------------------------------------------------------------------------------------------------------- starting ranks
def test_a_job_of_one_rank_starts_nothing(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    assert not starts_ranks(ranks_cfg(1))
    assert starts_ranks(ranks_cfg(2))
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert not starts_ranks(ranks_cfg(2))  # torchrun has done it


def test_a_rank_of_torchrun_ends_with_it(videos, tmp_path, monkeypatch):
    """One that went on after torchrun was killed would write to the folder in which the next call trains."""
    parents: list[int] = []

    def refuse(*arguments):
        raise UserError("no further")

    monkeypatch.setattr(running, "end_with_parent", parents.append)
    monkeypatch.setattr(running, "check_job", refuse)
    cfg = small_cfg(videos, tmp_path / "run", **labelled(videos))
    for expected in ([], [os.getppid()]):
        with pytest.raises(UserError, match="no further"):
            run(cfg)
        assert parents == expected
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")


def test_two_ranks_on_the_cpu_without_torchrun(videos, tmp_path, alone, capfd):
    output = tmp_path / "run"
    before = {name: signal.getsignal(name) for name in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    result = run(small_cfg(videos, output, **classifier_only(videos), RUNNER={"CPU_RANKS": 2}))
    assert_same_training(alone, output)
    assert (result.training.steps, result.evaluation) == (3, None)
    assert {name: signal.getsignal(name) for name in before} == before
    printed = capfd.readouterr()
    assert printed.out.count("trained 3 steps") == 1  # one log, that of rank 0
    assert printed.err == ""


def test_two_shards_meet(videos, tmp_path, alone):
    """PySlowFast's flags; TRAIN.BATCH_SIZE counts the clips of one shard."""
    output = tmp_path / "run"
    small_cfg(videos, output, **classifier_only(videos))
    flags = ["--cfg", tmp_path / "run.yaml", "--num_shards", 2, "--init_method", f"tcp://127.0.0.1:{free_port()}"]
    opts = ["--opts", "TRAIN.BATCH_SIZE", 2, "RUNNER.JOIN_TIMEOUT", 120]
    answers = run_forked([["run", *flags, "--shard_id", shard, *opts] for shard in (1, 0)], tmp_path)
    assert [status for status, _, _ in answers] == [0, 0], answers
    assert_same_training(alone, output)
    out, err = answers[0][1:]
    assert out == ""  # the log is shard 0's
    # torch warns in one shard when the other, which keeps their store, was faster to end.
    assert err == "" or (err.startswith("[W") and "TCPStore.cpp" in err.splitlines()[0] and "Traceback" not in err)
    assert "trained 3 steps" in answers[1][1]


# ------------------------------------------------------------------------------------------------- wrong combinations
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--shard_id", "2", "--num_shards", "2"], "SHARD_ID: 2 is not allowed. Allowed: 0 … 1"),
        (["--shard_id", "-1"], "SHARD_ID: -1 is not allowed"),
        (["--num_shards", "0"], "NUM_SHARDS: 0 is not allowed"),
        (["--num_shards", "2", "--shard_id", "1"], "NUM_SHARDS is 2, but where they meet is not said"),
        (["--init_method", "localhost:29500"], "RUNNER.INIT_METHOD: 'localhost:29500' is not allowed. Allowed: tcp://"),
        (["--init_method", "tcp://localhost:99999"], "RUNNER.INIT_METHOD: 'tcp://localhost:99999' is not allowed"),
        (["NUM_GPUS", "64", "TEST.BATCH_SIZE", "64", "TRAIN.BATCH_SIZE", "64"], "NUM_GPUS is 64, but torch finds"),
        (
            ["RUNNER.CPU_RANKS", "3", "TEST.BATCH_SIZE", "6"],
            "TRAIN.BATCH_SIZE: 4 clips cannot be shared by 3 rank(s) (RUNNER.CPU_RANKS)",
        ),
        (["BN.NORM_TYPE", "sync_batchnorm"], "BN.NORM_TYPE: sync_batchnorm works on GPUs only"),
        (["BN.NORM_TYPE", "sub_batchnorm"], "BN.NORM_TYPE: 'sub_batchnorm' is not allowed"),
    ],
)
def test_wrong_combinations_are_one_sentence(words, message, videos, tmp_path, capsys):
    small_cfg(videos, tmp_path / "run", **labelled(videos, TRAIN="train"))
    flags, pairs = (words, []) if words[0].startswith("--") else ([], words)
    assert cli.main(["run", *flags, "--cfg", str(tmp_path / "run.yaml"), "--opts", *pairs]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_ranks_of_cpu_and_gpu_do_not_mix(videos, tmp_path, capsys):
    small_cfg(videos, tmp_path / "run", **labelled(videos, TRAIN="train"))
    pairs = ["RUNNER.CPU_RANKS", "2", "NUM_GPUS", "2"]
    assert cli.main(["run", "--cfg", str(tmp_path / "run.yaml"), "--opts", *pairs]) == 1
    assert "RUNNER.CPU_RANKS: 2 with NUM_GPUS 2" in capsys.readouterr().err  # beside it: there are no two GPUs here


def shard(number: int, port: int, **runner):
    cfg = ranks_cfg(1, INIT_METHOD=f"tcp://127.0.0.1:{port}", JOIN_TIMEOUT=1.0, **runner)
    cfg.defrost()
    cfg.NUM_SHARDS, cfg.SHARD_ID = 2, number
    return cfg


def test_a_taken_port_is_named():
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        with pytest.raises(UserError, match=r"the port of tcp://127.0.0.1:\d+ is taken on this machine"):
            launch(shard(0, other.getsockname()[1]), all_fail)


@pytest.mark.parametrize(
    ("number", "message"),
    [(0, r"shard 0 waited 1 s .* for the other 1 in vain"), (1, r"shard 1 could not meet shard 0 at .* within 1 s")],
)
def test_shards_that_do_not_meet_give_up(number, message, capfd):
    begin = time.monotonic()
    with pytest.raises(UserError, match=message):
        launch(shard(number, free_port()), all_fail)
    assert time.monotonic() - begin < 20
    assert capfd.readouterr().err == ""


def test_more_processes_than_gpus(monkeypatch):
    """torchrun may start fewer than NUM_GPUS processes, but each needs a GPU."""
    cfg = ranks_cfg(1)
    cfg.defrost()
    cfg.NUM_GPUS = 8
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(UserError, match="NUM_GPUS is 8, but torch finds 2 here"):
        choose_device(cfg)
    for name, value in {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    assert choose_device(cfg) == torch.device("cuda", 1)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(UserError, match="no GPU for local rank 2: torch finds 2 here"):
        choose_device(cfg)


# ---------------------------------------------------------------------------------------------------- ranks that fail
@pytest.mark.parametrize(
    ("how", "kind", "message"),
    [
        ("refuses", UserError, r"^rank 1 does not like it$"),
        (
            "bug",
            RuntimeError,
            r"(?s)^rank 1: ValueError: a mistake of ours\n\nTraceback .*ValueError: a mistake of ours",
        ),
        ("killed", UserError, r"^rank 1 \(process \d+\) was killed by SIGKILL .*; the other ranks were ended\.$"),
        ("too large", UserError, r"^there is not enough memory \(CUDA out of memory\. Tried to allocate 2 GiB\)\."),
        ("silent", UserError, r"^rank 0 waited 2 s for another rank in vain .*RUNNER\.COLLECTIVE_TIMEOUT"),
    ],
)
def test_one_failing_rank_ends_all_with_its_message(how, kind, message, capfd):
    """The others wait for it in a collective, whose default patience is half an hour."""
    cfg = ranks_cfg(2, COLLECTIVE_TIMEOUT=2.0 if how == "silent" else 1800.0)
    cfg.defrost()
    cfg.OUTPUT_DIR = how
    with forked_ranks(), pytest.raises(kind, match=message):
        launch(cfg, fails)
    assert "Traceback" not in capfd.readouterr().err


def test_other_ranks_show_only_warnings_that_the_first_does_not(monkeypatch, capsys):
    monkeypatch.setattr(distributed, "rank", lambda: 3)
    log = RunLog(None, main=False)
    logger = logging.getLogger("distinit_plugin.test")
    logger.info("an information")
    logger.warning("the same everywhere", extra=SAME_ON_ALL_RANKS)
    logger.warning("only here")
    log.close()
    (line,) = capsys.readouterr().out.splitlines()
    assert line.endswith("] rank 3: only here")


# ---------------------------------------------------------------------------------------------------------------- SLURM
SRUN = """#!/usr/bin/env bash
# one machine: the words after srun's own flags are the command; signals reach it, as srun hands them on
while [[ $1 == --* ]]; do shift; done
exec "$@"
"""
SCONTROL = """#!/usr/bin/env bash
echo "$@" >> "$CALLS"
if [[ $1 == show ]]; then echo 127.0.0.1; fi
"""
STAND_IN = """#!/usr/bin/env bash
trap "exit 1" TERM
echo "$@" > {words}
while :; do sleep 0.1; done
"""
FAILING = """#!/usr/bin/env bash
printf '%s\\n' "$@" > {words}
exit 3
"""


@pytest.fixture
def cluster(tmp_path) -> dict[str, str]:
    """SLURM's variables and two stand-ins for its commands."""
    if not shutil.which("bash"):
        pytest.skip("there is no bash")
    commands = tmp_path / "commands"
    commands.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (commands / name).write_text(text)
        (commands / name).chmod(0o755)
    return {
        "PATH": f"{commands}:{os.environ['PATH']}",
        "CALLS": str(tmp_path / "calls"),
        "PYTHON": sys.executable,
        "CPU_RANKS": "2",
        "MASTER_PORT": str(free_port()),
        "SLURM_JOB_ID": "77",
        "SLURM_JOB_NUM_NODES": "1",
        "SLURM_JOB_NODELIST": "node[1]",
        "SLURM_SUBMIT_DIR": str(ROOT),
    }


def test_the_slurm_script_runs_the_job(cluster, videos, tmp_path, alone):
    output = tmp_path / "run"
    small_cfg(videos, output, **classifier_only(videos))
    status, _, errors = ended(start(["bash", SLURM, "--cfg", tmp_path / "run.yaml"], **cluster))
    assert status == 0, errors
    assert_same_training(alone, output)
    assert Path(cluster["CALLS"]).read_text() == "show hostnames node[1]\n"


def test_the_slurm_script_ends_its_ranks_and_queues_again(cluster, tmp_path):
    """Before the time limit: SIGUSR1 to the script, SIGTERM to torchrun, scontrol requeue."""
    python = tmp_path / "python"
    python.write_text(STAND_IN.format(words=tmp_path / "words"))
    python.chmod(0o755)
    process = start(["bash", SLURM, "--cfg", "x.yaml", "A.KEY", "1"], **{**cluster, "PYTHON": str(python)})
    end = time.monotonic() + 30
    while not (tmp_path / "words").is_file() and time.monotonic() < end:
        time.sleep(0.05)
    words = (tmp_path / "words").read_text().split()
    assert words[-9:] == ["--cfg", "x.yaml", "A.KEY", "1", "--opts", "NUM_SHARDS", "1", "NUM_GPUS", "0"]
    process.send_signal(signal.SIGUSR1)
    status, _, errors = ended(process)
    assert status == 0, errors
    assert "requeue 77" in Path(cluster["CALLS"]).read_text()


@pytest.mark.parametrize(("nodes", "restarts", "expected"), [(2, 3, "1"), (2, 0, ""), (1, 3, "")])
def test_the_slurm_script_lets_ranks_of_several_machines_start_again(nodes, restarts, expected, cluster, tmp_path):
    python, value = tmp_path / "python", "${TORCH_DISABLE_SHARE_RDZV_TCP_STORE:-}"
    python.write_text(f'#!/usr/bin/env bash\nprintf "%s" "{value}" > {tmp_path / "set"}\n')
    python.chmod(0o755)
    given = {"PYTHON": str(python), "SLURM_JOB_NUM_NODES": str(nodes), "MAX_RESTARTS": str(restarts)}
    status, _, errors = ended(start(["bash", SLURM, "--cfg", "x.yaml"], **{**cluster, **given}))
    assert status == 0, errors
    assert (tmp_path / "set").read_text() == expected


def test_ranks_that_would_wait_for_old_addresses_say_so(monkeypatch):
    """Of several machines, started again by torchrun, which keeps its store."""
    names = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    again = {"GROUP_WORLD_SIZE": "2", "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "1"}
    for name, value in {**names, **again}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in the environment of every"):
        distributed.start("cpu", 1.0)


def test_the_slurm_script_keeps_the_jobs_exit_status(cluster, tmp_path):
    """Whatever it is. The words that torchrun gets are those of two ranks, whose error is printed once."""
    config, python, words = tmp_path / "wrong.yaml", tmp_path / "python", tmp_path / "words"
    config.write_text("SOLVER: {BASE_RL: 0.1}\n")
    python.write_text(FAILING.format(words=words))
    python.chmod(0o755)
    environment = {**cluster, "PYTHON": str(python)}
    status, _, errors = ended(start(["bash", SLURM, "--cfg", config], **environment))
    assert (status, errors) == (3, "")
    assert "requeue" not in Path(cluster["CALLS"]).read_text()
    launcher, _, rest = words.read_text().partition(f"{RUN_NET}\n")
    ((status, _, errors),) = run_forked([["run", *rest.splitlines()]], tmp_path, launcher.splitlines())
    assert status == 1
    assert errors.count("error: ") == 1
    assert "Did you mean BASE_LR?" in errors


def test_the_slurm_script_needs_the_clone(cluster, tmp_path):
    status, _, errors = ended(start(["bash", SLURM], **{**cluster, "SLURM_SUBMIT_DIR": str(tmp_path)}))
    assert status == 1
    assert errors.startswith("error: there is no tools/run_net.py")
