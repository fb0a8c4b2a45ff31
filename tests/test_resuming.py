"""Continuing runs: which state is taken, what may change on the way, and kills and signals on real processes."""

import os
import random
import re
import shutil
import signal
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from killed_jobs import ForkedJob, kills
from rank_processes import forked_ranks
from small_jobs import differing, labelled, merged, small_cfg, state_of

from distinit_plugin.config.defaults import get_cfg
from distinit_plugin.config.load import load_cfg
from distinit_plugin.config.node import leaf_keys
from distinit_plugin.engine import checkpoint as files
from distinit_plugin.engine.curves import read_curves
from distinit_plugin.engine.signals import Stopped
from distinit_plugin.errors import UserError, WeightsError
from distinit_plugin.jobs import resuming, running
from distinit_plugin.jobs.running import run
from distinit_plugin.models.hardware import hardware_has_bf16


def job(videos, output, **sections):
    """Four epochs of three steps on labels, with a drop of the learning rate after the second."""
    base = {"SOLVER": {"MAX_EPOCH": 4, "STEPS": [0, 2], "LRS": [1.0, 0.1]}, **labelled(videos, TRAIN="train")}
    return small_cfg(videos, output, **merged(base, sections))


@pytest.fixture(scope="module")
def begun(videos, tmp_path_factory) -> Path:
    """A run of that job that has done two epochs."""
    output = tmp_path_factory.mktemp("begun") / "run"
    run(job(videos, output, SOLVER={"MAX_EPOCH": 2}))
    return output


def checked(session_cfg, begun, sizes=(12,)):
    """What ``_refuse_changes`` says to a configuration in the folder of ``begun``."""
    found = files.newest_state(begun / "checkpoints")
    state = SimpleNamespace(corpus_sizes=list(sizes), corpus_digests=found[1]["distinit"]["corpus_digests"])
    resuming._refuse_changes(session_cfg, state, found[1], found[0], 3)


# ------------------------------------------------------------------------------------------------ what may change
@pytest.mark.parametrize(
    "sections",
    [
        {},  # MAX_EPOCH 2 → 4: longer
        {"SOLVER": {"MAX_EPOCH": 2}},
        {"SOLVER": {"STEPS": [0, 2, 3], "LRS": [1.0, 0.5, 0.1]}},  # only steps to come
        {"LOG_PERIOD": 7, "DATA_LOADER": {"NUM_WORKERS": 2}, "TEST": {"NUM_ENSEMBLE_VIEWS": 5}},
        {"TRAIN": {"CHECKPOINT_PERIOD": 3, "EVAL_PERIOD": 2}, "CORPUS": {"MAX_BAD_FRACTION": 0.5}},
        {"RUNNER": {"RESUME_MINUTES": 1, "KEEP_CHECKPOINTS": 2, "ACCUMULATE": 2}},
        {"TRAIN": {"BATCH_SIZE": 2}, "NUM_SHARDS": 2},  # the clips of a step are the same
    ],
)
def test_changes_that_leave_the_past_and_the_stream_alone_are_accepted(sections, videos, begun, tmp_path):
    checked(job(videos, tmp_path / "run", **sections), begun)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"SOLVER": {"MAX_EPOCH": 1}}, r"SOLVER\.MAX_EPOCH: 2 → 1\. MAX_EPOCH, STEPS and LRS may only"),
        ({"SOLVER": {"STEPS": [0, 1]}}, r"SOLVER\.STEPS: \[0, 2\] → \[0, 1\]"),
        ({"SOLVER": {"LR_POLICY": "cosine"}}, r"SOLVER\.LR_POLICY: 'steps_with_relative_lrs' → 'cosine'"),
        ({"SOLVER": {"BASE_LR": 0.06}}, r"SOLVER\.BASE_LR: 0\.05 → 0\.06"),
        ({"TRAIN": {"BATCH_SIZE": 2}}, r"TRAIN\.BATCH_SIZE: 4 → 2\. TRAIN\.BATCH_SIZE × NUM_SHARDS"),
        ({"RNG_SEED": 3, "NETWORK": {"WIDTH": 4}}, r"NETWORK\.WIDTH: 8 → 4; RNG_SEED: 0 → 3\. Name another OUTPUT_DIR"),
        ({"CORPUS": {"TRAIN": {"MORE": {"PATH": "x", "LABELED": True}}}}, r"CORPUS\.TRAIN\.MORE: not there → there\."),
        ({"RUNNER": {"CLIPS_PER_EPOCH": 8}}, r"RUNNER\.CLIPS_PER_EPOCH: 0 → 8"),
    ],
)
def test_another_run_is_refused_with_the_keys_and_the_fix(sections, message, videos, begun, tmp_path):
    with pytest.raises(UserError, match=message) as caught:
        checked(job(videos, tmp_path / "run", **sections), begun)
    text = str(caught.value)
    assert text.startswith(f"{begun}/checkpoints/checkpoint_epoch_00002.pyth is of another run")
    assert "or set these keys as they were" in text
    assert "\n" not in text


def test_the_end_of_a_cosine_cannot_be_moved(videos, tmp_path):
    output = tmp_path / "run"
    run(job(videos, output, SOLVER={"MAX_EPOCH": 1, "LR_POLICY": "cosine"}))
    with pytest.raises(UserError, match=r"SOLVER\.MAX_EPOCH: 1 → 2"):
        run(job(videos, output, SOLVER={"MAX_EPOCH": 2, "LR_POLICY": "cosine"}))


def test_another_list_of_videos_is_refused(videos, begun, tmp_path):
    with pytest.raises(UserError, match=r"videos below CORPUS\.TRAIN: \[12\] → \[13\]"):
        checked(job(videos, tmp_path / "run"), begun, sizes=(13,))


def test_many_differences_are_cut(videos, begun, tmp_path, monkeypatch):
    monkeypatch.setattr(resuming, "SHOWN_KEYS", 2)
    solver = {"BASE_LR": 1.0, "MOMENTUM": 0.5, "WEIGHT_DECAY": 0.1}
    with pytest.raises(UserError, match=r"RNG_SEED: 0 → 1; SOLVER\.BASE_LR: 0\.05 → 1\.0; and 2 more\. Name"):
        checked(job(videos, tmp_path / "run", RNG_SEED=1, SOLVER=solver), begun)


def test_the_lists_of_keys_name_keys():
    keys = leaf_keys(get_cfg())
    for start in resuming.HARMLESS:
        assert any(key.startswith(start) for key in keys) or start == "CORPUS.TEST."
    assert set(resuming.STEP_KEYS + resuming.SCHEDULE_KEYS) <= set(keys)


def test_a_longer_training_equals_one_that_was_planned_so(videos, begun, tmp_path):
    """With steps counted, so that the shorter one ends within an epoch."""
    runner = {"SCHEDULE_UNIT": "step", "DETERMINISTIC": True, "PRECISION": "auto"}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for output, lengths in ((whole, [8]), (parts, [4, 8])):
        for length in lengths:
            result = run(job(videos, output, SOLVER={"MAX_EPOCH": length, "STEPS": [0, 6]}, RUNNER=runner))
    assert result.training.steps == 8
    assert differing(state_of(whole, 3)["model_state"], state_of(parts, 3)["model_state"]) == []


def test_the_same_videos_elsewhere_go_on(videos, begun, tmp_path):
    """As a job that is queued again finds them, which copies them to a scratch disk first."""
    parts = tmp_path / "run"
    shutil.copytree(begun, parts)
    shutil.copytree(videos / "train", tmp_path / "scratch")
    corpus = {"TRAIN": {"VIDEOS": {"PATH": str(tmp_path / "scratch")}}}
    assert run(job(videos, parts, CORPUS=corpus)).training.steps == 12
    log = (parts / "stdout.log").read_text()
    assert "goes on with another CORPUS.TRAIN.VIDEOS.PATH" in log


@pytest.mark.parametrize("change", ["name", "label"])
def test_other_videos_in_the_same_place_are_another_run(change, videos, begun, tmp_path):
    """As many as before: position and step would mean other clips."""
    parts, folder = tmp_path / "run", tmp_path / "scratch"
    shutil.copytree(begun, parts)
    shutil.copytree(videos / "train", folder)
    video = sorted(folder.rglob("*.mp4"))[0]
    other = next(place for place in sorted(folder.iterdir()) if place != video.parent)
    video.rename((other if change == "label" else video.parent) / "another.mp4")
    corpus = {"TRAIN": {"VIDEOS": {"PATH": str(folder)}}}
    with pytest.raises(UserError, match=r"CORPUS\.TRAIN: other names, another order or other labels"):
        run(job(videos, parts, CORPUS=corpus))


def test_a_second_process_on_the_same_folder_is_refused(videos, begun, tmp_path, monkeypatch):
    """A job that was submitted twice, or is queued again while it still runs."""
    monkeypatch.setattr("distinit_plugin.files.LOCK_SECONDS", 0.5)
    parts, inside, go_on, errors = tmp_path / "run", threading.Event(), threading.Event(), []
    shutil.copytree(begun, parts)

    def contents():
        found = [path for folder in (parts, parts / "checkpoints") for path in folder.iterdir() if path.is_file()]
        return {path: path.read_bytes() for path in found if path.name != "stdout.log"}

    def wait(*_, **__):
        inside.set()
        go_on.wait(60)
        raise UserError("enough")

    def first():
        try:
            run(job(videos, parts))
        except UserError as error:
            errors.append(str(error))

    with monkeypatch.context() as patched:
        patched.setattr("distinit_plugin.jobs.training.build_trainer", wait)
        thread = threading.Thread(target=first)
        thread.start()
        assert inside.wait(60)
        before = contents()
        with pytest.raises(UserError, match=r"another process is writing this training's checkpoints to .* Wait"):
            run(job(videos, parts))
        assert contents() == before
        go_on.set()
        thread.join()
    assert errors == ["enough"]
    assert run(job(videos, parts)).training.steps == 12


def test_new_values_on_purpose_go_into_another_folder(videos, begun, tmp_path):
    """The way that the refusal names; a state within an epoch begins that epoch anew."""
    source = files.load_checkpoint(begun / "checkpoints" / "checkpoint_epoch_00002.pyth")
    source["distinit"]["progress"] = {"epoch": 1, "step_in_epoch": 2, "step": 5}
    files.save_checkpoint(tmp_path / "state.pyth", source)
    train = {"CHECKPOINT_FILE_PATH": str(tmp_path / "state.pyth"), "CHECKPOINT_EPOCH_RESET": False, "BATCH_SIZE": 6}
    result = run(job(videos, tmp_path / "run", TRAIN=train, SOLVER={"MAX_EPOCH": 2}))
    assert result.training.steps == 4  # two of six clips each in every epoch
    log = (tmp_path / "run" / "stdout.log").read_text()
    assert "is in the middle of an epoch of another run (" in log
    assert "epoch 2 starts anew" in log
    assert log.count('"train_iter_"') == 2


# ------------------------------------------------------------------------------------------------- which is taken
def test_damaged_and_foreign_states_are_named_and_passed_over(videos, begun, tmp_path, caplog):
    folder = tmp_path / "checkpoints"
    good = files.load_checkpoint(begun / "checkpoints" / "checkpoint_epoch_00001.pyth")
    files.save_checkpoint(folder / files.epoch_file_name(0), good)
    (folder / files.epoch_file_name(1)).write_bytes((folder / files.epoch_file_name(0)).read_bytes()[:-200])
    (folder / files.epoch_file_name(2)).write_bytes(b"")
    torch.save({"epoch": 5, "weights": {}}, folder / files.epoch_file_name(3))  # whole, but no checkpoint
    (folder / files.RESUME_NAME).write_bytes(b"PK")
    (folder / ".resume.pyth.0a1b.tmp").write_bytes(b"half")
    with caplog.at_level("INFO", logger="distinit_plugin"):
        assert files.remove_unfinished(folder) == [folder / ".resume.pyth.0a1b.tmp"]
        path, state = files.newest_state(folder)
    assert path.name == files.epoch_file_name(0)
    assert files.steps_done(state) == 3
    for number in (1, 2, 3):
        assert files.epoch_file_name(number) in caplog.text
    assert caplog.text.count("passing over the damaged checkpoint") == 3
    assert f"passing over {folder / files.epoch_file_name(3)} (" in caplog.text
    assert ".resume.pyth.0a1b.tmp, which an earlier process did not finish" in caplog.text


def test_a_run_whose_states_are_all_damaged_says_so_and_starts_anew(videos, begun, tmp_path):
    parts = tmp_path / "run"
    shutil.copytree(begun, parts)
    for path in files.state_files(parts / "checkpoints"):
        path.write_bytes(path.read_bytes()[:-100])
    result = run(job(videos, parts, SOLVER={"MAX_EPOCH": 1}))
    assert result.training.steps == 3
    assert "no state in" in (parts / "stdout.log").read_text()
    assert len(list((parts / "checkpoints" / "damaged").iterdir())) == 2


@pytest.mark.parametrize("progress", [None, 3, {"step": "x"}, {}])
def test_a_state_that_does_not_say_how_far_it_is_comes_last(progress):
    assert files.steps_done({"distinit": {"progress": progress}}) == -1
    assert files.steps_done({"distinit": progress}) == -1


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda state: state["model_state"].popitem(), r"is of another network \(missing: "),
        (lambda state: state["distinit"].pop("rng"), r"is not complete \(KeyError: 'rng'\)"),
        (lambda state: state["distinit"]["epoch_clock"].update(steps="x"), r"is not complete \(ValueError: "),
        (
            lambda state: state["optimizer_state"]["state"].update({0: 3}),
            r"is not complete \(TypeError: .* parameter 0 is no mapping",
        ),
        (lambda state: state.update(optimizer_state=3), r"is not complete \(TypeError: "),
        (lambda state: [state.pop(key) for key in ("distinit", "optimizer_state")], r"has weights alone"),
    ],
)
def test_a_whole_file_of_something_else_is_one_sentence(damage, message, videos, begun, tmp_path):
    state = files.load_checkpoint(begun / "checkpoints" / "checkpoint_epoch_00002.pyth")
    damage(state)
    files.save_checkpoint(tmp_path / "run" / "checkpoints" / files.RESUME_NAME, state)
    with pytest.raises(WeightsError, match=rf"resume\.pyth: the checkpoint {message}") as caught:
        run(job(videos, tmp_path / "run"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("sizes", [[torch.zeros(3)], 3, None])
def test_a_state_that_does_not_say_its_videos_is_refused(sizes, videos, begun, tmp_path):
    state = files.load_checkpoint(begun / "checkpoints" / "checkpoint_epoch_00002.pyth")
    state["distinit"].update(corpus_sizes=sizes, corpus_digests=sizes)
    files.save_checkpoint(tmp_path / "run" / "checkpoints" / files.RESUME_NAME, state)
    with pytest.raises(UserError, match=r"CORPUS\.TRAIN: the state is damaged"):
        run(job(videos, tmp_path / "run"))


def test_a_new_run_beside_a_state_within_an_epoch_is_refused(videos, begun, tmp_path):
    state = files.load_checkpoint(begun / "checkpoints" / "checkpoint_epoch_00002.pyth")
    files.save_checkpoint(tmp_path / "run" / "checkpoints" / files.RESUME_NAME, state)
    with pytest.raises(UserError, match=r"holds checkpoints of an earlier run and TRAIN\.AUTO_RESUME is False"):
        run(job(videos, tmp_path / "run", TRAIN={"AUTO_RESUME": False}))


def test_curves_take_the_newest_line_of_each_moment(tmp_path):
    line = '{{"_type": "train_epoch", "epoch": "{}/3", "loss": {}, "lr": 0.1}}'
    texts = [line.format(1, 5.0), line.format(2, 4.0), line.format(2, 3.0)]
    cut = 'json_stats: {"_type": "train_ep'  # a kill in the middle of a line; the next process goes on behind it
    (tmp_path / "json_stats.log").write_text("".join(f"json_stats: {text}\n" for text in texts) + cut)
    with open(tmp_path / "json_stats.log", "a") as file:
        file.write(f"json_stats: {line.format(3, 2.0)}\n")
    assert read_curves(tmp_path).train_loss == {1.0: 5.0, 2.0: 3.0, 3.0: 2.0}


# ------------------------------------------------------------------------------------------------- real processes
@pytest.fixture(autouse=True)
def _impatience(monkeypatch):
    """The harness gives up before the test's own time limit, and nothing of a job outlives the test that made it."""
    jobs, make_job = [], kills.make_job

    def remembered(*arguments, **keys):
        jobs.append(make_job(*arguments, **keys))
        return jobs[-1]

    monkeypatch.setattr(kills, "PATIENCE", 120.0)
    monkeypatch.setattr(kills, "make_job", remembered)
    monkeypatch.setattr(kills, "Job", ForkedJob)
    yield
    for job in jobs:
        job.end_all()


def test_killed_and_signalled_runs_end_with_the_weights_of_the_uninterrupted_one(tmp_path):
    """With two workers, against none: SIGTERM to all processes, as a scheduler sends it, then kills."""
    source = kills.write_videos(tmp_path / "videos")
    whole = kills.make_job(source, tmp_path / "whole", epochs=3)
    run(load_cfg(whole.config)[0])
    job = kills.make_job(source, tmp_path / "killed", workers=2, epochs=3)
    job.start()
    kills.wait_until(job, lambda: job.new_lines()[0] > 0)
    os.killpg(job.process.pid, signal.SIGTERM)
    assert job.process.wait(timeout=60) == 143, job.printed
    job.expect_nothing_left()
    assert (job.folder / files.RESUME_NAME).is_file()
    line = r"SIGTERM: the state after step \d+ of 36 is saved; the same command goes on from there \(exit status 143\)"
    assert len(re.findall(line, job.printed)) == 1
    for aim in ("write", "validation"):
        job.start()
        assert kills.kill_once(job, aim, random.Random(0), 1.0), job.printed
    assert job.killed == {"checkpoint write": 1, "precise BN and validation": 1}
    run(load_cfg(job.config)[0])
    kills.compare(whole.output, job.output)
    assert "Traceback" not in job.printed
    assert "Error" not in job.printed
    last = files.epoch_files(job.folder)[-1]
    other = files.load_checkpoint(last)
    name = next(iter(other["model_state"]))
    other["model_state"][name].view(-1)[0] += 1e-4
    files.save_checkpoint(last, other)
    with pytest.raises(kills.KillTestError, match=f"1 differences: /last/model_state/{name}"):
        kills.compare(whole.output, job.output)


@pytest.mark.skipif(not hardware_has_bf16("cpu"), reason="this CPU does not compute in bf16")
def test_losses_of_a_killed_run_in_bf16_agree(tmp_path):
    kills.in_bf16(kills.write_videos(tmp_path / "videos"), tmp_path, random.Random(0))


def test_a_signal_in_the_final_test_ends_the_job(videos, begun, monkeypatch):
    """Everything is saved by then; the handlers that were there before are back."""
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(running, "test_in_session", lambda session: os.kill(os.getpid(), signal.SIGTERM))
    corpora = labelled(videos, TRAIN="train", TEST="test")["CORPUS"]
    with pytest.raises(Stopped) as caught:
        run(job(videos, begun, SOLVER={"MAX_EPOCH": 2}, CORPUS=corpora, TEST={"ENABLE": True}))
    assert caught.value.code == 143
    assert signal.getsignal(signal.SIGTERM) == before
    assert "SIGTERM: everything that was saved before is complete" in (begun / "stdout.log").read_text()


def test_a_killed_rank_is_started_again_and_the_job_ends_equal(tmp_path):
    source = kills.write_videos(tmp_path / "videos")
    whole = kills.make_job(source, tmp_path / "whole", epochs=2, DETERMINISTIC=True, CPU_RANKS=2)
    with forked_ranks():
        run(load_cfg(whole.config)[0])
    job = kills.make_job(source, tmp_path / "killed", ranks=2, epochs=2, DETERMINISTIC=True, RESUME_MINUTES=0.001)
    kills.kill_ranks(job, (1,), random.Random(1), longest=0.1)
    assert job.printed.count("continuing from") == 1
    kills.compare(whole.output, job.output)
