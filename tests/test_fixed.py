"""The fast path of the *Fixed* protocol against the slow one, where augmentation is off."""

import json

import numpy as np
import pytest
import torch
from small_jobs import CLASSES, brightness_teacher, checkpoint, differing, labelled, merged, small_cfg, write_teacher
from toys import ToyNetwork
from videos import write_video

from distinit_plugin import cli
from distinit_plugin.engine.checkpoint import load_checkpoint
from distinit_plugin.engine.fixed import FeatureClassifier
from distinit_plugin.engine.modes import set_train_mode
from distinit_plugin.errors import UserError
from distinit_plugin.jobs.prediction import predict
from distinit_plugin.jobs.probing import probe
from distinit_plugin.jobs.running import run
from distinit_plugin.losses import build_loss
from distinit_plugin.models import InputSpec, build_network
from distinit_plugin.objectives import Objective, Term
from distinit_plugin.types import ModelOutput

SIDE = 32


def noise(label, number):
    """Frames of one video: noise whose mean tells a little about the class."""
    rng = np.random.default_rng([label, number])
    level = 110 + 20 * label + rng.integers(-25, 25)

    def frame(_number, height, width):
        return np.clip(
            level + rng.normal(0, 40, (height // 4, width // 4, 3)).repeat(4, 0).repeat(4, 1), 0, 255
        ).astype(np.uint8)

    return frame


@pytest.fixture(scope="module")
def exact_videos(tmp_path_factory):
    """Square videos exactly as long as a clip: every clip and every crop of one is the same."""
    folder = tmp_path_factory.mktemp("exact")
    for use, count in (("train", 8), ("test", 6)):
        for label, name in enumerate(CLASSES):
            (folder / use / name).mkdir(parents=True)
            for number in range(count):
                path = folder / use / name / f"{number}.mp4"
                write_video(path, 7, SIDE, SIDE, pattern=noise(label, number + 100 * (use == "test")))
    return folder


@pytest.fixture(scope="module")
def pretrained(exact_videos, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pretrained")
    teachers = {"IMAGENET": brightness_teacher(write_teacher(folder / "teacher.pth"))}
    run(small_cfg(exact_videos, folder / "run", DATA=EXACT, DISTILL={"TEACHERS": teachers}))
    return checkpoint(folder / "run")


EXACT = {"RANDOM_FLIP": False, "TRAIN_JITTER_SCALES": [SIDE, SIDE]}


def fixed_cfg(videos, pretrained, output, **sections):
    base = {
        **labelled(videos, TRAIN="train", VAL="test", TEST="test"),
        "DATA": EXACT,
        "INIT": {"TRAINABLE": "classifier"},
        "TRAIN": {"CHECKPOINT_FILE_PATH": str(pretrained)},
        "TEST": {"ENABLE": True, "NUM_SPATIAL_CROPS": 3},
        "SOLVER": {"MAX_EPOCH": 4, "BASE_LR": 0.1, "LR_POLICY": "cosine", "WARMUP_EPOCHS": 1, "WEIGHT_DECAY": 1e-3},
    }
    return small_cfg(videos, output, **merged(base, sections))


def test_fast_and_slow_path_are_the_same(exact_videos, pretrained, tmp_path, capsys):
    slow = run(fixed_cfg(exact_videos, pretrained, tmp_path / "slow"))
    fast = probe(fixed_cfg(exact_videos, pretrained, tmp_path / "fast"), neighbors=3)
    assert "Fixed, top-1" in capsys.readouterr().out
    metrics = slow.evaluation.metrics()
    assert (fast.fixed_clip_top1, fast.fixed_top1, fast.fixed_top5) == (
        metrics["clip_top1"],
        metrics["top1"],
        metrics["top5"],
    )
    with np.load(tmp_path / "fast" / "fixed" / "scores.npz") as scores:
        assert [str(path) for path in scores["paths"]] == slow.evaluation.paths
        np.testing.assert_allclose(scores["scores"], slow.evaluation.scores, atol=1e-4)
        np.testing.assert_allclose(scores["logits"], slow.evaluation.logits, atol=1e-4)
    # The training did something, and not everything is certain: else the equality says nothing.
    assert 0.02 < slow.evaluation.scores.std() < 0.48
    one, other = (
        load_checkpoint(path)["model_state"]
        for path in (checkpoint(tmp_path / "slow", 4), tmp_path / "fast" / "fixed" / "student.pyth")
    )
    assert set(differing(one, other)) <= {"fc.weight", "fc.bias"}  # the trunk is one and the same, BN counters too
    torch.testing.assert_close(one["fc.weight"], other["fc.weight"], rtol=1e-3, atol=1e-4)
    assert one["fc.weight"].std() > 0.015  # it was N(0, 0.01²)
    assert json.loads((tmp_path / "fast" / "probe.json").read_text())["fixed_top1"] == metrics["top1"]
    assert cli.main(["ensemble", str(tmp_path / "slow"), str(tmp_path / "fast" / "fixed")]) == 0


def test_paths_of_a_recurrent_network_take_the_same_step():
    """With a frozen trunk the classifier's loss is that of the last output, which the test reads, on both paths."""
    torch.manual_seed(0)
    clip = InputSpec(num_frames=4, train_crop_size=32, test_crop_size=32)
    network = build_network("ConvLSTM", num_classes=3, input=clip, width=8)
    views, labels = {"rgb": torch.randn(4, 3, 4, 32, 32)}, {"label": torch.tensor([0, 1, 2, 0])}
    for module in network.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.momentum = None  # statistics are those of one pass
    network.train()(views)
    network.requires_grad_(False)
    network.fc.requires_grad_(True)
    statistics = {key: value.clone() for key, value in network.state_dict().items()}
    term = Term("action", "logits", build_loss("cross_entropy"))

    def gradient(student, seen):
        views = {f"student/{name}": view for name, view in seen.items()}
        loss = Objective(student, [term], {}, {})(views, labels).loss
        return torch.autograd.grad(loss, student.fc.weight)[0]

    set_train_mode(network, frozen_trunk=True)
    slow = gradient(network, views)
    assert differing(statistics, network.state_dict()) == []
    with torch.no_grad():
        features = network.eval()(views).features
    fast = gradient(FeatureClassifier(network, 0.0, views), {"features": features})
    torch.testing.assert_close(fast, slow, rtol=1e-4, atol=1e-8)
    assert slow.abs().max() > 1e-4
    set_train_mode(network, frozen_trunk=True)
    network.lstm.train()  # the control: the loss at all steps is another one
    assert (gradient(network, views) - slow).abs().max() > 1e-2 * slow.abs().max()
    assert network(views).logits_over_time.shape == (4, 3, 4)


def test_another_seed_is_another_result(exact_videos, pretrained, tmp_path):
    """The negative control of the test above: order and initialisation matter at this accuracy."""
    scores = []
    for seed in (0, 1):
        output = tmp_path / f"seed{seed}"
        probe(fixed_cfg(exact_videos, pretrained, output, RNG_SEED=seed))
        with np.load(output / "fixed" / "scores.npz") as archive:
            scores.append(archive["scores"])
    assert np.abs(scores[0] - scores[1]).max() > 1e-3


def test_the_student_that_is_left_predicts(exact_videos, pretrained, tmp_path):
    probe(fixed_cfg(exact_videos, pretrained, tmp_path / "run"))
    with np.load(tmp_path / "run" / "fixed" / "scores.npz") as archive:
        path, scores = str(archive["paths"][0]), archive["scores"][0]
    (found,) = predict([path], checkpoint=str(tmp_path / "run" / "fixed" / "student.pyth"), num_clips=1)
    assert dict(found.classes) == pytest.approx(dict(zip(CLASSES, scores, strict=True)), abs=1e-4)


def test_bad_training_videos_are_replaced(exact_videos, pretrained, tmp_path):
    import shutil

    videos = tmp_path / "videos"
    shutil.copytree(exact_videos, videos)
    (videos / "train" / "dark" / "0.mp4").write_bytes(b"broken")
    result = probe(fixed_cfg(videos, pretrained, tmp_path / "run", CORPUS={"MAX_BAD_FRACTION": 0.5}))
    assert result.num_train == 15
    assert result.fixed_top1 is not None


def test_a_trunk_without_weights_is_refused(exact_videos, pretrained, tmp_path):
    for named in ({}, {"CHECKPOINT_FILE_PATH": str(pretrained)}):  # those of the test are not read here
        cfg = fixed_cfg(exact_videos, pretrained, tmp_path / "run", TRAIN={"CHECKPOINT_FILE_PATH": ""}, TEST=named)
        with pytest.raises(UserError, match="it would be random"):
            probe(cfg)


def test_teachers_are_refused(exact_videos, pretrained, tmp_path):
    teacher = brightness_teacher(write_teacher(tmp_path / "teacher.pth"))
    cfg = fixed_cfg(exact_videos, pretrained, tmp_path / "run", DISTILL={"TEACHERS": {"IMAGENET": teacher}})
    with pytest.raises(UserError, match="features have no teachers"):
        probe(cfg)


def test_logits_that_do_not_follow_from_features_are_refused():
    class Curved(ToyNetwork):
        def forward(self, views, *, boxes=None, taps=()):
            output = super().forward(views)
            return ModelOutput(output.logits.square(), output.features, {})

    views = {"rgb": torch.rand(2, 3, 4, 8, 8)}
    for kind in (ToyNetwork, Curved):
        network = kind().requires_grad_(False)
        network.fc.requires_grad_(True)
        if kind is Curved:
            with pytest.raises(UserError, match="no linear layer of its pooled features"):
                FeatureClassifier(network, 0.0, views)
        else:
            classifier = FeatureClassifier(network, 0.0, views)
            torch.nn.init.constant_(classifier.fc.bias, 3.0)
            classifier.write_back()
            assert network.fc.bias.tolist() == [3.0] * 3
