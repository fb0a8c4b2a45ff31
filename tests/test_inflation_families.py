"""Every network that an image network's weights can fill, and ``distinit check-inflation``.

Exactness is asked in float64, where 57 calibrated random layers leave 1e-13; the same in float32 is up to 1e-4 of
rounding, which a wrong kernel could hide behind.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from small_jobs import BATCH, json_stats, labelled, small_cfg
from torch import Tensor, nn
from torchvision.models import GoogLeNet, resnet18

from distinit_plugin import cli
from distinit_plugin.config import rules
from distinit_plugin.config.load import load_cfg
from distinit_plugin.errors import UserError
from distinit_plugin.jobs.inflation_check import InflationCheck, check_inflation
from distinit_plugin.jobs.running import run
from distinit_plugin.models import InputSpec, VideoNetwork, build_network
from distinit_plugin.registry import MODELS
from distinit_plugin.weights import inflate, inflate_state_dict
from distinit_plugin.weights.keymaps import is_counter

CLASSES = 5
HALF = (0.5, 0.5, 0.5)
RGB = InputSpec(num_frames=16, train_crop_size=64, test_crop_size=64, mean=HALF, std=HALF)
FLOW = InputSpec(mean=(0.5, 0.5), std=(0.5, 0.5), modality="flow")
AFFINE = {"affine_norm": True}
SEPARABLE = {"separable_stem": True, "temporal_norm": True, "stem_frames": 7}


@pytest.fixture(scope="module")
def googlenet() -> dict[str, Tensor]:
    """torchvision's state dict, with the extra classifiers that its published file has."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        network = GoogLeNet(num_classes=CLASSES, aux_logits=True, init_weights=False)
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                for tensor in (module.weight, module.bias, module.running_mean, module.running_var):
                    nn.init.uniform_(tensor, 0.5, 1.5)
    return network.state_dict()


@pytest.fixture(scope="module")
def flat_resnet() -> dict[str, Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(4)
        return resnet18(num_classes=CLASSES).state_dict()


def on_meta(name: str, **options: Any) -> VideoNetwork:
    with torch.device("meta"):
        return build_network(name, **{"num_classes": CLASSES, "input": RGB, **options})


# ---------------------------------------------------------------------------------------------------------- still clips
def check(*words: object, precision: Any = "float64", image: str = "") -> InflationCheck:
    frames = ["DATA.NUM_FRAMES", 16, "DATA.TRAIN_CROP_SIZE", 64, "DATA.TEST_CROP_SIZE", 64]
    cfg, _ = load_cfg([], [str(word) for word in [*frames, *words]], check=False)
    return check_inflation(cfg, precision=precision, image=image)


def worst(found: InflationCheck, padding: str) -> float:
    """The largest difference of any layer and of the logits."""
    layers = [layer[padding] for layer in found.layers.values()]
    assert all(layer is not None for layer in layers)
    return max(*(layer.worst for layer in layers if layer), found.logits.get(padding, 0.0))


RES3D = ["MODEL.MODEL_NAME", "Res3D", "INIT.INFLATE_FROM", "Res2D", "NETWORK.WIDTH", 16]
EXACT_RES3D = [*RES3D, "NETWORK.STEM_POOL", True, "NETWORK.VARIANT", "torchvision"]
GOOGLENET = ["INIT.INFLATE_FROM", "torchvision/googlenet", "NETWORK.AFFINE_NORM", True]
I3D = ["MODEL.MODEL_NAME", "I3D", *GOOGLENET]
S3DG = ["MODEL.MODEL_NAME", "S3DG", *GOOGLENET, "NETWORK.GATING_FROM", "none"]
AT_63 = ["DATA.TRAIN_CROP_SIZE", 63, "DATA.TEST_CROP_SIZE", 63]


@pytest.mark.parametrize(
    "words",
    [
        EXACT_RES3D,
        [*EXACT_RES3D, "RESNET.DEPTH", 50],
        [*I3D, "NETWORK.PADDING", "symmetric"],
        [*S3DG, *AT_63],
        [*S3DG, *AT_63, "NETWORK.SEPARABLE_STEM", True, "NETWORK.TEMPORAL_NORM", True, "NETWORK.STEM_FRAMES", 7],
    ],
    ids=["basic blocks", "bottlenecks", "I3D", "S3D", "torchvision's kind of S3D"],
)
def test_fixed_point(words: list[object]) -> None:
    """16 still frames, replicate padding in time: every layer's every time step and the logits are the image's.

    S3D agrees with GoogLeNet where TensorFlow's padding does: at a multiple of 32, less 1.
    """
    found = check(*words)
    assert found.fixed_point
    assert found.reasons == ()
    assert worst(found, "replicate") <= 1e-9
    assert len(found.layers) in (5, 16)
    if "NETWORK.SEPARABLE_STEM" not in words:
        assert found.logits["zeros"] > 1e-2  # the control: zeros in time
        assert worst(found, "zeros") > 1e-2
        assert "% off" in found.verdict()
    else:  # all that acts in time is the identity there, so that nothing is padded that counts
        assert worst(found, "zeros") <= 1e-9


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (RES3D, "NETWORK.STEM_POOL"),
        ([*I3D, "NETWORK.PADDING", "same"], "NETWORK.PADDING same"),
        ([*S3DG, "NETWORK.PADDING", "symmetric"], "pools of torchvision's S3D"),
        (["MODEL.MODEL_NAME", "S3DG", *GOOGLENET, *AT_63], "NETWORK.GATING_FROM none"),
    ],
    ids=["no stem pool", "SAME", "pools of S3D", "gates"],
)
def test_no_fixed_point(words: list[object], reason: str) -> None:
    found = check(*words)
    assert not found.fixed_point
    assert any(reason in text for text in found.reasons)
    assert found.logits["replicate"] > 1e-2
    assert found.verdict().startswith("fixed point: no")
    if "STEM_POOL" in reason:
        assert all(found.layers["layer4"][padding] is None for padding in ("zeros", "replicate"))
        assert "differs" in found.to_text()


def test_rounding_in_fp32() -> None:
    found = check(*EXACT_RES3D, precision="float32")
    assert found.fixed_point
    assert 1e-8 < worst(found, "replicate") < 1e-3


def test_frames_without_time_and_a_given_image(tmp_path: Path) -> None:
    """ConvLSTM sees frames one by one, so its maps are the image's whatever the padding; no logits to compare."""
    path = tmp_path / "image.png"
    Image.effect_noise((90, 70), 80.0).convert("RGB").save(path)
    found = check("MODEL.MODEL_NAME", "ConvLSTM", *GOOGLENET, *AT_63, "DATA.NUM_FRAMES", 2, image=str(path))
    assert found.fixed_point
    assert found.logits == {}
    assert worst(found, "zeros") <= 1e-9
    with pytest.raises(UserError, match=r"--image .*absent\.png cannot be read"):
        check(*EXACT_RES3D, image=str(tmp_path / "absent.png"))


def test_weights_of_a_file(tmp_path: Path) -> None:
    """Both networks get them, with their number of classes."""
    flat = build_network("Res2D", num_classes=7, input=RGB, depth=10, width=8)
    torch.save(flat.bare_state_dict(), tmp_path / "w.pth")
    words = [*EXACT_RES3D, "NETWORK.WIDTH", 8, "RESNET.DEPTH", 10, "INIT.INFLATE_WEIGHTS", tmp_path / "w.pth"]
    found = check(*words)
    assert found.fixed_point
    assert "w.pth" in found.source
    assert found.report.complete
    torch.save({"conv1.weight": flat.conv1.weight}, tmp_path / "w.pth")
    with pytest.raises(UserError, match="is not a 2D ResNet"):
        check(*words)


def test_division_is_needed(googlenet: Mapping[str, Tensor]) -> None:
    network = build_network("I3D", num_classes=CLASSES, input=RGB, padding="symmetric", **AFFINE)
    inflate_state_dict(googlenet, network)
    frames = torch.randn(1, 3, 64, 64).unsqueeze(2).expand(-1, -1, 8, -1, -1)
    with torch.no_grad():
        right = network.eval()({"rgb": frames}).logits
        for module in network.modules():
            if isinstance(module, nn.Conv3d):
                module.weight.mul_(module.weight.shape[2])
        wrong = network({"rgb": frames}).logits
    assert right is not None
    assert wrong is not None
    assert (wrong - right).norm() > 1e-2 * right.norm()


# ------------------------------------------------------------------------------------------------------------- all keys
@pytest.mark.parametrize(
    ("name", "options", "trunks", "missing"),
    [
        ("I3D", AFFINE, 1, set()),
        ("I3D", {**AFFINE, "input": FLOW}, 1, set()),
        ("S3DG", AFFINE, 1, {"temporal", "gate"}),
        ("S3DG", {**AFFINE, "input": FLOW, "gating_from": "none"}, 1, {"temporal"}),
        ("S3DG", {**AFFINE, **SEPARABLE, "gating_from": "none"}, 1, {"temporal", "temporal_bn"}),
        ("ConvLSTM", AFFINE, 1, {"lstm", "fc"}),
        ("TwoStream", AFFINE, 2, {"fc"}),
        ("Fused3D", AFFINE, 2, {"fusion", "fc"}),
        ("I3D", {**AFFINE, "num_classes": 9}, 1, set()),
        ("I3D", {**AFFINE, "num_classes": 0}, 1, set()),
    ],
)
def test_every_key_is_accounted_for(
    googlenet: Mapping[str, Tensor], name: str, options: dict[str, Any], trunks: int, missing: set[str]
) -> None:
    network = on_meta(name, **options)
    report = inflate_state_dict(googlenet, network)
    target = {key for key in network.bare_state_dict() if not is_counter(key)}
    loaded = {key for key in report.loaded if not is_counter(key)}
    mismatched = {mismatch.name for mismatch in report.mismatched}
    assert loaded | set(report.missing) | mismatched == target
    source = [key for key in googlenet if not is_counter(key)]
    assert len(loaded) + len(mismatched) == trunks * (len(source) - len(report.unexpected))
    allowed = ("aux1.", "aux2.", "fc.")
    assert all(key.startswith(allowed) for key in report.unexpected)
    assert sum(key.startswith("aux") for key in report.unexpected) == sum(key.startswith("aux") for key in source)
    assert any("aux1, aux2" in note for note in report.notes)
    kinds = {part for key in report.missing for part in key.split(".") if part in ("temporal", "temporal_bn", "gate")}
    kinds |= {key.partition(".")[0] for key in report.missing if "_" not in key.partition(".")[0]}
    assert kinds == missing
    assert mismatched == ({"fc.weight", "fc.bias"} if options.get("num_classes") == 9 else set())


@pytest.mark.parametrize("name", ["Res3D", "torchvision/r3d_18", "torchvision/mc3_18"])
def test_every_key_of_resnets(flat_resnet: Mapping[str, Tensor], name: str) -> None:
    report = inflate_state_dict(flat_resnet, on_meta(name))
    assert report.complete
    assert len(report.loaded) == len(flat_resnet)


def test_declared_networks_are_those_of_the_rules() -> None:
    """The configuration refuses the others before torch is loaded."""
    names = [name for name, part in MODELS if part.__module__.startswith("distinit_plugin")]
    names += ["torchvision/r3d_18", "torchvision/mc3_18", "torchvision/r2plus1d_18", "torchvision/s3d"]
    assert {name for name in names if on_meta(name, num_classes=2).image_trunks} == set(rules.INFLATABLE)


# --------------------------------------------------------------------------------------------------------------- values
def test_values_of_i3d_and_of_flow(googlenet: Mapping[str, Tensor]) -> None:
    stem, norm = googlenet["conv1.conv.weight"], googlenet["inception4d.branch3.1.bn.running_var"]
    network = build_network("I3D", num_classes=CLASSES, input=FLOW, **AFFINE)
    inflate_state_dict(googlenet, network)
    state = network.state_dict()
    for channel in range(2):
        for tap in range(7):
            kernel = state["Conv3d_1a_7x7.conv.weight"][:, channel, tap]
            torch.testing.assert_close(kernel, stem.mean(dim=1) / 7)
    assert torch.equal(state["Mixed_4e.b2b.bn.running_var"], norm)
    inner = googlenet["inception5b.branch2.1.conv.weight"]
    torch.testing.assert_close(state["Mixed_5c.b1b.conv.weight"].sum(dim=2), inner)
    assert torch.equal(state["fc.weight"], googlenet["fc.weight"])


@pytest.mark.parametrize("switches", [{}, SEPARABLE], ids=["as published", "torchvision's kind"])
def test_values_of_s3dg(googlenet: Mapping[str, Tensor], switches: dict[str, Any]) -> None:
    """Spatial kernels as they are, temporal ones the identity even in a network that was trained."""
    network = build_network("S3DG", num_classes=CLASSES, input=RGB, **AFFINE, **switches)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.uniform_()
    gate = network.state_dict()["Mixed_3b.b0.gate.weight"].clone()
    inflate_state_dict(googlenet, network)
    state = network.state_dict()
    assert torch.equal(state["Mixed_3c.b2b.conv.weight"][:, :, 0], googlenet["inception3b.branch3.1.conv.weight"])
    assert torch.equal(state["Mixed_3b.b0.gate.weight"], gate)
    unit = network.get_submodule("Mixed_3c.b2b").eval()
    x = torch.rand(1, 96, 5, 2, 2)
    with torch.no_grad():
        y = unit.temporal(x)
        y = y if unit.temporal_bn is None else unit.temporal_bn(y)
    torch.testing.assert_close(y, x)
    stem, taps = googlenet["conv1.conv.weight"], network.get_submodule("Conv2d_1a_7x7").conv.weight
    assert taps.shape[2] == (1 if switches else 3)
    torch.testing.assert_close(taps.sum(dim=2), stem)


def test_values_of_two_streams(googlenet: Mapping[str, Tensor]) -> None:
    network = build_network("TwoStream", num_classes=CLASSES, input=RGB, **AFFINE)
    inflate_state_dict(googlenet, network)
    stem = googlenet["conv1.conv.weight"]
    assert torch.equal(network.rgb.Conv2d_1a_7x7.conv.weight, stem)
    flow = network.flow.Conv2d_1a_7x7.conv.weight
    assert flow.shape[1] == 20
    for channel in range(20):
        torch.testing.assert_close(flow[:, channel], stem.mean(dim=1))
    assert torch.equal(network.flow.Mixed_3b.b1a.conv.weight, googlenet["inception3a.branch2.0.conv.weight"])


def test_flow_res3d(flat_resnet: Mapping[str, Tensor]) -> None:
    network = build_network("Res3D", num_classes=CLASSES, input=FLOW)
    assert inflate_state_dict(flat_resnet, network).complete
    expected = flat_resnet["conv1.weight"].mean(dim=1, keepdim=True).expand(-1, 2, -1, -1) / 3
    torch.testing.assert_close(network.stem[0].weight[:, :, 1], expected)


# ------------------------------------------------------------------------------------------------------------- refusals
@pytest.mark.parametrize(
    ("name", "options", "source", "message"),
    [
        ("I3D", {}, "googlenet", "Set NETWORK.AFFINE_NORM True"),
        ("S3DG", {}, "googlenet", "Set NETWORK.AFFINE_NORM True"),
        ("ConvLSTM", {}, "googlenet", "Set NETWORK.AFFINE_NORM True"),
        ("I3D", {**AFFINE, "width": 32}, "googlenet", "of another shape: .*NETWORK.WIDTH"),
        ("I3D", AFFINE, "flat_resnet", "is not a 2D GoogLeNet .*torchvision/googlenet"),
        ("Res3D", {}, "googlenet", "is not a 2D ResNet .*torchvision/resnet18"),
        ("C3D", {}, "googlenet", "C3D has no 2D counterpart"),
        ("torchvision/s3d", {}, "googlenet", "torchvision/s3d has no 2D counterpart"),
    ],
)
def test_refusals(name: str, options: Any, source: str, message: str, request: pytest.FixtureRequest) -> None:
    with pytest.raises(UserError, match=message):
        inflate_state_dict(request.getfixturevalue(source), on_meta(name, **options))


def test_video_weights_are_not_inflated() -> None:
    """Their keys and shapes are the network's own, so nothing else would stop them."""
    state = build_network("torchvision/r3d_18", num_classes=CLASSES, input=RGB).bare_state_dict()
    with pytest.raises(UserError, match="is not a 2D ResNet"):
        inflate_state_dict(state, on_meta("Res3D"))


@pytest.mark.parametrize("model", ["resnetaa50", "resnetblur50"])
def test_timm_networks_with_the_same_keys_and_another_graph(model: str) -> None:
    """They blur, then take every second pixel; plain timm/resnet50 fits."""
    pytest.importorskip("timm")
    words = ["MODEL.MODEL_NAME", "Res3D", "RESNET.DEPTH", 50, "DATA.NUM_FRAMES", 1]
    with pytest.raises(UserError, match=rf"timm/{model} is not the 2D counterpart.*stride"):
        check(*words, "INIT.INFLATE_FROM", f"timm/{model}")


def test_places365_file(tmp_path: Path) -> None:
    """A DataParallel's keys below ``state_dict``, without batch counters; 365 classes."""
    state = resnet18(num_classes=365).state_dict()
    old = {f"module.{key}": value for key, value in state.items() if not is_counter(key)}
    torch.save({"epoch": 90, "arch": "resnet18", "state_dict": old, "best_prec1": 54.0}, tmp_path / "places.pth.tar")
    network = build_network("Res3D", num_classes=51, input=RGB)
    report = inflate(network, "torchvision/resnet18", str(tmp_path / "places.pth.tar"))
    assert {mismatch.name for mismatch in report.mismatched} == {"fc.weight", "fc.bias"}
    assert (report.missing, report.unexpected) == ((), ())
    torch.testing.assert_close(network.layer4[1].conv2[0].weight.sum(dim=2), state["layer4.1.conv2.weight"])


def test_range_of_googlenets_inputs(googlenet: Mapping[str, Tensor], tmp_path: Path) -> None:
    """Of torchvision's own file the range is known; of another one nobody knows."""
    clip = InputSpec()
    published, other = tmp_path / "googlenet-1378be20.pth", tmp_path / "mine.pth"
    for path in (published, other):
        torch.save(dict(googlenet), path)
    with pytest.raises(UserError, match=r"\[-1, 1\].*DATA.MEAN is \[0.45, 0.45, 0.45\].*Set both to \[0.5, 0.5, 0.5\]"):
        inflate(on_meta("I3D", **AFFINE, input=clip), "torchvision/googlenet", str(published))
    notes = inflate(on_meta("I3D", **AFFINE, input=clip), "torchvision/googlenet", str(other)).notes
    assert any("transform_input" in note for note in notes)
    notes = inflate(on_meta("I3D", **AFFINE), "torchvision/googlenet", str(published)).notes
    assert not any("transform_input" in note for note in notes)


def test_real_squeezenet_has_no_counterpart() -> None:
    folder = os.environ.get("DISTINIT_TEST_ASSETS")
    if not folder:
        pytest.skip("DISTINIT_TEST_ASSETS is not set")
    weights = str(Path(folder) / "teacher" / "squeezenet1_0_imagenet.pth")
    for name, options, family in (("Res3D", {}, "ResNet"), ("I3D", AFFINE, "GoogLeNet")):
        with pytest.raises(UserError, match=f"is not a 2D {family} .*features"):
            inflate(on_meta(name, **options), "torchvision/squeezenet1_0", weights)


@pytest.mark.parametrize(
    ("source", "weights", "message"),
    [
        ("torchvison/resnet18", "w.pth", "Did you mean torchvision"),
        ("Res2d", "w.pth", "Did you mean Res2D"),
        ("torchvision/resnet19", "IMAGENET1K_V1", "torchvision has no network named 'resnet19'"),
        ("torchvision/resnet18", "timm", "is not of timm"),
    ],
)
def test_wrong_names(source: str, weights: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        inflate(on_meta("Res3D"), source, weights)


# ---------------------------------------------------------------------------------------------- whole job, command line
def test_i3d_from_googlenet_in_a_whole_job(googlenet: Mapping[str, Tensor], videos: Path, tmp_path: Path) -> None:
    weights = tmp_path / "w.pth"
    torch.save(dict(googlenet), weights)
    cfg = small_cfg(
        videos,
        tmp_path / "run",
        **labelled(videos, TRAIN="train"),
        DATA={"MEAN": list(HALF), "STD": list(HALF)},
        MODEL={"MODEL_NAME": "I3D"},
        RESNET={"DEPTH": 18},
        NETWORK={"WIDTH": 64, "AFFINE_NORM": True, "PADDING": "symmetric"},
        INIT={"INFLATE_FROM": "torchvision/googlenet", "INFLATE_WEIGHTS": str(weights)},
        RUNNER={"CLIPS_PER_EPOCH": BATCH},
    )
    assert run(cfg).training.steps == 1
    assert len(json_stats(tmp_path / "run", "train_iter_")) == 1
    log = (tmp_path / "run" / "stdout.log").read_text()
    assert "torchvision/googlenet" in log
    assert "aux1, aux2" in log
    assert "random initialisation" in log


def test_command_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    base = ["--from", "Res2D", "--crop", "32", "--frames", "4"]
    switches = ["--opts", "NETWORK.WIDTH", "4", "RESNET.DEPTH", "10"]
    assert cli.main(["check-inflation", "--network", "Res3D", *base, *switches]) == 0
    text = capsys.readouterr().out
    assert "fixed point: no" in text
    assert "NETWORK.STEM_POOL" in text
    path = tmp_path / "x.yaml"
    path.write_text(
        "MODEL: {MODEL_NAME: Res3D}\nNETWORK: {STEM_POOL: True, VARIANT: torchvision}\nINIT: {INFLATE_FROM: Res2D}\n"
    )
    assert cli.main(["check-inflation", "--cfg", str(path), "--crop", "32", "--json", *switches]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["fixed_point"]
    assert found["frames"] == 8
    assert set(found["layers"]["layer4"]["zeros"]) == {"mean", "worst"}
    assert found["report"]["missing"] == []


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--network", "Res3D"], "INIT.INFLATE_FROM is empty"),
        (["--network", "R2Plus1D", "--from", "torchvision/resnet18"], "R2Plus1D has no 2D counterpart"),
        (["--network", "I3D", "--from", "torchvision/googlenet"], "NETWORK.AFFINE_NORM True"),
        (["--network", "Res3D", "--from", "torchvision/resnet50"], "not the 2D counterpart"),
        (["--network", "Res3D", "--from", "torchvision/r3d_18"], "no image classifier"),
        (["--network", "Res3D", "--from", "torchvision/resnet18", "--weights", "absent.pth"], "absent.pth"),
        (["--network", "Res3D", "--from", "torchvision/resnet18", "--opts", "NETWORK.STEMPOOL", "True"], "STEM_POOL"),
        (["--network", "Res3D", "--from", "Res2D", "--opts", "NETWORK.MODALITY", "flow"], "flow"),
        (
            ["--network", "Fused3D", "--from", "torchvision/googlenet", "--opts", "NETWORK.STREAMS", "flow"],
            "NETWORK.STREAMS is flow",
        ),
    ],
)
def test_command_line_refuses(words: list[str], named: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["check-inflation", *words]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert named in error
