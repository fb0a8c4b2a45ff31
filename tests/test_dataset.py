"""ClipDataset on real encoded videos: exact frames, purity, bad files, every kind of clip, workers."""

from __future__ import annotations

import os
import pickle
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from videos import write_video

from distinit_plugin.data.dataset import ClipDataset, FrameMemory
from distinit_plugin.data.loader import build_loader
from distinit_plugin.data.sampler import ClipSampler, ViewSampler
from distinit_plugin.errors import UserError
from distinit_plugin.types import BadVideo, SampleKey, ViewSpec
from distinit_plugin.video.corpus import Mixture, load_corpus

CLIP = ViewSpec(num_frames=4, sampling_rate=2, crop_size=16)
TEACHER = ViewSpec(num_frames=1, pick="center", crop_size=24, mean=(0.4, 0.4, 0.4))
SPECS = {"student/rgb": CLIP, "T/rgb": TEACHER}
BASE = 10
STEP = 6  # brightness between neighbouring frames: survives the codec


def encode(path: Path, num_frames: int = 20, fps: int = 25) -> str:
    """A video whose frame i has the brightness BASE + STEP·i, so that any crop of it tells its frame."""
    path.parent.mkdir(parents=True, exist_ok=True)

    def pattern(number: int, height: int, width: int) -> np.ndarray:
        return np.full((height, width, 3), BASE + STEP * number, dtype=np.uint8)

    return str(write_video(path, num_frames, 32, 40, fps=fps, gop=8, pattern=pattern))


def frames_of(view: torch.Tensor) -> list[int]:
    """The frame numbers that a view shows."""
    return [round((float(level) - BASE) / STEP) for level in view.float().mean(dim=(0, 2, 3))]


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("videos")
    for number in range(5):
        encode(folder / "good" / f"{number}.mp4")
    encode(folder / "odd" / "short.mp4", num_frames=3)
    encode(folder / "odd" / "slow.mp4", fps=10)
    (folder / "odd" / "text.mp4").write_text("not a video")
    (folder / "rotten").mkdir()
    for number in range(3):
        (folder / "rotten" / f"{number}.mp4").write_bytes(b"")
    return folder


def dataset(paths: list[str], tmp_path: Path, split="train", specs=None, **kwargs) -> ClipDataset:
    rows = tmp_path / "rows.txt"
    rows.write_text("\n".join(paths))
    corpus = load_corpus("list", "X", path=str(rows))
    specs = specs or SPECS
    clip_spec = next(iter(specs.values()))
    return ClipDataset([corpus], specs, clip_spec=clip_spec, split=split, seed=1, scales=(16, 20), **kwargs)


def good(videos: Path) -> list[str]:
    return [str(path) for path in sorted((videos / "good").iterdir())]


def same(one, two) -> bool:
    views = one["views"].keys() == two["views"].keys() and all(
        torch.equal(one["views"][name], two["views"][name]) for name in one["views"]
    )
    return views and {k: v for k, v in one.items() if k != "views"} == {k: v for k, v in two.items() if k != "views"}


def test_training_sample(videos, tmp_path):
    data = dataset(good(videos), tmp_path)
    starts = set()
    for position in range(40):
        sample = data[SampleKey(0, position, 2)]
        assert {name: tuple(view.shape) for name, view in sample["views"].items()} == {
            CLIP.pixels: (3, 4, 16, 16),
            TEACHER.pixels: (3, 1, 24, 24),
        }
        assert sample["views"][CLIP.pixels].dtype == torch.uint8
        clip = frames_of(sample["views"][CLIP.pixels])
        assert clip == [clip[0] + 2 * i for i in range(4)]
        assert clip[0] in range(14)
        assert frames_of(sample["views"][TEACHER.pixels])[0] in clip[1:3]
        assert sample["path"] == good(videos)[2]
        assert sample["targets"] == {}
        assert sample["bad"] == []
        starts.add(clip[0])
    assert len(starts) > 8


def test_sample_is_a_pure_function_of_seed_and_key(videos, tmp_path):
    keys = [SampleKey(epoch, position, position % 5) for epoch in range(2) for position in range(4)]
    one = dataset(good(videos), tmp_path)
    forward = [one[key] for key in keys]
    two = pickle.loads(pickle.dumps(dataset(good(videos), tmp_path)))
    backward = [two[key] for key in reversed(keys)][::-1]
    assert all(same(a, b) for a, b in zip(forward, backward, strict=True))
    assert not same(one[SampleKey(0, 0, 0)], {**one[SampleKey(1, 0, 0)], "key": SampleKey(0, 0, 0)})


def test_labels_travel(videos, tmp_path):
    corpus = load_corpus("folder", "X", path=str(videos), labeled=True)
    data = ClipDataset([corpus], SPECS, clip_spec=CLIP, split="train", seed=0)
    label = data[SampleKey(0, 0, 0)]["targets"]["label"]
    assert (label.dtype, label.shape, int(label)) == (torch.int64, (), 0)


@pytest.mark.parametrize("num_workers", [0, 1, 2])
def test_batches_do_not_depend_on_workers(videos, tmp_path, num_workers):
    paths = [*good(videos), str(videos / "odd" / "text.mp4")]
    data = dataset(paths, tmp_path, timeout=20)
    chosen = ClipSampler(data.videos.sizes, num_clips_per_epoch=12, global_batch_size=4, seed=0)
    expected = [dataset(paths, tmp_path)[key] for key in chosen]
    batches = list(build_loader(data, chosen, 4, num_workers=num_workers))
    assert [path for batch in batches for path in batch["paths"]] == [sample["path"] for sample in expected]
    joined = torch.cat([batch["views"][CLIP.pixels] for batch in batches])
    assert torch.equal(joined, torch.stack([sample["views"][CLIP.pixels] for sample in expected]))
    assert {bad.path for batch in batches for bad in batch["bad"]} == {paths[-1]}


def test_bad_video_is_named_and_replaced_the_same_way_each_time(videos, tmp_path):
    paths = [str(videos / "odd" / "text.mp4"), *good(videos), str(videos / "nowhere.mp4")]
    data = dataset(paths, tmp_path)
    first = data[SampleKey(0, 7, 0)]
    assert first["path"] in good(videos)
    assert first["bad"][0].path == paths[0]
    assert first["bad"][0].reason
    assert first["key"] == SampleKey(0, 7, 0)
    assert same(first, data[SampleKey(0, 7, 0)])  # now from memory
    fresh = dataset(paths, tmp_path)
    fresh.remember([BadVideo(*first["bad"][0])])
    assert same(first, fresh[SampleKey(0, 7, 0)])
    assert len({data[SampleKey(0, position, 0)]["path"] for position in range(30)}) > 2


def test_bad_video_is_not_opened_again(videos, tmp_path, monkeypatch):
    from distinit_plugin.data import dataset as module

    opened = []
    real = module.open_video
    monkeypatch.setattr(module, "open_video", lambda path, **kw: opened.append(path) or real(path, **kw))
    data = dataset([str(videos / "odd" / "text.mp4"), *good(videos)], tmp_path)
    for position in range(5):
        assert data[SampleKey(0, position, 0)]["bad"]
    assert sum(path.endswith("text.mp4") for path in opened) == 1


def test_replacement_comes_from_the_same_corpus(videos, tmp_path):
    rows = tmp_path / "odd.txt"
    rows.write_text(f"{videos}/odd/text.mp4\n{videos}/odd/slow.mp4\n")
    corpora = [load_corpus("folder", "A", path=str(videos / "good")), load_corpus("list", "B", path=str(rows))]
    data = ClipDataset(Mixture(corpora), SPECS, clip_spec=CLIP, split="train", seed=0)
    assert {data[SampleKey(0, position, 5)]["path"] for position in range(10)} == {f"{videos}/odd/slow.mp4"}


def test_nothing_but_bad_videos_ends_the_job(videos, tmp_path):
    data = dataset([str(path) for path in sorted((videos / "rotten").iterdir())], tmp_path, max_replacements=4)
    with pytest.raises(UserError, match=r"5 videos in a row are bad.*0 bytes.*check-corpus"):
        data[SampleKey(0, 0, 1)]


def test_uniform_clips_reach_the_end(videos, tmp_path):
    data = dataset(good(videos), tmp_path, split="test", num_clips=3, num_crops=1)
    assert data.clips_per_video().tolist() == [3] * 5
    clips = [frames_of(data[SampleKey(0, 0, 1, clip)]["views"][CLIP.pixels]) for clip in range(3)]
    assert clips == [[0, 2, 4, 6], [6, 8, 10, 12], [13, 15, 17, 19]]


def test_validation_takes_the_middle(videos, tmp_path):
    data = dataset(good(videos), tmp_path, split="val")
    assert frames_of(data[SampleKey(0, 0, 0)]["views"][CLIP.pixels]) == [6, 8, 10, 12]


def test_dense_clips(videos, tmp_path):
    paths = [good(videos)[0], str(videos / "odd" / "short.mp4"), str(videos / "odd" / "text.mp4")]
    data = dataset(paths, tmp_path, split="test", test_clips="dense", dense_stride=5)
    for num_workers in (0, 2):
        seen = []
        counts = data.clips_per_video(num_workers=num_workers, on_video=seen.append)
        assert counts.tolist() == [3, 1, 1]
        assert seen == [1, 2, 3]
    samples = [data[key] for key in ViewSampler(counts)]
    assert [frames_of(s["views"][CLIP.pixels]) for s in samples if s["views"]] == [
        [0, 2, 4, 6],
        [5, 7, 9, 11],
        [10, 12, 14, 16],
        [0, 2, 1, 0],  # a short video loops
    ]
    assert [bad.path for sample in samples for bad in sample["bad"]] == [paths[2]]


def test_each_rank_counts_its_own_dense_clips(videos, tmp_path, monkeypatch):
    paths = [str(videos / "odd" / "short.mp4"), *good(videos)[:2]]
    data = dataset(paths, tmp_path, split="test", test_clips="dense", dense_stride=5)
    opened, parts = [], []

    def count(index: int) -> int:
        opened.append(index)
        return ClipDataset.count_clips(data, index)

    def send(part: np.ndarray) -> list[np.ndarray]:
        parts.append(part)
        raise InterruptedError

    monkeypatch.setattr(data, "count_clips", count)
    for rank, own in enumerate(([0, 2], [1])):
        opened.clear()
        with pytest.raises(InterruptedError):
            data.clips_per_video(rank=rank, world_size=2, gather_objects=send)
        assert opened == own
    for rank in range(2):
        counts = data.clips_per_video(rank=rank, world_size=2, gather_objects=lambda _: parts)
        assert counts.tolist() == [1, 3, 3]


def test_a_counting_process_that_dies_is_one_sentence(videos, tmp_path, monkeypatch):
    data = dataset(good(videos)[:2], tmp_path, split="test", test_clips="dense")
    monkeypatch.setattr(data, "count_clips", lambda index: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(UserError, match=r"A decoding process died .*DATA_LOADER\.NUM_WORKERS"):
        data.clips_per_video(num_workers=1)


def test_bad_video_of_a_test_set_is_left_out_and_named(videos, tmp_path):
    data = dataset([good(videos)[0], str(videos / "odd" / "text.mp4")], tmp_path, split="test", num_clips=2)
    batches = list(build_loader(data, ViewSampler(data.clips_per_video()), 3, num_workers=1))
    assert [key.index for batch in batches for key in batch["keys"]] == [0, 0]
    assert {bad.path for batch in batches for bad in batch["bad"]} == {str(videos / "odd" / "text.mp4")}


def test_three_crops_differ_along_the_longer_side(tmp_path):
    path = tmp_path / "wide.mp4"
    ramp = np.linspace(0, 255, 96).astype(np.uint8)
    write_video(path, 8, 32, 96, pattern=lambda number, height, width: np.tile(ramp[None, :, None], (height, 1, 3)))
    data = dataset([str(path)], tmp_path, split="test", num_crops=3)
    levels = [data[SampleKey(0, 0, 0, 0, crop)]["views"][CLIP.pixels].float().mean().item() for crop in range(3)]
    assert np.diff(levels).min() > 40
    assert abs(levels[1] - 127) < 8


def test_target_fps_picks_by_time(videos, tmp_path):
    spec = ViewSpec(num_frames=4, sampling_rate=1, target_fps=5.0, crop_size=16)
    data = dataset([str(videos / "odd" / "slow.mp4"), good(videos)[0]], tmp_path, split="val", specs={"s": spec})
    slow = frames_of(data[SampleKey(0, 0, 0)]["views"][spec.pixels])
    assert np.diff(slow).tolist() == [2, 2, 2]  # 10 frames a second → 5
    fast = frames_of(data[SampleKey(0, 0, 1)]["views"][spec.pixels])
    assert fast == [0, 5, 10, 15]  # 25 frames a second → 5


def test_whole_video_when_no_length_is_given(videos, tmp_path):
    spec = ViewSpec(num_frames=None, crop_size=16)
    data = dataset([str(videos / "odd" / "short.mp4")], tmp_path, split="val", specs={"s": spec})
    assert frames_of(data[SampleKey(0, 0, 0)]["views"][spec.pixels]) == [0, 1, 2]


def test_flip_can_be_off(tmp_path):
    path = encode(tmp_path / "v.mp4", num_frames=4)
    data = dataset([path], tmp_path, flip=False)
    pixels = np.zeros((4, 32, 40, 3), dtype=np.uint8)
    pixels[:, :, 20:] = 255  # dark left, bright right
    folder = tmp_path / "frames"
    folder.mkdir()
    for number, frame in enumerate(pixels):
        Image.fromarray(frame).save(folder / f"{number}.png")

    def mirrored(flip: bool) -> list[bool]:
        data = dataset([str(folder)], tmp_path, flip=flip, specs={"s": ViewSpec(num_frames=2, crop_size=30)})
        views = [next(iter(data[SampleKey(0, p, 0)]["views"].values())).float() for p in range(20)]
        return [bool(view[..., 0].mean() > view[..., -1].mean()) for view in views]

    assert data[SampleKey(0, 0, 0)]["views"]
    assert not any(mirrored(False))
    assert 4 <= sum(mirrored(True)) <= 16


def test_frame_memory_fetches_each_frame_once():
    fetched: list[int] = []

    def fetch(indices):
        fetched.extend(indices)
        return np.stack([np.full((2, 2, 3), index, dtype=np.uint8) for index in indices])

    memory = FrameMemory()
    memory.choose("a")
    assert memory.read([3, 1, 3], fetch)[:, 0, 0, 0].tolist() == [3, 1, 3]
    assert memory.read([1, 2], fetch)[:, 0, 0, 0].tolist() == [1, 2]
    assert fetched == [1, 3, 2]
    memory.choose("b")
    memory.read([1], fetch)
    assert fetched == [1, 3, 2, 1]
    small = FrameMemory(max_bytes=24)
    small.choose("a")
    for begin in range(5):
        assert small.read([begin, begin + 1], fetch)[:, 0, 0, 0].tolist() == [begin, begin + 1]
    assert len(small._frames) <= 2


@pytest.mark.parametrize("num_workers", [0, 2])
def test_real_videos(assets, num_workers):
    corpus = load_corpus("folder", "REAL", path=str(assets / "videos" / "decord"))
    spec = ViewSpec(num_frames=8, crop_size=32)
    data = ClipDataset([corpus], {"s": spec}, clip_spec=spec, split="train", seed=0)
    chosen = ClipSampler(data.videos.sizes, num_clips_per_epoch=12, global_batch_size=4, seed=0)
    batches = list(build_loader(data, chosen, 4, num_workers=num_workers))
    assert [batch["views"][spec.pixels].shape for batch in batches] == [(4, 3, 8, 32, 32)] * 3
    assert {os.path.basename(bad.path) for batch in batches for bad in batch["bad"]} <= {"corrupted.mp4"}
