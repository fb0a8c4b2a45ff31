"""Pre-training runs from YAML to checkpoint: every kind of teacher, gate and mixture."""

import math
from collections import Counter
from pathlib import Path

import pytest
import torch
from small_jobs import (
    BATCH,
    brightness_teacher,
    checkpoint,
    differing,
    json_stats,
    labelled,
    small_cfg,
    state_of,
    weights_of,
    write_corpus,
    write_teacher,
)

from distinit_plugin import build
from distinit_plugin.data.views import finish_views
from distinit_plugin.errors import UserError
from distinit_plugin.jobs.running import run


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    return write_teacher(tmp_path_factory.mktemp("teacher") / "res2d.pth")


@pytest.mark.usefixtures("drawn_curves")
def test_pretraining_learns_the_teacher_and_leaves_what_a_run_leaves(videos, teacher, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    output = tmp_path / "run"
    cfg = small_cfg(
        videos,
        output,
        SOLVER={"MAX_EPOCH": 4},
        TRAIN={"BATCH_SIZE": 8},
        DISTILL={"TEACHERS": {"IMAGENET": brightness_teacher(teacher)}},
        RUNNER={"CLIPS_PER_EPOCH": 16, "CHECK_CONVOLUTIONS": True},
    )
    result = run(cfg)
    epochs = json_stats(output, "train_epoch", "json_stats.log")
    assert [line["epoch"] for line in epochs] == ["1/4", "2/4", "3/4", "4/4"]
    # Bright frames have entropy 0, dark ones log 3: the loss falls towards the mean entropy, its lower bound.
    excess = [line["loss"] - line["entropy/IMAGENET"] for line in epochs]
    assert excess[-1] < 0.5 * excess[0]
    assert all(value > 0 for value in excess)
    assert len(json_stats(output, "train_iter_")) == 8
    assert result.evaluation is None
    assert (result.training.epochs, result.training.steps) == (4, 8)
    state = state_of(output, 4)
    assert state["epoch"] == 3
    assert not [name for name in state["model_state"] if name.startswith("fc")]  # no term reads a classifier
    assert [tuple(tensor.shape) for tensor in state["distinit"]["adapters"].values()] == [(4, 64), (4,)]
    assert (output / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert not (output / "bad_videos.csv").exists()
    assert not list(output.rglob("*.tmp"))
    printed = capsys.readouterr().out
    assert "json_stats" not in printed  # for programs; people have the progress
    assert "loss" in printed
    assert "no test" in (output / "stdout.log").read_text() or not cfg.TEST.ENABLE


def test_several_teachers_add_up_with_their_weights(videos, teacher, tmp_path):
    output = tmp_path / "run"
    random_net = {"ARCH": "torchvision/resnet18", "WEIGHTS": "random", "NUM_CLASSES": 10, "CROP_SIZE": 64}
    entries = {
        "FIRST": brightness_teacher(teacher, FRAME_PICK="random", NUM_PICKED_FRAMES=2),
        "SECOND": {**random_net, "LOSS_WEIGHT": 0.5, "LOSS": "mse", "FRAME_PICK": "uniform", "NUM_PICKED_FRAMES": 2},
        "OFF": {**random_net, "WEIGHTS": "/nowhere/weights.pth", "LOSS_WEIGHT": 0},
    }
    run(small_cfg(videos, output, DISTILL={"TEACHERS": entries}))
    for line in json_stats(output, "train_iter_"):
        assert line["loss"] == pytest.approx(line["loss/FIRST"] + 0.5 * line["loss/SECOND"], abs=3e-5)
        assert "loss/OFF" not in line
    adapters = state_of(output)["distinit"]["adapters"]
    assert {name: len(tensor) for name, tensor in adapters.items() if name.endswith("weight")} == {
        "FIRST.weight": 4,
        "SECOND.weight": 10,
    }


@pytest.mark.parametrize("gate", ["weight", "skip"])
def test_gate_keeps_the_clips_below_the_threshold(gate, videos, teacher, tmp_path):
    output = tmp_path / "run"
    entries = {"IMAGENET": brightness_teacher(teacher, MAX_ENTROPY=0.5)}
    run(small_cfg(videos, output, DISTILL={"TEACHERS": entries, "GATE": gate}))
    (epoch,) = json_stats(output, "train_epoch")
    assert epoch["kept/IMAGENET"] == 0.5  # an epoch is the corpus once, and its bright half is kept
    assert epoch["entropy/IMAGENET"] == pytest.approx(math.log(3) / 2, abs=1e-2)
    saved = weights_of(output)
    assert all(torch.isfinite(tensor).all() for tensor in saved.values())


@pytest.mark.parametrize("gate_mean", ["all", "kept"])
def test_skip_and_weight_are_the_same_loss(gate_mean, videos, teacher, tmp_path):
    entries = {"IMAGENET": brightness_teacher(teacher, MAX_ENTROPY=0.5)}
    results = {}
    for gate in ("weight", "skip"):
        distill = {"TEACHERS": entries, "GATE": gate, "GATE_MEAN": gate_mean}
        cfg = small_cfg(videos, tmp_path / gate, DISTILL=distill, TRAIN={"BATCH_SIZE": 12})
        torch.manual_seed(0)
        student, teachers = build.build_network(cfg), build.build_teachers(cfg)
        objective = build.build_objective(cfg, student, teachers)
        objective.trainable.eval()  # batch norm with constants: what the student is fed does not change the others
        specs = build.view_specs(student, teachers, "train")
        corpora = build.build_corpora(cfg, "train")
        dataset = build.build_dataset(cfg, corpora, specs, "train", keep_index=False)
        (batch,) = build.build_train_loader(cfg, dataset, build.build_train_sampler(cfg, corpora))
        prepared = objective.prepare(finish_views(batch["views"], specs, torch.device("cpu")), {})
        output = objective.step(prepared)
        output.loss.backward()
        gradients = {name: p.grad for name, p in objective.trainable.named_parameters()}
        results[gate] = (output.loss.detach(), gradients, len(prepared.views["rgb"]))
    assert (results["weight"][2], results["skip"][2]) == (12, 6)  # the student really sees half of them
    torch.testing.assert_close(results["skip"][0], results["weight"][0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(results["skip"][1], results["weight"][1], rtol=1e-3, atol=1e-6)
    assert all(grad.abs().max() > 0 for name, grad in results["skip"][1].items() if "adapters" in name)


def test_feature_teachers(videos, tmp_path):
    output = tmp_path / "run"
    timm_net = {"ARCH": "timm/test_resnet", "WEIGHTS": "random", "LAYER": "features", "CROP_SIZE": 64}
    entries = {
        "COSINE": {**timm_net, "LOSS": "cosine", "FRAME_PICK": "clip"},
        "MSE": {**timm_net, "ARCH": "timm/test_vit", "CROP_SIZE": 160, "LOSS": "mse"},
    }
    pytest.importorskip("timm")
    run(small_cfg(videos, output, DISTILL={"TEACHERS": entries}, SOLVER={"MAX_EPOCH": 2}))
    first, last = json_stats(output, "train_epoch")
    assert last["loss/COSINE"] < first["loss/COSINE"] < 2
    assert last["loss/MSE"] < first["loss/MSE"]
    assert "entropy/COSINE" not in last  # features have none


@pytest.mark.parametrize("loss", ["mse", "soft_cross_entropy"])
def test_dense_teacher(loss, videos, tmp_path):
    output = tmp_path / "run"
    entry = {
        "ARCH": "torchvision/lraspp_mobilenet_v3_large",
        "WEIGHTS": "random",
        "NUM_CLASSES": 21,
        "LAYER": "feature_map",
        "STUDENT_LAYER": "layer2",
        "LOSS": loss,
        "CROP_SIZE": 64,
    }
    run(small_cfg(videos, output, DISTILL={"TEACHERS": {"DENSE": entry}}, SOLVER={"MAX_EPOCH": 2}))
    first, last = json_stats(output, "train_epoch")
    assert last["loss/DENSE"] < first["loss/DENSE"]
    adapters = state_of(output, 2)["distinit"]["adapters"]
    assert adapters["DENSE.weight"].shape == (21, 16, 1, 1, 1)
    moved = differing(weights_of(output, 2), weights_of(output, 1))
    assert [name for name in moved if name.startswith("layer2") and name.endswith("weight")]
    # Nothing reads what lies above the tapped layer, so only its batch norm counters and statistics may move.
    assert not [name for name in moved if name.startswith(("layer3", "layer4")) and name.endswith(("weight", "bias"))]


def test_own_head_trains_and_tests_the_students_classifier(videos, teacher, tmp_path):
    """D3D's form of a term: the teacher's classes are the student's."""
    output = tmp_path / "run"
    test = {"VIDEOS": {"PATH": str(videos / "test"), "LABELED": True}}
    cfg = small_cfg(
        videos,
        output,
        MODEL={"NUM_CLASSES": 4},
        DISTILL={"TEACHERS": {"OWN": brightness_teacher(teacher, HEAD="own")}},
        CORPUS={"TEST": test},
        TEST={"ENABLE": True},
    )
    result = run(cfg)
    assert weights_of(output)["fc.weight"].shape == (4, 64)
    assert not state_of(output)["distinit"]["adapters"]
    assert result.evaluation is not None
    assert result.evaluation.metrics()["num_videos"] == 6


def test_action_term_beside_a_teacher(videos, teacher, tmp_path):
    output = tmp_path / "run"
    sections = labelled(videos, TRAIN="train", VAL="test")
    run(small_cfg(videos, output, **sections, DISTILL={"TEACHERS": {"IMAGENET": brightness_teacher(teacher)}}))
    (epoch,) = json_stats(output, "train_epoch")
    assert epoch["loss"] == pytest.approx(epoch["loss/action"] + epoch["loss/IMAGENET"], abs=3e-5)
    (validation,) = json_stats(output, "val_epoch")
    assert {"loss", "loss/action", "loss/IMAGENET", "top1_err"} <= validation.keys()
    assert (output / "checkpoints" / "best.pyth").is_file()


def test_mixture_draws_by_weight(videos, teacher, tmp_path):
    """A corpus of 4 videos with weight 3 beside one of 12 with weight 1: three quarters of the clips are from the 4."""
    other = write_corpus(tmp_path / "other", 2, first=50)
    entries = {"VIDEOS": {"WEIGHT": 1}, "SMALL": {"PATH": str(other), "WEIGHT": 3}}
    output = tmp_path / "run"
    cfg = small_cfg(
        videos,
        output,
        CORPUS={"TRAIN": entries},
        RUNNER={"CLIPS_PER_EPOCH": 16},
        DISTILL={"TEACHERS": {"IMAGENET": brightness_teacher(teacher)}},
    )
    run(cfg)
    corpora = build.build_corpora(cfg, "train")
    sampler = build.build_train_sampler(cfg, corpora)
    drawn = Counter("SMALL" if str(other) in corpora[key.index].path else "VIDEOS" for key in sampler)
    assert drawn == {"VIDEOS": 4, "SMALL": 12}
    assert checkpoint(output).is_file()
    assert len(json_stats(output, "train_iter_")) == 16 // BATCH


def test_missing_teacher_weights_name_the_file_and_the_key(videos, tmp_path):
    entry = brightness_teacher(tmp_path / "absent.pth")
    with pytest.raises(UserError, match=r"DISTILL\.TEACHERS\.IMAGENET.*absent\.pth"):
        run(small_cfg(videos, tmp_path / "run", DISTILL={"TEACHERS": {"IMAGENET": entry}}))


def test_teacher_of_other_classes_is_refused(videos, teacher, tmp_path):
    entry = brightness_teacher(teacher, NUM_CLASSES=5)
    with pytest.raises(UserError, match="has 4 classes, NUM_CLASSES is 5"):
        run(small_cfg(videos, tmp_path / "run", DISTILL={"TEACHERS": {"IMAGENET": entry}}))
