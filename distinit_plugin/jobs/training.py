"""Training from a configuration: the parts are built, the one loop runs."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from distinit_plugin import build
from distinit_plugin.config.node import CfgNode
from distinit_plugin.data.records import Records
from distinit_plugin.data.sampler import ClipSampler
from distinit_plugin.detection.rpn import PersonRpn
from distinit_plugin.engine import checkpoint, distributed, meters
from distinit_plugin.engine.evaluate import mean_terms
from distinit_plugin.engine.modes import set_train_mode
from distinit_plugin.engine.precise_bn import update_bn_statistics
from distinit_plugin.engine.profile import profile_training
from distinit_plugin.engine.progress import Advance
from distinit_plugin.engine.signals import StopSignals
from distinit_plugin.engine.state import Checkpointer, RunState, check_writable
from distinit_plugin.engine.train import Trainer
from distinit_plugin.engine.train_options import TrainOptions, TrainResult
from distinit_plugin.files import writing_alone
from distinit_plugin.jobs.keyframes import evaluate_keyframes
from distinit_plugin.jobs.proposals import measure_proposals
from distinit_plugin.jobs.resuming import refuse_other_run, resume
from distinit_plugin.jobs.session import Session, example_views
from distinit_plugin.jobs.tensorboard import Board, open_writer
from distinit_plugin.jobs.testing import evaluate_corpus
from distinit_plugin.objectives import Objective
from distinit_plugin.types import Batch, Network, ViewSpec

logger = logging.getLogger(__name__)


def train_in_session(session: Session, stop: StopSignals | None = None) -> TrainResult:
    """Build everything, continue where an earlier run stopped, train to the end.

    Checkpoints and logs go to OUTPUT_DIR; whoever calls this holds ``training_alone``.

    Args:
        session: From ``open_session``.
        stop: Entered by the caller; a signal that it catches ends the training with its state saved.

    Raises:
        UserError: Anything that the user can put right.
        Stopped: A signal came.
    """
    return train_objective(session, stop)[0]


def train_objective(session: Session, stop: StopSignals | None = None) -> tuple[TrainResult, Objective]:
    """As ``train_in_session``; also the objective as it is after the last step, for what needs its new heads."""
    refuse_other_run(session)
    trainer = build_trainer(session, stop=stop)
    try:
        result = trainer.train()
        if isinstance(trainer.scalars, Board):
            trainer.scalars.draw()
    finally:
        trainer.close()
    distributed.barrier()  # the main rank has written the last checkpoint, which all ranks may test now
    return result, trainer.state.objective


def training_alone(session: Session) -> AbstractContextManager[None]:
    """Around a training: the same job may be started twice, or queued again while it still runs.

    Raises:
        UserError: Another process trains in OUTPUT_DIR, or nothing can be written there. Nothing has been touched.
    """
    if not distributed.is_main():
        return nullcontext()
    check_writable(session.output_dir)
    return writing_alone(session.output_dir / checkpoint.FOLDER, "this training's checkpoints", with_forked=False)


def dry_run(session: Session) -> None:
    """Print what the job would cost: shapes, parameters, GMACs, memory, clips/s, duration. Nothing is written."""
    report = profile_training(build_trainer(session, saves=False))
    if distributed.is_main():
        session.log.console.print(str(report), soft_wrap=True)


def build_trainer(session: Session, *, saves: bool = True, stop: StopSignals | None = None) -> Trainer:
    """The trainer of a configuration, at the point where an earlier run stopped.

    Args:
        session: From ``open_session``.
        saves: Write checkpoints and logs, and continue from those that are there.
        stop: As in ``train_in_session``.
    """
    cfg = session.cfg
    student = build_student(session)
    teachers = build.build_teachers(cfg)
    for teacher in teachers.values():
        session.place(teacher)
    objective = build.build_objective(cfg, student, teachers)
    objective.trainable.to(session.device)
    session.check_convolutions(objective.trainable, student.view_specs("train"))
    specs = build.view_specs(student, teachers, "train")
    videos = session.corpora.of("train")
    if cfg.ACTION.LOSS_WEIGHT > 0:
        videos.check_labels(cfg.MODEL.NUM_CLASSES)
    targets = build.build_targets(cfg, videos, "train", next(iter(student.view_specs("train").values())))
    dataset = build.build_dataset(cfg, videos, specs, "train", keep_index=saves, targets=targets)
    sampler = build.build_train_sampler(cfg, videos)

    def train_batches(epoch: int, start_step: int) -> Iterable[Batch]:
        sampler.set_epoch(epoch, start_step)
        dataset.remember(session.bad_videos.videos())  # before workers are forked: none of them opens these files again
        return build.build_train_loader(cfg, dataset, sampler)

    state = RunState(
        objective=objective,
        optimizer=build.build_optimizer(cfg, objective.trainable),
        schedule=build.build_schedule(cfg),
        precision=session.precision,
        bad_log=session.bad_videos,
        config_text=cfg.dump(),
        class_names=videos.class_names or [],
        corpus_sizes=list(videos.sizes),
        corpus_digests={
            use: list(session.corpora.of(split).digests)
            for split, use in build.CORPUS_KEYS.items()
            if split != "test" and build.has_corpus(cfg, split)
        },
    )
    if saves:
        resume(session, state, sampler.steps_per_epoch)
    _log_model(session, objective)
    board = _board(session, state, student, sampler.steps_per_epoch) if saves else None
    no_sync = _wrap(session, objective, student.view_specs("train"))
    return Trainer(
        state,
        train_batches=train_batches,
        steps_per_epoch=sampler.steps_per_epoch,
        finish=session.finisher(specs),
        device=session.device,
        options=train_options(cfg, videos),
        checkpointer=_checkpointer(session) if saves else None,
        json_logger=meters.JsonLogger(session.output_dir if saves else None, enabled=distributed.is_main()),
        progress=session.progress,
        validate=_validation(session, objective, student, teachers, state.class_names, board),
        precise_bn=_precise_bn(session, state, videos, student) if cfg.BN.USE_PRECISE_STATS else None,
        scalars=board,
        no_sync=no_sync,
        timers=session.timers(specs),
        stop=stop,
    )


def build_student(session: Session) -> Network:
    """The student with its initial weights, on the device; what INIT.TRAINABLE does not name is frozen."""
    cfg = session.cfg
    student = build.build_network(cfg)
    assert isinstance(student, nn.Module)
    if cfg.INIT.TRAINABLE != "all":
        student.requires_grad_(False)
    if cfg.INIT.TRAINABLE == "classifier":
        student.reset_classifier(cfg.MODEL.NUM_CLASSES)  # the fresh one is the only part that trains
    for report in build.initialize_network(cfg, student):
        logger.info("%s", report)
    session.place(student)
    return student


def _checkpointer(session: Session) -> Checkpointer:
    runner = session.cfg.RUNNER
    return Checkpointer(session.output_dir, keep=runner.KEEP_CHECKPOINTS, resume_minutes=runner.RESUME_MINUTES)


def train_options(cfg: CfgNode, videos: Records) -> TrainOptions:
    """What the configuration says about the loop."""
    return TrainOptions(
        accumulate=cfg.RUNNER.ACCUMULATE,
        log_period=cfg.LOG_PERIOD,
        eval_period=cfg.TRAIN.EVAL_PERIOD,
        checkpoint_period=cfg.TRAIN.CHECKPOINT_PERIOD,
        clip_value=cfg.SOLVER.CLIP_GRAD_VAL,
        clip_norm=cfg.SOLVER.CLIP_GRAD_L2NORM,
        frozen_trunk=cfg.INIT.TRAINABLE != "all",
        frozen_norm=cfg.MODEL.FROZEN_BN,
        corpus_size=videos.num_videos,
        max_bad_fraction=cfg.CORPUS.MAX_BAD_FRACTION,
    )


def _log_model(session: Session, objective: Objective) -> None:
    if not session.cfg.LOG_MODEL_INFO:
        return
    student = objective.trainable.student
    total = sum(parameter.numel() for parameter in student.parameters())
    trained = sum(parameter.numel() for parameter in objective.trainable.parameters() if parameter.requires_grad)
    terms = ", ".join(f"{term.name} × {term.weight:g}" for term in objective.terms)
    name = session.cfg.MODEL.MODEL_NAME
    logger.info(
        "student %s: %s parameters; %s train (heads included); terms: %s", name, f"{total:,}", f"{trained:,}", terms
    )


def _wrap(
    session: Session, objective: Objective, specs: Mapping[str, ViewSpec]
) -> Callable[[], AbstractContextManager[Any]]:
    """Synchronise batch norm, compile and distribute the trainable where asked; returns DDP's ``no_sync``.

    Args:
        session: Where and how.
        objective: On the device.
        specs: The student's training views by its own names.
    """
    if session.cfg.BN.NORM_TYPE == "sync_batchnorm" and distributed.world_size() > 1:
        nn.SyncBatchNorm.convert_sync_batchnorm(objective.trainable)  # in place, with the same parameters and names
    if session.cfg.RUNNER.COMPILE:
        objective.wrap(lambda module: torch.compile(module))  # type: ignore[arg-type, return-value]
    if distributed.world_size() == 1:
        return nullcontext
    views = example_views(specs, 1, session.device, session.memory_format)
    with session.precision.autocast():
        unused = objective.trainable.parameters_without_gradient(views)
    if unused:
        logger.info("no term reaches %d parameters (%s, …): they stay as they are", len(unused), unused[0])
    devices = [session.device.index] if session.device.type == "cuda" else None
    wrapped = objective.wrap(
        lambda module: DistributedDataParallel(
            module, device_ids=devices, find_unused_parameters=bool(unused), gradient_as_bucket_view=True
        )
    )
    assert isinstance(wrapped, DistributedDataParallel)
    return wrapped.no_sync


def _validation(
    session: Session,
    objective: Objective,
    student: Network,
    teachers: Mapping[str, Network],
    known_classes: list[str],
    board: Board | None,
) -> Callable[[], Mapping[str, float]] | None:
    """Accuracy of the classifier where there is one, else the objective's terms; ``None`` without CORPUS.VAL."""
    cfg = session.cfg
    if not build.has_corpus(cfg, "val"):
        return None
    if isinstance(student, PersonRpn):

        def proposals() -> dict[str, float]:
            distributed.share_buffers(objective.trainable)
            figures = measure_proposals(session, student, "val")
            session.refuse_bad_corpus(session.corpora.of("val").num_videos, "val")
            return figures

        return proposals
    if cfg.DETECTION.ENABLE:
        return _keyframe_validation(session, objective, student, board)
    if build.needs_own_logits(cfg) and not teachers:

        def accuracy() -> dict[str, float]:
            distributed.share_buffers(objective.trainable)
            evaluation = evaluate_corpus(session, student, "val", known_classes)
            session.refuse_bad_corpus(len(evaluation.paths), "val")
            if board is not None:
                board.draw(evaluation)
            return {"loss": evaluation.clip_loss, "top1": evaluation.top_k(1), "top5": evaluation.top_k(5)}

        return accuracy
    specs = build.view_specs(student, teachers, "val")
    videos = session.corpora.of("val")
    targets = build.build_targets(cfg, videos, "val", next(iter(student.view_specs("val").values())))
    loader = build.build_test_loader(cfg, build.build_dataset(cfg, videos, specs, "val", targets=targets))
    finish = session.finisher(specs)

    def terms() -> dict[str, float]:
        distributed.share_buffers(objective.trainable)
        with session.read(loader, "val") as batches:
            means = mean_terms(
                objective, batches, finish=finish, device=session.device, autocast=session.precision.autocast
            )
        session.refuse_bad_corpus(videos.num_videos, "val")
        if board is not None:
            board.draw()
        return means

    return terms


def _keyframe_validation(
    session: Session, objective: Objective, student: Network, board: Board | None
) -> Callable[[], Mapping[str, float]]:
    """Frame-mAP; the files are read now, so that nothing is wrong with them after an epoch."""
    judge = build.build_judge(session.cfg, "val")

    def frame_map() -> dict[str, float]:
        distributed.share_buffers(objective.trainable)
        evaluation = evaluate_keyframes(session, student, "val", judge)
        session.refuse_bad_corpus(evaluation.num_videos, "val")
        if board is not None:
            board.draw()
        return {"map": evaluation.result.map}

    return frame_map


def _precise_bn(session: Session, state: RunState, videos: Records, student: Network) -> Callable[[], None]:
    """Recompute BN statistics on the first training clips of the coming epoch."""
    cfg = session.cfg
    specs = dict(student.view_specs("train"))
    dataset = build.build_dataset(cfg, videos, build.view_specs(student, {}, "train"), "train")
    sampler: ClipSampler = build.build_train_sampler(cfg, videos)
    finish = session.finisher(specs)

    def views(advance: Advance) -> Iterator[dict[str, Tensor]]:
        sampler.set_epoch(state.epoch + 1)
        for number, batch in enumerate(build.build_train_loader(cfg, dataset, sampler), start=1):
            yield finish(batch)
            advance(number)

    def update() -> None:
        set_train_mode(state.objective.trainable, cfg.INIT.TRAINABLE != "all")
        with session.progress.work("BN statistics", cfg.BN.NUM_BATCHES_PRECISE) as advance:
            used = update_bn_statistics(
                state.objective.trainable.student,
                views(advance),
                cfg.BN.NUM_BATCHES_PRECISE,
                autocast=session.precision.autocast,
                all_reduce_sum=distributed.all_reduce_sum,
            )
        logger.info("BN statistics recomputed on %d batches", used)

    return update


def _board(session: Session, state: RunState, student: Network, steps_per_epoch: int) -> Board | None:
    """TensorBoard's writer, when it is asked for; what an earlier process wrote after ``state`` is hidden."""

    def done() -> int:
        return state.epoch * steps_per_epoch + state.step_in_epoch

    writer = open_writer(session, purge_step=done() + 1 if done() else None)
    return None if writer is None else Board(writer, session.output_dir.name, student, done)
