"""Flow back ends behind one interface, error measures, .flo files, pictures."""

import math
import struct
import sys

import numpy as np
import pytest
import torch
from test_flow_tvl1 import moved

from distinit_plugin.config.rules import FLOW_BACKEND_NAMES
from distinit_plugin.errors import UserError, WeightsError
from distinit_plugin.flow import build_flow_backend, rgb_to_gray
from distinit_plugin.flow.colour import flow_to_colour
from distinit_plugin.flow.measures import angular_error, end_point_error, known_flow, read_flo, write_flo
from distinit_plugin.flow.raft import SMALLEST, _prepare
from distinit_plugin.registry import FLOW_BACKENDS

OPENCV = ("dual_tvl1", "dis_medium", "dis_fast")


@pytest.fixture(scope="module")
def raft_weights(tmp_path_factory):
    """Random weights of the smaller network."""
    from torchvision.models.optical_flow import raft_small

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("raft") / "small.pth"
    torch.save(raft_small().state_dict(), path)
    return str(path)


def rgb(pictures):
    return pictures[:, None].expand(-1, 3, -1, -1).to(torch.uint8).contiguous()


def build(name):
    if name in OPENCV:
        cv2 = pytest.importorskip("cv2")
        if not hasattr(cv2, "optflow"):
            pytest.skip("this OpenCV lacks the contributed modules")
        cv2.setNumThreads(1)
    return build_flow_backend(name)


# Back ends ----------------------------------------------------------------------------------------------------------


def test_all_are_registered_under_their_names():
    own = {name: backend for name, backend in FLOW_BACKENDS if backend.__module__.startswith("distinit_plugin.")}
    assert set(own) == {*OPENCV, "raft", "tvl1"} == set(FLOW_BACKEND_NAMES)
    assert all(backend.name == name for name, backend in own.items())


@pytest.mark.parametrize("name", [*OPENCV, "tvl1"])
def test_flow_is_forward_in_pixels_and_u_comes_first(name):
    first, second = (rgb(picture) for picture in moved(64, 81, 3, -1))
    flow = build(name)(first.repeat(2, 1, 1, 1), second.repeat(2, 1, 1, 1))
    assert flow.shape == (2, 2, 64, 81)
    assert flow.dtype == torch.float32
    assert torch.equal(flow[0], flow[1])
    middle = flow[0, :, 20:-20, 20:-20].flatten(1).median(1).values
    assert middle.tolist() == pytest.approx([3, -1], abs=0.25)


def test_raft_pads_and_cuts(raft_weights):
    frames = torch.randint(0, 256, (1, 3, 61, 130), dtype=torch.uint8)
    backend = build_flow_backend("raft", weights=raft_weights, size="small", updates=1)
    flow = backend(frames, frames)
    assert flow.shape == (1, 2, 61, 130)
    assert flow.isfinite().all()
    padded = _prepare(frames)
    assert padded.shape == (1, 3, SMALLEST, 136)
    assert padded.min() >= -1
    assert padded.max() <= 1
    assert "updates=1" in backend.identity


def test_raft_computes_a_few_pairs_at_once(raft_weights, monkeypatch):
    first, second = torch.randint(0, 256, (2, 3, 3, 40, 40), dtype=torch.uint8)
    backend = build_flow_backend("raft", weights=raft_weights, size="small", updates=1)
    whole, sizes = backend(first, second), []
    network = backend._network
    monkeypatch.setattr(
        network, "forward", lambda a, *_, **__: sizes.append(len(a)) or [torch.zeros(len(a), 2, 128, 128)]
    )
    monkeypatch.setattr("distinit_plugin.flow.raft.PAIRS_AT_ONCE", 2)
    assert backend(first, second).shape == whole.shape == (3, 2, 40, 40)
    assert sizes == [2, 1]


def test_raft_is_known_by_its_weights(raft_weights, tmp_path):
    state = torch.load(raft_weights)
    key = next(iter(state))
    torch.save(state, tmp_path / "copy.pth")
    torch.save({**state, key: state[key] + 1}, tmp_path / "other.pth")
    one, copy, other = (
        build_flow_backend("raft", weights=str(path), size="small").identity
        for path in (raft_weights, tmp_path / "copy.pth", tmp_path / "other.pth")
    )
    assert one == copy != other


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": "C_T_SKHT_V3"}, "Did you mean C_T_SKHT_V2"),
        ({"weights": "{raft}"}, "does not hold the weights of torchvision's raft_large"),
        ({"weights": "{text}"}, "cannot be read as weights"),
        ({"weights": "{list}"}, "is not a state dict"),
        ({"weights": "DEFAULT", "size": "huge"}, "large or small"),
        ({"weights": "DEFAULT", "updates": 0}, "1 to 100"),
        ({"wights": "DEFAULT"}, "does not take these options"),
    ],
)
def test_raft_refuses(options, message, raft_weights, tmp_path):
    (tmp_path / "text").write_text("<html>")
    torch.save([1], tmp_path / "list")
    places = {"raft": raft_weights, "text": tmp_path / "text", "list": tmp_path / "list"}
    options = {key: value.format(**places) if isinstance(value, str) else value for key, value in options.items()}
    with pytest.raises((UserError, WeightsError), match=message):
        build_flow_backend("raft", **options)


def test_identities_tell_parameters_apart():
    usual, other = build_flow_backend("tvl1"), build_flow_backend("tvl1", lambda_=0.1)
    assert "lambda_=0.15" in usual.identity
    assert usual.identity != other.identity


def test_opencv_identity_names_its_version():
    cv2 = pytest.importorskip("cv2")
    assert build("dual_tvl1").identity.endswith(f"opencv {cv2.__version__}")


@pytest.mark.parametrize("name", OPENCV)
def test_missing_opencv_is_one_clear_sentence(name, monkeypatch):
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(UserError, match=rf"{name}: OpenCV is not installed.*distinit-plugin\[flow\]"):
        build_flow_backend(name)


def test_opencv_without_contributed_modules(monkeypatch):
    monkeypatch.setitem(sys.modules, "cv2", type(sys)("cv2"))
    sys.modules["cv2"].__version__ = "1.2"
    with pytest.raises(UserError, match="lacks the contributed modules"):
        build_flow_backend("dual_tvl1")


def test_grey_is_opencvs():
    cv2 = pytest.importorskip("cv2")
    frames = torch.randint(0, 256, (2, 3, 90, 110), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    ours = rgb_to_gray(frames)
    for picture, gray in zip(frames.permute(0, 2, 3, 1).numpy(), ours.numpy(), strict=True):
        assert np.array_equal(cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY), gray)
        assert not np.array_equal(cv2.cvtColor(picture, cv2.COLOR_BGR2GRAY), gray)


def test_a_small_picture_does_not_change_the_next_ones():
    """OpenCV's object keeps the number of scales of the smallest picture that it has seen."""
    first, second = (rgb(picture) for picture in moved(64, 64, 4, 0))
    backend = build("dual_tvl1")
    before = backend(first, second)
    backend(first[..., :16, :16].contiguous(), second[..., :16, :16].contiguous())
    assert torch.equal(backend(first, second), before)


@pytest.mark.parametrize("name", [*OPENCV, "tvl1"])
def test_smallest_frames_and_smaller(name):
    backend = build(name)
    side = backend.min_side
    frames = torch.randint(0, 256, (1, 3, side, 2 * side + 1), dtype=torch.uint8)
    assert backend(frames, frames.flip(3)).isfinite().all()
    for narrow in (frames[..., :1], frames[..., :1, :], frames[..., : side - 1], frames[..., :0]):
        with pytest.raises(UserError, match=f"{name}: frames of .* pixels are allowed"):
            backend(narrow, narrow)


def test_no_pairs():
    frames = torch.zeros(0, 3, 20, 30, dtype=torch.uint8)
    assert build_flow_backend("tvl1")(frames, frames).shape == (0, 2, 20, 30)


def test_wrong_frames():
    backend = build_flow_backend("tvl1")
    frames = torch.zeros(1, 3, 20, 30, dtype=torch.uint8)
    for wrong in (frames.float(), frames[0], frames[:, :1]):
        with pytest.raises(UserError, match="uint8"):
            backend(frames, wrong)
    with pytest.raises(UserError, match="one size"):
        backend(frames, frames[..., :-1])


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("tv_l1", {}, "Did you mean tvl1"),
        ("tvl1", {"lamda": 1}, "no parameter 'lamda'"),
        ("tvl1", {"theta": 0.0}, "theta"),
        ("tvl1", {"tau": math.nan}, "tau"),
        ("tvl1", {"scale_step": 1.0}, "scale_step"),
        ("tvl1", {"warps": 0}, "warps"),
        ("tvl1", {"scales": 2.5}, "scales"),
        ("tvl1", {"median": 5}, "median"),
        ("dis_fast", {"preset": 1}, "does not take these options"),
    ],
)
def test_wrong_names_and_options(name, options, message):
    with pytest.raises(UserError, match=message):
        build_flow_backend(name, **options)


# Measures -----------------------------------------------------------------------------------------------------------


def test_errors_against_loops():
    generator = torch.Generator().manual_seed(0)
    flow, reference = torch.randn(2, 3, 2, 5, 7, generator=generator)
    reference[1, 0, 2, 3] = 1e10
    reference[2, 1, 0, 0] = math.nan
    distances, angles = [], []
    for n, y, x in np.ndindex(3, 5, 7):
        (a, b), (c, d) = flow[n, :, y, x].tolist(), reference[n, :, y, x].tolist()
        if (n, y, x) in ((1, 2, 3), (2, 0, 0)):
            continue
        distances.append(math.hypot(a - c, b - d))
        cosine = (a * c + b * d + 1) / math.sqrt((a * a + b * b + 1) * (c * c + d * d + 1))
        angles.append(math.degrees(math.acos(cosine)))
    assert known_flow(reference).sum() == len(distances)
    assert end_point_error(flow, reference) == pytest.approx(np.mean(distances), rel=1e-6)
    assert angular_error(flow, reference) == pytest.approx(np.mean(angles), rel=1e-6)
    only = torch.zeros(3, 5, 7, dtype=torch.bool)
    only[0, 0, 0] = True
    assert end_point_error(flow, reference, only) == pytest.approx(distances[0], rel=1e-6)
    with pytest.raises(UserError, match="nothing to compare"):
        end_point_error(flow, torch.full_like(flow, 1e10))
    with pytest.raises(UserError, match="one size"):
        end_point_error(flow, flow[..., 1:])
    with pytest.raises(UserError, match="mask"):
        end_point_error(flow, reference, only[0])


def test_flo_round_trip(tmp_path):
    flow = torch.randn(2, 3, 5)
    flow[0, 1, 1] = 1e10
    path = tmp_path / "a.flo"
    write_flo(path, flow)
    assert torch.equal(read_flo(path), flow)
    content = path.read_bytes()
    assert struct.unpack("<f2i", content[:12]) == (202021.25, 5, 3)
    assert struct.unpack("<2f", content[12:20]) == tuple(flow[:, 0, 0].tolist())
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.flo"]
    with pytest.raises(UserError, match="holds a flow"):
        write_flo(path, flow[None])
    assert path.read_bytes() == content


HEADER = struct.pack("<4sii", b"PIEH", 5, 3)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a .flo file"),
        (b"PIEH", "not a .flo file"),
        (b"RIFF" + HEADER[4:] + bytes(120), "not a .flo file"),
        (HEADER + bytes(119), "makes? 132 bytes|make 132 bytes"),
        (HEADER + bytes(121), "make 132 bytes"),
        (struct.pack("<4sii", b"PIEH", 0, 3), "says 0×3"),
        (struct.pack("<4sii", b"PIEH", -5, -3) + bytes(120), "says -5×-3"),
        (struct.pack("<4sii", b"PIEH", 2**31 - 1, 2**31 - 1), "says 2147483647"),
    ],
)
def test_broken_flo(content, message, tmp_path):
    (tmp_path / "a.flo").write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_flo(tmp_path / "a.flo")


def test_missing_flo(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        read_flo(tmp_path / "a.flo")
    with pytest.raises(UserError, match="cannot be read"):
        read_flo(tmp_path)


# Pictures -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flow", "colour"),
    [
        ((0, 0), (255, 255, 255)),
        ((4, 0), (255, 0, 0)),
        ((9, 0), (255, 0, 0)),
        ((2, 0), (255, 128, 128)),
        ((0, 4), (128, 255, 0)),
        ((-4, 0), (0, 255, 255)),
        ((0, -4), (128, 0, 255)),
        ((1e10, 0), (0, 0, 0)),
        ((0, math.nan), (0, 0, 0)),
    ],
)
def test_colours_of_directions(flow, colour):
    picture = flow_to_colour(torch.tensor(flow, dtype=torch.float32).view(1, 2, 1, 1), scale=4)
    assert picture.dtype == torch.uint8
    assert (picture.flatten().int() - torch.tensor(colour)).abs().max() <= 1


def test_wrong_pictures():
    with pytest.raises(UserError, match="scale"):
        flow_to_colour(torch.zeros(2, 4, 4), 0)
    with pytest.raises(UserError, match="scale"):
        flow_to_colour(torch.zeros(2, 4, 4), math.nan)
    with pytest.raises(UserError, match="flow"):
        flow_to_colour(torch.zeros(3, 4, 4), 1)
