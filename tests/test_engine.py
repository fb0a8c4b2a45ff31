"""The training loop against a plain PyTorch loop; resume, stops, logs, frozen trunks, profile."""

import json
import math
import weakref
from pathlib import Path

import pytest
import torch
from processes import forked_ranks
from rank_jobs import ranks_cfg, sums_and_objects
from torch import nn
from torch.nn import functional as F
from toys import SPEC, ToyNetwork, batch_of

from distinit_plugin.data.bad import BadVideoLog
from distinit_plugin.data.views import finish_views
from distinit_plugin.engine import checkpoint, distributed
from distinit_plugin.engine.guard import FiniteGuard, TrainingError
from distinit_plugin.engine.meters import JsonLogger, better
from distinit_plugin.engine.modes import set_train_mode
from distinit_plugin.engine.optim import build_optimizer
from distinit_plugin.engine.precision import Precision
from distinit_plugin.engine.profile import count_macs, profile_training
from distinit_plugin.engine.progress import NoProgress
from distinit_plugin.engine.schedule import Schedule
from distinit_plugin.engine.state import Checkpointer, RunState, check_writable, copy_into_network
from distinit_plugin.engine.train import Trainer, TrainOptions
from distinit_plugin.errors import UserError, WeightsError
from distinit_plugin.jobs.launching import launch
from distinit_plugin.losses import build_loss
from distinit_plugin.objectives import Objective, Term, build_adapter
from distinit_plugin.types import BadVideo, ModelOutput, SampleKey

CPU = torch.device("cpu")
BATCH, STEPS = 4, 4
GATE = 1.05  # nats; the toy teacher's entropies lie on both sides

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


def finish(batch):
    specs = {"student/rgb": SPEC, "TEACHER/rgb": SPEC}
    return finish_views(batch["views"], specs, CPU)


def keys_of(epoch, step):
    positions = range(step * BATCH, (step + 1) * BATCH)
    return [SampleKey(epoch, position, (7 * epoch + 3 * position) % 23) for position in positions]


def batches_in(accumulate=1, change=lambda batch, epoch, step: batch):
    """(epoch, first step) → micro-batches; a pure function, like the real sampler."""

    def train_batches(epoch, first_step):
        for step in range(first_step, STEPS):
            keys = keys_of(epoch, step)
            size = BATCH // accumulate
            for start in range(0, BATCH, size):
                yield change(batch_of(keys[start : start + size]), epoch, step)

    return train_batches


def teacher_network():
    teacher = ToyNetwork(3, seed=5)
    with torch.no_grad():
        teacher.fc.weight.mul_(6)
    return teacher.requires_grad_(False).eval()


def objective_of(dropout=0.0, action=True, gate="weight", gate_mean="all"):
    """A labelled term on the student's own logits, and a gated teacher through a new linear head."""
    student, teacher = ToyNetwork(3, dropout=dropout, seed=1), teacher_network()
    terms = [
        Term("TEACHER", "features", build_loss("soft_cross_entropy"), 0.5, "TEACHER", max_entropy=GATE),
        *([Term("action", "logits", build_loss("cross_entropy"))] if action else []),
    ]
    torch.manual_seed(2)
    adapters = {"TEACHER": build_adapter("linear", student, "features", teacher, "logits")}
    return Objective(student, terms, {"TEACHER": teacher}, adapters, gate=gate, gate_mean=gate_mean)


class Recorder(NoProgress):
    """Keeps the loss of every step (with a log period of 1)."""

    def __init__(self):
        self.losses, self.lrs, self.advanced = [], [], []

    def advance(self, step, total):
        self.advanced.append((step, total))

    def show(self, step, total, status):
        self.losses.append(status.loss)
        self.lrs.append(status.lr)


def trainer_of(folder: Path | None = None, *, max_epoch=3, objective=None, batches=None, schedule=None, **changes):
    objective = objective or objective_of(dropout=changes.pop("dropout", 0.0))
    schedule = schedule or Schedule("cosine", base_lr=0.1, max_epoch=max_epoch)
    optimizer = build_optimizer(objective.trainable, "sgd", lr=0.1, weight_decay=1e-4)
    options = TrainOptions(**{"log_period": 1, **changes.pop("options", {})})
    keep = changes.pop("keep", 0)
    state = RunState(objective, optimizer, schedule, Precision("fp32", CPU), BadVideoLog(), config_text="A: 1\n")
    torch.manual_seed(7)
    return Trainer(
        state,
        train_batches=batches or batches_in(options.accumulate),
        steps_per_epoch=STEPS,
        finish=changes.pop("finish", finish),
        device=CPU,
        options=options,
        checkpointer=Checkpointer(folder, keep=keep) if folder else None,
        progress=changes.pop("progress", None) or Recorder(),
        **changes,
    )


def weights_of(trainer):
    return {name: tensor.clone() for name, tensor in trainer.state.objective.trainable.state_dict().items()}


def assert_equal_weights(first, second, **tolerance):
    assert first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(first[name], second[name], msg=name, **(tolerance or {"rtol": 0, "atol": 0}))


def plain_loop(epochs, lr=0.1):
    """The same training as a PyTorch user would write it."""
    objective = objective_of()
    student, head, teacher = objective.trainable.student, objective.trainable.adapters["TEACHER"], teacher_network()
    norms = list(student.bn.parameters())
    others = [student.conv.weight, *student.fc.parameters(), *head.parameters()]
    optimizer = torch.optim.SGD([*norms, *others], lr=lr, momentum=0.9, nesterov=True, weight_decay=1e-4)
    losses = []
    objective.trainable.train()
    for step in range(epochs * STEPS):
        optimizer.param_groups[0]["lr"] = lr * 0.5 * (1 + math.cos(math.pi * step / (epochs * STEPS)))
        batch = batch_of(keys_of(step // STEPS, step % STEPS))
        views = {"rgb": (batch["views"][SPEC.pixels].float() / 255 - 0.45) / 0.225}
        with torch.no_grad():
            target = teacher(views).logits.softmax(1)
        kept = (-(target * target.log()).sum(1) < GATE).float()
        output = student(views)
        distillation = -(target * head(output.features).log_softmax(1)).sum(1)
        action = F.cross_entropy(output.logits, batch["targets"]["label"])
        loss = action + 0.5 * (kept * distillation).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, objective.trainable.state_dict()


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


def test_training_the_classifier_moves_nothing_else():
    objective = objective_of()
    objective.trainable.student.requires_grad_(False)
    objective.trainable.student.fc.requires_grad_(True)
    trainer = trainer_of(objective=objective, options={"frozen_trunk": True}, max_epoch=1)
    before = weights_of(trainer)
    trainer.train()
    moved = {name for name, tensor in weights_of(trainer).items() if not torch.equal(tensor, before[name])}
    assert moved == {"student.fc.weight", "student.fc.bias", "adapters.TEACHER.weight", "adapters.TEACHER.bias"}


# --------------------------------------------------------------------------------------------- checkpoints, resume
def test_resume_at_an_epoch_boundary_is_exact(tmp_path):
    """With dropout: the random state counts too."""
    whole = trainer_of(tmp_path / "whole", dropout=0.5)
    whole.train()
    first = trainer_of(tmp_path / "parts", dropout=0.5)
    first.options = TrainOptions(log_period=1)

    def stop(step, total):
        if step == 2 * STEPS + 1:
            raise KeyboardInterrupt

    first._progress.advance = stop
    with pytest.raises(KeyboardInterrupt):
        first.train()
    second = trainer_of(tmp_path / "parts", dropout=0.5)
    torch.manual_seed(99)  # the state must come from the file
    path, state = checkpoint.newest_state(tmp_path / "parts" / "checkpoints")
    assert path.name == "checkpoint_epoch_00002.pyth"
    second.state.load_state_dict(state, CPU)
    assert (second.state.epoch, second.step) == (2, 8)
    second.train()
    assert second._progress.losses == whole._progress.losses[8:]
    assert_equal_weights(weights_of(second), weights_of(whole))
    last = [
        checkpoint.load_checkpoint(tmp_path / run / "checkpoints" / "checkpoint_epoch_00003.pyth")
        for run in ("whole", "parts")
    ]
    assert_equal_weights(last[0]["model_state"], last[1]["model_state"])
    for one, other in zip(*(item["optimizer_state"]["state"].values() for item in last), strict=True):
        assert torch.equal(one["momentum_buffer"], other["momentum_buffer"])


def test_resume_in_the_middle_of_an_epoch_is_exact(tmp_path):
    whole = trainer_of(dropout=0.5, max_epoch=1)
    result = whole.train()
    first = trainer_of(dropout=0.5, max_epoch=1)
    with first.open_epoch() as batches:
        for _ in range(3):
            first.run_step(batches)
    checkpointer = Checkpointer(tmp_path, resume_minutes=1e-9)
    assert checkpointer.resume_state_is_due()
    checkpointer.save_resume(first.state.state_dict(first.step))
    second = trainer_of(dropout=0.5, max_epoch=1)
    second.state.load_state_dict(checkpoint.newest_state(tmp_path / "checkpoints")[1], CPU)
    assert (second.state.epoch, second.state.step_in_epoch, second.step) == (0, 3, 3)
    again = second.train()
    assert_equal_weights(weights_of(second), weights_of(whole))
    assert again.train == result.train


def test_what_is_saved(tmp_path):
    trainer = trainer_of(tmp_path, options={"checkpoint_period": 2}, keep=2, max_epoch=5)
    trainer.train()
    folder = tmp_path / "checkpoints"
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["checkpoint_epoch_00004.pyth", "checkpoint_epoch_00005.pyth"]
    state = checkpoint.load_checkpoint(folder / names[1])
    assert set(state) == {"epoch", "model_state", "optimizer_state", "cfg", "distinit"}
    assert (state["epoch"], state["cfg"]) == (4, "A: 1\n")
    assert set(state["model_state"]) == set(ToyNetwork().state_dict())  # bare: no prefix, no head, no teacher
    assert set(state["distinit"]["adapters"]) == {"TEACHER.weight", "TEACHER.bias"}
    assert state["distinit"]["progress"] == {"epoch": 5, "step_in_epoch": 0, "step": 20}


def test_best_is_saved_beside(tmp_path):
    accuracies = iter([0.2, 0.6, 0.4])
    seen = []

    def validate():
        seen.append(trainer.step)
        return {"loss": 1.0, "top1": next(accuracies), "top5": 1.0}

    trainer = trainer_of(tmp_path, validate=validate, json_logger=JsonLogger(tmp_path))
    result = trainer.train()
    best = checkpoint.load_checkpoint(tmp_path / "checkpoints" / "best.pyth")
    assert best["epoch"] == 1
    assert result.best == {"name": "top1", "value": 0.6, "epoch": 1, "top5": 1.0}
    assert result.validation["top1"] == 0.4
    assert seen == [4, 8, 12]
    lines = [json.loads(line.removeprefix("json_stats: ")) for line in (tmp_path / "json_stats.log").open()]
    assert [line["_type"] for line in lines] == ["train_epoch", "val_epoch"] * 3
    assert [line["epoch"] for line in lines[::2]] == ["1/3", "2/3", "3/3"]
    assert [line["min_top1_err"] for line in lines[1::2]] == [80.0, 40.0, 40.0]
    assert {"loss_0", "loss_1", "loss/TEACHER", "loss/action", "top1_err", "lr", "eta"} <= set(lines[0])


def test_validation_period_and_precise_bn():
    calls = []
    trainer = trainer_of(
        max_epoch=5,
        options={"eval_period": 2, "checkpoint_period": 4},
        validate=lambda: calls.append("val") or {"loss": 1.0},
        precise_bn=lambda: calls.append("bn"),
    )
    trainer.train()
    assert calls == ["bn", "val"] * 3  # after epochs 2, 4 and the last


def test_the_plateau_policy_hears_the_validation_loss():
    schedule = Schedule("plateau", base_lr=0.1, max_epoch=4, plateau_patience=1)
    trainer = trainer_of(schedule=schedule, validate=lambda: {"loss": 1.0})
    trainer.train()
    assert trainer._progress.lrs[::STEPS] == pytest.approx([0.1, 0.1, 0.01, 0.001])


@pytest.mark.parametrize(
    ("best", "values", "expected"),
    [
        ({}, {"loss": 2.0}, True),
        ({"name": "loss", "value": 2.0}, {"loss": 1.9}, True),
        ({"name": "loss", "value": 2.0}, {"loss": 2.0}, False),
        ({"name": "loss", "value": 2.0}, {"loss": math.nan}, False),
        ({}, {"loss": math.nan}, False),
        ({"name": "top1", "value": 0.5}, {"loss": 0.1, "top1": 0.4}, False),
        ({"name": "top1", "value": 0.5}, {"loss": 9.0, "top1": 0.6}, True),
    ],
)
def test_better(best, values, expected):
    assert better(best, values, 3)[1] is expected
    assert (better(best, values, 3)[0].get("epoch") == 3) is expected


def test_states_of_others_are_refused(tmp_path):
    state = trainer_of().state.state_dict(0)
    other = ToyNetwork(5)
    with pytest.raises(WeightsError, match=r"of another network \(of another shape: fc\.bias, fc\.weight\)"):
        copy_into_network(other, state["model_state"])
    with pytest.raises(WeightsError, match=r"missing: bn\.bias"):
        copy_into_network(other, {"conv.weight": state["model_state"]["conv.weight"]})
    with pytest.raises(WeightsError, match=r"not written by this program.*TRAIN\.CHECKPOINT_FILE_PATH"):
        trainer_of().state.load_state_dict({key: state[key] for key in state if key != "distinit"}, CPU)
    newer = {**state, "distinit": {**state["distinit"], "format": 99}}
    with pytest.raises(WeightsError, match="newer version"):
        trainer_of().state.load_state_dict(newer, CPU)
    older = {**state, "distinit": {**state["distinit"], "format": 1}}
    with pytest.raises(WeightsError, match=r"earlier version.*TRAIN\.CHECKPOINT_FILE_PATH for its weights"):
        trainer_of().state.load_state_dict(older, CPU)
    with pytest.raises(WeightsError, match="of another job"):
        trainer_of().state.load_state_dict({**state, "distinit": {**state["distinit"], "adapters": {}}}, CPU)


def test_bad_videos_survive_a_resume():
    trainer = trainer_of()
    trainer.state.bad_log.add([BadVideo("a.mp4", "empty")])
    second = trainer_of()
    second.state.load_state_dict(trainer.state.state_dict(0), CPU)
    assert "a.mp4" in second.state.bad_log


def test_an_unwritable_folder_is_found_before_the_first_step(tmp_path):
    check_writable(tmp_path / "new")
    assert list((tmp_path / "new" / "checkpoints").iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"OUTPUT_DIR: .*file cannot be written"):
        check_writable(tmp_path / "file")


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


def test_half_a_job_in_the_environment_is_an_error(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UserError, match="LOCAL_RANK, MASTER_ADDR, MASTER_PORT is not"):
        distributed.start("cpu")
