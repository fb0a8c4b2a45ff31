"""Signals of schedulers, and states in the middle of an epoch, in the training loop with a toy network."""

import json
import os
import signal
import threading
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from loops import STEPS, assert_equal_weights, trainer_of, weights_of
from rank_jobs import agreed_step, ranks_cfg
from rank_processes import forked_ranks

from distinit_plugin.engine import checkpoint, signals
from distinit_plugin.engine.meters import JsonLogger
from distinit_plugin.engine.signals import Agreement, Stopped, StopSignals
from distinit_plugin.engine.state import Checkpointer
from distinit_plugin.jobs.launching import launch

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parents[1]

pytestmark = pytest.mark.skipif(
    threading.current_thread() is not threading.main_thread(), reason="signals come to the main thread alone"
)


@pytest.fixture(autouse=True)
def _ctrl_c():
    """Ctrl-C as in a terminal: a shell's background job has it switched off."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def send(number=signal.SIGTERM):
    os.kill(os.getpid(), number)


def sends_at(step, number=signal.SIGTERM):
    """A progress view's ``advance`` that gets the process a signal after a step."""

    def advance(done, total):
        if done == step:
            send(number)

    return advance


def stopped(trainer, stop):
    """Train until a signal ends it; returns the ``Stopped``."""
    with pytest.raises(Stopped) as caught, stop:
        trainer.train()
    return caught.value


def continued(folder, **changes):
    """The same job at the state that is in the folder."""
    trainer = trainer_of(folder, **changes)
    path, state = checkpoint.newest_state(folder / "checkpoints")
    torch.manual_seed(99)  # the generators' states come from the file
    trainer.state.load_state_dict(state, CPU)
    return trainer, path.name


# ------------------------------------------------------------------------------------------------- the handlers
def ends(work, *, match=None):
    """Run ``work(stop)`` with signals caught; it must be stopped by one."""
    stop = StopSignals()
    with pytest.raises(SystemExit, match=match) as caught, stop:
        work(stop)
    return caught.value.code


@pytest.mark.parametrize(("name", "status"), [("SIGTERM", 143), ("SIGUSR1", 138)])
def test_a_signal_ends_the_work_with_its_status_and_the_handlers_come_back(name, status, caplog):
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}

    def work(stop):
        assert all(signal.getsignal(number) != handler for number, handler in before.items())
        send(getattr(signal, name))
        pytest.fail("the signal came too late")

    with caplog.at_level("INFO", logger="distinit_plugin"):
        assert ends(work) == status
    assert {number: signal.getsignal(number) for number in before} == before
    assert len(caplog.records) == 1
    assert f"{name}: " in caplog.text
    assert f"(exit status {status})" in caplog.text


def test_held_signals_wait_and_only_the_first_counts():
    def work(stop):
        with stop.held():
            send(signal.SIGUSR1)
            send(signal.SIGTERM)
            assert stop.received == signal.SIGUSR1
        stop.raise_if_received("all is saved")

    assert ends(work, match="SIGUSR1: all is saved") == 138


def test_let_through_ends_at_once_what_is_held_around_it():
    def in_time(stop):
        with stop.held(), stop.let_through("the epoch is saved"):
            send()
            pytest.fail("the signal came too late")

    def before(stop):
        with stop.held():
            send()
            with stop.let_through("the epoch is saved"):
                pytest.fail("it began although a signal had come")

    for work in (in_time, before):
        assert ends(work, match="the epoch is saved") == 143


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_signal_that_python_loses_in_a_destructor_still_ends_the_work():
    class Signals:
        def __del__(self):
            send()

    def work(stop):
        with stop.held(), stop.let_through("saved"):
            Signals()
            went_on.append(True)

    went_on = []
    assert ends(work) == 143
    assert went_on


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("where", ["step", "validation", "end"])
def test_a_ctrl_c_that_python_loses_in_a_destructor_still_interrupts(where):
    class Interrupts:
        def __del__(self):
            send(signal.SIGINT)

    def work(stop):
        if where == "validation":
            with stop.held(), stop.let_through("saved"):
                Interrupts()
                went_on.append(True)
        else:
            Interrupts()
            went_on.append(True)
            if where == "step":
                stop.raise_if_interrupted()
        went_on.append(where == "end")

    before, went_on = signal.getsignal(signal.SIGINT), []
    with pytest.raises(KeyboardInterrupt), StopSignals() as stop:
        work(stop)
    assert went_on == ([True, True] if where == "end" else [True])
    assert signal.getsignal(signal.SIGINT) == before


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_lost_ctrl_c_ends_the_training_after_the_step(tmp_path):
    class Interrupts:
        def __del__(self):
            send(signal.SIGINT)

    def advance(done, total):
        if done == 3:
            Interrupts()

    stop = StopSignals()
    trainer = trainer_of(tmp_path, stop=stop)
    trainer._progress.advance = advance
    with pytest.raises(KeyboardInterrupt), stop:
        trainer.train()
    assert trainer.step == 3


def test_other_threads_and_forked_processes_are_left_alone():
    before = signal.getsignal(signal.SIGTERM)
    seen = []

    def enter():
        with StopSignals():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert seen == [before]
    with StopSignals() as stop:
        child = os.fork()
        if child == 0:
            send()
            os._exit(stop.received)
        assert os.waitpid(child, 0)[1] == 0
        assert stop.received == 0


# ---------------------------------------------------------------------------------------------------- the loop
@pytest.mark.parametrize("step", [1, STEPS + 2, 2 * STEPS, 3 * STEPS])
def test_a_signal_in_a_step_saves_after_that_step(step, tmp_path):
    """Not at the next log line; in the middle, at the end of an epoch's training and at the end of all."""
    options = {"log_period": 3}
    whole = trainer_of(dropout=0.5, options=options, json_logger=JsonLogger(tmp_path / "whole"))
    whole.train()
    stop, folder = StopSignals(), tmp_path / "parts"
    first = trainer_of(folder, dropout=0.5, options=options, stop=stop, json_logger=JsonLogger(folder))
    first._progress.advance = sends_at(step)
    error = stopped(first, stop)
    assert f"the state after step {step} of 12 is saved" in str(error)
    assert first.step == step
    second, name = continued(folder, dropout=0.5, options=options, json_logger=JsonLogger(folder))
    assert name == "resume.pyth"
    assert second.step == step
    second.train()
    assert_equal_weights(weights_of(second), weights_of(whole))
    assert not (folder / "checkpoints" / "resume.pyth").exists()  # the run is complete
    assert epoch_lines(folder) == epoch_lines(tmp_path / "whole")
    # Log lines cover whole windows, also the one that was interrupted.
    assert first._progress.losses + second._progress.losses == whole._progress.losses


def epoch_lines(folder):
    """Newest line of each epoch, without times."""
    lines = {}
    for text in (folder / "json_stats.log").read_text().splitlines():
        stats = json.loads(text.removeprefix("json_stats: "))
        times = ("dt", "dt_data", "dt_net", "eta", "RAM", "gpu_mem")
        lines[stats["epoch"]] = {key: value for key, value in stats.items() if key not in times}
    assert len(lines) == 3
    return lines


def draws_and(values):
    """A validation or precise BN that draws random numbers."""

    def validate():
        torch.rand(5)
        return dict(values)

    return validate


@pytest.mark.parametrize("where", ["validate", "precise_bn"])
def test_a_signal_in_validation_repeats_the_validation_but_not_the_epoch(where, tmp_path):
    parts = {"validate": draws_and({"loss": 1.0}), "precise_bn": draws_and({})}
    whole = trainer_of(dropout=0.5, **parts)
    whole.train()
    stop, folder = StopSignals(), tmp_path
    first = trainer_of(folder, dropout=0.5, stop=stop, **{**parts, where: send})
    assert "the training of epoch 1 is saved" in str(stopped(first, stop))
    second, name = continued(folder, dropout=0.5, **parts)
    assert (name, second.step, second.state.epoch) == ("resume.pyth", STEPS, 0)
    assert second.train().steps == 3 * STEPS
    assert second._progress.losses == whole._progress.losses[STEPS:]
    assert_equal_weights(weights_of(second), weights_of(whole))


def test_validation_and_precise_bn_do_not_move_the_random_numbers_of_training():
    plain = trainer_of(dropout=0.5)
    plain.train()
    validated = trainer_of(dropout=0.5, validate=draws_and({"loss": 1.0}), precise_bn=draws_and({}))
    validated.train()
    assert_equal_weights(weights_of(plain), weights_of(validated))


def test_a_state_is_saved_when_its_time_has_come(tmp_path):
    trainer = trainer_of(tmp_path, max_epoch=1)
    trainer._checkpointer = Checkpointer(tmp_path, resume_minutes=1e-9)
    saved = []
    trainer._checkpointer.save_resume = lambda state: saved.append(state["distinit"]["progress"]["step"])
    trainer.train()
    assert saved == [1, 2, 3, 4]
    never = trainer_of(tmp_path, max_epoch=1)  # 0 minutes
    never._checkpointer.save_resume = lambda state: pytest.fail("nobody asked for it")
    never.train()


def test_without_a_folder_a_signal_just_ends_the_loop():
    stop = StopSignals()
    trainer = trainer_of(stop=stop)
    trainer._progress.advance = sends_at(2)
    stopped(trainer, stop)
    assert trainer.step == 2


# --------------------------------------------------------------------------------------------------- several ranks
def test_ranks_agree_on_the_step_without_asking_at_every_one():
    """The second rank alone gets the signal, and wants a state saved, which only the first one decides."""
    with forked_ranks():
        first, second = launch(ranks_cfg(2), agreed_step)
    assert first == second
    step, number, save, calls = first
    assert number == 15
    assert save is False
    assert 150 <= step < 399
    assert calls < 60


def test_the_pace_of_asking_follows_the_pace_of_the_steps(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(signals.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(signals.distributed, "world_size", lambda: 2)
    asked = []

    def gather(value):
        asked.append(step)
        return [value, value]

    monkeypatch.setattr(signals.distributed, "gather_objects", gather)
    agreement = Agreement()
    for step in range(1, 101):
        now[0] += 0.1
        agreement.ask(step, signal_number=0, save=False)
    assert asked[:5] == [1, 2, 4, 8, 16]
    assert {after - before for before, after in pairwise(asked[4:])} <= {9, 10}  # a second
    for step in range(101, 140):
        now[0] += 3.0
        agreement.ask(step, signal_number=0, save=False)
    assert asked[-5:] == [135, 136, 137, 138, 139]  # steps of more than a second: at each of them
