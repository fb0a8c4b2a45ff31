"""What the ranks of a job do in tests: functions that ``launch`` can start in other processes."""

import os
import signal
import time

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from toys import SPEC, ToyNetwork, batch_of

from distinit_plugin import build
from distinit_plugin.config.defaults import get_cfg
from distinit_plugin.config.node import CfgNode
from distinit_plugin.data.bad import BadVideoLog
from distinit_plugin.data.views import finish_views
from distinit_plugin.engine import distributed, failure
from distinit_plugin.engine.optim import build_optimizer
from distinit_plugin.engine.precision import Precision
from distinit_plugin.engine.schedule import Schedule
from distinit_plugin.engine.signals import Agreement
from distinit_plugin.engine.state import RunState
from distinit_plugin.engine.train import Trainer
from distinit_plugin.engine.train_options import TrainOptions
from distinit_plugin.errors import UserError
from distinit_plugin.jobs.session import open_session
from distinit_plugin.jobs.testing import evaluate_corpus
from distinit_plugin.jobs.training import build_trainer
from distinit_plugin.losses import build_loss, entropy
from distinit_plugin.objectives import Objective, Term, build_adapter
from distinit_plugin.types import SampleKey

CPU = torch.device("cpu")
CLIPS = 12  # of one optimizer step, all ranks and micro-batches together
LIMITS = {"A": 1.05, "B": 0.9}  # nats; the teachers' entropies lie on both sides
CASES = [
    (gate, mean, accumulate, order)
    for gate in ("weight", "skip")
    for mean in ("all", "kept")
    for accumulate in (1, 3)
    for order in ("mixed", "one rank keeps none")
]


def ranks_cfg(ranks: int, **runner: object) -> CfgNode:
    """A configuration for ``launch``: some ranks on the CPU."""
    cfg = get_cfg()
    cfg.RUNNER.merge_from_other_cfg(CfgNode({"CPU_RANKS": ranks, **runner}))
    cfg.freeze()
    return cfg


# ------------------------------------------------------------------------------------------ one step, and its gradient
class FrozenBatchNorm(nn.BatchNorm3d):
    """Uses its running statistics whatever the mode."""

    def train(self, mode: bool = True) -> "FrozenBatchNorm":
        return super().train(False)


def two_teachers(gate: str, mean: str) -> Objective:
    """A student with frozen batch norm, two teachers with a gate each, float64."""
    student = ToyNetwork(0, seed=1)
    generator = torch.Generator().manual_seed(3)
    student.bn = FrozenBatchNorm(student.feature_dim)
    student.bn.running_mean.normal_(0, 0.1, generator=generator)
    teachers, adapters = {}, {}
    for name, seed in (("A", 5), ("B", 6)):
        teacher = ToyNetwork(3, seed=seed)
        teacher.fc.weight.data.mul_(6)
        teachers[name] = teacher.double().requires_grad_(False).eval()
        torch.manual_seed(seed)
        adapters[name] = build_adapter("linear", student, "features", teacher, "logits")
    losses = {"A": build_loss("soft_cross_entropy"), "B": build_loss("mse")}
    terms = [
        Term(name, "features", losses[name], weight, teacher=name, max_entropy=LIMITS[name])
        for name, weight in (("A", 1.0), ("B", 0.25))
    ]
    objective = Objective(student, terms, teachers, adapters, gate=gate, gate_mean=mean)
    objective.trainable.double()
    return objective


def finish(batch):
    names = ("student/rgb", "A/rgb", "B/rgb")
    views = finish_views(batch["views"], dict.fromkeys(names, SPEC), CPU)
    return {name: view.double() for name, view in views.items()}


def ordered_keys(order: str) -> list[SampleKey]:
    """The step's clips; in the second order the first half holds all that any gate keeps, the other half none."""
    keys = [SampleKey(0, position, position) for position in range(40)]
    if order == "mixed":
        return keys[:CLIPS]
    objective = two_teachers("weight", "all")
    views = finish(batch_of(keys))
    kept = torch.zeros(len(keys), dtype=torch.bool)
    for name, teacher in objective.teachers.items():
        kept |= entropy(teacher({"rgb": views[f"{name}/rgb"]}).logits) < LIMITS[name]
    some = [key for key, keep in zip(keys, kept, strict=True) if keep][: CLIPS // 2]
    none = [key for key, keep in zip(keys, kept, strict=True) if not keep][: CLIPS // 2]
    assert len(some) == len(none) == CLIPS // 2
    return some + none


def step_gradient(gate: str, mean: str, accumulate: int, order: str) -> dict[str, torch.Tensor]:
    """The gradient of one optimizer step of the real loop, on this rank's share of the clips."""
    objective = two_teachers(gate, mean)
    keys = ordered_keys(order)
    share = CLIPS // distributed.world_size()
    mine = keys[distributed.rank() * share :][:share]
    size = share // accumulate
    no_sync = {}
    if distributed.world_size() > 1:
        no_sync["no_sync"] = objective.wrap(DistributedDataParallel).no_sync
    state = RunState(
        objective,
        build_optimizer(objective.trainable, "sgd", lr=0.1),
        Schedule("cosine", base_lr=0.1, max_epoch=1),
        Precision("fp32", CPU),
        BadVideoLog(),
    )
    trainer = Trainer(
        state,
        train_batches=lambda epoch, step: [],
        steps_per_epoch=1,
        finish=finish,
        device=CPU,
        options=TrainOptions(accumulate=accumulate),
        **no_sync,
    )
    objective.trainable.train()
    trainer.run_step(iter([batch_of(mine[start : start + size]) for start in range(0, share, size)]))
    return gradients_of(objective)


def gradients_of(objective: Objective) -> dict[str, torch.Tensor]:
    return {name: parameter.grad.clone() for name, parameter in objective.trainable.named_parameters()}


def naive_gradient(mean: str, order: str) -> dict[str, torch.Tensor]:
    """DDP over each rank's own mean, as a plain loop would do it."""
    objective = two_teachers("weight", mean)
    share = CLIPS // distributed.world_size()
    objective.wrap(DistributedDataParallel)
    batch = batch_of(ordered_keys(order)[distributed.rank() * share :][:share])
    objective(finish(batch), {}).loss.backward()
    return gradients_of(objective)


def exact_gradients(cfg: CfgNode) -> dict:
    with open_session(cfg, log_to_folder=False):
        found = {case: step_gradient(*case) for case in CASES}
        for gradient in found.values():
            mine = torch.cat([tensor.flatten() for tensor in gradient.values()])
            assert all(torch.equal(mine, other) for other in distributed.gather_objects(mine))
        found |= {("naive", *how): naive_gradient(*how) for how in (("kept", "mixed"), ("kept", "one rank keeps none"))}
        return found


# --------------------------------------------------------------------------------------------------------- whole jobs
def train_all(cfgs: dict[str, CfgNode], _: CfgNode) -> dict:
    """Train by several configurations; by their names, what each rank holds afterwards."""
    return {name: train_and_compare(cfg) for name, cfg in cfgs.items()}


def train_and_compare(cfg: CfgNode) -> dict:
    with open_session(cfg) as session:
        trainer = build_trainer(session)
        trainer.train()
        trainable = trainer.state.objective.trainable
        return {
            "parameters": distributed.gather_objects({n: p.detach().clone() for n, p in trainable.named_parameters()}),
            "buffers": distributed.gather_objects({n: b.clone() for n, b in trainable.named_buffers()}),
            "wrapped": trainer.state.objective._forward.find_unused_parameters,
            "missed": without_search(trainer),
        }


def without_search(trainer: Trainer) -> str:
    """What DDP says to a second step when it does not look for parameters that get no gradient; empty: nothing."""
    objective = trainer.state.objective
    objective._forward = DistributedDataParallel(objective.trainable)
    try:
        for _ in range(2):
            with trainer.open_epoch() as batches:
                batch = next(batches)
                objective(trainer.finish(batch), batch["targets"]).loss.backward()
    except RuntimeError as error:
        return str(error)
    return ""


def evaluate_all(cfgs: list[CfgNode], _: CfgNode) -> list:
    """The tests of several configurations, by a network that all ranks draw alike."""
    found = []
    for cfg in cfgs:
        with open_session(cfg, log_to_folder=False) as session:
            torch.manual_seed(11)
            found.append(evaluate_corpus(session, build.build_network(cfg), "test", []))
    return found


# -------------------------------------------------------------------------------------------------- what ranks agree on
def sums_and_objects(cfg: CfgNode) -> list[tuple]:
    """What each rank knows of the others."""
    started = distributed.start("cpu")
    mine = torch.tensor([1.0 + distributed.rank(), 2.0])
    total = distributed.all_reduce_sum(mine)
    distributed.barrier()
    everyone = distributed.gather_objects({"rank": distributed.rank()})
    facts = (started, distributed.rank(), distributed.world_size(), distributed.is_main())
    found = distributed.gather_objects((*facts, mine.tolist(), total.tolist(), everyone))
    distributed.stop()
    return found


def agreed_step(cfg: CfgNode) -> list[tuple]:
    """The step at which each rank hears of the second one's signal, the answer, and how often it asked."""
    distributed.start("cpu")
    agreement, rank, calls = Agreement(), distributed.rank(), []
    gather = distributed.gather_objects
    distributed.gather_objects = lambda value: calls.append(1) or gather(value)
    for step in range(1, 400):
        time.sleep(0.005)
        number = 15 if rank == 1 and step >= 150 else 0
        answer = agreement.ask(step, signal_number=number, save=rank == 1, at_once=step == 7)
        if answer != (0, False):
            break
    found = gather((step, *answer, len(calls)))
    distributed.stop()
    return found


# ---------------------------------------------------------------------------------------------------- ranks that fail
def fails(cfg: CfgNode) -> None:
    """Rank 1 does what OUTPUT_DIR says while the others wait for it."""
    how = cfg.OUTPUT_DIR
    if how == "silent":
        failure.GRACE = 0.5  # nobody ends the rank that waits to be ended
    with open_session(cfg, log_to_folder=False):
        if distributed.rank() == 1:
            if how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            if how == "bug":
                raise ValueError("a mistake of ours")
            if how == "too large":
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
            if how == "silent":
                time.sleep(100)
            raise UserError("rank 1 does not like it")
        distributed.barrier()


def all_fail(cfg: CfgNode) -> None:
    raise UserError("nobody likes it")
