"""Validation and test of a network that finds persons in keyframes."""

from __future__ import annotations

import json
import logging
import math

from distinit_plugin import build
from distinit_plugin.engine import distributed, meters
from distinit_plugin.engine.propose import evaluate_proposals
from distinit_plugin.files import write_text
from distinit_plugin.jobs.session import Session
from distinit_plugin.jobs.testing import RESULTS_FOLDER, weights_to_test
from distinit_plugin.types import Network, Split
from distinit_plugin.weights import load_weights

logger = logging.getLogger(__name__)


def test_proposals_in_session(session: Session) -> dict[str, float]:
    """Test the checkpoint that the configuration names; the figures are also written to ``OUTPUT_DIR/test``.

    Raises:
        UserError: There is no checkpoint, a file is missing, or too many keyframes are bad (the results are written).
    """
    network = build.build_network(session.cfg)
    logger.info("testing %s", load_weights(network, weights_to_test(session.cfg), strict=True))
    figures = measure_proposals(session, network, "test")
    if distributed.is_main():
        known = {name: None if math.isnan(value) else value for name, value in figures.items()}
        write_text(session.output_dir / RESULTS_FOLDER / "metrics.json", json.dumps(known, indent=2) + "\n")
        meters.JsonLogger(session.output_dir).iteration({"split": "test_final", **known})
    session.refuse_bad_corpus(session.corpora.of("test").num_videos, "test")  # what was found out is written by now
    return figures


def measure_proposals(session: Session, network: Network, split: Split) -> dict[str, float]:
    """How well annotated persons are found, see ``engine.propose``.

    Args:
        session: Where and how.
        network: A ``PersonRpn``.
        split: ``val`` or ``test``.

    Raises:
        UserError: A file is missing or wrong, or no keyframe could be read.
    """
    cfg = session.cfg
    dataset = build.build_dataset(cfg, session.corpora.of(split), build.view_specs(network, {}, split), split)
    loader = build.build_test_loader(cfg, dataset, progress=session.progress)
    with session.read(loader, split) as batches:
        return evaluate_proposals(
            session.place(network),
            batches,
            finish=session.finisher(dict(network.view_specs(split))),
            device=session.device,
            autocast=session.precision.autocast,
        )
