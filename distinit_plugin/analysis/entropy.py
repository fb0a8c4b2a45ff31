"""How sure a teacher is of its answers on a corpus (DistInit, arXiv 1901.09244, figure 6), in nats.

An example is kept by a gate (MAX_ENTROPY) when the teacher's entropy is below its threshold, so the share that a gate
keeps is the cumulative share of the density.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from distinit_plugin import losses
from distinit_plugin.engine.figures import COLOURS, label, new_figure, parts_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure, SubFigure

BIN = 0.05
"""Nats of a bin of the table, and of the density."""

TOP_CLASSES = 15
"""Most frequent answers that are drawn."""

LEVELS = ("lowest", "median", "highest")
"""Of which entropy example frames are shown."""

_QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


class EntropyMeter:
    """Takes the teacher's logits as they come; what stays of an example is two numbers."""

    def __init__(self, temperature: float = 1.0) -> None:
        """``temperature``: τ of the prediction."""
        self._temperature = temperature
        self._entropies: list[npt.NDArray[np.float32]] = []
        self._answers: list[npt.NDArray[np.int32]] = []
        self._num_classes = 0

    def add(self, logits: Tensor) -> None:
        """Take the logits (B,K) or (B,K,…) of some examples; all have the same K."""
        self._num_classes = logits.shape[1]
        self._entropies.append(losses.entropy(logits, self._temperature).float().cpu().numpy())
        probs = losses.full_precision(logits).softmax(dim=1).flatten(2).mean(dim=2) if logits.ndim > 2 else logits
        self._answers.append(probs.argmax(dim=1).to("cpu", torch.int32).numpy())

    def read(self) -> EntropyDensity:
        """What was found out; at least one example was added."""
        return EntropyDensity(np.concatenate(self._entropies), np.concatenate(self._answers), self._num_classes)


@dataclass(frozen=True)
class EntropyDensity:
    """Of N examples.

    Attributes:
        entropies: (N,) float32, nats, in the order in which they came.
        answers: (N,) int32, the teacher's first class.
        num_classes: K.
    """

    entropies: npt.NDArray[np.float32]
    answers: npt.NDArray[np.int32]
    num_classes: int

    @property
    def largest(self) -> float:
        """The entropy of a teacher that knows nothing, ln K."""
        return math.log(self.num_classes)

    @property
    def class_counts(self) -> npt.NDArray[np.int64]:
        """(K,) how often each class was the first answer."""
        return np.bincount(self.answers, minlength=self.num_classes)

    def kept_share(self, threshold: float) -> float:
        """The share of examples that a gate with this MAX_ENTROPY keeps."""
        return float((self.entropies < np.float32(threshold)).mean())

    def histogram(self) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]:
        """Edges (n+1,) of bins of ``BIN`` nats up to ln K or more, and the examples in each (lower edge included)."""
        top = max(self.largest, float(self.entropies.max()))
        edges = BIN * np.arange(math.floor(top / BIN) + 2, dtype=np.float64)
        places = np.searchsorted(edges.astype(np.float32), self.entropies, side="right") - 1
        return edges, np.bincount(places, minlength=len(edges) - 1).astype(np.int64)

    def examples(self, count: int) -> dict[str, list[int]]:
        """Places of the ``count`` examples of lowest, median and highest entropy; none twice."""
        order = np.argsort(self.entropies, kind="stable")
        count = max(1, min(count, len(order) // len(LEVELS)))
        middle = (len(order) - count) // 2
        starts = (0, middle, len(order) - count)
        return {level: order[start : start + count].tolist() for level, start in zip(LEVELS, starts, strict=True)}


@dataclass(frozen=True)
class Example:
    """One frame that a teacher saw.

    Attributes:
        frame: (H,W,3) uint8.
        entropy: Nats.
        answer: Its first class.
        path: The video.
    """

    frame: npt.NDArray[np.uint8]
    entropy: float
    answer: str
    path: str


@dataclass(frozen=True)
class EntropyStudy:
    """All that is shown of a teacher on a corpus.

    Attributes:
        teacher: Its name.
        density: Of the examples.
        class_names: K names.
        thresholds: Gates of which the kept share is asked.
        accuracies: Threshold (infinite: no gate) → top-1 of finished runs, fractions.
        examples: Level → frames.
    """

    teacher: str
    density: EntropyDensity
    class_names: list[str]
    thresholds: list[float] = field(default_factory=list)
    accuracies: Mapping[float, list[float]] = field(default_factory=dict)
    examples: Mapping[str, list[Example]] = field(default_factory=dict)

    @property
    def answers(self) -> list[tuple[str, int]]:
        """Classes that were ever a first answer, the most frequent first."""
        counts = self.density.class_counts
        order = np.argsort(-counts, kind="stable")
        return [(self.class_names[place], int(counts[place])) for place in order if counts[place]]


def entropy_numbers(study: EntropyStudy) -> dict[str, Any]:
    """For JSON."""
    density = study.density
    quantiles = np.quantile(density.entropies.astype(np.float64), _QUANTILES).tolist()
    return {
        "teacher": study.teacher,
        "examples": len(density.entropies),
        "classes": density.num_classes,
        "unit": "nats",
        "largest_possible": density.largest,
        "mean": float(density.entropies.mean(dtype=np.float64)),
        "quantiles": {f"{level:g}": value for level, value in zip(_QUANTILES, quantiles, strict=True)},
        "kept_share": {f"{threshold:g}": density.kept_share(threshold) for threshold in study.thresholds},
        "accuracy": {_threshold(key): values for key, values in sorted(study.accuracies.items())},
        "answers": [{"class": name, "examples": count} for name, count in study.answers],  # two may have one name
        "shown": {
            level: [{"path": own.path, "entropy": own.entropy, "answer": own.answer} for own in found]
            for level, found in study.examples.items()
        },
    }


def entropy_rows(study: EntropyStudy) -> list[list[Any]]:
    """For CSV: bins with their count, density (per nat) and the share of all examples below their upper edge."""
    edges, counts = study.density.histogram()
    total = int(counts.sum())
    rows: list[list[Any]] = [["from", "to", "examples", "density", "share_below"]]
    for low, high, count, below in zip(edges[:-1], edges[1:], counts, np.cumsum(counts), strict=True):
        rows.append([f"{low:.2f}", f"{high:.2f}", int(count), f"{count / total / BIN:.6g}", f"{below / total:.6g}"])
    return rows


def _threshold(value: float) -> str:
    return "no gate" if math.isinf(value) else f"{value:g}"


# ------------------------------------------------------------------------------------------------------ picture
def draw_entropy(study: EntropyStudy) -> Figure:
    """Density with the kept share, accuracy over thresholds where it is known, answers, example frames."""
    levels = [level for level in LEVELS if study.examples.get(level)]
    heights = [3.4, 3.6] + ([1.75 * len(levels)] if levels else [])
    figure = new_figure(10.5, sum(heights) + 0.4)
    figure.suptitle(
        f"{label(study.teacher)}: entropy on {len(study.density.entropies)} examples, mean "
        f"{study.density.entropies.mean(dtype=np.float64):.2f} nats of at most {study.density.largest:.2f}",
        fontsize=11,
    )
    parts = parts_of(figure, heights)
    _draw_density(parts[0], study)
    _draw_answers(parts[1], study)
    if levels:
        _draw_examples(parts[2], study, levels)
    return figure


def _draw_density(part: SubFigure, study: EntropyStudy) -> None:
    left, right = part.subplots(1, 2)
    edges, counts = study.density.histogram()
    total = int(counts.sum())
    left.stairs(counts / total / BIN, edges, fill=True, color=COLOURS[4])
    left.set_ylabel("density (per nat)")
    right.plot(edges, [0, *100 * np.cumsum(counts) / total], color=COLOURS[0])
    right.set_ylabel("kept by a gate there (%)")
    right.set_ylim(0, 103)
    for place, threshold in enumerate(study.thresholds):
        colour = COLOURS[1 + 2 * place % (len(COLOURS) - 1)]
        kept = 100 * study.density.kept_share(threshold)
        for axis in (left, right):
            axis.axvline(threshold, color=colour, linestyle="--", label=f"{threshold:g} nats keep {kept:.1f} %")
    for axis in (left, right):
        axis.set_xlabel("entropy of the teacher (nats)")
        axis.set_xlim(0, edges[-1])
        axis.axvline(study.density.largest, color="0.5", linestyle=":", label=f"ln K = {study.density.largest:.2f}")
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    is_late = study.density.kept_share(study.density.largest / 2) < 0.5
    right.legend(fontsize=8, loc="upper left" if is_late else "lower right")


def _draw_answers(part: SubFigure, study: EntropyStudy) -> None:
    left, right = part.subplots(1, 2)
    answers = study.answers
    total = len(study.density.entropies)
    shown = answers[:TOP_CLASSES]
    left.barh(range(len(shown)), [100 * count / total for _, count in shown], color=COLOURS[0], height=0.75)
    left.set_yticks(range(len(shown)), [label(name, 22) for name, _ in shown], fontsize=8)
    left.set_ylim(max(len(shown), 5) - 0.4, -0.6)
    left.set_xlabel("share of examples (%)")
    left.set_title(f"first answers: {len(answers)} of {len(study.class_names)} classes occur", fontsize=9)
    left.spines[["top", "right"]].set_visible(False)
    left.grid(axis="x", alpha=0.3)
    if not study.accuracies:
        right.set_axis_off()
        return
    finite = sorted(key for key in study.accuracies if math.isfinite(key))
    for key in finite:
        own = [100 * value for value in study.accuracies[key]]
        right.plot([key] * len(own), own, color=COLOURS[0], marker="o", markersize=4, linestyle="none", alpha=0.6)
    means = [100 * math.fsum(study.accuracies[key]) / len(study.accuracies[key]) for key in finite]
    right.plot(finite, means, color=COLOURS[0], marker="D", markersize=6, label="gated (mean over runs)")
    if (without := study.accuracies.get(math.inf)) is not None:
        mean = 100 * math.fsum(without) / len(without)
        right.axhline(mean, color=COLOURS[1], linestyle="--", label=f"no gate: {mean:.1f} %")
    right.set_xlim(0, study.density.largest + BIN)
    right.set_xlabel("MAX_ENTROPY of the pre-training (nats)")
    right.set_ylabel("top-1 of the fine-tuned run (%)")
    right.grid(alpha=0.3)
    right.spines[["top", "right"]].set_visible(False)
    right.legend(fontsize=8)


def _draw_examples(part: SubFigure, study: EntropyStudy, levels: Sequence[str]) -> None:
    columns = max(len(study.examples[level]) for level in levels)
    axes = part.subplots(len(levels), columns, squeeze=False)
    for row, level in zip(axes, levels, strict=True):
        for place, axis in enumerate(row):
            axis.set_xticks([])
            axis.set_yticks([])
            axis.spines[:].set_visible(False)
            if place < len(study.examples[level]):
                example = study.examples[level][place]
                axis.imshow(example.frame)
                axis.set_title(f"{example.entropy:.2f} nats\n{label(example.answer, 22)}", fontsize=8)
        row[0].set_ylabel(f"{level} entropy", fontsize=9)
