"""Optimizers, schedules, precision and batch-norm statistics against arithmetic written out."""

from __future__ import annotations

import math
import re
import subprocess
import sys

import pytest
import torch
from torch import nn
from toys import Net

from distinit_plugin.engine.optim import build_optimizer, clip_gradients, set_lr
from distinit_plugin.engine.precision import (
    Precision,
    choose_memory_format,
    choose_precision,
    set_flush_denormals,
)
from distinit_plugin.engine.schedule import Schedule
from distinit_plugin.errors import UserError

CPU = torch.device("cpu")


# ----------------------------------------------------------------------------------------------------------- optimizer
def group_names(net: nn.Module, optimizer: torch.optim.Optimizer) -> list[tuple[set[str], float]]:
    names = {id(parameter): name for name, parameter in net.named_parameters()}
    return [({names[id(p)] for p in group["params"]}, group["weight_decay"]) for group in optimizer.param_groups]


WEIGHTS, BIASES = {"conv.weight", "fc.weight"}, {"conv.bias", "fc.bias", "again.bias"}
BN = {"bn.weight", "bn.bias"}


@pytest.mark.parametrize("method", ["sgd", "adamw"])
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"bn_weight_decay": 0.0}, [(BN, 0.0), (WEIGHTS | BIASES, 0.1)]),
        ({"bn_weight_decay": 0.3, "zero_wd_1d": True}, [(BN, 0.3), (WEIGHTS, 0.1), (BIASES, 0.0)]),
        ({"bn_weight_decay": -1.0}, [(BN, 0.1), (WEIGHTS | BIASES, 0.1)]),
    ],
)
def test_every_trainable_parameter_is_in_one_group(method, options, expected):
    net = Net()
    optimizer = build_optimizer(net, method, lr=0.1, weight_decay=0.1, **options)
    assert group_names(net, optimizer) == expected
    assert sum(len(group["params"]) for group in optimizer.param_groups) == 7
    set_lr(optimizer, 0.25)
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.25] + [0.25] * (len(expected) - 2)


@pytest.mark.parametrize("nesterov", [False, True])
def test_sgd_steps_equal_the_formula(nesterov):
    net = nn.Linear(1, 1, bias=False)
    net.weight.data.fill_(2.0)
    optimizer = build_optimizer(net, "sgd", lr=0.1, momentum=0.9, nesterov=nesterov, weight_decay=0.5)
    weight, velocity = 2.0, None
    for gradient in (1.0, -3.0, 0.5):
        net.weight.grad = torch.tensor([[gradient]])
        optimizer.step()
        total = gradient + 0.5 * weight
        velocity = total if velocity is None else 0.9 * velocity + total
        weight -= 0.1 * (total + 0.9 * velocity if nesterov else velocity)
        assert net.weight.item() == pytest.approx(weight, rel=1e-6)


def test_adamw_decays_apart_from_the_gradient():
    net = nn.Linear(1, 1, bias=False)
    net.weight.data.fill_(2.0)
    net.weight.grad = torch.zeros(1, 1)
    build_optimizer(net, "adamw", lr=0.1, weight_decay=0.5).step()
    assert net.weight.item() == pytest.approx(2.0 * (1 - 0.1 * 0.5))


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("sdg", {}, "Did you mean sgd"),
        ("sgd", {"momentum": 0.0}, "SOLVER.NESTEROV needs SOLVER.MOMENTUM above 0"),
        ("sgd", {"dampening": 0.1}, "SOLVER.DAMPENING 0"),
        ("sgd", {"lr": -1.0}, "SOLVER.BASE_LR is -1.0"),
        ("sgd", {"weight_decay": math.nan}, "SOLVER.WEIGHT_DECAY is nan"),
        ("sgd", {"bn_weight_decay": -2.0}, "BN.WEIGHT_DECAY is -2.0"),
        ("adamw", {"betas": (0.9, 1.0)}, "SOLVER.BETAS"),
    ],
)
def test_bad_optimizer_options_are_named(method, options, message):
    with pytest.raises(UserError, match=message):
        build_optimizer(Net(), method, **{"lr": 0.1, **options})


def test_nothing_trainable_is_an_error():
    with pytest.raises(UserError, match="nothing is trainable"):
        build_optimizer(Net().requires_grad_(False), "sgd", lr=0.1)


@pytest.mark.parametrize(
    ("value", "l2norm", "expected"),
    [
        (0.0, 0.0, [3.0, -4.0]),
        (3.5, 0.0, [3.0, -3.5]),
        (0.0, 1.0, [0.6, -0.8]),
        (0.0, 10.0, [3.0, -4.0]),
        (3.0, 1.0, [math.sqrt(0.5), -math.sqrt(0.5)]),
    ],
)
def test_clipping_returns_the_norm_before_it(value, l2norm, expected):
    parameters = [nn.Parameter(torch.zeros(1)) for _ in range(3)]
    parameters[0].grad, parameters[1].grad = torch.tensor([3.0]), torch.tensor([-4.0])
    assert clip_gradients(parameters, value, l2norm).item() == pytest.approx(5.0)
    assert [parameters[0].grad.item(), parameters[1].grad.item()] == pytest.approx(expected, rel=1e-5)
    assert parameters[2].grad is None


# ------------------------------------------------------------------------------------------------------------ schedule
def test_steps_with_relative_lrs_exactly():
    schedule = Schedule("steps_with_relative_lrs", base_lr=0.01, max_epoch=45, steps=[0, 10, 20], lrs=[1, 0.1, 0.01])
    spe = 651
    found = [schedule.lr(step, spe) for step in (0, 10 * spe - 1, 10 * spe, 20 * spe - 1, 20 * spe, 45 * spe - 1)]
    assert found == [0.01, 0.01, 0.01 * 0.1, 0.01 * 0.1, 0.01 * 0.01, 0.01 * 0.01]
    assert schedule.total_steps(spe) == 29295


def test_cosine_with_warmup_exactly():
    """PySlowFast: the cosine runs from epoch 0, the warm-up ends on it."""
    schedule = Schedule("cosine", base_lr=0.1, max_epoch=20, cosine_end_lr=0.001, warmup_epochs=4, warmup_start_lr=0.01)

    def cosine(epoch: float) -> float:
        return 0.001 + (0.1 - 0.001) * (math.cos(math.pi * epoch / 20) + 1.0) * 0.5

    for step in range(0, 200, 7):
        epoch = step / 10
        expected = 0.01 + epoch * (cosine(4) - 0.01) / 4 if epoch < 4 else cosine(epoch)
        assert schedule.lr(step, 10) == pytest.approx(expected, rel=1e-12)
    assert schedule.lr(0, 10) == 0.01
    assert schedule.lr(40, 10) == pytest.approx(cosine(4), rel=1e-12)
    assert schedule.lr(200, 10) == schedule.lr(230, 10) == 0.001


def test_units_of_steps():
    options = {"base_lr": 1.0, "steps": [0, 50], "lrs": [1.0, 0.5], "warmup_epochs": 10, "warmup_start_lr": 0.0}
    schedule = Schedule("steps_with_relative_lrs", max_epoch=80, unit="step", **options)
    assert [schedule.lr(step, 7) for step in (0, 5, 10, 49, 50)] == [0.0, 0.5, 1.0, 1.0, 0.5]
    assert schedule.total_steps(7) == 80


@pytest.mark.parametrize(("epochs", "steps"), [(0.28, 28), (0.285, 29), (1.5, 150), (0.001, 1)])
def test_parts_of_an_epoch(epochs, steps):
    assert Schedule("cosine", base_lr=1.0, max_epoch=epochs).total_steps(100) == steps


def test_plateau_drops_after_patience_epochs_and_survives_a_restart():
    def make() -> Schedule:
        return Schedule("plateau", base_lr=1.0, max_epoch=20, plateau_patience=2, plateau_factor=0.5)

    metrics = [3.0, 2.0, 2.0, 1.5, 1.6, math.nan, 1.4, 1.4, 1.4, 1.4, 1.4]
    expected = [1, 1, 1, 1, 1, 0.5, 0.5, 0.5, 0.25, 0.25, 0.125]
    whole, resumed, found = make(), make(), []
    for epoch, metric in enumerate(metrics):
        whole.end_of_epoch(metric)
        resumed.end_of_epoch(metric)
        state, resumed = resumed.state_dict(), make()
        resumed.load_state_dict(state)
        found.append((whole.lr(epoch * 5, 5), resumed.lr(epoch * 5, 5)))
    assert found == [(value, value) for value in expected]


def test_plateau_metrics_do_not_touch_other_policies():
    schedule = Schedule("cosine", base_lr=1.0, max_epoch=20)
    before = schedule.lr(3, 5)
    for _ in range(9):
        schedule.end_of_epoch(1.0)
    assert schedule.lr(3, 5) == before


@pytest.mark.parametrize(
    ("policy", "options", "message"),
    [
        ("cosin", {}, "Did you mean cosine"),
        ("cosine", {"unit": "iteration"}, "Allowed: epoch, step"),
        ("cosine", {"max_epoch": 0}, "SOLVER.MAX_EPOCH is 0"),
        ("cosine", {"base_lr": -0.1}, "SOLVER.BASE_LR"),
        ("cosine", {"warmup_epochs": math.inf}, "SOLVER.WARMUP_EPOCHS"),
        ("steps_with_relative_lrs", {"steps": [1, 5], "lrs": [1, 0.1]}, "start with 0 and increase"),
        ("steps_with_relative_lrs", {"steps": [0, 5, 5], "lrs": [1, 0.1, 0.1]}, "start with 0 and increase"),
        ("steps_with_relative_lrs", {"steps": [0, 5]}, "one factor per stage"),
        ("steps_with_relative_lrs", {"lrs": [-1.0]}, "at least 0"),
        ("plateau", {"plateau_patience": 0}, "RUNNER.PLATEAU_PATIENCE"),
        ("plateau", {"plateau_factor": 1.0}, "RUNNER.PLATEAU_FACTOR"),
    ],
)
def test_bad_schedules_are_named(policy, options, message):
    with pytest.raises(UserError, match=message):
        Schedule(policy, **{"base_lr": 0.1, "max_epoch": 10, **options})


# ----------------------------------------------------------------------------------------------------------- precision
@pytest.mark.parametrize(
    ("option", "has_bf16", "deterministic", "name", "reason"),
    [
        ("auto", True, False, "bf16", "computes in bf16"),
        ("auto", False, False, "fp32", "no bf16"),
        ("auto", True, True, "fp32", "DETERMINISTIC"),
        ("fp32", True, True, "fp32", "set in"),
        ("bf16", True, False, "bf16", "set in RUNNER.PRECISION$"),
        ("bf16", False, False, "bf16", "slow"),
        ("fp16", True, False, "fp16", "slow"),
    ],
)
def test_choice_of_precision(option, has_bf16, deterministic, name, reason):
    choice = choose_precision(option, CPU, has_bf16=has_bf16, deterministic=deterministic)
    assert choice.name == name
    assert re.search(reason, choice.reason)


@pytest.mark.parametrize(
    ("option", "message"), [("fp61", "Did you mean fp16"), ("bf16", "RUNNER.DETERMINISTIC needs fp32")]
)
def test_bad_precisions_are_named(option, message):
    with pytest.raises(UserError, match=message):
        choose_precision(option, CPU, has_bf16=True, deterministic=True)


@pytest.mark.parametrize(
    ("name", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)]
)
def test_autocast_and_an_exact_step(name, dtype):
    """Powers of two, which every format holds: the scaler of fp16 must leave no trace in the step."""
    precision, net = Precision(name, CPU), nn.Linear(2, 1, bias=False)
    net.weight.data.copy_(torch.tensor([[0.5, 2.0]]))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.25)
    for _ in range(2):  # contexts are not used up
        with precision.autocast():
            output = net(torch.tensor([[1.0, -2.0]]))
        assert output.dtype == dtype
    precision.backward(0.25 * output.float().sum())
    norm = precision.step(optimizer)
    assert norm.item() == pytest.approx(math.sqrt(5.0) / 4)
    assert net.weight.tolist() == [[0.4375, 2.125]]


def test_a_step_clips_unscaled_gradients():
    precision, net = Precision("fp16", CPU), nn.Linear(1, 1, bias=False)
    net.weight.data.fill_(1.0)
    precision.backward(net(torch.tensor([[4.0]])).sum())
    assert precision.step(torch.optim.SGD(net.parameters(), lr=1.0), clip_norm=0.5).item() == pytest.approx(4.0)
    assert net.weight.item() == pytest.approx(0.5, rel=1e-5)


def test_fp16_leaves_out_a_step_that_overflowed_and_lowers_the_scale():
    precision, net = Precision("fp16", CPU), nn.Linear(1, 1, bias=False)
    net.weight.data.fill_(1.0)
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    precision.backward(net(torch.tensor([[math.inf]])).sum())
    before = precision.state_dict()["scale"]
    assert not precision.step(optimizer).isfinite()
    assert net.weight.item() == 1.0
    assert precision.state_dict()["scale"] == before / 2
    resumed = Precision("fp16", CPU)
    resumed.load_state_dict(precision.state_dict())
    assert resumed.state_dict()["scale"] == before / 2
    full = Precision("fp32", CPU)
    full.load_state_dict(precision.state_dict())
    assert full.state_dict() == {}


def test_the_answer_about_denormals_is_true_for_every_thread():
    """In a fresh process whose threads run already, which torch may or may not reach."""
    program = """
import torch
from distinit_plugin.engine.precision import set_flush_denormals
torch.set_num_threads(2)
torch.ones(1 << 20).mul(2)
print(set_flush_denormals(True), bool((torch.full((1 << 20,), 1e-40) * 0.5 == 0).all()))
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    answer, truth = run.stdout.split()
    assert answer == truth
    assert (answer == "False") == ("denormals" in run.stderr)


def test_flushing_can_be_switched_off():
    if not torch.set_flush_denormal(True):
        pytest.skip("this CPU cannot flush denormals")
    try:
        assert not set_flush_denormals(False)
    finally:
        assert set_flush_denormals(True)


@pytest.mark.parametrize(
    ("option", "precision", "expected"),
    [
        ("auto", "fp32", torch.contiguous_format),
        ("auto", "bf16", torch.channels_last_3d),
        ("on", "fp32", torch.channels_last_3d),
        ("off", "fp16", torch.contiguous_format),
    ],
)
def test_choice_of_memory_format(option, precision, expected):
    assert choose_memory_format(option, precision) == expected


def test_bad_memory_format_is_named():
    with pytest.raises(UserError, match="Allowed: auto, on, off"):
        choose_memory_format("yes", "fp32")
