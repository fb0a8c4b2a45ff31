"""The contract of every registered network, and of the external ones."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn

from distinit_plugin.errors import UserError
from distinit_plugin.models import ExternalNetwork, InputSpec, Res2D, VideoNetwork, build_network
from distinit_plugin.models.conv import Conv3d
from distinit_plugin.models.external import PYTORCHVIDEO_NAMES
from distinit_plugin.models.r2plus1d import mid_channels
from distinit_plugin.registry import MODELS
from distinit_plugin.types import Network

NUM_CLASSES = 7
SMALL = InputSpec(num_frames=8, train_crop_size=64, test_crop_size=64)

REGISTERED: dict[str, tuple[dict[str, Any], InputSpec]] = {
    "C3D": ({"width": 8}, SMALL),
    "ConvLSTM": ({"width": 16}, InputSpec(num_frames=3, train_crop_size=64, test_crop_size=64)),
    "Fused3D": ({"width": 16}, InputSpec(num_frames=2, train_crop_size=64, test_crop_size=64)),
    "Res3D": ({"depth": 18, "width": 8}, SMALL),
    "PredictedFlow3D": ({"width": 8}, SMALL),
    "R2Plus1D": ({"depth": 18, "width": 8}, SMALL),
    "Res2D": ({"depth": 10, "width": 8}, SMALL),
    "I3D": ({"width": 8}, SMALL),
    "S3DG": ({"width": 8}, SMALL),
    "TwoStream": ({"width": 16}, InputSpec(num_frames=2, train_crop_size=64, test_crop_size=64)),
}
EXTERNAL = [
    "torchvision/mc3_18",
    "torchvision/s3d",
    "torchvision/swin3d_t",
    "pytorchvideo/c2d_r50",
    "pytorchvideo/efficient_x3d_xs",
    "pytorchvideo/i3d_r50",
    "pytorchvideo/mvit_base_16x4",
    "pytorchvideo/r2plus1d_r50",
    "pytorchvideo/slow_r50",
    "pytorchvideo/slowfast_r50",
    "pytorchvideo/x3d_s",
]
ALL_EXTERNAL = [f"torchvision/{name}" for name in torchvision.models.list_models(module=torchvision.models.video)] + [
    f"pytorchvideo/{name}" for name in PYTORCHVIDEO_NAMES
]


def build_with_views(name: str) -> tuple[VideoNetwork, dict[str, Tensor]]:
    torch.manual_seed(0)
    switches, spec = REGISTERED.get(name, ({}, SMALL))
    network = build_network(name, num_classes=NUM_CLASSES, input=spec, **switches)
    return network, random_views(network)


def random_views(network: Network, batch_size: int = 2) -> dict[str, Tensor]:
    """What the network's own specs ask for."""
    views = {}
    for view, spec in network.view_specs("train").items():
        assert spec.num_frames is not None
        channels = len(spec.mean)
        assert channels == len(spec.std) == (3 if spec.modality == "rgb" else 2) * spec.stack
        views[view] = torch.randn(batch_size, channels, spec.num_frames, spec.crop_size, spec.crop_size)
    return views


def build_small(name: str) -> tuple[VideoNetwork, Tensor]:
    """A network that sees frames alone."""
    network, views = build_with_views(name)
    assert list(views) == ["rgb"]
    return network, views["rgb"]


def test_every_registered_network_is_tested() -> None:
    assert {name for name, _ in MODELS} == set(REGISTERED)


@pytest.mark.parametrize("name", [*REGISTERED, *EXTERNAL])
def test_contract(name: str) -> None:
    network, views = build_with_views(name)
    assert isinstance(network, Network)
    output = network(views, taps=list(network.layers))
    check_shapes(network, next(iter(views.values())), output)
    assert output.logits is not None
    check_not_probabilities(output.logits)

    output.logits.square().sum().backward()
    without = [key for key, parameter in network.named_parameters() if parameter.grad is None]
    assert not without
    assert all(torch.isfinite(parameter.grad).all() for parameter in network.parameters() if parameter.grad is not None)

    network.eval()
    with torch.no_grad():
        evaluated = network(views)
    assert evaluated.logits is not None
    assert evaluated.logits_over_time is None
    check_not_probabilities(evaluated.logits)
    check_classifier(network, views)


def check_shapes(network: VideoNetwork, clip: Tensor, output: Any) -> None:
    assert output.logits.shape == (2, NUM_CLASSES)
    assert output.features.shape == (2, network.feature_dim)
    assert set(output.taps) == set(network.layers)
    for name, info in network.layers.items():
        frames, size = (math.ceil(clip.shape[2] / info.temporal_stride), math.ceil(clip.shape[3] / info.spatial_stride))
        assert output.taps[name].shape == (2, info.channels, frames, size, size), name


def check_not_probabilities(logits: Tensor) -> None:
    assert (logits.sum(dim=1) - 1).abs().min() > 1e-4
    assert (logits < 0).any()


def check_classifier(network: VideoNetwork, views: dict[str, Tensor]) -> None:
    before = network.bare_state_dict()
    network.reset_classifier(0)
    with torch.no_grad():
        assert network(views).logits is None
    assert len(network.bare_state_dict()) == len(before) - 2
    network.reset_classifier(5)
    with torch.no_grad():
        changed = network(views)
    assert changed.logits is not None
    assert changed.logits.shape == (2, 5)
    assert changed.features is not None
    assert changed.features.shape == (2, network.feature_dim)

    network.reset_classifier(NUM_CLASSES)
    assert set(network.bare_state_dict()) == set(before)
    network.load_state_dict(before, strict=True)
    after = network.bare_state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())
    assert not any(key.startswith(("model.", "projection.w", "projection.b")) for key in after)


@pytest.mark.parametrize("name", REGISTERED)
def test_every_parameter_learns(name: str) -> None:
    network, views = build_with_views(name)
    logits = network(views).logits
    assert logits is not None
    logits.square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in network.parameters())


@pytest.mark.parametrize("name", ["Res3D", "R2Plus1D", "Res2D", "I3D", "S3DG"])
def test_flow_networks(name: str) -> None:
    """Two channels under the name of their own; everything but the stem is the RGB network's."""
    switches, spec = REGISTERED[name]
    rgb = build_network(name, num_classes=NUM_CLASSES, input=spec, **switches).bare_state_dict()
    flow_spec = replace(spec, modality="flow", mean=(0.5, 0.5), std=(0.25, 0.25))
    network = build_network(name, num_classes=NUM_CLASSES, input=flow_spec, **switches)
    assert list(network.view_specs("train")) == ["flow"]
    shapes = {key: value.shape for key, value in network.bare_state_dict().items()}
    (stem,) = (key for key, value in rgb.items() if value.shape != shapes[key])
    assert shapes[stem] == (rgb[stem].shape[0], 2, *rgb[stem].shape[2:])
    view = network.view_specs("train")["flow"]
    assert view.num_frames is not None
    clip = torch.randn(2, 2, view.num_frames, view.crop_size, view.crop_size)
    check_shapes(network, clip, network({"flow": clip}, taps=list(network.layers)))


@pytest.mark.parametrize("name", ALL_EXTERNAL)
def test_every_external_name_builds(name: str) -> None:
    """Shapes alone, on the meta device."""
    spec = InputSpec(num_frames=16, train_crop_size=224, test_crop_size=224)
    with torch.device("meta"):
        network = build_network(name, num_classes=NUM_CLASSES, input=spec)
        output = network({"rgb": torch.empty(2, 3, 16, 224, 224)})
    assert output.logits is not None
    assert output.logits.shape == (2, NUM_CLASSES)
    assert output.features is not None
    assert output.features.shape == (2, network.feature_dim)


def test_softmax_of_pytorchvideo_is_gone() -> None:
    """PyTorchVideo's own network emits probabilities; ours emits their logarithm up to a constant."""
    from pytorchvideo.models import hub

    torch.manual_seed(0)
    theirs = hub.x3d_s(pretrained=False).eval()
    ours = build_network(
        "pytorchvideo/x3d_s", num_classes=400, input=InputSpec(num_frames=13, train_crop_size=160, test_crop_size=160)
    ).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    clip = torch.randn(1, 3, 13, 160, 160)
    with torch.no_grad():
        probs, logits = theirs(clip), ours({"rgb": clip}).logits
    assert logits is not None
    torch.testing.assert_close(probs.sum(dim=1), torch.ones(1))
    torch.testing.assert_close(logits.softmax(dim=1), probs, atol=1e-6, rtol=1e-4)


def test_slowfast_pathways() -> None:
    network, clip = build_small("pytorchvideo/slowfast_r50")
    assert isinstance(network, ExternalNetwork)
    slow, fast = network._pathways(clip)
    assert fast is clip
    assert torch.equal(slow, clip[:, :, [0, 7]])


def test_external_state_dict_inside_another_module() -> None:
    network, _ = build_small("pytorchvideo/efficient_x3d_xs")
    whole = nn.ModuleDict({"student": network})
    state = {key: value.clone() for key, value in whole.state_dict().items()}
    assert "student.projection.model.weight" in state
    assert not any("student.model." in key for key in state)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
    whole.load_state_dict(state, strict=True)
    assert all(torch.equal(value, state[key]) for key, value in whole.state_dict().items())


def test_pytorchvideo_transforms_are_never_imported() -> None:
    build_small("pytorchvideo/efficient_x3d_xs")
    assert not any(name.startswith("pytorchvideo.transforms") for name in sys.modules)


def test_image_network_averages_frames() -> None:
    network, _ = build_small("Res2D")
    network.eval()
    clip = torch.randn(2, 3, 3, 64, 64)
    with torch.no_grad():
        whole = network({"rgb": clip}, taps=["layer2"])
        frames = [network({"rgb": clip[:, :, t : t + 1]}) for t in range(3)]
    torch.testing.assert_close(whole.logits, torch.stack([f.logits for f in frames]).mean(dim=0))
    torch.testing.assert_close(whole.features, torch.stack([f.features for f in frames]).mean(dim=0))
    assert whole.taps["layer2"].shape == (2, 16, 3, 8, 8)
    spec = network.view_specs("train")["rgb"]
    assert (spec.num_frames, spec.pick) == (1, "center")


def test_view_specs() -> None:
    spec = InputSpec(num_frames=4, sampling_rate=2, target_fps=15.0, train_crop_size=56, test_crop_size=64)
    network = build_network("Res3D", num_classes=2, input=spec, depth=10, width=4)
    train, test = network.view_specs("train")["rgb"], network.view_specs("test")["rgb"]
    assert (train.num_frames, train.sampling_rate, train.target_fps, train.pick) == (4, 2, 15.0, "clip")
    longer = build_network("Res3D", num_classes=2, input=replace(spec, test_num_frames=10), depth=10, width=4)
    assert [longer.view_specs(split)["rgb"].num_frames for split in ("train", "val", "test")] == [4, 4, 10]
    assert (train.crop_size, test.crop_size, network.view_specs("val")["rgb"].crop_size) == (56, 64, 64)


@pytest.mark.parametrize(
    ("variant", "num_frames", "strides"),
    [
        ("vmz", 8, (1, 2, 4, 8)),
        ("vmz", 6, (1, 2, 4, 4)),
        ("vmz", 3, (1, 2, 2, 2)),
        ("torchvision", 6, (1, 2, 4, 8)),
    ],
)
def test_short_clips_keep_their_frames(variant: str, num_frames: int, strides: tuple[int, ...]) -> None:
    network = build_network(
        "R2Plus1D", num_classes=2, input=InputSpec(num_frames=num_frames), depth=10, width=4, variant=variant
    )
    assert tuple(network.layers[f"layer{i}"].temporal_stride for i in range(1, 5)) == strides
    with torch.no_grad():
        taps = network({"rgb": torch.randn(2, 3, num_frames, 32, 32)}, taps=["layer4"]).taps
    assert taps["layer4"].shape[2] == math.ceil(num_frames / strides[-1])


def test_middle_channels_by_variant() -> None:
    """The table of the (2+1)D middle channels: one number for each convolution, or one for the block."""
    with torch.device("meta"):
        found = {
            variant: [
                network.get_submodule(f"layer{stage}.0.conv{conv}.0.0").out_channels
                for stage in range(1, 5)
                for conv in (1, 2)
            ]
            for variant in ("vmz", "torchvision")
            for network in [build_network("R2Plus1D", num_classes=0, input=SMALL, variant=variant)]
        }
    assert found["vmz"] == [144, 144, 230, 288, 460, 576, 921, 1152]
    assert found["torchvision"] == [144, 144, 230, 230, 460, 460, 921, 921]
    assert mid_channels(16, 16) == 36


def test_width_scales_all_stages_and_the_stem() -> None:
    network = build_network("R2Plus1D", num_classes=2, input=SMALL, depth=10, width=16)
    assert [network.layers[name].channels for name in ("stem", "layer1", "layer4")] == [16, 16, 128]
    assert network.get_submodule("stem.0").out_channels == round(45 * 16 / 64)


def test_stem_pool_halves_the_maps() -> None:
    plain = build_network("Res3D", num_classes=2, input=SMALL, depth=10, width=4)
    pooled = build_network("Res3D", num_classes=2, input=SMALL, depth=10, width=4, stem_pool=True)
    assert (plain.layers["layer4"].spatial_stride, pooled.layers["layer4"].spatial_stride) == (16, 32)
    assert plain.state_dict().keys() == pooled.state_dict().keys()
    taps = pooled({"rgb": torch.randn(2, 3, 8, 64, 64)}, taps=["stem"]).taps
    assert taps["stem"].shape == (2, 4, 8, 16, 16)


def test_replicated_time_keeps_a_still_video_still() -> None:
    frame = torch.randn(1, 3, 1, 32, 32)
    spread = {}
    for padding in ("zeros", "replicate"):
        network, _ = build_small("Res3D")
        network = build_network("Res3D", num_classes=2, input=SMALL, depth=10, width=4, temporal_padding=padding).eval()
        with torch.no_grad():
            x = network({"rgb": frame.expand(-1, -1, 8, -1, -1)}, taps=["layer1"]).taps["layer1"]
        spread[padding] = float((x - x[:, :, :1]).abs().max() / x.abs().max())
    assert spread["replicate"] < 1e-6
    assert spread["zeros"] > 1e-2  # the negative control


def test_dropout_acts_in_training_only() -> None:
    network, clip = build_small("Res2D")
    network = Res2D(num_classes=NUM_CLASSES, input=SMALL, depth=10, width=8, dropout=0.5)
    external = build_network("pytorchvideo/efficient_x3d_xs", num_classes=NUM_CLASSES, input=SMALL, dropout=0.5)
    for module in (network, external):
        for norm in module.modules():
            if isinstance(norm, nn.modules.batchnorm._BatchNorm):
                norm.momentum = 0.0
        big = clip if module is network else torch.randn(2, 3, 8, 64, 64)
        with torch.no_grad():
            a, b = (module.train()({"rgb": big}) for _ in range(2))
            assert not torch.equal(a.logits, b.logits)
            torch.testing.assert_close(a.features, b.features)
            c, d = (module.eval()({"rgb": big}) for _ in range(2))
        assert torch.equal(c.logits, d.logits)


def test_external_convolutions_are_adopted() -> None:
    network, _ = build_small("torchvision/mc3_18")
    kinds = {type(module) for module in network.modules() if isinstance(module, nn.Conv3d)}
    assert kinds == {Conv3d}


@pytest.mark.parametrize(
    ("name", "switches", "spec", "message"),
    [
        ("Res3d", {}, SMALL, "Did you mean Res3D"),
        ("torchvision/r3d_81", {}, SMALL, "Did you mean r3d_18"),
        ("pytorchvideo/slowfast_r5", {}, SMALL, "Did you mean slowfast_r50"),
        ("torchvison/r3d_18", {}, SMALL, "Did you mean torchvision"),
        ("pytorchvideo/slow_r50_detection", {}, SMALL, "has no video network"),
        ("R2Plus1D", {"stem_pool": True}, SMALL, "NETWORK.STEM_POOL"),
        ("Res2D", {"temporal_padding": "replicate"}, SMALL, "NETWORK.TEMPORAL_PADDING"),
        ("Res3D", {"temporal_padding": "reflect"}, SMALL, "NETWORK.TEMPORAL_PADDING"),
        ("torchvision/r3d_18", {"depth": 34}, SMALL, "RESNET.DEPTH"),
        ("Res3D", {"depth": 19}, SMALL, "Allowed: 10, 16, 18, 26, 34, 50, 101, 152"),
        ("Res2D", {"depth": 26}, SMALL, "Allowed: 10, 18, 34, 50, 101, 152"),
        ("Res3D", {"width": 0}, SMALL, "NETWORK.WIDTH"),
        ("Res3D", {"variant": "paper"}, SMALL, "'vmz', 'torchvision'"),
        ("C3D", {"width": 0}, SMALL, "NETWORK.WIDTH"),
        ("ConvLSTM", {"padding": "valid"}, SMALL, "'same', 'symmetric'"),
        ("C3D", {"affine_norm": True}, SMALL, "NETWORK.AFFINE_NORM"),
        ("TwoStream", {}, InputSpec(mean=(0.5,) * 2, std=(0.5,) * 2, modality="flow"), "NETWORK.MODALITY"),
        ("Res3D", {"dropout": 1.0}, SMALL, "MODEL.DROPOUT_RATE"),
        ("pytorchvideo/slowfast_r50", {}, InputSpec(num_frames=10), "divisible by 4"),
        ("torchvision/mvit_v2_s", {}, SMALL, "16 frames at 224 pixels"),
        ("pytorchvideo/slowfast_r50", {}, InputSpec(test_num_frames=10), "divisible by 4"),
        ("pytorchvideo/mvit_base_16x4", {}, InputSpec(16, test_num_frames=32), "CORPUS.TEST_NUM_FRAMES 32"),
        ("pytorchvideo/mvit_base_16x4", {}, InputSpec(train_crop_size=64, test_crop_size=96), "same number"),
    ],
)
def test_errors_name_the_key_and_the_cure(name: str, switches: dict[str, Any], spec: InputSpec, message: str) -> None:
    with pytest.raises(UserError) as caught:
        build_network(name, num_classes=2, input=spec, **switches)
    assert message in str(caught.value)


def test_unknown_tap() -> None:
    network, clip = build_small("Res3D")
    with pytest.raises(UserError, match="Did you mean layer"):
        network({"rgb": clip}, taps=["layer5"])
