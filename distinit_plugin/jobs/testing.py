"""Multi-clip test of a checkpoint on labelled videos."""

from __future__ import annotations

import logging
from pathlib import Path

from distinit_plugin import build
from distinit_plugin.config.node import CfgNode
from distinit_plugin.engine import checkpoint, distributed, meters
from distinit_plugin.engine.evaluate import Evaluation, evaluate
from distinit_plugin.errors import UserError
from distinit_plugin.jobs.session import Session, open_session
from distinit_plugin.types import Split
from distinit_plugin.weights import load_weights

logger = logging.getLogger(__name__)

RESULTS_FOLDER = "test"


def test(cfg: CfgNode) -> Evaluation:
    """Test the checkpoint that a configuration names; results are also written to ``OUTPUT_DIR/test``.

    Raises:
        UserError: There is no checkpoint, or no labelled test video.
    """
    with open_session(cfg) as session:
        return test_in_session(session)


def test_in_session(session: Session) -> Evaluation:
    """The test loop on CORPUS.TEST."""
    cfg = session.cfg
    network = build.build_network(cfg, num_classes=cfg.MODEL.NUM_CLASSES)
    report = load_weights(network, weights_to_test(cfg), strict=True)
    logger.info("testing %s", report)
    evaluation = evaluate_corpus(session, network, "test")
    if distributed.is_main():
        evaluation.write(session.output_dir / RESULTS_FOLDER)
        metrics = evaluation.metrics()
        for bad in evaluation.bad:
            logger.warning("bad test video %s: %s", bad.path, bad.reason)
        stats = {"top1_acc": metrics["top1"], "top5_acc": metrics["top5"], "clip_top1_acc": metrics["clip_top1"]}
        meters.JsonLogger(session.output_dir).iteration(meters.final_test_stats(stats))
    return evaluation


def weights_to_test(cfg: CfgNode) -> Path:
    """TEST.CHECKPOINT_FILE_PATH, else the newest checkpoint of OUTPUT_DIR, else TRAIN.CHECKPOINT_FILE_PATH.

    Raises:
        UserError: There is none of them.
    """
    if cfg.TEST.CHECKPOINT_FILE_PATH:
        return Path(cfg.TEST.CHECKPOINT_FILE_PATH)
    folder = Path(cfg.OUTPUT_DIR) / checkpoint.FOLDER
    newest = checkpoint.newest_checkpoint(folder)
    if newest is not None:
        return newest
    if cfg.TRAIN.CHECKPOINT_FILE_PATH:
        return Path(cfg.TRAIN.CHECKPOINT_FILE_PATH)
    raise UserError(
        f"There is no checkpoint to test: {folder} holds none; train first or set TEST.CHECKPOINT_FILE_PATH."
    )


def evaluate_corpus(session: Session, network: build.Network, split: Split) -> Evaluation:
    """Score a network on labelled videos: one clip each for ``val``, the TEST node's clips for ``test``."""
    cfg = session.cfg
    videos = build.build_corpora(cfg, split, labeled=True)
    videos.check_labels(cfg.MODEL.NUM_CLASSES)
    specs = dict(network.view_specs(split))
    named = {f"student/{name}": spec for name, spec in specs.items()}
    dataset = build.build_dataset(cfg, videos, named, split)
    num_crops = cfg.TEST.NUM_SPATIAL_CROPS if split == "test" else 1
    records = list(videos)
    return evaluate(
        session.place(network),
        build.build_test_loader(cfg, dataset, num_crops=num_crops),
        finish=session.finisher(specs),
        paths=[record.path for record in records],
        labels=[record.label for record in records if record.label is not None],
        num_classes=cfg.MODEL.NUM_CLASSES,
        class_names=class_names_of(videos.class_names, cfg.MODEL.NUM_CLASSES),
        autocast=session.precision.autocast,
    )


def class_names_of(names: list[str] | None, num_classes: int) -> list[str]:
    """K names: those of the corpus, numbers where it has none."""
    known = names or []
    return [known[number] if number < len(known) else str(number) for number in range(num_classes)]
