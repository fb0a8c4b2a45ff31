"""``distinit detect-persons``: boxes of persons in AVA's form, from videos and from frames, resumable."""

import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from videos import frame_number, write_video

from distinit_plugin import cli
from distinit_plugin.detection import persons
from distinit_plugin.detection.files import read_boxes
from distinit_plugin.detection.persons import Found, build_detector
from distinit_plugin.detection.sources import VideoFiles
from distinit_plugin.engine.progress import NoProgress
from distinit_plugin.errors import UserError, WeightsError
from distinit_plugin.jobs import persons as job
from distinit_plugin.jobs.persons import Reading, detect_persons, part_name
from distinit_plugin.jobs.places import moments_between, moments_of, names_in

FPS = 10


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> Path:
    """Three seconds each of numbered frames; ``wide`` has other proportions."""
    folder = tmp_path_factory.mktemp("persons")
    for name, width in (("a", 80), ("b", 80), ("wide", 112)):
        write_video(folder / f"{name}.mp4", 31, 64, width, fps=FPS)
    return folder


@pytest.fixture(scope="module")
def frames(tmp_path_factory) -> Path:
    """The same as ``a`` in a folder of images."""
    from videos import number_frame

    folder = tmp_path_factory.mktemp("frames")
    (folder / "a").mkdir()
    for number in range(31):
        Image.fromarray(number_frame(number, 64, 80)).save(folder / "a" / f"a_{number + 1:06d}.png")
    return folder


class NumberDetector:
    """Reads the number of a frame: as many persons as it, modulo 3, in places that tell the number."""

    def __init__(self) -> None:
        self.seen: list[int] = []
        self.sizes: list[tuple[int, int]] = []

    def __call__(self, pictures):
        found = []
        for picture in pictures:
            number = frame_number(picture.permute(1, 2, 0).numpy())
            self.seen.append(number)
            height, width = picture.shape[1:]
            self.sizes.append((height, width))
            rows = [[0.01 * number * width, 0.25 * height, 0.9 * width, (0.5 + 0.1 * k) * height] for k in range(3)]
            count = number // FPS % 3
            found.append(Found(torch.tensor(rows)[:count], torch.tensor([0.9, 0.8, 0.7])[:count]))
        return found


def detect(folder, output, moments, **keys):
    detector = keys.pop("detector", None) or NumberDetector()
    result = detect_persons(
        keys.pop("sources", None) or VideoFiles(folder, start=keys.pop("start", 0.0)),
        moments,
        detector,
        output,
        settings={"detector": "numbers", **keys.pop("settings", {})},
        reading=Reading(96, **keys),
        progress=NoProgress(),
    )
    return result, detector


# ------------------------------------------------------------------------------------------------------------- whole
def test_rows_are_of_the_right_pictures_in_fractions(videos, tmp_path):
    output = tmp_path / "boxes.csv"
    result, detector = detect(videos, output, moments_between(["a", "wide"], 0, 3), batch_size=3)
    assert detector.seen == [0, 10, 20, 30] * 2
    assert detector.sizes == [(96, 120)] * 4 + [(96, 168)] * 4
    table = read_boxes(output)
    rows = [(table.videos[v], s) for v, s in zip(table.video, table.seconds, strict=True)]
    assert rows == [(video, second) for video in ("a", "wide") for second in (1.0, 2.0, 2.0)]
    expected = [[0.01 * n, 0.25, 0.9, bottom] for n, bottom in ((10, 0.5), (20, 0.5), (20, 0.6))]
    np.testing.assert_allclose(table.boxes, expected * 2, atol=1e-6)
    np.testing.assert_allclose(table.scores, [0.9, 0.9, 0.8] * 2, atol=1e-6)
    assert output.read_text().startswith("a,0001,")
    assert (table.actions == -1).all()
    assert (result.num_boxes, result.num_keyframes, result.done, result.bad) == (6, 8, ["a", "wide"], [])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["boxes.csv"]


def test_videos_and_frames_agree(videos, frames, tmp_path, monkeypatch):
    monkeypatch.setattr(job, "build_detector", lambda *args, **keys: NumberDetector())
    words = ["--weights", "x.pth", "--short-side", "96", "--workers", "0"]
    texts = []
    for name, place in (("v", ["--videos", str(videos)]), ("f", ["--frames", str(frames), "--fps", "10"])):
        output = tmp_path / f"{name}.csv"
        keyframes = tmp_path / "keyframes.csv"
        keyframes.write_text("a,0901,0.1,0.1,0.5,0.5,3,0\na,0901,0.1,0.1,0.5,0.5,4,0\na,0902\n")
        more = ["--start", "900"] if name == "v" else []
        assert (
            cli.main(["detect-persons", *place, *more, "--keyframes", str(keyframes), "--output", str(output), *words])
            == 0
        )
        texts.append([row.split(",") for row in output.read_text().splitlines()])
    assert [row[:2] for row in texts[0]] == [["a", "0901"], ["a", "0902"], ["a", "0902"]]
    for one, other in zip(*texts, strict=True):
        assert one[:2] == other[:2]
        np.testing.assert_allclose([float(cell) for cell in one[2:]], [float(cell) for cell in other[2:]], atol=1e-6)
    listed = tmp_path / "list.csv"
    rows = "".join(f'a 0 {n} a/a_{n + 1:06d}.png ""\n' for n in range(31))
    listed.write_text("original_vido_id video_id frame_id path labels\n" + rows)
    output = tmp_path / "l.csv"
    place = ["--frames", str(frames), "--fps", "10", "--frame-list", str(listed), "--seconds", "901", "902"]
    assert cli.main(["detect-persons", *place, "--output", str(output), *words]) == 0
    assert output.read_text() == (tmp_path / "f.csv").read_text()


def test_every_second_of_videos(videos):
    moments, bad = moments_of(VideoFiles(videos, start=0.0), names_in(str(videos), frames=False), timeout=10)
    assert moments == [(name, float(second)) for name in ("a", "b", "wide") for second in range(4)]
    assert bad == []
    assert moments_of(VideoFiles(videos, start=899.5), ["a"], timeout=10)[0] == [
        ("a", 900.0),
        ("a", 901.0),
        ("a", 902.0),
    ]


# --------------------------------------------------------------------------------------------------------- resuming
class Stopping(NumberDetector):
    """Ends in the second video."""

    def __call__(self, pictures):
        if len(self.seen) >= 4:
            raise KeyboardInterrupt
        return super().__call__(pictures)


def test_a_stopped_call_goes_on(videos, tmp_path):
    moments = moments_between(["a", "b", "wide"], 0, 3)
    whole, _ = detect(videos, tmp_path / "whole.csv", moments)
    output = tmp_path / "boxes.csv"
    with pytest.raises(KeyboardInterrupt):
        detect(videos, output, moments, detector=Stopping())
    assert not output.exists()
    with pytest.raises(UserError, match=r"otherwise \(floor: not known there, 0.1 now\)"):
        detect(videos, output, moments, settings={"floor": "0.1"})
    with pytest.raises(UserError, match="keyframes: "):
        detect(videos, output, moments[:-1])
    result, detector = detect(videos, output, moments)
    assert (result.skipped, result.done) == (["a"], ["b", "wide"])
    assert len(detector.seen) == 8
    assert output.read_text() == (tmp_path / "whole.csv").read_text()
    assert result.num_boxes == whole.num_boxes == 9
    assert not (tmp_path / f"boxes.csv{job.PARTS}").exists()


def test_bad_videos_and_seconds_beyond_the_end(videos, tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.mp4").write_bytes((videos / f"{name}.mp4").read_bytes())
    (tmp_path / "c.mp4").write_bytes(b"no video")
    output = tmp_path / "out" / "boxes.csv"
    moments = [*moments_between(["a", "b", "c"], 0, 2), *moments_between(["b"], 7, 8)]
    result, _ = detect(tmp_path, output, moments)
    assert result.done == ["a", "b"]
    assert sorted({Path(bad.path).name for bad in result.bad}) == ["b.mp4", "c.mp4"]
    assert len(result.bad) == 5
    table = read_boxes(output)
    assert sorted(set(zip(table.video.tolist(), table.seconds.tolist(), strict=True))) == [
        (0, 1),
        (0, 2),
        (1, 1),
        (1, 2),
    ]
    parts = output.with_name(f"boxes.csv{job.PARTS}")
    assert (parts / part_name("a")).is_file()
    assert not (parts / part_name("c")).exists()
    (tmp_path / "c.mp4").write_bytes((videos / "a.mp4").read_bytes())  # repaired
    again, detector = detect(tmp_path, output, moments)
    assert (again.done, again.skipped, len(detector.seen)) == (["c"], ["a", "b"], 3)
    assert not parts.exists()


def test_nobody_is_there(videos, tmp_path):
    output = tmp_path / "boxes.csv"
    result, _ = detect(videos, output, moments_between(["a"], 0, 0))
    assert (result.num_boxes, output.read_text()) == (0, "")
    (tmp_path / f"other.csv{job.PARTS}").mkdir()
    (tmp_path / f"other.csv{job.PARTS}" / "mine.txt").touch()
    with pytest.raises(UserError, match="holds other things"):
        detect(videos, tmp_path / "other.csv", moments_between(["a"], 0, 0))
    with pytest.raises(UserError, match="no keyframes"):
        detect(videos, output, [])
    with pytest.raises(UserError, match="no pictures"):
        detect(videos, output, moments_between(["gone"], 0, 0))


# --------------------------------------------------------------------------------------------------------- detectors
def saved_detector(path: Path, num_classes: int = 3) -> tuple[torch.nn.Module, str]:
    """torchvision's smallest Faster R-CNN with random weights, and its file."""
    torch.manual_seed(1)
    name = "fasterrcnn_mobilenet_v3_large_320_fpn"
    model = torchvision.models.get_model(
        name,
        weights=None,
        weights_backbone=None,
        num_classes=num_classes,
        box_score_thresh=0.2,
        min_size=96,
        max_size=1333,
    )
    torch.nn.init.normal_(model.roi_heads.box_predictor.cls_score.weight, 0, 0.5)
    torch.save(model.state_dict(), path)
    return model.eval(), name


def test_torchvisions_detectors(tmp_path):
    model, name = saved_detector(tmp_path / "d.pth")
    detector = build_detector(
        name, str(tmp_path / "d.pth"), device=torch.device("cpu"), floor=0.2, most=5, short_side=96
    )
    generator = torch.Generator().manual_seed(2)
    pictures = [torch.randint(0, 256, (3, 64, width), dtype=torch.uint8, generator=generator) for width in (80, 100)]
    found = detector(pictures)
    with torch.no_grad():
        expected = model([picture.float() / 255 for picture in pictures])
    assert max(len(own.boxes) for own in found) == 5
    for own, theirs in zip(found, expected, strict=True):
        persons_only = theirs["labels"] == 1
        assert (~persons_only).any()
        torch.testing.assert_close(own.boxes, theirs["boxes"][persons_only][:5], atol=1e-3, rtol=1e-4)
        torch.testing.assert_close(own.scores, theirs["scores"][persons_only][:5], atol=1e-5, rtol=1e-5)


def test_wrong_detectors(tmp_path, capsys):
    def build(arch, weights="x.pth"):
        return build_detector(arch, str(weights), device=torch.device("cpu"))

    with pytest.raises(UserError, match="fasterrcnn_resnet50_fpn"):
        build("fasterrcnn_resnet50")
    with pytest.raises(WeightsError, match=r"x\.pth"):
        build("fasterrcnn_resnet50_fpn")
    torch.save({"a": torch.zeros(2)}, tmp_path / "a.pth")
    with pytest.raises(WeightsError, match="no Faster R-CNN"):
        build("fasterrcnn_resnet50_fpn", tmp_path / "a.pth")
    torch.save({"roi_heads.box_predictor.cls_score.weight": torch.zeros(3, 1024)}, tmp_path / "d.pth")
    with pytest.raises(WeightsError, match=r"another network|does not fit"):
        build("fasterrcnn_mobilenet_v3_large_320_fpn", tmp_path / "d.pth")
    with pytest.raises(UserError, match="detectron2, which is not installed"):
        build("detectron2/COCO-Detection/faster_rcnn_R_50_FPN_3x.yaml", "")
    folder = str(tmp_path / "none")
    for words, message in (
        (["--videos", folder, "--output", "x.csv"], "none"),
        (["--videos", folder, "--output", "x.csv", "--frame-list", "l.csv"], "--frame-list"),
        (["--videos", folder, "--output", "x.csv", "--keyframes", "k.csv", "--seconds", "1", "2"], "--keyframes"),
        (["--videos", folder, "--output", "x.csv", "--device", "abacus"], "abacus"),
    ):
        assert cli.main(["detect-persons", *words]) == 1
        assert message in capsys.readouterr().err


def test_detectron2_gets_pictures_as_it_wants_them(monkeypatch):
    """A stand-in with the names that are used of detectron2."""
    told = {}

    class Node(types.SimpleNamespace):
        def merge_from_file(self, path):
            told["config"] = path

    def get_cfg():
        return Node(MODEL=Node(ROI_HEADS=Node()), INPUT=Node())

    class Instances(types.SimpleNamespace):
        def to(self, device):
            return self

    class DefaultPredictor:
        def __init__(self, cfg):
            told["cfg"] = cfg

        def __call__(self, picture):
            told["picture"] = picture
            boxes = types.SimpleNamespace(tensor=torch.tensor([[0.0, 0, 5, 5], [1, 1, 6, 6], [2, 2, 7, 7]]))
            classes = torch.tensor([0, 17, 0])
            return {
                "instances": Instances(pred_boxes=boxes, scores=torch.tensor([0.5, 0.9, 0.8]), pred_classes=classes)
            }

    zoo = types.SimpleNamespace(get_config_file=lambda c: f"/zoo/{c}", get_checkpoint_url=lambda c: f"url:{c}")
    parts = {"model_zoo": zoo, "config": types.SimpleNamespace(get_cfg=get_cfg)}
    parts["engine"] = types.SimpleNamespace(DefaultPredictor=DefaultPredictor)
    monkeypatch.setitem(sys.modules, "detectron2", types.ModuleType("detectron2"))
    for name, part in parts.items():
        monkeypatch.setitem(sys.modules, f"detectron2.{name}", part)
    detector = persons.build_detector("detectron2/a.yaml", "", device=torch.device("cpu"), floor=0.3)
    picture = torch.arange(3 * 4 * 6, dtype=torch.uint8).view(3, 4, 6)
    (found,) = detector([picture])
    assert found.boxes.tolist() == [[2, 2, 7, 7], [0, 0, 5, 5]]
    assert found.scores.tolist() == pytest.approx([0.8, 0.5])
    np.testing.assert_array_equal(told["picture"], picture.flip(0).permute(1, 2, 0).numpy())
    assert (told["config"], told["cfg"].MODEL.WEIGHTS) == ("/zoo/a.yaml", "url:a.yaml")
    assert told["cfg"].MODEL.ROI_HEADS.SCORE_THRESH_TEST == 0.3
