"""``distinit train-rpn`` from keyframes to a checkpoint, and demonstrations of networks that classify boxes."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from small_jobs import checkpoint, differing, json_stats, merged, weights_of
from test_demo import decoded

from distinit_plugin import build, cli, load_cfg
from distinit_plugin.config import rules
from distinit_plugin.demos.persons import ACTION_NAMES, START, PersonData, make_persons
from distinit_plugin.detection.drawing import Mark
from distinit_plugin.detection.files import read_boxes
from distinit_plugin.detection.rpn import ARCHS, PersonRpn
from distinit_plugin.engine.propose import best_overlaps
from distinit_plugin.engine.refinement import Refinement
from distinit_plugin.jobs.demo import Shown, demo
from distinit_plugin.jobs.demo_boxes import BoxSource, marks_of
from distinit_plugin.jobs.running import run
from distinit_plugin.video.decode import open_video

SIZE = 48


@pytest.fixture(scope="module")
def persons(tmp_path_factory) -> PersonData:
    """Six training keyframes and four to test on."""
    return make_persons(
        tmp_path_factory.mktemp("persons") / "set", num_train=2, num_test=1, num_keyframes=4, height=64, width=96
    )


def settings(output: Path, data: PersonData, **sections):
    base = {
        "OUTPUT_DIR": str(output),
        "LOG_PERIOD": 1,
        "MODEL": {"NUM_CLASSES": len(ACTION_NAMES)},
        "DETECTION": {"ENABLE": True},
        "AVA": {"ANNOTATION_DIR": str(data.annotations), "FULL_TEST_ON_VAL": True},
        "KEYFRAMES": {"VIDEO_DIR": str(data.videos), "VIDEO_START": START},
        "DATA": {"TRAIN_CROP_SIZE": SIZE, "TEST_CROP_SIZE": SIZE, "TRAIN_JITTER_SCALES": [SIZE, 56]},
        "DATA_LOADER": {"NUM_WORKERS": 0},
        "TRAIN": {"BATCH_SIZE": 4},
        "TEST": {"BATCH_SIZE": 4},
        "SOLVER": {"MAX_EPOCH": 1, "BASE_LR": 0.01},
        "RPN": {"ARCH": "resnet18", "ANCHOR_SIZES": [8.0, 16.0, 24.0, 32.0, 48.0], "NUM_PROPOSALS": 20},
        "RUNNER": {"PRECISION": "fp32", "CHECK_CONVOLUTIONS": False},
    }
    return merged(base, sections)


def rpn_settings(output: Path, data: PersonData, **sections):
    words = {"MODEL": {"MODEL_NAME": "PersonRpn"}, "KEYFRAMES": {"TEST_BOXES": "ground_truth"}}
    return merged(settings(output, data, **words), sections)


def written(path: Path, contents) -> str:
    path.write_text(yaml.safe_dump(contents))
    return str(path)


@pytest.fixture(scope="module")
def trained(persons, tmp_path_factory) -> Path:
    """The folder of a training by the verb, on the configuration of a video network."""
    folder = tmp_path_factory.mktemp("rpn")
    output = folder / "run"
    video_network = settings(output, persons, ACTION={"LOSS": "bce", "LOSS_WEIGHT": 1.0}, MODEL={"MODEL_NAME": "S3DG"})
    assert cli.main(["train-rpn", "--cfg", written(folder / "a.yaml", video_network)]) == 0
    return output


# --------------------------------------------------------------------------------------------------------- train-rpn
def test_a_training_by_the_verb(trained, persons):
    tensors = weights_of(trained)
    assert set(tensors) == set(PersonRpn("resnet18", input=build.input_spec(load_cfg_of(trained))).state_dict())
    figures = json.loads((trained / "test" / "metrics.json").read_text())
    assert set(figures) == {"loss", "recall50", "recall70", "mean_iou", "proposals"}
    assert 0 < figures["mean_iou"] <= 1
    assert 0 <= figures["recall70"] <= figures["recall50"] <= 1
    assert figures["proposals"] == 20
    (validated,) = json_stats(trained, "val_epoch")
    assert validated["mean_iou"] == pytest.approx(figures["mean_iou"], abs=1e-5)  # the same keyframes and weights
    steps = json_stats(trained, "train_iter")
    assert all(np.isfinite(step["loss"]) for step in steps)


def load_cfg_of(output: Path):
    from distinit_plugin.config.load import parse_cfg
    from distinit_plugin.engine.checkpoint import load_checkpoint

    return parse_cfg(load_checkpoint(checkpoint(output))["cfg"], "cfg", check=False)[0]


def test_figures_are_those_of_a_plain_loop(trained, persons):
    """Mean overlap and recall of the validation's keyframes, picture by picture."""
    cfg = load_cfg_of(trained)
    network = build.build_network(cfg)
    network.load_state_dict(weights_of(trained))
    network.eval()
    keyframes = build.build_keyframes(cfg, "test")
    dataset = build.build_dataset(cfg, keyframes, build.view_specs(network, {}, "test"), "test", keep_index=False)
    from distinit_plugin.types import SampleKey

    (spec,) = network.view_specs("test").values()
    best = []
    for number in range(len(keyframes)):
        sample = dataset[SampleKey(0, number, number)]
        pixels = sample["views"][spec.pixels].float() / 255
        mean, std = (torch.tensor(values).view(3, 1, 1, 1) for values in (spec.mean, spec.std))
        with torch.no_grad():
            boxes = network.find(((pixels - mean) / std)[None, :, 0]).boxes[:, 1:]
        for x1, y1, x2, y2 in sample["targets"]["boxes"].tolist():
            overlaps = []
            for a1, b1, a2, b2 in boxes.tolist():
                common = max(min(x2, a2) - max(x1, a1), 0) * max(min(y2, b2) - max(y1, b1), 0)
                overlaps.append(common / ((x2 - x1) * (y2 - y1) + (a2 - a1) * (b2 - b1) - common))
            best.append(max(overlaps))
    figures = json.loads((trained / "test" / "metrics.json").read_text())
    assert len(best) > 2
    assert figures["mean_iou"] == pytest.approx(np.mean(best), abs=1e-4)
    assert figures["recall50"] == pytest.approx(np.mean(np.array(best) >= 0.5), abs=1e-6)


def test_the_weights_start_others(trained, persons, tmp_path):
    """As weights of a further training, frozen normalisation included, and as the proposer of a video network."""
    weights = str(checkpoint(trained))
    again = rpn_settings(
        tmp_path / "again",
        persons,
        RPN={"WEIGHTS": weights, "FROZEN_NORM": True},
        SOLVER={"BASE_LR": 1e-8},
        TEST={"ENABLE": False},
        AVA={"FULL_TEST_ON_VAL": False},
    )
    run(load_cfg(written(tmp_path / "again.yaml", again))[0])
    before, after = weights_of(trained), weights_of(tmp_path / "again")
    kept = {key: value for key, value in before.items() if not key.endswith("num_batches_tracked")}
    assert kept.keys() == after.keys()
    assert all(torch.equal(kept[key], after[key]) for key in kept if "running_" in key)
    assert all(torch.allclose(kept[key], after[key], atol=1e-5) for key in kept)
    assert differing(kept, after)  # it did train
    roi = settings(
        tmp_path / "roi",
        persons,
        MODEL={"MODEL_NAME": "Res3D"},
        NETWORK={"WIDTH": 8},
        RESNET={"DEPTH": 10},
        DATA={"NUM_FRAMES": 4, "SAMPLING_RATE": 2},
        ACTION={"LOSS": "bce", "LOSS_WEIGHT": 1.0},
        ROI={"PROPOSALS": "rpn", "SAMPLES": 8},
        RPN={"WEIGHTS": weights, "CROP_SIZE": 48},
    )
    cfg = load_cfg(written(tmp_path / "roi.yaml", roi))[0]
    network = build.build_network(cfg)
    assert not any(key.startswith("rpn") for key in network.bare_state_dict())
    assert torch.equal(
        network.proposer.rpn.state_dict()["rpn.head.cls_logits.weight"], before["rpn.head.cls_logits.weight"]
    )
    assert not any(parameter.requires_grad for parameter in network.proposer.rpn.parameters())


def test_the_best_overlap_is_of_the_own_picture():
    truth = torch.tensor([[0.0, 0, 0, 10, 10], [1, 0, 0, 10, 10], [2, 0, 0, 10, 10]])
    boxes = torch.tensor([[0.0, 0, 0, 10, 5], [1, 0, 0, 10, 10], [1, 0, 0, 5, 5]])
    assert best_overlaps(truth, boxes).tolist() == [0.5, 1.0, 0.0]
    assert best_overlaps(truth, boxes[:0]).tolist() == [0, 0, 0]
    assert best_overlaps(truth[:0], boxes).shape == (0,)


def test_what_corrections_are_worth():
    """Proposals of persons before and after, by hand; others, and keyframes that come twice, do not count."""
    truth = {0: np.array([[0.0, 0, 0.5, 1.0], [0.5, 0, 1, 1]]), 1: np.zeros((0, 4)), 2: np.array([[0.0, 0, 1, 1]])}
    refinement = Refinement(lambda number: truth[number])
    proposed = np.array([[0.0, 0, 0.5, 0.8], [0.5, 0, 1, 0.6], [0.0, 0, 0.1, 0.1]])
    corrected = np.array([[0.0, 0, 0.5, 0.9], [0.5, 0, 1, 0.5], [0.0, 0, 0.5, 1.0]])
    refinement.add(0, proposed, corrected)
    refinement.add(1, proposed, corrected)
    refinement.add(2, proposed[:0], corrected[:0])
    refinement.add(0, proposed, corrected)
    found = refinement.conclude(lambda own: [own, own])  # two ranks that saw the same
    assert (found.count, found.proposed, found.corrected) == (2, pytest.approx(0.7), pytest.approx(0.7))
    assert found.metrics() == {"count": 2, "proposed": found.proposed, "corrected": found.corrected}
    none = Refinement(lambda number: truth[1]).conclude()
    assert none.metrics() == {"count": 0, "proposed": None, "corrected": None}


def test_rules(persons, tmp_path, capsys):
    assert rules.RPN_ARCHS == ARCHS
    for changes, message in (
        ({"DETECTION": {"ENABLE": False}}, "DETECTION.ENABLE"),
        ({"ACTION": {"LOSS_WEIGHT": 1.0}}, "ACTION.LOSS_WEIGHT"),
        ({"KEYFRAMES": {"TEST_BOXES": "predicted"}}, "KEYFRAMES.TEST_BOXES"),
        ({"RPN": {"FROZEN_NORM": True}}, "RPN.FROZEN_NORM"),
        ({"RPN": {"ARCH": "resnet19"}}, "RPN.ARCH"),
        ({"RPN": {"ANCHOR_SIZES": [1.0]}}, "RPN.ANCHOR_SIZES"),
        ({"RPN": {"WEIGHTS": "gone.pth"}}, "RPN.WEIGHTS"),
        ({"SOLVER": {"LR_POLICY": "plateau"}}, "SOLVER.LR_POLICY"),
    ):
        path = written(tmp_path / "wrong.yaml", rpn_settings(tmp_path / "wrong", persons, **changes))
        assert cli.main(["run", "--cfg", path]) == 1
        assert f"{message}: " in capsys.readouterr().err
    assert not (tmp_path / "wrong" / "checkpoints").exists()
    roi = settings(tmp_path / "b", persons, ACTION={"LOSS": "bce", "LOSS_WEIGHT": 1.0}, ROI={"PROPOSALS": "rpn"})
    assert cli.main(["run", "--cfg", written(tmp_path / "b.yaml", roi)]) == 1
    assert "RPN.WEIGHTS: " in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------ demonstrations
@pytest.fixture(scope="module")
def classifier(persons, trained, tmp_path_factory) -> dict[str, Path]:
    """Checkpoints of small networks that classify boxes: given ones, and those of the RPN."""
    folder = tmp_path_factory.mktemp("classifier")
    paths = {}
    for kind in ("given", "rpn", "own"):
        contents = settings(
            folder / kind,
            persons,
            MODEL={"MODEL_NAME": "Res3D"},
            NETWORK={"WIDTH": 8},
            RESNET={"DEPTH": 10},
            DATA={"NUM_FRAMES": 4, "SAMPLING_RATE": 2},
            ACTION={"LOSS": "bce", "LOSS_WEIGHT": 1.0},
            ROI={"PROPOSALS": kind, "SAMPLES": 8, "REFINE_BOXES": kind != "given"},
            RPN={"WEIGHTS": str(checkpoint(trained)), "CROP_SIZE": SIZE},
            TEST={"ENABLE": False},
            SOLVER={"BASE_LR": 1e-4},
        )
        run(load_cfg(written(folder / f"{kind}.yaml", contents))[0])
        paths[kind] = checkpoint(folder / kind)
    return paths


def test_given_boxes_are_drawn_where_they_are(persons, classifier, tmp_path, capsys):
    """At the seconds of the csv, over half a second before and after, and nowhere else."""
    (name,) = persons.names("val")
    video = persons.videos / f"{name}.mp4"
    boxes = persons.annotations / "ava_val_predicted_boxes.csv"
    output = tmp_path / "out.mp4"
    words = ["--checkpoint", str(classifier["given"]), "--boxes", str(boxes), "--start", str(START)]
    words += ["--box-floor", "0.9", "--floor", "0", "--top", "2"]
    assert cli.main(["demo", str(video), str(output), *words]) == 0
    assert "looks)" in capsys.readouterr().out
    shown = Shown(2, 0.0, 1.0)
    result = demo(
        str(video),
        tmp_path / "b.mp4",
        checkpoint=str(classifier["given"]),
        shown=shown,
        boxes=BoxSource(str(boxes), START, floor=0.9),
    )
    table = read_boxes(boxes)
    sure = table.scores >= 0.9
    assert [moment.seconds for moment in result.moments] == sorted({s - START for s in table.seconds[sure]})
    times, frames = decoded(output)
    with open_video(video) as source:
        plain = source.read(range(len(times))).astype(int)
    for moment in result.moments:
        own = table.boxes[sure & (table.seconds == moment.seconds + START)]
        drawn = np.array([mark.box for mark in moment.marks])
        np.testing.assert_allclose(drawn[np.lexsort(drawn.T)], own[np.lexsort(own.T)], atol=1e-9)
        for mark in moment.marks:
            assert len(mark.lines) == 2
            assert all(line.rsplit(" ", 1)[0] in ACTION_NAMES for line in mark.lines)
    changed = np.abs(frames - plain).mean((1, 2, 3))
    centres = np.array([moment.seconds for moment in result.moments])
    far = np.array([np.abs(centres - time).min() > 0.51 for time in times])
    near = np.array([np.abs(centres - time).min() < 0.49 for time in times])
    assert far.any()
    assert changed[near].min() > 2 * changed[far].max()


def test_proposed_boxes(persons, classifier, tmp_path):
    (name,) = persons.names("val")
    video = persons.videos / f"{name}.mp4"
    result = demo(
        str(video),
        tmp_path / "a.mp4",
        checkpoint=str(classifier["rpn"]),
        shown=Shown(3, 0.3, 0.5),
        opts=["RPN.NUM_PROPOSALS", "3"],
    )
    assert [moment.seconds for moment in result.moments[:3]] == [0, 0.5, 1.0]
    assert any(moment.marks for moment in result.moments)
    for mark in (mark for moment in result.moments for mark in moment.marks):
        assert 0 <= mark.box[0] < mark.box[2] <= 1
        assert 1 <= len(mark.lines) <= 3


def test_an_rpn_on_the_networks_own_map_trains_along(classifier):
    folder = classifier["own"].parents[1]
    tensors = weights_of(folder)
    assert {key for key in tensors if key.startswith("rpn.")} == {
        f"rpn.head.{part}.{kind}" for part in ("conv.0.0", "cls_logits", "bbox_pred") for kind in ("weight", "bias")
    }
    assert not any(
        key.startswith("rpn.") for kind in ("given", "rpn") for key in weights_of(classifier[kind].parents[1])
    )
    for step in json_stats(folder, "train_iter_"):
        assert all(np.isfinite(step[f"loss/{term}"]) for term in ("action", "box", "proposal"))
    moved = tensors["rpn.head.cls_logits.bias"]
    assert moved.abs().min() > 0  # they began at 0


def test_boxes_that_are_missing(persons, classifier, tmp_path, capsys):
    (name,) = persons.names("val")
    words = [
        "demo",
        str(persons.videos / f"{name}.mp4"),
        str(tmp_path / "a.mp4"),
        "--checkpoint",
        str(classifier["given"]),
    ]
    assert cli.main(words) == 1
    assert "--boxes FILE.csv" in capsys.readouterr().err
    boxes = persons.annotations / "ava_train_predicted_boxes.csv"
    assert cli.main([*words, "--boxes", str(boxes)]) == 1
    assert f"no box of a video named '{name}'" in capsys.readouterr().err
    assert cli.main([*words, "--detector-weights", str(tmp_path / "gone.pth")]) == 1
    assert "gone.pth" in capsys.readouterr().err


def test_verbs_of_whole_clips_refuse_networks_of_boxes(persons, classifier, trained, tmp_path, capsys):
    video = str(next(persons.videos.glob("val_*.mp4")))
    for path in (classifier["given"], checkpoint(trained)):
        for words in (
            ["predict", video, "--checkpoint", str(path)],
            ["extract-features", video, "--checkpoint", str(path), "--output", str(tmp_path / "features")],
            ["export", str(path), str(tmp_path / "a.safetensors")],
        ):
            assert cli.main(words) == 1, words
            assert "network of boxes in keyframes" in capsys.readouterr().err
    assert cli.main(["demo", video, str(tmp_path / "a.mp4"), "--checkpoint", str(checkpoint(trained))]) == 1
    assert "has no classifier" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_rows_of_one_person_are_one_box():
    from distinit_plugin.detection.tables import BoxTable

    rows = [
        ((0.1, 0.1, 0.5, 0.9), 2, 0.4),
        ((0.1, 0.1, 0.5, 0.88), 1, 0.9),
        ((0.6, 0.1, 0.9, 0.9), 2, 0.5),
        ((0.11, 0.1, 0.5, 0.9), 1, 0.3),
        ((0.1, 0.12, 0.5, 0.9), 3, 0.2),
    ]
    boxes, actions, scores = zip(*rows, strict=True)
    count = len(rows)
    table = BoxTable(
        ("v",),
        np.zeros(count, np.int32),
        np.zeros(count),
        np.array(boxes),
        np.array(actions, np.int32),
        np.array(scores),
    )
    assert marks_of(table, np.arange(count), ["a", "b", "c"], 2) == (
        Mark((0.1, 0.1, 0.5, 0.88), ("a 0.90", "b 0.40"), 1),
        Mark((0.6, 0.1, 0.9, 0.9), ("b 0.50",), 2),
    )
    assert marks_of(table, np.arange(0), ["a", "b", "c"], 2) == ()
