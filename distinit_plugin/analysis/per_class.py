"""Two runs class by class (DistInit, arXiv 1901.09244, figure 7; D3D, arXiv 1812.08249, figures 7 and 8).

Runs are compared on the videos that both tested. How far chance alone moves a difference is told by the bootstrap:
videos are drawn again, with replacement, and the middle 95 % of the differences are the interval. (It cannot tell more
than there is: a class whose few videos were all won has an interval of one point.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from distinit_plugin.engine.ensemble import Scores, common_videos
from distinit_plugin.engine.figures import COLOURS, label, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WITHIN = 0.001
"""Differences of up to ±0.1 % count as none, as in D3D's figure 8."""

CONFIDENCE = 0.95
RESAMPLES = 10_000
MOST = 25
"""Classes at each end that are drawn where there are more than twice as many."""

_BETTER, _WORSE, _SAME = COLOURS[0], COLOURS[1], "0.6"


class Difference(NamedTuple):
    """Of one class or of all videos, fractions.

    Attributes:
        name: Of the class.
        videos: That both runs tested.
        first: Accuracy of the first run.
        second: Of the second.
        difference: First less second.
        low: Lower end of its interval.
        high: Upper end.
    """

    name: str
    videos: int
    first: float
    second: float
    difference: float
    low: float
    high: float

    @property
    def is_clear(self) -> bool:
        """Whether the interval leaves out 0."""
        return self.low > 0 or self.high < 0


@dataclass(frozen=True)
class Comparison:
    """Two runs on the same videos.

    Attributes:
        first: Name of the run.
        second: Name of the one that it is compared with.
        overall: Of all videos.
        classes: Of those that have videos, the largest difference first.
        missing: Name → videos of the other run that it lacks.
    """

    first: str
    second: str
    overall: Difference
    classes: list[Difference]
    missing: dict[str, list[str]]

    @property
    def improved(self) -> int:
        """Classes in which the first run is better by more than ``WITHIN``."""
        return sum(found.difference > WITHIN for found in self.classes)

    @property
    def degraded(self) -> int:
        """Classes in which it is worse."""
        return sum(found.difference < -WITHIN for found in self.classes)

    @property
    def unchanged(self) -> int:
        """All others."""
        return len(self.classes) - self.improved - self.degraded


def compare_runs(first: Scores, second: Scores, *, resamples: int = RESAMPLES, seed: int = 0) -> Comparison:
    """Compare the top-1 answers of two runs, video by video.

    Args:
        first: Of the run whose gain is asked.
        second: Of the other.
        resamples: Draws of the bootstrap.
        seed: Of the draws.

    Raises:
        UserError: Classes or labels differ, or there is no common video.
    """
    common = common_videos([first, second])
    answers = (run.values[rows].argmax(axis=1) for run, rows in zip((first, second), common.rows, strict=True))
    right = np.stack([answer == common.labels for answer in answers])
    rng = np.random.default_rng(seed)
    overall = _difference("all videos", right, resamples, rng)
    classes = [
        _difference(name, right[:, common.labels == number], resamples, rng)
        for number, name in enumerate(first.class_names)
        if (common.labels == number).any()
    ]
    classes.sort(key=lambda found: -found.difference)
    return Comparison(first.name, second.name, overall, classes, common.missing)


def _difference(name: str, right: npt.NDArray[np.bool_], resamples: int, rng: np.random.Generator) -> Difference:
    """Of (2,V) answers. A drawn video is won, lost or tied, so a resample is three counts."""
    count = right.shape[1]
    won, lost = int((right[0] & ~right[1]).sum()), int((right[1] & ~right[0]).sum())
    drawn = rng.multinomial(count, [won / count, lost / count, 1 - (won + lost) / count], size=resamples)
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile((drawn[:, 0] - drawn[:, 1]) / count, [tail, 1 - tail])
    first, second = right.mean(axis=1)
    return Difference(name, count, float(first), float(second), (won - lost) / count, float(low), float(high))


def comparison_numbers(found: Comparison) -> dict[str, Any]:
    """For JSON."""
    return {
        "first": found.first,
        "second": found.second,
        "confidence": CONFIDENCE,
        "overall": found.overall,
        "mean_class_difference": float(np.mean([own.difference for own in found.classes])),
        "improved": found.improved,
        "degraded": found.degraded,
        "within_0.1_percent": found.unchanged,
        "intervals_without_0": sum(own.is_clear for own in found.classes),
        "missing": found.missing,
        "classes": found.classes,
    }


def comparison_rows(found: Comparison) -> list[list[Any]]:
    """For CSV: a row for each class, the largest gain first."""
    return [list(Difference._fields), *(list(own) for own in found.classes)]


def summary(found: Comparison) -> str:
    """The comparison in two lines."""
    own, count = found.overall, len(found.classes)
    clear = sum(each.is_clear for each in found.classes)
    return (
        f"top-1 on {own.videos} videos that both tested: {100 * own.first:.1f} % − {100 * own.second:.1f} % = "
        f"{100 * own.difference:+.1f} (95 %: {100 * own.low:+.1f} … {100 * own.high:+.1f})\n"
        f"of {count} classes {found.improved} improved, {found.degraded} degraded, {found.unchanged} within ±0.1 %; "
        f"intervals without 0: {clear}"
    )


def draw_comparison(found: Comparison, *, most: int = MOST) -> Figure:
    """Accuracy of both runs and their difference for each class; of many classes both ends."""
    shown: Sequence[Difference] = found.classes
    if len(shown) > 2 * most:
        shown = [*shown[:most], *shown[-most:]]
    figure = new_figure(10.0, max(3.0, 0.21 * len(shown) + 1.9))
    left, right = figure.subplots(1, 2, sharey=True)
    places = np.arange(len(shown))
    left.hlines(places, [100 * own.second for own in shown], [100 * own.first for own in shown], color="0.75", zorder=1)
    for name, colour, marker, values in (
        (found.first, _BETTER, "o", [100 * own.first for own in shown]),
        (found.second, _WORSE, "D", [100 * own.second for own in shown]),
    ):
        left.scatter(values, places, color=colour, marker=marker, s=22, label=label(name, 100), zorder=2)
    left.set_xlim(-4, 104)
    left.set_xlabel("accuracy of the class (%)")
    left.set_yticks(places, [f"{label(own.name, 36)} ({own.videos})" for own in shown], fontsize=8)
    left.set_ylim(len(shown) - 0.4, -0.6)
    values = [100 * own.difference for own in shown]
    colours = [_BETTER if value > 100 * WITHIN else _WORSE if value < -100 * WITHIN else _SAME for value in values]
    right.barh(places, values, color=colours, height=0.7)
    right.hlines(
        places, [100 * own.low for own in shown], [100 * own.high for own in shown], color="black", linewidth=1
    )
    right.axvline(0, color="black", linewidth=0.8)
    right.set_xlabel("difference (points); lines: 95 % interval")
    for axis in (left, right):
        axis.grid(axis="x", alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
        if len(shown) < len(found.classes):
            axis.axhline(most - 0.5, color="0.4", linestyle=":")
    figure.suptitle(summary(found), fontsize=9)
    figure.legend(loc="outside lower center", ncols=1, frameon=False, fontsize=8)
    return figure
