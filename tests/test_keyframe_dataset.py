"""Samples of keyframes: the same from videos and from frames, boxes with their pixels, bad files, batches, workers."""

import os
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from videos import frame_numbers, write_video

from distinit_plugin.data.collate import collate
from distinit_plugin.data.colour import ColourAugmentation
from distinit_plugin.data.keyframes import KeyframeDataset
from distinit_plugin.data.loader import build_batch_loader, build_loader
from distinit_plugin.data.sampler import ClipSampler, KeyframeBatches
from distinit_plugin.detection.files import read_boxes, read_frame_list, read_truth
from distinit_plugin.detection.geometry import to_fractions
from distinit_plugin.detection.keyframes import Choice, Keyframes, Moment, evaluated_keyframes, training_keyframes
from distinit_plugin.detection.sources import FrameFiles, VideoFiles
from distinit_plugin.errors import UserError
from distinit_plugin.types import ACTIONS, BOXES, SampleKey, ViewSpec

SPEC = ViewSpec(num_frames=4, sampling_rate=3, target_fps=30, crop_size=48)
WHOLE = replace(SPEC, crop="whole")
ALL = Choice()


def sources(persons, kind, split):
    if kind == "videos":
        return VideoFiles(persons.videos, start=900)
    lists = None if kind == "folders" else read_frame_list(persons.frame_lists / f"{split}.csv")
    return FrameFiles(persons.frames, lists)


def train_set(persons, kind="videos", truth="ava_train_v2.2.csv", **kwargs) -> KeyframeDataset:
    table = read_truth(persons.annotations / truth)
    keyframes = training_keyframes("train", [table], [], sources(persons, kind, "train"), choice=ALL, least_score=0.9)
    return dataset(keyframes, "train", SPEC, **kwargs)


def evaluated_set(persons, kind="videos", boxes="ground_truth", **kwargs) -> KeyframeDataset:
    read, name = (read_boxes, "predicted_boxes") if boxes == "predicted" else (read_truth, "v2.2")
    keyframes = evaluated_keyframes(
        "val",
        read(persons.annotations / f"ava_val_{name}.csv"),
        sources(persons, kind, "val"),
        choice=ALL,
        boxes=boxes,
        least_score=0.9,
    )
    return dataset(keyframes, "test", WHOLE, **kwargs)


def dataset(keyframes, split, spec, **kwargs) -> KeyframeDataset:
    options = {"num_classes": 8, "seed": 1, "scales": (48, 60), "clip_spec": spec, "specs": {"student/rgb": spec}}
    return KeyframeDataset(keyframes, split=split, **(options | kwargs))


def keys_of(data, epoch=0):
    return [SampleKey(epoch, index, index) for index in range(len(data))]


def assert_equal(first, second):
    for name in ("views", "targets"):
        assert first[name].keys() == second[name].keys()
        for key, value in first[name].items():
            assert torch.equal(value, second[name][key]), (name, key)
    assert first["region"] == second["region"]
    assert first["key"] == second["key"]
    assert first["bad"] == second["bad"] == []


# ------------------------------------------------------------------------------------------------ the same samples
@pytest.mark.parametrize("make", [train_set, evaluated_set])
def test_videos_lists_of_frames_and_folders_give_the_same_samples(persons, make):
    colour = ColourAugmentation()
    data = [make(persons, kind, colour=colour) for kind in ("videos", "lists", "folders")]
    assert len({len(part) for part in data}) == 1
    assert len(data[0]) > 4
    for key in keys_of(data[0], epoch=3):
        samples = [part[key] for part in data]
        assert_equal(samples[0], samples[1])
        assert_equal(samples[0], samples[2])
        assert samples[0]["views"][data[0].specs["student/rgb"].pixels].float().std() > 5


def test_a_sample_is_a_function_of_seed_and_key(persons):
    data, again, other = train_set(persons), train_set(persons), train_set(persons, seed=2)
    key = SampleKey(2, 5, 1)
    first = data[key]
    data[SampleKey(0, 0, 2)]
    assert_equal(first, data[key])
    assert_equal(first, again[key])
    assert other[key]["region"] != first["region"]
    assert data[SampleKey(3, 5, 1)]["region"] != first["region"]


# ------------------------------------------------------------------------------------------------------- the clip
def number_source(tmp_path, start, fps=25, num_frames=100):
    write_video(tmp_path / "a.mp4", num_frames, fps=fps)
    return VideoFiles(tmp_path, start=start)


def numbers_at(source, second, spec):
    keyframes = Keyframes("x", [Moment("a", second)], None, source)
    data = dataset(keyframes, "test", spec)
    view = data[SampleKey(0, 0, 0)]["views"][spec.pixels]
    return frame_numbers(view.permute(1, 2, 3, 0).numpy())


@pytest.mark.parametrize("second", [10, 11, 12.5, 13])
@pytest.mark.parametrize(("target", "num_frames", "rate"), [(30.0, 8, 2), (30.0, 5, 4), (None, 8, 2), (25.0, 4, 1)])
def test_the_clip_lies_around_the_frame_on_the_screen(tmp_path, second, target, num_frames, rate):
    spec = replace(WHOLE, num_frames=num_frames, sampling_rate=rate, target_fps=target, crop_size=64)
    shown = numbers_at(number_source(tmp_path, 10), second, spec)
    fps = target or 25.0
    total = int(99 / 25 * fps + 1e-6) + 1
    center = int((second - 10) * fps + 1e-6)
    places = [min(max(center + (t - num_frames // 2) * rate, 0), total - 1) for t in range(num_frames)]
    assert shown == [min(int(place / fps * 25 + 1e-6), 99) for place in places]
    if second not in (10, 13):
        assert shown[num_frames // 2] == int((second - 10) * 25)


def test_the_view_of_the_keyframe_is_that_frame(persons):
    single = replace(SPEC, num_frames=1, pick="keyframe", crop_size=64)
    whole = replace(single, crop="whole")
    data = train_set(persons, specs={"student/rgb": SPEC, "student/keyframe": single})
    test = evaluated_set(persons, specs={"student/rgb": WHOLE, "student/keyframe": whole})
    clip = replace(SPEC, crop_size=64)
    longer = train_set(persons, specs={"student/rgb": SPEC, "student/long": clip})
    key = SampleKey(0, 0, 1)
    assert torch.equal(data[key]["views"][single.pixels][:, 0], longer[key]["views"][clip.pixels][:, 2])
    sample = test[SampleKey(0, 0, 1)]
    assert sample["views"][whole.pixels].shape == (3, 1, 64, 96)
    moment = test.keyframes.moment(1)
    with test.keyframes.sources.open(moment.video, moment.second, cache=None, timeout=None) as reader:
        frame = reader.read([int(moment.second - 900) * 25])[0]
    assert np.array_equal(sample["views"][whole.pixels][:, 0].permute(1, 2, 0).numpy(), frame)


def test_keyframes_beyond_the_video_are_bad(tmp_path):
    source = number_source(tmp_path, 10)
    moments = [Moment("a", 9.0), Moment("a", 14.9), Moment("a", 15.0)]
    data = dataset(Keyframes("x", moments, None, source), "test", WHOLE)
    samples = [data[key] for key in keys_of(data)]
    assert [bool(sample["views"]) for sample in samples] == [False, True, False]
    assert "of 10 to 13.96 s, but a keyframe is at 15 s (see KEYFRAMES.VIDEO_START" in samples[2]["bad"][0].reason


# ---------------------------------------------------------------------------------------------------------- boxes
def test_boxes_of_a_training_lie_in_the_view(persons):
    data = train_set(persons, scales=(48, 90))
    lost = kept = 0
    for epoch in range(4):
        for key in keys_of(data, epoch):
            sample = data[key]
            boxes, actions = sample["targets"][BOXES], sample["targets"][ACTIONS]
            assert boxes.dtype == actions.dtype == torch.float32
            assert boxes.shape == (len(actions), 4)
            assert actions.shape[1] == 8
            assert (boxes >= 0).all()
            assert (boxes <= 48).all()
            assert (boxes[:, 2:] > boxes[:, :2]).all()
            expected = data.keyframes.boxes(key.index)
            # A row that is left is the whole box, or it touches the border where it was cut.
            for box, does in zip(boxes, actions, strict=True):
                back = to_fractions(box.numpy(), sample["region"])[0]
                inside = (box > 0.01) & (box < 47.99)
                inside = inside[[2, 1, 0, 3]] if sample["region"].flip else inside
                errors = np.where(inside.numpy(), np.abs(expected - back), 0).max(axis=1)
                match = int(errors.argmin())
                assert errors[match] < 1e-6
                known = data.keyframes.actions(key.index, 8)
                assert any(np.array_equal(does, known[row]) for row in np.flatnonzero(errors < 1e-6))
            kept += len(boxes)
            lost += len(expected) - len(boxes)
    assert lost > 0
    assert kept > lost


def test_a_crop_may_leave_nobody(persons):
    data = train_set(persons, scales=(400, 400))
    samples = [data[key] for epoch in range(3) for key in keys_of(data, epoch)]
    empty = [sample for sample in samples if not len(sample["targets"][BOXES])]
    assert empty
    batch = collate(empty[:2])
    assert batch["targets"][BOXES].shape == (0, 5)
    assert batch["targets"][ACTIONS].shape == (0, 8)
    assert len(batch["regions"]) == 2


@pytest.mark.parametrize("boxes", ["predicted", "ground_truth", "none"])
def test_rows_of_a_test_are_those_of_the_file(persons, boxes):
    data = evaluated_set(persons, boxes=boxes)
    for key in keys_of(data):
        for mirrored in (False, True):
            sample = data[key._replace(crop=int(mirrored))]
            assert sample["views"][WHOLE.pixels].shape == (3, 4, 48, 72)
            assert sample["region"].flip == mirrored
            assert (
                set(sample["targets"]) == {"predicted": {BOXES}, "ground_truth": {BOXES, ACTIONS}, "none": set()}[boxes]
            )
            if boxes == "none":
                continue
            back = to_fractions(sample["targets"][BOXES].numpy(), sample["region"])
            np.testing.assert_allclose(back, data.keyframes.boxes(key.index), atol=1e-6)
        plain = data[key]["views"][WHOLE.pixels]
        assert torch.equal(plain.flip(-1), data[key._replace(crop=1)]["views"][WHOLE.pixels])
    assert len(data) > 3


def test_actions_beyond_the_classes_are_refused_before_the_job(persons):
    with pytest.raises(UserError, match=r"MODEL.NUM_CLASSES 5"):
        train_set(persons, num_classes=5)


# ------------------------------------------------------------------------------------------------------ bad files
@pytest.fixture
def broken(persons, tmp_path):
    """A copy of the frames, of which one of the second keyframe's clip is missing and another one is damaged."""
    data = evaluated_set(persons, "lists")
    video, second = data.keyframes.moment(1)
    shutil.copytree(persons.frames, tmp_path / "frames", copy_function=os.link)
    (tmp_path / "frames" / video / f"{video}_{int(second - 900) * 30 + 1 + 3:06d}.png").unlink()
    (tmp_path / "frames" / video / f"{video}_000001.png").unlink()  # of no clip
    lists = read_frame_list(persons.frame_lists / "val.csv")
    data.keyframes.sources = FrameFiles(tmp_path / "frames", lists)
    return data


def test_a_missing_frame_costs_its_keyframe_alone(broken):
    samples = [broken[key] for key in keys_of(broken)]
    assert [bool(sample["views"]) for sample in samples] == [True, False] + [True] * (len(samples) - 2)
    assert samples[1]["bad"][0].reason.startswith("frame file val_")
    assert "No such file" in samples[1]["bad"][0].reason
    batch = collate(samples)
    assert len(batch["keys"]) == len(batch["regions"]) == len(samples) - 1
    assert len(batch["bad"]) == 1
    numbers = batch["targets"][BOXES][:, 0]
    assert numbers.unique().tolist() == list(range(len(samples) - 1))
    assert broken[SampleKey(0, 1, 1)]["views"] == {}  # known by now
    broken.remember(samples[1]["bad"])
    assert broken[SampleKey(0, 0, 0)]["views"]


def test_bad_keyframes_of_a_training_are_replaced(persons, tmp_path):
    shutil.copytree(persons.videos, tmp_path / "videos")
    name = persons.names("train")[0]
    (tmp_path / "videos" / f"{name}.mp4").unlink()
    (tmp_path / "videos" / f"{persons.names('train')[1]}.mp4").write_bytes(b"no video")
    table = read_truth(persons.annotations / "ava_train_v2.2.csv")
    source = VideoFiles(tmp_path / "videos", start=900)
    keyframes = training_keyframes("train", [table], [], source, choice=ALL, least_score=0)
    assert keyframes.notes == [
        f"1 of 3 videos are annotated but have no pictures: {name}. Their keyframes count as bad."
    ]
    data = dataset(keyframes, "train", SPEC)
    paths = set()
    for key in keys_of(data):
        sample = data[key]
        assert sample["views"]
        assert len(sample["targets"][BOXES]) == len(sample["targets"][ACTIONS])
        paths |= {bad.path for bad in sample["bad"]}
    assert len(paths) == 2
    assert keyframes.num_videos == 3
    (tmp_path / "videos" / f"{persons.names('train')[2]}.mp4").unlink()
    with pytest.raises(UserError, match=r"11 videos in a row are bad.*there is no video of this name"):
        data[SampleKey(1, 0, 0)]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: VideoFiles(folder / "nowhere"), "nowhere cannot be read: No such file"),
        (lambda folder: VideoFiles(folder), r"has no videos \(files that end in .mp4"),
    ],
)
def test_folders_without_videos(tmp_path, make, message):
    (tmp_path / "a.txt").touch()
    with pytest.raises(UserError, match=message):
        make(tmp_path)


def test_endings_of_videos(tmp_path):
    for name in ("a.mkv", "a.mp4", "b.c.WEBM", "d.jpg"):
        (tmp_path / name).touch()
    found = VideoFiles(tmp_path)
    assert found.path("a") == str(tmp_path / "a.mp4")
    assert found.path("b.c") == str(tmp_path / "b.c.WEBM")
    assert [found.has(name) for name in ("a", "b.c", "b", "d")] == [True, True, False, False]


def test_frames_of_several_videos_in_one_folder(persons, tmp_path):
    """Their numbers are the same, so that what is kept of one must not be taken for the other's."""
    lists = read_frame_list(persons.frame_lists / "val.csv")
    flat = {name: [os.path.basename(path) for path in paths] for name, paths in lists.items()}
    for name, paths in lists.items():
        for path, link in zip(paths, flat[name], strict=True):
            os.link(persons.frames / path, tmp_path / link)
    data, expected = evaluated_set(persons), evaluated_set(persons)
    data.keyframes.sources = FrameFiles(tmp_path, flat)
    moments = [data.keyframes.moment(index) for index in range(len(data))]
    second = next(s for s in (902.0, 903.0, 904.0, 905.0) if [moment.second for moment in moments].count(s) == 2)
    keys = [key for key, moment in zip(keys_of(data), moments, strict=True) if moment.second == second]
    for key in keys:
        assert_equal(data[key], expected[key])


# -------------------------------------------------------------------------------------------------------- batches
def test_batches_hold_keyframes_of_one_video_once():
    videos = [0] * 5 + [1] * 1 + [2] * 4
    for world_size in (1, 2, 3, 8):
        parts = [
            list(KeyframeBatches(videos, 2, crop=1, rank=rank, world_size=world_size)) for rank in range(world_size)
        ]
        assert [len(KeyframeBatches(videos, 2, rank=r, world_size=world_size)) for r in range(world_size)] == [
            len(part) for part in parts
        ]
        batches = [batch for part in parts for batch in part]
        assert sorted(key.index for batch in batches for key in batch) == list(range(10))
        assert all(len({videos[key.index] for key in batch}) == 1 for batch in batches)
        assert max(map(len, batches)) == 2
        assert len(batches) == 6
        assert {key.crop for batch in batches for key in batch} == {1}
        assert max(map(len, parts)) - min(map(len, parts)) <= 1
    assert list(KeyframeBatches([], 2)) == []


def test_batches_from_workers(persons):
    data = train_set(persons)
    sampler = ClipSampler(
        data.keyframes.sizes, data.keyframes.weights, num_clips_per_epoch=0, global_batch_size=2, seed=0
    )
    batches = list(build_loader(data, sampler, 2, num_workers=2, drop_last=True))
    assert len(batches) == len(data) // 2
    for batch in batches:
        samples = [data[key] for key in batch["keys"]]
        assert torch.equal(
            batch["views"][SPEC.pixels], torch.stack([sample["views"][SPEC.pixels] for sample in samples])
        )
        assert batch["regions"] == [sample["region"] for sample in samples]
        rows = [
            [float(number), *box.tolist()] for number, sample in enumerate(samples) for box in sample["targets"][BOXES]
        ]
        assert batch["targets"][BOXES].tolist() == rows
        assert torch.equal(batch["targets"][ACTIONS], torch.cat([sample["targets"][ACTIONS] for sample in samples]))
    test = evaluated_set(persons)
    keys = [
        key
        for batch in build_batch_loader(test, KeyframeBatches(test.keyframes.video, 3), num_workers=1)
        for key in batch["keys"]
    ]
    assert [key.index for key in keys] == list(range(len(test)))


# --------------------------------------------------------------------------------------------------------- colour
def test_colours_of_a_training_change_and_nothing_else(persons):
    plain, coloured = train_set(persons), train_set(persons, colour=ColourAugmentation())
    differing = 0
    for key in keys_of(plain):
        first, second = plain[key], coloured[key]
        assert first["region"] == second["region"]
        assert torch.equal(first["targets"][BOXES], second["targets"][BOXES])
        differing += not torch.equal(first["views"][SPEC.pixels], second["views"][SPEC.pixels])
    assert differing == len(plain)
    test = evaluated_set(persons, colour=ColourAugmentation())
    assert_equal(test[SampleKey(0, 0, 0)], evaluated_set(persons)[SampleKey(0, 0, 0)])


def test_colour_arithmetic():
    """Against the description: factors in a random order, then principal components, cut to bytes at the end."""
    view = torch.randint(0, 256, (3, 2, 5, 7), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    options = ColourAugmentation(0.4, 0.5, (1.0, 0.5, 0.25), ((1, 0, 0.5), (0, 1, 0), (0, 0, -1)))
    weights = np.array([0.299, 0.587, 0.114])
    for seed in range(6):
        rng = np.random.default_rng(seed)
        factors, order, alphas = 1 + rng.uniform(-0.4, 0.4, 3), rng.permutation(3), 0.5 * rng.normal(0, 1, 3)
        pixels = view.numpy().astype(np.float64) / 255
        for step in order:
            grey = np.einsum("c,cthw->thw", weights, pixels)[None]
            other = [0 * grey, grey.mean(axis=(-2, -1), keepdims=True), grey][step]
            pixels = factors[step] * pixels + (1 - factors[step]) * other
        for channel, row in enumerate(options.eigenvectors):
            pixels[channel] += sum(
                value * alpha * size for value, alpha, size in zip(row, alphas, options.eigenvalues, strict=True)
            )
        expected = np.clip(np.round(pixels * 255), 0, 255)
        made = options.draw(np.random.default_rng(seed))(view)
        assert made.dtype == torch.uint8
        assert np.abs(made.numpy() - expected).max() <= 1  # rounding
        assert np.abs(made.numpy() - view.numpy().astype(int)).max() > 10
    off = ColourAugmentation(jitter=0, lighting=0)
    assert torch.equal(off.draw(np.random.default_rng(0))(view), view)
