"""Runs on cached targets: equal to live ones bit for bit, resumed after kills, refused where anything differs."""

import json
import multiprocessing
import os
import re
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from cached_jobs import (
    GRID,
    NAME,
    fill,
    flow_entry,
    image_entry,
    job,
    write_flow_teacher,
    write_image_teacher,
    write_world,
)
from flows import contents
from small_jobs import differing, json_stats, small_settings, state_of
from videos import write_video

from distinit_plugin.cli import main
from distinit_plugin.errors import ConfigError, UserError
from distinit_plugin.jobs import caching
from distinit_plugin.jobs.running import run
from distinit_plugin.teachers.cache import TargetStore


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    return write_world(tmp_path_factory.mktemp("world"))


def losses(output: Path) -> list[dict[str, float]]:
    kept = []
    for kind in ("train_iter_", "val_epoch"):
        for line in json_stats(output, kind):
            kept.append({key: value for key, value in line.items() if re.match("loss|entropy|kept|agreement|top", key)})
    assert len(kept) == 3
    return kept


def assert_same_runs(one: Path, other: Path) -> None:
    first, second = state_of(one), state_of(other)
    assert differing(first["model_state"], second["model_state"]) == []
    assert differing(first["distinit"]["adapters"], second["distinit"]["adapters"]) == []
    assert losses(one) == losses(other)


# ------------------------------------------------------------------------------------------------ cached equals live
@pytest.mark.parametrize("view", ["shared", "center"])
def test_random_frames_of_an_image_teacher_and_its_gate(world, tmp_path, view):
    entry = image_entry(world, VIEW=view)
    sections = {"DATA_LOADER": {"NUM_WORKERS": 1 if view == "center" else 0}}
    grid = {"shared": {"CROPS": 3}, "center": {"CROPS": 0, "FRAMES": 0}}
    sections["DISTILL"] = {"GRID": grid[view]}
    live = job(world, tmp_path / "live", entry, **sections)
    parts = fill(live, tmp_path / "cache")
    assert [part.clips for part in parts] == [4 * 2 * (3 * 2 if view == "shared" else 1), 2]
    assert [part.bad for part in parts] == [[], []]
    frames = 2 if view == "shared" else 4
    assert {part.bytes_per_clip for part in parts} == {frames * 4 * 4}
    run(live)
    entry |= {"CACHE": str(tmp_path / "cache")}
    run(job(world, tmp_path / "cached", entry, **sections))
    assert_same_runs(tmp_path / "live", tmp_path / "cached")
    assert 0 < np.mean([line["kept/TEACHER"] for line in losses(tmp_path / "live")]) < 1
    if view == "center":
        return
    # The control: two frames are another target.
    run(job(world, tmp_path / "other", {**entry, "NUM_PICKED_FRAMES": 2}, **sections))
    assert losses(tmp_path / "other") != losses(tmp_path / "live")


@pytest.mark.parametrize("stored", [False, True], ids=["live flow", "stored flow"])
def test_a_teacher_of_flow(world, tmp_path, stored):
    flow = {"FLOW": {"STORE": str(world / "flow")}} if stored else {}
    live = job(world, tmp_path / "live", flow_entry(world), **flow)
    fill(live, tmp_path / "cache")
    run(live)
    # Neither the weights nor the store have to be there.
    away = {"FLOW": {"STORE": str(tmp_path / "nowhere")}} if stored else {}
    entry = flow_entry(world, CACHE=str(tmp_path / "cache"), WEIGHTS=str(tmp_path / "elsewhere" / "flow.pth"))
    run(job(world, tmp_path / "cached", entry, **away))
    assert_same_runs(tmp_path / "live", tmp_path / "cached")
    assert "flow " not in (tmp_path / "cached" / "stdout.log").read_text().split("trained")[0].partition("step")[2]


def test_maps_are_cached_too(world, tmp_path):
    entry = image_entry(world, LAYER="feature_map", LOSS="mse", MAX_ENTROPY=-1, NUM_PICKED_FRAMES=2)
    live = job(world, tmp_path / "live", entry)
    fill(live, tmp_path / "cache")
    assert TargetStore.open(tmp_path / "cache" / "train").layout.shape == (64, 1, 1)
    run(live)
    run(job(world, tmp_path / "cached", {**entry, "CACHE": str(tmp_path / "cache")}))
    assert_same_runs(tmp_path / "live", tmp_path / "cached")


def test_frames_of_one_cache_serve_every_pick_among_them_and_parts_of_its_corpus(world, cache, tmp_path):
    listed = tmp_path / "few.csv"
    listed.write_text("dark/video1.mp4 1\nbright/video0.mp4 0\n")
    few = {"FORMAT": "csv", "PATH": str(listed), "ROOT": str(world / "videos" / "train"), "LABELED": True}
    classes = {"CORPUS": {"TRAIN": {"VIDEOS": few}}}
    entry = image_entry(world, FRAME_PICK="uniform", NUM_PICKED_FRAMES=2)
    run(job(world, tmp_path / "live", entry, **classes))
    run(job(world, tmp_path / "cached", {**entry, "CACHE": str(cache / "image")}, **classes))
    assert_same_runs(tmp_path / "live", tmp_path / "cached")


def test_halves_are_close(world, cache, tmp_path):
    (train, _) = fill(job(world, tmp_path / "run", image_entry(world)), tmp_path / "half", dtype="float16")
    assert train.bytes_per_clip == 2 * 4 * 2
    assert "16 bytes per clip, 0.016 GB per million clips" in train.to_text()
    half, whole = TargetStore.open(tmp_path / "half" / "train"), TargetStore.open(cache / "image" / "train")
    for row in range(4):
        torch.testing.assert_close(half.read(row, 3).float(), whole.read(row, 3), rtol=1e-3, atol=1e-4)
    assert not torch.equal(half.read(0, 3).float(), whole.read(0, 3))


# ------------------------------------------------------------------------------------------------------------ resume
def test_killed_in_the_middle_it_goes_on_and_the_files_are_the_same(world, tmp_path, monkeypatch):
    cfg = job(world, tmp_path / "run", image_entry(world))
    fill(cfg, tmp_path / "whole", shard_videos=1)
    real = TargetStore.write

    def slowly(store, shard, values, bad):
        real(store, shard, values, bad)
        time.sleep(0.2)

    monkeypatch.setattr(TargetStore, "write", slowly)
    process = multiprocessing.get_context("fork").Process(
        target=fill, args=(cfg, tmp_path / "killed"), kwargs={"shard_videos": 1}
    )
    process.start()
    deadline = time.monotonic() + 30
    while not (tmp_path / "killed" / "train" / "shard_00001.npy").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.join(30)
    monkeypatch.undo()
    done = contents(tmp_path / "killed")
    assert 2 <= sum(name.endswith(".npy") for name in done) < 4
    with pytest.raises(UserError, match=r"is not complete: \d of 4 files .*goes on where it was"):
        TargetStore.open(tmp_path / "killed" / "train")
    (tmp_path / "killed" / "train" / "shard_00003.npy.tmp").write_bytes(b"cut off")
    first = (tmp_path / "killed" / "train" / "shard_00000.npy").stat().st_mtime_ns
    (train, _) = fill(cfg, tmp_path / "killed", shard_videos=1)
    assert train.made < train.clips
    assert (tmp_path / "killed" / "train" / "shard_00000.npy").stat().st_mtime_ns == first
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


def test_a_cut_off_file_is_refused_and_made_again(world, tmp_path):
    cfg = job(world, tmp_path / "run", image_entry(world))
    fill(cfg, tmp_path / "cache")
    before = contents(tmp_path / "cache")
    shard = tmp_path / "cache" / "train" / "shard_00001.npy"
    shard.write_bytes(shard.read_bytes()[:-4])
    cached = job(world, tmp_path / "cached", image_entry(world, CACHE=str(tmp_path / "cache")))
    with pytest.raises(UserError, match=r"TEACHER.CACHE: .*shard_00001.npy is missing or cut off \(1 of 2 files\)"):
        run(cached)
    assert [part.made for part in fill(cfg, tmp_path / "cache")] == [2 * 4, 0]
    assert contents(tmp_path / "cache") == before
    assert [part.made for part in fill(cfg, tmp_path / "cache")] == [0, 0]
    with pytest.raises(UserError, match=r"holds other targets \(.*precision: fp32, one example.*batches of 8 now\)"):
        fill(job(world, tmp_path / "run", image_entry(world), RUNNER={"DETERMINISTIC": False}), tmp_path / "cache")


def test_bad_videos_are_listed_and_bad_in_training_too(world, tmp_path, capsys):
    shutil.copytree(world / "videos", tmp_path / "videos")
    (tmp_path / "videos" / "train" / "dark" / "broken.mp4").write_bytes(b"no video")
    entry = image_entry(world)
    shutil.copy(world / "image.pth", tmp_path / "image.pth")
    further = {"CORPUS": {"MAX_BAD_FRACTION": 1.0}}
    settings = job(tmp_path, tmp_path / "live", entry, **further)
    (train, _) = fill(settings, tmp_path / "cache")
    assert [os.path.basename(bad.path) for bad in train.bad] == ["broken.mp4"]
    # The file is put right, but its targets are missing: bad until they are made.
    write_video(tmp_path / "videos" / "train" / "dark" / "broken.mp4", 12, 40, 56)
    run(job(tmp_path, tmp_path / "cached", {**entry, "CACHE": str(tmp_path / "cache")}, **further))
    assert "it has no stored targets" in (tmp_path / "cached" / "bad_videos.csv").read_text()
    (again, _) = fill(settings, tmp_path / "cache")
    assert again.bad == []
    assert 0 < again.made < again.clips  # one file of several
    (nothing, _) = fill(settings, tmp_path / "cache")
    assert (nothing.bad, nothing.made) == ([], 0)
    run(job(tmp_path, tmp_path / "whole", {**entry, "CACHE": str(tmp_path / "cache")}, **further))
    assert not (tmp_path / "whole" / "bad_videos.csv").exists()


def test_the_command(world, tmp_path, capsys):
    entry = image_entry(world, CACHE=str(tmp_path / "cache"))
    path = tmp_path / "job.yaml"
    distill = {"TEACHERS": {NAME: entry}, "GRID": GRID}
    path.write_text(yaml.safe_dump(small_settings(world / "videos", tmp_path / "run", DISTILL=distill)))
    line = ["cache-targets", "--cfg", str(path), "--teacher"]
    assert main([*line, "TEACHR"]) == 1
    assert "Did you mean TEACHER?" in capsys.readouterr().err
    assert main([*line, NAME]) == 0
    assert "16 clips of 4 videos, 16 of them made now" in capsys.readouterr().out
    assert main(["run", "--cfg", str(path)]) == 0
    assert main(["run", "--cfg", str(path), "--dry-run"]) == 0
    assert "TEACHER: " not in capsys.readouterr().out.partition("speed")[0].replace("loss/TEACHER", "")
    assert main([*line, NAME, "--opts", "DISTILL.GRID.CLIPS", "0", "DISTILL.GRID.CROPS", "0"]) == 1
    assert "DISTILL.GRID.CLIPS" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------- refusals
@pytest.fixture(scope="module")
def cache(world, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("caches")
    fill(job(world, folder / "a", image_entry(world)), folder / "image")
    fill(job(world, folder / "b", flow_entry(world)), folder / "flow")
    write_image_teacher(folder / "other.pth", width=4)
    write_flow_teacher(folder / "other_flow.pth", seed=4)
    return folder


@pytest.mark.parametrize(
    ("entry", "sections", "message"),
    [
        ({"WEIGHTS": "other.pth"}, {}, r"weights: [0-9a-f]{64} there, [0-9a-f]{64} now"),
        ({"NETWORK": {"WIDTH": 4}}, {}, "teacher: Res2D, DEPTH 10, WIDTH 8 there, Res2D, DEPTH 10, WIDTH 4 now"),
        ({"CROP_SIZE": 24}, {}, "view: rgb, 32 pixels, .* there, rgb, 24 pixels"),
        ({"MEAN": [0.5, 0.5, 0.5]}, {}, "view: rgb, .*mean 0.45, 0.45, 0.45.* there, .*mean 0.5, 0.5, 0.5"),
        ({"VIEW": "center"}, {}, "grid: 2 clips .*VIEW shared there, 2 clips .*VIEW center now"),
        ({"NUM_CLASSES": 5}, {}, "holds logits of 4 classes, NUM_CLASSES is 5. Set NUM_CLASSES 4"),
        ({"LAYER": "features", "LOSS": "mse", "MAX_ENTROPY": -1}, {}, "holds the teacher's logits, LAYER is features"),
        ({"FRAME_PICK": "clip"}, {"DISTILL": {"GRID": {"FRAMES": 0}}}, "frames: each of 2 there, the clip now"),
        ({}, {"DISTILL": {"GRID": {"FRAMES": 3}}}, "frames: each of 2 there, each of 3 now"),
        ({}, {"DISTILL": {"GRID": {"CLIPS": 4}}}, "grid: 2 clips of a video, .* there, 4 clips"),
        (
            {},
            {"DISTILL": {"GRID": {"CROPS": 3}}},
            "the centre crop and mirrored, .* there, 2 clips of a video, 3 crops",
        ),
        ({}, {"DISTILL": {"GRID": {"SCALE": 44}}}, "short side of 40, .* there, .*short side of 44"),
        ({}, {"DATA": {"RANDOM_FLIP": False}}, "crop and mirrored, .* there, 2 clips of a video, the centre crop, "),
        ({}, {"DATA": {"TRAIN_CROP_SIZE": 28}}, "32 pixels of a short side of 40.* there, .*28 pixels"),
        ({}, {"DATA": {"SAMPLING_RATE": 1}}, "clip: 4 frames, 2 apart, .* there, 4 frames, 1 apart"),
        ({}, {"CORPUS": {"TARGET_FPS": 10.0}}, "clip: .*the video's frames there, .*10 frames per second now"),
        ({}, {"CORPUS": {"TEST_SCALE": 36}}, "val holds .*short side of 32, .* there, .*short side of 36"),
    ],
)
def test_what_differs_is_named(world, cache, tmp_path, entry, sections, message):
    changed = {key: str(cache / value) if key == "WEIGHTS" else value for key, value in entry.items()}
    cfg = job(world, tmp_path / "run", image_entry(world, CACHE=str(cache / "image"), **changed), **sections)
    with pytest.raises(UserError, match=message) as caught:
        run(cfg)
    assert "DISTILL.TEACHERS.TEACHER.CACHE" in str(caught.value)
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.parametrize(
    ("entry", "sections", "message"),
    [
        ({"WEIGHTS": "other_flow.pth"}, {}, "weights: "),
        ({}, {"FLOW": {"BOUND": 10.0}}, "flow: .*within 20 pixels there, .*within 10 pixels now"),
        ({}, {"FLOW": {"ROUNDING": "floor"}}, "flow: .*rounding round, .* there, .*rounding floor"),
        ({}, {"FLOW": {"BACKEND": "tvl1"}}, "flow: computed by test_difference, .* there, computed by tvl1"),
        (
            {},
            {"FLOW": {"STORE": "flow"}},
            "flow: computed by test_difference, .* there, stored by test_difference 1 at size native",
        ),
    ],
)
def test_what_differs_of_flow_is_named(world, cache, tmp_path, entry, sections, message):
    changed = {key: str(cache / value) for key, value in entry.items()}
    if "STORE" in sections.get("FLOW", {}):
        sections = {"FLOW": {"STORE": str(world / "flow")}}
    cfg = job(world, tmp_path / "run", flow_entry(world, CACHE=str(cache / "flow"), **changed), **sections)
    with pytest.raises(UserError, match=message):
        run(cfg)


def test_another_corpus_is_refused(world, cache, tmp_path):
    shutil.copytree(world / "videos", tmp_path / "videos")
    (tmp_path / "videos" / "train" / "dark" / "video1.mp4").rename(tmp_path / "videos" / "train" / "dark" / "new.mp4")
    shutil.copy(world / "image.pth", tmp_path / "image.pth")
    cfg = job(tmp_path, tmp_path / "run", image_entry(world, CACHE=str(cache / "image")))
    with pytest.raises(UserError, match=r"corpus: .*4 videos, 1 of the 4 of this job .*\(dark/new.mp4\)"):
        run(cfg)
    shutil.copytree(cache / "image", tmp_path / "cache")
    (tmp_path / "cache" / "train" / "videos").write_bytes(b"a\0")
    cfg = job(tmp_path, tmp_path / "run", image_entry(world, CACHE=str(tmp_path / "cache")))
    with pytest.raises(UserError, match=r"train.videos is damaged"):
        run(cfg)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: shutil.rmtree(folder), "does not exist"),
        (lambda folder: (folder / "train" / "targets.json").unlink(), "holds no teacher's targets"),
        (lambda folder: (folder / "train" / "targets.json").write_text("[" * 100_000), "targets.json is damaged"),
        (lambda folder: edit(folder, "layout", {"each_frame": 1}), "a number in it is not possible"),
        (lambda folder: (folder / "train" / "shard_00001.npy").unlink(), "shard_00001.npy is missing or cut off"),
        (lambda folder: edit(folder, "layout", {"clips": -1}), "damaged .a count in it is not possible"),
        (lambda folder: edit(folder, "layout", {"dtype": "object"}), "its layout is not possible"),
        (lambda folder: edit(folder, "bad", []), "damaged"),
        (lambda folder: shutil.rmtree(folder / "val"), "val holds no teacher's targets"),
    ],
)
def test_damaged_caches_are_refused(world, cache, tmp_path, damage, message):
    shutil.copytree(cache / "image", tmp_path / "cache")
    damage(tmp_path / "cache")
    cfg = job(world, tmp_path / "run", image_entry(world, CACHE=str(tmp_path / "cache")))
    with pytest.raises(UserError, match=message):
        run(cfg)


def test_a_cache_that_was_made_to_look_like_one_of_frames_is_refused(world, cache, tmp_path):
    shutil.copytree(cache / "flow", tmp_path / "cache")
    edit(tmp_path / "cache", "layout", {"each_frame": True})
    with pytest.raises(UserError, match="damaged: its layout has 1 frames a clip"):
        run(job(world, tmp_path / "run", flow_entry(world, CACHE=str(tmp_path / "cache"))))


def edit(folder: Path, item: str, change: object) -> None:
    path = folder / "train" / "targets.json"
    values = json.loads(path.read_text())
    values[item] = {**values[item], **change} if isinstance(change, dict) else change
    path.write_text(json.dumps(values))


def test_only_what_can_be_stored_is(world, tmp_path):
    def refused(message, entry, **sections):
        with pytest.raises(UserError, match=message):
            fill(job(world, tmp_path / "run", entry, **sections), tmp_path / "cache")

    refused("any clip, of which there are too many", image_entry(world), DISTILL={"GRID": {"CLIPS": 0, "CROPS": 0}})
    refused("any crop, of which there are too many", image_entry(world), DISTILL={"GRID": {"CROPS": 0}})
    refused("random has no targets", image_entry(world, WEIGHTS="random"))
    refused("looks at its frames together", flow_entry(world, FRAME_PICK="random", NUM_PICKED_FRAMES=2))
    with pytest.raises(ConfigError, match=r"CACHE: targets are cached for the clips of a grid, but .*CLIPS is 0"):
        job(world, tmp_path / "run", image_entry(world, CACHE="x"), DISTILL={"GRID": {"CLIPS": 0, "CROPS": 0}})


def test_values_that_cannot_be_kept_are_refused(world, tmp_path):
    weights = torch.load(world / "image.pth", weights_only=True)
    for factor, message in ((1e6, "float16 does not hold. Store them with --dtype float32"), (1e38, "not finite")):
        torch.save({**weights, "fc.weight": weights["fc.weight"] * factor}, tmp_path / "large.pth")
        cfg = job(world, tmp_path / "run", image_entry(world, WEIGHTS=str(tmp_path / "large.pth")))
        with pytest.raises(UserError, match=message):
            fill(cfg, tmp_path / f"cache{factor}", dtype="float16")


def test_one_writer_at_a_time(world, cache, tmp_path, monkeypatch):
    monkeypatch.setattr("distinit_plugin.files.LOCK_SECONDS", 0.1)
    (tmp_path / "cache" / "train").mkdir(parents=True)
    cfg = job(world, tmp_path / "run", image_entry(world))
    other = caching.writing_alone(tmp_path / "cache" / "train", "targets")
    with other, pytest.raises(UserError, match="another process is writing targets"):
        fill(cfg, tmp_path / "cache")
