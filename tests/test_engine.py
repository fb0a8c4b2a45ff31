"""The training loop against a plain PyTorch loop; stops, frozen trunks, profile, ranks."""

import contextlib
import math
import weakref

import pytest
import torch
from loops import (
    BATCH,
    assert_equal_weights,
    batches_in,
    finish,
    keys_of,
    objective_of,
    plain_loop,
    teacher_network,
    trainer_of,
    weights_of,
)
from rank_jobs import ranks_cfg, sums_and_objects
from rank_processes import forked_ranks
from torch import nn
from toys import SPEC, ToyNetwork, batch_of

from distinit_plugin.config.defaults import get_cfg
from distinit_plugin.engine import checkpoint, distributed
from distinit_plugin.engine.guard import FiniteGuard, TrainingError
from distinit_plugin.engine.modes import set_train_mode
from distinit_plugin.engine.profile import count_macs, profile_training
from distinit_plugin.engine.schedule import Schedule
from distinit_plugin.errors import UserError
from distinit_plugin.jobs.launching import launch
from distinit_plugin.jobs.session import open_session
from distinit_plugin.losses import build_loss
from distinit_plugin.objectives import Objective, Term, build_adapter
from distinit_plugin.types import BadVideo, ModelOutput, SampleKey

# Losses of the twelve steps of ``trainer_of()`` in fp32. They change only when the training changes.
GOLDEN_LOSSES = [
    1.398383,
    1.290846,
    1.815903,
    1.626958,
    1.373854,
    1.701695,
    2.220652,
    1.549653,
    1.801527,
    1.312902,
    1.266418,
    1.034847,
]


# ---------------------------------------------------------------------------------------------- the mathematics
def test_a_short_run_equals_a_plain_loop_and_its_golden_losses():
    trainer = trainer_of()
    result = trainer.train()
    losses, weights = plain_loop(3)
    recorder = trainer._progress
    assert recorder.losses == pytest.approx(losses, rel=1e-5)
    assert_equal_weights(weights_of(trainer), weights, rtol=1e-4, atol=1e-5)
    assert recorder.losses == pytest.approx(GOLDEN_LOSSES, rel=1e-4)
    assert recorder.losses[-1] < recorder.losses[0]
    assert recorder.lrs == pytest.approx([0.05 * (1 + math.cos(math.pi * step / 12)) for step in range(12)])
    assert recorder.advanced == [(step, 12) for step in range(1, 13)]
    assert (result.epochs, result.steps) == (3, 12)
    assert result.train["loss"] == pytest.approx(sum(losses[8:]) / 4, rel=1e-5)
    assert result.train["loss"] == pytest.approx(result.train["loss/action"] + 0.5 * result.train["loss/TEACHER"])
    assert 0 < result.train["kept/TEACHER"] < 1
    assert 0 <= result.wait_share <= 1


@pytest.mark.parametrize("gate", ["weight", "skip"])
@pytest.mark.parametrize("gate_mean", ["all", "kept"])
def test_accumulation_gives_the_gradient_of_the_whole_batch(gate, gate_mean):
    """With BN frozen: its statistics of a micro-batch are others than those of the batch."""

    def run(accumulate):
        objective = objective_of(action=False, gate=gate, gate_mean=gate_mean)
        objective.trainable.student.fc.requires_grad_(False)
        objective.trainable.student.bn.requires_grad_(False)
        trainer = trainer_of(objective=objective, options={"accumulate": accumulate, "frozen_trunk": True}, max_epoch=1)
        with trainer.open_epoch() as batches:
            trainer.run_step(batches)
        gradients = {name: p.grad for name, p in objective.trainable.named_parameters() if p.grad is not None}
        return gradients, trainer.state.epoch_meter.read()

    whole, whole_means = run(1)
    parts, parts_means = run(4)
    assert set(whole) == {"student.conv.weight", "adapters.TEACHER.weight", "adapters.TEACHER.bias"}
    assert 0 < whole_means["kept/TEACHER"] < 1, "the gate must do something"
    assert_equal_weights(whole, parts, rtol=1e-4, atol=1e-7)
    for name in ("loss", "loss/TEACHER", "kept/TEACHER", "entropy/TEACHER"):
        assert parts_means[name] == pytest.approx(whole_means[name], rel=1e-5)


class Echo(nn.Module):
    """Logits are the view's own numbers, plus a bias that can be trained."""

    def __init__(self):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(3))
        self.layers, self.feature_dim, self.num_classes = {}, 3, 3

    def forward(self, views, *, boxes=None, taps=()):
        logits = views["rgb"].flatten(1) + self.bias
        return ModelOutput(logits, logits, {})


def echo_trainer(accumulate):
    """Student and teacher that say what is in their views, and a gate that skips what the teacher is unsure of."""
    term = Term("TEACHER", "logits", build_loss("soft_cross_entropy"), 1.0, "TEACHER", max_entropy=0.5)
    objective = Objective(Echo(), [term], {"TEACHER": Echo().requires_grad_(False).eval()}, {}, gate="skip")
    options = {"accumulate": accumulate}
    return trainer_of(objective=objective, options=options, max_epoch=1, finish=lambda batch: batch["views"])


SURE, UNSURE = torch.eye(3)[0] * 20, torch.zeros(3)  # entropies of 0 and log 3 nats
RIGHT, WRONG = torch.eye(3)[0], torch.eye(3)[1]
MICRO_BATCHES = [
    ([SURE, UNSURE, UNSURE, UNSURE], [RIGHT, RIGHT, RIGHT, RIGHT]),  # sees 1, agrees on 1
    ([SURE, SURE, UNSURE, SURE], [WRONG, RIGHT, RIGHT, WRONG]),  # sees 3, agrees on 1
    ([UNSURE, SURE, SURE, UNSURE], [RIGHT, WRONG, WRONG, WRONG]),  # sees 2, agrees on 0
    ([SURE, SURE, SURE, SURE], [RIGHT, RIGHT, RIGHT, WRONG]),  # sees 4, agrees on 3
]


def echo_batch(number):
    teacher, student = ([row.view(3, 1, 1, 1) for row in rows] for rows in MICRO_BATCHES[number])
    batch = batch_of(keys_of(0, 0), labeled=False)
    return {**batch, "views": {"student/rgb": torch.stack(student), "TEACHER/rgb": torch.stack(teacher)}}


def test_agreement_is_over_the_examples_that_the_student_saw():
    """By hand: of 10 clips that the student saw it agreed on 5; a mean weighted by batches would be 0.521."""
    together = echo_trainer(4)
    together.run_step(iter([echo_batch(number) for number in range(4)]))
    means = together.state.epoch_meter.read()
    assert means["agreement/TEACHER"] == pytest.approx(5 / 10)
    assert means["kept/TEACHER"] == pytest.approx(10 / 16)
    assert pytest.approx(0.521, abs=1e-3) == (1 + 1 / 3 + 0 + 3 / 4) / 4

    ranks = [echo_trainer(2), echo_trainer(2)]  # each has two of the micro-batches
    for rank, trainer in enumerate(ranks):
        trainer.run_step(iter([echo_batch(2 * rank), echo_batch(2 * rank + 1)]))
    tables = []
    for trainer in ranks:
        trainer.state.epoch_meter.read(lambda table: tables.append(table) or table)
    joined = ranks[0].state.epoch_meter.read(lambda table: sum(tables))
    assert joined["agreement/TEACHER"] == pytest.approx(5 / 10)
    assert joined["kept/TEACHER"] == pytest.approx(10 / 16)


@pytest.mark.parametrize(("gate_mean", "limit", "held"), [("all", 1.05, 0), ("kept", None, 0), ("kept", 1.05, 3)])
def test_memory_does_not_grow_with_the_number_of_micro_batches(gate_mean, limit, held):
    """Nothing is left of one micro-batch when the next is taken, unless the mean depends on all of a step."""
    student, teacher = ToyNetwork(3, seed=1), teacher_network()
    term = Term("TEACHER", "features", build_loss("soft_cross_entropy"), 1.0, "TEACHER", max_entropy=limit)
    adapters = {"TEACHER": build_adapter("linear", student, "features", teacher, "logits")}
    objective = Objective(student, [term], {"TEACHER": teacher}, adapters, gate_mean=gate_mean)
    pixels, views, alive = [], [], []

    def batches():
        for number in range(8):
            alive.append([sum(ref() is not None for ref in refs) for refs in (pixels, views)])
            yield batch_of([SampleKey(0, number, number)])

    def followed(batch):
        made = finish(batch)
        pixels.append(weakref.ref(batch["views"][SPEC.pixels]))
        views.append(weakref.ref(made["student/rgb"]))
        return made

    trainer = trainer_of(objective=objective, options={"accumulate": 4}, finish=followed)
    stream = batches()
    for _ in range(2):
        trainer.run_step(stream)
    assert len(views) == 8
    assert max(taken for taken, _ in alive) == 0
    assert [left for _, left in alive] == 2 * [min(number, held) for number in range(4)]


def test_micro_batches_of_other_sizes_are_refused():
    """Each is divided by what the first says about all."""
    trainer = trainer_of(options={"accumulate": 2})
    with pytest.raises(AssertionError, match="micro-batches of 2 and 1 clips"):
        trainer.run_step(iter([batch_of(keys_of(0, 0)[:2]), batch_of(keys_of(0, 0)[:1])]))


def test_clipping_reaches_the_optimizer():
    free, clipped = trainer_of(max_epoch=1), trainer_of(max_epoch=1, options={"clip_norm": 1e-6})
    before = weights_of(clipped)
    free.train()
    clipped.train()
    moved = weights_of(clipped)["student.fc.weight"] - before["student.fc.weight"]
    assert moved.abs().max() < 1e-4 < (weights_of(free)["student.fc.weight"] - before["student.fc.weight"]).abs().max()


def test_a_schedule_in_steps_ends_within_an_epoch():
    schedule = Schedule("steps_with_relative_lrs", base_lr=0.1, max_epoch=6, unit="step", steps=[0, 5], lrs=[1, 0.1])
    trainer = trainer_of(schedule=schedule)
    result = trainer.train()
    assert (result.steps, result.epochs) == (6, 2)
    assert trainer._progress.lrs == pytest.approx([0.1] * 5 + [0.01])


# -------------------------------------------------------------------------------------------------- frozen trunk
def test_a_frozen_trunk_stays_in_eval_mode():
    network = ToyNetwork(3, dropout=0.5)
    nested = nn.ModuleDict({"student": nn.Sequential(network), "heads": nn.ModuleDict({"own": nn.Identity()})})
    network.requires_grad_(False)
    network.fc.requires_grad_(True)
    set_train_mode(nested, frozen_trunk=True)
    assert not network.bn.training
    assert not network.conv.training
    assert network.fc.training
    assert network.dropout.training
    set_train_mode(nested, frozen_trunk=False)
    assert network.bn.training
    set_train_mode(nested, frozen_trunk=False, frozen_norm=True)
    assert not network.bn.training
    assert network.conv.training


def test_training_the_classifier_moves_nothing_else():
    objective = objective_of()
    objective.trainable.student.requires_grad_(False)
    objective.trainable.student.fc.requires_grad_(True)
    trainer = trainer_of(objective=objective, options={"frozen_trunk": True}, max_epoch=1)
    before = weights_of(trainer)
    trainer.train()
    moved = {name for name, tensor in weights_of(trainer).items() if not torch.equal(tensor, before[name])}
    assert moved == {"student.fc.weight", "student.fc.bias", "adapters.TEACHER.weight", "adapters.TEACHER.bias"}


# --------------------------------------------------------------------------------------------------------- stops
def poison(batch, epoch, step):
    if (epoch, step) == (1, 2):
        batch["poison"] = True
    return batch


def poisoned_finish(batch):
    views = finish(batch)
    return {name: view * math.nan if "poison" in batch else view for name, view in views.items()}


def test_a_loss_that_is_not_finite_stops_with_names_and_keeps_the_checkpoints(tmp_path):
    trainer = trainer_of(tmp_path, batches=batches_in(change=poison), finish=poisoned_finish)
    with pytest.raises(TrainingError) as caught:
        trainer.train()
    text = str(caught.value)
    assert "the loss is nan at step 7;" in text
    assert "loss/action = nan" in text
    assert "not finite: loss/TEACHER, loss/action" in text
    for key in keys_of(1, 2):
        assert f"video{key.index}.mp4" in text
    assert [path.name for path in checkpoint.epoch_files(tmp_path / "checkpoints")] == ["checkpoint_epoch_00001.pyth"]
    # On the CPU the loss is looked at before the weights move.
    assert all(torch.isfinite(parameter).all() for parameter in trainer.state.objective.trainable.parameters())


def test_the_lagged_guard_names_the_first_bad_step():
    guard = FiniteGuard(every_step=False)
    for step, value in enumerate([1.0, math.inf, 2.0, math.nan]):
        guard.watch(step, torch.tensor(value), {"loss/A": torch.tensor(value)}, [f"{step}.mp4"])
    with pytest.raises(TrainingError, match=r"(?s)the loss is inf at step 2; .*1\.mp4"):
        guard.check()
    guard.check()


def test_data_that_ends_early_is_an_error():
    def short(epoch, first_step):
        yield from list(batches_in()(epoch, first_step))[:3]

    with pytest.raises(TrainingError, match="epoch 1 ended at step 4 of 4"):
        trainer_of(batches=short).train()


def test_too_many_bad_videos_stop_the_run(caplog):
    def bad(batch, epoch, step):
        return {**batch, "bad": [BadVideo(f"bad{step}.mp4", "truncated")]}

    trainer = trainer_of(batches=batches_in(change=bad), options={"corpus_size": 20, "max_bad_fraction": 0.1})
    with (
        caplog.at_level("WARNING", logger="distinit_plugin"),
        pytest.raises(UserError, match=r"3 of 20 videos are bad.*MAX_BAD_FRACTION"),
    ):
        trainer.train()
    assert trainer.state.step_in_epoch == 2
    assert caplog.text.count("bad0.mp4: truncated") == 1


def test_the_iterator_is_closed_when_the_run_stops():
    closed = []

    def tracked(epoch, first_step):
        try:
            yield from batches_in()(epoch, first_step)
        finally:
            closed.append(epoch)

    trainer = trainer_of(batches=tracked)

    def stop(step, total):
        raise KeyboardInterrupt

    trainer._progress.advance = stop
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert closed == [0]


# ------------------------------------------------------------------------------------------------------- profile
def test_macs_are_exact():
    macs = count_macs(ToyNetwork(3), {"rgb": torch.zeros(2, 3, 4, 8, 8)})
    # A 3×3×3 convolution 3→4 on 4×8×8 (zero padding counts), and a linear layer 4→3.
    assert macs == 27 * 3 * 4 * 4 * 8 * 8 + 4 * 3


def test_profile_of_a_job():
    trainer = trainer_of()
    profile = profile_training(trainer)
    student = profile.networks["student"]
    assert (
        student.parameters
        == student.trainable
        == sum(p.numel() for p in trainer.state.objective.trainable.parameters())
    )
    assert student.macs == 27 * 3 * 4 * 4 * 8 * 8 + 4 * 3 + 4 * 3  # with its head
    assert profile.networks["TEACHER"].trainable == 0
    assert profile.views["student/rgb"] == (BATCH, 3, 4, 8, 8)
    assert (profile.clips_per_step, profile.total_steps) == (BATCH, 12)
    assert profile.seconds == pytest.approx(12 * BATCH / profile.clips_per_second)
    assert profile.peak_memory > 1e7
    assert trainer.state.objective.trainable.training
    for words in ("GMACs", "4 × 3 × 4 × 8 × 8", "clips/s", "12 steps of 4 clips", "GiB"):
        assert words in str(profile)


# -------------------------------------------------------------------------------------------------------- ranks
def test_two_ranks_sum_and_gather():
    with forked_ranks():
        answers = launch(ranks_cfg(2), sums_and_objects)
    everyone = [{"rank": 0}, {"rank": 1}]
    assert answers[0] == (True, 0, 2, True, [1.0, 2.0], [3.0, 4.0], everyone)
    assert answers[1] == (True, 1, 2, False, [2.0, 2.0], [3.0, 4.0], everyone)


def test_one_process_needs_no_job(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    assert distributed.start("cpu") is False
    assert (distributed.rank(), distributed.world_size(), distributed.is_main()) == (0, 1, True)
    assert distributed.all_reduce_sum(torch.ones(2)).tolist() == [1.0, 1.0]
    assert distributed.gather_objects("x") == ["x"]
    distributed.barrier()
    distributed.stop()


@pytest.mark.parametrize(("on_gpus", "failed", "left"), [(True, True, 0), (True, False, 1), (False, True, 1)])
def test_a_failed_rank_does_not_wait_for_the_others_to_leave(on_gpus, failed, left, monkeypatch):
    """NCCL's orderly end does; see ``distributed.stop``."""
    calls = []
    monkeypatch.setattr(distributed, "_active", lambda: True)
    monkeypatch.setattr(distributed, "_on_gpus", on_gpus)
    monkeypatch.setattr(distributed.dist, "destroy_process_group", lambda: calls.append("left"))
    distributed.stop(failed=failed)
    assert len(calls) == left


@pytest.mark.parametrize("ending", [None, UserError("no"), ValueError("defect"), KeyboardInterrupt(), SystemExit(143)])
def test_a_session_says_how_it_ended(ending, tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr(distributed, "start", lambda *_: True)
    monkeypatch.setattr(distributed, "stop", lambda *, failed: told.append(failed))
    cfg = get_cfg()
    cfg.OUTPUT_DIR = str(tmp_path)
    with contextlib.suppress(BaseException), open_session(cfg):
        if ending is not None:
            raise ending
    assert told == [ending is not None]


def test_half_a_job_in_the_environment_is_an_error(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UserError, match="LOCAL_RANK, MASTER_ADDR, MASTER_PORT is not"):
        distributed.start("cpu")
