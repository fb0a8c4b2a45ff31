"""Several runs as one: the saved scores of the same videos, averaged.

*probs* is the mean of the probabilities (Quo Vadis, arXiv 1705.07750 §2.4 and table 2: "averages the predictions");
*logits* the mean of the logits, which ranks classes as their sum in the released code does
(https://github.com/google-deepmind/kinetics-i3d, evaluate_sample.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from distinit_plugin.engine.evaluate import top_k
from distinit_plugin.errors import UserError
from distinit_plugin.files import UNREADABLE_ARCHIVE
from distinit_plugin.video.records import shorten

COMBINATIONS = ("probs", "logits")
_ENTRIES = {"probs": "scores", "logits": "logits"}


@dataclass(frozen=True)
class Scores:
    """What a test saved.

    Attributes:
        name: How messages and tables call it.
        paths: V videos.
        labels: (V,) int64.
        values: (V,K) mean probabilities or mean logits.
        class_names: K names.
    """

    name: str
    paths: list[str]
    labels: npt.NDArray[np.int64]
    values: npt.NDArray[np.float64]
    class_names: list[str]


@dataclass(frozen=True)
class Ensemble:
    """The runs on the videos that all of them have.

    Attributes:
        paths: V videos.
        runs: Name → (top-1, top-5), fractions.
        together: (top-1, top-5) of the average.
        missing: Name → videos of other runs that it lacks.
    """

    paths: list[str]
    runs: dict[str, tuple[float, float]]
    together: tuple[float, float]
    missing: dict[str, list[str]]


def read_scores(path: Path, combine: str) -> Scores:
    """The scores of one test.

    Args:
        path: ``scores.npz``.
        combine: ``probs`` or ``logits``.

    Raises:
        UserError: The file is missing, damaged, or has no such scores.
    """
    try:
        with np.load(path, allow_pickle=False) as archive:
            if _ENTRIES[combine] not in archive and "scores" in archive:
                raise UserError(f"{path} has no mean logits: repeat the test, or use --combine probs.")
            found: dict[str, Any] = {key: archive[key] for key in ("paths", "labels", "class_names", _ENTRIES[combine])}
        scores = Scores(
            name=str(path),
            paths=[str(name) for name in found["paths"]],
            labels=found["labels"].astype(np.int64, casting="safe"),
            values=found[_ENTRIES[combine]].astype(np.float64, casting="safe"),
            class_names=[str(name) for name in found["class_names"]],
        )
    except UNREADABLE_ARCHIVE as error:
        reason = "there is no such file" if isinstance(error, FileNotFoundError) else str(error)
        if "allow_pickle" in reason:  # numpy's advice for what is no archive
            reason = "it is no .npz file of numbers and texts"
        raise UserError(
            f"{path} cannot be read as the scores of a test ({reason}). Give the output folder of a run with a test, "
            "or its test/scores.npz."
        ) from error
    shape = (len(scores.paths), len(scores.class_names))
    fits = scores.values.shape == shape and scores.labels.shape == shape[:1] and np.isfinite(scores.values).all()
    if not fits or not shape[0] or not ((scores.labels >= 0) & (scores.labels < shape[1])).all():
        raise UserError(f"{path}: its scores, labels and classes do not fit together. Repeat the test.")
    if len(set(scores.paths)) < len(scores.paths):
        raise UserError(f"{path} has a video twice, so videos cannot be matched by path. Repeat the test without it.")
    return scores


def combine_scores(runs: Sequence[Scores], weights: Sequence[float]) -> Ensemble:
    """Average runs video by video.

    Args:
        runs: At least one, with different names.
        weights: One each, not negative, not all 0.

    Raises:
        UserError: Classes or labels differ, or no video is in all runs.
    """
    common = common_videos(runs)
    values = [run.values[rows] for run, rows in zip(runs, common.rows, strict=True)]
    mean = np.average(values, axis=0, weights=list(weights))
    return Ensemble(
        paths=common.paths,
        runs={run.name: _accuracies(part, common.labels) for run, part in zip(runs, values, strict=True)},
        together=_accuracies(mean, common.labels),
        missing=common.missing,
    )


class CommonVideos(NamedTuple):
    """What several runs tested, matched by path.

    Attributes:
        paths: V videos that are in all of them.
        labels: (V,) int64.
        rows: Of each run, (V,) the row of each of these videos.
        missing: Name → videos of other runs that it lacks.
    """

    paths: list[str]
    labels: npt.NDArray[np.int64]
    rows: list[list[int]]
    missing: dict[str, list[str]]


def common_videos(runs: Sequence[Scores]) -> CommonVideos:
    """The videos that are in all runs; runs have different names.

    Raises:
        UserError: Classes or labels differ, or no video is in all runs.
    """
    first = runs[0]
    for run in runs[1:]:
        if run.class_names != first.class_names:
            raise UserError(_differing_classes(first, run))
    rows = [dict(zip(run.paths, range(len(run.paths)), strict=True)) for run in runs]
    everywhere = set(rows[0]).intersection(*rows[1:])
    anywhere = dict.fromkeys(path for run in runs for path in run.paths)
    paths = [path for path in anywhere if path in everywhere]
    if not paths:
        raise UserError(f"no video is in all of {', '.join(run.name for run in runs)}: they tested other videos.")
    order = [[row[path] for path in paths] for row in rows]
    labels = first.labels[order[0]]
    for run, places in zip(runs, order, strict=True):
        other = np.flatnonzero(run.labels[places] != labels)
        if len(other):
            path = paths[int(other[0])]
            raise UserError(
                f"{run.name} and {first.name} have other labels for {len(other)} videos ({path}, …): they are not of "
                "the same list."
            )
    missing = {
        run.name: lost
        for run, row in zip(runs, rows, strict=True)
        if (lost := [path for path in anywhere if path not in row])
    }
    return CommonVideos(paths, labels, order, missing)


def missing_sentences(missing: Mapping[str, Sequence[str]]) -> list[str]:
    """One sentence for each run that lacks videos of the others (name → these videos)."""
    return [
        f"{name} has no scores of {len(paths)} videos that others have, so they are left out: "
        f"{shorten(list(paths[:6]), len(paths))}"
        for name, paths in missing.items()
    ]


def _accuracies(values: npt.NDArray[np.float64], labels: npt.NDArray[np.int64]) -> tuple[float, float]:
    return top_k(values, labels, 1), top_k(values, labels, 5)


def _differing_classes(one: Scores, other: Scores) -> str:
    pairs = enumerate(zip(one.class_names, other.class_names, strict=False))
    place = next((number for number, (a, b) in pairs if a != b), min(len(one.class_names), len(other.class_names)))
    names = [run.class_names[place] if place < len(run.class_names) else "missing" for run in (one, other)]
    return (
        f"{one.name} and {other.name} have different classes ({len(one.class_names)} and {len(other.class_names)}; "
        f"class {place} is '{names[0]}' and '{names[1]}'), so their scores cannot be brought together."
    )
