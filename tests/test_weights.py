"""Reading weights files of every kind, and loading them."""

from __future__ import annotations

import io
import pickle
import struct
from collections import OrderedDict
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

from distinit_plugin.errors import UserError, WeightsError
from distinit_plugin.models.factory import build_network
from distinit_plugin.models.network import InputSpec
from distinit_plugin.weights import load_weights, read_checkpoint, sources
from distinit_plugin.weights.keymaps import align_prefix, modern_key

CLIP = InputSpec(num_frames=4, train_crop_size=32, test_crop_size=32)


def small(num_classes: int = 5, name: str = "Res3D", **switches: Any):
    return build_network(name, num_classes=num_classes, input=CLIP, depth=10, width=4, **switches)


def values(network: nn.Module) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in network.state_dict().items()}


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


def python2_pickle() -> ModuleType:
    """A pickle module that writes ``str`` as Python 2 did: bytes in latin1, by the opcode SHORT_BINSTRING."""

    class Python2Pickler(pickle._Pickler):
        dispatch: ClassVar[dict[Any, Any]] = dict(pickle._Pickler.dispatch)

        def save_str(self, text: str) -> None:
            data = text.encode("latin1")
            self.write(pickle.SHORT_BINSTRING + struct.pack("<B", len(data)) + data)
            self.memoize(text)

        dispatch[str] = save_str

    module = ModuleType("python2_pickle")

    def dump(value: Any, file: Any, protocol: int = 2) -> None:
        Python2Pickler(file, protocol).dump(value)

    module.Pickler, module.dump = Python2Pickler, dump  # type: ignore[attr-defined]
    module.__dict__.update(loads=pickle.loads, load=pickle.load)
    return module


def places_layout(network: nn.Module) -> dict[str, Any]:
    """The Places365 files of 2017: DataParallel names, no batch counters."""
    state = OrderedDict(
        ("module." + key, value) for key, value in network.state_dict().items() if "num_batches_tracked" not in key
    )
    return {"epoch": 90, "arch": "résnet", "state_dict": state, "best_prec1": 54.6}


@pytest.mark.parametrize("entry", ["", "state_dict", "model_state", "model"])
@pytest.mark.parametrize("legacy", [False, True])
def test_every_layout_loads_the_same(tmp_path: Path, entry: str, legacy: bool) -> None:
    source, target = small(), small()
    state = source.state_dict()
    contents = {"epoch": 3, entry: state} if entry else state
    torch.save(contents, tmp_path / "w.pth", _use_new_zipfile_serialization=not legacy)
    file = read_checkpoint(tmp_path / "w.pth")
    assert (file.entry, file.details) == (entry, {"epoch": 3} if entry else {})
    assert not same(values(source), values(target))
    report = load_weights(target, tmp_path / "w.pth", strict=True)
    assert report.complete
    assert len(report.loaded) == len(state)
    assert same(values(source), values(target))


def test_safetensors(tmp_path: Path) -> None:
    save_file = pytest.importorskip("safetensors.torch").save_file
    source, target = small(), small()
    save_file(source.state_dict(), tmp_path / "w.safetensors")
    assert load_weights(target, tmp_path / "w.safetensors", strict=True).complete
    assert same(values(source), values(target))
    data = (tmp_path / "w.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(WeightsError, match=r"cut\.safetensors cannot be read"):
        read_checkpoint(tmp_path / "cut.safetensors")


def test_places365_of_2017(tmp_path: Path) -> None:
    source, target = small(), small()
    path = tmp_path / "places365.pth.tar"
    torch.save(
        places_layout(source),
        path,
        pickle_module=python2_pickle(),
        pickle_protocol=2,
        _use_new_zipfile_serialization=False,
    )
    with pytest.raises(UnicodeDecodeError):  # the file is one that plain loading refuses
        torch.load(path, weights_only=True)
    file = read_checkpoint(path)
    assert file.details == {"epoch": 90, "arch": "résnet", "best_prec1": 54.6}
    report = load_weights(target, path, strict=True)
    assert report.complete
    assert not any("num_batches_tracked" in key for key in report.loaded)
    assert torch.equal(target.layer1[0].conv1[0].weight, source.layer1[0].conv1[0].weight)


def write_unsafe(path: Path) -> None:
    torch.save({"state_dict": small().state_dict(), "best": Path("x")}, path)


def write_truncated(path: Path) -> None:
    torch.save(small().state_dict(), path)
    path.write_bytes(path.read_bytes()[:-3000])


def write_truncated_legacy(path: Path) -> None:
    torch.save(small().state_dict(), path, _use_new_zipfile_serialization=False)
    path.write_bytes(path.read_bytes()[:-3000])


def write_flipped(path: Path) -> None:
    torch.save({"w": torch.ones(4000)}, path)
    data = bytearray(path.read_bytes())
    at = data.find(struct.pack("<4f", 1, 1, 1, 1)) + 800
    data[at] ^= 0xFF
    path.write_bytes(data)
    assert torch.load(path, weights_only=True)["w"].ne(1).any()  # torch itself does not notice


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path: None, "there is no weights file"),
        (lambda path: path.mkdir(), "are a folder"),
        (lambda path: path.touch(), "is empty"),
        (lambda path: path.write_text("<html>404 not found</html>"), "is a text file"),
        (lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\n"), "git lfs pull"),
        (lambda path: path.write_bytes(bytes(range(256)) * 20), "cannot be read as weights"),
        (write_truncated, "cannot be read as weights"),
        (write_truncated_legacy, "cannot be read as weights"),
        (write_flipped, "wrong checksum"),
        (write_unsafe, "refused.*convert it once"),
        (lambda path: torch.save([torch.ones(2)], path), "holds a list"),
        (lambda path: torch.save({"epoch": 1, "optimizer": {}}, path), "holds no weights.*'epoch', 'optimizer'"),
        (lambda path: torch.save({"w": torch.eye(3).to_sparse()}, path), "sparse"),
    ],
)
def test_unusable_files(tmp_path: Path, write: Any, message: str) -> None:
    path = tmp_path / "weights.pth"
    write(path)
    with pytest.raises(WeightsError, match=f"(?s){path}.*{message}|{message}.*{path}"):
        read_checkpoint(path)


def test_file_without_checksums_is_read(tmp_path: Path) -> None:
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"w": torch.ones(3)}, tmp_path / "w.pth")
    finally:
        torch.serialization.set_crc32_options(before)
    assert torch.equal(read_checkpoint(tmp_path / "w.pth").tensors["w"], torch.ones(3))


def test_classifier_of_another_size_stays(tmp_path: Path) -> None:
    source, target = small(7), small(5)
    torch.save(source.state_dict(), tmp_path / "w.pth")
    classifier = target.fc.weight.clone()
    report = load_weights(target, tmp_path / "w.pth")
    assert [mismatch.name for mismatch in report.mismatched] == ["fc.weight", "fc.bias"]
    assert not report.complete
    assert "fc.weight (file 7×32, network 5×32)" in str(report)
    assert torch.equal(target.fc.weight, classifier)
    assert torch.equal(target.layer4[0].conv2[0].weight, source.layer4[0].conv2[0].weight)
    with pytest.raises(WeightsError, match="does not fit"):
        load_weights(target, tmp_path / "w.pth", strict=True)


def test_missing_classifier(tmp_path: Path) -> None:
    torch.save(small(0).state_dict(), tmp_path / "w.pth")
    assert load_weights(small(5), tmp_path / "w.pth").missing == ("fc.weight", "fc.bias")
    with pytest.raises(WeightsError, match=r"missing fc\.weight, fc\.bias"):
        load_weights(small(5), tmp_path / "w.pth", strict=True)
    assert load_weights(small(5), tmp_path / "w.pth", strict=True, allow_missing_prefixes=["fc."])


def other_variant() -> dict[str, torch.Tensor]:
    return small(name="R2Plus1D", variant="torchvision").state_dict()


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"head.weight": torch.ones(3, 3)}, "none of its tensors"),
        ({"layer1.0.conv1.1.num_batches_tracked": torch.tensor(1)}, "none of its tensors"),
        (other_variant, "of another network.*variant"),
        ({"stem.0.weight": torch.ones(45, 3, 7, 7), "fc.weight": torch.ones(2, 2)}, "INIT.INFLATE_FROM"),
        ({"fc.weight": torch.full((5, 32), float("nan"))}, "NaN"),
    ],
)
def test_other_networks_are_refused_untouched(tmp_path: Path, state: Any, message: str) -> None:
    network = small(name="R2Plus1D")
    before = values(network)
    torch.save(state() if callable(state) else state, tmp_path / "w.pth")
    with pytest.raises(WeightsError, match=f"(?s){message}"):
        load_weights(network, tmp_path / "w.pth")
    assert same(before, values(network))


def test_keymaps() -> None:
    wanted = ["stem.0.weight", "fc.bias"]
    assert align_prefix({"model.stem.0.weight": 1, "model.fc.bias": 2}, wanted) == dict(
        zip(wanted, (1, 2), strict=True)
    )
    assert align_prefix({"stem.0.weight": 1}, wanted) == {"stem.0.weight": 1}
    old = "features.denseblock1.denselayer2.norm.1.weight"
    assert modern_key(old) == "features.denseblock1.denselayer2.norm1.weight"
    assert modern_key("features.norm5.weight") == "features.norm5.weight"


def test_external_network_loads_the_original_keys(tmp_path: Path) -> None:
    network = build_network("torchvision/mc3_18", num_classes=3, input=CLIP)
    state = {
        key: torch.randn_like(value) if value.is_floating_point() else value for key, value in values(network).items()
    }
    torch.save(state, tmp_path / "w.pth")
    assert load_weights(network, tmp_path / "w.pth", strict=True).complete
    assert same(values(network), state)


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty download cache and no network."""

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(torch.hub, "urlopen", refuse)
    monkeypatch.setattr(sources.socket, "create_connection", refuse)
    monkeypatch.setattr(sources.urllib.request, "getproxies", dict)
    return tmp_path / "hub" / "checkpoints"


def test_torchvision_tag_from_the_cache(offline: Path, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"(?s)no network.*resnet18-f37072fd\.pth.*Copy it to .*hub/checkpoints"):
        sources.source_weights("torchvision/resnet18", "IMAGENET1K_V1")
    offline.mkdir(parents=True, exist_ok=True)
    torch.save({"conv1.weight": torch.ones(1)}, offline / "resnet18-f37072fd.pth")
    assert list(sources.source_weights("torchvision/resnet18", "IMAGENET1K_V1").tensors) == ["conv1.weight"]
    assert list(read_checkpoint("resnet18-f37072fd.pth").tensors) == ["conv1.weight"]  # bare names are found there


def test_advice(offline: Path) -> None:
    with pytest.raises(WeightsError, match=r"no weights named IMAGENET_V1.*Did you mean IMAGENET1K_V1"):
        sources.source_weights("torchvision/resnet18", "IMAGENET_V1")
    with pytest.raises(WeightsError, match=r"no weights file x\.pth.*IMAGENET1K_V1 \(resnet18-f37072fd\.pth\)"):
        sources.source_weights("torchvision/resnet18", "x.pth")
    with pytest.raises(WeightsError, match="Places365 project"):
        sources.source_weights("torchvision/resnet50", "places365.pth.tar")
    with pytest.raises(UserError, match="Did you mean resnet18"):
        sources.source_weights("torchvision/resnet81", "x.pth")
    with pytest.raises(WeightsError, match=r"no network.*model\.safetensors.*timm/test_resnet"):
        sources.source_weights("timm/test_resnet", "timm")
    with pytest.raises(UserError, match="timm has no network named 'test_resent'"):
        sources.source_weights("timm/test_resent", "timm")


def test_failed_download_leaves_nothing(offline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Response(io.BytesIO):
        def info(self) -> Any:
            return type("Headers", (), {"get_all": lambda self, name: None})()

    monkeypatch.setattr(torch.hub, "urlopen", lambda request: Response(b"an error page"))
    with pytest.raises(WeightsError, match="hash"):
        sources.source_weights("torchvision/resnet18", "IMAGENET1K_V1")
    assert list(offline.iterdir()) == []
