"""k-NN and linear probe on features with known answers, and the extraction of features."""

import math

import numpy as np
import pytest
import torch
from torch import nn
from toys import SPEC, ToyNetwork, batch_of

from distinit_plugin.data.views import finish_views
from distinit_plugin.engine.probes import extract_features, knn_accuracy, linear_probe
from distinit_plugin.errors import UserError
from distinit_plugin.types import BadVideo, SampleKey


def finish(batch):
    return finish_views(batch["views"], {"rgb": SPEC}, "cpu")


def blobs(count, seed, spread=0.3, classes=4, dimensions=6):
    """Directions of their own per class, lengths that mean nothing."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(0).normal(size=(classes, dimensions))
    labels = rng.integers(0, classes, count)
    rows = (centres[labels] + spread * rng.normal(size=(count, dimensions))) * rng.uniform(0.1, 10, (count, 1))
    return torch.from_numpy(rows).float(), torch.from_numpy(labels)


# --------------------------------------------------------------------------------------------------- extraction
def test_features_are_means_over_the_clips_of_a_video():
    network = ToyNetwork().train()
    keys = [SampleKey(0, 0, video, clip) for video in (4, 1, 2) for clip in range(3)]
    batches = [batch_of(keys[:4]), batch_of(keys[4:]), batch_of([], bad=[BadVideo("video3.mp4", "empty")])]
    found = extract_features(network, batches, finish=finish)
    network.eval()
    for row, video in enumerate([1, 2, 4]):
        clips = [network(finish(batch_of([SampleKey(0, 0, video, clip)]))).features[0] for clip in range(3)]
        torch.testing.assert_close(found.features[row], torch.stack(clips).mean(0).detach())
    assert found.indices.tolist() == [1, 2, 4]
    assert found.labels.tolist() == [1, 2, 1]
    assert found.bad == [BadVideo("video3.mp4", "empty")]
    assert not found.features.requires_grad


def test_unlabeled_videos_have_no_labels():
    found = extract_features(ToyNetwork(0), [batch_of([SampleKey(0, 0, 1)], labeled=False)], finish=finish)
    assert found.labels is None
    assert found.features.shape == (1, 4)


def test_features_that_are_not_finite_are_refused():
    network = ToyNetwork()
    nn.init.constant_(network.bn.bias, math.nan)
    with pytest.raises(UserError, match="not finite"):
        extract_features(network, [batch_of([SampleKey(0, 0, 1)])], finish=finish)
    with pytest.raises(UserError, match="none of the videos"):
        extract_features(network, [], finish=finish)


# -------------------------------------------------------------------------------------------------------- k-NN
@pytest.mark.parametrize("k", [1, 3, 20])
def test_knn_against_a_loop(k):
    train, train_labels = blobs(60, 1, spread=1.0)
    test, test_labels = blobs(40, 2, spread=1.0)
    correct = 0
    for row, label in zip(test.double().numpy(), test_labels.tolist(), strict=True):
        bank = train.double().numpy()
        similarity = bank @ row / np.linalg.norm(bank, axis=1) / np.linalg.norm(row)
        nearest = np.argsort(-similarity)[:k]
        votes = {
            c: (
                (train_labels.numpy()[nearest] == c).sum(),
                similarity[nearest][train_labels.numpy()[nearest] == c].sum(),
            )
            for c in range(4)
        }
        correct += max(votes, key=lambda c: votes[c]) == label
    accuracy = knn_accuracy(train, train_labels, test, test_labels, k)
    assert accuracy == correct / 40
    assert 0.3 < accuracy < 1


def test_knn_breaks_ties_by_nearness_and_takes_a_small_bank():
    train = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    query = torch.tensor([[0.6, 0.8]])
    assert knn_accuracy(train, torch.tensor([0, 1]), query, torch.tensor([1]), k=20) == 1.0
    assert knn_accuracy(train, torch.tensor([1, 0]), query, torch.tensor([1]), k=2) == 0.0


def test_knn_is_chance_on_shuffled_labels():
    train, train_labels = blobs(400, 1)
    test, test_labels = blobs(400, 2)
    assert knn_accuracy(train, train_labels, test, test_labels) > 0.95
    shuffled = train_labels[torch.randperm(400, generator=torch.Generator().manual_seed(0))]
    assert knn_accuracy(train, shuffled, test, test_labels) < 0.45
    with pytest.raises(UserError, match="at least 1"):
        knn_accuracy(train, train_labels, test, test_labels, k=0)


# ------------------------------------------------------------------------------------------------- linear probe
def test_linear_probe_separates_blobs_and_not_shuffled_labels():
    train, train_labels = blobs(300, 1)
    test, test_labels = blobs(300, 2)
    assert linear_probe(train, train_labels, test, test_labels) > 0.9
    shuffled = train_labels[torch.randperm(300, generator=torch.Generator().manual_seed(0))]
    assert linear_probe(train, shuffled, test, test_labels) < 0.45


def test_linear_probe_does_not_depend_on_scale_and_offset_of_features():
    train, train_labels = blobs(200, 1, spread=1.0)
    test, test_labels = blobs(200, 2, spread=1.0)
    scale, offset = torch.tensor([1e-3, 1.0, 1e3, 1.0, 7.0, 1.0]), torch.arange(6) * 10.0
    plain = linear_probe(train, train_labels, test, test_labels)
    moved = linear_probe(train * scale + offset, train_labels, test * scale + offset, test_labels)
    assert abs(moved - plain) <= 0.01
    assert 0.3 < plain < 1


def test_linear_probe_needs_two_classes():
    train, _ = blobs(10, 1)
    with pytest.raises(UserError, match="at least two classes"):
        linear_probe(train, torch.zeros(10, dtype=torch.int64), train, torch.zeros(10, dtype=torch.int64))
