"""``distinit check-ava`` and ``eval-ava``: a good data set passes, everything that is wrong with one is named."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from videos import write_video

from distinit_plugin import cli
from distinit_plugin.detection.check import check_ava
from distinit_plugin.detection.check_report import AvaFolders
from distinit_plugin.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
START = 900.0  # time stamp of the first picture of every video
SETS = Path(__file__).parent / "assets" / "frame_map"
TRUTH, PREDICTED = "annotations/ava_train_v2.2.csv", "annotations/ava_train_predicted_boxes.csv"
VAL, EXCLUDED = "annotations/ava_val_v2.2.csv", "annotations/ava_val_excluded_timestamps_v2.2.csv"
LABELS = "annotations/ava_action_list_v2.2_for_activitynet_2019.pbtxt"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A data set without fault: two videos to train with and one to validate with; of the frames only names matter."""
    folder = tmp_path_factory.mktemp("ava")
    for name in ("annotations", "frame_lists", "videos"):
        (folder / name).mkdir()
    write_video(folder / "videos" / "train_0000.mp4", num_frames=27, fps=5)
    for split, names in {"train": ["train_0000", "train_0001"], "val": ["val_0000"]}.items():
        truth, predicted, frames = [], [], ["original_vido_id video_id frame_id path labels"]
        for place, name in enumerate(names):
            for second in range(902, 906):
                truth += [f"{name},0{second},0.100,0.200,0.300,0.900,{action},0" for action in (1, 2)]
                truth.append(f"{name},0{second},0.500,0.200,0.700,0.900,3,1")
                predicted.append(f"{name},0{second},0.110,0.210,0.310,0.890,,0.95{second}")
            (folder / "frames" / name).mkdir(parents=True)
            for number in range(12):
                (folder / "frames" / name / f"{name}_{number + 1:06d}.jpg").touch()
                frames.append(f'{name} {place} {number} {name}/{name}_{number + 1:06d}.jpg ""')
            if place or split == "val":
                shutil.copy(folder / "videos" / "train_0000.mp4", folder / "videos" / f"{name}.mp4")
        (folder / "annotations" / f"ava_{split}_v2.2.csv").write_text("\n".join(truth) + "\n")
        (folder / "annotations" / f"ava_{split}_predicted_boxes.csv").write_text("\n".join(predicted) + "\n")
        (folder / "frame_lists" / f"{split}.csv").write_text("\n".join(frames) + "\n")
    (folder / EXCLUDED).write_text("val_0000,0950\n")
    names = enumerate(("sit", "stand", "walk"), start=1)
    (folder / LABELS).write_text("".join(f'item {{\n  name: "{name}"\n  id: {number}\n}}\n' for number, name in names))
    return folder


@pytest.fixture
def copy(made, tmp_path):
    """A copy of the set that may be damaged."""
    return shutil.copytree(made, tmp_path / "ava")


def look(folder, **more):
    folders = {
        "annotations": folder / "annotations",
        "frame_lists": folder / "frame_lists",
        "frames": folder / "frames",
        "videos": folder / "videos",
        "video_start": START,
        "fps": 2.0,
    }
    return check_ava(AvaFolders(**{**folders, **more}))


def change(path, old, new, count=1):
    text = path.read_text()
    assert re.search(old, text, re.MULTILINE), (path, old)
    path.write_text(re.sub(old, new, text, count=count, flags=re.MULTILINE))


def test_a_good_set_passes(made, capsys):
    assert cli.main(["check-ava", str(made), "--video-start", str(START), "--fps", "2"]) == 0
    text = capsys.readouterr().out
    assert text.endswith("missing: 0\nwrong: 0\nodd: 0\n")
    for fact in (
        "ava_train_v2.2.csv: 24 rows, 8 keyframes of 2 videos",
        "ava_val_v2.2.csv: 12 rows, 4 keyframes of 1 videos",
        "ava_val_predicted_boxes.csv: predicted boxes, scores 100% at least 0.8, 100% at least 0.9; 0% have an action",
        "label map of 3 actions, 1 to 3",
        "1 excluded keyframes",
        "train.csv: 24 frames of 2 videos",
    ):
        assert fact in text


DAMAGES = {
    "no label map": (
        lambda folder: (folder / LABELS).unlink(),
        ("missing", r"annotations: there is no label map"),
    ),
    "no ground truth": (
        lambda folder: [(folder / name).unlink() for name in (TRUTH, VAL)],
        ("missing", r"annotations: there is no csv of ground truth"),
    ),
    "a broken row": (
        lambda folder: change(folder / TRUTH, r"^(.*),\d+,\d+$", r"\1,0,0"),
        ("wrong", r"ava_train_v2.2.csv: .*line 1 \(the action in column 7 is '0'"),
    ),
    "a header": (
        lambda folder: change(folder / TRUTH, r"\A", "video,second,x1,y1,x2,y2,action,person\n"),
        ("wrong", r"ava_train_v2.2.csv: .*line 1 \(the second in column 2 is 'second'"),
    ),
    "other actions": (
        lambda folder: change(folder / TRUTH, r",1,0$", r",80,0", count=2),
        ("odd", r"ava_train_v2.2.csv: 2 rows are of actions that the label map lacks: 80"),
    ),
    "pixels": (
        lambda folder: change(folder / TRUTH, r",0\.(\d\d)\d", r",\1", count=0),
        ("wrong", r"ava_train_v2.2.csv: its boxes are pixels"),
    ),
    "a box beyond the frame": (
        lambda folder: change(folder / TRUTH, r"^(\w+,\d+),[\d.]+,([\d.]+),[\d.]+", r"\1,-0.1,\2,1.2"),
        ("odd", r"ava_train_v2.2.csv: 1 of \d+ boxes reach beyond the frame"),
    ),
    "a box without area": (
        lambda folder: change(folder / TRUTH, r"^(\w+,\d+),([\d.]+),([\d.]+),[\d.]+", r"\1,\2,\3,\2"),
        ("odd", r"ava_train_v2.2.csv: 1 of \d+ boxes have no area"),
    ),
    "a row twice": (
        lambda folder: change(folder / TRUTH, r"\A(.*\n)", r"\1\1"),
        ("odd", r"ava_train_v2.2.csv: 1 rows repeat"),
    ),
    "seconds that are not used": (
        lambda folder: change(folder / TRUTH, r",090[2-5],", ",0880,", count=3),
        ("odd", r"ava_train_v2.2.csv: 3 of \d+ rows are outside of seconds 902 to 1798"),
    ),
    "scores that are none": (
        lambda folder: change(folder / PREDICTED, r",0\.(\d+)$", r",9.\1", count=2),
        ("odd", r"ava_train_predicted_boxes.csv: scores are not within 0 and 1"),
    ),
    "boxes of unknown videos": (
        lambda folder: change(folder / PREDICTED, r"^\w+,", "stranger,"),
        ("odd", r"ava_train_predicted_boxes.csv: 1 videos have no ground truth: stranger"),
    ),
    "a video in both splits": (
        lambda folder: change(folder / VAL, r"^\w+,", "train_0000,"),
        ("odd", r"ava_val_v2.2.csv: 1 videos are in ava_train_v2.2.csv, too: train_0000"),
    ),
    "an excluded keyframe with rows": (
        lambda folder: (folder / EXCLUDED).write_text("train_0000,0902\n"),
        ("odd", r"excluded_timestamps_v2.2.csv: 1 excluded keyframes have ground truth"),
    ),
    "bad time stamps": (
        lambda folder: (folder / EXCLUDED).write_text("train_0000,0902\nx,y\n"),
        ("wrong", r"excluded_timestamps_v2.2.csv: .*line 2 "),
    ),
    "some other csv": (
        lambda folder: (folder / "annotations" / "notes.csv").write_text("what,why\nthis,that\n"),
        ("odd", r"notes.csv: is no csv of boxes"),
    ),
    "no video": (
        lambda folder: (folder / "videos" / "train_0000.mp4").unlink(),
        ("missing", r"videos/train_0000: there is no video of this name"),
    ),
    "a broken video": (
        lambda folder: replace(folder / "videos" / "train_0000.mp4", b"nothing"),
        ("wrong", r"videos/train_0000.mp4: cannot be opened"),
    ),
    "no videos at all": (
        lambda folder: [path.unlink() for path in (folder / "videos").iterdir()],
        ("missing", r"videos: .* has no videos"),
    ),
    "a missing frame": (
        lambda folder: (folder / "frames" / "train_0000" / "train_0000_000007.jpg").unlink(),
        ("missing", r"frames: 1 of \d+ frames of train_0000: train_0000/train_0000_000007.jpg"),
    ),
    "frames that are not listed": (
        lambda folder: change(folder / "frame_lists" / "train.csv", r"^train_0000 .*\n", "", count=0),
        ("missing", r"frame_lists: no list has frames of train_0000"),
    ),
    "too few frames": (
        lambda folder: change(folder / "frame_lists" / "train.csv", r"^train_0000 0 \d\d+ .*\n", "", count=0),
        ("wrong", r"frames: train_0000 has 10 frames, and its keyframe at second 905 is frame 11"),
    ),
    "a bad list": (
        lambda folder: change(folder / "frame_lists" / "val.csv", r'""$', ""),
        ("wrong", r"frame_lists/val.csv: .*line 2 \(4 columns\)"),
    ),
    "no lists": (
        lambda folder: [path.unlink() for path in (folder / "frame_lists").iterdir()],
        ("missing", r"frame_lists: there is no list of frames"),
    ),
}


def replace(path, content):
    path.unlink()
    path.write_bytes(content)


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_wrong_is_named(damage, copy):
    act, (kind, pattern) = DAMAGES[damage]
    act(copy)
    report = look(copy)
    found = [finding.kind for finding in report.findings if re.search(pattern, f"{finding.path}: {finding.detail}")]
    assert found == [kind], report.to_text()
    assert len(report.findings) <= 3
    if kind != "odd":
        assert not report.usable


def test_without_lists_frames_are_those_of_folders(copy):
    assert look(copy, frame_lists=None).usable
    shutil.rmtree(copy / "frames" / "val_0000")
    (finding,) = [row for row in look(copy, frame_lists=None).findings if row.kind != "odd"]
    assert finding.kind == "missing"
    assert finding.path.endswith("frames/val_0000")


def test_videos_that_are_too_short(copy):
    """As whole films begin at 0, those that begin at 900 seem to end too early."""
    report = look(copy, video_start=0.0)
    assert sum("its last keyframe is" in finding.detail for finding in report.findings) == 3
    assert not report.usable


def test_no_pictures_anywhere(copy):
    report = look(copy, frame_lists=None, frames=None, videos=None)
    assert [row.detail for row in report.findings if row.kind == "missing"] == [
        "there are neither videos nor frames to go with the annotations"
    ]


def test_ground_truth_among_predicted_boxes_is_read_as_what_it_is(copy):
    (copy / PREDICTED).write_text((copy / TRUTH).read_text())
    report = look(copy)
    assert any("ava_train_predicted_boxes.csv" in fact and "rows" in fact for fact in report.facts)
    assert not any("predicted boxes, scores" in fact and "train" in fact for fact in report.facts)


def test_folders_that_are_none(tmp_path, capsys):
    with pytest.raises(UserError, match="is no folder"):
        check_ava(AvaFolders(tmp_path / "absent"))
    assert cli.main(["check-ava", str(tmp_path), "--videos", str(tmp_path / "absent")]) == 1
    assert "--videos" in capsys.readouterr().err
    assert cli.main(["check-ava", str(tmp_path)]) == 1
    assert "missing: 3" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------------- eval-ava


def evaluate(*words, name="everything_excluded"):
    files = {"--gt": f"{name}.truth.csv", "--dets": f"{name}.detections.csv", "--label-map": "labels.pbtxt"}
    return ["eval-ava", *(part for flag, file in files.items() for part in (flag, str(SETS / file))), *map(str, words)]


def test_evaluation_from_the_command_line(tmp_path, capsys):
    output = tmp_path / "result.json"
    excluded = SETS / "everything_excluded.excluded.csv"
    words = evaluate("--excluded", excluded, "--variant", "official", "pyslowfast", "--output", output)
    assert cli.main(words) == 0
    text = capsys.readouterr().out
    found = json.loads(output.read_text())
    expected = json.loads((SETS / "expected.json").read_text())
    for variant in ("official", "pyslowfast"):
        row = expected["sets"]["everything_excluded"][variant]["stable"]
        assert [found[variant]["map"], *found[variant]["ap"].values()] == pytest.approx(row, abs=1e-9)
        assert f"frame-mAP@0.5 ({variant}): {found[variant]['map']:.6f} over" in text
    counts = found["official"]["counts"]
    assert sum(found["official"]["detections"].values()) == counts["detections"]
    assert f"{counts['excluded']} detections on excluded keyframes" in text
    assert "talk to (a person)" in text


def test_the_tool_alone_reads_any_csv(tmp_path):
    """As people use it: a file and three paths, from anywhere, without torch."""
    program = (
        "import runpy, sys\n"
        "try:\n"
        "    runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "finally:\n"
        "    assert 'torch' not in sys.modules\n"
    )
    command = f"import sys; sys.argv = sys.argv[1:]\n{program}"
    words = [str(ROOT / "tools" / "eval_ava.py"), *evaluate(name="distinct")[1:]]
    done = subprocess.run([sys.executable, "-c", command, *words], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "frame-mAP@0.5 (official): " in done.stdout


@pytest.mark.parametrize(
    ("truth", "detections", "said"),
    [
        ("a,902,0,0,1,1,12,0\n", "", "there is no detection"),
        ("a,902,0,0,1,1,12,0\na,903,0,0,1,1,12,1\n", "same", "its eighth column names persons|eighth column names"),
        ("a,902,0,0,1,1,12,0\n", "b,902,0,0,1,1,12,0.5\n", "do both files write videos and seconds alike"),
        ("a,902,0,0,1,1,12,0\n", "a,902,0,0,0,1,12,0.5\n", "1 detections without a box"),
    ],
)
def test_what_looks_like_a_mistake_is_said(truth, detections, said, tmp_path, capsys):
    (tmp_path / "truth.csv").write_text(truth)
    (tmp_path / "detections.csv").write_text(truth if detections == "same" else detections)
    words = [
        "--gt",
        tmp_path / "truth.csv",
        "--dets",
        tmp_path / "detections.csv",
        "--label-map",
        SETS / "labels.pbtxt",
    ]
    assert cli.main(["eval-ava", *map(str, words)]) == 0
    assert re.search(said, capsys.readouterr().out)


def test_ground_truth_of_another_label_map(tmp_path, capsys):
    (tmp_path / "truth.csv").write_text("a,902,0,0,1,1,2,0\n")
    words = ["--gt", tmp_path / "truth.csv", "--dets", tmp_path / "truth.csv", "--label-map", SETS / "labels.pbtxt"]
    assert cli.main(["eval-ava", *map(str, words)]) == 1
    assert "no row of an action of" in capsys.readouterr().err
