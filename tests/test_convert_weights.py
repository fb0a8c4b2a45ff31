"""What a user can get wrong with convert-weights, and files that nobody should trust: one sentence, nothing written."""

from __future__ import annotations

import os
import pickle
import struct
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import layouts
import numpy as np
import pytest
import torch

from distinit_plugin import cli
from distinit_plugin.errors import WeightsError
from distinit_plugin.models import InputSpec, build_network
from distinit_plugin.weights import load_weights, read_checkpoint
from distinit_plugin.weights.crc32c import crc32c
from distinit_plugin.weights.layouts import caffe2, inception, tensorflow

CLIP = InputSpec()


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def residual(num_classes: int = 5) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return layouts.state_of(build_network("R2Plus1D", num_classes=num_classes, input=CLIP, depth=10, width=8))


def blobs(**changes: torch.Tensor) -> bytes:
    state = layouts.vmz_caffe2({**residual(), **changes}, (1, 1, 1, 1))
    return pickle.dumps(layouts.numpy_blobs(state), protocol=2)


def tensorflow_file(world: Path) -> Path:
    network = build_network("I3D", num_classes=4, input=CLIP, width=4)
    return layouts.write_tensorflow(world / "model.ckpt", layouts.kinetics_i3d(layouts.state_of(network)))


def convert(*words: object) -> int:
    return cli.main(["convert-weights", *map(str, words)])


class Evil:
    """A pickle that makes a folder when it is loaded without care."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, ("executed",)


def cut_torch(world: Path) -> list[object]:
    torch.save(residual(), world / "x.pth")
    (world / "x.pth").write_bytes((world / "x.pth").read_bytes()[:-3000])
    return ["x.pth"]


def cut_pickle(world: Path) -> list[object]:
    (world / "x.pkl").write_bytes(blobs()[:-900])
    return ["x.pkl"]


def cut_data(world: Path) -> list[object]:
    path = tensorflow_file(world).with_name("model.ckpt.data-00000-of-00001")
    path.write_bytes(path.read_bytes()[:-100])
    return ["model.ckpt.index", "--to", "I3D"]


def flipped_data(world: Path) -> list[object]:
    path = tensorflow_file(world).with_name("model.ckpt.data-00000-of-00001")
    data = bytearray(path.read_bytes())
    data[5000] ^= 1
    path.write_bytes(data)
    return ["model.ckpt.index", "--to", "I3D"]


def cut_index(world: Path) -> list[object]:
    path = tensorflow_file(world)
    path.write_bytes(path.read_bytes()[:-20])
    return ["model.ckpt.index", "--to", "I3D"]


def flipped_index(world: Path) -> list[object]:
    path = tensorflow_file(world)
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(data)
    return ["model.ckpt", "--to", "I3D"]


def without_data(world: Path) -> list[object]:
    tensorflow_file(world).with_name("model.ckpt.data-00000-of-00001").unlink()
    return ["model.ckpt.index", "--to", "I3D"]


def saved(contents: object) -> Callable[[Path], list[object]]:
    def write(world: Path) -> list[object]:
        torch.save(contents() if callable(contents) else contents, world / "x.pth")
        return ["x.pth"]

    return write


def pickled(contents: object) -> Callable[[Path], list[object]]:
    def write(world: Path) -> list[object]:
        (world / "x.pkl").write_bytes(contents if isinstance(contents, bytes) else pickle.dumps(contents, protocol=2))
        return ["x.pkl"]

    return write


def other_depth() -> dict[str, torch.Tensor]:
    return layouts.state_of(build_network("R2Plus1D", num_classes=5, input=CLIP, depth=18, width=8))


def two_networks() -> dict[str, torch.Tensor]:
    state = layouts.state_of(build_network("I3D", num_classes=2, input=CLIP, width=1))
    return {**layouts.kinetics_i3d(state), **layouts.kinetics_i3d(state, "Flow/inception_i3d/")}


class Sharing:
    """An array whose contents are those of its brothers, in the file only once."""

    contents = bytes(1000)

    def __reduce__(self) -> tuple[object, ...]:
        rebuild, arguments, _ = np.zeros(1).__reduce__()
        return rebuild, arguments, (1, (1000,), np.dtype("u1"), False, self.contents)


def shared_contents() -> bytes:
    data = pickle.dumps({str(index): Sharing() for index in range(200)}, protocol=4)
    assert len(data) < 200 * 1000
    return data


R21D = ["--to", "R2Plus1D"]
BAD = {
    "runs code": (pickled({"blobs": {"conv1_w": Evil()}}), R21D, ("x.pkl", "posix.mkdir", "could run code", "refused")),
    "runs code first": (pickled(Evil()), R21D, ("x.pkl", "posix.mkdir", "refused")),
    "runs code in torch's file": (saved({"state_dict": {"x": Evil()}}), R21D, ("x.pth", "mkdir", "refused")),
    "names builtins": (
        pickled(b"\x80\x02cbuiltins\neval\nX\x01\x00\x00\x001\x85R."),
        R21D,
        ("builtins.eval", "refused"),
    ),
    "names numpy's loader": (
        pickled(b"\x80\x02cnumpy\nload\nX\x01\x00\x00\x001\x85R."),
        R21D,
        ("numpy.load", "refused"),
    ),
    "object array": (pickled({"blobs": np.array([{}], dtype=object)}), R21D, ("type 'O8'", "refused")),
    "huge memo": (pickled(b"\x80\x02Nr\xff\xff\xff\x7f."), R21D, ("more memory than a file of weights needs",)),
    "shared contents": (pickled(shared_contents()), R21D, ("more values than the file holds",)),
    "huge text": (pickled(b"\x80\x04X\xff\xff\xff\x7fabc."), R21D, ("cannot be read as weights",)),
    "truncated torch file": (cut_torch, R21D, ("x.pth", "cannot be read as weights", "truncated")),
    "truncated pickle": (cut_pickle, R21D, ("x.pkl", "cannot be read as weights", "truncated")),
    "truncated TensorFlow data": (cut_data, [], ("model.ckpt.index", "beyond the end of the data file")),
    "flipped TensorFlow data": (flipped_data, [], ("model.ckpt.index", "wrong checksum")),
    "truncated TensorFlow index": (cut_index, [], ("model.ckpt.index", "cannot be read as weights")),
    "flipped TensorFlow index": (flipped_index, [], ("model.ckpt.index", "wrong checksum")),
    "TensorFlow without data": (without_data, [], ("model.ckpt.data-00000-of-00001 is not beside it",)),
    "TensorFlow without index": (lambda w: ["gone.ckpt"], R21D, ("there is no weights file gone.ckpt",)),
    "NaN": (pickled(blobs(**{"fc.bias": torch.full((5,), float("nan"))})), R21D, ("fc.bias", "NaN")),
    "other classes": (
        pickled(blobs()),
        [*R21D, "--opts", "MODEL.NUM_CLASSES", "9"],
        ("classifier fc has 5 classes", "9", "--drop"),
    ),
    "no classifier": (saved(lambda: residual(0)), R21D, ("2 missing", "--drop-classifier")),
    "other network": (pickled(blobs()), ["--to", "I3D"], ("no tensor", "vmz-caffe2", "R2Plus1D, Res3D", "--to")),
    "other factoring": (pickled(blobs()), ["--to", "Res3D"], ("not every tensor is accounted for", "missing")),
    "no layout": (
        saved({"a.weight": torch.ones(2)}),
        R21D,
        ("no tensor", "a.weight", "pytorch-i3d", "kylemin-s3d", "--from"),
    ),
    "wrong --from": (pickled(blobs()), [*R21D, "--from", "tf-slim"], ("--from tf-slim", "has not the keys")),
    "unknown --from": (pickled(blobs()), [*R21D, "--from", "tfslim"], ("no layout 'tfslim'", "Did you mean tf-slim")),
    "depth that the file has not": (
        saved(other_depth),
        [*R21D, "--opts", "RESNET.DEPTH", "34"],
        ("missing", "RESNET.DEPTH"),
    ),
    "no network": (pickled(blobs()), [], ("give --to NETWORK",)),
    "unknown network": (pickled(blobs()), ["--to", "R2Plus1"], ("R2Plus1", "Did you mean R2Plus1D")),
    "unknown key": (pickled(blobs()), [*R21D, "--opts", "NETWORK.WIDHT", "8"], ("NETWORK.WIDHT", "WIDTH")),
    "key of something else": (
        pickled(blobs()),
        [*R21D, "--opts", "SOLVER.BASE_LR", "1"],
        ("SOLVER.BASE_LR does not describe",),
    ),
    "value that is not allowed": (
        pickled(blobs()),
        [*R21D, "--opts", "NETWORK.VARIANT", "vmx"],
        ("NETWORK.VARIANT", "vmz"),
    ),
    "a switch of another network": (
        pickled(blobs()),
        [*R21D, "--opts", "NETWORK.STEM_POOL", "True"],
        ("NETWORK.STEM_POOL", "R2Plus1D"),
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str, world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write, words, messages = BAD[name]
    source, *more = write(world)
    before = sorted(os.listdir(world))
    assert convert(source, "out.pyth", *more, *words) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert said.count("\n") == 1, said
    for message in messages:
        assert message in said
    assert sorted(os.listdir(world)) == before  # no output, nothing executed


def test_two_networks_in_one_file() -> None:
    target = layouts.state_of(build_network("I3D", num_classes=2, input=CLIP, width=1))
    with pytest.raises(WeightsError, match="two networks"):
        tensorflow.LAYOUTS[0].translate(two_networks(), target)


@pytest.mark.parametrize(
    ("destination", "message"),
    [("x.pkl", "source"), ("out.onnx", "Allowed: .pyth"), ("folder.pyth", "is a folder")],
)
def test_destinations(destination: str, message: str, world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (world / "folder.pyth").mkdir()
    (world / "x.pkl").write_bytes(blobs())
    assert convert("x.pkl", destination, *R21D) == 1
    assert destination in capsys.readouterr().err


def test_a_missing_source_is_named_also_where_the_destination_exists(tmp_path, capsys):
    destination = tmp_path / "out.pyth"
    destination.write_bytes(b"earlier")
    assert convert(tmp_path / "missing.pt", destination, "--to", "I3D") == 1
    assert "missing.pt" in capsys.readouterr().err
    assert destination.read_bytes() == b"earlier"


def test_source_is_not_overwritten(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(residual(), world / "x.pth")
    before = (world / "x.pth").read_bytes()
    assert convert("x.pth", "./x.pth", *R21D) == 1
    assert "is the file that is to be read" in capsys.readouterr().err
    assert (world / "x.pth").read_bytes() == before


def test_flags(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (world / "x.pkl").write_bytes(blobs())
    assert convert("x.pkl", "out.pyth", *R21D, "--drop-classifier") == 0
    assert "skipped         2  fc.weight, fc.bias" in capsys.readouterr().out
    assert not any(key.startswith("fc.") for key in read_checkpoint("out.pyth").tensors)
    network = build_network("R2Plus1D", num_classes=3, input=CLIP, depth=10, width=8)
    assert load_weights(network, "out.pyth").missing == ("fc.weight", "fc.bias")

    assert convert("x.pkl", "part.pyth", *R21D, "--allow-partial", "--verbose", "--opts", "MODEL.NUM_CLASSES", 9) == 0
    said = capsys.readouterr().out
    assert "fc.weight (file 5×64, network 9×64)" in said
    assert "layer1.0.conv1.0.0.weight" in said
    assert torch.load("part.pyth", weights_only=True)["model_state"]["fc.weight"].shape == (9, 64)

    assert convert("x.pkl", "x.safetensors", *R21D, "--from", "vmz-caffe2") == 0
    again = build_network("R2Plus1D", num_classes=5, input=CLIP, depth=10, width=8)
    load_weights(again, "x.safetensors", strict=True)
    assert torch.equal(again.fc.weight, residual()["fc.weight"])
    assert convert("x.safetensors", "y.pyth", *R21D, "--from", "native") == 0


def test_network_from_a_configuration(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (world / "x.pkl").write_bytes(blobs())
    (world / "net.yaml").write_text(
        "MODEL: {MODEL_NAME: R2Plus1D, NUM_CLASSES: 5}\nRESNET: {DEPTH: 10}\nNETWORK: {WIDTH: 8}\n"
    )
    assert convert("x.pkl", "out.pyth", "--cfg", "net.yaml") == 0
    (world / "net.yaml").write_text("MODEL: {MODEL_NAME: R2Plus1D, NUM_CLASSES: 5}\nRESNET: {DEPTH: 18}\n")
    capsys.readouterr()
    assert convert("x.pkl", "other.pyth", "--cfg", "net.yaml") == 1  # as it stands there, whatever the file has
    assert not (world / "other.pyth").exists()


def test_python_2_pickle(world: Path) -> None:
    """Text and array contents as Python 2 wrote them: bytes, to be read as latin1."""
    values = np.arange(6, dtype="<f4").reshape(2, 3)

    def text(value: bytes) -> bytes:
        return b"T" + struct.pack("<I", len(value)) + value

    array = (
        b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85" + text(b"b") + b"\x87R("
        b"K\x01K\x02K\x03\x86cnumpy\ndtype\n"
        + text(b"f4")
        + b"K\x00K\x01\x87R(K\x03"
        + text(b"<")
        + b"NNNJ\xff\xff\xff\xff"
        b"J\xff\xff\xff\xffK\x00tb\x89" + text(values.tobytes()) + b"tb"
    )
    (world / "x.pkl").write_bytes(b"\x80\x02}" + text(b"blobs") + b"}" + text(b"conv1_w\xe9") + array + b"ss.")
    file = read_checkpoint("x.pkl")
    assert file.entry == "blobs"
    assert torch.equal(file.tensors["conv1_wé"], torch.from_numpy(values.copy()))


@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_numpy_pickles(world: Path, protocol: int) -> None:
    arrays = OrderedDict(
        f=np.arange(6, dtype=np.float32).reshape(2, 3),
        fortran=np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        big=np.arange(3, dtype=">i4"),
    )
    contents = {"blobs": arrays, "epoch": 3, "scale": np.float32(0.5)}
    (world / "x.pkl").write_bytes(pickle.dumps(contents, protocol=protocol))
    file = read_checkpoint("x.pkl")
    assert file.details == {"epoch": 3, "scale": 0.5}
    for key, value in arrays.items():
        assert np.array_equal(file.tensors[key].numpy(), value)


def test_checksums() -> None:
    """Values of RFC 3720, appendix B.4, and a bit by bit computation of lengths around the lanes."""
    assert crc32c(bytes(32)) == 0x8A9136AA
    assert crc32c(b"\xff" * 32) == 0x62A8AB43
    assert crc32c(bytes(range(32))) == 0x46DD794E
    data = np.random.default_rng(0).integers(0, 256, 9000, np.uint8).tobytes()
    for length in (0, 1, 3, 8191, 8192, 8193, 8999):
        register = 0xFFFFFFFF
        for byte in data[:length]:
            register ^= byte
            for _ in range(8):
                register = (register >> 1) ^ (0x82F63B78 if register & 1 else 0)
        assert crc32c(data[:length]) == register ^ 0xFFFFFFFF


KEYS = [
    (tensorflow.from_deepmind, "RGB/inception_i3d/Conv3d_1a_7x7/conv_3d/w", "Conv3d_1a_7x7.conv.weight"),
    (tensorflow.from_deepmind, "Flow/inception_i3d/Conv3d_2c_3x3/batch_norm/beta", "Conv3d_2c_3x3.bn.bias"),
    (
        tensorflow.from_deepmind,
        "RGB/inception_i3d/Mixed_5b/Branch_2/Conv3d_0a_3x3/conv_3d/w",
        "Mixed_5b.b2b.conv.weight",
    ),
    (
        tensorflow.from_deepmind,
        "Mixed_3b/Branch_3/Conv3d_0b_1x1/batch_norm/moving_variance",
        "Mixed_3b.b3b.bn.running_var",
    ),
    (tensorflow.from_deepmind, "RGB/inception_i3d/Logits/Conv3d_0c_1x1/conv_3d/b", "fc.bias"),
    (tensorflow.from_deepmind, "Mixed_3b/Branch_3/Conv3d_0b_1x1/conv_3d/w/Momentum", None),
    (tensorflow.from_slim, "InceptionV1/Conv2d_2c_3x3/temporal/biases", "Conv3d_2c_3x3.temporal.bias"),
    (
        tensorflow.from_slim,
        "InceptionV1/Mixed_4f/Branch_1/Conv2d_0b_3x3/self_gating/transformer_W/weights",
        "Mixed_4f.b1b.gate.weight",
    ),
    (tensorflow.from_slim, "InceptionV1/Mixed_3b/Branch_0/Conv2d_0a_1x1/BatchNorm/gamma", "Mixed_3b.b0.bn.weight"),
    (inception.from_pytorch_i3d, "Mixed_4b.b2a.conv3d.weight", "Mixed_4b.b2a.conv.weight"),
    (inception.from_pytorch_i3d, "Mixed_4b.b2c.conv3d.weight", None),
    (inception.from_torchvision_s3d, "features.5.branch1.1.1.0.weight", "Mixed_3b.b1b.temporal.weight"),
    (inception.from_torchvision_s3d, "features.15.branch0.1.running_mean", "Mixed_5c.b0.bn.running_mean"),
    (inception.from_torchvision_s3d, "features.7.branch0.1.running_mean", None),
    (inception.kylemin_to_torchvision, "base.5.branch0.0.conv.weight", "features.5.branch0.0.weight"),
    (inception.kylemin_to_torchvision, "base.15.branch3.1.bn.bias", "features.15.branch3.1.1.bias"),
    (inception.kylemin_to_torchvision, "base.3.bn_t.running_var", "features.3.1.1.running_var"),
]


@pytest.mark.parametrize(("rename", "key", "ours"), KEYS)
def test_keys(rename: Callable[[str], str | None], key: str, ours: str | None) -> None:
    """Names as they are published, written out: the inverses of ``layouts`` could share a mistake with the code."""
    assert rename(key) == ours


def test_caffe2_blocks_of_34() -> None:
    """Blocks are counted through; shortcuts at 3, 7 and 13 begin the stages of 34 layers, at 0 too of bottlenecks."""
    names = ["conv1_w", *(f"shortcut_projection_{block}_w" for block in (0, 3, 7, 13))]
    names += ["comp_12_conv_2_w", "comp_15_spatbn_1_middle_riv", "comp_3_conv_1_middle_w", "comp_3_conv_1_w"]
    one = torch.ones(1)
    translation = caffe2.translate_blobs(dict.fromkeys(names, one), {"stem.0.weight": one})
    assert translation is not None
    assert set(translation.tensors) == {
        "stem.0.weight",
        *(f"layer{stage}.0.downsample.0.weight" for stage in (1, 2, 3, 4)),
        "layer3.5.conv2.0.weight",
        "layer4.2.conv1.0.1.running_var",
        "layer2.0.conv1.0.0.weight",
        "layer2.0.conv1.0.3.weight",
    }


def test_a_public_file_as_a_teacher(world: Path) -> None:
    from distinit_plugin.teachers import build_teacher

    (world / "x.pkl").write_bytes(blobs())
    teacher = build_teacher(
        "R2Plus1D", "x.pkl", num_classes=5, depth=10, width=8, num_frames=8, pick="clip", crop_size=32
    )
    assert torch.equal(teacher.bare_state_dict()["fc.weight"], residual()["fc.weight"])
    with pytest.raises(WeightsError, match="has 5 classes, NUM_CLASSES is 6"):
        build_teacher("R2Plus1D", "x.pkl", num_classes=6, depth=10, width=8, num_frames=8, pick="clip", crop_size=32)


def test_a_file_of_this_program_says_what_its_network_is(tmp_path):
    """BN's eps and the padding leave no trace in the shapes."""
    settings = "{MODEL_NAME: Res3D, NUM_CLASSES: 5}"
    network = "{WIDTH: 8, VARIANT: vmz, STEM_POOL: True, TEMPORAL_PADDING: replicate}"
    cfg = f"MODEL: {settings}\nRESNET: {{DEPTH: 10}}\nNETWORK: {network}\nDATA: {{MEAN: [0.1, 0.2, 0.3]}}\n"
    switches = {"variant": "vmz", "stem_pool": True, "temporal_padding": "replicate"}
    source = build_network("Res3D", num_classes=5, input=InputSpec(), depth=10, width=8, **switches)
    torch.save({"model_state": source.state_dict(), "cfg": cfg}, tmp_path / "own.pyth")
    assert convert(tmp_path / "own.pyth", tmp_path / "new.pyth", "--to", "Res3D") == 0
    written = torch.load(tmp_path / "new.pyth", weights_only=True)["cfg"]
    for part in ("VARIANT: vmz", "STEM_POOL: true", "TEMPORAL_PADDING: replicate", "- 0.1"):
        assert part in written, written
    assert (
        convert(
            tmp_path / "own.pyth", tmp_path / "other.pyth", "--to", "Res3D", "--opts", "NETWORK.VARIANT", "torchvision"
        )
        == 0
    )
    assert "VARIANT: torchvision" in torch.load(tmp_path / "other.pyth", weights_only=True)["cfg"]
