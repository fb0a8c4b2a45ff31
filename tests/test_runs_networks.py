"""Every network of the registry in a whole job: a YAML file, one training step and a test on videos of digits."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_jobs import differing, merged, small_cfg, weights_of

from distinit_plugin import build
from distinit_plugin.config.node import CfgNode
from distinit_plugin.config.rules import NETWORK_DEPTHS, TWO_STREAM_NETWORKS
from distinit_plugin.demos.digits import CLASS_NAMES, DigitData, make_digits
from distinit_plugin.engine.precise_bn import update_bn_statistics
from distinit_plugin.jobs.running import run
from distinit_plugin.losses import build_loss
from distinit_plugin.models import InputSpec, build_network
from distinit_plugin.models.predicted_flow import PredictedFlow3D
from distinit_plugin.objectives import Objective, Term
from distinit_plugin.registry import MODELS

pytest.importorskip("sklearn")  # its digits

REGISTERED = sorted(name for name, _ in MODELS if name.isidentifier())
RGB = [name for name in REGISTERED if name not in TWO_STREAM_NETWORKS]
BOTTLENECKS = [("Res3D", 50), ("R2Plus1D", 26)]
JOBS = [pytest.param(name, 10 if name in NETWORK_DEPTHS else 18, {}, id=name) for name in RGB] + [
    pytest.param(name, depth, {}, id=f"{name}-{depth}") for name, depth in BOTTLENECKS
]
TEST_VIDEOS, TRAIN_FRAMES, TEST_FRAMES = 4, 4, 6


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> DigitData:
    """The data of the demonstration in miniature."""
    return make_digits(
        tmp_path_factory.mktemp("digits"),
        num_unlabeled=1,
        num_labeled_train=4,
        num_labeled_test=TEST_VIDEOS,
        num_stills=10,
        size=32,
        num_frames=8,
    )


def job(digits: DigitData, output: Path, name: str, depth: int, **sections: Any) -> CfgNode:
    """One optimizer step on four videos, without weight decay, and a test of clips longer than those."""
    entry = {"FORMAT": "csv", "ROOT": str(digits.folder), "CLASSES": str(digits.class_names), "LABELED": True}
    base = {
        "DATA": {"NUM_FRAMES": TRAIN_FRAMES, "SAMPLING_RATE": 1, "RANDOM_FLIP": False},
        "MODEL": {"MODEL_NAME": name, "NUM_CLASSES": len(CLASS_NAMES), "DROPOUT_RATE": 0.2},
        "RESNET": {"DEPTH": depth},
        "ACTION": {"LOSS_WEIGHT": 1.0},
        "CORPUS": {
            "TRAIN": {"VIDEOS": {**entry, "PATH": str(digits.train)}},
            "TEST": {"VIDEOS": {**entry, "PATH": str(digits.test)}},
            "TEST_NUM_FRAMES": TEST_FRAMES,
        },
        "RUNNER": {"CLIPS_PER_EPOCH": 4},
        "SOLVER": {"WEIGHT_DECAY": 0.0},
        "TEST": {"ENABLE": True, "BATCH_SIZE": 8},
    }
    return small_cfg(digits.folder, output, **merged(base, sections))


def untrained(cfg: CfgNode, path: Path) -> dict[str, torch.Tensor]:
    """The weights of a fresh network with statistics of random clips, saved at a path."""
    torch.manual_seed(3)
    network = build.build_network(cfg)
    if isinstance(network, PredictedFlow3D):  # hardly any flow is decoded at first, and nothing would reach the stream
        with torch.no_grad():
            list(network.decoder.parameters())[-2].mul_(300)
    views = {
        view: torch.randn(6, spec.channels, spec.num_frames, spec.crop_size, spec.crop_size)
        for view, spec in network.view_specs("train").items()
    }
    assert update_bn_statistics(network, [views], 1) == 1
    weights = network.bare_state_dict()
    torch.save(weights, path)
    return weights


FLOW = {"NETWORK": {"MODALITY": "flow"}, "DATA": {"MEAN": [0.5] * 2, "STD": [0.5] * 2}}
WITH_FLOW = [
    pytest.param("I3D", 18, FLOW, id="I3D-flow"),
    pytest.param("R2Plus1D", 10, FLOW, id="R2Plus1D-flow"),
    *[pytest.param(name, 18, {"FLOW": {"BACKEND": "dis_fast"}}, id=name) for name in sorted(TWO_STREAM_NETWORKS)],
]


@pytest.mark.parametrize(("name", "depth", "sections"), [*JOBS, *WITH_FLOW])
def test_trains_and_tests_from_yaml(
    name: str, depth: int, sections: dict[str, Any], digits: DigitData, tmp_path: Path, monkeypatch: Any
) -> None:
    if sections.get("FLOW"):
        pytest.importorskip("cv2")
    start = tmp_path / "start.pth"
    cfg = job(
        digits, tmp_path / "run", name, depth, **merged(sections, {"TRAIN": {"CHECKPOINT_FILE_PATH": str(start)}})
    )
    before = untrained(cfg, start)
    fresh = build.build_network(cfg)
    kind = type(fresh)
    seen, forward = set(), kind.forward

    def watched(self: Any, views: Any, **keys: Any) -> Any:
        seen.add((self.training, *[view.shape[2] for view in views.values()]))
        return forward(self, views, **keys)

    monkeypatch.setattr(kind, "forward", watched)
    result = run(cfg)
    one_frame = name == "Res2D"
    lengths = (1, 1) if one_frame else (TRAIN_FRAMES, TEST_FRAMES)
    views = len(fresh.view_specs("train"))
    assert seen >= {(True, *[lengths[0]] * views), (False, *[lengths[1]] * views)}
    assert result.training is not None
    assert result.training.steps == 1
    assert math.log(len(CLASS_NAMES)) == pytest.approx(result.training.train["loss"], rel=0.4)
    evaluation = result.evaluation
    assert evaluation is not None
    assert evaluation.metrics()["num_videos"] == TEST_VIDEOS
    assert np.isfinite(evaluation.scores).all()
    after = weights_of(tmp_path / "run")
    assert set(differing(after, before)) >= {key for key, _ in fresh.named_parameters()}
    kept = set(after) - set(differing(after, before))
    assert kept <= {f"lstm.hidden_norm.steps.0.running_{moment}" for moment in ("mean", "var")}  # of states of zero


@pytest.mark.parametrize("name", ["I3D", "ConvLSTM"])
def test_frozen_trunk_keeps_its_statistics(name: str, digits: DigitData, tmp_path: Path) -> None:
    """Fixed: weights, running statistics and counters of BN, bit for bit; without it they move (the test above)."""
    start = tmp_path / "start.pth"
    sections = {"INIT": {"TRAINABLE": "classifier"}, "TRAIN": {"CHECKPOINT_FILE_PATH": str(start)}}
    cfg = job(digits, tmp_path / "run", name, 18, **sections, TEST={"ENABLE": False})
    before = untrained(cfg, start)
    assert run(cfg).training.steps == 1
    after = weights_of(tmp_path / "run")
    assert any(key.endswith("num_batches_tracked") for key in after)
    assert set(differing(after, before)) == {key for key in after if key.startswith(("fc.", "logits."))}


@pytest.mark.parametrize("name", sorted(set(REGISTERED) - set(RGB)))
def test_two_views_train_a_step_of_the_objective(name: str) -> None:
    torch.manual_seed(0)
    spec = InputSpec(num_frames=2, train_crop_size=64, test_crop_size=64, mean=(0.5,) * 3, std=(0.5,) * 3)
    network = build_network(name, num_classes=5, input=spec, width=8)
    specs = network.view_specs("train")
    assert len(specs) == 2
    objective = Objective(network, [Term("action", "logits", build_loss("cross_entropy"))], {}, {})
    views = {
        f"student/{view}": torch.randn(4, len(spec.mean), spec.num_frames, spec.crop_size, spec.crop_size)
        for view, spec in specs.items()
    }
    before = {key: value.clone() for key, value in network.named_parameters()}
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05)
    output = objective(views, {"label": torch.tensor([0, 1, 2, 3])})
    output.loss.backward()
    optimizer.step()
    after = dict(network.named_parameters())
    assert differing(after, before) == list(after)
    network.eval()
    with torch.no_grad():
        logits = network({view.removeprefix("student/"): x for view, x in views.items()}).logits
    assert logits.shape == (4, 5)
    assert logits.isfinite().all()
