"""The job of ``distinit ensemble``: saved scores of several runs, averaged and printed."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from distinit_plugin.engine.ensemble import Ensemble, combine_scores, missing_sentences, read_scores
from distinit_plugin.engine.evaluate import SCORES_FILE
from distinit_plugin.engine.results import Row, terminal_table
from distinit_plugin.errors import UserError
from distinit_plugin.files import write_json
from distinit_plugin.jobs.testing import RESULTS_FOLDER

logger = logging.getLogger(__name__)


def ensemble(
    runs: Sequence[Path],
    *,
    combine: str = "probs",
    weights: Sequence[float] = (),
    json_file: Path | None = None,
    console: Console | None = None,
) -> Ensemble:
    """Average the scores of runs and print each one's accuracies and those of all together.

    Args:
        runs: Output folders of runs with a test, folders of its results, or ``scores.npz`` files.
        combine: ``probs`` or ``logits``.
        weights: One per run; empty: equal.
        json_file: Also written there.
        console: Where to print; the standard output when ``None``.

    Raises:
        UserError: A file cannot be read, weights do not fit, or the runs are not of the same classes and videos.
    """
    if weights and (len(weights) != len(runs) or min(weights) < 0 or not 0 < sum(weights) < math.inf):
        raise UserError(
            f"--weights: {' '.join(f'{weight:g}' for weight in weights)} does not fit {len(runs)} runs. Give one "
            "finite number ≥ 0 per run, not all 0."
        )
    files = [scores_file(run) for run in runs]
    repeated = [str(file) for file in files if files.count(file) > 1]
    if repeated:
        raise UserError(f"{repeated[0]} is named twice. Name each run once; --weights says how much one counts.")
    result = combine_scores([read_scores(file, combine) for file in files], list(weights) or [1.0] * len(runs))
    console = console or Console()
    for sentence in missing_sentences(result.missing):
        console.print(f"warning: {sentence}", highlight=False, soft_wrap=True)
    rows = [Row(name, dict(zip(("top-1", "top-5"), values, strict=True))) for name, values in result.runs.items()]
    rows.append(Row("together", dict(zip(("top-1", "top-5"), result.together, strict=True))))
    console.print(terminal_table(rows, title=f"{len(result.paths)} test videos, {combine} averaged, %", first="run"))
    if json_file is not None:
        values = {
            "combine": combine,
            "weights": list(weights) or [1.0] * len(runs),
            "num_videos": len(result.paths),
            "runs": {name: dict(zip(("top1", "top5"), pair, strict=True)) for name, pair in result.runs.items()},
            "together": dict(zip(("top1", "top5"), result.together, strict=True)),
            "missing": result.missing,
        }
        write_json(json_file, values)
    return result


def scores_file(run: Path) -> Path:
    """The scores that a run's folder, a folder of results or a file name means."""
    if not run.is_dir():
        return run
    direct = run / SCORES_FILE
    return direct if direct.is_file() else run / RESULTS_FOLDER / SCORES_FILE
