"""Round trips: our network → a file as others write it → convert-weights → loaded strictly → the same logits."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import layouts
import pytest
import torch
from torch import Tensor, nn
from torchvision.models import resnet18
from torchvision.models.video import s3d

from distinit_plugin.commands import convert_weights
from distinit_plugin.errors import WeightsError
from distinit_plugin.jobs.conversion import convert
from distinit_plugin.models import InputSpec, VideoNetwork, build_network
from distinit_plugin.weights import load_weights, read_checkpoint
from distinit_plugin.weights.layouts import LAYOUTS, NATIVE, detect

CLASSES = 7
S3D = {
    "padding": "symmetric",
    "affine_norm": True,
    "separable_stem": True,
    "stem_frames": 7,
    "temporal_norm": True,
    "gating_from": "none",
}


class Case(NamedTuple):
    """A layout, our network in it, and how the file is written."""

    name: str
    network: str
    switches: dict[str, Any]
    write: Callable[[Mapping[str, Tensor]], dict[str, Tensor]]
    kind: str = "torch"  # or pickle, tensorflow
    modality: str = "rgb"
    layout: str = ""  # empty: native
    swap: tuple[str, str] = ("Mixed_4c.b0.conv.weight", "")  # keys of ours with one shape; tried when not empty


def of_18(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return layouts.vmz_caffe2(state, (2, 2, 2, 2))


def of_34(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return layouts.vmz_caffe2(state, (3, 4, 6, 3))


def kin600(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return layouts.kinetics_i3d(state, "")


def flow_i3d(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return layouts.kinetics_i3d(state, "Flow/inception_i3d/")


def wrapped(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {"module." + key: value for key, value in state.items()}


MIXED = ("Mixed_3c.b1b.bn.running_mean", "Mixed_3c.b1b.bn.bias")
RESIDUAL = ("layer1.0.conv1.1.weight", "layer1.1.conv2.1.weight")
CASES = [
    Case("piergiaj", "I3D", {"affine_norm": True}, layouts.pytorch_i3d, layout="pytorch-i3d", swap=MIXED),
    Case("piergiaj flow", "I3D", {"affine_norm": True}, layouts.pytorch_i3d, "torch", "flow", "pytorch-i3d", MIXED),
    Case("torchvision s3d", "S3DG", S3D, layouts.torchvision_s3d, layout="torchvision-s3d", swap=MIXED),
    Case("kylemin", "S3DG", S3D, layouts.kylemin_s3d, layout="kylemin-s3d", swap=MIXED),
    Case("deepmind", "I3D", {}, layouts.kinetics_i3d, "tensorflow", "rgb", "kinetics-i3d", MIXED),
    Case("deepmind flow", "I3D", {}, flow_i3d, "tensorflow", "flow", "kinetics-i3d", MIXED),
    Case("deepmind 600", "I3D", {}, kin600, "tensorflow", "rgb", "kinetics-i3d", MIXED),
    Case("slim", "S3DG", {}, layouts.tf_slim, "tensorflow", "rgb", "tf-slim", MIXED),
    Case("slim flow", "S3DG", {"stem_frames": 7}, layouts.tf_slim, "tensorflow", "flow", "tf-slim", MIXED),
    Case(
        "slim top-heavy",
        "S3DG",
        {"temporal_from": "4B", "gating_from": "4C"},
        layouts.tf_slim,
        "tensorflow",
        layout="tf-slim",
        swap=MIXED,
    ),
    Case("caffe2", "R2Plus1D", {"depth": 18}, of_18, "pickle", layout="vmz-caffe2", swap=RESIDUAL),
    Case("caffe2 34", "R2Plus1D", {"depth": 34}, of_34, "pickle", layout="vmz-caffe2", swap=RESIDUAL),
    Case("caffe2 r3d", "Res3D", {"depth": 18}, of_18, "pickle", layout="vmz-caffe2", swap=RESIDUAL),
    Case("caffe2 flow", "R2Plus1D", {"depth": 18}, of_18, "pickle", "flow", "vmz-caffe2", RESIDUAL),
    Case("ig65m", "R2Plus1D", {"depth": 34}, dict, swap=RESIDUAL),
    Case("torchvision r3d", "Res3D", {"variant": "torchvision"}, dict, swap=RESIDUAL),
    Case("torchvision r2plus1d", "R2Plus1D", {"variant": "torchvision"}, wrapped, swap=RESIDUAL),
    Case("places", "Res2D", {"depth": 34}, wrapped, swap=("layer1.0.bn1.weight", "layer1.1.bn2.weight")),
]


def clip_spec(modality: str = "rgb") -> InputSpec:
    channels = 3 if modality == "rgb" else 2
    return InputSpec(mean=(0.5,) * channels, std=(0.5,) * channels, modality=modality)  # type: ignore[arg-type]


def make(case: Case) -> tuple[VideoNetwork, Tensor]:
    torch.manual_seed(0)
    network = build_network(case.network, num_classes=CLASSES, input=clip_spec(case.modality), width=8, **case.switches)
    clip = torch.randn(2, network.input.channels, 16, 32, 32)
    return layouts.calibrate(network, clip), clip


def write(case: Case, tensors: dict[str, Tensor], folder: Path) -> Path:
    """The file as the public code base writes it; its name says nothing about the layout."""
    if case.kind == "tensorflow":
        return layouts.write_tensorflow(folder / "weights", tensors)
    path = folder / "weights.bin"
    if case.kind == "pickle":
        path.write_bytes(pickle.dumps(layouts.numpy_blobs(tensors), protocol=2))
    else:
        torch.save({"epoch": 3, "state_dict": tensors}, path)
    return path


def logits_of(network: nn.Module, clip: Tensor) -> Tensor:
    with torch.no_grad():
        return network({"rgb": clip, "flow": clip}).logits


def rebuilt(path: Path) -> VideoNetwork:
    """The network that a written file describes, with its weights, loaded strictly."""
    import yaml

    cfg = yaml.safe_load(torch.load(path, weights_only=True)["cfg"])
    switches = {key.lower(): value for key, value in cfg["NETWORK"].items()}
    if "RESNET" in cfg:
        switches["depth"] = cfg["RESNET"]["DEPTH"]
    network = build_network(
        cfg["MODEL"]["MODEL_NAME"],
        num_classes=cfg["MODEL"]["NUM_CLASSES"],
        input=clip_spec(switches.pop("modality")),
        **switches,
    )
    report = load_weights(network, path, strict=True)
    assert report.complete
    return network.eval()


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_round_trip(case: Case, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    network, clip = make(case)
    expected = logits_of(network, clip)
    assert expected.std() > 0.05  # they say something
    state = layouts.state_of(network)
    path = write(case, case.write(state), tmp_path)
    layout, _ = detect(read_checkpoint(path).tensors)
    assert (layout.name if layout else "") == case.layout

    report = convert(str(path), str(tmp_path / "ours.pyth"), to=case.network)  # nothing but the network's name
    assert report.complete
    assert set(state) <= set(report.loaded)
    assert "missing         0\n  unexpected      0" in capsys.readouterr().out
    assert (logits_of(rebuilt(tmp_path / "ours.pyth"), clip) - expected).abs().max() <= 1e-6

    swapped = dict(state)
    first, second = case.swap
    swapped[first], swapped[second] = swapped[second], swapped[first]
    load_weights(network, write(case, case.write(swapped), tmp_path), strict=True)
    assert (logits_of(network, clip) - expected).abs().max() > 1e-3

    assert [layout.name for layout in LAYOUTS if layout.recognises(state)] == []
    bare = {key.removeprefix("module."): value for key, value in case.write(state).items()}
    assert [layout.name for layout in LAYOUTS if layout.recognises(bare)] == ([case.layout] if case.layout else [])


def test_optimizer_slots_are_named(tmp_path: Path) -> None:
    network, _ = make(CASES[6])
    path = layouts.write_tensorflow(tmp_path / "model.ckpt", kin600(layouts.state_of(network)))
    report = convert(str(path), str(tmp_path / "x.pyth"), to="I3D")
    assert "Mixed_5b/Branch_2/Conv3d_0a_3x3/conv_3d/w/Momentum" in report.skipped
    assert len(report.skipped) == 116  # 57 kernels, 57 summands, the classifier's two: 346 variables in all
    assert len(read_checkpoint(path).tensors) == 346


@pytest.mark.parametrize("name", ["deepmind flow", "slim"])
def test_scales_of_one_where_the_network_has_them(name: str, tmp_path: Path) -> None:
    case = next(case for case in CASES if case.name == name)
    network, clip = make(case)
    path = write(case, case.write(layouts.state_of(network)), tmp_path)
    report = convert(str(path), str(tmp_path / "x.pyth"), to=case.network, opts=["NETWORK.AFFINE_NORM", "True"])
    assert "57 BN scales are 1" in str(report)
    affine = rebuilt(tmp_path / "x.pyth")
    assert any(key.endswith(".bn.weight") for key in affine.state_dict())
    assert (logits_of(affine, clip) - logits_of(network, clip)).abs().max() <= 1e-6


def test_torchvision_s3d_itself(tmp_path: Path) -> None:
    """torchvision's own network, not our inverse: its key order, shapes, and logits."""
    torch.manual_seed(0)
    theirs = s3d(num_classes=CLASSES)
    clip = torch.randn(1, 3, 16, 64, 64)
    with torch.no_grad():
        for module in theirs.modules():
            if isinstance(module, nn.BatchNorm3d):
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_(0, 0.3)
                module.momentum = None
        theirs.train().features(clip)
        expected = theirs.eval().classifier(theirs.features(clip).mean((3, 4), keepdim=True)).mean((2, 3, 4))
    torch.save(theirs.state_dict(), tmp_path / "s3d.pth")
    assert convert(str(tmp_path / "s3d.pth"), str(tmp_path / "x.pyth"), to="S3DG").complete
    ours = logits_of(rebuilt(tmp_path / "x.pyth"), clip)
    assert (ours - expected).abs().max() <= 1e-5 * expected.abs().max().clamp_min(1)

    state = layouts.state_of(theirs)
    kylemin = dict(zip(kylemin_order(), state.values(), strict=True))  # both are in one order
    torch.save(kylemin, tmp_path / "kylemin.pt")
    assert convert(str(tmp_path / "kylemin.pt"), str(tmp_path / "y.pyth"), to="torchvision/s3d").complete
    again = read_checkpoint(tmp_path / "y.pyth").tensors
    assert all(torch.equal(again[key], value) for key, value in state.items())


def kylemin_order() -> list[str]:
    """The keys of kylemin's network in their order, from its modules: factored units are space, then time."""

    def unit(place: str, factored: bool) -> list[str]:
        halves = ("_s", "_t") if factored else ("",)
        norm = ("weight", "bias", "running_mean", "running_var")
        return [
            key
            for half in halves
            for key in (f"{place}.conv{half}.weight", *(f"{place}.bn{half}.{leaf}" for leaf in norm))
        ]

    keys = [*unit("base.0", True), *unit("base.2", False), *unit("base.3", True)]
    for place in (5, 6, 8, 9, 10, 11, 12, 14, 15):
        for branch, (number, factored) in [
            (0, (0, False)),
            (1, (0, False)),
            (1, (1, True)),
            (2, (0, False)),
            (2, (1, True)),
            (3, (1, False)),
        ]:
            keys += unit(f"base.{place}.branch{branch}.{number}", factored)
    return [*keys, "fc.0.weight", "fc.0.bias"]


PYTORCHVIDEO = [
    "c2d_r50",
    "i3d_r50",
    "slow_r50",
    "slowfast_r50",
    "slowfast_r101",
    "slowfast_16x8_r101_50_50",
    "x3d_xs",
    "x3d_l",
]


@pytest.mark.parametrize("name", PYTORCHVIDEO)
def test_pyslowfast_keys(name: str) -> None:
    """Every key there and back, without values."""
    with torch.device("meta"):
        network = build_network(f"pytorchvideo/{name}", num_classes=400, input=clip_spec())
    state = layouts.state_of(network)
    theirs = layouts.pyslowfast(state)
    assert len(theirs) == len(state)
    layout, _ = detect(theirs)
    assert layout is not None
    assert layout.name == "pyslowfast"
    translation = layout.translate(theirs, network.bare_state_dict())
    assert translation is not None
    assert {key: id(value) for key, value in translation.tensors.items()} == {k: id(v) for k, v in state.items()}


def test_pyslowfast_checkpoint(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = build_network("pytorchvideo/x3d_xs", num_classes=CLASSES, input=clip_spec())
    clip = torch.randn(2, 3, 4, 96, 96)
    layouts.calibrate(network, clip)
    state = layouts.state_of(network)
    theirs = layouts.pyslowfast(state)
    # PySlowFast's first shortcut has a BN, PyTorchVideo's has not: one that undoes what it would do to the sum.
    gamma, beta, mean, variance = torch.rand(4, 24) + 0.5
    scale = gamma / (variance + 1e-5).sqrt()
    block = "s2.pathway0_res0"
    for leaf, value in (("weight", gamma), ("bias", beta), ("running_mean", mean), ("running_var", variance)):
        theirs[f"{block}.branch1_bn.{leaf}"] = value
    theirs[f"{block}.branch1.weight"] = theirs[f"{block}.branch1.weight"] / scale[:, None, None, None, None]
    theirs[f"{block}.branch2.c_bn.bias"] = theirs[f"{block}.branch2.c_bn.bias"] - beta + mean * scale
    torch.save({"epoch": 1, "model_state": theirs, "cfg": "MODEL: {}"}, tmp_path / "X3D_XS.pyth")
    report = convert(str(tmp_path / "X3D_XS.pyth"), str(tmp_path / "x.safetensors"), to="pytorchvideo/x3d_xs")
    assert report.complete
    assert "folded into branch1_conv" in str(report)
    again = build_network("pytorchvideo/x3d_xs", num_classes=CLASSES, input=clip_spec()).eval()
    assert load_weights(again, tmp_path / "x.safetensors", strict=True).complete
    expected = logits_of(network, clip)
    assert (logits_of(again, clip) - expected).abs().max() <= 1e-4 * expected.abs().max()  # folding rounds
    assert (logits_of(again, clip.flip(2)) - expected).abs().max() > 1e-2 * expected.abs().max()


def test_image_network(tmp_path: Path) -> None:
    """Places365 wraps keys and has no batch counters; the network is torchvision's."""
    torch.manual_seed(0)
    theirs = layouts.state_of(resnet18(num_classes=11))
    torch.save({"arch": "resnet18", "state_dict": wrapped(theirs)}, tmp_path / "places.pth.tar")
    assert convert(str(tmp_path / "places.pth.tar"), str(tmp_path / "x.pth"), to="torchvision/resnet18").complete
    ours = read_checkpoint(tmp_path / "x.pth").tensors
    assert all(torch.equal(ours[key], value) for key, value in theirs.items())


def test_loading_a_public_file_directly(tmp_path: Path) -> None:
    case = CASES[0]
    network, clip = make(case)
    path = write(
        case, {f"model.{key}": value for key, value in case.write(layouts.state_of(network)).items()}, tmp_path
    )
    other = build_network("I3D", num_classes=CLASSES, input=clip_spec(), width=8, affine_norm=True).eval()
    report = load_weights(other, path, strict=True)
    assert "translated from the layout pytorch-i3d" in str(report)
    assert (logits_of(other, clip) - logits_of(network, clip)).abs().max() <= 1e-6
    with pytest.raises(WeightsError, match=r"layout pytorch-i3d, which is for I3D"):
        load_weights(build_network("Res3D", num_classes=5, input=clip_spec(), depth=10, width=4), path)


def test_help_names_every_layout() -> None:
    text = convert_weights.__doc__ or ""
    for name in (*(layout.name for layout in LAYOUTS), NATIVE):
        assert f"\n  {name} " in text
