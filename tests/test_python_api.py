"""The public names of the package in a user's own program, without the runner."""

import importlib
from pathlib import Path

import pytest
import torch
from small_jobs import SIZE, small_settings, write_teacher
from torch.utils.data import DataLoader, Dataset

import distinit_plugin
from distinit_plugin import (
    InputSpec,
    Objective,
    Term,
    UserError,
    build_adapter,
    build_loss,
    build_network,
    build_teacher,
    get_cfg,
    load_cfg,
    load_weights,
    predict,
    run,
)

MEAN, STD = (0.45,) * 3, (0.225,) * 3


class Clips(Dataset):
    """A user's own data: bright and dark clips (3,4,32,32) in [0, 1]."""

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(index)
        level = 0.7 if index % 2 else 0.15
        return level + 0.1 * torch.rand(3, 4, SIZE, SIZE, generator=generator)


def test_objective_in_a_plain_loop(tmp_path):
    torch.manual_seed(0)
    clip = InputSpec(num_frames=4, train_crop_size=SIZE, test_crop_size=SIZE, mean=MEAN, std=STD)
    student = build_network("R2Plus1D", num_classes=0, input=clip, depth=10, width=8)
    weights = write_teacher(tmp_path / "teacher.pth")
    teacher = build_teacher("Res2D", str(weights), num_classes=4, depth=10, width=8, crop_size=SIZE, mean=MEAN, std=STD)
    # The student has no classifier of its own: a new head reads its features.
    loss = build_loss("soft_cross_entropy")
    term = Term("IMAGENET", student_layer="features", loss=loss, weight=1.0, teacher="IMAGENET", teacher_layer="logits")
    head = build_adapter("linear", student, "features", teacher, "logits")
    objective = Objective(student, [term], {"IMAGENET": teacher}, {"IMAGENET": head})
    optimizer = torch.optim.SGD(objective.trainable.parameters(), lr=0.05, momentum=0.9)

    agreement = []
    for _ in range(6):
        for clips in DataLoader(Clips(), batch_size=8, shuffle=True):
            clips = (clips - 0.45) / 0.225
            views = {"student/rgb": clips, "IMAGENET/rgb": clips[:, :, 2:3]}
            output = objective(views, targets={})
            optimizer.zero_grad()
            output.loss.backward()
            optimizer.step()
            agreement.append((output.loss.item(), float(output.report["entropy/IMAGENET"])))
    assert agreement[-1][0] - agreement[-1][1] < 0.3 * (agreement[0][0] - agreement[0][1])
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert all(parameter.grad is not None for parameter in objective.trainable.parameters())

    torch.save({"model_state": student.bare_state_dict()}, tmp_path / "student.pth")
    again = build_network("R2Plus1D", num_classes=2, input=clip, depth=10, width=8)
    report = load_weights(again, tmp_path / "student.pth")
    assert report.missing == ("fc.weight", "fc.bias")
    assert again({"rgb": clips}).logits.shape == (8, 2)


def test_run_and_predict_from_python(videos, tmp_path):
    """The lines of the README: a configuration made in Python, a run, a prediction."""
    cfg = get_cfg()
    settings = small_settings(videos, tmp_path / "run")
    for node in ("DATA", "DATA_LOADER", "MODEL", "RESNET", "NETWORK", "TRAIN", "SOLVER", "RUNNER"):
        for key, value in settings[node].items():
            cfg[node][key] = value
    cfg.OUTPUT_DIR = settings["OUTPUT_DIR"]
    cfg.ACTION.LOSS_WEIGHT = 1.0
    cfg.merge_from_list(["CORPUS.TRAIN.MINE.PATH", str(videos / "train"), "CORPUS.TRAIN.MINE.LABELED", True])
    cfg.merge_from_list(["CORPUS.TEST.MINE.PATH", str(videos / "test"), "CORPUS.TEST.MINE.LABELED", True])
    result = run(cfg)
    assert 0 <= result.evaluation.metrics()["top1"] <= 1
    checkpoint = Path(cfg.OUTPUT_DIR) / "checkpoints" / "checkpoint_epoch_00001.pyth"
    (prediction,) = predict([str(videos / "test" / "dark" / "video100.mp4")], checkpoint=str(checkpoint), num_clips=1)
    assert {name for name, _ in prediction.classes} == {"bright", "dark"}


def test_run_checks_a_configuration_made_in_python(tmp_path):
    cfg = get_cfg()
    cfg.OUTPUT_DIR = str(tmp_path / "run")
    with pytest.raises(UserError, match=r"CORPUS\.TRAIN: empty"):
        run(cfg)
    assert not (tmp_path / "run").exists()


def test_public_names():
    for name in distinit_plugin.__all__:
        assert getattr(distinit_plugin, name) is not None
    for name, module in distinit_plugin._PLACES.items():
        assert getattr(distinit_plugin, name) is getattr(importlib.import_module(module), name)
    with pytest.raises(AttributeError, match="no attribute 'traine'"):
        distinit_plugin.traine  # noqa: B018
    with pytest.raises(UserError):
        load_cfg("configs/DistInit/no_such_file.yaml")
