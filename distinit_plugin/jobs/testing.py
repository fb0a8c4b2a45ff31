"""Multi-clip test of a checkpoint on labelled videos."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from distinit_plugin import build
from distinit_plugin.config.node import CfgNode
from distinit_plugin.engine import checkpoint, distributed, meters
from distinit_plugin.engine.evaluate import Evaluation, evaluate
from distinit_plugin.errors import UserError, WeightsError
from distinit_plugin.jobs.session import Session
from distinit_plugin.types import Network, Split
from distinit_plugin.weights import load_weights

logger = logging.getLogger(__name__)

RESULTS_FOLDER = "test"


def test_in_session(session: Session) -> Evaluation:
    """Test the checkpoint that the configuration names on CORPUS.TEST; results are also written to ``OUTPUT_DIR/test``.

    Raises:
        UserError: There is no checkpoint, no labelled test video, or too many bad ones (the results are written).
    """
    cfg = session.cfg
    network = build.build_network(cfg, num_classes=cfg.MODEL.NUM_CLASSES)
    path = weights_to_test(cfg)
    logger.info("testing %s", load_weights(network, path, strict=True))
    session.place(network)
    session.check_convolutions(network, network.view_specs("train"))
    evaluation = evaluate_corpus(session, network, "test", saved_class_names(path))
    if distributed.is_main():
        evaluation.write(session.output_dir / RESULTS_FOLDER)
        metrics = evaluation.metrics()
        stats = {"top1_acc": metrics["top1"], "top5_acc": metrics["top5"], "clip_top1_acc": metrics["clip_top1"]}
        meters.JsonLogger(session.output_dir).iteration(meters.final_test_stats(stats))
    session.refuse_bad_corpus(len(evaluation.paths), "test")  # what was found out is written by now
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


def evaluate_corpus(session: Session, network: Network, split: Split, known_classes: Sequence[str]) -> Evaluation:
    """Score a network on labelled videos: one clip each for ``val``, the TEST node's clips for ``test``.

    Args:
        session: Where and how.
        network: On the device.
        split: Which corpora.
        known_classes: Names of the network's classes; empty: not known.

    Raises:
        UserError: The corpora number their classes in another way, or a label is out of range.
    """
    cfg = session.cfg
    videos = session.corpora.clips(split, labeled=True)
    check_same_classes(known_classes, videos.class_names or [], split)
    videos.check_labels(cfg.MODEL.NUM_CLASSES)
    specs = dict(network.view_specs(split))
    dataset = build.build_dataset(cfg, videos, build.view_specs(network, {}, split), split)
    num_crops = cfg.TEST.NUM_SPATIAL_CROPS if split == "test" else 1
    records = list(videos)
    loader = build.build_test_loader(cfg, dataset, num_crops=num_crops, progress=session.progress)
    with session.read(loader, split) as batches:
        return evaluate(
            session.place(network),
            batches,
            finish=session.finisher(specs),
            paths=[record.path for record in records],
            labels=[record.label for record in records if record.label is not None],
            num_classes=cfg.MODEL.NUM_CLASSES,
            class_names=class_names_of(videos.class_names, cfg.MODEL.NUM_CLASSES),
            autocast=session.precision.autocast,
        )


def saved_class_names(path: str | Path) -> list[str]:
    """The names of the classes that a checkpoint of this program was trained on; empty where they are not known."""
    try:
        own = checkpoint.load_checkpoint(path).get("distinit", {})
    except WeightsError:  # weights of another layout
        return []
    return list(own.get("class_names", []))


def check_same_classes(known: Sequence[str], found: Sequence[str], split: Split) -> None:
    """Refuse corpora whose label numbers mean other classes (a test folder that lacks one class, for example).

    Raises:
        UserError: Both lists of names are known and differ.
    """
    if not known or not found or list(known) == list(found):
        return
    place = next((i for i, (a, b) in enumerate(zip(known, found, strict=False)) if a != b), min(len(known), len(found)))
    names = [names[place] if place < len(names) else "missing" for names in (known, found)]
    raise UserError(
        f"CORPUS.{build.CORPUS_KEYS[split]}: its classes are not those of the training: class {place} was "
        f"'{names[0]}' and is '{names[1]}' here ({len(known)} and {len(found)} classes). Give all corpora the same "
        "CLASSES file."
    )


def class_names_of(names: list[str] | None, num_classes: int) -> list[str]:
    """K names: those of the corpus, numbers where it has none."""
    known = names or []
    return [known[number] if number < len(known) else str(number) for number in range(num_classes)]
