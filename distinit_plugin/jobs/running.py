"""Train, then test, then show the results: the job of ``distinit run``."""

from __future__ import annotations

import logging
import os
from contextlib import nullcontext
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from distinit_plugin.build import has_corpus, needs_own_logits
from distinit_plugin.config.node import CfgNode
from distinit_plugin.config.rules import PERSON_RPN
from distinit_plugin.engine import distributed
from distinit_plugin.engine.curves import curves_of, plot_curves
from distinit_plugin.engine.detect import BoxEvaluation
from distinit_plugin.engine.evaluate import Evaluation
from distinit_plugin.engine.logs import read_log
from distinit_plugin.engine.results import Row, terminal_table
from distinit_plugin.engine.signals import StopSignals
from distinit_plugin.engine.train_options import TrainResult
from distinit_plugin.errors import UserError
from distinit_plugin.jobs.corpora import Corpora
from distinit_plugin.jobs.keyframes import test_keyframes_in_session
from distinit_plugin.jobs.launching import launch, starts_ranks
from distinit_plugin.jobs.preflight import check_job
from distinit_plugin.jobs.proposals import test_proposals_in_session
from distinit_plugin.jobs.recording import recorded
from distinit_plugin.jobs.session import Session, open_session
from distinit_plugin.jobs.tensorboard import note_test
from distinit_plugin.jobs.testing import test_in_session
from distinit_plugin.jobs.training import dry_run, train_in_session, training_alone
from distinit_plugin.video.isolated import end_with_parent

logger = logging.getLogger(__name__)

CURVES_FILE = "curves.png"

SHOWN_CLASSES = 20
"""Classes of the printed table."""


@dataclass(frozen=True)
class RunResult:
    """What came out; ``None`` for a part that the configuration switches off.

    Attributes:
        training: How the training ended.
        evaluation: The test of whole clips.
        boxes: The test of persons' boxes in keyframes, in its place with DETECTION.ENABLE.
        proposals: The test of a network that finds persons, see ``engine.propose``.
    """

    training: TrainResult | None
    evaluation: Evaluation | None
    boxes: BoxEvaluation | None = None
    proposals: dict[str, float] | None = None


def run(cfg: CfgNode, *, console: Console | None = None) -> RunResult:
    """Run everything that a configuration asks for.

    With NUM_GPUS, RUNNER.CPU_RANKS or NUM_SHARDS above 1 one process per rank is started for it, unless this process
    is such a rank already (torchrun).

    Args:
        cfg: From ``load_cfg`` or ``get_cfg``.
        console: Where to print; the standard output when ``None``, and always in processes that are started.

    Raises:
        UserError: Anything that the user can put right; everything that can be known before the first step at once.
        Stopped: SIGTERM or SIGUSR1 came; what is needed to continue is saved.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:  # torchrun that is killed would leave its ranks at work
        end_with_parent(os.getppid())
    corpora = Corpora(cfg)
    check_job(cfg, corpora)
    if starts_ranks(cfg):
        result: RunResult = launch(cfg, _run_here)
        return result
    return _run_here(cfg, corpora=corpora, console=console)


def _run_here(cfg: CfgNode, *, corpora: Corpora | None = None, console: Console | None = None) -> RunResult:
    """The whole job, in this process; ``corpora``: of the configuration, when they are read already."""
    with open_session(cfg, log_to_folder=not cfg.RUNNER.DRY_RUN, console=console, corpora=corpora) as session:
        if cfg.RUNNER.DRY_RUN:
            dry_run(session)
            return RunResult(None, None)
        alone = training_alone(session) if cfg.TRAIN.ENABLE else nullcontext()
        with alone, recorded(session) as recorder, StopSignals() as stop:
            training = train_in_session(session, stop) if cfg.TRAIN.ENABLE else None
            if training is not None:
                recorder.trained(training)
            tests = cfg.TEST.ENABLE and _can_test(cfg)
            evaluation = test_in_session(session) if tests and not cfg.DETECTION.ENABLE else None
            finds = cfg.MODEL.MODEL_NAME == PERSON_RPN
            boxes = test_keyframes_in_session(session) if tests and cfg.DETECTION.ENABLE and not finds else None
            proposals = test_proposals_in_session(session) if tests and finds else None
            result = RunResult(training, evaluation, boxes, proposals)
            _show(session, result)
    return result


def _can_test(cfg: CfgNode) -> bool:
    """A pre-training without labels has nothing to test; a test that stands alone must be possible."""
    if (needs_own_logits(cfg) or cfg.MODEL.MODEL_NAME == PERSON_RPN) and has_corpus(cfg, "test"):
        return True
    if not cfg.TRAIN.ENABLE:
        raise UserError(
            "There is nothing to test: name labelled videos below CORPUS.TEST and set ACTION.LOSS_WEIGHT 1, which "
            "gives the network its classifier."
        )
    logger.info("no test: there are no labelled test videos (CORPUS.TEST) or no classifier (ACTION.LOSS_WEIGHT 0)")
    return False


def _show(session: Session, result: RunResult) -> None:
    """The picture of the curves and the table of results."""
    if not distributed.is_main():
        return
    training, evaluation = result.training, result.evaluation
    if training is not None and curves_of(read_log(session.output_dir)) is None:
        logger.info("nothing was left to train: %d steps were done before this run", training.steps)
    elif training is not None:
        plot_curves({session.output_dir.name: session.output_dir}, session.output_dir / CURVES_FILE)
        logger.info(
            "trained %d steps in %.0f s (data wait %.1f %%); curves: %s",
            training.steps,
            training.seconds,
            100 * training.wait_share,
            session.output_dir / CURVES_FILE,
        )
    if evaluation is not None:
        note_test(session, evaluation, 0 if training is None else training.steps)
        metrics = evaluation.metrics()
        row = Row(
            session.output_dir.name,
            {"per clip": metrics["clip_top1"], "top-1": metrics["top1"], "top-5": metrics["top5"]},
        )
        session.log.console.print(terminal_table([row], title=f"{metrics['num_videos']} test videos, %", first="run"))
        session.log.console.print(_class_table(metrics["per_class"]))
    if result.boxes is not None:
        metrics = result.boxes.metrics()
        row = Row(session.output_dir.name, {"frame-mAP": result.boxes.result.map})
        title = f"{metrics['num_keyframes']} test keyframes, {metrics['evaluator']} rules, %"
        session.log.console.print(terminal_table([row], title=title, first="run"))
        session.log.console.print(_class_table(metrics["per_class"], "AP"))
    if result.proposals is not None:
        shares = {name: value for name, value in result.proposals.items() if name not in ("loss", "proposals")}
        title = f"annotated persons that {result.proposals['proposals']:.0f} proposals per keyframe find, %"
        session.log.console.print(terminal_table([Row(session.output_dir.name, shares)], title=title, first="run"))


def _class_table(per_class: dict[str, float | None], value: str = "top-1") -> Table:
    """The value of every class, the best first; of many classes only both ends (``metrics.json`` has all)."""
    known = sorted(((number, name) for name, number in per_class.items() if number is not None), reverse=True)
    shown = known if len(known) <= SHOWN_CLASSES else [*known[: SHOWN_CLASSES // 2], *known[-SHOWN_CLASSES // 2 :]]
    title = f"per class, % ({len(shown)} of {len(known)} classes)"
    return terminal_table([Row(name, {value: number}) for number, name in shown], title=title, first="class")
