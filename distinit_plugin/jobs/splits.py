"""All splits of UCF-101 or HMDB-51: one run each, then average and deviation."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from distinit_plugin.config.node import CfgNode
from distinit_plugin.engine import distributed
from distinit_plugin.engine.results import Row, terminal_table
from distinit_plugin.errors import Problems, UserError
from distinit_plugin.files import write_text
from distinit_plugin.jobs.corpora import Corpora
from distinit_plugin.jobs.preflight import check_job
from distinit_plugin.jobs.running import run

RESULTS_FILE = "splits.json"
COLUMNS = {"clip_top1": "per clip", "top1": "top-1", "top5": "top-5"}


def run_splits(cfg: CfgNode, splits: Sequence[int] = (1, 2, 3)) -> dict[str, list[float]]:
    """Run one configuration on several splits, in ``OUTPUT_DIR/split_N`` each, and print one table.

    Args:
        cfg: A configuration whose corpora have the format ucf101 or hmdb51, with a test. With RUNNER.DRY_RUN every
            split is checked and measured as ``run`` does, and nothing is trained or written.
        splits: Which.

    Returns:
        ``clip_top1``, ``top1`` and ``top5`` (fractions), one value per split; also in ``OUTPUT_DIR/splits.json``.
        Nothing for a dry run.

    Raises:
        UserError: The corpora have no splits, or a run has no test.
    """
    formats = {node.FORMAT for use in ("TRAIN", "TEST") for node in cfg.CORPUS[use].values()}
    if not formats <= {"ucf101", "hmdb51"} or not cfg.CORPUS.TEST:
        raise UserError(
            f"CORPUS: only ucf101 and hmdb51 have splits; the corpora here have the formats "
            f"{', '.join(sorted(formats)) or 'none'}. Use distinit run for them."
        )
    if not cfg.TEST.ENABLE or distributed.started_by_torchrun():
        raise UserError(
            "Averaging over splits needs tests in one process: set TEST.ENABLE True, and start it without torchrun "
            "(distinit run does one split of a distributed run)."
        )
    parts = {split: _part(cfg, split) for split in splits}
    problems = Problems()
    for part in parts.values():  # the last split's lists are looked at before the first split's training
        with problems.collect():
            check_job(part, Corpora(part))
    Problems(dict.fromkeys(problems)).raise_if_any()
    if cfg.RUNNER.DRY_RUN:
        for split, part in parts.items():
            Console().print(f"split {split}", style="bold", highlight=False)
            run(part)
        return {}
    results: dict[str, list[float]] = {name: [] for name in COLUMNS}
    rows = []
    for split, part in parts.items():
        evaluation = run(part).evaluation
        assert evaluation is not None
        metrics = evaluation.metrics()
        for name in COLUMNS:
            results[name].append(metrics[name])
        rows.append(Row(f"split {split}", {title: metrics[name] for name, title in COLUMNS.items()}))
    rows.append(Row("mean", {title: results[name] for name, title in COLUMNS.items()}))
    text = json.dumps({"splits": list(splits), **results}, indent=2) + "\n"
    write_text(Path(cfg.OUTPUT_DIR) / RESULTS_FILE, text)
    Console().print(terminal_table(rows, title="test videos, %", first=Path(cfg.OUTPUT_DIR).name))
    return results


def _part(cfg: CfgNode, split: int) -> CfgNode:
    """The configuration of one split."""
    part = cfg.clone()
    part.defrost()
    part.CORPUS.SPLIT = split
    part.OUTPUT_DIR = str(Path(cfg.OUTPUT_DIR) / f"split_{split}")
    part.freeze()
    return part
