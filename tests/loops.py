"""A training loop over a toy network, and the same as a plain PyTorch loop."""

import math
from pathlib import Path

import torch
from torch.nn import functional as F
from toys import SPEC, ToyNetwork, batch_of

from distinit_plugin.data.bad import BadVideoLog
from distinit_plugin.data.views import finish_views
from distinit_plugin.engine.optim import build_optimizer
from distinit_plugin.engine.precision import Precision
from distinit_plugin.engine.progress import NoProgress
from distinit_plugin.engine.schedule import Schedule
from distinit_plugin.engine.state import Checkpointer, RunState
from distinit_plugin.engine.train import Trainer
from distinit_plugin.engine.train_options import TrainOptions
from distinit_plugin.losses import build_loss
from distinit_plugin.objectives import Objective, Term, build_adapter
from distinit_plugin.types import SampleKey

CPU = torch.device("cpu")
BATCH, STEPS = 4, 4
GATE = 1.05  # nats; the toy teacher's entropies lie on both sides


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
