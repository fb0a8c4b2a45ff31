"""How good frozen features are: a k-nearest-neighbour vote and a linear probe. Neither trains the network."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn

from distinit_plugin.data.features import FEATURES
from distinit_plugin.engine.evaluate import Finish, evaluation_mode
from distinit_plugin.errors import UserError
from distinit_plugin.types import BadVideo, Batch, SampleKey

_CHUNK = 1024


class Features(NamedTuple):
    """One row per video that could be read, in the order of the list.

    Attributes:
        features: (N,D) float32 on the CPU, mean over the video's clips.
        labels: (N,) int64; ``None`` for an unlabeled list.
        indices: (N,) int64, the video's place in the list.
        bad: Files that could not give all their clips.
        clips: Per row (n,D) float32, the video's clips and crops in their order; empty where they were not kept.
    """

    features: Tensor
    labels: Tensor | None
    indices: Tensor
    bad: list[BadVideo]
    clips: list[Tensor]

    def batches(self, batch_size: int) -> Iterator[Batch]:
        """The clips as they came, their features in place of pixels (view ``features``), for the one test loop."""
        rows = [(int(index), clip) for index, clips in zip(self.indices, self.clips, strict=True) for clip in clips]
        numbers = [number for clips in self.clips for number in range(len(clips))]
        for start in range(0, len(rows), batch_size):
            part = rows[start : start + batch_size]
            keys = [SampleKey(0, start + place, index, numbers[start + place]) for place, (index, _) in enumerate(part)]
            yield {
                "views": {FEATURES: torch.stack([clip for _, clip in part])},
                "keys": keys,
                "paths": [],
                "targets": {},
                "bad": self.bad if start == 0 else [],
            }


def extract_features(
    network: nn.Module,
    batches: Iterable[Batch],
    *,
    finish: Finish,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    keep_clips: bool = False,
) -> Features:
    """Pool features of every clip of ``batches`` and average them per video.

    Args:
        network: A ``Network``; its ``features`` (B,D) are read, in eval mode.
        batches: Clips; several of one video share ``key.index``.
        finish: Makes the network's views of a batch.
        autocast: Context of the forward pass.
        keep_clips: Also keep the features of each clip.

    Raises:
        UserError: The network has no pooled features, no video could be read, or features are not finite.
    """
    sums: dict[int, Tensor] = {}
    counts: dict[int, int] = {}
    labels: dict[int, int] = {}
    clips: dict[int, list[Tensor]] = {}
    bad: dict[str, str] = {}
    with evaluation_mode(network):
        for batch in batches:
            bad.update(batch["bad"])
            if not batch["keys"]:
                continue
            with autocast():
                features = network(finish(batch)).features
            if features is None:
                raise UserError("the network gives no pooled features, so it cannot be probed.")
            batch_labels = batch["targets"]["label"].tolist() if "label" in batch["targets"] else []
            for row, (key, feature) in enumerate(zip(batch["keys"], features.double().cpu(), strict=True)):
                sums[key.index] = sums[key.index] + feature if key.index in sums else feature
                counts[key.index] = counts.get(key.index, 0) + 1
                if keep_clips:
                    clips.setdefault(key.index, []).append(feature.float())
                if batch_labels:
                    labels[key.index] = batch_labels[row]
    joined = _join(sums, counts, labels, bad)
    return joined._replace(clips=[torch.stack(clips[index]) for index in sorted(clips)])


def _join(sums: dict[int, Tensor], counts: dict[int, int], labels: dict[int, int], bad: dict[str, str]) -> Features:
    if not sums:
        raise UserError("none of the videos to be probed could be read.")
    order = sorted(sums)
    features = torch.stack([sums[index] / counts[index] for index in order]).float().clone()
    if not torch.isfinite(features).all():
        raise UserError("features are not finite: the checkpoint is broken, or RUNNER.PRECISION is too coarse for it.")
    known = torch.tensor([labels[index] for index in order]) if len(labels) == len(order) else None
    return Features(features, known, torch.tensor(order), [BadVideo(*item) for item in sorted(bad.items())], [])


def knn_accuracy(
    train_features: Tensor, train_labels: Tensor, test_features: Tensor, test_labels: Tensor, k: int = 20
) -> float:
    """Fraction of test rows whose class wins the vote among the k training rows of largest cosine similarity.

    Each neighbour has one vote; among classes with equal votes the one whose neighbours are nearer (larger sum of
    similarities) wins.

    Args:
        train_features: (N,D).
        train_labels: (N,) int64.
        test_features: (M,D).
        test_labels: (M,) int64.
        k: Neighbours; at most N are used.

    Raises:
        UserError: ``k`` is not positive.
    """
    return _vote(train_features, train_labels, test_features, test_labels, k, leave_out=False)


def leave_one_out_accuracy(features: Tensor, labels: Tensor, k: int = 20) -> float:
    """``knn_accuracy`` of each row (N,D) among all others, at least one; memory grows with N, not with its square."""
    return _vote(features, labels, features, labels, k, leave_out=True)


def _vote(
    train_features: Tensor, train_labels: Tensor, test_features: Tensor, test_labels: Tensor, k: int, *, leave_out: bool
) -> float:
    """``leave_out``: both are the same rows, and none votes for itself."""
    if k < 1:
        raise UserError(f"the number of neighbours must be at least 1, not {k}.")
    k = min(k, len(train_features) - leave_out)
    num_classes = int(max(train_labels.max(), test_labels.max())) + 1
    bank = nn.functional.normalize(train_features.double(), dim=1)
    correct = 0
    for start in range(0, len(test_features), _CHUNK):
        queries = nn.functional.normalize(test_features[start : start + _CHUNK].double(), dim=1)
        similarities = queries @ bank.T
        if leave_out:
            similarities.diagonal(start).fill_(-2.0)  # below any other
        similarity, neighbours = similarities.topk(k, dim=1)
        # A similarity is in [-1, 1]: divided by 4k, all of them together move a count by less than half a vote.
        votes = torch.zeros(len(queries), num_classes, dtype=torch.float64)
        votes.scatter_add_(1, train_labels[neighbours], 1 + similarity / (4 * k))
        correct += int((votes.argmax(dim=1) == test_labels[start : start + _CHUNK]).sum())
    return correct / len(test_features)


def linear_probe(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    *,
    inverse_penalty: float = 1.0,
    max_iterations: int = 1000,
) -> float:
    """Test accuracy of a softmax regression on frozen features.

    Features are standardised with the mean and deviation of the training rows. The regression is scikit-learn's
    ``LogisticRegression`` (L2 penalty, L-BFGS), which has no random part.

    Args:
        train_features: (N,D).
        train_labels: (N,) int64.
        test_features: (M,D).
        test_labels: (M,) int64.
        inverse_penalty: scikit-learn's ``C``; smaller is more regular.
        max_iterations: Of the solver.

    Raises:
        UserError: The training rows are of one class only.
    """
    if len(train_labels.unique()) < 2:
        raise UserError("a linear probe needs training videos of at least two classes.")
    scaler = StandardScaler()
    rows: npt.NDArray[np.float64] = scaler.fit_transform(train_features.double().numpy())
    probe = LogisticRegression(C=inverse_penalty, max_iter=max_iterations)
    probe.fit(rows, train_labels.numpy())
    return float(probe.score(scaler.transform(test_features.double().numpy()), test_labels.numpy()))
