"""How good are frozen features? k-NN and a linear probe on labelled corpora."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, dataclass

from torch import Tensor

from distinit_plugin import build
from distinit_plugin.config.node import CfgNode
from distinit_plugin.engine import distributed
from distinit_plugin.engine.probes import Features, extract_features, knn_accuracy, linear_probe
from distinit_plugin.engine.results import Row, terminal_table
from distinit_plugin.errors import UserError
from distinit_plugin.files import write_text
from distinit_plugin.jobs.session import Session, open_session
from distinit_plugin.jobs.testing import check_same_classes, weights_to_test
from distinit_plugin.types import Network, Split
from distinit_plugin.video.corpus import Mixture
from distinit_plugin.weights import load_weights

logger = logging.getLogger(__name__)

RESULTS_FILE = "probe.json"
USES: tuple[Split, Split] = ("train", "test")


@dataclass(frozen=True)
class ProbeResult:
    """Accuracies on the test videos, fractions."""

    knn: float
    linear: float
    num_train: int
    num_test: int


def probe(cfg: CfgNode, *, neighbors: int = 20) -> ProbeResult:
    """Probe the trunk of a checkpoint; the network is not trained.

    Args:
        cfg: Names the network, its checkpoint (TEST.CHECKPOINT_FILE_PATH, else as for the test) or INIT.INFLATE_FROM,
            and labelled CORPUS.TRAIN and CORPUS.TEST.
        neighbors: k of the k-NN vote.

    Returns:
        Both accuracies; also in ``OUTPUT_DIR/probe.json``.

    Raises:
        UserError: There is no checkpoint, or lists without labels or of different classes, or too many bad
            videos.
    """
    with open_session(cfg) as session:
        if distributed.world_size() > 1:
            raise UserError("A probe runs in one process: start it without torchrun.")
        network = build.build_network(cfg, num_classes=0)
        if cfg.INIT.INFLATE_FROM:
            reports = build.initialize_network(cfg, network)
        else:
            reports = [load_weights(network, weights_to_test(cfg))]
        for report in reports:
            logger.info("%s", report)
        session.check_convolutions(network, network.view_specs("test"))
        train_videos, test_videos = (session.corpora.of(use, labeled=True) for use in USES)
        check_same_classes(train_videos.class_names or [], test_videos.class_names or [], "test")
        train_features, train_labels = _labelled(_features(session, network, train_videos, "train"), "TRAIN")
        test_features, test_labels = _labelled(_features(session, network, test_videos, "test"), "TEST")
        result = ProbeResult(
            knn=knn_accuracy(train_features, train_labels, test_features, test_labels, neighbors),
            linear=linear_probe(train_features, train_labels, test_features, test_labels),
            num_train=len(train_labels),
            num_test=len(test_labels),
        )
        text = json.dumps(asdict(result), indent=2) + "\n"
        write_text(session.output_dir / RESULTS_FILE, text)
        row = Row(session.output_dir.name, {f"{neighbors}-NN": result.knn, "linear probe": result.linear})
        session.log.console.print(
            terminal_table([row], title=f"{result.num_test} test videos, %", first="frozen features")
        )
    return result


def _features(session: Session, network: Network, videos: Mixture, use: Split) -> Features:
    """Features of the videos of a use, seen as in the test: centre crop, uniform clips."""
    cfg = session.cfg
    specs = dict(network.view_specs("test"))
    dataset = build.build_dataset(cfg, videos, build.view_specs(network, {}, "test"), "test")
    with session.read(build.build_test_loader(cfg, dataset, progress=session.progress), use) as batches:
        features = extract_features(
            session.place(network), batches, finish=session.finisher(specs), autocast=session.precision.autocast
        )
    session.refuse_bad_corpus(len(videos), use)
    return features


def _labelled(features: Features, use: str) -> tuple[Tensor, Tensor]:
    if features.labels is None:
        raise UserError(f"CORPUS.{use} has no labels, and a probe needs them: name a labelled corpus there.")
    return features.features, features.labels
