"""Image, dense and video teachers: the contract, frozenness, weights."""

from __future__ import annotations

import logging
from itertools import islice
from pathlib import Path

import av
import pytest
import torch
from torch import Tensor, nn
from torchvision.models import SqueezeNet1_0_Weights, get_model

from distinit_plugin.errors import UserError, WeightsError
from distinit_plugin.models.factory import build_network
from distinit_plugin.models.network import InputSpec
from distinit_plugin.teachers import Frozen, build_teacher, freeze
from distinit_plugin.teachers.image import ImageNetwork, TimmClassifier, TorchvisionClassifier
from distinit_plugin.types import Network, ViewSpec

SIZE, CLASSES = 64, 7
VIEW = ViewSpec(num_frames=2, pick="uniform", crop_size=SIZE)

CLASSIFIERS = [
    "torchvision/resnet18",
    "torchvision/squeezenet1_1",
    "torchvision/densenet121",
    "torchvision/mobilenet_v3_small",
    "torchvision/shufflenet_v2_x0_5",
    "torchvision/mnasnet0_5",
    "torchvision/googlenet",
    "timm/test_resnet",
    "timm/test_vit",
    "timm/test_convnext",
    "timm/mobilenetv3_small_050",
]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def clip(batch: int = 2, frames: int = 2, size: int = SIZE) -> dict[str, Tensor]:
    return {"rgb": torch.randn(batch, 3, frames, size, size, generator=torch.Generator().manual_seed(0))}


def random_teacher(arch: str, layer: str = "logits", crop_size: int = SIZE, num_classes: int = CLASSES) -> Frozen:
    return build_teacher(
        arch, "random", num_classes=num_classes, layer=layer, num_frames=2, pick="uniform", crop_size=crop_size
    )


def calibrate(network: nn.Module) -> None:
    """Give BN the statistics of noise; with default ones signals fade away in deep random networks."""
    norms = [module for module in network.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.momentum = None
        norm.train()
    views = clip(batch=4)
    with torch.no_grad():
        network(views if isinstance(network, ImageNetwork) else views["rgb"][:, :, 0])
    network.eval()


@pytest.mark.parametrize("arch", CLASSIFIERS)
def test_contract(arch: str) -> None:
    teacher = random_teacher(arch)
    assert isinstance(teacher, Network)
    calibrate(teacher.network)
    views = clip()
    output = teacher(views, taps=["feature_map"])
    assert output.logits.shape == (2, CLASSES)
    assert output.features.shape == (2, teacher.feature_dim)
    info = teacher.layers["feature_map"]
    side = output.taps["feature_map"].shape[-1]
    assert output.taps["feature_map"].shape == (2, info.channels, 2, side, side)
    assert (info.temporal_stride, info.spatial_stride) == (1, round(SIZE / side))
    assert teacher.view_specs("train") == teacher.view_specs("test")
    assert teacher.view_specs("train")["rgb"] == ViewSpec(
        num_frames=2, pick="uniform", crop_size=SIZE, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)
    )
    # The clip's answer is the mean of its frames' answers.
    single = [teacher({"rgb": views["rgb"][:, :, t : t + 1]}, taps=["feature_map"]) for t in range(2)]
    assert torch.allclose(output.logits, (single[0].logits + single[1].logits) / 2, atol=1e-5)
    assert torch.allclose(output.features, (single[0].features + single[1].features) / 2, atol=1e-4)
    for t in range(2):
        assert torch.allclose(output.taps["feature_map"][:, :, t], single[t].taps["feature_map"][:, :, 0], atol=1e-4)
    assert not torch.allclose(single[0].features, single[1].features, atol=1e-4)
    assert teacher(views).taps == {}


@pytest.mark.parametrize("arch", ["torchvision/resnet18", "torchvision/densenet121", "timm/test_resnet"])
def test_features_are_the_pooled_map(arch: str) -> None:
    output = random_teacher(arch)(clip(), taps=["feature_map"])
    assert torch.allclose(output.features, output.taps["feature_map"].mean(dim=(2, 3, 4)), atol=1e-4)


def test_logits_are_the_library_s() -> None:
    teacher = random_teacher("torchvision/resnet18")
    calibrate(teacher.network)
    body = get_model("resnet18", num_classes=CLASSES).eval()
    body.load_state_dict(teacher.bare_state_dict())
    views = clip(frames=1)
    with torch.no_grad():
        assert torch.allclose(teacher(views).logits, body(views["rgb"][:, :, 0]), atol=1e-5)


@pytest.mark.parametrize("arch", ["torchvision/vit_b_32", "torchvision/swin_t", "timm/swin_tiny_patch4_window7_224"])
def test_tokens_and_channels_last_become_maps(arch: str) -> None:
    size = 224 if "vit" in arch else SIZE
    teacher = random_teacher(arch, "feature_map", size)
    output = teacher(clip(1, 1, size), taps=["feature_map"])
    side = size // 32
    assert output.taps["feature_map"].shape == (1, 768, 1, side, side)
    assert output.logits is None
    if "swin" in arch:
        assert torch.allclose(output.features, output.taps["feature_map"].mean(dim=(2, 3, 4)), atol=1e-4)


@pytest.mark.parametrize("arch", ["torchvision/resnet18", "torchvision/squeezenet1_1", "timm/test_vit", "Res2D"])
def test_features_need_no_classifier(arch: str) -> None:
    teacher = random_teacher(arch, "features")
    output = teacher(clip())
    assert output.logits is None
    assert output.features.shape == (2, teacher.feature_dim)


@pytest.mark.parametrize("kind", [TorchvisionClassifier, TimmClassifier])
def test_reset_classifier(kind: type) -> None:
    network = kind("resnet18", CLASSES, VIEW)
    before = network(clip()).features
    network.reset_classifier(3)
    assert network(clip()).logits.shape == (2, 3)
    network.reset_classifier(0)
    assert network(clip()).logits is None
    assert before.shape == (2, 512)


def test_auxiliary_outputs_in_training() -> None:
    network = TorchvisionClassifier("googlenet", CLASSES, VIEW).train()
    assert network(clip()).logits.shape == (2, CLASSES)


def test_frozen() -> None:
    """Nothing that training does to the module that holds a teacher reaches the teacher."""
    teacher = random_teacher("torchvision/resnet18")
    calibrate(teacher.network)
    holder = nn.ModuleDict({"teacher": teacher, "student": nn.Linear(1, 1)})
    before = {key: value.clone() for key, value in teacher.bare_state_dict().items()}
    expected = teacher(clip()).logits
    holder.train()
    logits = teacher(clip()).logits
    assert torch.equal(logits, expected)
    assert not any(module.training for module in teacher.network.modules())
    assert all(torch.equal(value, before[key]) for key, value in teacher.bare_state_dict().items())
    assert not any("teacher" in name for name, _ in holder.named_parameters())
    assert not any("teacher" in key for key in holder.state_dict())
    assert not any(parameter.requires_grad for parameter in teacher.network.parameters())
    with pytest.raises(TypeError, match="frozen"):
        teacher.reset_classifier(3)
    assert freeze(teacher) is teacher

    unfrozen = teacher.network.train()  # negative control: the same steps move the counters of an ordinary network
    unfrozen(clip())
    assert any(not torch.equal(value, before[key]) for key, value in teacher.bare_state_dict().items())


def test_frozen_moves_with_its_holder() -> None:
    teacher = random_teacher("timm/test_resnet")
    nn.ModuleList([teacher]).to(torch.float64)
    assert {value.dtype for value in teacher.bare_state_dict().values() if value.is_floating_point()} == {torch.float64}


def test_targets_can_be_saved_for_backward() -> None:
    output = random_teacher("timm/test_resnet")(clip(), taps=["feature_map"])
    for target in (output.logits, output.features, output.taps["feature_map"]):
        assert not target.requires_grad
        student = torch.randn_like(target, requires_grad=True)
        (student * target).sum().backward()
        assert torch.equal(student.grad, target)


@pytest.mark.parametrize(
    ("arch", "channels", "stride"),
    [
        ("torchvision/lraspp_mobilenet_v3_large", 21, 8),
        ("torchvision/deeplabv3_mobilenet_v3_large", 21, 16),
        ("torchvision/fcn_resnet50", 21, 8),
        ("torchvision/fasterrcnn_mobilenet_v3_large_fpn", 256, 32),
        ("torchvision/retinanet_resnet50_fpn", 256, 32),
    ],
)
def test_dense_teachers(arch: str, channels: int, stride: int) -> None:
    teacher = random_teacher(arch, "feature_map", num_classes=21)
    output = teacher(clip(2, 2), taps=["feature_map"])
    side = SIZE // stride
    assert output.logits is None
    assert output.taps["feature_map"].shape == (2, channels, 2, side, side)
    assert tuple(teacher.layers["feature_map"]) == (channels, 1, stride)
    assert teacher.feature_dim == channels


def test_segmentation_weights(tmp_path: Path) -> None:
    body = get_model("lraspp_mobilenet_v3_large", weights_backbone=None, num_classes=5).eval()
    torch.save(body.state_dict(), tmp_path / "w.pth")
    options = {"layer": "feature_map", "crop_size": SIZE}
    arch = "torchvision/lraspp_mobilenet_v3_large"
    teacher = build_teacher(arch, str(tmp_path / "w.pth"), num_classes=5, **options)
    views = clip(1, 1)
    with torch.no_grad():
        full = body(views["rgb"][:, :, 0])["out"]
    small = teacher(views, taps=["feature_map"]).taps["feature_map"][:, :, 0]
    assert torch.allclose(nn.functional.interpolate(small, (SIZE, SIZE), mode="bilinear"), full, atol=1e-4)
    with pytest.raises(WeightsError, match="has 5 classes, NUM_CLASSES is 21"):
        build_teacher(arch, str(tmp_path / "w.pth"), num_classes=21, **options)


def test_detection_weights_without_counters(tmp_path: Path) -> None:
    """Published detectors have constant normalisation, some with eps 0."""
    arch = "fasterrcnn_mobilenet_v3_large_fpn"
    body = get_model(arch, weights=None, weights_backbone=None).eval()
    calibrate(body.backbone)
    state = {key: value for key, value in body.state_dict().items() if "batches" not in key}
    torch.save(state, tmp_path / "w.pth")
    teacher = build_teacher(f"torchvision/{arch}", str(tmp_path / "w.pth"), layer="feature_map", crop_size=SIZE)
    views = clip(1, 1)
    with torch.no_grad():
        expected = body.backbone(views["rgb"][:, :, 0])["1"]
    assert torch.allclose(
        teacher(views, taps=["feature_map"]).taps["feature_map"][:, :, 0], expected, atol=1e-3, rtol=1e-3
    )


def test_places365_layout(tmp_path: Path) -> None:
    body = get_model("resnet18", num_classes=365)
    state = {"module." + key: value for key, value in body.state_dict().items() if "batches" not in key}
    torch.save({"epoch": 90, "arch": "resnet18", "state_dict": state, "best_prec1": 55.0}, tmp_path / "places.pth.tar")
    path = str(tmp_path / "places.pth.tar")
    before = torch.get_rng_state()
    teacher = build_teacher("torchvision/resnet18", path, num_classes=365, crop_size=SIZE)
    assert torch.equal(torch.get_rng_state(), before)  # the student's initial weights do not depend on teachers
    assert torch.equal(teacher.bare_state_dict()["fc.weight"], body.fc.weight)
    with pytest.raises(WeightsError, match=r"resnet18.*places\.pth\.tar has 365 classes, NUM_CLASSES is 1000"):
        build_teacher("torchvision/resnet18", path, crop_size=SIZE)
    features = build_teacher("torchvision/resnet18", path, layer="features", crop_size=SIZE)
    assert features(clip()).logits is None
    with pytest.raises(WeightsError, match=r"does not fit the network: missing layer1\.2"):
        build_teacher("torchvision/resnet34", path, num_classes=365, crop_size=SIZE)
    with pytest.raises(WeightsError, match="of another network"):
        build_teacher("torchvision/resnext50_32x4d", path, num_classes=365, crop_size=SIZE)


def test_incomplete_weights_are_refused(tmp_path: Path) -> None:
    state = get_model("resnet18", num_classes=CLASSES).state_dict()
    del state["layer3.0.bn1.running_mean"]
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(WeightsError, match=r"missing layer3\.0\.bn1\.running_mean"):
        build_teacher("torchvision/resnet18", str(tmp_path / "w.pth"), num_classes=CLASSES, crop_size=SIZE)


def test_googlenet_file_has_auxiliary_heads(tmp_path: Path) -> None:
    """torchvision's file has auxiliary classifiers, and needs its inputs rescaled inside."""
    body = get_model("googlenet", num_classes=CLASSES, aux_logits=True, init_weights=False, transform_input=True).eval()
    calibrate(body)
    torch.save(body.state_dict(), tmp_path / "w.pth")
    teacher = build_teacher("torchvision/googlenet", str(tmp_path / "w.pth"), num_classes=CLASSES, crop_size=SIZE)
    views = clip(1, 1)
    with torch.no_grad():
        assert torch.allclose(teacher(views).logits, body(views["rgb"][:, :, 0]), atol=1e-5)


def test_timm_file(tmp_path: Path) -> None:
    teacher = random_teacher("timm/test_vit")
    torch.save(teacher.bare_state_dict(), tmp_path / "w.pth")
    loaded = build_teacher("timm/test_vit", str(tmp_path / "w.pth"), num_classes=CLASSES, crop_size=SIZE)
    assert torch.equal(loaded(clip()).logits, teacher(clip()).logits)


@pytest.mark.parametrize("arch", ["Res2D", "R2Plus1D"])
def test_registered_networks(arch: str, tmp_path: Path) -> None:
    source = build_network(arch, num_classes=CLASSES, input=InputSpec(num_frames=2), depth=10, width=4).eval()
    torch.save({"epoch": 0, "model_state": source.state_dict()}, tmp_path / "checkpoint_epoch_00001.pyth")
    options = {"crop_size": SIZE, "num_frames": 2, "depth": 10, "width": 4}
    path = str(tmp_path / "checkpoint_epoch_00001.pyth")
    teacher = build_teacher(arch, path, num_classes=CLASSES, pick="uniform", **options)
    assert teacher.view_specs("val")["rgb"].pick == "uniform"
    output = teacher(clip(), taps=["feature_map", "layer2"])
    with torch.no_grad():
        assert torch.equal(output.logits, source(clip()).logits)
    assert set(output.taps) == {"feature_map", "layer2"}
    assert torch.allclose(output.taps["feature_map"].mean(dim=(2, 3, 4)), output.features, atol=1e-5)
    assert teacher.layers["feature_map"] == teacher.layers["layer4"]
    with pytest.raises(WeightsError, match="has 7 classes, NUM_CLASSES is 9"):
        build_teacher(arch, path, num_classes=9, **options)


def test_random_is_announced(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        random_teacher("timm/test_resnet")
    assert "UNTRAINED" in caplog.text


@pytest.mark.parametrize(
    ("arch", "options", "message"),
    [
        ("torchvision/resnet81", {}, "Did you mean resnet18"),
        ("timm/resnet81", {}, "Did you mean resnet"),
        ("tochvision/resnet18", {}, "no library 'tochvision'. Did you mean torchvision"),
        ("Res2E", {}, "Did you mean Res2D"),
        ("torchvision/resnet18", {"layer": "feature_maps"}, "Did you mean feature_map"),
        ("torchvision/fcn_resnet50", {}, "Set LAYER to feature_map"),
        ("torchvision/ssd300_vgg16", {"layer": "feature_map"}, "_fpn"),
        ("torchvision/vit_b_32", {}, "cannot take frames of 64×64.*CROP_SIZE"),
        ("timm/vit_small_patch16_224.dino", {"weights": "timm"}, "has no classifier. Set LAYER to features"),
        ("timm/test_resnet", {"weights": "timm"}, "Set NUM_CLASSES to 1000"),
        ("torchvision/resnet18", {"weights": "timm"}, "is for ARCH timm/NAME"),
    ],
)
def test_user_errors(arch: str, options: dict[str, str], message: str) -> None:
    weights = options.get("weights", "random")
    layer = options.get("layer", "logits")
    with pytest.raises(UserError, match=f"(?s){message}"):
        build_teacher(arch, weights, num_classes=CLASSES, layer=layer, crop_size=SIZE)


@pytest.fixture(scope="module")
def real_teacher(assets: Path) -> Frozen:
    path = assets / "teacher" / "squeezenet1_0_imagenet.pth"
    return build_teacher("torchvision/squeezenet1_0", str(path), num_frames=4, pick="uniform")


def real_frames(path: Path, positions: list[int]) -> Tensor:
    """Normalised frames (1,3,T,224,224)."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.thread_type = "NONE"
        decoded = islice(container.decode(stream), max(positions) + 1)
        frames = [frame.to_ndarray(format="rgb24") for frame in decoded]
    prepare = SqueezeNet1_0_Weights.IMAGENET1K_V1.transforms()
    images = [prepare(torch.from_numpy(frames[position]).permute(2, 0, 1)) for position in positions]
    return torch.stack(images, dim=1).unsqueeze(0)


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("hmdb51/Golf_Tips*", {"golf ball", "croquet ball", "ballplayer"}),
        ("tiny-ucf101/abseiling*", {"cliff"}),
        ("video_features/v_GGSY1Qvo990*", {"barbell", "dumbbell"}),
    ],
)
def test_real_teacher_on_real_frames(real_teacher: Frozen, assets: Path, pattern: str, expected: set[str]) -> None:
    (path,) = (assets / "videos").glob(pattern)
    frames = real_frames(path, [3, 6, 9, 12])
    output = real_teacher({"rgb": frames})
    categories = SqueezeNet1_0_Weights.IMAGENET1K_V1.meta["categories"]
    assert categories[int(output.logits.argmax())] in expected
    per_frame = torch.cat([real_teacher({"rgb": frames[:, :, t : t + 1]}).logits for t in range(4)])
    assert torch.allclose(output.logits[0], per_frame.mean(dim=0), atol=1e-4)
    assert per_frame.std(dim=0).max() > 0.01
    # Averaging is before the softmax: averaged probabilities are something else.
    assert not torch.allclose(output.logits.softmax(1)[0], per_frame.softmax(1).mean(dim=0), atol=1e-4)
    assert not torch.allclose(output.logits.exp().sum(), torch.tensor(1.0))


# ------------------------------------------------------------------------------------------------------ one at a time
@pytest.mark.parametrize("arch", ["torchvision/resnet18", "Res2D", "Res3D"])
def test_one_at_a_time_an_example_does_not_depend_on_the_others(arch: str) -> None:
    by_frame = arch != "Res3D"
    switches = {} if "/" in arch else {"depth": 10, "width": 8}
    teacher = build_teacher(arch, "random", num_classes=CLASSES, num_frames=3, pick="clip", crop_size=SIZE, **switches)
    taps = [list(teacher.layers)[-1]]
    views = {"rgb": torch.randn(4, 3, 3, SIZE, SIZE)}
    together = teacher(views, taps=taps)
    teacher.one_at_a_time = True
    calls = []
    forward = teacher.network.forward

    def counted(views: dict[str, torch.Tensor], **options: object) -> object:
        calls.append(tuple(views["rgb"].shape[:3]))
        return forward(views, **options)

    teacher.network.forward = counted  # type: ignore[method-assign]
    alone = teacher(views, taps=taps)
    assert set(calls) == {(1, 3, 1) if by_frame else (1, 3, 3)}
    assert len(calls) == (12 if by_frame else 4)
    for one, other in zip(alone[:2], together[:2], strict=True):
        torch.testing.assert_close(one, other)
    torch.testing.assert_close(alone.taps[taps[0]], together.taps[taps[0]])
    part = teacher({"rgb": views["rgb"][1:3]}, taps=taps)
    assert torch.equal(part.logits, alone.logits[1:3])
    assert torch.equal(part.features, alone.features[1:3])
    assert torch.equal(part.taps[taps[0]], alone.taps[taps[0]][1:3])
