"""Whole runs on what a user may bring: frame rates, folders of frames, official lists; and how they may compute."""

import csv
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small_jobs import CLASSES, bright_or_dark, checkpoint, json_stats, labelled, merged, small_cfg, weights_of
from videos import write_video

from distinit_plugin.errors import ConfigError
from distinit_plugin.jobs import session
from distinit_plugin.jobs.running import run
from distinit_plugin.jobs.splits import run_splits


def nodes(train: dict, test: dict) -> dict:
    """Sections of a labelled run with a test on these corpora."""
    corpora = {"TRAIN": {"VIDEOS": {**train, "LABELED": True}}, "TEST": {"VIDEOS": {**test, "LABELED": True}}}
    return {"ACTION": {"LOSS_WEIGHT": 1.0}, "CORPUS": corpora, "TEST": {"ENABLE": True}}


def videos_tested(output: Path) -> dict[str, str]:
    """Name of each tested video → its class."""
    with open(output / "test" / "videos.csv", newline="") as file:
        return {Path(row["path"]).name: row["label"] for row in csv.DictReader(file) if int(row["clips"])}


# --------------------------------------------------------------------------------------------------- frame rates
STEP = 6  # levels of grey between neighbouring frames: survives the codec


@pytest.mark.parametrize(("target_fps", "distances"), [(0, {1}), (10, {3}), (20, {1, 2}), (60, {0, 1})])
def test_target_fps_decides_which_frames_the_student_sees(target_fps, distances, tmp_path, monkeypatch):
    """Videos of 30 frames per second, whose brightness tells the frame, in training and in a test."""
    for number in range(4):
        path = tmp_path / "videos" / CLASSES[number % 2] / f"{number}.mp4"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_video(path, 40, 48, 64, fps=30, pattern=lambda n, h, w: np.full((h, w, 3), 5 + STEP * n, np.uint8))
    seen, original = [], session.finish_views

    def finish_views(views, *arguments, **options):
        (pixels,) = views.values()
        seen.extend(pixels.float().mean((1, 3, 4)).sub(5).div(STEP).round().int().tolist())
        return original(views, *arguments, **options)

    monkeypatch.setattr(session, "finish_views", finish_views)
    node = {"PATH": str(tmp_path / "videos")}
    sections = merged(nodes(node, node), {"CORPUS": {"TARGET_FPS": target_fps}, "DATA": {"SAMPLING_RATE": 1}})
    run(small_cfg(tmp_path, tmp_path / "run", **sections))
    assert len(seen) == 4 + 4 * 2  # an epoch, and two clips of each video
    assert {int(distance) for clip in seen for distance in np.diff(clip)} == distances
    assert min(clip[0] for clip in seen) == 0  # the first clip of each test video
    assert max(clip[-1] for clip in seen) in (38, 39)  # the last one


# ------------------------------------------------------------------------------------------------------- formats
def test_folders_of_frames(tmp_path):
    for use, numbers in (("train", range(4)), ("test", range(100, 102))):
        for name in CLASSES:
            for number in numbers:
                folder = tmp_path / use / name / f"video{number}"
                folder.mkdir(parents=True)
                pattern = bright_or_dark(name, number)
                for frame in range(12):
                    Image.fromarray(pattern(frame, 48, 64)).save(folder / f"img_{frame:05d}.png")
    node = {"FORMAT": "frames"}
    train, test = ({**node, "PATH": str(tmp_path / use)} for use in ("train", "test"))
    sections = nodes(train, test) | {"SOLVER": {"MAX_EPOCH": 6, "BASE_LR": 0.05}}
    result = run(small_cfg(tmp_path, tmp_path / "run", **sections))
    assert result.training.steps == 12
    assert result.evaluation.class_names == list(CLASSES)
    assert [(Path(path).parts[-2:], CLASSES[label]) for path, label in zip_evaluation(result.evaluation)] == [
        ((name, f"video{number}"), name) for name in CLASSES for number in (100, 101)
    ]
    assert result.evaluation.bad == []
    losses = [line["loss"] for line in json_stats(tmp_path / "run", "train_epoch")]
    assert losses[-1] < 0.8 * losses[0]  # what it sees has to do with the labels


def zip_evaluation(evaluation):
    return zip(evaluation.paths, evaluation.labels.tolist(), strict=True)


def test_three_splits_of_hmdb51(videos, tmp_path, capsys):
    """Each split tests on two other videos of each class, and leaves one out altogether."""
    lists, output = tmp_path / "lists", tmp_path / "run"
    lists.mkdir()
    for split in (1, 2, 3):
        for name in CLASSES:
            flags = {
                number: 2 if number // 2 == split - 1 else 0 if number == 2 * split % 6 else 1 for number in range(6)
            }
            rows = "".join(f"video{number}.mp4 {flag} \n" for number, flag in flags.items())
            (lists / f"{name}_test_split{split}.txt").write_text(rows)
    node = {"FORMAT": "hmdb51", "PATH": str(lists), "ROOT": str(videos / "train")}
    results = run_splits(small_cfg(videos, output, **nodes(node, node)))
    for split in (1, 2, 3):
        folder = output / f"split_{split}"
        assert sorted(videos_tested(folder)) == [f"video{2 * split - 2}.mp4", f"video{2 * split - 1}.mp4"]
        assert set(videos_tested(folder).values()) <= set(CLASSES)
        assert len(json_stats(folder, "train_iter_")) == 1  # 3 videos of each class in batches of 4: a whole one
    assert {name: len(values) for name, values in results.items()} == {"clip_top1": 3, "top1": 3, "top5": 3}
    assert "±" in capsys.readouterr().out


def test_kinetics(videos, tmp_path):
    """The official csv: names of files are made of id and times; what is not on disk is left out and told."""
    rows, root = [], tmp_path / "root"
    for use, folder, numbers in (("train", "train", range(6)), ("validate", "test", range(100, 103))):
        for name, label in zip(CLASSES, ("riding a bike", "air drumming"), strict=True):
            (root / label).mkdir(parents=True, exist_ok=True)
            for number in numbers:
                source = videos / folder / name / f"video{number}.mp4"
                shutil.copy(source, root / label / f"id_{name}{number}_{number:06d}_{number + 10:06d}.mp4")
                rows.append([label, f"id_{name}{number}", number, number + 10, use])
    rows.append(["air drumming", "absent", 5, 15, "train"])
    with open(tmp_path / "kinetics.csv", "w", newline="") as file:
        csv.writer(file).writerows([["label", "youtube_id", "time_start", "time_end", "split"], *rows])
    node = {"FORMAT": "kinetics", "PATH": str(tmp_path / "kinetics.csv"), "ROOT": str(root)}
    output = tmp_path / "run"
    result = run(small_cfg(videos, output, **nodes({**node, "SUBSET": "train"}, {**node, "SUBSET": "validate"})))
    assert result.training.steps == 3  # 12 of 13 videos
    assert result.evaluation.class_names == ["air drumming", "riding a bike"]
    labels = {Path(path).name.split("_")[1]: label for path, label in zip_evaluation(result.evaluation)}
    assert labels == {f"{name}{n}": int(name == "bright") for name in CLASSES for n in (100, 101, 102)}
    assert "1 of 13 listed videos are not in" in (output / "stdout.log").read_text()


# ------------------------------------------------------------------------------------------- ways of computing
def compiled_and_plain(videos, folder: Path, **sections) -> tuple[dict, dict]:
    """Weights after three steps with and without RUNNER.COMPILE."""
    weights = []
    for compiled in (True, False):
        torch.compiler.reset()
        output = folder / f"compile_{compiled}"
        settings = {**labelled(videos, TRAIN="train"), "TRAIN": {"BATCH_SIZE": 12}, "SOLVER": {"MAX_EPOCH": 3}}
        run(small_cfg(videos, output, **settings, **sections, RUNNER={"COMPILE": compiled}))
        assert checkpoint(output, 3).is_file()
        weights.append(weights_of(output, 3))
    assert weights[0].keys() == weights[1].keys()  # a checkpoint does not tell that it was compiled
    return weights[0], weights[1]


def test_a_compiled_student_trains_as_the_plain_one(videos, tmp_path, monkeypatch):
    """The traced graphs, forward and backward, without a compiler's rounding: bit for bit."""
    calls, original = [], torch.compile

    def compile_traced(module, **options):
        calls.append(module)
        return original(module, backend="aot_eager", **options)

    monkeypatch.setattr(torch, "compile", compile_traced)
    compiled, plain = compiled_and_plain(videos, tmp_path)
    assert len(calls) == 1
    torch.testing.assert_close(compiled, plain, rtol=0, atol=0)


def test_a_really_compiled_student_trains_as_the_plain_one(videos, tmp_path):
    """With the classifier alone in training, which leaves few kernels to compile."""
    if not any(shutil.which(name) for name in ("g++", "clang++", "c++")):
        pytest.skip("no C++ compiler: torch.compile has none to call")
    compiled, plain = compiled_and_plain(
        videos, tmp_path, INIT={"TRAINABLE": "classifier"}, MODEL={"MODEL_NAME": "Res3D"}
    )
    torch.testing.assert_close(compiled, plain, rtol=1e-4, atol=1e-5)


def test_fp16_on_a_cpu_is_refused_before_anything_is_written(videos, tmp_path):
    for changes in (
        {"RUNNER": {"PRECISION": "fp16"}},
        {"TRAIN": {"MIXED_PRECISION": True}, "RUNNER": {"PRECISION": "auto"}},
    ):
        with pytest.raises(ConfigError, match=r"fp16.* works on a GPU only"):
            run(small_cfg(videos, tmp_path / "run", **labelled(videos), **changes))
    assert not (tmp_path / "run").exists()
