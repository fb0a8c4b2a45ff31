"""Mistakes with weights, teachers, objectives and the machine, each with the message that it gets.

The first half of the table is in ``test_bad_inputs.py``; what befalls a job from outside in ``test_bad_machines.py``.
"""

import os
import pickle
import sys
from pathlib import Path

import pytest
import torch
from bad_inputs import Case, Place, World, ids, message_of
from small_jobs import brightness_teacher, write_teacher

from distinit_plugin import cli

TEACHER = "DISTILL.TEACHERS.LIGHT"
FOREIGN = (f"{TEACHER}.DEPTH", 18, f"{TEACHER}.NETWORK.WIDTH", 64)  # as for a network whose name says it all
START = "TRAIN.CHECKPOINT_FILE_PATH"
HTML = "<!DOCTYPE html>\n<html><head><title>404 Not Found</title></head></html>\n"


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    return World(tmp_path_factory.mktemp("world"))


# ------------------------------------------------------------------------------------------------------------ weights
class Evil:
    """A pickle that makes a file when it is loaded without care."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.path),)


def saved(place: Place, name: str, contents: object) -> Path:
    path = place.folder / name
    torch.save(contents, path)
    return path


def unsafe(place: Place) -> list[str]:
    return place.job(START, saved(place, "evil.pth", {"state_dict": {"x": Evil(place.folder / "executed")}}))


def unsafe_pickle(place: Place) -> list[str]:
    path = place.file("evil.pkl", pickle.dumps({"state_dict": Evil(place.folder / "executed")}))
    return place.job(f"{TEACHER}.WEIGHTS", path)


def truncated(place: Place) -> Path:
    return place.file("half.pyth", place.world.trained.read_bytes()[:-5000])


def diverged(place: Place) -> list[str]:
    state = torch.load(place.world.teacher, weights_only=True)
    next(iter(state.values())).fill_(float("nan"))
    return place.job(f"{TEACHER}.WEIGHTS", saved(place, "nan.pth", state))


def places(place: Place) -> list[str]:
    """Weights for 365 classes where the teacher is said to have 1000."""
    path = write_teacher(place.folder / "places.pth.tar", num_classes=365)
    return place.job(f"{TEACHER}.WEIGHTS", path, f"{TEACHER}.NUM_CLASSES", 1000)


def other_student(place: Place, *opts: object) -> list[str]:
    return place.labels(START, place.world.trained, *opts)


WEIGHTS = [
    Case(
        "start is missing",
        lambda p: p.job(START, "/nowhere/x.pyth"),
        (START, "/nowhere/x.pyth does not exist", "--opts"),
    ),
    Case("start is a folder", lambda p: p.job(START, p.world.videos), (START, "are a folder", "Name one file")),
    Case("start is truncated", lambda p: p.job(START, truncated(p)), (START, "half.pyth", "truncated")),
    Case("start is empty", lambda p: p.job(START, p.file("x.pyth", "")), (START, "x.pyth is empty")),
    Case(
        "start is a web page",
        lambda p: p.job(START, p.file("x.pth", HTML)),
        (START, "x.pth is a text file", "Download it again"),
    ),
    Case("start needs unsafe loading", unsafe, (START, "evil.pth", "mkdir", "could run code, so it is refused")),
    Case(
        "start holds no weights",
        lambda p: p.job(START, saved(p, "x.pth", {"epoch": 3})),
        (START, "x.pth holds no weights", "'epoch'"),
    ),
    Case("start is a list", lambda p: p.job(START, saved(p, "x.pth", [1, 2])), (START, "x.pth holds a list")),
    Case(
        "start is of another depth",
        lambda p: other_student(p, "RESNET.DEPTH", 18),
        (START, "another network", "RESNET.DEPTH"),
    ),
    Case(
        "start is of another width",
        lambda p: other_student(p, "NETWORK.WIDTH", 16),
        (START, "another network", "file 6×3×1×7×7", "width"),
    ),
    Case(
        "start is an image network",
        lambda p: p.job(START, p.world.teacher, MODEL={"MODEL_NAME": "Res3D"}),
        (START, "another network"),
    ),
    Case(
        "test weights are missing",
        lambda p: p.labels("TRAIN.ENABLE", False),
        ("no checkpoint to test", "TEST.CHECKPOINT_FILE_PATH"),
    ),
    Case(
        "test weights are truncated",
        lambda p: p.labels("TEST.CHECKPOINT_FILE_PATH", truncated(p)),
        ("TEST.CHECKPOINT_FILE_PATH", "half.pyth", "truncated"),
    ),
    Case(
        "test weights have other classes",
        lambda p: p.labels("TRAIN.ENABLE", False, "TEST.CHECKPOINT_FILE_PATH", p.world.trained, "MODEL.NUM_CLASSES", 5),
        ("does not fit the network", "fc.weight"),
    ),
    Case(
        "teacher's file is missing",
        lambda p: p.job(f"{TEACHER}.WEIGHTS", "./gone.pth"),
        (f"{TEACHER}.WEIGHTS", "gone.pth does not exist", "looked from"),
    ),
    Case(
        "Places file is missing",
        lambda p: p.job(f"{TEACHER}.ARCH", "torchvision/resnet50", f"{TEACHER}.WEIGHTS", "resnet50_places365.pth.tar"),
        (f"{TEACHER}", "resnet50_places365.pth.tar"),
    ),
    Case(
        "teacher's tag is unknown",
        lambda p: p.job(*FOREIGN, f"{TEACHER}.ARCH", "torchvision/resnet18", f"{TEACHER}.WEIGHTS", "IMAGENET_V1"),
        (TEACHER, "no weights named IMAGENET_V1", "Did you mean IMAGENET1K_V1"),
    ),
    Case(
        "teacher's file has other classes",
        lambda p: p.job(f"{TEACHER}.NUM_CLASSES", 7),
        (TEACHER, "has 4 classes, NUM_CLASSES is 7", "Set NUM_CLASSES to 4"),
    ),
    Case("Places file has other classes", places, (TEACHER, "has 365 classes, NUM_CLASSES is 1000")),
    Case(
        "teacher's file is of another width",
        lambda p: p.job(f"{TEACHER}.NETWORK.WIDTH", 16),
        (TEACHER, "teacher.pth", "another network", "file 8×3×7×7"),
    ),
    Case(
        "teacher's file is of another network",
        lambda p: p.job(*FOREIGN, f"{TEACHER}.ARCH", "torchvision/squeezenet1_0"),
        (TEACHER, "teacher.pth", "another network"),
    ),
    Case(
        "teacher's file needs unsafe loading",
        unsafe_pickle,
        (TEACHER, "evil.pkl", "mkdir", "could run code, so it is refused"),
    ),
    Case(
        "teacher's file is a web page",
        lambda p: p.job(f"{TEACHER}.WEIGHTS", p.file("x.pth", HTML)),
        (TEACHER, "x.pth is a text file"),
    ),
    Case("teacher's weights diverged", diverged, (TEACHER, "nan.pth", "NaN or infinite")),
    Case(
        "checkpoint for predict is no checkpoint",
        lambda p: ["predict", "x.mp4", "--checkpoint", str(p.world.teacher)],
        ("teacher.pth", "no entry 'model_state'"),
    ),
    Case(
        "checkpoint for predict is unsafe",
        lambda p: ["predict", "x.mp4", "--checkpoint", str(saved(p, "e.pyth", Evil(p.folder / "executed")))],
        ("e.pyth",),
    ),
    Case(
        "probe without weights",
        lambda p: p.labels(verb="probe"),
        ("no checkpoint to test", "TEST.CHECKPOINT_FILE_PATH"),
        starts=True,
    ),
]


# --------------------------------------------------------------------------------------------------------- objectives
def teacher(place: Place, **keys: object) -> list[str]:
    return place.job(DISTILL={"TEACHERS": {"LIGHT": brightness_teacher(place.world.teacher, **keys)}})


OBJECTIVES = [
    Case(
        "unknown teacher",
        lambda p: teacher(p, ARCH="torchvision/resnet5O", DEPTH=18, NETWORK={"WIDTH": 64}),
        (TEACHER, "torchvision has no network named 'resnet5O'", "Did you mean resnet50"),
    ),
    Case(
        "unknown timm teacher",
        lambda p: teacher(p, ARCH="timm/test_resent", DEPTH=18, NETWORK={"WIDTH": 64}),
        (TEACHER, "timm has no network named 'test_resent'", "Did you mean test_resnet"),
    ),
    Case(
        "unknown library",
        lambda p: teacher(p, ARCH="keras/resnet50"),
        (f"{TEACHER}.ARCH", "torchvision/NAME, timm/NAME"),
    ),
    Case(
        "unknown student",
        lambda p: p.job(MODEL={"MODEL_NAME": "R2PLus1D"}),
        ("MODEL.MODEL_NAME", "Did you mean R2Plus1D"),
    ),
    Case(
        "unknown library student",
        lambda p: p.job(MODEL={"MODEL_NAME": "torchvision/r3d_81"}, RESNET={"DEPTH": 18}, NETWORK={"WIDTH": 64}),
        ("r3d_81", "Did you mean r3d_18"),
    ),
    Case(
        "teacher's layer",
        lambda p: teacher(p, LAYER="stage3", LOSS="mse"),
        (TEACHER, "LAYER is 'stage3'", "Known: logits, features", "feature_map"),
    ),
    Case(
        "teacher's layer, nearly",
        lambda p: teacher(p, LAYER="logit", LOSS="mse"),
        (TEACHER, "LAYER is 'logit'", "Did you mean logits?"),
    ),
    Case(
        "own layer of another size",
        lambda p: teacher(p, LAYER="layer3", LOSS="mse", HEAD="own", NETWORK={"WIDTH": 16}, WEIGHTS="random"),
        (TEACHER, "the student's layer3 have size 32, the teacher's layer3 64", "HEAD linear"),
    ),
    Case(
        "student's layer",
        lambda p: teacher(p, LAYER="feature_map", STUDENT_LAYER="stage9", LOSS="mse"),
        (TEACHER, "the student has no layer named 'stage9'", "Known:"),
    ),
    Case(
        "own logits of another size",
        lambda p: teacher(p, HEAD="own"),
        (f"{TEACHER}.HEAD", "2 logits", "4 of the teacher", "HEAD linear"),
    ),
    Case(
        "own features of another size",
        lambda p: teacher(p, HEAD="own", LAYER="features", LOSS="mse", NETWORK={"WIDTH": 16}, WEIGHTS="random"),
        (TEACHER, "features have size 64", "128", "HEAD linear"),
    ),
    Case(
        "map against a vector",
        lambda p: teacher(p, LAYER="feature_map", STUDENT_LAYER="logits", LOSS="mse"),
        (f"{TEACHER}.STUDENT_LAYER", "is no map"),
    ),
    Case(
        "gate without logits",
        lambda p: teacher(p, LAYER="features", LOSS="mse", MAX_ENTROPY=1.0),
        (f"{TEACHER}.MAX_ENTROPY", "needs class probabilities", "Set -1"),
    ),
    Case(
        "gate that never gates",
        lambda p: teacher(p, MAX_ENTROPY=5.0),
        (f"{TEACHER}.MAX_ENTROPY", "4 classes have at most 1.39"),
    ),
    Case(
        "inflated R(2+1)D",
        lambda p: p.job(INIT={"INFLATE_FROM": "Res2D", "INFLATE_WEIGHTS": str(p.world.teacher)}),
        ("INIT.INFLATE_FROM", "no 2D counterpart", "Use Res3D"),
    ),
    Case(
        "inflated from another width",
        lambda p: p.job(
            "NETWORK.WIDTH",
            16,
            MODEL={"MODEL_NAME": "Res3D"},
            INIT={"INFLATE_FROM": "Res2D", "INFLATE_WEIGHTS": str(p.world.teacher)},
        ),
        ("INIT.INFLATE_FROM", "not the 2D counterpart", "NETWORK.WIDTH"),
    ),
    Case(
        "batch and accumulation",
        lambda p: p.job("RUNNER.ACCUMULATE", 3),
        ("TRAIN.BATCH_SIZE: 4", "RUNNER.ACCUMULATE", "multiple of 3"),
    ),
    Case(
        "crop above the scales",
        lambda p: p.job("DATA.TRAIN_CROP_SIZE", 64),
        ("DATA.TRAIN_JITTER_SCALES", "36", "smaller than DATA.TRAIN_CROP_SIZE 64"),
    ),
    Case(
        "more frames than the clip",
        lambda p: teacher(p, FRAME_PICK="random", NUM_PICKED_FRAMES=9),
        (f"{TEACHER}.NUM_PICKED_FRAMES", "1 … 4"),
    ),
]


# -------------------------------------------------------------------------------------------------------- the machine
MACHINE = [
    Case("no GPU", lambda p: p.job("NUM_GPUS", 1), ("NUM_GPUS is 1", "finds no GPU", "0 for the CPU")),
    Case("fp16 on a CPU", lambda p: p.job("RUNNER.PRECISION", "fp16"), ("RUNNER.PRECISION", "GPU only")),
    Case(
        "bf16 and deterministic",
        lambda p: p.job("RUNNER.DETERMINISTIC", True, "RUNNER.PRECISION", "bf16"),
        ("RUNNER.DETERMINISTIC", "fp32"),
    ),
    Case(
        "compiled and deterministic",
        lambda p: p.job("RUNNER.DETERMINISTIC", True, "RUNNER.COMPILE", True),
        ("RUNNER.COMPILE", "RUNNER.DETERMINISTIC"),
    ),
    Case("output below a file", lambda p: p.job("OUTPUT_DIR", p.file("f", "") / "run"), ("OUTPUT_DIR", "is a file")),
    Case("output is a file", lambda p: p.job("OUTPUT_DIR", p.file("f", "")), ("OUTPUT_DIR", "is a file")),
    Case(
        "output in a system's folder",
        lambda p: p.job("OUTPUT_DIR", "/proc/1/run"),
        ("/proc/1/run", "cannot"),
        starts=True,
    ),
    Case(
        "time stamps below a file",
        lambda p: p.job("CORPUS.INDEX_CACHE", p.file("f", "") / "x"),
        ("CORPUS.INDEX_CACHE", "is a file"),
    ),
    Case(
        "network beyond memory",
        lambda p: p.job("NETWORK.WIDTH", 10**6),
        ("not enough memory", "NETWORK.WIDTH"),
        starts=True,
    ),
]

CASES = [*WEIGHTS, *OBJECTIVES, *MACHINE]


@pytest.mark.parametrize("case", CASES, ids=ids(CASES))
def test_bad_input_gets_its_message(case, world, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # "no GPU" on every machine
    message = message_of(case, world, tmp_path, capsys)
    print(message)
    missing = [part for part in case.expected if part not in message]
    assert not missing, message
    assert not (tmp_path / "executed").exists()


def test_all_at_once(world, tmp_path, capsys, monkeypatch):
    """Mistakes of every kind in one job, each told; none is told twice."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    place = Place(world, tmp_path)
    rows = place.file("val.csv", "test/dark/video100.mp4 9\n")
    words = place.labels(
        *("SOLVER.BASE_RL", 1, "DATA.NUM_FRAMES", "many", "SOLVER.MOMENTUM", 2, "NUM_GPUS", 1),
        *("TEST.CHECKPOINT_FILE_PATH", "/nowhere/x.pyth", "CORPUS.TEST.VIDEOS.PATH", "/nowhere/videos"),
        *("CORPUS.TRAIN.VIDEOS.PATH", place.world.videos / "train" / "dark"),
        CORPUS={"VAL": {"ROWS": {"FORMAT": "csv", "PATH": str(rows), "ROOT": str(world.videos), "LABELED": True}}},
        DISTILL={
            "TEACHERS": {
                "NAME": brightness_teacher(world.teacher, ARCH="torchvision/resnet5O"),
                "FILE": brightness_teacher(world.teacher, NUM_CLASSES=7),
            }
        },
    )
    message = message_of(Case("", lambda _: words, ()), world, tmp_path, capsys)
    expected = [
        *("SOLVER.BASE_RL (in --opts)", "DATA.NUM_FRAMES (in --opts)", "SOLVER.MOMENTUM: 2.0", "NUM_GPUS is 1"),
        *("TEST.CHECKPOINT_FILE_PATH: /nowhere/x.pyth", "CORPUS.TEST.VIDEOS.PATH: /nowhere/videos"),
        *("CORPUS.TRAIN: Corpus 'VIDEOS' (folder)", "CORPUS.VAL: Corpus 'ROWS': 1 labels do not fit 2 classes"),
        *("DISTILL.TEACHERS.NAME: torchvision has no network", "DISTILL.TEACHERS.FILE: teacher Res2D"),
    ]
    first, *others = message.splitlines()
    assert first == f"error: {len(expected)} things are wrong:"
    assert len(others) == len(expected), message
    assert [part for part in expected if sum(line.startswith(f"- {part}") for line in others) != 1] == []


def test_tensorboard_that_is_not_installed(world, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)  # importing it fails
    case = Case("", lambda p: p.job("TENSORBOARD.ENABLE", True), ())
    assert "pip install 'distinit-plugin[tensorboard]'" in message_of(case, world, tmp_path, capsys)


def test_lists_from_other_systems_work(world, tmp_path):
    """A byte order mark, carriage returns, blank lines and a name in Latin-1 are no mistakes."""
    place = Place(world, tmp_path)
    videos = place.copy()
    os.rename(videos / "train" / "dark" / "video1.mp4", os.fsencode(videos / "train" / "dark") + b"/caf\xe9.mp4")
    rows = b"\xef\xbb\xbftrain/bright/video0.mp4 0\r\n\r\ntrain/dark/caf\xe9.mp4 1\r\n" * 2
    words = place.listed(rows, ROOT=str(videos))
    assert cli.main([*words, "--opts", "TEST.ENABLE", "False"]) == 0
