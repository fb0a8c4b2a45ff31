"""``distinit visualize``: every kind on small runs, its picture, its numbers, what it refuses."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from flows import Difference
from small_jobs import CLASSES, brightness_teacher, json_stats, labelled, small_cfg, write_teacher

from distinit_plugin import build
from distinit_plugin.analysis import output as analysis_output
from distinit_plugin.analysis.decoded_flow import write_samples
from distinit_plugin.cli import main
from distinit_plugin.engine.curves import read_curves
from distinit_plugin.engine.figures import save_figure
from distinit_plugin.engine.motion import LayerMotion, MotionSample
from distinit_plugin.engine.motion_report import SAMPLES_FILE, MotionCurve, write_report
from distinit_plugin.files import write_file
from distinit_plugin.jobs.caching import cache_targets
from distinit_plugin.jobs.running import run

GATE = 0.5  # nats: keeps the bright half
NAME = "IMAGENET"


def visualize(kind, *words, output: Path):
    """(numbers, rows) of a kind whose picture is there."""
    assert main(["visualize", kind, *map(str, words)]) == 0
    assert output.read_bytes().startswith(b"\x89PNG")
    with open(output.with_suffix(".csv"), newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return json.loads(output.with_suffix(".json").read_text("utf-8")), rows


def refused(capsys, *words) -> str:
    assert main(["visualize", *map(str, words)]) == 1
    return capsys.readouterr().err


@pytest.fixture(scope="module", autouse=True)
def _few_pixels():
    """Most of the time would go into pixels: figures are made, but only those of some kinds become pictures."""

    def save(figure, path):
        if path.stem in ("confusion", "epe"):
            save_figure(figure, path)
        else:
            write_file(path, lambda file: file.write(b"\x89PNG"))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(analysis_output, "save_figure", save)
        yield


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    return write_teacher(tmp_path_factory.mktemp("teacher") / "res2d.pth")


@pytest.fixture(scope="module")
def tested(videos, tmp_path_factory) -> Path:
    """A run with labels, a validation, a test, and TensorBoard."""
    folder = tmp_path_factory.mktemp("runs") / "tested"
    uses = labelled(videos, TRAIN="train", VAL="test", TEST="test")
    sections = {"TEST": {"ENABLE": True}, "TENSORBOARD": {"ENABLE": True}}
    pytest.importorskip("tensorboard")
    run(small_cfg(videos, folder, **{**uses, **sections}))
    return folder


@pytest.fixture(scope="module")
def gated(videos, teacher, tmp_path_factory) -> Path:
    """A pre-training with a gated teacher of random frames."""
    folder = tmp_path_factory.mktemp("runs") / "gated"
    entry = brightness_teacher(teacher, FRAME_PICK="random", MAX_ENTROPY=GATE)
    run(small_cfg(videos, folder, DISTILL={"TEACHERS": {NAME: entry}}))
    return folder


# -------------------------------------------------------------------------------------------------------- networks
def test_filters_of_a_run_and_of_inflated_weights(videos, teacher, tested, tmp_path, capsys):
    inflated = {"MODEL": {"MODEL_NAME": "Res3D"}, "INIT": {"INFLATE_FROM": "Res2D", "INFLATE_WEIGHTS": str(teacher)}}
    small_cfg(videos, tmp_path / "inflated", **inflated, **labelled(videos))
    output = tmp_path / "filters.png"
    words = [tested, tmp_path / "inflated.yaml", "--output", output]
    numbers, rows = visualize("filters", *words, output=output)
    one, other = numbers["layers"]
    assert (one["network"], other["network"]) == ("tested", "inflated")
    assert one["mean_share"] > 0.1
    assert one["time_layer"] != one["layer"]  # a factored stem
    assert other["shares"] == [0.0] * 8
    assert "inflated, stem.0: mean share of temporal variance 0.0000" in capsys.readouterr().out
    assert {float(row["temporal_share"]) for row in rows if row["network"] == "inflated"} == {0.0}
    # The same network without the image weights: the control.
    random = [tmp_path / "inflated.yaml", "--output", output, "--opts", "INIT.INFLATE_FROM", ""]
    assert min(visualize("filters", *random, output=output)[0]["layers"][0]["shares"]) > 0.1
    assert "no such convolution" in refused(capsys, "filters", tested, "--layer", "stem.9")
    assert "holds no checkpoint of a run" in refused(capsys, "filters", tmp_path)


def test_features_of_a_run_in_the_plane(tested, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    output = tmp_path / "tsne.png"
    numbers, rows = visualize("tsne", tested, "--use", "train", "--neighbors", "3", output=output)
    (found,) = numbers["networks"]
    assert numbers["classes"] == list(CLASSES)
    assert (found["network"], found["videos"], found["neighbors"]) == ("tested", 12, 3)
    assert found["knn_accuracy"] > 0.8  # bright and dark
    assert -1 <= found["silhouette"] <= 1
    assert sorted(row["class"] for row in rows) == ["bright"] * 6 + ["dark"] * 6
    assert all(Path(row["path"]).parent.name == row["class"] for row in rows)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tsne.csv", "tsne.json", "tsne.png"]
    assert "needs 2 to" in refused(capsys, "tsne", tested, "--classes", "dark")


def test_videos_of_another_file(gated, tested, tmp_path, capsys):
    """A pre-training names no labelled videos; those of a YAML file serve networks of any training."""
    output = tmp_path / "tsne.png"
    assert "names no CORPUS.TEST" in refused(capsys, "tsne", gated, "--output", output)
    words = [gated, "--names", "a", "--output", output, "--cfg", tested.parent / "tested.yaml"]
    numbers, _ = visualize("tsne", *words, output=output)
    assert [(found["network"], found["videos"]) for found in numbers["networks"]] == [("a", 6)]


# --------------------------------------------------------------------------------------------------------- entropy
def test_what_the_gate_of_the_training_kept(gated, tested, tmp_path):
    """The first epoch, clip by clip: the shares and means that the run logged."""
    output = tmp_path / "entropy.png"
    words = [
        "--clips",
        "12",
        "--runs",
        f"0.3={tested}",
        f"none={tested / 'test'}",
        "--cfg",
        gated.parent / "gated.yaml",
    ]
    numbers, rows = visualize("entropy", "--output", output, *words, output=output)
    (logged,) = json_stats(gated, "train_epoch")
    assert numbers["examples"] == 12
    assert numbers["kept_share"]["0.5"] == pytest.approx(logged[f"kept/{NAME}"], abs=1e-5)
    assert numbers["mean"] == pytest.approx(logged[f"entropy/{NAME}"], abs=1e-4)
    assert 0 < numbers["kept_share"]["0.5"] < 1
    assert numbers["largest_possible"] == pytest.approx(np.log(4))
    assert sum(int(row["examples"]) for row in rows) == 12
    top1 = json.loads((tested / "test" / "metrics.json").read_text())["top1"]
    assert numbers["accuracy"] == {"0.3": [top1], "no gate": [top1]}
    lowest, highest = numbers["shown"]["lowest"], numbers["shown"]["highest"]
    assert {Path(own["path"]).parent.name for own in lowest} == {"bright"}
    assert {Path(own["path"]).parent.name for own in highest} == {"dark"}


def test_entropy_of_cached_targets_needs_no_teacher(videos, teacher, tmp_path, monkeypatch, capsys):
    entry = brightness_teacher(teacher, FRAME_PICK="random")
    grid = {"CLIPS": 2, "CROPS": 1, "FRAMES": 2}
    job = small_cfg(videos, tmp_path / "live", DISTILL={"TEACHERS": {NAME: entry}, "GRID": grid})
    cache_targets(job, NAME, str(tmp_path / "cache"), dtype="float32")
    cached = {**entry, "CACHE": str(tmp_path / "cache")}
    small_cfg(videos, tmp_path / "cached", DISTILL={"TEACHERS": {NAME: cached}, "GRID": grid})

    def never(*arguments):
        raise AssertionError("the teacher is asked")

    monkeypatch.setattr(build, "build_teacher", never)
    output = tmp_path / "entropy.png"
    words = ["--output", output, "--thresholds", str(GATE), "--cfg", tmp_path / "cached.yaml"]
    numbers, _ = visualize("entropy", *words, output=output)
    shards = [np.load(path) for path in sorted((tmp_path / "cache" / "train").glob("*.npy"))]
    logits = torch.from_numpy(np.concatenate([shard.reshape(-1, 4) for shard in shards]))
    entropies = torch.distributions.Categorical(logits=logits.double()).entropy()
    assert numbers["examples"] == len(entropies) == 12 * 2 * 2 * 2  # videos, clips, mirrored or not, frames
    assert numbers["mean"] == pytest.approx(float(entropies.mean()), abs=1e-5)
    assert numbers["kept_share"]["0.5"] == pytest.approx(float((entropies < GATE).double().mean()))
    assert sum(map(len, numbers["shown"].values())) == 18
    fewer, _ = visualize("entropy", "--clips", "8", *words, output=output)
    assert fewer["examples"] == 2 * 2 * 2 * 2
    assert "there is no teacher PLACES that classifies" in refused(
        capsys, "entropy", "--teacher", "PLACES", "--cfg", tmp_path / "cached.yaml"
    )


# ------------------------------------------------------------------------------------------------------------ runs
def test_a_run_with_itself_class_by_class(tested, tmp_path, capsys):
    output = tmp_path / "per-class.png"
    words = [tested, tested / "test" / "scores.npz", "--names", "one", "same", "--output", output]
    numbers, rows = visualize("per-class", *words, output=output)
    assert (numbers["first"], numbers["second"], numbers["overall"]["videos"]) == ("one", "same", 6)
    assert (numbers["improved"], numbers["degraded"], numbers["within_0.1_percent"]) == (0, 0, 2)
    assert [(row["difference"], row["low"], row["high"]) for row in rows] == [("0.0", "0.0", "0.0")] * 2
    assert "0 improved, 0 degraded, 2 within" in capsys.readouterr().out
    assert "name nothing twice" in refused(capsys, "per-class", tested, tested, "--output", output)
    assert "cannot be read as the scores of a test" in refused(capsys, "per-class", tested, tmp_path)


def test_confusions_and_curves_of_a_run(tested, tmp_path):
    output = tmp_path / "confusion.png"
    numbers, rows = visualize("confusion", tested, "--output", output, output=output)
    with open(tested / "test" / "confusion.csv", newline="") as file:
        assert rows == list(csv.DictReader(file))
    assert numbers["top1"] == json.loads((tested / "test" / "metrics.json").read_text())["top1"]
    output = tmp_path / "curves.png"
    numbers, rows = visualize("curves", tested, "--output", output, output=output)
    losses = {float(row["epoch"]): float(row["value"]) for row in rows if row["curve"] == "train_loss"}
    assert losses == read_curves(tested).train_loss
    assert numbers["runs"]["tested"]["val_top1"] == [list(point) for point in read_curves(tested).val_top1.items()]


@pytest.mark.parametrize("words", [["per-class", "a", "b"], ["confusion", "a"], ["curves", "a"], ["filters", "a"]])
def test_pictures_are_png(words, capsys):
    assert "pictures are written as .png" in refused(capsys, *words, "--output", "picture.jpg")


@pytest.mark.parametrize(
    "words", [["filtres"], [], ["entropy", "--runs", "much=x"], ["tsne", "x", "--num-classes", "1"]]
)
def test_wrong_command_lines_exit_with_2(words):
    with pytest.raises(SystemExit) as stop:
        main(["visualize", *words])
    assert stop.value.code == 2


# ------------------------------------------------------------------------------------------------- motion and flow
def probe_of(folder: Path, name: str, epe: float, shift: float = 0.0, frame: int = 0) -> Path:
    """What a probe leaves: errors at two layers, and two clips that move to the right by 2 pixels."""
    layers = [LayerMotion(layer, (2, 4, 4), epe + number, 2.0, 2.0) for number, layer in enumerate(("2C", "3A"))]
    write_report(folder, [MotionCurve(name, layers), MotionCurve("flow stream", layers[:1])], {})
    flow = torch.tensor([2.0, 0.0]).view(2, 1, 1)
    pixels = torch.full((3, 8, 8), frame, dtype=torch.uint8)
    decoded = {"2C": (flow + shift).expand(2, 4, 4), "3A": (flow * 0).expand(2, 2, 2)}
    write_samples(folder / SAMPLES_FILE, [MotionSample(pixels, flow.expand(2, 8, 8), decoded)] * 2)
    return folder


def test_errors_of_several_probes(tmp_path, capsys):
    probes = [probe_of(tmp_path / "a", "S3D-G", 1.5), probe_of(tmp_path / "b", "D3D", 1.25)]
    output = tmp_path / "epe.png"
    numbers, rows = visualize("epe", *probes, "--output", output, output=output)
    assert [(own["network"], own["layer"], own["epe"]) for own in numbers["layers"]] == [
        ("S3D-G", "2C", 1.5),
        ("S3D-G", "3A", 2.5),
        ("flow stream", "2C", 1.5),
        ("D3D", "2C", 1.25),
        ("D3D", "3A", 2.25),
        ("flow stream", "2C", 1.25),
    ]
    assert [float(row["epe"]) for row in rows] == [own["epe"] for own in numbers["layers"]]
    assert "name nothing twice" in refused(capsys, "epe", probes[0], probes[0], "--output", output)
    layer = '{"layer": "2C", "grid": [%s, 1, 1], "epe": %s, "zeros": 1, "magnitude": 1}'
    for layers in (layer % ("1e999", "1"), layer % ("1", "1e308"), "", "[" * 100_000):
        (probes[0] / "motion.json").write_text(f'{{"curves": [{{"name": "a", "layers": [{layers}]}}]}}')
        assert "is no result of a probe" in refused(capsys, "epe", probes[0], "--output", output)
    assert "motion.json cannot be read" in refused(capsys, "epe", tmp_path, "--output", output)


def test_decoded_flow_of_several_probes(tmp_path, capsys):
    probes = [probe_of(tmp_path / "a", "S3D-G", 1.5, shift=3.0), probe_of(tmp_path / "b", "D3D", 1.25)]
    output = tmp_path / "flow.png"
    numbers, rows = visualize("flow", *probes, "--output", output, output=output)
    found = {(own["network"], own["layer"], own["clip"]): own["epe"] for own in numbers["pictures"]}
    assert found["S3D-G", "2C", 1] == pytest.approx(18**0.5)  # 3 pixels too far in both directions
    assert found["D3D", "2C", 0] == pytest.approx(0)
    assert found["D3D", "3A", 0] == pytest.approx(2)
    assert {float(row["zeros"]) for row in rows} == {2.0}
    elsewhere = probe_of(tmp_path / "c", "other clips", 1.0, frame=9)
    assert "probed on different clips" in refused(capsys, "flow", probes[0], elsewhere, "--output", output)
    (probes[0] / SAMPLES_FILE).write_bytes(b"PK\x03\x04 and nothing")
    assert "cannot be read as the pictures of a probe" in refused(capsys, "flow", probes[0], "--output", output)
    assert "holds no pictures of a probe" in refused(capsys, "flow", probes[1], tmp_path, "--output", output)


def test_flow_of_a_video(videos, tmp_path):
    output = tmp_path / "flow.png"
    words = [videos / "test" / "bright" / "video100.mp4", "--backend", Difference.name, "--size", "native"]
    numbers, rows = visualize("flow", *words, "--frames", "3", "--output", output, output=output)
    assert [own["frame"] for own in numbers["frames"]] == [0, 5, 10]
    assert [int(row["frame"]) for row in rows] == [0, 5, 10]
    assert all(own["mean"] <= own["largest"] for own in numbers["frames"])


# ----------------------------------------------------------------------------------------------------- TensorBoard
def test_tensorboard_gets_filters_and_confusions(tested, gated):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tested / "tensorboard"), size_guidance={"images": 0})
    events.Reload()
    assert sorted(events.Tags()["images"]) == ["filters", "test/confusion", "val/confusion"]
    steps = len(json_stats(tested, "train_iter_"))
    assert [image.step for image in events.Images("val/confusion")] == [steps]
    assert [image.step for image in events.Images("filters")] == [steps]  # once, though drawn at the end, too
    metrics = json.loads((tested / "test" / "metrics.json").read_text())
    assert [(found.step, found.value) for found in events.Scalars("test/top1")] == [
        (steps, pytest.approx(metrics["top1"]))
    ]
    assert events.Images("test/confusion")[0].encoded_image_string.startswith(b"\x89PNG")
    assert not (gated / "tensorboard").exists()
