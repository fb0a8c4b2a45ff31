"""Numbers behind the pictures: temporal variance, entropy, classes, neighbourhoods."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from linear_networks import make_views, teacher_logits, two_teachers
from test_ensemble import CLASSES, noisy, softmax
from test_models import REGISTERED, build_with_views

from distinit_plugin.analysis.confusion import confusion_numbers, draw_confusion, mistakes
from distinit_plugin.analysis.embedding import MAX_CLASSES, choose_classes, draw_embeddings, embed, embedding_rows
from distinit_plugin.analysis.entropy import (
    BIN,
    EntropyDensity,
    EntropyMeter,
    EntropyStudy,
    Example,
    draw_entropy,
    entropy_numbers,
    entropy_rows,
)
from distinit_plugin.analysis.filters import Filters, _mosaic, draw_filters, first_filters, temporal_share
from distinit_plugin.analysis.per_class import compare_runs, comparison_rows, draw_comparison
from distinit_plugin.engine.ensemble import Scores
from distinit_plugin.engine.evaluate import confusion_of
from distinit_plugin.engine.probes import leave_one_out_accuracy
from distinit_plugin.errors import UserError
from distinit_plugin.weights.inflate import inflate_kernel


# --------------------------------------------------------------------------------------------------------- filters
@pytest.mark.parametrize("num_taps", [3, 5, 7])
def test_an_inflated_filter_has_no_temporal_variance_and_a_random_one_has(num_taps):
    torch.manual_seed(0)
    inflated = inflate_kernel(torch.randn(16, 3, 7, 7), 3, num_taps)
    assert temporal_share(inflated).tolist() == [0.0] * 16
    random = torch.randn(16, 3, num_taps, 7, 7)
    shares = temporal_share(random)
    # of independent weights (T − 1) / T
    torch.testing.assert_close(shares, torch.full((16,), 1 - 1 / num_taps, dtype=torch.float64), atol=0.1, rtol=0)
    for kernel, share in zip(random.double(), shares, strict=True):
        changing = energy = 0.0
        for value in kernel.flatten(0).tolist():
            energy += value**2
        means = kernel.mean(1)
        for step in range(num_taps):
            changing += float((kernel[:, step] - means).square().sum())
        assert float(share) == pytest.approx(changing / energy)


def test_what_answers_to_nothing_still_has_all_its_energy_in_change():
    kernel = torch.randn(1, 3, 1, 5, 5)
    difference = torch.cat([kernel, torch.zeros_like(kernel), -kernel], dim=2)
    assert temporal_share(difference).tolist() == pytest.approx([1.0])
    assert temporal_share(torch.zeros(2, 3, 3, 5, 5)).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("name", sorted(REGISTERED))
def test_first_filters_of_every_network(name):
    network, _ = build_with_views(name)
    found = first_filters(name, network, network.view_specs("test"))
    modules = dict(network.named_modules())
    for filters in found:
        weight = modules[filters.layer].weight
        assert filters.kernels.numel() == weight.numel()
        assert filters.kernels.shape[1] in (2, 3)
        assert len(filters.shares) == (len(modules[filters.time_layer].weight) if filters.time_layer else 0)
        assert all(share > 0.1 for share in filters.shares)  # random ones
    layouts = {
        "TwoStream": [(3, 1), (2, 10)],
        "Fused3D": [(3, 1), (2, 10)],
        "ConvLSTM": [(3, 1)],
        "Res2D": [(3, 1)],
        "R2Plus1D": [(3, 1)],
        "I3D": [(3, 7)],
        "C3D": [(3, 3)],
        "Res3D": [(3, 3)],
    }
    if name in layouts:
        assert [tuple(filters.kernels.shape[1:3]) for filters in found] == layouts[name]
    if name == "R2Plus1D":
        assert found[0].time_kernels is not None
        assert found[0].time_kernels.shape[2:] == (3, 1, 1)


def test_flow_of_a_stack_keeps_its_frames_apart():
    """Channel 2k of the convolution is u of frame k, 2k + 1 is v."""
    network, _ = build_with_views("TwoStream")
    flow = first_filters("two", network, network.view_specs("test"))[1]
    weight = dict(network.named_modules())[flow.layer].weight
    torch.testing.assert_close(flow.kernels[3, 1, 4], weight[3, 9].detach().double())


def test_other_layers_by_name_and_wrong_names():
    network, _ = build_with_views("Res3D")
    (found,) = first_filters("net", network, network.view_specs("test"), "layer2.0.conv1.0")
    assert found.kernels.shape[:3] == (16, 8, 3)
    with pytest.raises(UserError, match=r"no such convolution\. Did you mean layer2"):
        first_filters("net", network, network.view_specs("test"), "layer2.0.conv1")


def test_the_strip_of_an_inflated_filter_repeats_itself():
    torch.manual_seed(0)
    kernel = torch.randn(4, 3, 5, 5)
    size = 5 + 1
    still = _mosaic(Filters("a", "conv", inflate_kernel(kernel, 3, 3).double(), "conv"))
    np.testing.assert_array_equal(still[:5, :5], still[:5, size : size + 5])
    np.testing.assert_array_equal(still[:5, :5], still[:5, 2 * size : 2 * size + 5])
    assert (still[6, :17] == 0.88).all()  # an empty bar
    moving = _mosaic(Filters("a", "conv", torch.randn(4, 3, 3, 5, 5, dtype=torch.float64), "conv"))
    assert (moving[:5, :5] != moving[:5, size : size + 5]).any()
    assert (moving[6, :17] == 0).any()


def test_filters_of_many_networks_in_one_picture():
    torch.manual_seed(0)
    flow = Filters("flow", "stem", torch.randn(70, 2, 3, 3, 3, dtype=torch.float64), "stem")
    still = Filters("2D", "stem", torch.randn(5, 1, 1, 3, 3, dtype=torch.float64), "")
    figure = draw_filters([flow, still])
    titles = [axis.get_title() for axis in figure.axes]
    assert "64 of 70 filters, 2 × 3 × 3 × 3" in titles[0]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        "flow, stem",
        "2D: no kernel over time",
    ]


# --------------------------------------------------------------------------------------------------------- entropy
def density_of(logits, temperature=1.0):
    meter = EntropyMeter(temperature)
    for part in logits.split(7):
        meter.add(part)
    return meter.read()


@pytest.mark.parametrize("num_classes", [2, 10, 1000])
def test_entropy_of_a_uniform_teacher_is_ln_k(num_classes):
    density = density_of(torch.full((20, num_classes), 3.0))
    assert density.entropies == pytest.approx(math.log(num_classes), rel=1e-6)
    assert density.largest == pytest.approx(math.log(num_classes))
    assert density.kept_share(0.99 * math.log(num_classes)) == 0
    certain = density_of(100 * torch.eye(num_classes)[:20])
    assert certain.entropies == pytest.approx(0, abs=1e-6)
    assert certain.kept_share(0.1) == 1


def test_the_gate_keeps_the_cumulative_share():
    objective = two_teachers()
    views = make_views(64)
    term = next(term for term in objective.terms if term.max_entropy is not None)
    logits = teacher_logits(objective, term.name, views)
    density = density_of(logits, term.temperature)
    kept = float(objective.prepare(views, {"label": torch.zeros(64, dtype=torch.long)}).report[f"kept/{term.name}"])
    assert 0 < kept < 1
    assert density.kept_share(term.max_entropy) == pytest.approx(kept)
    edge = float(density.entropies[5])  # an example at the threshold is not kept
    assert density.kept_share(edge) == pytest.approx(float((density.entropies < edge).mean()))


def test_table_of_the_density_adds_up():
    torch.manual_seed(0)
    logits = torch.randn(500, 10) * torch.linspace(0, 6, 500)[:, None]
    study = EntropyStudy("T", density_of(logits), [f"c{n}" for n in range(10)], thresholds=[1.0])
    header, *rows = entropy_rows(study)
    assert header == ["from", "to", "examples", "density", "share_below"]
    assert sum(row[2] for row in rows) == 500
    assert sum(float(row[3]) * BIN for row in rows) == pytest.approx(1, abs=1e-4)
    for row in rows:
        assert float(row[4]) == pytest.approx(study.density.kept_share(float(row[1])), abs=1e-6)
    assert float(rows[-1][1]) > math.log(10)
    numbers = entropy_numbers(study)
    assert numbers["kept_share"] == {"1": study.density.kept_share(1.0)}
    answers = np.bincount(logits.argmax(1), minlength=10)
    assert numbers["answers"] == [
        {"class": f"c{n}", "examples": int(answers[n])} for n in np.argsort(-answers, kind="stable") if answers[n]
    ]


def test_examples_of_low_median_and_high_entropy():
    entropies = np.random.default_rng(0).permutation(100).astype(np.float32)
    density = EntropyDensity(entropies, np.zeros(100, dtype=np.int32), 5)
    found = {level: sorted(entropies[places].tolist()) for level, places in density.examples(4).items()}
    assert found == {"lowest": [0, 1, 2, 3], "median": [48, 49, 50, 51], "highest": [96, 97, 98, 99]}
    few = EntropyDensity(entropies[:7], np.zeros(7, dtype=np.int32), 5).examples(6)
    assert sorted(place for places in few.values() for place in places) == sorted(
        {place for places in few.values() for place in places}
    )


def test_entropy_of_dense_logits_is_that_of_the_gate():
    torch.manual_seed(0)
    logits = torch.randn(3, 4, 2, 5, 5)
    density = density_of(logits)
    by_hand = torch.distributions.Categorical(logits=logits.movedim(1, -1)).entropy().mean((1, 2, 3))
    np.testing.assert_allclose(density.entropies, by_hand.numpy(), rtol=1e-5)


def test_picture_of_the_entropy_has_runs_and_frames():
    frame = np.zeros((8, 8, 3), dtype=np.uint8)
    study = EntropyStudy(
        "T",
        density_of(torch.randn(50, 4)),
        ["a", "b", "c", "a class with a name that is far too long"],
        thresholds=[0.5, 1.0],
        accuracies={0.5: [0.4, 0.5], 1.0: [0.6], math.inf: [0.55]},
        examples={"lowest": [Example(frame, 0.1, "a", "x.mp4")], "highest": [Example(frame, 1.2, "b", "y.mp4")] * 2},
    )
    texts = [text.get_text() for axis in draw_entropy(study).axes for text in (axis.get_legend() or axis).texts]
    assert "no gate: 55.0 %" in texts
    assert any(text.startswith("0.5 nats keep") for text in texts)
    assert entropy_numbers(study)["accuracy"] == {"0.5": [0.4, 0.5], "1": [0.6], "no gate": [0.55]}


# ------------------------------------------------------------------------------------------------------- per class
def scores_of(name, logits, paths=None):
    count = len(logits)
    labels = np.arange(count) % len(CLASSES)
    return Scores(name, paths or [f"/v/{n}.mp4" for n in range(count)], labels, softmax(logits), list(CLASSES))


def test_a_run_compared_with_itself_differs_nowhere():
    one = scores_of("one", noisy(0))
    found = compare_runs(one, scores_of("again", noisy(0)))
    assert [own.difference for own in found.classes] == [0.0] * 7
    assert [(own.low, own.high) for own in found.classes] == [(0.0, 0.0)] * 7
    assert (found.improved, found.degraded, found.unchanged, found.overall.difference) == (0, 0, 7, 0.0)


def test_differences_are_those_of_the_common_videos():
    """By path, in whatever order; what one run lacks is named and left out."""
    first, second = noisy(0), noisy(1)
    order = np.random.default_rng(2).permutation(60)
    labels = np.arange(70) % 7
    other = Scores("b", [f"/v/{n}.mp4" for n in order], labels[order], softmax(second[order]), list(CLASSES))
    found = compare_runs(scores_of("a", first), other)
    assert found.missing == {"b": [f"/v/{n}.mp4" for n in range(60, 70)]}
    right = np.stack([values[:60].argmax(1) == labels[:60] for values in (first, second)]).astype(float)
    by_hand = {CLASSES[k]: right[0, labels[:60] == k].mean() - right[1, labels[:60] == k].mean() for k in range(7)}
    assert {own.name: own.difference for own in found.classes} == pytest.approx(by_hand)
    assert [own.difference for own in found.classes] == sorted(by_hand.values(), reverse=True)
    assert found.overall.difference == pytest.approx(right[0].mean() - right[1].mean())
    assert found.improved == sum(value > 0.001 for value in by_hand.values())
    assert found.degraded == sum(value < -0.001 for value in by_hand.values())
    assert found.improved > 0
    assert found.degraded > 0
    rows = comparison_rows(found)
    assert rows[0][:2] == ["name", "videos"]
    assert sum(row[1] for row in rows[1:]) == 60


def test_intervals_are_those_of_drawing_videos_again():
    first, second = noisy(0, count=700, strength=2.5), noisy(1, count=700, strength=1.5)
    found = compare_runs(scores_of("a", first), scores_of("b", second))
    labels = np.arange(700) % 7
    gains = (first.argmax(1) == labels).astype(int) - (second.argmax(1) == labels).astype(int)
    rng = np.random.default_rng(5)
    for own in [found.overall, *found.classes]:
        own_gains = gains if own is found.overall else gains[labels == CLASSES.index(own.name)]
        drawn = [rng.choice(own_gains, len(own_gains)).mean() for _ in range(800)]
        low, high = np.quantile(drawn, [0.025, 0.975])
        assert (own.low, own.high) == pytest.approx((low, high), abs=0.3 * (high - low))
        assert own.low <= own.difference <= own.high
    assert found.overall.is_clear
    assert compare_runs(scores_of("a", first), scores_of("b", second)) == found  # seeded


def test_of_many_classes_both_ends_are_drawn():
    count = 60
    names = [f"class {n}" for n in range(count)]
    labels = np.arange(3 * count) % count
    rng = np.random.default_rng(0)
    first, second = (Scores(n, [str(v) for v in range(len(labels))], labels, rng.random((len(labels), count)), names)
                     for n in "ab")  # fmt: skip
    found = compare_runs(first, second, resamples=100)
    left = draw_comparison(found, most=4).axes[0]
    shown = [text.get_text().rsplit(" (", 1)[0] for text in left.get_yticklabels()]
    assert shown == [own.name for own in [*found.classes[:4], *found.classes[-4:]]]


# ------------------------------------------------------------------------------------------------------- confusion
def test_mistakes_are_listed_by_number():
    labels = np.array([0] * 6 + [1] * 4 + [2] * 2)
    answers = np.array([0, 0, 1, 1, 1, 2, 1, 1, 1, 0, 2, 2])
    table = confusion_of(labels, answers, 4)
    assert table.tolist() == [[2, 3, 1, 0], [1, 3, 0, 0], [0, 0, 2, 0], [0, 0, 0, 0]]
    names = ["a", "b", "c", "nobody"]
    assert mistakes(table, names) == [("a", "b", 3, 0.5), ("a", "c", 1, 1 / 6), ("b", "a", 1, 0.25)]
    assert confusion_numbers("run", table, names)["top1"] == pytest.approx(7 / 12)
    image = draw_confusion("run", table, names).axes[0].images[0].get_array()
    assert image[0].tolist() == pytest.approx([100 / 3, 50, 100 / 6, 0])
    assert image.mask[3].all()  # no videos, no share
    assert not image.mask[:3].any()


# ----------------------------------------------------------------------------------------------------------- t-SNE
def test_leave_one_out_against_a_loop():
    torch.manual_seed(0)
    features, labels = torch.randn(60, 5), torch.arange(60) % 3
    features[labels == 1] += 1.5
    unit = torch.nn.functional.normalize(features.double(), dim=1)
    right = 0
    for row in range(60):
        others = [(float(unit[row] @ unit[other]), int(labels[other])) for other in range(60) if other != row]
        nearest = sorted(others, reverse=True)[:5]
        votes = [(sum(own == c for _, own in nearest), sum(s for s, own in nearest if own == c), c) for c in range(3)]
        right += max(votes)[2] == int(labels[row])
    assert leave_one_out_accuracy(features, labels, 5) == pytest.approx(right / 60)
    assert leave_one_out_accuracy(torch.randn(4, 3), torch.arange(4), 20) == 0  # nobody votes for itself


def test_separated_classes_and_mixed_ones():
    torch.manual_seed(0)
    labels = torch.arange(60) % 3
    apart = torch.randn(60, 12) + 30 * torch.eye(12)[labels]
    names, paths = ["a", "b", "c"], [f"{n}.mp4" for n in range(60)]
    good = embed("good", apart, labels, names, paths, neighbors=5)
    mixed = embed("mixed", torch.randn(60, 12), labels, names, paths, neighbors=5)
    assert good.knn == 1
    assert good.silhouette > 0.8
    assert mixed.knn < 0.6
    assert abs(mixed.silhouette) < 0.1
    assert good.points.shape == (60, 2)
    again = embed("good", apart, labels, names, paths, neighbors=5)
    np.testing.assert_array_equal(good.points, again.points)
    rows = embedding_rows([good, mixed])
    assert len(rows) == 1 + 120
    assert rows[1][:3] == ["good", "0.mp4", "a"]
    figure = draw_embeddings([good, mixed])
    assert figure.axes[0].get_title() == f"good\n5-NN 100.0 %, silhouette {good.silhouette:.3f}"
    same = embed("collapsed", torch.zeros(60, 12), labels, names, paths, neighbors=5)
    assert np.isfinite(same.points).all()
    assert same.silhouette == 0
    with pytest.raises(UserError, match="not finite"):
        embed("broken", torch.full((60, 12), torch.nan), labels, names, paths)
    with pytest.raises(UserError, match="too few for a picture"):
        embed("few", apart[:2], labels[:2], names, paths[:2])


def test_classes_are_chosen_by_name_or_by_seed():
    present = [f"class {n}" for n in range(50)]
    assert choose_classes(present, ["class 7", "class 3"], 10, 0) == ["class 3", "class 7"]
    first = choose_classes(present, [], 10, 0)
    assert len(set(first)) == 10
    assert first == choose_classes(present, [], 10, 0)
    assert first != choose_classes(present, [], 10, 1)
    assert first == sorted(first, key=present.index)
    with pytest.raises(UserError, match="no videos of the class 'class 99'"):
        choose_classes(present, ["class 99"], 10, 0)
    with pytest.raises(UserError, match=f"needs 2 to {MAX_CLASSES}"):
        choose_classes(present, present, 10, 0)


# ------------------------------------------------------------------------------------------------------- any names
def test_any_name_can_be_drawn():
    """A formula that is none would end the drawing, and legends leave out what begins with an underscore."""
    names = ["$\\frac{1$", "_hidden", "a\nb", "caf\udce9", "x" * 500, "<b>bold</b>"]
    labels = np.arange(6)
    runs = [Scores(name, [*"abcdef"], labels, np.eye(6)[answers], names) for name, answers in
            (("_a $x^$ run", labels), ("other", labels[::-1]))]  # fmt: skip
    figure = draw_comparison(compare_runs(*runs, resamples=100))
    figure.canvas.draw()
    assert [text.get_text().strip() for text in figure.legends[0].get_texts()] == [r"_a \$x^\$ run", "other"]
    shown = [text.get_text().rsplit(" (", 1)[0].strip() for text in figure.axes[0].get_yticklabels()]
    assert sorted(shown) == sorted([r"\$\frac{1\$", "_hidden", "a b", "caf?", "x" * 35 + "…", "<b>bold</b>"])
    figure.suptitle(names[0])  # the control: as it is, it cannot be drawn
    with pytest.raises(ValueError, match="Expected"):
        figure.canvas.draw()
