"""States of the training loop: resume, what is saved, the best epoch, states of others."""

import json
import math
from dataclasses import replace

import pytest
import torch
from loops import CPU, STEPS, assert_equal_weights, objective_of, trainer_of, weights_of
from toys import ToyNetwork

from distinit_plugin.engine import checkpoint
from distinit_plugin.engine.guard import TrainingError
from distinit_plugin.engine.meters import JsonLogger, better
from distinit_plugin.engine.schedule import Schedule
from distinit_plugin.engine.state import Checkpointer, check_writable, copy_into_network
from distinit_plugin.engine.train_options import TrainOptions
from distinit_plugin.errors import UserError, WeightsError
from distinit_plugin.types import BadVideo


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


def test_a_warming_weight_goes_on_where_it_was(tmp_path):
    """The factor of a term is a function of the step alone: no state, and no number of micro-batches, changes it."""

    def trainer(folder=None, warmup=6.0, **options):
        objective = objective_of()
        terms = [replace(term, warmup=warmup) if term.name == "TEACHER" else term for term in objective.terms]
        objective.terms = tuple(terms)
        schedule = Schedule("cosine", base_lr=0.1, max_epoch=12, unit="step")
        return trainer_of(folder, objective=objective, schedule=schedule, options=options)

    whole = trainer()
    whole.train()
    first = trainer(tmp_path)

    def stop(step, total):
        if step == STEPS + 1:
            raise KeyboardInterrupt

    first._progress.advance = stop
    with pytest.raises(KeyboardInterrupt):
        first.train()
    second = trainer(tmp_path)
    second.state.load_state_dict(checkpoint.newest_state(tmp_path / "checkpoints")[1], CPU)
    assert second.step == STEPS
    second.train()
    assert_equal_weights(weights_of(second), weights_of(whole))
    weights = [{"weight/TEACHER": 0.5 * step / 6} for step in range(6)]
    assert [whole.state.objective.warming_weights(float(step)) for step in range(8)] == [*weights, {}, {}]
    cold = trainer(warmup=0.0)
    cold.train()
    with pytest.raises(AssertionError):  # the control: without the warm-up it is another training
        assert_equal_weights(weights_of(cold), weights_of(whole), rtol=1e-3, atol=1e-4)


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
    assert state["distinit"]["progress"] == {"epoch": 5, "step_in_epoch": 0, "step": 20, "told": False}


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


def test_an_epoch_is_told_once_however_often_its_validation_is_interrupted(tmp_path):
    def validate():
        if len(tries) < 3:
            tries.append(1)
            raise KeyboardInterrupt
        return {"loss": 1.0}

    tries: list[int] = []
    for _ in range(3):
        trainer = trainer_of(tmp_path, validate=validate, json_logger=JsonLogger(tmp_path), max_epoch=2)
        found = checkpoint.newest_state(tmp_path / "checkpoints")
        if found:
            trainer.state.load_state_dict(found[1], CPU)
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
    trainer = trainer_of(tmp_path, validate=validate, json_logger=JsonLogger(tmp_path), max_epoch=2)
    trainer.state.load_state_dict(checkpoint.newest_state(tmp_path / "checkpoints")[1], CPU)
    trainer.train()
    lines = [json.loads(line.removeprefix("json_stats: ")) for line in (tmp_path / "json_stats.log").open()]
    assert [(line["_type"], line["epoch"]) for line in lines] == [
        (kind, f"{epoch}/2") for epoch in (1, 2) for kind in ("train_epoch", "val_epoch")
    ]


@pytest.mark.parametrize("where", ["weights", "statistics"])
def test_spoilt_weights_are_not_saved_though_every_loss_was_a_number(where, tmp_path):
    """What the last step before a state did, no loss has seen yet."""
    trainer = trainer_of(tmp_path, max_epoch=2)
    student = trainer.state.objective.trainable.student
    student.register_buffer("running_mean", torch.zeros(3), persistent=False)
    advance = trainer._progress.advance

    def spoil(step, total):
        advance(step, total)
        if step == 2 * STEPS:
            tensor = student.fc.weight.data if where == "weights" else student.running_mean
            tensor[0] = math.nan

    trainer._progress.advance = spoil
    name = "fc.weight" if where == "weights" else "running_mean"
    with pytest.raises(TrainingError, match=rf"student\.{name} holds values that are not finite.* is not saved"):
        trainer.train()
    path, state = checkpoint.newest_state(tmp_path / "checkpoints")
    assert path.name == "checkpoint_epoch_00001.pyth"
    assert all(tensor.isfinite().all() for tensor in state["model_state"].values())


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
    with pytest.raises(WeightsError, match=r"no heads for the terms .*TRAIN\.CHECKPOINT_EPOCH_RESET True"):
        trainer_of().state.load_state_dict({key: state[key] for key in state if key != "distinit"}, CPU)
    with pytest.raises(WeightsError, match=r"weights alone.*TRAIN\.CHECKPOINT_FILE_PATH"):
        trainer_of().state.load_state_dict({"model_state": state["model_state"]}, CPU)
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
