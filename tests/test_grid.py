"""The grid of clips, crops and frames: what is drawn, and that samples show what its numbers say."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from videos import write_video

from distinit_plugin.data.dataset import ClipDataset
from distinit_plugin.data.targets import CachedTargets, rows_of
from distinit_plugin.errors import UserError, VideoError
from distinit_plugin.objectives import Objective, Term
from distinit_plugin.teachers import freeze
from distinit_plugin.teachers.cache import TargetLayout, TargetStore
from distinit_plugin.teachers.cached import CachedNetwork
from distinit_plugin.types import STORED, SampleKey, ViewSpec
from distinit_plugin.video.corpus import Mixture, load_corpus
from distinit_plugin.video.grid import Grid, Place, frames_of_grid
from distinit_plugin.video.transforms import Geometry, build_views, picked_frames, view_positions

CLIP = ViewSpec(num_frames=4, sampling_rate=2, crop_size=16)
TEACHER = ViewSpec(num_frames=1, pick="random", crop_size=24, pick_from=2)


@pytest.mark.parametrize(("count", "frames"), [(0, range(8)), (1, [4]), (2, [2, 6]), (3, [1, 4, 6]), (8, range(8))])
def test_frames_of_the_grid(count, frames):
    assert frames_of_grid(8, count).tolist() == list(frames)


def test_picks_stay_on_the_grid():
    spec = replace(TEACHER, num_frames=2, pick_from=3)
    seen = {tuple(view_positions(spec, 8, seed).tolist()) for seed in range(40)}
    assert seen == {(1, 4), (1, 6), (4, 6)}
    for seed in range(5):
        assert frames_of_grid(8, 3)[picked_frames(spec, 8, seed)].tolist() == view_positions(spec, 8, seed).tolist()
    assert view_positions(replace(spec, pick="center", num_frames=1), 8, 0).tolist() == [4]
    assert view_positions(replace(spec, pick="uniform"), 8, 0).tolist() == [1, 6]
    free = {tuple(view_positions(replace(spec, pick_from=0), 8, seed).tolist()) for seed in range(200)}
    assert len(free) == 28


def test_views_that_differ_have_names_of_their_own():
    views = [TEACHER, replace(TEACHER, pick_from=3), replace(TEACHER, crop="center"), replace(TEACHER, pick_from=0)]
    assert len({view.pixels for view in views}) == 4
    assert replace(TEACHER, mean=(0.1, 0.1, 0.1)).pixels == TEACHER.pixels


def test_every_place_of_the_grid_is_drawn():
    grid = Grid(clips=2, crops=3, scale=20, flip=True)
    rng = np.random.default_rng(0)
    drawn = Counter(grid.draw(rng) for _ in range(1200))
    assert set(drawn) == {Place(clip, crop) for clip in range(2) for crop in range(6)}
    assert min(drawn.values()) > 60
    assert Grid().draw(rng) == Place()
    assert Grid(clips=1).draw(rng) == Place(0, None)
    assert replace(grid, flip=False).crops_per_clip == 3


def test_a_centre_crop_beside_a_shared_one():
    frames = np.random.default_rng(0).integers(0, 255, (4, 20, 30, 3), dtype=np.uint8)
    clip = type("AllFrames", (), {"__len__": lambda self: 4, "frames": lambda self, picked: picked})()
    specs = {"a": replace(CLIP, crop_size=8), "b": replace(CLIP, crop_size=8, crop="center")}
    shared, center = Geometry(3, 1, 8, 8, True), Geometry(6, 11, 8, 8)
    views = build_views(lambda numbers: frames[numbers], clip, specs, {"shared": shared, "center": center}, 0)
    expected = torch.from_numpy(frames).permute(3, 0, 1, 2)
    assert torch.equal(views[specs["a"].pixels], expected[:, :, 3:11, 1:9].flip(-1))
    assert torch.equal(views[specs["b"].pixels], expected[:, :, 6:14, 11:19])
    outer = shared.joined(center)
    assert (outer.top, outer.left, outer.height, outer.width) == (3, 1, 11, 18)
    assert center.inside(outer) == Geometry(3, 10, 8, 8)


# ------------------------------------------------------------------------------------------------------- in a dataset
@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Mixture:
    folder = tmp_path_factory.mktemp("videos")
    for number in range(2):
        rng = np.random.default_rng(number)
        pictures = rng.integers(0, 255, (20, 20, 36, 3), dtype=np.uint8)
        write_video(folder / f"{number}.mp4", 20, 20, 36, pattern=lambda i, height, width, p=pictures: p[i])
    return Mixture([load_corpus("folder", "X", path=str(folder))])


@pytest.mark.parametrize("crop", ["shared", "center"])
def test_training_shows_what_the_places_number(corpus, crop):
    """A sample of the training is the one that the numbered place gives in the order of a test."""
    grid = Grid(clips=2, crops=3, scale=18, flip=True)
    teacher = replace(TEACHER, num_frames=2, pick="uniform", crop=crop)
    specs = {"student/rgb": CLIP, "TEACHER/rgb": teacher}
    train = ClipDataset(corpus, specs, clip_spec=CLIP, split="train", seed=0, grid=grid)
    numbered = ClipDataset(corpus, specs, clip_spec=CLIP, split="test", seed=0, test_scale=18, num_clips=2, num_crops=3)
    places = {
        (clip, number): numbered[SampleKey(0, 0, 0, clip, number)]["views"] for clip in range(2) for number in range(6)
    }
    found = Counter()
    for position in range(30):
        views = train[SampleKey(0, position, 0)]["views"]
        same = [place for place, other in places.items() if torch.equal(other[CLIP.pixels], views[CLIP.pixels])]
        assert len(same) == 1
        assert torch.equal(places[same[0]][teacher.pixels], views[teacher.pixels])
        found[same[0]] += 1
    assert len(found) > 8
    if crop == "center":
        assert all(torch.equal(places[0, 0][teacher.pixels], places[0, n][teacher.pixels]) for n in range(6))
    assert not torch.equal(places[0, 0][CLIP.pixels], places[0, 3][CLIP.pixels])
    assert torch.equal(places[0, 0][CLIP.pixels].flip(-1), places[0, 3][CLIP.pixels])


def store_of(folder: Path, corpus: Mixture, **values: object) -> TargetStore:
    """Targets that say where they are from: row, entry and frame."""
    layout = TargetLayout(
        **{
            **{"layer": "logits", "shape": (3,), "dtype": "float32", "videos": len(corpus), "clips": 2, "crops": 6},
            **{"frames": 2, "each_frame": True, "shard_videos": 1, "feature_dim": 5},
            **values,
        }
    )
    store = TargetStore.settle(folder, layout, {"teacher": "x"}, {}, corpus.names())
    for shard in range(layout.shards):
        places = np.indices(layout.shard_shape(shard)[:3]).transpose(1, 2, 3, 0).astype(layout.dtype)
        places[..., 0] = shard
        store.write(shard, places, {})
    store.finish()
    return TargetStore.open(folder)


def test_targets_are_those_of_the_clip_crop_and_frames_that_are_shown(corpus, tmp_path):
    store = store_of(tmp_path / "store", corpus)
    cached = CachedTargets(store, rows_of(store, corpus), replace(TEACHER, num_frames=2))
    grid = Grid(clips=2, crops=3, scale=18, flip=True)
    data = ClipDataset(
        corpus, {"s": CLIP}, clip_spec=CLIP, split="train", seed=0, grid=grid, targets={"TEACHER": cached}
    )
    seen = Counter()
    for position in range(60):
        target = data[SampleKey(0, position, position % 2)]["targets"]["TEACHER"]
        assert target.shape == (2, 3)
        assert target[:, 0].tolist() == [position % 2] * 2
        assert target[:, 2].tolist() == [0, 1]
        seen[int(target[0, 1])] += 1
    assert set(seen) == set(range(12))
    one = CachedTargets(store, rows_of(store, corpus), TEACHER)
    frames = {int(one.read("x", 1, Place(1, 5), 4, seed)[0, 2]) for seed in range(20)}
    assert frames == {0, 1}
    assert one.read("x", 1, Place(1, 5), 4, 0)[0, :2].tolist() == [1, 11]
    store.bad[0] = "it is dark"
    with pytest.raises(VideoError, match="no stored targets: it is dark"):
        one.read("x", 0, Place(0, 0), 4, 0)
    store.place(1).unlink()
    with pytest.raises(VideoError, match="cannot be read"):
        one.read("x", 1, Place(0, 0), 4, 0)


def test_names_of_several_corpora_do_not_meet(corpus):
    folder = corpus.corpora[0].root
    both = Mixture([load_corpus("folder", name, path=folder) for name in ("A", "B")])
    assert list(both.names()) == ["A/0.mp4", "A/1.mp4", "B/0.mp4", "B/1.mp4"]
    assert list(corpus.names()) == ["0.mp4", "1.mp4"]


# ------------------------------------------------------------------------------------------------------- as a teacher
def test_what_is_stored_comes_out_as_the_network_would_give_it(tmp_path, corpus):
    store = store_of(tmp_path / "store", corpus)
    teacher = freeze(CachedNetwork(store.layout))
    assert (teacher.num_classes, teacher.feature_dim, dict(teacher.layers)) == (3, 5, {})
    assert dict(teacher.view_specs("train")) == {}
    stored = torch.randn(4, 2, 3).half()
    output = teacher({STORED: stored})
    assert torch.equal(output.logits, stored.float().mean(dim=1))
    assert output.features is None
    of_map = replace(store.layout, layer="feature_map", shape=(3, 2, 2), temporal_stride=1, spatial_stride=8)
    network = CachedNetwork(of_map)
    assert network.layers["feature_map"] == (3, 1, 8)
    stored = torch.randn(4, 2, 3, 5, 5)
    assert torch.equal(network({STORED: stored}, taps=["feature_map"]).taps["feature_map"], stored.transpose(1, 2))
    whole = CachedNetwork(replace(store.layout, layer="features", frames=1, each_frame=False))
    stored = torch.randn(4, 1, 3)
    assert torch.equal(whole({STORED: stored}).features, stored[:, 0])


def test_a_teacher_cannot_be_named_like_the_labels(tmp_path, corpus):
    from toys import ToyNetwork

    teacher = freeze(CachedNetwork(store_of(tmp_path / "store", corpus).layout))
    term = Term("T", "logits", lambda prediction, target: prediction.sum(1), teacher="label")
    with pytest.raises(UserError, match="cannot be named 'label'"):
        Objective(ToyNetwork(), [term], {"label": teacher}, {})
