"""``distinit ensemble``: averages against NumPy, matching by path, refusals."""

import json

import numpy as np
import pytest

from distinit_plugin import cli
from distinit_plugin.engine.ensemble import Scores, combine_scores, read_scores
from distinit_plugin.engine.evaluate import top_k
from distinit_plugin.errors import UserError

CLASSES = [f"class {number}" for number in range(7)]


def softmax(logits):
    e = np.exp(logits - logits.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def write(folder, logits, paths=None, labels=None, classes=CLASSES):
    """The file of a test whose videos had one clip each."""
    folder.mkdir(parents=True)
    count = len(logits)
    np.savez_compressed(
        folder / "scores.npz",
        paths=np.array(paths or [f"/videos/{n}.mp4" for n in range(count)]),
        labels=np.arange(count) % len(classes) if labels is None else labels,
        scores=softmax(logits),
        logits=logits,
        class_names=np.array(classes),
    )
    return folder


def noisy(seed, count=70, strength=1.5):
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(count, 7)) * rng.uniform(0.3, 4, (count, 1))
    logits[np.arange(count), np.arange(count) % 7] += strength
    return logits


@pytest.mark.parametrize("combine", ["probs", "logits"])
def test_averages_against_numpy(combine, tmp_path):
    logits = [noisy(seed) for seed in range(3)]
    runs = [write(tmp_path / f"run{n}" / "test", values).parent for n, values in enumerate(logits)]
    file = tmp_path / "out.json"
    words = ["ensemble", *map(str, runs), "--combine", combine, "--weights", "1", "2", "0.5", "--json", str(file)]
    assert cli.main(words) == 0
    parts = logits if combine == "logits" else [softmax(values) for values in logits]
    mean = parts[0] + 2 * parts[1] + 0.5 * parts[2]
    ranking, labels = np.argsort(-mean, axis=1), np.arange(70) % 7
    found = json.loads(file.read_text())
    assert found["together"]["top1"] == np.mean(ranking[:, 0] == labels)
    assert found["together"]["top5"] == np.mean([label in row[:5] for label, row in zip(labels, ranking, strict=True)])
    single = [np.mean(np.argmax(values, axis=1) == labels) for values in logits]
    assert [run["top1"] for run in found["runs"].values()] == single
    assert found["together"]["top1"] > max(single)  # else the runs taught one another nothing
    assert (found["num_videos"], found["missing"]) == (70, {})


def test_probabilities_and_logits_are_two_things():
    """One sure run against two doubtful ones: what is averaged decides."""
    logits = [np.array([[9.0, 0.0]]), np.array([[0.0, 1.5]]), np.array([[0.0, 1.5]])]

    def top1(values):
        runs = [Scores(str(n), ["a"], np.array([0]), v, ["x", "y"]) for n, v in enumerate(values)]
        return combine_scores(runs, [1, 1, 1]).together[0]

    assert top1(logits) == 1.0
    assert top1([softmax(values) for values in logits]) == 0.0


def test_videos_are_matched_by_path_and_missing_ones_named(tmp_path, capsys):
    logits = noisy(1)
    order = np.random.default_rng(0).permutation(70)[:-2]
    paths = [f"/videos/{n}.mp4" for n in range(70)]
    one = write(tmp_path / "one", logits)
    two = write(tmp_path / "two", logits[order], [paths[n] for n in order], order % 7)
    lost = sorted(set(paths) - {paths[n] for n in order})
    assert cli.main(["ensemble", str(one), str(two)]) == 0
    printed = capsys.readouterr().out
    assert "68 test videos" in printed
    assert f"{two / 'scores.npz'} has no scores of 2 videos" in printed
    assert all(path in printed for path in lost)
    runs = [
        Scores("1", paths, np.arange(70) % 7, logits, CLASSES),
        Scores("2", [paths[n] for n in order], order % 7, logits[order], CLASSES),
    ]
    # The same scores twice, in another order: nothing may change but the two videos.
    result = combine_scores(runs, [1, 3])
    keep = np.sort(order)
    assert result.together[0] == top_k(logits[keep], keep % 7, 1) == result.runs["2"][0]
    assert sorted(result.missing["2"]) == lost


def test_other_classes_labels_and_videos_are_refused(tmp_path, capsys):
    good = write(tmp_path / "good", noisy(1))
    cases = {
        "class 6 is 'class 6' and 'other'": write(tmp_path / "a", noisy(1), classes=[*CLASSES[:6], "other"]),
        "have other labels for 70 videos": write(tmp_path / "b", noisy(1), labels=(np.arange(70) + 1) % 7),
        "no video is in all of": write(tmp_path / "c", noisy(1), paths=[f"/other/{n}.mp4" for n in range(70)]),
        "has a video twice": write(tmp_path / "d", noisy(1), paths=["/x.mp4"] * 70),
        "do not fit together": write(tmp_path / "e", noisy(1), labels=np.full(70, 7)),
        "cannot be read as the scores of a test (there is no such file)": tmp_path / "absent",
        "is named twice": good,
    }
    for text, folder in cases.items():
        assert cli.main(["ensemble", str(good), str(folder)]) == 1
        assert text in capsys.readouterr().err
    for content in (b"", b"PK\x03\x04 nothing", b"\x80\x04N."):
        (tmp_path / "broken.npz").write_bytes(content)
        assert cli.main(["ensemble", str(good), str(tmp_path / "broken.npz")]) == 1
        assert "cannot be read as the scores" in capsys.readouterr().err
    for weights in (["1"], ["1", "-1"], ["0", "0"]):
        assert cli.main(["ensemble", str(good), str(cases["has a video twice"]), "--weights", *weights]) == 1
        assert "--weights" in capsys.readouterr().err


@pytest.mark.parametrize(
    "change",
    [
        {"labels": np.array(["a"] * 70)},
        {"labels": np.full(70, np.nan)},
        {"scores": np.full((70, 7), "0.1")},
        {"scores": np.full((70, 7), 1j)},
        {"paths": np.array("x")},
        {"class_names": np.array(7)},
    ],
    ids=["text for labels", "labels that are no numbers", "text for scores", "complex scores", "no list", "a number"],
)
def test_arrays_of_other_kinds_are_no_scores(change, tmp_path):
    file = write(tmp_path / "run", noisy(1)) / "scores.npz"
    with np.load(file) as archive:
        np.savez(file, **{**archive, **change})
    with pytest.raises(UserError, match="cannot be read as the scores"):
        read_scores(file, "probs")


def test_a_damaged_byte_is_no_defect_of_the_program(tmp_path):
    file = write(tmp_path / "run", noisy(1)) / "scores.npz"
    whole, refused = file.read_bytes(), 0
    for place in range(0, len(whole), 101):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
        try:
            read_scores(file, "probs")
        except UserError:
            refused += 1
    assert refused > len(whole) // 202  # checksums see nearly all of them


def test_tests_before_logits_were_saved(tmp_path, capsys):
    folder = write(tmp_path / "old", noisy(1))
    with np.load(folder / "scores.npz") as archive:
        kept = {key: archive[key] for key in archive if key != "logits"}
    np.savez(folder / "scores.npz", **kept)
    assert cli.main(["ensemble", str(folder)]) == 0
    assert cli.main(["ensemble", str(folder), "--combine", "logits"]) == 1
    assert "has no mean logits: repeat the test" in capsys.readouterr().err
