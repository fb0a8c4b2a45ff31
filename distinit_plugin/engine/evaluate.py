"""The one test loop: many clips and crops per video, scored per clip and per video; and validation with the same code.

Protocol (DistInit, arXiv 1901.09244 §4): *per clip* scores each clip alone; *top-1/top-5* score the mean of the
softmaxes of a video's clips.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distinit_plugin.engine import distributed
from distinit_plugin.engine.meters import MeanMeter, term_key
from distinit_plugin.errors import UserError
from distinit_plugin.files import write_csv, write_file, write_text
from distinit_plugin.objectives import Objective
from distinit_plugin.types import BadVideo, Batch, ModelOutput

Finish = Callable[[Batch], Mapping[str, Tensor]]
"""Turns a batch of uint8 views into the normalised views of a network or objective, on the device."""

SCORES_FILE = "scores.npz"
"""Below the folder of a test's results."""


@contextmanager
def evaluation_mode(module: nn.Module) -> Iterator[None]:
    """Eval mode and no gradients inside; each submodule's own mode is restored afterwards."""
    modes = {name: submodule.training for name, submodule in module.named_modules()}
    module.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        for name, submodule in module.named_modules():
            submodule.training = modes.get(name, False)


def top_k(scores: npt.NDArray[np.float64], labels: npt.NDArray[np.int64], k: int) -> float:
    """Fraction of rows (V,K) whose label is among the k best classes (k is at most K; ties go to low classes)."""
    own = np.take_along_axis(scores, labels[:, None], axis=1)
    ahead = (scores > own) | ((scores == own) & (np.arange(scores.shape[1]) < labels[:, None]))
    return float((ahead.sum(axis=1) < k).mean())


def confusion_of(
    labels: npt.NDArray[np.int64], predicted: npt.NDArray[np.int64], num_classes: int
) -> npt.NDArray[np.int64]:
    """(K,K) counts of V videos: row = label, column = prediction."""
    table = np.zeros((num_classes, num_classes), dtype=np.int64)
    np.add.at(table, (labels, predicted), 1)
    return table


def confusion_rows(table: npt.NDArray[np.int64], class_names: Sequence[str]) -> list[list[Any]]:
    """The counts as rows of a CSV, with names at both edges."""
    rows = zip(class_names, table.tolist(), strict=True)
    return [["label \\ predicted", *class_names], *([name, *counts] for name, counts in rows)]


@dataclass(frozen=True)
class Evaluation:
    """Scores of a labelled list of V videos over K classes, and what follows from them.

    Attributes:
        paths: V files.
        labels: (V,) int64.
        scores: (V,K) float64, mean softmax over the video's clips; zeros where no clip could be read.
        logits: (V,K) float64, mean logits over the same.
        clips: (V,) int64, clips that were scored.
        clip_accuracy: Accuracy of clips scored alone, a fraction.
        clip_loss: Mean cross-entropy of clips, nats.
        class_names: K names.
        bad: Files that could not give all their clips, with the reason.
    """

    paths: list[str]
    labels: npt.NDArray[np.int64]
    scores: npt.NDArray[np.float64]
    logits: npt.NDArray[np.float64]
    clips: npt.NDArray[np.int64]
    clip_accuracy: float
    clip_loss: float
    class_names: list[str]
    bad: list[BadVideo]

    @property
    def used(self) -> npt.NDArray[np.bool_]:
        """(V,) whether the video counts: at least one of its clips could be read."""
        return self.clips > 0

    @property
    def left_out(self) -> list[str]:
        """Files of the list that were asked for and gave no clip at all."""
        named = {video.path for video in self.bad}
        return [self.paths[index] for index in np.flatnonzero(~self.used) if self.paths[index] in named]

    @property
    def predicted(self) -> npt.NDArray[np.int64]:
        """(V,) the best class; meaningless where ``used`` is false."""
        return self.scores.argmax(axis=1).astype(np.int64)

    def top_k(self, k: int) -> float:
        """``top_k`` of the used videos."""
        return top_k(self.scores[self.used], self.labels[self.used], k)

    @property
    def confusion(self) -> npt.NDArray[np.int64]:
        """(K,K) counts of used videos: row = label, column = prediction."""
        return confusion_of(self.labels[self.used], self.predicted[self.used], self.scores.shape[1])

    @property
    def per_class(self) -> npt.NDArray[np.float64]:
        """(K,) video top-1 accuracy of each class; NaN for a class without videos."""
        table = self.confusion
        totals = table.sum(axis=1)
        return np.where(totals > 0, np.diag(table) / np.maximum(totals, 1), np.nan)

    def metrics(self) -> dict[str, Any]:
        """Everything in numbers, ready for JSON: accuracies are fractions."""
        per_class = {name: float(value) for name, value in zip(self.class_names, self.per_class, strict=True)}
        return {
            "clip_top1": self.clip_accuracy,
            "top1": self.top_k(1),
            "top5": self.top_k(5),
            "mean_class_accuracy": float(np.nanmean(self.per_class)),
            "clip_loss": self.clip_loss,
            "num_videos": int(self.used.sum()),
            "num_clips": int(self.clips.sum()),
            "per_class": {name: None if math.isnan(value) else value for name, value in per_class.items()},
            "left_out": self.left_out,
            "bad": [{"path": path, "reason": reason} for path, reason in self.bad],
        }

    def write(self, folder: str | Path) -> None:
        """Write ``metrics.json``, ``scores.npz``, ``videos.csv`` and ``confusion.csv`` to ``folder``.

        ``scores.npz`` holds ``paths`` (V,), ``labels`` (V,), ``scores`` (V,K), ``logits`` (V,K) of the used videos, and
        ``class_names``.
        ``videos.csv`` has a row for every video that was asked for: with 0 clips it was left out, the note says why.
        """
        folder = Path(folder)
        used = self.used
        arrays: dict[str, Any] = {
            "paths": np.array(self.paths, dtype=np.str_)[used],
            "labels": self.labels[used],
            "scores": self.scores[used],
            "logits": self.logits[used],
            "class_names": np.array(self.class_names, dtype=np.str_),
        }
        write_text(folder / "metrics.json", json.dumps(self.metrics(), indent=2, ensure_ascii=False) + "\n")
        write_file(folder / SCORES_FILE, lambda file: np.savez_compressed(file, **arrays))
        write_csv(folder / "videos.csv", self._video_rows())
        write_csv(folder / "confusion.csv", confusion_rows(self.confusion, self.class_names))

    def _video_rows(self) -> list[list[Any]]:
        reasons = dict(self.bad)
        rows: list[list[Any]] = [["path", "label", "predicted", "correct", "clips", "note"]]
        for path, label, predicted, clips in zip(
            self.paths, self.labels.tolist(), self.predicted.tolist(), self.clips.tolist(), strict=True
        ):
            if not clips and path not in reasons:
                continue
            answer = [self.class_names[predicted], int(predicted == label)] if clips else ["", ""]
            rows.append([path, self.class_names[label], *answer, clips, reasons.get(path, "")])
        return rows


class _Sums:
    """Sums over clips, kept on the device until all clips are through."""

    def __init__(self, num_videos: int, num_classes: int, device: torch.device) -> None:
        self.scores = torch.zeros(num_videos, num_classes, dtype=torch.float64, device=device)
        self.logits = torch.zeros_like(self.scores)
        self.clips = torch.zeros(num_videos, dtype=torch.float64, device=device)
        self.correct = torch.zeros((), dtype=torch.float64, device=device)
        self.loss = torch.zeros((), dtype=torch.float64, device=device)

    def add(self, logits: Tensor, indices: Tensor, labels: Tensor) -> None:
        logits = logits.double()
        self.scores.index_add_(0, indices, logits.softmax(dim=1))
        self.logits.index_add_(0, indices, logits)
        self.clips.index_add_(0, indices, torch.ones_like(indices, dtype=torch.float64))
        self.correct += (logits.argmax(dim=1) == labels).sum()
        self.loss += F.cross_entropy(logits, labels, reduction="sum")

    def reduce(self, all_reduce_sum: Callable[[Tensor], Tensor]) -> None:
        self.scores, self.logits, self.clips, self.correct, self.loss = (
            all_reduce_sum(tensor) for tensor in (self.scores, self.logits, self.clips, self.correct, self.loss)
        )


def evaluate(
    network: nn.Module,
    batches: Iterable[Batch],
    *,
    finish: Finish,
    paths: Sequence[str],
    labels: Sequence[int],
    num_classes: int,
    class_names: Sequence[str] | None = None,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    all_reduce_sum: Callable[[Tensor], Tensor] = distributed.all_reduce_sum,
    gather_objects: Callable[[Any], list[Any]] = distributed.gather_objects,
) -> Evaluation:
    """Score every clip that ``batches`` gives and put the clips of a video together by its index.

    Args:
        network: A ``Network`` with a classifier of K = ``num_classes`` outputs.
        batches: The clips of this rank. A sample's ``key.index`` is the video's place in ``paths``; a clip that comes
            twice (same index, clip and crop) counts once. A bad video has no sample and is named in ``bad``.
        finish: Makes the network's views of a batch.
        paths: All V files of the list, on every rank.
        labels: Their labels, 0 … K − 1.
        num_classes: K.
        class_names: K names; numbers when ``None``.
        autocast: Context of the forward pass.
        all_reduce_sum: Sum of a tensor over ranks; each clip must be on one rank only.
        gather_objects: The objects of all ranks.

    Raises:
        UserError: A label is out of range, no video could be read, or the network's scores are not finite.
    """
    _check_labels(paths, labels, num_classes)
    sums: _Sums | None = None
    seen: set[tuple[int, int, int]] = set()
    bad: dict[str, str] = {}
    with evaluation_mode(network):
        for batch in batches:
            bad.update(batch["bad"])
            rows = _fresh_rows(batch, seen)
            if not rows:
                continue
            with autocast():
                logits = _logits(network(finish(batch)), num_classes)
            if sums is None:
                sums = _Sums(len(paths), num_classes, logits.device)
            indices = torch.tensor([batch["keys"][row].index for row in rows])
            wanted = torch.tensor([labels[index] for index in indices.tolist()])
            sums.add(logits[rows], indices.to(logits.device), wanted.to(logits.device))
    if sums is None:  # this rank had nothing; the others still wait for its part of the sum
        sums = _Sums(len(paths), num_classes, _device_of(network))
    sums.reduce(all_reduce_sum)
    for other in gather_objects(bad):
        bad.update(other)
    return _conclude(sums, list(paths), labels, class_names, bad)


def _fresh_rows(batch: Batch, seen: set[tuple[int, int, int]]) -> list[int]:
    """Rows of the batch whose clip was not met before; remembers them."""
    rows = []
    for row, key in enumerate(batch["keys"]):
        clip = (key.index, key.clip, key.crop)
        if clip not in seen:
            seen.add(clip)
            rows.append(row)
    return rows


def _check_labels(paths: Sequence[str], labels: Sequence[int], num_classes: int) -> None:
    if len(paths) != len(labels):
        raise ValueError(f"{len(paths)} paths but {len(labels)} labels")
    for path, label in zip(paths, labels, strict=True):
        if not 0 <= label < num_classes:
            raise UserError(
                f"the label {label} of {path} is not one of the network's classes 0 … {num_classes - 1}: set "
                "MODEL.NUM_CLASSES to the number of classes, or correct the list."
            )


def _logits(output: ModelOutput, num_classes: int) -> Tensor:
    if output.logits is None:
        raise UserError(
            "the network has no classifier, so nothing can be tested: fine-tune it on labelled videos first."
        )
    if output.logits.shape[1] != num_classes:
        raise UserError(
            f"the network's classifier has {output.logits.shape[1]} outputs, the list has {num_classes} classes."
        )
    return output.logits


def _device_of(module: nn.Module) -> torch.device:
    return next((parameter.device for parameter in module.parameters()), torch.device("cpu"))


def _conclude(
    sums: _Sums, paths: list[str], labels: Sequence[int], class_names: Sequence[str] | None, bad: Mapping[str, str]
) -> Evaluation:
    clips = sums.clips.cpu().numpy()
    total = clips.sum()
    if total == 0:
        reasons = "; ".join(f"{path}: {reason}" for path, reason in list(bad.items())[:3])
        raise UserError(
            f"none of the {len(paths)} videos of the list could be read{': ' + reasons if reasons else ''}."
        )
    scores, logits = (part.cpu().numpy() / np.maximum(clips, 1)[:, None] for part in (sums.scores, sums.logits))
    if not np.isfinite(scores).all():
        broken = int((~np.isfinite(scores).all(axis=1)).sum())
        raise UserError(
            f"the network's scores of {broken} of {int((clips > 0).sum())} videos are not finite: its weights are "
            "broken or RUNNER.PRECISION is too coarse for it; try another checkpoint or RUNNER.PRECISION fp32."
        )
    names = list(class_names) if class_names is not None else [str(number) for number in range(scores.shape[1])]
    return Evaluation(
        paths=paths,
        labels=np.asarray(labels, dtype=np.int64),
        scores=scores,
        logits=logits,
        clips=clips.astype(np.int64),
        clip_accuracy=float(sums.correct) / float(total),
        clip_loss=float(sums.loss) / float(total),
        class_names=names,
        bad=[BadVideo(path, reason) for path, reason in sorted(bad.items())],
    )


def mean_terms(
    objective: Objective,
    batches: Iterable[Batch],
    *,
    finish: Finish,
    device: torch.device,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    all_reduce_sum: Callable[[Tensor], Tensor] = distributed.all_reduce_sum,
    gather_objects: Callable[[Any], list[Any]] = distributed.gather_objects,
) -> dict[str, float]:
    """Validate where there are no labels: the objective's loss, terms and report over the clips of ``batches``.

    Args:
        objective: In eval mode meanwhile; nothing is trained.
        batches: The same clips each time, so that the values of epochs can be compared.
        finish: Makes the objective's views of a batch.
        device: Where the objective is.
        autocast: Context of the forward pass.
        all_reduce_sum: Sum of a tensor over ranks.
        gather_objects: The objects of all ranks.

    Returns:
        Means over all clips of all ranks, by name; ``loss`` among them.

    Raises:
        UserError: No clip could be read.
    """
    meter = MeanMeter()
    with evaluation_mode(objective.trainable):
        for batch in batches:
            if not batch["keys"]:
                continue
            targets = {name: target.to(device) for name, target in batch["targets"].items()}
            with autocast():
                prepared = objective.prepare(finish(batch), targets)
                output = objective.step(prepared)
            for name, count in prepared.counts.items():
                # What a term's mean is over may be the kept examples alone.
                meter.update({term_key(name): output.terms[term_key(name)]}, count)
            meter.update(output.report, output.report_weights)
    means = meter.read_all(device, all_reduce_sum, gather_objects)
    if not means:
        raise UserError("none of the validation videos could be read: run distinit check-corpus on CORPUS.VAL.")
    return {"loss": sum(term.weight * means[term_key(term.name)] for term in objective.terms), **means}
