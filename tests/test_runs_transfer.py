"""Runs on labels: fine-tuning, classifier only, inflation, probes, splits, prediction, tests of many clips."""

import csv
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from small_jobs import (
    CLASSES,
    brightness_teacher,
    checkpoint,
    differing,
    json_stats,
    labelled,
    merged,
    small_cfg,
    state_of,
    weights_of,
    write_teacher,
)

from distinit_plugin import build, cli
from distinit_plugin.errors import UserError
from distinit_plugin.jobs import probing
from distinit_plugin.jobs.prediction import predict
from distinit_plugin.jobs.probing import probe
from distinit_plugin.jobs.running import run
from distinit_plugin.jobs.session import Session
from distinit_plugin.jobs.splits import run_splits


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    return write_teacher(tmp_path_factory.mktemp("teacher") / "res2d.pth")


@pytest.fixture(scope="module")
def pretrained(videos, teacher, tmp_path_factory) -> Path:
    """The folder of a pre-training without labels."""
    output = tmp_path_factory.mktemp("pretrained") / "run"
    entries = {"IMAGENET": brightness_teacher(teacher)}
    run(small_cfg(videos, output, SOLVER={"MAX_EPOCH": 2}, DISTILL={"TEACHERS": entries}))
    return output


@pytest.fixture(scope="module")
def finetuned(videos, pretrained, tmp_path_factory) -> Path:
    """The folder of a fine-tuning from it, with validation and test."""
    output = tmp_path_factory.mktemp("finetuned") / "run"
    cfg = small_cfg(
        videos,
        output,
        **labelled(videos, TRAIN="train", VAL="test", TEST="test"),
        SOLVER={"MAX_EPOCH": 3},
        TRAIN={"BATCH_SIZE": 6, "CHECKPOINT_FILE_PATH": str(checkpoint(pretrained, 2))},
        BN={"USE_PRECISE_STATS": True, "NUM_BATCHES_PRECISE": 2},
        RUNNER={"CLIPS_PER_EPOCH": 24},
        TEST={"ENABLE": True},
    )
    result = run(cfg)
    assert result.evaluation is not None
    assert result.training.validation["top1"] == result.evaluation.metrics()["top1"] == 1.0
    return output


def test_finetuning_reports_the_weights_and_learns(finetuned):
    log = (finetuned / "stdout.log").read_text()
    # Everything but the new classifier and its bias comes from the pre-training.
    count = len(weights_of(finetuned, 3)) - 2
    assert f"loaded      {count:5d}" in log
    assert "missing         2  fc.weight, fc.bias" in log
    assert "unexpected      0" in log
    assert [line["top1_err"] for line in json_stats(finetuned, "val_epoch", "json_stats.log")][-1] == 0.0
    metrics = json.loads((finetuned / "test" / "metrics.json").read_text())
    assert (metrics["top1"], metrics["top5"], metrics["num_videos"], metrics["num_clips"]) == (1.0, 1.0, 6, 12)
    assert metrics["per_class"] == {"bright": 1.0, "dark": 1.0}
    with np.load(finetuned / "test" / "scores.npz") as scores:
        np.testing.assert_allclose(scores["scores"].sum(axis=1), 1, atol=1e-6)
    with open(finetuned / "test" / "videos.csv") as file:
        assert [row["correct"] for row in csv.DictReader(file)] == ["1"] * 6
    assert "test_final" in log


def test_classifier_only_leaves_the_trunk_as_it_was(videos, pretrained, tmp_path):
    """Bit for bit: weights, batch norm statistics and counters. Accumulation only changes the order of sums."""
    source = checkpoint(pretrained, 2)
    saved = {}
    for accumulate in (1, 2):
        output = tmp_path / f"accumulate{accumulate}"
        cfg = small_cfg(
            videos,
            output,
            **labelled(videos, TRAIN="train"),
            INIT={"TRAINABLE": "classifier"},
            TRAIN={"BATCH_SIZE": 6, "CHECKPOINT_FILE_PATH": str(source)},
            RUNNER={"ACCUMULATE": accumulate, "CLIPS_PER_EPOCH": 24},
        )
        assert run(cfg).training.steps == 4
        saved[accumulate] = weights_of(output)
    before = weights_of(pretrained, 2)
    for weights in saved.values():
        trunk = {name: tensor for name, tensor in weights.items() if not name.startswith("fc.")}
        assert any("num_batches_tracked" in name for name in trunk)
        assert differing(trunk, before) == []
    assert saved[1]["fc.weight"].abs().max() > 0
    torch.testing.assert_close(saved[2], saved[1], rtol=1e-4, atol=1e-6)
    fresh = build.build_network(cfg)
    assert not torch.allclose(fresh.bare_state_dict()["fc.weight"], saved[1]["fc.weight"])


def test_all_layers_move_in_an_ordinary_fine_tuning(finetuned, pretrained):
    """The negative control of the test above."""
    before, after = weights_of(pretrained, 2), weights_of(finetuned, 3)
    trunk = {name: tensor for name, tensor in after.items() if not name.startswith("fc.")}
    assert differing(trunk, before) == list(trunk)


def test_inflation_into_res3d(videos, teacher, tmp_path):
    output = tmp_path / "run"
    cfg = small_cfg(
        videos,
        output,
        **labelled(videos),
        MODEL={"MODEL_NAME": "Res3D"},
        INIT={"INFLATE_FROM": "Res2D", "INFLATE_WEIGHTS": str(teacher)},
        TEST={"ENABLE": True},
    )
    assert run(cfg).evaluation is not None
    log = (output / "stdout.log").read_text()
    assert "inflated" in log
    assert "random initialisation" in log  # 4 classes there, 2 here
    network = build.build_network(cfg)
    (report,) = build.initialize_network(cfg, network)
    kernel = torch.load(teacher, weights_only=True)["layer1.0.conv1.weight"]
    ours = network.bare_state_dict()["layer1.0.conv1.0.weight"]
    torch.testing.assert_close(ours, kernel.unsqueeze(2).expand(-1, -1, 3, -1, -1) / 3)
    assert {mismatch.name for mismatch in report.mismatched} == {"fc.weight", "fc.bias"}


def test_probe_of_frozen_features(videos, pretrained, tmp_path, capsys):
    output = tmp_path / "probe"
    cfg = small_cfg(videos, output, **labelled(videos), TEST={"CHECKPOINT_FILE_PATH": str(checkpoint(pretrained, 2))})
    before = checkpoint(pretrained, 2).read_bytes()
    result = probe(cfg, neighbors=3)
    assert (result.num_train, result.num_test) == (12, 6)
    assert result.knn == 1.0  # features of an image teacher that knows bright from dark
    assert result.linear == 1.0
    assert json.loads((output / "probe.json").read_text())["knn"] == result.knn
    assert "3-NN" in capsys.readouterr().out
    assert checkpoint(pretrained, 2).read_bytes() == before


def test_probe_refuses_lists_of_different_classes(videos, pretrained, tmp_path, monkeypatch):
    corpora = labelled(videos)
    other = tmp_path / "other"
    for name, new in zip(CLASSES, ("blurred", "dark"), strict=True):
        (other / new).mkdir(parents=True)
        os.link(videos / "test" / name / "video100.mp4", other / new / "video100.mp4")
    corpora["CORPUS"]["TEST"]["VIDEOS"]["PATH"] = str(other)
    cfg = small_cfg(videos, tmp_path / "run", **corpora, TEST={"CHECKPOINT_FILE_PATH": str(checkpoint(pretrained, 2))})
    monkeypatch.setattr(probing, "extract_features", None)  # before anything is decoded
    with pytest.raises(UserError, match=r"CORPUS\.TEST: its classes .* class 0 was 'bright' and is 'blurred' here"):
        probe(cfg)


def test_probe_and_prediction_check_their_convolutions(videos, pretrained, finetuned, tmp_path, monkeypatch):
    seen = []

    def check(self, network, specs):
        seen.append((type(network).__name__, list(specs)))

    monkeypatch.setattr(Session, "check_convolutions", check)
    weights = str(checkpoint(pretrained, 2))
    probe(small_cfg(videos, tmp_path / "run", **labelled(videos), TEST={"CHECKPOINT_FILE_PATH": weights}))
    predict([str(videos / "test" / "dark" / "video100.mp4")], checkpoint=str(checkpoint(finetuned, 3)), num_clips=1)
    assert seen == [("R2Plus1D", ["rgb"])] * 2


def _write_ucf_lists(folder: Path) -> None:
    """A UCF-101 in miniature: each split tests on other videos."""
    folder.mkdir()
    (folder / "classInd.txt").write_text("".join(f"{n} {name}\n" for n, name in enumerate(CLASSES, start=1)))
    for split in (1, 2, 3):
        test = range(2 * (split - 1), 2 * split)
        train = [n for n in range(6) if n not in test]
        names = list(enumerate(CLASSES, start=1))
        (folder / f"trainlist0{split}.txt").write_text(
            "".join(f"{name}/video{n}.mp4 {label}\n" for label, name in names for n in train)
        )
        (folder / f"testlist0{split}.txt").write_text(
            "".join(f"{name}/video{n}.mp4\n" for _, name in names for n in test)
        )


def _splits_cfg(videos, pretrained, tmp_path, **sections):
    _write_ucf_lists(tmp_path / "lists")
    node = {
        "FORMAT": "ucf101",
        "PATH": str(tmp_path / "lists"),
        "ROOT": str(videos / "train"),
        "LABELED": True,
    }
    base = {
        "ACTION": {"LOSS_WEIGHT": 1.0},
        "CORPUS": {"TRAIN": {"VIDEOS": node}, "TEST": {"UCF": node}},
        "TRAIN": {"CHECKPOINT_FILE_PATH": str(checkpoint(pretrained, 2))},
        "TEST": {"ENABLE": True},
    }
    return small_cfg(videos, tmp_path / "run", **merged(base, sections))


def test_three_splits_and_their_mean(videos, pretrained, tmp_path, capsys):
    output, cfg = tmp_path / "run", _splits_cfg(videos, pretrained, tmp_path)
    results = run_splits(cfg)
    assert {name: len(values) for name, values in results.items()} == {"clip_top1": 3, "top1": 3, "top5": 3}
    tested = []
    for split in (1, 2, 3):
        with open(output / f"split_{split}" / "test" / "videos.csv") as file:
            tested.append({Path(row["path"]).name for row in csv.DictReader(file)})
        metrics = json.loads((output / f"split_{split}" / "test" / "metrics.json").read_text())
        assert metrics["top1"] == results["top1"][split - 1]
        assert list(metrics["per_class"]) == list(CLASSES)
    assert tested == [{f"video{n}.mp4" for n in pair} for pair in ((0, 1), (2, 3), (4, 5))]
    assert json.loads((output / "splits.json").read_text())["splits"] == [1, 2, 3]
    assert "±" in capsys.readouterr().out


def test_a_dry_run_of_splits_trains_nothing(videos, pretrained, tmp_path, capsys):
    cfg = _splits_cfg(videos, pretrained, tmp_path)
    file = tmp_path / "job.yaml"
    file.write_text(cfg.dump())
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert cli.main(["run-splits", "--dry-run", "--splits", "1", "3", "--cfg", str(file)]) == 0
    printed = capsys.readouterr().out
    assert [line for line in printed.splitlines() if line.startswith("split ")] == ["split 1", "split 3"]
    assert printed.count("GMAC") == 2
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    (tmp_path / "lists" / "testlist03.txt").write_text("dark/absent.mp4\n")
    assert cli.main(["run-splits", "--dry-run", "--cfg", str(file)]) == 1
    captured = capsys.readouterr()
    assert "GMAC" not in captured.out  # all splits are looked at before the first is measured
    assert "absent.mp4" in captured.err


def test_splits_of_a_folder_are_refused(videos, tmp_path):
    with pytest.raises(UserError, match=r"only ucf101 and hmdb51 have splits.*folder"):
        run_splits(small_cfg(videos, tmp_path / "run", **labelled(videos), TEST={"ENABLE": True}))


def test_prediction_by_name(videos, finetuned, tmp_path):
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"no video at all")
    paths = [str(videos / "test" / name / "video100.mp4") for name in CLASSES] + [str(broken)]
    bright, dark, bad = predict(paths, checkpoint=str(checkpoint(finetuned, 3)), num_clips=2)
    assert [bright.classes[0][0], dark.classes[0][0]] == ["bright", "dark"]
    assert sum(probability for _, probability in bright.classes) == pytest.approx(1)
    assert bad.classes == []
    assert bad.reason
    assert str(broken) in str(bad)
    names = tmp_path / "names.txt"
    names.write_text("hell\ndunkel\n")
    (renamed,) = predict(paths[:1], checkpoint=str(checkpoint(finetuned, 3)), class_file=str(names), top=1)
    assert [name for name, _ in renamed.classes] == ["hell"]
    names.write_text("hell\n")
    with pytest.raises(UserError, match="has 1 names, and the network 2 classes"):
        predict(paths[:1], checkpoint=str(checkpoint(finetuned, 3)), class_file=str(names))
    assert state_of(finetuned, 3)["distinit"]["class_names"] == list(CLASSES)


def test_prediction_refuses_a_pretraining(videos, pretrained):
    with pytest.raises(UserError, match="has no classifier"):
        predict([str(videos / "test" / "dark" / "video100.mp4")], checkpoint=str(checkpoint(pretrained, 2)))


def test_dense_clips_and_three_crops(videos, finetuned, tmp_path):
    """12 frames, a clip spans 7: dense clips start at 0, 2 and 4."""
    output = tmp_path / "dense"
    sections = labelled(videos, TEST="test")
    sections["CORPUS"] |= {"TEST_CLIPS": "dense", "DENSE_STRIDE": 2, "TEST_SCALE": 40}
    cfg = small_cfg(
        videos,
        output,
        **sections,
        TRAIN={"ENABLE": False},
        TEST={
            "ENABLE": True,
            "NUM_SPATIAL_CROPS": 3,
            "BATCH_SIZE": 5,
            "CHECKPOINT_FILE_PATH": str(checkpoint(finetuned, 3)),
        },
    )
    evaluation = run(cfg).evaluation
    assert set(evaluation.clips.tolist()) == {len(range(0, 12 - 7 + 1, 2)) * 3}
    assert evaluation.top_k(1) == 1.0
    assert not (output / "checkpoints").exists()


def test_test_clips_may_be_longer_than_training_clips(videos, finetuned, tmp_path):
    """12 frames, a dense clip of 6 frames, 2 apart, spans 11: it starts at 0 and at 1."""
    sections = labelled(videos, TEST="test")
    sections["CORPUS"] |= {"TEST_CLIPS": "dense", "TEST_NUM_FRAMES": 6}
    weights = str(checkpoint(finetuned, 3))
    test = {"ENABLE": True, "CHECKPOINT_FILE_PATH": weights}
    evaluation = run(small_cfg(videos, tmp_path / "run", **sections, TRAIN={"ENABLE": False}, TEST=test)).evaluation
    assert set(evaluation.clips.tolist()) == {2}
    # Which class a network of few steps prefers on longer clips hangs on roundings; that it tells them apart does not.
    np.testing.assert_allclose(evaluation.scores.sum(axis=1), 1)
    bright = evaluation.scores[:, 0]
    assert bright[evaluation.labels == 0].min() > bright[evaluation.labels == 1].max()


def test_test_alone_without_a_checkpoint_says_what_to_do(videos, tmp_path):
    cfg = small_cfg(
        videos, tmp_path / "run", **labelled(videos, TEST="test"), TRAIN={"ENABLE": False}, TEST={"ENABLE": True}
    )
    with pytest.raises(UserError, match=r"no checkpoint to test.*TEST\.CHECKPOINT_FILE_PATH"):
        run(cfg)


@pytest.mark.parametrize("name", ["torchvision/mc3_18", "pytorchvideo/x3d_s"])
def test_networks_of_other_libraries_run_by_name(name, videos, tmp_path):
    if name.startswith("pytorchvideo"):
        pytest.importorskip("pytorchvideo")
    sections = {"DATA": {"TRAIN_CROP_SIZE": 64, "TEST_CROP_SIZE": 64, "TRAIN_JITTER_SCALES": [64, 72]}}
    cfg = small_cfg(
        videos,
        tmp_path / "run",
        **labelled(videos, TRAIN="train"),
        **sections,
        MODEL={"MODEL_NAME": name},
        RESNET={"DEPTH": 18},
        NETWORK={"WIDTH": 64},
        RUNNER={"CLIPS_PER_EPOCH": 4},
    )
    assert run(cfg).training.steps == 1
