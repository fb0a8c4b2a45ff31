"""Mistakes in configurations, command lines and lists of videos, each with the message that it gets.

``test_bad_files.py`` goes on with weights, teachers and the machine. Every case goes through the command line from end
to end. The rules of single keys have a table of their own in ``test_config_rules.py``, the readers of lists in
``test_corpus.py``.
"""

import shutil

import pytest
from bad_inputs import Case, Place, World, billion_laughs, ids, message_of

GOOD_ROWS = "train/bright/video0.mp4 0\ntrain/dark/video0.mp4 1\ntrain/bright/video1.mp4 0\ntrain/dark/video1.mp4 1\n"
TEST_ROWS = "test/bright/video100.mp4 0\ntest/dark/video100.mp4 1\n"


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    return World(tmp_path_factory.mktemp("world"))


# -------------------------------------------------------------------------------------------------------- YAML files
def cycle(place: Place) -> list[str]:
    place.file("a.yaml", "_BASE_: b.yaml\n")
    place.file("b.yaml", "_BASE_: a.yaml\n")
    return ["run", "--cfg", str(place.folder / "a.yaml")]


YAML = [
    Case(
        "unknown key", lambda p: p.yaml("SOLVER: {BASE_RL: 1}"), ("SOLVER.BASE_RL", "job.yaml", "Did you mean BASE_LR?")
    ),
    Case("unknown node", lambda p: p.yaml("SOLVR: {BASE_LR: 1}"), ("SOLVR", "job.yaml", "Did you mean SOLVER?")),
    Case("key in the wrong node", lambda p: p.yaml("BATCH_SIZE: 1"), ("BATCH_SIZE", "TRAIN.BATCH_SIZE")),
    Case(
        "text for a number", lambda p: p.job(SOLVER={"BASE_LR": "fast"}), ("SOLVER.BASE_LR", "'fast' is not a number")
    ),
    Case("list for a number", lambda p: p.job(RNG_SEED=[1, 2]), ("RNG_SEED", "[1, 2] is not a whole number")),
    Case("fraction for a count", lambda p: p.job(DATA={"NUM_FRAMES": 8.5}), ("DATA.NUM_FRAMES", "8.5 is not a whole")),
    Case("bool for a number", lambda p: p.job(SOLVER={"BASE_LR": True}), ("SOLVER.BASE_LR", "True is not a number")),
    Case("number for a bool", lambda p: p.job(TRAIN={"ENABLE": 1}), ("TRAIN.ENABLE", "1 is not True or False")),
    Case("number for a text", lambda p: p.job(OUTPUT_DIR=5), ("OUTPUT_DIR", "5 is not text", "put it in quotes")),
    Case("value for a node", lambda p: p.job(TEST=3), ("TEST", "is a node with keys of its own")),
    Case("not a number", lambda p: p.job(SOLVER={"BASE_LR": float("nan")}), ("SOLVER.BASE_LR", "a finite number")),
    Case(
        "infinite", lambda p: p.job(SOLVER={"WEIGHT_DECAY": float("inf")}), ("SOLVER.WEIGHT_DECAY", "a finite number")
    ),
    Case("negative", lambda p: p.job(SOLVER={"BASE_LR": -0.1}), ("SOLVER.BASE_LR: -0.1", "a number > 0", "0.01")),
    Case("huge seed", lambda p: p.job(RNG_SEED=10**30), ("RNG_SEED", "≤ 4294967295")),
    Case("huge float", lambda p: p.job(SOLVER={"BASE_LR": "9" * 400}), ("SOLVER.BASE_LR", "999...999", "not a number")),
    Case("huge batch", lambda p: p.job("TRAIN.BATCH_SIZE", 10**12), ("TRAIN.BATCH_SIZE", "≤ 1000000000")),
    Case("mean of two", lambda p: p.job(DATA={"MEAN": [0.5, 0.5]}), ("DATA.MEAN", "one entry for each")),
    Case(
        "flow from frames",
        lambda p: p.job(NETWORK={"MODALITY": "flow"}),
        ("NETWORK.MODALITY flow", "2 channels", "Give one entry"),
    ),
    Case("not YAML", lambda p: p.yaml("TRAIN: [1, 2\nTEST: {"), ("job.yaml, line 2", "cannot be read as YAML")),
    Case("a sentence", lambda p: p.yaml("please train well"), ("job.yaml", "is a str", "a mapping of KEY: value")),
    Case("a list", lambda p: p.yaml("- TRAIN\n- TEST\n"), ("job.yaml", "is a list", "a mapping of KEY: value")),
    Case("empty", lambda p: p.yaml(""), ("DISTILL.TEACHERS", "nothing to learn", "CORPUS.TRAIN: empty")),
    Case("binary", lambda p: p.yaml(b"\x89PNG\r\n\x1a\n\0\0\xff"), ("job.yaml", "not a text file")),
    Case("zero bytes", lambda p: p.yaml("TRAIN:\0\n"), ("job.yaml", "cannot be read as YAML")),
    Case("tabs", lambda p: p.yaml("TRAIN:\n\tENABLE: True\n"), ("job.yaml, line 2, column 1", "\\t", "spaces")),
    Case("a key twice", lambda p: p.yaml("RNG_SEED: 1\nRNG_SEED: 2\n"), ("line 2", "RNG_SEED is written twice")),
    Case("python tag", lambda p: p.yaml("RNG_SEED: !!python/object/apply:os.getpid []"), ("line 1", "python/object")),
    Case(
        "anchor bomb", lambda p: p.yaml(billion_laughs()), ("DATA.MEAN", "DATA.STD", "SOLVER.k", "there is no such key")
    ),
    Case("deep nesting", lambda p: p.yaml("[" * 2000), ("job.yaml", "cannot be read as YAML")),
    Case("missing base", lambda p: p.yaml("_BASE_: gone.yaml"), ("job.yaml", "_BASE_ names gone.yaml")),
    Case("two bases", lambda p: p.yaml("_BASE_: [a.yaml, b.yaml]"), ("job.yaml", "_BASE_", "one file name")),
    Case("cyclic bases", cycle, ("_BASE_ leads back", "a file cannot inherit itself")),
    Case("two bad files", lambda p: [*p.yaml("a: ["), str(p.file("b.yaml", "- 1"))], ("job.yaml", "b.yaml", "a list")),
    Case(
        "teacher without a name", lambda p: p.yaml("DISTILL: {TEACHERS: {'1 x': {ARCH: Res2D}}}"), ("'1 x' is no name",)
    ),
    Case(
        "mistyped teacher", lambda p: p.job("DISTILL.TEACHERS.LIHGT.LOSS_WEIGHT", 2), ("there is no 'LIHGT'", "LIGHT?")
    ),
    Case(
        "PySlowFast's key, mistyped",
        lambda p: p.job(MVIT={"DEPHT": 16}),
        ("MVIT.DEPHT", "job.yaml", "Did you mean DEPTH?"),
    ),
]


# ----------------------------------------------------------------------------------------------------- command lines
COMMAND_LINES = [
    Case("odd options", lambda p: p.job("SOLVER.BASE_LR"), ("--opts", "KEY VALUE", "'SOLVER.BASE_LR' is left over")),
    Case(
        "equals sign",
        lambda p: p.job("RNG_SEED=3"),
        (
            "--opts",
            "Write RNG_SEED 3",
        ),
    ),
    Case(
        "half a mapping",
        lambda p: p.job("DISTILL.TEACHERS.X", "{ARCH: "),
        ("DISTILL.TEACHERS.X", "cannot be read as YAML"),
    ),
    Case("unknown verb", lambda p: ["trian"], ("invalid choice: 'trian'", "check-corpus"), 2),
    Case("unknown flag", lambda p: [*p.job(), "--gpus", "2"], ("--gpus",), 2),
    Case("no configuration", lambda p: ["run"], ("--cfg",), 2),
    Case("no such file", lambda p: ["run", "--cfg", str(p.folder / "gone.yaml")], ("gone.yaml: no such file",)),
    Case("a folder", lambda p: ["run", "--cfg", str(p.folder)], ("a folder, not a YAML file",)),
    Case("text for a shard", lambda p: ["run", "--shard_id", "two", *p.job()[1:]], ("--shard_id", "invalid int"), 2),
    Case("predict without weights", lambda p: ["predict", "x.mp4"], ("--checkpoint",), 2),
    Case(
        "predict clips",
        lambda p: ["predict", "x.mp4", "--checkpoint", str(p.world.trained), "--clips", "0"],
        ("--clips", "≥ 1"),
        2,
    ),
    Case(
        "predict top",
        lambda p: ["predict", "x.mp4", "--checkpoint", str(p.world.trained), "--top", "-1"],
        ("--top", "≥ 1"),
        2,
    ),
    Case("probe neighbours", lambda p: [*p.labels(verb="probe"), "--neighbors", "0"], ("--neighbors",), 2),
    Case(
        "check-corpus workers",
        lambda p: ["check-corpus", str(p.world.videos), "--workers", "-1"],
        ("--workers", "≥ 1"),
        2,
    ),
    Case(
        "check-corpus timeout", lambda p: ["check-corpus", str(p.world.videos), "--timeout", "nan"], ("--timeout",), 2
    ),
    Case(
        "check-corpus format",
        lambda p: ["check-corpus", str(p.world.videos), "--format", "foldr"],
        ("foldr", "Did you mean folder?"),
    ),
    Case("check-corpus nothing there", lambda p: ["check-corpus", str(p.folder / "gone")], ("gone", "no such file")),
    Case(
        "check-corpus output",
        lambda p: ["check-corpus", str(p.world.videos / "test"), "--output", str(p.file("f", "") / "x.csv")],
        ("--output", "is a file", "--output FOLDER/FILE.csv"),
    ),
    Case(
        "split of another corpus",
        lambda p: p.labels(verb="run-splits"),
        ("only ucf101 and hmdb51 have splits", "folder"),
    ),
    Case("split four", lambda p: ["run-splits", "--splits", "4", *p.labels()[1:]], ("--splits", "invalid choice"), 2),
    Case("curves of nothing", lambda p: ["plot-curves", str(p.folder / "gone")], ("gone has no curves", "OUTPUT_DIR")),
    Case(
        "curves to nowhere",
        lambda p: ["plot-curves", str(p.world.run), "--output", str(p.file("f", "") / "x.png")],
        ("x.png",),
    ),
    Case("quickstart over a file", lambda p: ["quickstart", "--output", str(p.file("f", ""))], ("f", "file")),
    Case(
        "quickstart seeds",
        lambda p: ["quickstart", "--output", str(p.folder / "q"), "--seeds", "-1"],
        ("--seeds", "≥ 0"),
        2,
    ),
    Case("demo-d3d over a file", lambda p: ["demo-d3d", "--output", str(p.file("f", ""))], ("f", "file")),
    Case(
        "demo-d3d seeds twice",
        lambda p: ["demo-d3d", "--output", str(p.folder / "d"), "--seeds", "1", "1"],
        ("--seeds", "twice"),
    ),
    Case(
        "quickstart processes",
        lambda p: ["quickstart", "--output", str(p.folder / "q"), "--processes", "-3"],
        ("--processes",),
        2,
    ),
]


# --------------------------------------------------------------------------------------------------------------- data
def no_bright(place: Place) -> list[str]:
    videos = place.copy()
    shutil.rmtree(videos / "test" / "bright")
    return place.labels("CORPUS.TEST.VIDEOS.PATH", videos / "test")


def ucf(place: Place, **files: str) -> list[str]:
    """UCF-101's files over two classes; ``files`` (``trainlist01``) replace or, when empty, remove them."""
    contents = {
        "classInd": "1 bright\n2 dark\n",
        "trainlist01": "bright/video0.avi 1\ndark/video0.avi 2\n",
        "testlist01": "bright/video1.avi\ndark/video1.avi\n",
    }
    for name, text in {**contents, **files}.items():
        if text:
            place.file(f"lists/{name}.txt", text)
    entry = {"FORMAT": "ucf101", "PATH": str(place.folder / "lists"), "ROOT": str(place.world.videos / "train")}
    return place.labels(CORPUS={use: {"VIDEOS": {**entry, "LABELED": True}} for use in ("TRAIN", "TEST")})


def hmdb(place: Place, rows: str) -> list[str]:
    place.file("lists/bright_test_split1.txt", rows)
    place.file("lists/dark_test_split1.txt", "video0.avi 1\nvideo1.avi 2\n")
    entry = {"FORMAT": "hmdb51", "PATH": str(place.folder / "lists"), "ROOT": str(place.world.videos / "train")}
    return place.labels(CORPUS={use: {"VIDEOS": {**entry, "LABELED": True}} for use in ("TRAIN", "TEST")})


def kinetics(place: Place, text: str, **keys: str) -> list[str]:
    path = place.file("train.csv", text)
    entry = {
        "FORMAT": "kinetics",
        "PATH": str(path),
        "ROOT": str(place.world.videos / "train"),
        "LABELED": True,
        **keys,
    }
    return place.labels(CORPUS={"TRAIN": {"VIDEOS": entry}})


def broken(place: Place, keep: int, use: str = "train") -> list[str]:
    """All but the first ``keep`` videos of each class are broken."""
    videos = place.copy()
    for folder in sorted((videos / use).iterdir()):
        for path in sorted(folder.iterdir())[keep:]:
            path.write_bytes(b"no video at all")
    return place.labels(f"CORPUS.{use.upper()}.VIDEOS.PATH", videos / use)


def empty_folder(place: Place) -> list[str]:
    (place.folder / "empty").mkdir()
    return place.job("CORPUS.TRAIN.VIDEOS.PATH", place.folder / "empty")


def mixed_sizes(place: Place) -> list[str]:
    from PIL import Image

    for video in range(4):
        for frame in range(8):
            path = place.folder / "frames" / f"v{video}" / f"{frame}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (64, 48) if frame < 1 else (48, 64)).save(path)
    entry = {"FORMAT": "frames", "PATH": str(place.folder / "frames")}
    return place.job(CORPUS={"TRAIN": {"VIDEOS": entry}})


DATA = [
    Case(
        "missing folder",
        lambda p: p.job("CORPUS.TRAIN.VIDEOS.PATH", "/nowhere/x"),
        ("CORPUS.TRAIN.VIDEOS.PATH", "/nowhere/x"),
    ),
    Case("empty folder", empty_folder, ("CORPUS.TRAIN", "there is no video in", "empty", "mp4")),
    Case(
        "paths from another root",
        lambda p: p.listed("elsewhere/1.mp4 0\nelsewhere/2.mp4 1\n"),
        ("CORPUS.TRAIN", "none of 2 videos", "elsewhere/1.mp4", "ROOT"),
    ),
    Case(
        "test paths from another root",
        lambda p: p.listed("elsewhere/1.mp4 0\n", "TEST"),
        ("CORPUS.TEST", "elsewhere/1.mp4", "ROOT"),
    ),
    Case(
        "label too high",
        lambda p: p.listed(GOOD_ROWS + "train/dark/video2.mp4 2\n"),
        ("CORPUS.TRAIN", "video2.mp4 has 2", "MODEL.NUM_CLASSES", "0 to 1"),
    ),
    Case(
        "validation label too high",
        lambda p: p.listed(TEST_ROWS.replace(" 1", " 7"), "VAL"),
        ("CORPUS.VAL", "has 7", "MODEL.NUM_CLASSES"),
    ),
    Case(
        "test label too high",
        lambda p: p.listed(TEST_ROWS.replace(" 1", " 7"), "TEST"),
        ("CORPUS.TEST", "has 7", "MODEL.NUM_CLASSES"),
    ),
    Case("label negative", lambda p: p.listed(GOOD_ROWS + "a.mp4 -1\n"), ("list.csv", "line 5 (label -1 is negative)")),
    Case(
        "label in words",
        lambda p: p.listed(GOOD_ROWS + "a.mp4 dark\n"),
        ("list.csv", "line 5 (label 'dark' is not an integer)"),
    ),
    Case(
        "label with a point",
        lambda p: p.listed(GOOD_ROWS + "a.mp4 1.0\n"),
        ("list.csv", "line 5 (label '1.0' is not an integer)"),
    ),
    Case(
        "no labels",
        lambda p: p.listed("train/bright/video0.mp4\ntrain/dark/video0.mp4\n"),
        ("2 rows", "line 1 (no label)", "path, a space and a label"),
    ),
    Case(
        "zero bytes in a list",
        lambda p: p.listed(GOOD_ROWS.encode() + b"a\0b 1\n"),
        ("list.csv", "not a text file", "line 5"),
    ),
    Case("empty list", lambda p: p.listed(" \n\n"), ("list.csv lists no video",)),
    Case(
        "a video for a list",
        lambda p: p.job(
            "CORPUS.TRAIN.VIDEOS.FORMAT",
            "list",
            "CORPUS.TRAIN.VIDEOS.PATH",
            p.world.videos / "train" / "dark" / "video0.mp4",
        ),
        ("video0.mp4", "not a text file"),
    ),
    Case("a folder for a list", lambda p: p.job("CORPUS.TRAIN.VIDEOS.FORMAT", "list"), ("train", "it is a folder")),
    Case(
        "class twice",
        lambda p: p.listed(GOOD_ROWS, CLASSES=str(p.file("c.txt", "dark\ndark\n"))),
        ("c.txt", "line 2 ('dark' stands in line 1 already)"),
    ),
    Case("other classes in the test", no_bright, ("CORPUS.TEST", "class 0 was 'bright' and is 'dark' here", "CLASSES")),
    Case(
        "unlabelled list for labels",
        lambda p: p.labels("CORPUS.TRAIN.VIDEOS.LABELED", False),
        ("CORPUS.TRAIN.VIDEOS.LABELED", "ACTION.LOSS_WEIGHT needs labels"),
    ),
    Case("UCF list missing", lambda p: ucf(p, testlist01=""), ("CORPUS.TEST", "testlist01.txt cannot be read")),
    Case(
        "UCF class index out of order",
        lambda p: ucf(p, classInd="1 bright\n3 dark\n"),
        ("classInd.txt", "line 2", "1, 2, 3"),
    ),
    Case(
        "UCF class unknown",
        lambda p: ucf(p, trainlist01="bright/video0.avi 1\ngrey/v.avi 3\n"),
        ("trainlist01.txt", "line 2 (class 'grey' is not in classInd.txt)"),
    ),
    Case(
        "UCF number contradicts",
        lambda p: ucf(p, trainlist01="bright/video0.avi 2\n"),
        ("line 1", "classInd.txt says 1 for bright"),
    ),
    Case(
        "UCF videos elsewhere",
        lambda p: ucf(p, trainlist01="bright/gone.avi 1\n"),
        ("none of the 1 listed videos", "gone.avi", "ROOT"),
    ),
    Case(
        "HMDB flag",
        lambda p: hmdb(p, "video0.avi 1\nvideo1.avi 3\n"),
        ("bright_test_split1.txt", "line 2", "0 (unused), 1 (train), 2 (test)"),
    ),
    Case(
        "Kinetics without header",
        lambda p: kinetics(p, "abc,0,10,train,dark\n"),
        ("train.csv must have the columns youtube_id, time_start, time_end, label",),
    ),
    Case(
        "Kinetics without label",
        lambda p: kinetics(p, "youtube_id,time_start,time_end,split\na,0,10,train\n"),
        ("must have the columns", "label"),
    ),
    Case(
        "Kinetics other class",
        lambda p: kinetics(
            p, "label,youtube_id,time_start,time_end\ngrey,a,0,10\n", CLASSES=str(p.file("c.txt", "bright\ndark\n"))
        ),
        ("train.csv", "line 2 (class 'grey')"),
    ),
    Case(
        "all training videos broken",
        lambda p: broken(p, 0),
        ("CORPUS.TRAIN", "none of 12 videos", "video0.mp4", "distinit check-corpus"),
    ),
    Case(
        "all test videos broken",
        lambda p: broken(p, 0, "test"),
        ("CORPUS.TEST", "none of 6 videos", "distinit check-corpus"),
    ),
    Case(
        "too many broken",
        lambda p: [*broken(p, 1), "SOLVER.MAX_EPOCH", "5"],
        ("of 12 videos are bad", "CORPUS.MAX_BAD_FRACTION 0.1", "bad_videos.csv", "check-corpus"),
        starts=True,
    ),
    Case("frames of several sizes", mixed_sizes, ("frames", "48×64", "64×48"), starts=True),
    Case(
        "epoch too short",
        lambda p: p.job(
            "RUNNER.CLIPS_PER_EPOCH",
            1,
            "TRAIN.BATCH_SIZE",
            1,
            CORPUS={"TRAIN": {"MORE": {"PATH": str(p.world.videos / "test")}}},
        ),
        ("An epoch of 1 clips is too short for 2 corpora", "RUNNER.CLIPS_PER_EPOCH"),
    ),
    Case(
        "batch of one place",
        lambda p: p.labels("TRAIN.BATCH_SIZE", 1, DATA={"TRAIN_CROP_SIZE": 16, "NUM_FRAMES": 1, "SAMPLING_RATE": 1}),
        ("a single value per channel", "TRAIN.BATCH_SIZE", "DATA.TRAIN_CROP_SIZE"),
        starts=True,
    ),
    Case(
        "predict a file that is not there",
        lambda p: ["predict", str(p.folder / "gone.mp4"), "--checkpoint", str(p.world.run / "gone.pyth")],
        ("gone.pyth",),
    ),
]

FLAGS = [
    Case("empty name of a YAML", lambda p: ["run", "--cfg", ""], ("the name of a configuration is empty",)),
    Case("long name", lambda p: p.job("OUTPUT_DIR", "a" * 300), ("file name too long. Give a shorter name",)),
    Case("zero byte in a name", lambda p: p.job(OUTPUT_DIR="a\0b"), ("OUTPUT_DIR", "zero byte")),
    Case(
        "infinite weight of an ensemble",
        lambda p: ["ensemble", "a", "b", "--weights", "inf", "1"],
        ("--weights: inf 1 does not fit 2 runs", "finite"),
    ),
    Case(
        "time that is none",
        lambda p: ["check-ava", str(p.folder), "--frames-start", "nan"],
        ("--frames-start", "'nan' is not allowed. Allowed: a number"),
        status=2,
    ),
    Case(
        "too many looks",
        lambda p: ["demo", "a.mp4", "--checkpoint", "x.pyth", "--every", "1e-300"],
        ("--every", "a number ≥ 0.001"),
        status=2,
    ),
    Case(
        "too many clips",
        lambda p: ["predict", "a.mp4", "--checkpoint", "x.pyth", "--clips", "999999999"],
        ("--clips", "a whole number ≥ 1 and ≤ 10000"),
        status=2,
    ),
    Case(
        "flow bound near 0",
        lambda p: ["extract-flow", str(p.world.videos), str(p.folder / "flow"), "--bound", "1e-300"],
        ("a bound of 1e-300 px", "at least 0.01"),
    ),
    Case(
        "raft without weights",
        lambda p: ["extract-flow", str(p.world.videos), str(p.folder / "flow"), "--backend", "raft"],
        ("raft needs weights (--weights",),
    ),
]

CASES = [*FLAGS, *YAML, *COMMAND_LINES, *DATA]


@pytest.mark.parametrize("case", CASES, ids=ids(CASES))
def test_bad_input_gets_its_message(case, world, tmp_path, capsys):
    message = message_of(case, world, tmp_path, capsys)
    print(message)
    missing = [part for part in case.expected if part not in message]
    assert not missing, message
