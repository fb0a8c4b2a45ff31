"""The test loop against a loop in NumPy, and what it writes."""

import csv
import io
import json
import math

import numpy as np
import pytest
import torch
from torch import nn
from toys import SPEC, ToyNetwork, batch_of

from distinit_plugin.data.views import finish_views
from distinit_plugin.engine.evaluate import Evaluation, evaluate, mean_terms
from distinit_plugin.errors import UserError
from distinit_plugin.losses import build_loss
from distinit_plugin.objectives import Objective, Term
from distinit_plugin.types import BadVideo, SampleKey

VIDEOS, CLIPS, CROPS = 7, 3, 2
PATHS = [f"video{index}.mp4" for index in range(VIDEOS)]


def finish(batch):
    return finish_views(batch["views"], {"rgb": SPEC}, "cpu")


def finish_for_objective(batch):
    return finish_views(batch["views"], {"student/rgb": SPEC, "TEACHER/rgb": SPEC}, "cpu")


def read_csv(path):
    return list(csv.reader(io.StringIO(path.read_text(encoding="utf-8"))))


def all_keys(videos=range(VIDEOS)):
    return [SampleKey(0, 0, video, clip, crop) for video in videos for clip in range(CLIPS) for crop in range(CROPS)]


def batches_of(keys, size=4, **options):
    return [batch_of(keys[start : start + size], **options) for start in range(0, len(keys), size)]


def run(keys=None, classes=3, network=None, **options):
    network = network or spread_network(classes)
    batches = batches_of(all_keys() if keys is None else keys, classes=classes)
    labels = [index % classes for index in range(VIDEOS)]
    return evaluate(network, batches, finish=finish, paths=PATHS, labels=labels, num_classes=classes, **options)


def spread_network(classes):
    """Logits far enough apart that clips of one video disagree."""
    network = ToyNetwork(classes, seed=3)
    with torch.no_grad():
        network.fc.weight.mul_(60)
        mean = network.eval()(finish(batch_of(all_keys()))).logits.mean(0)
        network.fc.bias.sub_(mean)
    return network.train()


@pytest.mark.parametrize("classes", [3, 7])
def test_against_a_numpy_loop(classes):
    network = spread_network(classes).eval()
    probs, logits_of, correct, losses = {}, {}, [], []
    for key in all_keys():
        batch = batch_of([key], classes=classes)
        logits = network(finish(batch)).logits[0].detach().double().numpy()
        p = np.exp(logits - logits.max())
        p /= p.sum()
        label = key.index % classes
        probs.setdefault(key.index, []).append(p)
        logits_of.setdefault(key.index, []).append(logits)
        correct.append(np.argmax(logits) == label)
        losses.append(-math.log(p[label]))
    scores = np.array([np.mean(probs[video], axis=0) for video in range(VIDEOS)])
    labels = np.arange(VIDEOS) % classes
    ranking = np.argsort(-scores, axis=1)
    result = run(classes=classes)
    np.testing.assert_allclose(result.scores, scores, atol=1e-6)
    mean_logits = [np.mean(logits_of[video], axis=0) for video in range(VIDEOS)]
    np.testing.assert_allclose(result.logits, mean_logits, rtol=1e-5, atol=1e-5)
    metrics = result.metrics()
    assert metrics["top1"] == np.mean(ranking[:, 0] == labels)
    assert metrics["top5"] == np.mean([label in row[:5] for label, row in zip(labels, ranking, strict=True)])
    assert metrics["clip_top1"] == np.mean(correct)
    assert metrics["clip_loss"] == pytest.approx(np.mean(losses), rel=1e-5)
    assert metrics["num_videos"] == VIDEOS
    assert metrics["num_clips"] == VIDEOS * CLIPS * CROPS
    for label in range(classes):
        assert metrics["per_class"][str(label)] == np.mean(ranking[labels == label, 0] == label)
    # Else the comparison proves little:
    assert metrics["clip_top1"] != metrics["top1"]


def test_fewer_than_five_classes_make_top5_certain():
    assert run(classes=3).top_k(5) == 1.0
    assert run(classes=3).top_k(1) < 1.0


def test_ties_do_not_count_as_right():
    """A network that answers the same for all classes is right for class 0 alone."""
    result = evaluation_of(scores=np.full((4, 4), 0.25), labels=[0, 1, 2, 3])
    assert result.top_k(1) == 0.25
    assert result.top_k(2) == 0.5
    assert result.predicted.tolist() == [0, 0, 0, 0]


def evaluation_of(scores, labels, clips=None):
    scores = np.asarray(scores, dtype=np.float64)
    return Evaluation(
        paths=[f"{number}.mp4" for number in range(len(scores))],
        labels=np.array(labels),
        scores=scores,
        logits=scores,
        clips=np.ones(len(scores), dtype=np.int64) if clips is None else np.array(clips),
        clip_accuracy=0.5,
        clip_loss=1.0,
        class_names=[f"class {number}" for number in range(scores.shape[1])],
        bad=[BadVideo(f"{number}.mp4", "broken") for number in range(len(scores)) if clips and not clips[number]],
    )


def test_confusion_and_classes_without_videos():
    result = evaluation_of([[0.9, 0.1, 0], [0.2, 0.8, 0], [0.7, 0.3, 0], [0, 0, 0]], [0, 0, 1, 1], clips=[2, 1, 1, 0])
    assert result.confusion.tolist() == [[1, 1, 0], [1, 0, 0], [0, 0, 0]]
    assert result.per_class[:2].tolist() == [0.5, 0.0]
    assert math.isnan(result.per_class[2])
    assert result.metrics()["mean_class_accuracy"] == 0.25
    assert result.metrics()["per_class"]["class 2"] is None
    assert result.top_k(1) == pytest.approx(1 / 3)


def test_a_clip_that_comes_twice_counts_once():
    once = run()
    twice = run(keys=[*all_keys(), *all_keys()[:5]])
    np.testing.assert_array_equal(once.clips, twice.clips)
    np.testing.assert_allclose(once.scores, twice.scores, atol=1e-6)
    assert once.metrics()["clip_top1"] == twice.metrics()["clip_top1"]


def test_bad_videos_are_left_out_and_listed(tmp_path):
    keys = [key for key in all_keys() if key.index != 2]
    batches = [*batches_of(keys), batch_of([], bad=[BadVideo("video2.mp4", "no video stream")])]
    labels = [index % 3 for index in range(VIDEOS)]
    result = evaluate(spread_network(3), batches, finish=finish, paths=PATHS, labels=labels, num_classes=3)
    whole = run()
    others = [0, 1, 3, 4, 5, 6]
    assert result.metrics()["num_videos"] == 6
    assert result.left_out == ["video2.mp4"]
    np.testing.assert_allclose(result.scores[others], whole.scores[others], atol=1e-6)
    assert result.top_k(1) == np.mean(whole.predicted[others] == whole.labels[others])
    result.write(tmp_path)
    rows = read_csv(tmp_path / "videos.csv")
    assert rows[3] == ["video2.mp4", "2", "", "", "0", "no video stream"]
    assert np.load(tmp_path / "scores.npz")["paths"].tolist() == [PATHS[index] for index in others]


def test_the_sum_over_ranks_equals_one_rank():
    """Two ranks with an odd number of videos, videos dealt in turn; the second one's sums are added to the first's."""
    labels = [index % 3 for index in range(VIDEOS)]
    collected = []

    def evaluate_rank(videos, reduce, gather):
        batches = batches_of(all_keys(videos))
        return evaluate(
            spread_network(3), batches, finish=finish, paths=PATHS, labels=labels, num_classes=3,
            all_reduce_sum=reduce, gather_objects=gather,
        )  # fmt: skip

    evaluate_rank([1, 3, 5], lambda tensor: collected.append(tensor.clone()) or tensor, lambda bad: [bad])
    parts = iter(collected)
    joined = evaluate_rank([0, 2, 4, 6], lambda tensor: tensor + next(parts), lambda bad: [bad, {"x.mp4": "gone"}])
    alone = run()
    np.testing.assert_allclose(joined.scores, alone.scores, rtol=0, atol=1e-7)
    assert joined.bad == [BadVideo("x.mp4", "gone")]
    for name in ("top1", "top5", "clip_top1", "num_clips", "per_class"):
        assert joined.metrics()[name] == alone.metrics()[name]


def test_a_rank_without_videos_takes_part_in_the_sum():
    reduced = []
    with pytest.raises(UserError, match="none of the 7 videos"):
        run(keys=[], all_reduce_sum=lambda tensor: reduced.append(tensor.shape) or tensor)
    assert reduced == [(7, 3), (7, 3), (7,), (), ()]


def test_files(tmp_path):
    result = run(class_names=["run", "jump", "ça, va"])
    result.write(tmp_path / "test")
    metrics = json.loads((tmp_path / "test" / "metrics.json").read_text(encoding="utf-8"))
    assert metrics["top1"] == result.top_k(1)
    assert list(metrics["per_class"]) == ["run", "jump", "ça, va"]
    saved = np.load(tmp_path / "test" / "scores.npz")  # without pickle
    assert saved["paths"].tolist() == PATHS
    assert saved["labels"].tolist() == result.labels.tolist()
    np.testing.assert_array_equal(saved["scores"], result.scores)
    np.testing.assert_allclose(saved["scores"].sum(1), 1.0)
    rows = read_csv(tmp_path / "test" / "videos.csv")
    assert len(rows) == 1 + VIDEOS
    assert sum(int(row[3]) for row in rows[1:]) == round(result.top_k(1) * VIDEOS)
    confusion = read_csv(tmp_path / "test" / "confusion.csv")
    assert [int(row[1 + place]) for place, row in enumerate(confusion[1:])] == np.diag(result.confusion).tolist()


def test_names_of_files_that_are_not_utf8(tmp_path):
    result = evaluation_of([[1.0, 0.0]], [0])
    result.paths[0] = b"caf\xe9.mp4".decode("utf-8", "surrogateescape")
    result.write(tmp_path)
    assert b"caf\xe9.mp4" in (tmp_path / "videos.csv").read_bytes()


def test_modes_are_restored_and_nothing_moves():
    network = ToyNetwork().train()
    network.bn.eval()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    run(network=network)
    assert network.training
    assert network.conv.training
    assert not network.bn.training
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def broken_network():
    network = ToyNetwork()
    nn.init.constant_(network.fc.bias, math.nan)
    return network


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"network": broken_network()}, "scores of 7 of 7 videos are not finite"),
        ({"network": ToyNetwork(0)}, "no classifier"),
        ({"network": ToyNetwork(5)}, "5 outputs, the list has 3 classes"),
    ],
)
def test_networks_that_cannot_be_tested(options, message):
    with pytest.raises(UserError, match=message):
        run(**options)


def test_labels_out_of_range_are_named():
    with pytest.raises(UserError, match=r"the label 3 of video6\.mp4 is not one of .* 0 … 2"):
        evaluate(ToyNetwork(), [], finish=finish, paths=PATHS, labels=[0] * 6 + [3], num_classes=3)


# ------------------------------------------------------------------------------------- validation without labels
def distillation(gate_mean="all", max_entropy=None):
    teacher = spread_network(3).requires_grad_(False).eval()
    term = Term("TEACHER", "logits", build_loss("soft_cross_entropy"), 2.0, "TEACHER", "logits", max_entropy)
    return Objective(ToyNetwork(3, seed=1), [term], {"TEACHER": teacher}, {}, gate_mean=gate_mean)


@pytest.mark.parametrize("gate_mean", ["all", "kept"])
def test_mean_terms_against_a_loop_over_clips(gate_mean):
    keys = all_keys()[:11]
    objective = distillation(gate_mean, max_entropy=0.75)
    student, teacher = objective.trainable.student, objective.teachers["TEACHER"]
    losses, weights = [], []
    student.eval()
    for key in keys:
        views = finish(batch_of([key]))
        target = teacher(views).logits.double().softmax(1)
        losses.append(float(-(target * student(views).logits.detach().double().log_softmax(1)).sum()))
        weights.append(float(-(target * target.log()).sum()) < 0.75)
    assert 0 < sum(weights) < len(weights)
    expected = np.dot(losses, weights) / (sum(weights) if gate_mean == "kept" else len(weights))
    objective.trainable.train()
    batches = [*batches_of(keys, labeled=False), batch_of([])]
    means = mean_terms(objective, batches, finish=finish_for_objective, device=torch.device("cpu"))
    assert means["loss/TEACHER"] == pytest.approx(expected, rel=1e-5)
    assert means["loss"] == pytest.approx(2 * expected, rel=1e-5)
    assert means["kept/TEACHER"] == pytest.approx(np.mean(weights))
    assert objective.trainable.training


def test_mean_terms_without_any_clip():
    with pytest.raises(UserError, match="none of the validation videos"):
        mean_terms(distillation(), [batch_of([])], finish=finish_for_objective, device=torch.device("cpu"))
