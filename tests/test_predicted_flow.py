"""Flow as a learnable input: the network, and its three trainings one after the other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from motions import FLOW_TEACHER, motion_job, write_motions
from small_jobs import merged, state_of, weights_of
from torch import nn

from distinit_plugin import build
from distinit_plugin.errors import ConfigError, UserError, WeightsError
from distinit_plugin.flow.motion import enlarge_flow, polar_to_flow
from distinit_plugin.jobs.running import run
from distinit_plugin.models import InputSpec, PredictedFlow3D, build_network

SMALL = InputSpec(num_frames=4, train_crop_size=32, test_crop_size=32)
STREAM = {"NETWORK": {"MODALITY": "flow"}, "DATA": {"MEAN": [0.5, 0.5], "STD": [0.5, 0.5]}}
S3DG = {"MODEL": {"MODEL_NAME": "S3DG"}, "RESNET": {"DEPTH": 18}, "NETWORK": {"WIDTH": 8}}


@pytest.mark.parametrize(
    ("decoder", "count"),
    # A trunk up to 3A, a decoder of its 192 channels, and an S3D-G of flow: REFERENCE's counts.
    [("pwc", 554_275), ("simple", 579), ("spatial", 664_515)],
)
def test_parameters_are_those_of_the_parts(decoder: str, count: int) -> None:
    with torch.device("meta"):
        network = build_network("PredictedFlow3D", num_classes=400, input=SMALL, decoder=decoder)
        whole = build_network("S3DG", num_classes=0, input=SMALL)
    names = list(whole.layers)
    early = names[: names.index("MaxPool_3a_3x3") + 1]
    trunk = sum(parameter.numel() for name in early for parameter in whole.get_submodule(name).parameters())
    assert sum(parameter.numel() for parameter in network.parameters()) == trunk + count + 9_509_440
    assert list(network.flow_net.layers) == early


def test_the_stream_sees_the_decoded_flow_in_pixels() -> None:
    torch.manual_seed(0)
    network = PredictedFlow3D(num_classes=3, input=SMALL, width=8).eval()
    views = {"rgb": torch.randn(2, 3, 4, 32, 32)}
    seen = {}
    network.stream.register_forward_pre_hook(lambda module, inputs: seen.update(inputs[0]))
    nn.init.constant_(network.decoder[-1].bias, 3.0)
    with torch.no_grad():
        output = network(views, taps=["flow_net.3A", "predicted_flow", "stream.2C", "stream.Mixed_4f"])
        flow = polar_to_flow(network.decoder(output.taps["flow_net.3A"]))
    torch.testing.assert_close(output.taps["predicted_flow"], flow)
    assert flow.shape == (2, 2, 2, 4, 4)
    torch.testing.assert_close(seen["flow"], enlarge_flow(flow, (4, 32, 32)).clamp(-20, 20) / 20)
    assert 0.1 < seen["flow"].abs().mean() < 1
    assert list(network.view_specs("train")) == ["rgb"]
    with pytest.raises(UserError, match="no layer named '3A'"):
        network(views, taps=["3A"])
    with pytest.raises(UserError, match="predicts its flow from frames"):
        build_network("PredictedFlow3D", num_classes=3, input=InputSpec(modality="flow", mean=(0.5,) * 2, std=(1,) * 2))


def test_flow_beyond_the_bound_is_cut_off_as_in_views() -> None:
    network = PredictedFlow3D(num_classes=3, input=InputSpec(num_frames=2, flow_bound=5.0), width=8).eval()
    seen = {}
    network.stream.register_forward_pre_hook(lambda module, inputs: seen.update(inputs[0]))
    nn.init.zeros_(network.decoder[-1].weight)
    with torch.no_grad():
        network.decoder[-1].bias.copy_(torch.tensor([10.0, -0.2, 0.9]))
        network({"rgb": torch.randn(1, 3, 2, 16, 16)})
    u, v = seen["flow"].unbind(1)
    assert (u.unique().tolist(), v.unique().tolist()) == ([1.0], pytest.approx([-0.4]))


# ------------------------------------------------------------------------------------------------- the three trainings
@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_motions(tmp_path_factory.mktemp("motions"))


@pytest.fixture(scope="module")
def stages(videos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``a``: a flow network, ``b``: a temporal stream; one epoch each."""
    folder = tmp_path_factory.mktemp("stages")
    entry = {**FLOW_TEACHER, "HEAD": "pwc", "STUDENT_LAYER": "3A"}
    # A second decoder, of as many channels: which one is at 3A the configuration says.
    teachers = {"EARLY": {**entry, "STUDENT_LAYER": "2C"}, "FLOW": entry}
    first = {"NETWORK": {"LAST_LAYER": "3A"}, "DISTILL": {"TEACHERS": teachers}}
    run(motion_job(videos, folder / "a", **merged(S3DG, first)))
    run(labelled_job(videos, folder / "b", **STREAM))
    return folder


def labelled_job(videos: Path, output: Path, **sections: Any) -> Any:
    rows = "".join(f"{path} {number % 4}\n" for number, path in enumerate(sorted((videos / "train").glob("*.mp4"))))
    listed = output.parent / "labelled.csv"
    listed.parent.mkdir(exist_ok=True)
    listed.write_text(rows)
    corpus = {"FORMAT": "csv", "PATH": str(listed), "LABELED": True}
    base = {"ACTION": {"LOSS_WEIGHT": 1.0}, "MODEL": {"NUM_CLASSES": 4}, "CORPUS": {"TRAIN": {"VIDEOS": corpus}}}
    return motion_job(videos, output, **merged(merged(S3DG, base), sections))


def joined(videos: Path, output: Path, stages: Path, **sections: Any) -> Any:
    parts = {
        "FLOW_NET_WEIGHTS": str(stages / "a/checkpoints/checkpoint_epoch_00001.pyth"),
        "STREAM_WEIGHTS": str(stages / "b/checkpoints/checkpoint_epoch_00001.pyth"),
    }
    return labelled_job(videos, output, **merged({"MODEL": {"MODEL_NAME": "PredictedFlow3D"}, "INIT": parts}, sections))


def test_three_trainings_one_after_the_other(videos: Path, stages: Path, tmp_path: Path) -> None:
    cfg = joined(videos, tmp_path / "c", stages)
    network = build.build_network(cfg)
    before = {key: value.clone() for key, value in network.bare_state_dict().items()}
    build.initialize_network(cfg, network)
    after = network.bare_state_dict()
    first, stream = state_of(stages / "a"), weights_of(stages / "b")
    expected = {f"flow_net.{key}": value for key, value in first["model_state"].items()}
    heads = first["distinit"]["adapters"]
    expected |= {f"decoder.{key.removeprefix('FLOW.')}": heads[key] for key in heads if key.startswith("FLOW.")}
    expected |= {f"stream.{key}": value for key, value in stream.items()}
    assert expected.keys() == after.keys()
    assert all(torch.equal(after[key], value) for key, value in expected.items())
    assert any(not torch.equal(before[key], after[key]) for key in after if key.startswith("decoder."))
    result = run(cfg)
    assert result.training is not None
    assert result.training.steps == 1
    trained = weights_of(tmp_path / "c")
    for part in ("flow_net.", "decoder.", "stream."):
        moved = [key for key in trained if key.startswith(part) and not torch.equal(trained[key], expected[key])]
        assert moved, part


def test_parts_that_do_not_fit_are_refused_by_name(videos: Path, stages: Path, tmp_path: Path) -> None:
    stream = str(stages / "b/checkpoints/checkpoint_epoch_00001.pyth")
    bad: list[tuple[dict[str, Any], str]] = [
        ({"NETWORK": {"DECODER": "simple"}}, "INIT.FLOW_NET_WEIGHTS: .*does not fit|another network"),
        ({"NETWORK": {"WIDTH": 16}}, "another network"),
        ({"INIT": {"FLOW_NET_WEIGHTS": stream}}, "no decoders of flow at 3A"),
        (
            {"INIT": {"STREAM_WEIGHTS": str(stages / "a/checkpoints/checkpoint_epoch_00001.pyth")}},
            "INIT.STREAM_WEIGHTS",
        ),
    ]
    for sections, message in bad:
        cfg = joined(videos, tmp_path / "bad", stages, **sections)
        network = build.build_network(cfg)
        before = {key: value.clone() for key, value in network.bare_state_dict().items() if key.startswith("flow_net.")}
        with pytest.raises(WeightsError, match=message):
            build.initialize_network(cfg, network)
        if "FLOW_NET" in message or "decoders" in message:
            assert all(torch.equal(network.bare_state_dict()[key], value) for key, value in before.items())


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"INIT": {"STREAM_WEIGHTS": "b.pyth"}}, "is a part of PredictedFlow3D, not of S3DG"),
        (
            {
                "MODEL": {"MODEL_NAME": "PredictedFlow3D"},
                "INIT": {"FLOW_NET_WEIGHTS": "a.pyth"},
                "TRAIN": {"CHECKPOINT_FILE_PATH": "c.pyth"},
            },
            "would be overwritten by TRAIN.CHECKPOINT_FILE_PATH",
        ),
        (merged({"MODEL": {"MODEL_NAME": "PredictedFlow3D"}}, STREAM), "which predicts its flow"),
        (
            {"MODEL": {"MODEL_NAME": "PredictedFlow3D"}, "NETWORK": {"DECODER": "simple", "DECODER_NORM": True}},
            "DECODER simple is one convolution",
        ),
        ({"NETWORK": {"DECODER": "spatial"}}, "it is for PredictedFlow3D"),
        ({"NETWORK": {"LAST_LAYER": "3D"}}, "1A, 2A, 2B"),
    ],
)
def test_configurations_that_cannot_be(sections: dict[str, Any], message: str, videos: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        labelled_job(videos, tmp_path / "run", **sections)
