"""This package inside programs around PyTorchVideo: clips, views, reading, and its networks by name."""

import gc
import multiprocessing
import random
import re
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from small_jobs import SIZE, write_teacher
from torch.utils.data import DataLoader, SequentialSampler
from videos import frame_numbers, write_video

pytest.importorskip("pytorchvideo")

from pytorchvideo.data import LabeledVideoDataset
from pytorchvideo.data.encoded_video import EncodedVideo
from pytorchvideo.data.labeled_video_paths import LabeledVideoPaths
from pytorchvideo.models import hub

import distinit_plugin
from distinit_plugin import InputSpec, UserError, build_network
from distinit_plugin.building.detection import roi_layers
from distinit_plugin.data.dataset import ClipDataset
from distinit_plugin.data.views import finish_views
from distinit_plugin.detection.network import RoiNetwork
from distinit_plugin.errors import VideoError
from distinit_plugin.hosts import pytorchvideo as host
from distinit_plugin.hosts.pytorchvideo import DenseClips, PickedFrames, RandomClips, UniformClips, Videos, Views, alias
from distinit_plugin.hosts.slowfast.missing import MISSING
from distinit_plugin.models.external import PYTORCHVIDEO_NAMES
from distinit_plugin.types import SampleKey, ViewSpec
from distinit_plugin.video.isolated import run_isolated
from distinit_plugin.video.records import Corpus, Listing
from distinit_plugin.video.sampling import Clip, clip_at, dense_starts, random_clip, uniform_clip
from distinit_plugin.video.transforms import build_views, fixed_geometry, random_geometry

FPS = 25
FRAMES = 30
CLIP = ViewSpec(num_frames=4, sampling_rate=3, crop_size=SIZE)
SPECS = {
    "student/rgb": CLIP,
    "CENTER/rgb": ViewSpec(num_frames=1, pick="center", crop_size=48, mean=(0.5,) * 3, std=(0.25,) * 3),
    "UNIFORM/rgb": ViewSpec(num_frames=2, pick="uniform", crop_size=40, crop="center"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three videos of two classes; the last is shorter than a clip. Frames carry their numbers."""
    root = tmp_path_factory.mktemp("ptv")
    for name, frames in (("a/one", FRAMES), ("a/two", FRAMES), ("b/short", 6)):
        (root / name).parent.mkdir(exist_ok=True)
        write_video(root / f"{name}.mp4", frames, fps=FPS)
    return root


def videos_of(folder):
    return [(str(path), {"label": number}) for number, path in enumerate(sorted(folder.rglob("*.mp4")))]


def dataset_of(folder, sampler, transform=None, reader=True, fps=None):
    dataset = LabeledVideoDataset(
        videos_of(folder), sampler, video_sampler=SequentialSampler, transform=transform, decode_audio=False
    )
    if reader:
        dataset.video_path_handler = Videos(fps)
    return dataset


def shown(video):
    """Numbers of the frames in (3,T,H,W)."""
    return frame_numbers(video.permute(1, 2, 3, 0).to(torch.uint8).numpy())


def spans(sampler, duration):
    """(first frame, frames) of all clips that a sampler gives of one video."""
    found = []
    while True:
        info = sampler(0.0, duration, {})
        first = -(-info.clip_start_sec * FPS // 1)
        found.append((int(first), int(-(-info.clip_end_sec * FPS // 1) - first), info.clip_index, info.aug_index))
        if info.is_last_clip:
            return found


# ---------------------------------------------------------------------------------------------- the alias


def _alias_in_a_fresh_process(_):
    before = (alias.OLD in sys.modules, host.needs_functional_tensor(), alias.OLD in sys.modules)
    try:
        import pytorchvideo.transforms
    except ImportError as error:
        before += (error.name,)
    host.alias_functional_tensor()
    import pytorchvideo.transforms

    after = (host.needs_functional_tensor(), pytorchvideo.transforms.RandAugment.__name__)
    aliased = sys.modules[alias.OLD]
    host.alias_functional_tensor()
    return before, after, aliased is sys.modules[alias.OLD]


def test_the_alias_is_put_where_it_is_needed_and_asked_for():
    ((_, (before, after, same)),) = run_isolated(_alias_in_a_fresh_process, [0], num_workers=1, max_seconds=60)
    assert before == (False, True, False, alias.OLD)
    assert after == (False, "RandAugment")
    assert same
    patch = next(patch for patch in MISSING if patch.name == "functional_tensor")
    assert (patch.present, patch.cure) == (alias.needs_functional_tensor, alias.alias_functional_tensor)


def test_no_alias_for_a_pytorchvideo_that_does_not_ask(monkeypatch, tmp_path):
    """Its main branch no longer imports the module; without PyTorchVideo nobody does."""
    (tmp_path / "transforms").mkdir()
    source = tmp_path / "transforms" / "augmentations.py"
    spec = type("Spec", (), {"submodule_search_locations": [str(tmp_path)]})
    find_spec = alias.importlib.util.find_spec
    monkeypatch.setattr(
        alias.importlib.util, "find_spec", lambda name: spec if name == "pytorchvideo" else find_spec(name)
    )
    source.write_text(f"import {alias.OLD} as F_t\n")
    assert alias.needs_functional_tensor()
    source.write_text("import torchvision.transforms.functional as F\n")
    assert not alias.needs_functional_tensor()
    monkeypatch.setattr(
        alias.importlib.util, "find_spec", lambda name: None if name == "pytorchvideo" else find_spec(name)
    )
    assert not alias.needs_functional_tensor()
    with pytest.raises(UserError, match=r"Views works with PyTorchVideo, which is not installed: pip install"):
        host.__getattr__("Views")


# ---------------------------------------------------------------------------------------------- clips and frames


@pytest.mark.parametrize("total", [1, 6, 10, 11, 30, 299])
def test_clips_are_those_of_this_package(total):
    duration, span = Fraction(total, FPS), 10
    uniform = spans(UniformClips(4, 3, fps=FPS, num_clips=3), duration)
    assert uniform == [(int(uniform_clip(total, 4, 3, k, 3)[0]), span, k, 0) for k in range(3)]
    assert spans(UniformClips(4, 3, fps=FPS), duration) == [(int(uniform_clip(total, 4, 3, 0, 1)[0]), span, 0, 0)]
    dense = spans(DenseClips(4, 3, fps=FPS, stride=7), float(duration))
    assert [first for first, *_ in dense] == dense_starts(total, 4, 3, 7).tolist()
    random.seed(5)
    ((first, length, *_),) = spans(RandomClips(4, 3, fps=FPS), duration)
    random.seed(5)
    expected = random_clip(total, 4, 3, np.random.default_rng(random.getrandbits(63)))
    assert (first, length) == (int(expected[0]), span)


def test_each_clip_comes_once_for_every_crop():
    sampler = UniformClips(4, 3, fps=FPS, num_clips=2, num_crops=3)
    places = [(clip, crop) for _, _, clip, crop in spans(sampler, Fraction(30, FPS))]
    assert places == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]
    sampler(0.0, 2.0, {})
    sampler.reset()
    assert len(spans(sampler, Fraction(30, FPS))) == 6


def test_random_clips_reach_every_place():
    sampler = RandomClips(4, 3, fps=FPS)
    random.seed(0)
    assert {spans(sampler, Fraction(13, FPS))[0][0] for _ in range(100)} == {0, 1, 2, 3}


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: RandomClips(0, fps=25), "a clip of 0 frames"),
        (lambda: RandomClips(4, fps=0), "at 0 frames per second"),
        (lambda: RandomClips(4, fps=float("nan")), "at nan frames per second"),
        (lambda: UniformClips(4, fps=25, num_clips=0), "num_clips is 0"),
        (lambda: UniformClips(4, fps=25, num_crops=2), "num_crops is 2. Allowed: 1, 3"),
        (lambda: DenseClips(4, fps=25, stride=0), "stride is 0"),
        (lambda: PickedFrames("centre", fps=25), "Did you mean center"),
        (lambda: PickedFrames("center", 0, fps=25), "count is 0"),
        (lambda: Videos(fps=-1), "fps is -1"),
        (lambda: Views({"a": ViewSpec(pick="center", num_frames=1)}), "none of the views is the clip itself"),
        (lambda: Views({"a": ViewSpec(modality="flow", mean=(0.5,) * 2, std=(0.5,) * 2)}), "views of flow"),
        (lambda: Views(SPECS, num_crops=2), "num_crops is 2"),
    ],
)
def test_wrong_numbers_are_one_sentence(make, sentence):
    with pytest.raises(UserError, match=sentence):
        make()


@pytest.mark.parametrize("reader", [True, False])
def test_frames_are_those_that_were_meant(folder, reader):
    """By this package's reader and by PyTorchVideo's own, to the frame."""
    samples = list(dataset_of(folder, UniformClips(4, 3, fps=FPS, num_clips=3), reader=reader))
    numbers = [shown(sample["video"]) for sample in samples]
    assert numbers == [[*range(k, k + 10)] for k in (0, 10, 20)] * 2 + [[*range(6)]] * 3
    assert [sample["clip_index"] for sample in samples] == [0, 1, 2] * 3


@pytest.mark.parametrize(("pick", "count"), [("center", 1), ("uniform", 3), ("random", 4), ("center", 9)])
def test_picked_frames_alone_are_decoded(folder, pick, count):
    random.seed(3)
    samples = list(dataset_of(folder, PickedFrames(pick, count, fps=FPS)))
    for sample, total in zip(samples, (FRAMES, FRAMES, 6), strict=True):
        parts = sample["video"] if count > 1 else [sample["video"]]
        numbers = [number for part in parts for number in shown(part)]
        assert len(numbers) == len(parts) == min(count, total)
        assert numbers == sorted(set(numbers))
        if pick == "uniform":
            assert numbers == [(2 * k + 1) * total // (2 * count) for k in range(count)]
        if pick == "center":
            assert numbers[0] == (total - len(numbers)) // 2


# ---------------------------------------------------------------------------------------------- views


def corpus_of(folder):
    listing = Listing(str(folder), labeled=True)
    for path, info in videos_of(folder):
        listing.add(path, info["label"])
    return Corpus("ptv", listing)


@pytest.mark.parametrize(("num_clips", "num_crops"), [(1, 1), (3, 3)])
def test_views_are_the_numbers_of_this_package(folder, num_clips, num_crops):
    own = ClipDataset(
        [corpus_of(folder)],
        SPECS,
        clip_spec=CLIP,
        split="test",
        seed=0,
        test_scale=36,
        num_clips=num_clips,
        num_crops=num_crops,
    )
    sampler = UniformClips(4, 3, fps=FPS, num_clips=num_clips, num_crops=num_crops)
    samples = list(dataset_of(folder, sampler, Views(SPECS, train=False, scale=36, num_crops=num_crops)))
    assert len(samples) == 3 * num_clips * num_crops
    for number, sample in enumerate(samples):
        video, view = divmod(number, num_clips * num_crops)
        clip, crop = divmod(view, num_crops)
        theirs = own[SampleKey(0, number, video, clip, crop)]
        batch = {name: value.unsqueeze(0) for name, value in theirs["views"].items()}
        expected = finish_views(batch, SPECS, "cpu")
        assert sample["label"] == video
        assert "video" not in sample
        for name in SPECS:
            torch.testing.assert_close(sample[name], expected[name][0], rtol=0, atol=1e-6)


def test_random_views_share_region_and_mirroring():
    generator = torch.Generator().manual_seed(0)
    video = torch.randint(0, 256, (3, 10, 48, 64), generator=generator)
    specs = {"student/rgb": CLIP, "MINE/rgb": ViewSpec(num_frames=2, pick="random", crop_size=40)}
    random.seed(11)
    found = Views(specs, scales=(36, 44))({"video": video.float(), "label": 1})
    random.seed(11)
    rng = np.random.default_rng(random.getrandbits(63))
    regions = {"shared": random_geometry(48, 64, crop_size=SIZE, scales=(36, 44), flip=True, rng=rng)}
    frames = video.permute(1, 2, 3, 0).to(torch.uint8).numpy()
    clip = Clip(np.arange(10), clip_at(0, 10, 4, 3))
    views = build_views(lambda numbers: frames[numbers], clip, specs, regions, int(rng.integers(0, 2**63)))
    expected = finish_views({name: view.unsqueeze(0) for name, view in views.items()}, specs, "cpu")
    assert found.keys() == {"label", *specs}
    for name in specs:
        assert torch.equal(found[name], expected[name][0])
    raw = Views(specs, train=False, finish=False)({"video": video.to(torch.uint8)})
    assert {name: view.dtype for name, view in raw.items()} == dict.fromkeys(
        [CLIP.pixels, specs["MINE/rgb"].pixels], torch.uint8
    )
    center = fixed_geometry(48, 64, crop_size=SIZE, scale=SIZE)
    direct = build_views(lambda numbers: frames[numbers], clip, {"s": CLIP}, {"shared": center}, 0)
    assert torch.equal(raw[CLIP.pixels], direct[CLIP.pixels])


def test_clips_of_other_lengths():
    video = torch.arange(20.0).view(1, 20, 1, 1).expand(3, 20, 40, 40)
    views = Views({"student": CLIP}, train=False, finish=False)

    def levels(frames):
        return views({"video": video[:, :frames]})[CLIP.pixels][0, :, 0, 0].tolist()

    assert levels(10) == [0, 3, 6, 9]
    assert levels(20) == [0, 6, 12, 18]  # twice the rate that was meant
    assert levels(5) == [0, 3, 1, 4]  # a short video loops
    whole = Views({"student": ViewSpec(num_frames=None, crop_size=SIZE)}, train=False, finish=False)
    assert next(iter(whole({"video": video}).values())).shape == (3, 20, SIZE, SIZE)


def test_changed_values_are_refused():
    views = Views({"student": CLIP}, train=False)
    video = torch.randint(0, 256, (3, 10, 40, 40)).float()
    for wrong in (video / 255, video - 200, video * 2 + 100, torch.full_like(video, float("nan"))):
        with pytest.raises(UserError, match="whole numbers from 0 to 255"):
            views({"video": wrong})
    with pytest.raises(UserError, match=r"is \(10, 3, 40, 40\)"):
        views({"video": video.transpose(0, 1)})


# ---------------------------------------------------------------------------------------------- its dataset


class CollectingViews(Views):
    """Frees what a worker has inherited: a video with threads would make it wait for ever, or crash."""

    def __call__(self, sample):
        gc.collect()
        return super().__call__(sample)


def _all_batches(folder, num_workers):
    dataset = dataset_of(folder, RandomClips(4, 3, fps=FPS), CollectingViews(SPECS, scales=(36, 44)), fps=FPS)
    for _ in range(3):  # left in mid-video, as by a look at the first sample
        first = next(iter(dataset_of(folder, UniformClips(4, 3, fps=FPS, num_clips=3))))
        assert first["video"].shape[1] == 10
    loader = DataLoader(
        dataset, batch_size=2, num_workers=num_workers, multiprocessing_context="fork" if num_workers else None
    )
    return list(loader)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_its_dataset_gives_batches_of_views(folder, num_workers):
    batches = _all_batches(folder, num_workers)
    labels = sorted(int(label) for batch in batches for label in batch["label"])
    assert labels == [0, 1, 2]
    for batch in batches:
        for name, spec in SPECS.items():
            size = len(batch["label"])
            assert batch[name].shape == (size, 3, spec.num_frames, spec.crop_size, spec.crop_size)
            assert torch.isfinite(batch[name]).all()
    assert multiprocessing.active_children() == []


def test_videos_are_resampled_and_their_faults_are_told(folder, tmp_path, caplog):
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"no video")
    with pytest.raises(VideoError, match="cannot be opened"):
        Videos().video_from_path(str(broken))
    assert "broken.mp4" in caplog.text
    path = videos_of(folder)[0][0]
    half = Videos(fps=12.5).video_from_path(path)
    assert half.duration == pytest.approx(FRAMES / FPS)
    assert shown(half.get_clip(0, 1)["video"]) == [*range(0, 25, 2)]
    assert half.get_clip(5, 6) == {"video": None, "audio": None}
    half.close()
    native = Videos().video_from_path(path)
    theirs = EncodedVideo.from_path(path, decode_audio=False)
    assert (native.name, native.duration) == (theirs.name, pytest.approx(float(theirs.duration)))
    span = (Fraction(7, 50), Fraction(21, 50))
    difference = native.get_clip(*span)["video"] - theirs.get_clip(*span)["video"]
    assert difference.abs().max() <= 3  # another conversion to RGB
    native.close()
    theirs.close()


# ---------------------------------------------------------------------------------------------- its networks

NO_STUDENTS = {
    "mvit_base_16": "sees single images",
    "slow_r50_detection": "slow_r50 with DETECTION.ENABLE",
    "slowfast_r50_detection": "slowfast_r50 with DETECTION.ENABLE",
}
"""Builders of its hub that are no clip classifiers, and what to take."""

NO_BACKBONES = {"mvit_base_16x4", "mvit_base_32x3"}
"""Their maps are tokens, with a position embedding for each place of a square picture."""


def test_every_builder_of_its_hub_is_accounted_for():
    builders = {
        name for name, value in vars(hub).items() if callable(value) and value.__module__.startswith(hub.__name__)
    }
    assert builders == set(PYTORCHVIDEO_NAMES) | NO_STUDENTS.keys()
    text = (Path(distinit_plugin.__file__).parents[1] / "docs" / "pytorchvideo.md").read_text("utf-8")
    rows = dict(re.findall(r"^\| `(\w+)` \| (\w+) \|", text, flags=re.MULTILINE))
    assert {name: row for name, row in rows.items() if name in PYTORCHVIDEO_NAMES} == {
        name: "no" if name in NO_BACKBONES else "yes" for name in PYTORCHVIDEO_NAMES
    }
    for name, instead in NO_STUDENTS.items():
        assert re.search(rf"`{name}`[^.]*{instead.split()[0]}", text), name


@pytest.mark.parametrize("name", ["slowfast_r50", "x3d_xs", "mvit_base_16x4"])
def test_its_networks_are_backbones(name):
    """One of each kind (their siblings share its builder); as students all of them are in ``test_models``."""
    clip = InputSpec(num_frames=16, train_crop_size=64, test_crop_size=64)
    boxes = torch.tensor([[0.0, 4, 4, 40, 60], [1.0, 10, 0, 64, 30], [1.0, 0, 0, 64, 64]])
    with torch.device("meta"), torch.no_grad():
        student = build_network(f"pytorchvideo/{name}", num_classes=0, input=clip)
        if name in NO_BACKBONES:
            with pytest.raises(UserError, match="no feature maps with height and width"):
                roi_layers(student, "")
            return
        layers = roi_layers(student, "")
        network = RoiNetwork(student, layers, num_classes=7)
        detected = network({"rgb": torch.empty(2, 3, 16, 64, 96)}, boxes=boxes.to("meta"))
    assert detected.logits.shape == (3, 7)
    # Both pathways of SlowFast are cut from: their channels stand one after the other.
    assert network.roi_head.projection.in_features == {"slowfast_r50": 2048 + 256, "x3d_xs": 192}[name]


# ---------------------------------------------------------------------------------------------- the page


def test_the_example_of_the_page_runs(tmp_path, folder):
    """With other videos, sizes and a teacher without a download; everything else as it stands."""
    text = (Path(distinit_plugin.__file__).parents[1] / "docs" / "pytorchvideo.md").read_text("utf-8")
    program = re.search(r"```python\n(import torch\n.*?)```", text, flags=re.DOTALL).group(1)
    assert 15 <= len([line for line in program.splitlines() if line.strip()]) <= 25
    weights = write_teacher(tmp_path / "teacher.pth")
    teacher = f'build_teacher("Res2D", "{weights}", num_classes=4, depth=10, width=8, crop_size={SIZE})'
    for old, new in (
        ('build_teacher("torchvision/resnet50", "IMAGENET1K_V1")', teacher),
        ('"videos"', f'"{folder}"'),
        (
            "num_frames=4, sampling_rate=12, train_crop_size=160",
            f"num_frames=4, sampling_rate=3, train_crop_size={SIZE}",
        ),
        ("RandomClips(4, 12, fps=30)", "RandomClips(4, 3, fps=30)"),
        ("num_workers=4", "num_workers=0"),
        ("batch_size=16", "batch_size=3"),
    ):
        assert program.count(old) == 1, old
        program = program.replace(old, new)
    torch.manual_seed(0)
    names = {}
    exec(program, names)
    assert torch.isfinite(names["loss"])
    assert names["loss"].requires_grad
    assert len(LabeledVideoPaths.from_path(str(folder))) == 3
