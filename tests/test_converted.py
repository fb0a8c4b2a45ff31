"""Converted files as the verbs read them: whole paths from a written file, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import layouts
import numpy as np
import pytest
import torch
import yaml
from small_jobs import SIZE
from torchvision.models import googlenet, inception_v3

from distinit_plugin import cli
from distinit_plugin.config.defaults import get_cfg
from distinit_plugin.data.views import finish_views
from distinit_plugin.data.windows import SlidingWindows, Spacing
from distinit_plugin.engine.checkpoint import save_checkpoint
from distinit_plugin.errors import UserError
from distinit_plugin.jobs.conversion import convert
from distinit_plugin.jobs.extraction import file_name
from distinit_plugin.jobs.prediction import predict
from distinit_plugin.jobs.trained import read_trained
from distinit_plugin.models import InputSpec, VideoNetwork, build_network
from distinit_plugin.types import SampleKey
from distinit_plugin.video.decode import open_video
from distinit_plugin.weights import read_checkpoint
from distinit_plugin.weights.families import auxiliary_heads
from distinit_plugin.weights.public import PublicFile
from distinit_plugin.weights.switches import switches_of

CLASSES = 5
MEAN, STD = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)  # pytorch-i3d's, which the layout tells
FRAMES = 4
OPTS = ["DATA.NUM_FRAMES", str(FRAMES), "DATA.TEST_CROP_SIZE", str(SIZE)]
EXACT = [*OPTS, "RUNNER.PRECISION", "fp32"]
SPEC = InputSpec(num_frames=FRAMES, train_crop_size=SIZE, test_crop_size=SIZE, mean=MEAN, std=STD)


@pytest.fixture(scope="module")
def network() -> VideoNetwork:
    """An I3D whose logits differ from clip to clip."""
    torch.manual_seed(0)
    made = build_network("I3D", num_classes=CLASSES, input=SPEC, width=4, affine_norm=True)
    layouts.calibrate(made, torch.randn(4, 3, 8, SIZE, SIZE))
    return made


@pytest.fixture(scope="module")
def folder(network: VideoNetwork, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``i3d.pyth`` and ``i3d.safetensors``, converted from a file of pytorch-i3d's layout; ``bare``: no classifier."""
    folder = tmp_path_factory.mktemp("converted")
    source = folder / "rgb_imagenet.pt"
    torch.save(layouts.pytorch_i3d(layouts.state_of(network)), source)
    convert(str(source), str(folder / "i3d.pyth"), to="I3D")
    convert(str(source), str(folder / "i3d.safetensors"), to="I3D")
    convert(str(source), str(folder / "bare.pyth"), to="I3D", drop_classifier=True)
    return folder


@pytest.fixture
def video(videos: Path) -> str:
    return str(videos / "test" / "bright" / "video100.mp4")


def windows_through(network: VideoNetwork, path: str) -> list[Any]:
    """The network on the windows of a video, one by one."""
    with open_video(path) as source:
        windows = list(SlidingWindows(source, network.view_specs("test"), Spacing(stride=3)))
    rows = []
    for window in windows:
        views = {name: view[None] for name, view in window.views.items()}
        with torch.inference_mode():
            rows.append(network(finish_views(views, network.view_specs("test"), "cpu")))
    return rows


@pytest.mark.parametrize("name", ["i3d.pyth", "i3d.safetensors"])
def test_features(name, network, folder, video, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["extract-features", video, "--checkpoint", str(folder / name), "--output", "out", "--stride", "3"]
    assert cli.main([*words, "--opts", *EXACT]) == 0
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "assumed: DATA.SAMPLING_RATE 1 (--opts" in said  # frames and crop are given, the file tells mean and std
    rows = np.load(tmp_path / "out" / file_name(video, "npy"), allow_pickle=False)
    expected = windows_through(network, video)
    assert len(rows) == len(expected) == 3
    for key in ("features", "logits"):
        values = torch.cat([getattr(row, key) for row in expected])
        np.testing.assert_allclose(rows[key], values, atol=1e-4)
        assert np.ptp(values.numpy(), axis=0).max() > 1e-2  # windows differ
    assert [path.name for path in tmp_path.iterdir()] == ["out"]

    assert cli.main([*words, "--opts", *EXACT, "DATA.MEAN", "[0.4,0.4,0.4]"]) == 1  # other values, so another folder
    assert "normalised: rgb (0.5, 0.5, 0.5)" in capsys.readouterr().err


def test_predictions(network, folder, video, tmp_path, capsys):
    from distinit_plugin import build
    from distinit_plugin.video.corpus import Corpus, Listing, Mixture

    cfg = get_cfg()
    cfg.DATA.NUM_FRAMES, cfg.DATA.TEST_CROP_SIZE, cfg.TEST.NUM_ENSEMBLE_VIEWS = FRAMES, SIZE, 2
    listing = Listing(root="", labeled=False)
    listing.add(video)
    named = build.view_specs(network, {}, "test")
    dataset = build.build_dataset(cfg, Mixture([Corpus("videos", listing)]), named, "test", keep_index=False)
    scores = torch.zeros(CLASSES)
    for clip in range(2):
        sample = dataset[SampleKey(0, 0, 0, clip)]
        views = {key: value[None] for key, value in sample["views"].items()}
        with torch.inference_mode():
            scores += network(finish_views(views, network.view_specs("test"), "cpu")).logits[0].softmax(0) / 2
    (found,) = predict([video], checkpoint=str(folder / "i3d.safetensors"), num_clips=2, opts=EXACT)
    assert [name for name, _ in found.classes] == [str(number) for number in scores.argsort(descending=True).tolist()]
    np.testing.assert_allclose([score for _, score in found.classes], scores.sort(descending=True).values, atol=1e-4)
    assert scores.max() - scores.min() > 0.02

    names = tmp_path / "names.txt"
    names.write_text("one\ntwo\nthree\nfour\nfive\n")
    capsys.readouterr()
    words = ["predict", video, "--checkpoint", str(folder / "i3d.pyth"), "--clips", "1", "--classes", str(names)]
    assert cli.main([*words, "--opts", *OPTS]) == 0
    assert set(capsys.readouterr().out.split()) >= {"one", "two", "three", "four", "five"}


def test_export(network, folder, tmp_path):
    for name in ("i3d.pyth", "i3d.safetensors"):
        file = tmp_path / f"of_{name}.safetensors"
        assert cli.main(["export", str(folder / name), str(file), "--opts", *OPTS]) == 0
        read = read_checkpoint(file)
        assert read.details["network"] == "I3D"
        assert read.details["num_classes"] == str(CLASSES)
        spec = json.loads(str(read.details["input"]))
        assert (spec["num_frames"], spec["test_crop_size"], spec["mean"]) == (FRAMES, SIZE, list(MEAN))
        for key, value in layouts.state_of(network).items():
            assert torch.equal(read.tensors[key], value), key


def test_what_is_assumed(folder, capsys):
    trained = read_trained(str(folder / "i3d.pyth"))
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    for part in ("i3d.pyth", "DATA.NUM_FRAMES 8, ", "DATA.SAMPLING_RATE 1, ", "DATA.TEST_CROP_SIZE 112 (", "--opts"):
        assert part in said
    assert "MEAN" not in said
    assert (trained.cfg.NETWORK.WIDTH, trained.cfg.NETWORK.AFFINE_NORM, trained.num_classes) == (4, True, CLASSES)
    everything = ["DATA.NUM_FRAMES", "64", "DATA.SAMPLING_RATE", "2", "DATA.TEST_CROP_SIZE", "224"]
    (spec,) = read_trained(str(folder / "i3d.pyth"), everything).network().view_specs("test").values()
    assert (spec.num_frames, spec.sampling_rate, spec.crop_size, spec.mean, spec.std) == (64, 2, 224, MEAN, STD)
    assert capsys.readouterr().err == ""


def test_without_a_normalisation_that_is_said_too(tmp_path, capsys):
    torch.manual_seed(0)
    state = build_network("R2Plus1D", num_classes=3, input=SPEC, depth=10, width=4, variant="torchvision").state_dict()
    torch.save(state, tmp_path / "public.pth")
    convert(str(tmp_path / "public.pth"), str(tmp_path / "r.pyth"), to="R2Plus1D")
    capsys.readouterr()
    trained = read_trained(str(tmp_path / "r.pyth"), OPTS)
    assert "DATA.MEAN [0.45, 0.45, 0.45], DATA.STD [0.225, 0.225, 0.225] (" in capsys.readouterr().err
    assert trained.cfg.NETWORK.VARIANT == "torchvision"
    assert torch.equal(trained.network().bare_state_dict()["fc.weight"], state["fc.weight"])


def test_options_of_a_trained_checkpoint(network, tmp_path, capsys):
    cfg = get_cfg()
    cfg.merge_from_list(["MODEL.MODEL_NAME", "I3D", "MODEL.NUM_CLASSES", 5, "NETWORK.WIDTH", 4])
    cfg.merge_from_list(["NETWORK.AFFINE_NORM", True, "CORPUS.TEST_NUM_FRAMES", 16, "CORPUS.TEST_SCALE", 128])
    cfg.merge_from_list(["ACTION.LOSS_WEIGHT", 1.0])
    own = {"class_names": list("abcde")}
    state = {"model_state": network.bare_state_dict(), "cfg": cfg.dump(), "distinit": own}
    save_checkpoint(tmp_path / "c.pyth", state)
    path = str(tmp_path / "c.pyth")
    (spec,) = read_trained(path).network().view_specs("test").values()
    assert (spec.num_frames, spec.crop_size) == (16, 112)
    (spec,) = read_trained(path, OPTS).network().view_specs("test").values()
    assert (spec.num_frames, spec.crop_size) == (FRAMES, SIZE)
    assert capsys.readouterr().err == ""  # nothing is assumed
    assert read_trained(path).class_names == list("abcde")
    with pytest.raises(UserError, match=r"DATA.TEST_CROP_SIZE 224 does not fit .* at most 128"):
        read_trained(path, ["DATA.TEST_CROP_SIZE", "224"])


@pytest.mark.parametrize(
    ("opts", "message"),
    [
        (["SOLVER.BASE_LR", "1"], "SOLVER.BASE_LR cannot be set here. Allowed: DATA.NUM_FRAMES"),
        (["NETWORK.WIDTH", "8"], "NETWORK.WIDTH cannot be set here"),
        (["DATA.RANDOM_FLIP", "True"], "DATA.RANDOM_FLIP cannot be set here"),
        (["DATA.NUM_FRAMES", "0"], "DATA.NUM_FRAMES: 0 is not allowed"),
        (["DATA.NUM_FRAMES", "many"], "DATA.NUM_FRAMES"),
        (["DATA.NUM_FRAMES"], "'DATA.NUM_FRAMES' is left over"),
        (["DATA.MEAN", "[0.5]"], "DATA.MEAN"),
    ],
)
def test_bad_options(opts, message, folder, video, tmp_path, capsys):
    for words in (
        ["extract-features", video, "--checkpoint", str(folder / "i3d.pyth"), "--output", str(tmp_path / "out")],
        ["predict", video, "--checkpoint", str(folder / "i3d.pyth")],
        ["export", str(folder / "i3d.pyth"), str(tmp_path / "out")],
    ):
        words = [word.replace("/out", "/out.pt2") if words[0] == "export" else word for word in words]
        assert cli.main([*words, "--opts", *opts]) == 1
        said = capsys.readouterr().err
        assert message in said
        assert said.count("error: ") == 1
    assert list(tmp_path.iterdir()) == []


def test_bad_precision(folder, video, tmp_path, capsys, monkeypatch):
    """Exported files are fp32, whatever the training was in; the verbs that compute take the key."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    file = str(folder / "i3d.pyth")
    extracting = ["extract-features", video, "--checkpoint", file, "--output", str(tmp_path / "out")]
    for words, value, message in (
        (extracting, "fp8", "'fp8' is not allowed. Allowed: auto, fp32, bf16, fp16"),
        (extracting, "fp16", "fp16 works on a GPU only"),
        (["predict", video, "--checkpoint", file], "fp16", "fp16 works on a GPU only"),
        (["export", file, str(tmp_path / "out.pt2")], "fp32", "RUNNER.PRECISION cannot be set here"),
    ):
        assert cli.main([*words, "--opts", "RUNNER.PRECISION", value]) == 1
        said = capsys.readouterr().err
        assert message in said
        assert said.count("error: ") == 1
    assert list(tmp_path.iterdir()) == []


def _saved(contents: object) -> Any:
    return lambda path: torch.save(contents() if callable(contents) else contents, path)


def _safetensors(path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"conv.weight": torch.ones(2)}, path, metadata={"format": "pt"})


def _of_pyslowfast(path: Path) -> None:
    text = "MODEL: {MODEL_NAME: SlowFast}\nDATA: {NUM_FRAMES: 32}\nSLOWFAST: {ALPHA: 4}\nTRAIN: {ENABLE: true}\n"
    torch.save({"epoch": 1, "model_state": {"s1.weight": torch.ones(2)}, "cfg": text}, path)


FOREIGN = {
    "bare.pth": _saved({"conv.weight": torch.ones(2)}),
    "nested.pth.tar": _saved({"epoch": 2, "state_dict": {"conv.weight": torch.ones(2)}}),
    "weights.safetensors": _safetensors,
    "slowfast.pyth": _of_pyslowfast,
    "damaged.pyth": _saved({"model_state": {"x": torch.ones(2)}, "cfg": "MODEL: [unclosed"}),
    "number.pyth": _saved({"model_state": {"x": torch.ones(2)}, "cfg": 3}),
    "no_name.pyth": _saved({"model_state": {"x": torch.ones(2)}, "cfg": "MODEL: {}"}),
    "blobs.pkl": lambda path: path.write_bytes(b"\x80\x02}q\x00X\x05\x00\x00\x00blobsq\x01}q\x02s."),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_files_of_other_programs(name, video, tmp_path, capsys):
    file = tmp_path / name
    FOREIGN[name](file)
    for words in (
        ["extract-features", video, "--checkpoint", str(file), "--output", str(tmp_path / "out")],
        ["predict", video, "--checkpoint", str(file)],
        ["export", str(file), str(tmp_path / "out.pt2")],
    ):
        assert cli.main(words) == 1
        said = capsys.readouterr().err
        assert said.startswith("error: ")
        assert said.count("\n") == 1
        assert name in said
        assert "distinit convert-weights" in said
    assert list(tmp_path.iterdir()) == [file]


def _edited(folder: Path, destination: Path, **nodes: dict[str, Any]) -> str:
    state = torch.load(folder / "i3d.pyth", weights_only=True)
    text = yaml.safe_load(state["cfg"])
    for node, keys in nodes.items():
        text[node] = {**text.get(node, {}), **keys}
    torch.save({**state, "cfg": yaml.safe_dump(text)}, destination)
    return str(destination)


@pytest.mark.parametrize(
    ("nodes", "message"),
    [
        ({"NETWORK": {"PADDING": "diagonal"}}, "NETWORK.PADDING: 'diagonal' is not allowed"),
        ({"NETWORK": {"WIDTH": 0}}, "NETWORK.WIDTH: 0 is not allowed"),
        ({"NETWORK": {"WIDHT": 4}}, "NETWORK.WIDHT"),
        ({"NETWORK": {"WIDTH": 8}}, "edited.pyth is of another network"),
        ({"NETWORK": {"AFFINE_NORM": False}}, "edited.pyth does not fit the network"),
        ({"MODEL": {"MODEL_NAME": "I4D"}}, "Did you mean I3D"),
        ({"MODEL": {"MODEL_NAME": "timm/resnet50"}}, "holds timm/resnet50, an image network"),
        ({"DATA": {"MEAN": [0.5, 0.5]}}, "DATA.MEAN has 2 entries"),
        ({"DATA": {"STD": [0, 0, 0]}}, "DATA.STD"),
    ],
)
def test_descriptions_that_do_not_hold(nodes, message, folder, tmp_path):
    path = _edited(folder, tmp_path / "edited.pyth", **nodes)
    with pytest.raises(UserError) as caught:
        read_trained(path).network()
    assert message in str(caught.value)


def test_no_classifier(folder, video, tmp_path, capsys):
    bare = str(folder / "bare.pyth")
    assert cli.main(["predict", video, "--checkpoint", bare]) == 1
    assert "has no classifier" in capsys.readouterr().err
    words = ["extract-features", video, "--checkpoint", bare, "--output", str(tmp_path / "out")]
    assert cli.main([*words, "--layer", "logits"]) == 1
    assert "has no classifier" in capsys.readouterr().err
    assert cli.main([*words, "--opts", *OPTS]) == 0
    rows = np.load(tmp_path / "out" / file_name(video, "npy"), allow_pickle=False)
    assert rows.dtype.names == ("start", "end", "features")


def test_flow_networks_are_exported_and_fed(video, tmp_path, capsys):
    spec = InputSpec(mean=(0.5, 0.5), std=(0.5, 0.5), modality="flow")
    state = layouts.state_of(build_network("C3D", num_classes=3, input=spec, width=4))
    torch.save(state, tmp_path / "public.pth")
    flow = str(tmp_path / "flow.pyth")
    convert(str(tmp_path / "public.pth"), flow, to="C3D")
    (tmp_path / "names.txt").write_text("one\ntwo\nthree\n")
    predict = ["predict", video, "--classes", str(tmp_path / "names.txt"), "--clips", "1"]
    for words in (predict, ["extract-features", video, "--output", str(tmp_path / "out")]):
        assert cli.main([*words, "--checkpoint", flow, "--opts", *OPTS]) == 0
    assert "three" in capsys.readouterr().out
    assert cli.main(["export", flow, str(tmp_path / "x.safetensors"), "--opts", *OPTS]) == 0
    assert json.loads(str(read_checkpoint(tmp_path / "x.safetensors").details["input"]))["mean"] == [0.5, 0.5]


# -------------------------------------------------------------------------------------------- switches by shapes
INFERRED = {
    "C3D": ({"width": 8}, "rgb"),
    "C3D of flow": ({"width": 4}, "flow"),
    "ConvLSTM": ({"width": 8, "affine_norm": True}, "rgb"),
    "TwoStream": ({"width": 4, "affine_norm": False, "streams": "both"}, "rgb"),
    "TwoStream of flow": ({"width": 4, "affine_norm": True, "streams": "flow"}, "rgb"),
}


@pytest.mark.parametrize("case", INFERRED)
def test_switches_of_the_baselines(case, tmp_path):
    switches, modality = INFERRED[case]
    name = case.split()[0]
    channels = 3 if modality == "rgb" else 2
    spec = InputSpec(mean=(0.5,) * channels, std=(0.5,) * channels, modality=modality)
    torch.manual_seed(0)
    state = layouts.state_of(build_network(name, num_classes=3, input=spec, **switches))
    torch.save({f"module.{key}": value for key, value in state.items()}, tmp_path / "public.pth")
    report = convert(str(tmp_path / "public.pth"), str(tmp_path / "x.pyth"), to=name)
    assert report.complete
    written = read_checkpoint(tmp_path / "x.pyth")
    nodes = yaml.safe_load(str(written.details["cfg"]))
    assert nodes["MODEL"] == {"MODEL_NAME": name, "NUM_CLASSES": 3}
    assert nodes["NETWORK"]["MODALITY"] == modality
    assert {key.lower(): nodes["NETWORK"][key.upper()] for key in switches} == switches
    assert all(torch.equal(written.tensors[key], value) for key, value in state.items())


def test_shapes_alone():
    flow = InputSpec(mean=(0.5, 0.5), std=(0.5, 0.5), modality="flow")
    with torch.device("meta"):
        state = build_network("ConvLSTM", num_classes=3, input=flow, width=4).state_dict()
        assert switches_of(state) == {"width": 4, "affine_norm": False, "modality": "flow"}
        state = build_network("Fused3D", num_classes=3, input=InputSpec(), width=8, affine_norm=True).state_dict()
        assert switches_of(state) == {"width": 8, "affine_norm": True, "streams": "both"}
        assert switches_of({key: torch.ones(()) for key in state}) == {}


@pytest.mark.parametrize(
    ("name", "switches", "opts", "told"),
    [
        ("C3D", {"width": 8}, ["NETWORK.WIDTH", "16"], "--opts NETWORK.WIDTH 8."),
        ("ConvLSTM", {"width": 4}, ["NETWORK.AFFINE_NORM", "True"], "--opts NETWORK.AFFINE_NORM False."),
        ("I3D", {"width": 4, "affine_norm": True}, ["NETWORK.WIDTH", "8"], "--opts NETWORK.WIDTH 4."),
        ("S3DG", {"width": 4}, ["NETWORK.GATING_FROM", "Mixed_4b"], "--opts NETWORK.GATING_FROM 2C."),
        ("R2Plus1D", {"width": 4, "depth": 10}, ["RESNET.DEPTH", "18"], "--opts RESNET.DEPTH 10."),
    ],
)
def test_the_refusal_names_the_switch(name, switches, opts, told, tmp_path):
    torch.save(layouts.state_of(build_network(name, num_classes=3, input=InputSpec(), **switches)), tmp_path / "x.pth")
    with pytest.raises(UserError) as caught:
        convert(str(tmp_path / "x.pth"), str(tmp_path / "y.pyth"), to=name, opts=opts)
    assert told in str(caught.value)
    assert not (tmp_path / "y.pyth").exists()


def test_end_points_by_either_name_agree(tmp_path):
    network = build_network("S3DG", num_classes=3, input=InputSpec(), width=4, gating_from="4B")
    torch.save(layouts.state_of(network), tmp_path / "x.pth")
    opts = ["NETWORK.GATING_FROM", "Mixed_4b"]
    assert convert(str(tmp_path / "x.pth"), str(tmp_path / "y.pyth"), to="S3DG", opts=opts).complete


def test_other_networks_are_told_apart_without_a_switch(tmp_path):
    state = layouts.state_of(build_network("C3D", num_classes=3, input=InputSpec(), width=4))
    state.pop("conv5b.0.weight")
    torch.save(state, tmp_path / "x.pth")
    with pytest.raises(UserError, match=r"1 missing.*not those of C3D with NETWORK.WIDTH 4\. .*--drop-classifier"):
        convert(str(tmp_path / "x.pth"), str(tmp_path / "y.pyth"), to="C3D")


@pytest.mark.parametrize("key", ["conv1a.0.weight", "trunk.Conv2d_1a_7x7.conv.weight", "stem.0.weight"])
def test_shapes_that_no_network_has(key, tmp_path):
    torch.save({key: torch.ones(()), "layer1.0.conv1.0.weight": torch.ones(3)}, tmp_path / "x.pth")
    for name in ("C3D", "ConvLSTM", "Res3D"):
        with pytest.raises(UserError):
            convert(str(tmp_path / "x.pth"), str(tmp_path / "y.pyth"), to=name)


def test_a_safetensors_file_of_this_program_describes_itself(tmp_path):
    """What shapes do not tell comes through: a public file of these names would be of the variant torchvision."""
    source = build_network("R2Plus1D", num_classes=2, input=SPEC, depth=10, width=4)
    torch.save(layouts.state_of(source), tmp_path / "x.pth")
    opts = ["NETWORK.VARIANT", "vmz", "NETWORK.TEMPORAL_PADDING", "replicate"]
    convert(str(tmp_path / "x.pth"), str(tmp_path / "x.safetensors"), to="R2Plus1D", opts=opts)
    convert(str(tmp_path / "x.safetensors"), str(tmp_path / "y.pyth"), to="R2Plus1D")
    text = str(read_checkpoint(tmp_path / "y.pyth").details["cfg"])
    assert "VARIANT: vmz" in text
    assert "TEMPORAL_PADDING: replicate" in text


def test_a_file_is_translated_again_only_where_its_network_is_another(tmp_path, monkeypatch):
    calls = []
    original = PublicFile.translate
    monkeypatch.setattr(PublicFile, "translate", lambda file, target: calls.append(1) or original(file, target))
    for width, cfg, count in ((64, "", 1), (4, "", 2), (4, "NETWORK: {WIDTH: 4}", 1)):
        with torch.device("meta"):
            network = build_network("Res2D", num_classes=400, input=InputSpec(), width=width)
        state = {key: torch.zeros(value.shape) for key, value in layouts.state_of(network).items()}
        torch.save(state, tmp_path / "x.pth")
        (tmp_path / "net.yaml").write_text(f"MODEL: {{MODEL_NAME: Res2D}}\n{cfg}\n")
        files = [str(tmp_path / "net.yaml")] if cfg else []
        calls.clear()
        assert convert(str(tmp_path / "x.pth"), str(tmp_path / "y.pyth"), to="Res2D", cfg_files=files).complete
        assert len(calls) == count


# --------------------------------------------------------------------------------------------- extra classifiers
def test_extra_classifiers_are_skipped_by_name(tmp_path, capsys):
    torch.manual_seed(0)
    state = googlenet(num_classes=7, aux_logits=True, init_weights=False).state_dict()
    heads = {key for key in state if key.startswith(("aux1.", "aux2.")) and "num_batches" not in key}
    torch.save(state, tmp_path / "googlenet.pth")
    report = convert(str(tmp_path / "googlenet.pth"), str(tmp_path / "g.pyth"), to="torchvision/googlenet")
    assert report.complete
    assert heads <= set(report.skipped)
    said = capsys.readouterr().out
    assert "unexpected      0" in said
    assert "note: aux1, aux2: extra classifiers" in said
    written = read_checkpoint(tmp_path / "g.pyth").tensors
    assert not any(key.startswith("aux") for key in written)
    assert torch.equal(written["fc.weight"], state["fc.weight"])

    torch.save({**state, "aux3.fc1.weight": torch.ones(2)}, tmp_path / "more.pth")  # the negative control
    with pytest.raises(UserError, match="1 unexpected"):
        convert(str(tmp_path / "more.pth"), str(tmp_path / "h.pyth"), to="torchvision/googlenet")


def test_which_files_have_extra_classifiers(tmp_path):
    with torch.device("meta"):
        inception = inception_v3(init_weights=False).state_dict()
        assert auxiliary_heads(googlenet(init_weights=False).state_dict()) == ("aux1.", "aux2.")
    assert auxiliary_heads(inception) == ("AuxLogits.",)
    state = layouts.state_of(build_network("C3D", num_classes=3, input=InputSpec(), width=4))
    assert auxiliary_heads(state) == ()
    torch.save({**state, "aux1.fc1.weight": torch.ones(2)}, tmp_path / "x.pth")
    with pytest.raises(UserError, match="1 unexpected"):
        convert(str(tmp_path / "x.pth"), str(tmp_path / "y.pyth"), to="C3D")
