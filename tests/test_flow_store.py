"""Kept flow: codes, files, folders of other programs, and stores that know what they hold."""

import json
import os
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from flows import Difference, contents, settings, some_flows
from PIL import Image
from videos import write_video

from distinit_plugin.errors import UserError, VideoError
from distinit_plugin.flow.codes import Quantiser
from distinit_plugin.flow.compute import SizeRule, Tally, video_flow
from distinit_plugin.flow.entries import CODECS, TAG, EntryReader, write_entry
from distinit_plugin.flow.folders import FlowArray, PictureFolder, jpeg_bytes
from distinit_plugin.flow.identity import Identity
from distinit_plugin.flow.pictures import colour_flow, wheel
from distinit_plugin.flow.source import MissingFlowError
from distinit_plugin.flow.store import FlowStore, place_name
from distinit_plugin.video.decode import open_video
from distinit_plugin.video.images import WHOLE

QUANTISED = {"bound": 20.0, "rounding": "round"}
WINDOW = (slice(3, 11), slice(2, 9))


def describe() -> dict[str, object]:
    return QUANTISED


# ------------------------------------------------------------------------------------------------ codes


@pytest.mark.parametrize("bound", [1.0, 7.3, 20.0, 32.0])
def test_codes_keep_flow_within_their_error(bound):
    flow = np.linspace(-bound, bound, 40001, dtype=np.float32)
    slack = 4e-7 * bound
    for rounding, zero in (("round", 128), ("floor", 127)):
        quantiser = Quantiser(bound, rounding)
        codes = quantiser.encode(flow)
        error = np.abs(quantiser.decode(codes).astype(np.float64) - flow)
        if rounding == "round":
            assert error.max() <= bound / 255 + slack
        else:
            assert bound / 255 < error.max() < 2 * bound / 255 + slack
        assert (codes.min(), codes.max()) == (0, 255)
        assert quantiser.encode(np.zeros(3, np.float32)).tolist() == [zero] * 3 == [quantiser.zero] * 3
        assert (quantiser.encode_tensor(torch.from_numpy(flow)).numpy() == codes).all()
        decoded = quantiser.decode_tensor(torch.from_numpy(codes)).numpy()
        np.testing.assert_allclose(decoded, quantiser.decode(codes), atol=1e-6 * bound)
        # Codes that were read are written as they were.
        assert (
            Quantiser(bound, "round").encode(quantiser.decode(np.arange(256, dtype=np.uint8))) == np.arange(256)
        ).all()


def test_codes_as_other_programs_make_them():
    """denseflow: cvRound(255·(v − L)/(H − L)); MediaPipe: uint8(clamp((v + 20)/40)·255)."""
    flow = np.random.default_rng(0).uniform(-30, 30, 10000)
    denseflow = np.clip(np.rint(255 * (flow + 20) / 40), 0, 255)
    mediapipe = np.floor(np.clip((flow + 20) / 40, 0, 1) * 255)
    assert (Quantiser(20, "round").encode(flow) == denseflow).mean() > 0.9999
    assert (Quantiser(20, "floor").encode(flow) == mediapipe).mean() > 0.9999
    assert Quantiser(20).clipped(flow) == (np.abs(flow) > 20).sum() > 1000


def test_codes_refuse_what_is_none():
    with pytest.raises(ValueError, match="not numbers"):
        Quantiser().encode(np.array([0.0, np.nan]))
    assert Quantiser().encode(np.array([np.inf, -np.inf])).tolist() == [255, 0]
    for bound in (0, -1, float("nan"), float("inf"), 1e9):
        with pytest.raises(ValueError, match="bound"):
            Quantiser(bound)
    with pytest.raises(ValueError, match="rounding"):
        Quantiser(20, "up")  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------ one file


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("size", [(17, 23), (1, 1), (32, 40)])
def test_file_gives_what_was_written(tmp_path, codec, size):
    flows = some_flows(30, *size)
    path = tmp_path / "a.flow.mkv"
    assert write_entry(path, iter(flows), describe, codec=codec) == path.stat().st_size
    with EntryReader(path) as reader:
        assert (reader.num_flows, reader.height, reader.width) == (30, *size)
        assert (reader.read(range(30)) == flows).all()
        order = np.random.default_rng(1).integers(0, 30, 25)
        assert (reader.read(order) == flows[order]).all()
        for number in (29, 0, 5, 6, 9, 28, 3):
            assert (reader.read([number]) == flows[[number]]).all()
        assert (reader.read([30, 29]) == flows[[29, 29]]).all()  # the last frame has the last flow
        assert (reader.read([4, 2], WINDOW) == flows[[4, 2]][:, WINDOW[0], WINDOW[1]]).all()
        assert reader.read([]).shape == (0, *size, 2)
        for beyond in (31, -1):
            with pytest.raises(MissingFlowError, match=f"frame {beyond} was asked for"):
                reader.read([beyond])
        assert reader.quantiser == Quantiser()


def test_file_has_the_same_bytes_whenever_it_is_written(tmp_path):
    for name in ("a", "b"):
        write_entry(tmp_path / f"{name}.flow.mkv", iter(some_flows()), describe)
        time.sleep(1.1 if name == "a" else 0)  # dates have seconds
    assert (tmp_path / "a.flow.mkv").read_bytes() == (tmp_path / "b.flow.mkv").read_bytes()
    write_entry(tmp_path / "b.flow.mkv", iter(some_flows(seed=1)), describe)
    assert (tmp_path / "a.flow.mkv").read_bytes() != (tmp_path / "b.flow.mkv").read_bytes()
    assert sorted(os.listdir(tmp_path)) == ["a.flow.mkv", "b.flow.mkv"]


def test_damage_is_found(tmp_path):
    """Cut anywhere, and bits turned anywhere: what was written is read, or MissingFlowError names the file."""
    flows, path = some_flows(8, 16, 16), tmp_path / "a.flow.mkv"
    write_entry(path, iter(flows), describe)
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    damaged = [whole[: int(cut)] for cut in rng.integers(0, len(whole), 12)]
    for place in rng.integers(0, len(whole), 40).tolist():
        damaged.append(whole[:place] + bytes([whole[place] ^ (1 << int(rng.integers(8)))]) + whole[place + 1 :])
    named = []
    for data in damaged:
        path.write_bytes(data)
        try:
            with EntryReader(path) as reader:
                assert (reader.read(range(8)) == flows).all()
        except MissingFlowError as error:
            named.append(str(error))
    assert len(named) > 40
    assert all(str(path) in text for text in named)


def test_other_files_are_no_flow(tmp_path):
    path = write_video(tmp_path / "a.mkv", 4)
    with pytest.raises(MissingFlowError, match=TAG):
        EntryReader(path)
    (tmp_path / "text").write_text("#EXTM3U\nhttp://example.org/a")
    os.mkfifo(tmp_path / "fifo")
    for name in ("text", "fifo", "missing", "."):
        with pytest.raises(MissingFlowError, match="its flow"):
            EntryReader(tmp_path / name, path="video.mp4")


def test_writing_that_fails_leaves_what_was_there(tmp_path):
    path = tmp_path / "a.flow.mkv"
    write_entry(path, iter(some_flows()), describe)
    before = contents(tmp_path)

    def failing():
        yield from some_flows(3)
        raise VideoError("x", "stops")

    with pytest.raises(VideoError, match="stops"):
        write_entry(path, failing(), describe)
    with pytest.raises(UserError, match="cannot write"):
        write_entry(path / "below" / "b.flow.mkv", iter(some_flows()), describe)
    assert contents(tmp_path) == before


# ------------------------------------------------------------------------------------------------ other programs


def write_folder(folder: Path, flows: np.ndarray, first: int = 1) -> None:
    folder.mkdir(parents=True)
    for number, codes in enumerate(flows, start=first):
        for name, data in zip("xy", jpeg_bytes(codes, 95), strict=True):
            (folder / f"flow_{name}_{number:05d}.jpg").write_bytes(data)


def smooth_flows(count: int = 6) -> np.ndarray:
    rows, columns = np.mgrid[0:24, 0:32]
    return np.stack([np.stack([100 + rows + n, 120 + columns // 2 + n], axis=-1) for n in range(count)]).astype(
        np.uint8
    )


def test_folders_of_denseflow(tmp_path):
    flows = smooth_flows()
    write_folder(tmp_path / "a", flows)
    with PictureFolder(tmp_path / "a", Quantiser(32, "floor")) as reader:
        assert (reader.num_flows, reader.height, reader.width, reader.quantiser.bound) == (6, 24, 32, 32)
        read = reader.read([6, 0, 3])
        assert np.abs(read.astype(int) - flows[[5, 0, 3]]).max() <= 3
        assert (reader.read([6, 0, 3], WINDOW) == read[:, WINDOW[0], WINDOW[1]]).all()
    Image.new("L", (32, 20)).save(tmp_path / "a" / "flow_x_00003.jpg")
    with pytest.raises(MissingFlowError, match=r"flow_x_00003.jpg is 32×20, the first is 32×24"):
        PictureFolder(tmp_path / "a", Quantiser()).read([2])
    (tmp_path / "a" / "flow_y_00004.jpg").write_bytes(b"nothing")
    with pytest.raises(MissingFlowError, match=r"flow_y_00004.jpg cannot be decoded"):
        PictureFolder(tmp_path / "a", Quantiser()).read([3])
    for gone, rest in (("flow_y_00005.jpg", None), ("flow_x_00005.jpg", None)):
        (tmp_path / "a" / gone).unlink()
        with pytest.raises(MissingFlowError, match=r"flow_[xy]_00005.jpg is missing"):
            PictureFolder(tmp_path / "a", Quantiser())
        assert rest is None
    (tmp_path / "empty").mkdir()
    with pytest.raises(MissingFlowError, match=r"has no flow_x_00001.jpg"):
        PictureFolder(tmp_path / "empty", Quantiser(), path="a.mp4")


def test_arrays_of_i3d(tmp_path):
    codes = some_flows(5, 12, 14)
    values = (codes.astype(np.float32) / 255 - 0.5) * 2
    np.save(tmp_path / "a.npy", values[None])
    with FlowArray(tmp_path / "a.npy", Quantiser(20, "floor")) as reader:
        assert reader.num_flows == 5
        assert (reader.read([4, 0, 5]) == codes[[4, 0, 4]]).all()
        assert (reader.read([1], WINDOW) == codes[[1]][:, WINDOW[0], WINDOW[1]]).all()
        np.testing.assert_allclose(reader.quantiser.decode(reader.read([2]))[0], values[2] * 20, atol=1e-5)
    wrong = {
        "shape": values[..., :1],
        "integers": codes,
        "fortran": np.asfortranarray(values),
        "objects": np.array([[None]]),
    }
    for name, array in wrong.items():
        np.save(tmp_path / f"{name}.npy", array, allow_pickle=True)
        with pytest.raises(MissingFlowError, match="it must be"):
            FlowArray(tmp_path / f"{name}.npy", Quantiser())
    (tmp_path / "cut.npy").write_bytes((tmp_path / "a.npy").read_bytes()[:-9])
    with pytest.raises(MissingFlowError, match="its size is not"):
        FlowArray(tmp_path / "cut.npy", Quantiser())
    (tmp_path / "text.npy").write_text("hello")
    with pytest.raises(MissingFlowError, match="is no array"):
        FlowArray(tmp_path / "text.npy", Quantiser())
    np.save(tmp_path / "pixels.npy", values * 20)
    with pytest.raises(MissingFlowError, match="not in"):
        FlowArray(tmp_path / "pixels.npy", Quantiser()).read([0])


def test_foreign_stores_find_videos_by_name(tmp_path):
    write_folder(tmp_path / "flow" / "wave" / "a", smooth_flows())
    store = FlowStore.foreign(tmp_path / "flow", "jpg", Quantiser(32))
    with store.reader("/far/away/wave/a.mp4") as reader:
        assert reader.num_flows == 6
    with pytest.raises(MissingFlowError, match="is not in"):
        store.reader("/far/away/walk/b.mp4")
    np.save(tmp_path / "flow" / "a.npy", np.zeros((1, 3, 4, 4, 2), np.float32))
    assert FlowStore.foreign(tmp_path / "flow", "npy", Quantiser()).reader("/x/a.avi").num_flows == 3
    with pytest.raises(UserError, match="no folder"):
        FlowStore.foreign(tmp_path / "missing", "jpg", Quantiser())


# ------------------------------------------------------------------------------------------------ flow of a video


def flow_of(path: Path, **values: object) -> tuple[np.ndarray, Tally]:
    tally = Tally()
    arguments = {"size": SizeRule(), "fps": None, "batch_size": 3, **values}
    with open_video(path) as video:
        flows = video_flow(video, Difference(), Quantiser(), tally=tally, **arguments)  # type: ignore[arg-type]
        return np.stack(list(flows)), tally


def test_flow_leads_from_each_frame_to_the_next(tmp_path):
    path = write_video(tmp_path / "a.mp4", 11, 32, 40)
    with open_video(path) as video:
        frames = video.read(range(11)).astype(np.float32)
        seconds = video.index
    wanted = Quantiser().encode((frames[1:] - frames[:-1])[..., :2] / 10)
    flows, tally = flow_of(path)
    assert (flows == wanted).all()
    assert (tally.frames, tally.values, tally.size) == (11, flows.size, (32, 40))
    for batch_size in (1, 10, 50):
        assert (flow_of(path, batch_size=batch_size)[0] == wanted).all()
    # At another rate: flow between the frames that are picked, none between a frame and itself.
    for fps in (10.0, 40.0):
        numbers = seconds.timeline(fps)
        flows, tally = flow_of(path, fps=fps)
        picked = frames[numbers]
        assert (flows == Quantiser().encode((picked[1:] - picked[:-1])[..., :2] / 10)).all()
        assert tally.frames == len(numbers) == len(flows) + 1


def test_flow_of_one_frame_is_no_motion(tmp_path):
    flows, tally = flow_of(write_video(tmp_path / "a.mp4", 1, 32, 40))
    assert flows.shape == (1, 32, 40, 2)
    assert (flows == 128).all()
    assert tally.frames == 1


def test_sizes():
    assert SizeRule.parse("256").of(240, 320) == (256, 341)
    assert SizeRule.parse("256").of(320, 240) == (341, 256)
    assert SizeRule.parse("340x256").of(240, 321) == (256, 340)
    assert SizeRule.parse("native").of(17, 23) == (17, 23)
    for text in ("", "0", "abc", "12x", "99999", "-4", "3x0", "²"):
        with pytest.raises(ValueError, match="is no size"):
            SizeRule.parse(text)


# ------------------------------------------------------------------------------------------------ stores


@pytest.fixture
def kept(tmp_path) -> tuple[FlowStore, Path, np.ndarray]:
    """A store with the flow of one video."""
    (tmp_path / "videos" / "one").mkdir(parents=True)
    video = write_video(tmp_path / "videos" / "one" / "a.mp4", 11)
    store = FlowStore.settle(tmp_path / "flow", settings(), str(tmp_path / "videos"))
    flows = some_flows()
    put(store, video, flows)
    return store, video, flows


def put(store: FlowStore, video: Path, flows: np.ndarray, **changes: object) -> Path:
    source = Identity.of(str(video)).to_dict()
    told = {"backend": Difference.identity, "size": "32", "fps": None, **QUANTISED, "source": source, **changes}
    write_entry(store.place_of(str(video)), iter(flows), lambda: told)
    return store.place_of(str(video))


def test_store_gives_flow_by_the_path_of_the_video(kept, tmp_path):
    store, video, flows = kept
    again = FlowStore.open(tmp_path / "flow")
    assert again.settings == store.settings
    with again.reader(str(video)) as reader:
        assert reader.path == str(video)
        assert (reader.read([0, 9, 10]) == flows[[0, 9, 9]]).all()
    shutil.copytree(tmp_path / "videos", tmp_path / "elsewhere" / "clips")  # copied, with other times
    with again.reader(str(tmp_path / "elsewhere" / "clips" / "one" / "a.mp4")) as reader:
        assert (reader.read([3], WHOLE) == flows[[3]]).all()
    shutil.move(tmp_path / "flow", tmp_path / "moved")
    assert FlowStore.open(tmp_path / "moved").reader(str(video)).num_flows == 10


def test_store_knows_what_is_missing_or_of_another_video(kept, tmp_path):
    store, video, flows = kept
    other = write_video(tmp_path / "videos" / "one" / "b.mp4", 5)
    with pytest.raises(MissingFlowError, match=r"b.mp4: its flow is not in .*extract-flow"):
        store.reader(str(other))
    shutil.copy(store.place_of(str(video)), store.place_of(str(other)))
    with pytest.raises(MissingFlowError, match="is that of another video"):
        store.reader(str(other))
    time.sleep(0.01)
    os.utime(video)  # touched, not changed
    assert store.reader(str(video)).num_flows == 10
    data = bytearray(video.read_bytes())
    data[-1] ^= 1
    video.write_bytes(data)  # of the same size
    with pytest.raises(MissingFlowError, match="an earlier state"):
        store.reader(str(video))
    put(store, video, flows, bound=32.0)
    with pytest.raises(MissingFlowError, match=r"made otherwise \(bound: 32, the store's 20\)"):
        store.reader(str(video))
    video.unlink()
    with pytest.raises(VideoError, match=r"a\.mp4"):
        store.reader(str(video))


def test_store_refuses_other_settings_and_other_corpora(kept, tmp_path):
    root = str(tmp_path / "videos")
    FlowStore.settle(tmp_path / "flow", settings(quality=20), root)  # plays no part in it
    before = contents(tmp_path / "flow")
    with pytest.raises(UserError, match=r"\(bound: 20 there, 32 now; fps: native there, 25 now\)"):
        FlowStore.settle(tmp_path / "flow", settings(bound=32.0, fps=25.0), root)
    with pytest.raises(UserError, match="layout: store there, jpg now"):
        FlowStore.settle(tmp_path / "flow", settings(layout="jpg"), root)
    (tmp_path / "others").mkdir()
    with pytest.raises(UserError, match="is that of the videos below"):
        FlowStore.settle(tmp_path / "flow", settings(), str(tmp_path / "others"))
    assert contents(tmp_path / "flow") == before
    shutil.move(tmp_path / "videos", tmp_path / "new")  # a corpus that was moved is the same
    assert FlowStore.settle(tmp_path / "flow", settings(), str(tmp_path / "new")).root == str(tmp_path / "new")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "damaged"),
        ("{", "damaged"),
        ("[1]", "no JSON object"),
        ("{}", "version"),
        ('{"format": "distinit flow", "version": 2}', "version"),
        ('{"format": "distinit flow", "version": 1, "root": ""}', "is missing"),
        ("[" * 100000, "damaged"),
        ("x" * 2000000, "too large"),
    ],
)
def test_damaged_settings_are_one_sentence(kept, tmp_path, text, message):
    (tmp_path / "flow" / "store.json").write_text(text)
    for use in (
        lambda: FlowStore.open(tmp_path / "flow"),
        lambda: FlowStore.settle(tmp_path / "flow", settings(), "/"),
    ):
        with pytest.raises(UserError, match=message) as raised:
            use()
        assert len(str(raised.value)) < 600
    assert (tmp_path / "flow" / "store.json").read_text() == text


@pytest.mark.parametrize("root", [".", "rel/ative", 5, None])
def test_a_root_that_is_no_whole_path_is_refused(kept, tmp_path, root):
    path = tmp_path / "flow" / "store.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "root": root}))
    with pytest.raises(UserError, match=r"damaged \(its root is no whole path"):
        FlowStore.open(tmp_path / "flow")


@pytest.mark.parametrize(
    "change", [{"bound": -1}, {"bound": "x"}, {"rounding": "up"}, {"size": "q"}, {"codec": "x264"}, {"fps": 0}]
)
def test_settings_that_cannot_be_are_refused(kept, tmp_path, change):
    path = tmp_path / "flow" / "store.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match="damaged"):
        FlowStore.open(tmp_path / "flow")


def test_names_of_places():
    assert place_name("a/b.mp4", "store") == "a/b.mp4.flow.mkv"
    assert place_name("a/b.mp4", "jpg") == "a/b"
    long = [place_name("a/" + "é" * count + ".mp4", "store") for count in (120, 121)]
    assert all(len(os.fsencode(name)) < 250 for name in long)
    assert long[0] != long[1]


# ------------------------------------------------------------------------------------------------ colours


def test_colours():
    flow = np.array([[[0, 0], [2, 0], [1, 0], [9, 0], [-2, 0]]], np.float32)
    colours = colour_flow(flow, 2.0)[0].tolist()
    assert colours[0] == [255, 255, 255]
    assert colours[1] == colours[3] == [255, 0, 0]
    assert colours[4] == [0, 255, 255]  # the opposite
    assert len({tuple(colour) for colour in wheel(48).reshape(-1, 3)}) > 500
