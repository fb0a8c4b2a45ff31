"""Validation and test of networks that classify persons' boxes: detections of all keyframes, and their frame-mAP."""

from __future__ import annotations

import logging

from distinit_plugin import build
from distinit_plugin.detection.keyframes import Keyframes
from distinit_plugin.engine import distributed, meters
from distinit_plugin.engine.detect import BoxEvaluation, detect
from distinit_plugin.engine.refinement import Refinement
from distinit_plugin.jobs.session import Session
from distinit_plugin.jobs.testing import RESULTS_FOLDER, weights_to_test
from distinit_plugin.types import Network, Split
from distinit_plugin.weights import load_weights

logger = logging.getLogger(__name__)


def test_keyframes_in_session(session: Session) -> BoxEvaluation:
    """Test the checkpoint that the configuration names; results are also written to ``OUTPUT_DIR/test``.

    Raises:
        UserError: There is no checkpoint, a file is missing, or too many keyframes are bad (the results are written).
    """
    network = build.build_network(session.cfg)
    logger.info("testing %s", load_weights(network, weights_to_test(session.cfg), strict=True))
    session.place(network)
    session.check_convolutions(network, network.view_specs("train"))
    evaluation = evaluate_keyframes(session, network, "test")
    if distributed.is_main():
        evaluation.write(session.output_dir / RESULTS_FOLDER)
        meters.JsonLogger(session.output_dir).iteration({"split": "test_final", "map": evaluation.result.map})
    session.refuse_bad_corpus(evaluation.num_videos, "test")  # what was found out is written by now
    return evaluation


def evaluate_keyframes(
    session: Session, network: Network, split: Split, judge: build.Judge | None = None
) -> BoxEvaluation:
    """Find persons' actions in the keyframes of a use.

    Args:
        session: Where and how.
        network: On the device.
        split: ``val`` or ``test``.
        judge: What detections are compared with, where it is read already.

    Raises:
        UserError: A file is missing or wrong, or no keyframe could be read.
    """
    cfg = session.cfg
    keyframes = session.corpora.of(split)
    assert isinstance(keyframes, Keyframes)
    judge = judge or build.build_judge(cfg, split)
    dataset = build.build_dataset(cfg, keyframes, build.view_specs(network, {}, split), split)
    loader = build.build_test_loader(cfg, dataset, progress=session.progress)
    refinement = _refinement(keyframes, judge) if cfg.ROI.REFINE_BOXES else None
    with session.read(loader, split) as batches:
        found = detect(
            session.place(network),
            batches,
            finish=session.finisher(dict(network.view_specs(split))),
            num_keyframes=len(keyframes),
            given=keyframes.boxes if cfg.ROI.PROPOSALS == "given" else None,
            selection=build.build_selection(cfg),
            device=session.device,
            refinement=refinement,
            autocast=session.precision.autocast,
        )
    table = found.detections.table(keyframes.videos, keyframes.video, keyframes.seconds)
    corrected = None if refinement is None else refinement.conclude()
    if corrected is not None:
        logger.info("%s", corrected)
    return BoxEvaluation(
        result=judge(table),
        evaluator=judge.evaluator,
        table=table,
        num_keyframes=len(keyframes),
        num_seen=int(found.seen.sum()),
        num_videos=keyframes.num_videos,
        bad=found.bad,
        corrected=corrected,
    )


def _refinement(keyframes: Keyframes, judge: build.Judge) -> Refinement:
    """Compares proposals with the annotated boxes of the same keyframes."""
    moments = [keyframes.moment(number) for number in range(len(keyframes))]
    annotated = Keyframes(keyframes.name, moments, judge.truth, keyframes.sources, has_actions=False)
    return Refinement(annotated.boxes)
