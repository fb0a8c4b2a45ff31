"""The fast path of the *Fixed* protocol: features once, then the ordinary training and test of the last layer."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor, nn

from distinit_plugin import build
from distinit_plugin.data.features import FEATURES, FeatureClips
from distinit_plugin.data.loader import ClipLoader
from distinit_plugin.engine import checkpoint
from distinit_plugin.engine.evaluate import Evaluation, evaluate
from distinit_plugin.engine.fixed import FeatureClassifier
from distinit_plugin.engine.probes import Features
from distinit_plugin.engine.state import RunState
from distinit_plugin.engine.train import Trainer
from distinit_plugin.errors import UserError
from distinit_plugin.jobs.session import CHECK_BATCH, Session, example_views
from distinit_plugin.jobs.testing import class_names_of
from distinit_plugin.jobs.training import train_options
from distinit_plugin.types import Batch, Network
from distinit_plugin.video.corpus import Mixture

logger = logging.getLogger(__name__)

FOLDER = "fixed"
"""Below OUTPUT_DIR: the results of the test, and the network with its trained classifier."""
STUDENT_FILE = "student.pyth"


def train_fixed(
    session: Session,
    network: Network,
    train: tuple[Mixture, Features],
    test: tuple[Mixture, Features],
    val: tuple[Mixture, Features] | None,
) -> Evaluation:
    """Train the classifier of a frozen network on features, with the configuration's schedule and optimizer.

    Samples are drawn as in ``distinit run``; what is missing is augmentation: a clip is one of those of the test. The
    network gets the trained classifier and is saved with the results in ``OUTPUT_DIR/fixed``.

    Args:
        session: Where and how.
        network: On the device; its classifier alone is trainable.
        train: Videos and features, with those of each clip.
        test: The same.
        val: The same for validations; ``None``: there are none.

    Raises:
        UserError: Teachers are configured, or the network's logits do not follow from its features.
    """
    cfg = session.cfg
    if any(entry.LOSS_WEIGHT > 0 for entry in cfg.DISTILL.TEACHERS.values()):
        raise UserError("DISTILL.TEACHERS: features have no teachers. Set their LOSS_WEIGHT 0, or use distinit run.")
    videos, features = train
    views = example_views(network.view_specs("test"), CHECK_BATCH, session.device, session.memory_format)
    student = FeatureClassifier(network, cfg.MODEL.DROPOUT_RATE, views)
    objective = build.build_objective(cfg, student, {})
    objective.trainable.to(session.device)
    sampler = build.build_train_sampler(cfg, videos)
    paths = [videos[int(index)].path for index in features.indices]
    dataset = FeatureClips(videos, dict(zip(paths, features.clips, strict=True)), seed=cfg.RNG_SEED)

    def train_batches(epoch: int, start_step: int) -> ClipLoader:
        sampler.set_epoch(epoch, start_step)
        return build.build_train_loader(cfg, dataset, sampler, num_workers=0)

    state = RunState(
        objective=objective,
        optimizer=build.build_optimizer(cfg, objective.trainable),
        schedule=build.build_schedule(cfg),
        precision=session.precision,
        bad_log=session.bad_videos,
        class_names=videos.class_names or [],
    )
    trainer = Trainer(
        state,
        train_batches=train_batches,
        steps_per_epoch=sampler.steps_per_epoch,
        finish=_finisher(session, "student/"),
        device=session.device,
        options=train_options(cfg, videos),
        progress=session.progress,
        validate=_validation(session, student, *val) if val else None,
    )
    result = trainer.train()
    logger.info("trained the classifier %d steps in %.0f s", result.steps, result.seconds)
    evaluation = score(session, student, *test)
    student.write_back()
    folder = Path(cfg.OUTPUT_DIR) / FOLDER
    evaluation.write(folder)
    contents = {
        "epoch": state.epoch - 1,
        "model_state": network.bare_state_dict(),
        "cfg": cfg.dump(),
        "distinit": {"format": checkpoint.FORMAT_VERSION, "class_names": state.class_names},
    }
    checkpoint.save_checkpoint(folder / STUDENT_FILE, contents)
    return evaluation


def score(session: Session, student: nn.Module, videos: Mixture, features: Features) -> Evaluation:
    """The test of a classifier on the features of each clip."""
    cfg = session.cfg
    records = list(videos)
    return evaluate(
        student,
        features.batches(cfg.TEST.BATCH_SIZE),
        finish=_finisher(session),
        paths=[record.path for record in records],
        labels=[record.label for record in records if record.label is not None],
        num_classes=cfg.MODEL.NUM_CLASSES,
        class_names=class_names_of(videos.class_names, cfg.MODEL.NUM_CLASSES),
        autocast=session.precision.autocast,
    )


def _finisher(session: Session, prefix: str = "") -> Callable[[Batch], dict[str, Tensor]]:
    def finish(batch: Batch) -> dict[str, Tensor]:
        return {f"{prefix}{FEATURES}": batch["views"][FEATURES].to(session.device)}

    return finish


def _validation(
    session: Session, student: nn.Module, videos: Mixture, features: Features
) -> Callable[[], Mapping[str, float]]:
    def accuracy() -> dict[str, float]:
        found = score(session, student, videos, features)
        return {"loss": found.clip_loss, "top1": found.top_k(1), "top5": found.top_k(5)}

    return accuracy
