"""``distinit export``: each format against the network, with a free batch, and refusals."""

import io
import json
import re

import pytest
import torch
from small_jobs import CLASSES, brightness_teacher, checkpoint, labelled, small_cfg, write_teacher

from distinit_plugin import cli
from distinit_plugin.engine import export as exporting
from distinit_plugin.engine.export import TOLERANCE, export_network, random_views
from distinit_plugin.errors import UserError
from distinit_plugin.jobs.running import run
from distinit_plugin.jobs.trained import read_trained
from distinit_plugin.models import InputSpec
from distinit_plugin.models.c3d import C3D
from distinit_plugin.weights import load_weights


@pytest.fixture(scope="module")
def trained(videos, tmp_path_factory):
    output = tmp_path_factory.mktemp("trained") / "run"
    run(small_cfg(videos, output, **labelled(videos, TRAIN="train")))
    return checkpoint(output)


def expected_of(trained, batch):
    network = read_trained(str(trained)).network().eval()
    (view,) = random_views(network.view_specs("test"), batch, seed=5)
    with torch.no_grad():
        output = network({"rgb": view})
    return view, output


def close(found, expected):
    scale = expected.abs().max()
    assert scale > 0
    assert (found - expected).abs().max() <= TOLERANCE * scale


def test_safetensors(trained, tmp_path, capsys):
    file = tmp_path / "student.safetensors"
    assert cli.main(["export", str(trained), str(file)]) == 0
    assert "largest difference from the network on random clips: 0.0e+00" in capsys.readouterr().out
    from safetensors import safe_open

    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    assert metadata["network"] == "R2Plus1D"
    assert json.loads(metadata["classes"]) == list(CLASSES)
    assert json.loads(metadata["switches"])["NETWORK.WIDTH"] == 8
    assert json.loads(metadata["input"])["num_frames"] == 4
    fresh = read_trained(str(trained)).network()
    saved = {key: value.clone() for key, value in fresh.bare_state_dict().items()}
    with torch.no_grad():
        for value in fresh.bare_state_dict().values():
            value.zero_()
    load_weights(fresh, file, strict=True)
    assert all(torch.equal(value, saved[key]) for key, value in fresh.bare_state_dict().items())


def test_pt2_with_any_batch(trained, tmp_path):
    file = tmp_path / "student.pt2"
    assert cli.main(["export", str(trained), str(file)]) == 0
    extra = {"distinit_network": "", "distinit_classes": ""}
    loaded = torch.export.load(file, extra_files=extra).module()
    assert extra["distinit_network"] == "R2Plus1D"
    for batch in (1, 2, 5):
        view, output = expected_of(trained, batch)
        found = loaded(view)
        close(found["logits"], output.logits)
        close(found["features"], output.features)


def test_onnx_with_any_batch(trained, tmp_path, capsys):
    file = tmp_path / "student.onnx"
    if not _has("onnx", "onnxscript", "onnxruntime"):
        assert cli.main(["export", str(trained), str(file)]) == 1
        assert "pip install 'distinit-plugin[onnx]'" in capsys.readouterr().err
        assert not file.exists()
        pytest.skip("the extra onnx is not installed; the sentence for that was checked")
    assert cli.main(["export", str(trained), str(file)]) == 0
    import onnxruntime

    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    assert session.get_modelmeta().custom_metadata_map["network"] == "R2Plus1D"
    for batch in (1, 5):
        view, output = expected_of(trained, batch)
        logits, features = session.run(["logits", "features"], {"rgb": view.numpy()})
        close(torch.from_numpy(logits), output.logits)
        close(torch.from_numpy(features), output.features)


def _has(*names):
    import importlib.util

    return all(importlib.util.find_spec(name) for name in names)


def test_a_pretraining_gives_features_alone(videos, tmp_path):
    teacher = write_teacher(tmp_path / "res2d.pth")
    output = tmp_path / "run"
    run(small_cfg(videos, output, DISTILL={"TEACHERS": {"IMAGENET": brightness_teacher(teacher)}}))
    network = read_trained(str(checkpoint(output))).network()
    content, deviation = export_network(network, "pt2", {})
    loaded = torch.export.load(io.BytesIO(content)).module()
    (view,) = random_views(network.view_specs("test"), 2)
    assert list(loaded(view)) == ["features"]
    assert deviation <= TOLERANCE


@pytest.mark.parametrize("fmt", ["safetensors", "pt2"])
def test_a_file_that_does_not_agree_is_not_left(fmt, trained, tmp_path, capsys, monkeypatch):
    """The negative control: something goes wrong between the network and the file."""
    if fmt == "pt2":
        original = exporting._pt2

        def spoilt(bare, specs, metadata):
            weight = bare.network.fc.weight
            kept = weight.clone()
            weight.mul_(1.01)
            content = original(bare, specs, metadata)
            weight.copy_(kept)
            return content

        monkeypatch.setattr(exporting, "_pt2", spoilt)
    else:
        state = exporting._state
        calls = []

        def spoilt(network):
            calls.append(1)
            return [(key, value * 1.01 if len(calls) == 1 else value) for key, value in state(network)]

        monkeypatch.setattr(exporting, "_state", spoilt)
    file = tmp_path / f"student.{fmt}"
    file.write_bytes(b"what was there")
    assert cli.main(["export", str(trained), str(file)]) == 1
    assert "differs from the network by" in capsys.readouterr().err
    assert file.read_bytes() == b"what was there"
    assert list(tmp_path.iterdir()) == [file]


def test_mistakes(trained, tmp_path, capsys):
    for words, text in (
        ([trained, tmp_path / "x.pth"], "Allowed: .safetensors, .pt2, .onnx"),
        ([tmp_path / "absent.pyth", tmp_path / "x.pt2"], "absent.pyth"),
    ):
        assert cli.main(["export", *map(str, words)]) == 1
        assert text in capsys.readouterr().err
    network = read_trained(str(trained)).network()
    torch.nn.init.constant_(network.fc.bias, float("nan"))
    with pytest.raises(UserError, match="not finite"):
        export_network(network, "pt2", {})
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------------------------------ operators
def small_c3d(size=64, kind=None):
    """C3D on clips whose last map is not the one that it needs, with BN statistics that are not the initial ones."""
    torch.manual_seed(0)
    spec = InputSpec(num_frames=4, train_crop_size=size, test_crop_size=size)
    network = (kind or C3D)(num_classes=5, input=spec, width=8)
    views = {"rgb": torch.randn(4, 3, 4, size, size)}
    for module in network.modules():
        if hasattr(module, "running_var"):
            module.momentum = None
    with torch.no_grad():
        network.train()(views)
    return network.eval()


def test_c3d_as_onnx():
    if not _has("onnx", "onnxscript", "onnxruntime"):
        pytest.skip("the extra onnx is not installed")
    import onnxruntime

    network = small_c3d()
    content, deviation = export_network(network, "onnx", {})
    assert deviation <= TOLERANCE
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    (view,) = random_views(network.view_specs("test"), 3, seed=7)
    (logits,) = session.run(["logits"], {"rgb": view.numpy()})
    with torch.no_grad():
        expected = network({"rgb": view}).logits
    close(torch.from_numpy(logits), expected)
    assert (expected[0] - expected[1]).abs().max() > 0.1 * expected.abs().max()  # clips differ: equality says something


class Coarse(C3D):
    """Has an operator that ONNX lacks."""

    def forward(self, views, *, boxes=None, taps=()):
        output = super().forward(views)
        return output._replace(features=torch.nn.functional.adaptive_avg_pool3d(views["rgb"], (1, 4, 4)).flatten(1))


class Fickle(C3D):
    """What it computes depends on the values that it sees."""

    def forward(self, views, *, boxes=None, taps=()):
        output = super().forward(views)
        return output if views["rgb"].mean() > 0 else output._replace(features=-output.features)


@pytest.mark.parametrize(
    ("kind", "fmt", "expected"),
    [
        (
            Coarse,
            "onnx",
            r"MINE cannot be exported as ONNX: ONNX has no counterpart of its operator aten\._?adaptive_avg_pool3d\. "
            r"Export \.pt2 \(torch\.export\) or \.safetensors instead\.",
        ),
        (
            Fickle,
            "pt2",
            r"MINE cannot be exported by torch\.export: .*data-dependent.*\. Export \.safetensors instead\.",
        ),
    ],
)
def test_a_refusal_is_one_sentence(kind, fmt, expected, capfd):
    if fmt == "onnx" and not _has("onnx", "onnxscript", "onnxruntime"):
        pytest.skip("the extra onnx is not installed")
    with pytest.raises(UserError) as caught:
        export_network(small_c3d(32, kind), fmt, {"network": "MINE"})
    assert re.fullmatch(expected, str(caught.value))
    assert str(caught.value).isprintable()  # no escape codes, one line
    assert capfd.readouterr().err == ""
    if kind is Coarse:  # torch.export can, as the sentence says
        assert export_network(small_c3d(32, kind), "pt2", {})[1] <= TOLERANCE
