"""How good are frozen features? k-NN, a linear probe and the *Fixed* protocol on labelled corpora."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, dataclass, replace

from torch import Tensor

from distinit_plugin import build
from distinit_plugin.config.node import CfgNode
from distinit_plugin.engine import distributed
from distinit_plugin.engine.probes import Features, extract_features, knn_accuracy, linear_probe
from distinit_plugin.engine.results import Row, Value, terminal_table
from distinit_plugin.errors import UserError
from distinit_plugin.files import write_text
from distinit_plugin.jobs.fixed import train_fixed
from distinit_plugin.jobs.session import Session, open_session
from distinit_plugin.jobs.testing import check_same_classes, weights_to_test
from distinit_plugin.jobs.training import build_student
from distinit_plugin.types import Network, Split
from distinit_plugin.video.corpus import Mixture
from distinit_plugin.weights import load_weights

logger = logging.getLogger(__name__)

RESULTS_FILE = "probe.json"
USES: tuple[Split, Split] = ("train", "test")


@dataclass(frozen=True)
class ProbeResult:
    """Accuracies on the test videos, fractions.

    Attributes:
        knn: Of the k-NN vote.
        linear: Of the regression.
        num_train: Training videos.
        num_test: Test videos.
        fixed_clip_top1: Of single clips, by the classifier of the *Fixed* protocol; ``None`` where it was not trained.
        fixed_top1: Of videos.
        fixed_top5: Of videos.
    """

    knn: float
    linear: float
    num_train: int
    num_test: int
    fixed_clip_top1: float | None = None
    fixed_top1: float | None = None
    fixed_top5: float | None = None


def probe(cfg: CfgNode, *, neighbors: int = 20) -> ProbeResult:
    """Probe the trunk of a checkpoint; the trunk is not trained.

    With INIT.TRAINABLE classifier this is also the fast path of the *Fixed* protocol: a classifier is trained on the
    features with the configuration's schedule and optimizer.

    Args:
        cfg: Names the network, its checkpoint (TEST.CHECKPOINT_FILE_PATH, else as for the test) or INIT.INFLATE_FROM,
            and labelled CORPUS.TRAIN and CORPUS.TEST. With INIT.TRAINABLE classifier the weights are those that
            distinit run would start from.
        neighbors: k of the k-NN vote.

    Returns:
        All accuracies; also in ``OUTPUT_DIR/probe.json``.

    Raises:
        UserError: There is no checkpoint, or lists without labels or of different classes, or too many bad
            videos.
    """
    with open_session(cfg) as session:
        if distributed.world_size() > 1:
            raise UserError("A probe runs in one process: start it without torchrun.")
        fixed = cfg.INIT.TRAINABLE == "classifier"
        if fixed and not (cfg.TRAIN.CHECKPOINT_FILE_PATH or cfg.INIT.INFLATE_FROM):
            raise UserError(
                "INIT.TRAINABLE: classifier leaves the trunk as it is, and no weights are named for it, so it would be "
                "random. Set TRAIN.CHECKPOINT_FILE_PATH (TEST.CHECKPOINT_FILE_PATH is not read here), or "
                "INIT.INFLATE_FROM."
            )
        network = build_student(session) if fixed else _frozen(cfg)
        session.check_convolutions(network, network.view_specs("test"))
        train_videos, test_videos = (session.corpora.clips(use, labeled=True) for use in USES)
        check_same_classes(train_videos.class_names or [], test_videos.class_names or [], "test")
        if fixed:
            for videos in (train_videos, test_videos):
                videos.check_labels(cfg.MODEL.NUM_CLASSES)
        num_crops = cfg.TEST.NUM_SPATIAL_CROPS if fixed else 1
        train = features_of(session, network, train_videos, "train", keep_clips=fixed)
        test = features_of(session, network, test_videos, "test", keep_clips=fixed, num_crops=num_crops)
        train_labels, test_labels = _labels(train, "TRAIN"), _labels(test, "TEST")
        result = ProbeResult(
            knn=knn_accuracy(train.features, train_labels, test.features, test_labels, neighbors),
            linear=linear_probe(train.features, train_labels, test.features, test_labels),
            num_train=len(train_labels),
            num_test=len(test_labels),
        )
        if fixed:
            evaluation = train_fixed(
                session, network, (train_videos, train), (test_videos, test), _validation_features(session, network)
            )
            result = replace(
                result,
                fixed_clip_top1=evaluation.clip_accuracy,
                fixed_top1=evaluation.top_k(1),
                fixed_top5=evaluation.top_k(5),
            )
        _show(session, result, neighbors)
    return result


def _frozen(cfg: CfgNode) -> Network:
    """The network without a classifier, with its weights."""
    network = build.build_network(cfg, num_classes=0)
    if cfg.INIT.INFLATE_FROM:
        reports = build.initialize_network(cfg, network)
    else:
        reports = [load_weights(network, weights_to_test(cfg))]
        build.refuse_part_of_a_trunk(reports[0])
    for report in reports:
        logger.info("%s", report)
    return network


def _show(session: Session, result: ProbeResult, neighbors: int) -> None:
    """``probe.json`` and the table."""
    write_text(session.output_dir / RESULTS_FILE, json.dumps(asdict(result), indent=2) + "\n")
    columns: dict[str, Value] = {f"{neighbors}-NN": result.knn, "linear probe": result.linear}
    named = {"per clip": result.fixed_clip_top1, "top-1": result.fixed_top1, "top-5": result.fixed_top5}
    columns |= {f"Fixed, {name}": value for name, value in named.items() if value is not None}
    row = Row(session.output_dir.name, columns)
    session.log.console.print(terminal_table([row], title=f"{result.num_test} test videos, %", first="frozen features"))


def features_of(
    session: Session,
    network: Network,
    videos: Mixture,
    use: Split,
    *,
    keep_clips: bool = False,
    num_crops: int = 1,
    keep_index: bool = True,
) -> Features:
    """Features of the videos of a use, seen as in the test: uniform clips; one centred clip for validations.

    Args:
        session: Where and how.
        network: Any.
        videos: Of the use.
        use: In messages, and which clips.
        keep_clips: As for ``extract_features``.
        num_crops: Of each clip.
        keep_index: As for ``build_dataset``.

    Raises:
        UserError: Too many videos are bad.
    """
    cfg = session.cfg
    split: Split = "val" if use == "val" else "test"
    specs = dict(network.view_specs(split))
    dataset = build.build_dataset(cfg, videos, build.view_specs(network, {}, split), split, keep_index=keep_index)
    loader = build.build_test_loader(cfg, dataset, num_crops=num_crops, progress=session.progress)
    with session.read(loader, use) as batches:
        features = extract_features(
            session.place(network),
            batches,
            finish=session.finisher(specs),
            autocast=session.precision.autocast,
            keep_clips=keep_clips,
        )
    session.refuse_bad_corpus(len(videos), use)
    return features


def _validation_features(session: Session, network: Network) -> tuple[Mixture, Features] | None:
    """Of CORPUS.VAL, where there is one."""
    if not build.has_corpus(session.cfg, "val"):
        return None
    videos = session.corpora.clips("val", labeled=True)
    videos.check_labels(session.cfg.MODEL.NUM_CLASSES)
    return videos, features_of(session, network, videos, "val", keep_clips=True)


def _labels(features: Features, use: str) -> Tensor:
    if features.labels is None:
        raise UserError(f"CORPUS.{use} has no labels, and a probe needs them: name a labelled corpus there.")
    return features.labels
