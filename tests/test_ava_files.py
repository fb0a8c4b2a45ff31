"""Files of AVA's form: what is read, what is refused and named, what survives writing."""

import numpy as np
import pytest

from distinit_plugin.detection import rows as row_reader
from distinit_plugin.detection.files import (
    read_boxes,
    read_detections,
    read_excluded,
    read_frame_list,
    read_label_map,
    read_truth,
    write_rows,
)
from distinit_plugin.detection.tables import NO_ACTION, BoxTable
from distinit_plugin.errors import UserError


@pytest.fixture
def write(tmp_path):
    def write(text, name="rows.csv"):
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


TRUTH = "a,0902,0.1,0.2,0.3,0.4,12,0\nb,0903,0,0,1,1,80,1\na,0902,0.1,0.2,0.3,0.4,17,0\n"


def test_ground_truth(write):
    table = read_truth(write(TRUTH))
    assert table.videos == ("a", "b")
    assert table.video.tolist() == [0, 1, 0]
    assert table.seconds.tolist() == [902, 903, 902]
    assert table.boxes.tolist() == [[0.1, 0.2, 0.3, 0.4], [0, 0, 1, 1], [0.1, 0.2, 0.3, 0.4]]
    assert table.actions.tolist() == [12, 80, 17]
    assert table.persons.tolist() == [0, 1, 0]
    assert table.scores.tolist() == [1, 1, 1]
    assert table.boxes.dtype == table.seconds.dtype == table.scores.dtype == np.float64
    assert table.video.dtype == table.actions.dtype == np.int32


def test_without_persons_and_with_empty_keyframes(write):
    table = read_truth(write("a,902,0,0,1,1,3\nb,0905\na,902.5\nb,905.0\n"))
    assert table.persons is None
    assert len(table) == 1
    assert [(table.videos[int(video)], second) for video, second in table.keyframes] == [("b", 905), ("a", 902.5)]


def test_predicted_boxes(write):
    """The seventh column is an action, empty, or -1; a file of seven columns has scores of 1."""
    table = read_boxes(write("a,902,0,0,1,1,,0.95\na,902,0,0,1,1,-1,1.0\na,902,0,0,1,1,4,0.5\n"))
    assert table.actions.tolist() == [NO_ACTION, NO_ACTION, 4]
    assert table.scores.tolist() == [0.95, 1, 0.5]
    assert read_boxes(write("a,902,0,0,1,1,5\n")).scores.tolist() == [1]


def test_the_eighth_column_of_ground_truth_is_no_score(write):
    """The trap of PySlowFast's configurations: persons' numbers taken for scores."""
    path = write(TRUTH)
    with pytest.raises(UserError, match=r"persons.*AVA\.TRAIN_GT_BOX_LISTS") as caught:
        read_boxes(path)
    assert str(path) in str(caught.value)
    assert read_detections(path).scores.tolist() == [0, 1, 0]  # it may be evaluated against itself
    assert read_boxes(write("a,902,0,0,1,1,5,1\na,903,0,0,1,1,5,1.000\n")).scores.tolist() == [1, 1]
    with pytest.raises(UserError, match=r"line 1 \(the person's number in column 8 is '0.97'.*predicted boxes"):
        read_truth(write("a,902,0,0,1,1,5,0.97\n"))


@pytest.mark.parametrize(
    ("row", "named"),
    [
        ("a,902,0,0,1,1", "6 columns"),
        ("a,902,0,0,1,1,5,0,7", "9 columns"),
        ("a,902,0,0,x,1,5,0", "column 5 is 'x'"),
        ("a,902,0,0,nan,1,5,0", "column 5 is 'nan'"),
        ("a,902,0,0,inf,1,5,0", "column 5 is 'inf'"),
        ("a,902,0,0,1_0,1,5,0", "column 5 is '1_0'"),
        ("a,,0,0,1,1,5,0", "second in column 2 is ''"),
        ("a,-5,0,0,1,1,5,0", "second in column 2 is '-5'"),
        ("a,1e12,0,0,1,1,5,0", "second in column 2 is '1e12'"),
        (" ,902,0,0,1,1,5,0", "column 1 names no video"),
        (",902", "column 1 names no video"),
        ("a,nine", "second in column 2 is 'nine'"),
        ("a,902,0,0,1,1,5.5,0", "action in column 7 is '5.5'"),
        ("a,902,0,0,1,1,0,0", "action in column 7 is '0'"),
        ("a,902,0,0,1,1,-1,0", "action in column 7 is '-1'"),
        ("a,902,0,0,1,1,,0", "action in column 7 is ''"),
        ("a,902,0,0,1,1,99999999999999999999,0", "action in column 7"),
        ("a,902,0.5,0,0.4,1,5,0", "x2 < x1"),
        ("a,902,0,0,1,1,5,", "column 8 is ''"),
        ('"a,902,0,0,1,1,5,0', "unexpected end of data"),
        ("video,second,x1,y1,x2,y2,action,person", "second in column 2 is 'second'"),
    ],
)
def test_a_wrong_row_is_named_with_its_line(row, named, write):
    path = write(f"{TRUTH}\n{row}\n{TRUTH}")
    with pytest.raises(UserError) as caught:
        read_truth(path)
    text = str(caught.value)
    assert "1 row of" in text
    assert "line 5 (" in text
    assert named in text
    assert str(path) in text


def test_a_wrong_row_in_a_block_that_is_read_at_once(write):
    good = "".join(f"a,{902 + number},0,0,1,1,5,0\n" for number in range(300))
    for row in (
        "a,1e12,0,0,1,1,5,0",
        ",902,0,0,1,1,5,0",
        "a,902,0,0,1,1,0,0",
        "a,902,0,0,1,inf,5,0",
        "a,902,1,0,0,1,5,0",
    ):
        with pytest.raises(UserError, match=r"1 row of .*line 301 \("):
            read_truth(write(good + row + "\n" + good))


def test_many_wrong_rows_are_counted(write):
    with pytest.raises(UserError, match=r"40 rows .*line 1 .*line 5 .* and 35 more"):
        read_detections(write("nothing\n" * 40))


@pytest.mark.parametrize(
    "read", [read_truth, read_boxes, read_detections, read_excluded, read_label_map, read_frame_list]
)
def test_files_that_cannot_be_read(read, tmp_path, write):
    for path in (tmp_path / "absent", tmp_path):
        with pytest.raises(UserError, match=r"cannot be read: (no such file|it is a folder)"):
            read(path)
    with pytest.raises(UserError, match=r"rows\.csv"):
        read(write(b"PK\x03\x04\x00\x00" * 50))


def test_an_empty_file_has_no_rows(write):
    for read in (read_truth, read_boxes, read_detections):
        table = read(write(""))
        assert len(table) == len(table.videos) == len(table.keyframes) == 0
        assert table.boxes.shape == (0, 4)


def random_rows(count, seed=0):
    random = np.random.default_rng(seed)
    for _ in range(count):
        box = ",".join(f"{value:.3f}" for value in random.random(4))
        second, action = f"{random.integers(902, 1799):04d}", random.integers(1, 81)
        yield f"video_{random.integers(9)},{second},{box},{action},{float(random.random())!r}"


@pytest.mark.parametrize("block", [200, 4096, 2**22])
def test_quick_and_slow_reading_agree(block, write, monkeypatch):
    """Blocks of good rows are read at once; one odd line sends its block through the slow path."""
    rows = list(random_rows(500))
    monkeypatch.setattr(row_reader, "BLOCK", block)
    quick = read_detections(write("\n".join(rows)))
    odd = read_detections(write("\n".join([*rows[:250], "", *rows[250:400], "extra,0950", *rows[400:]]) + "\n"))
    quoted = read_detections(write("".join(f'"{row.partition(",")[0]}",{row.partition(",")[2]}\r\n' for row in rows)))
    expected = [row.split(",") for row in rows]
    for table in (quick, odd, quoted):
        assert [table.videos[number] for number in table.video] == [row[0] for row in expected]
        columns = np.column_stack([table.seconds, table.boxes, table.actions, table.scores])
        assert columns.tolist() == [[float(cell) for cell in row[1:]] for row in expected]
    assert odd.keyframes.tolist() == [[odd.videos.index("extra"), 950]]


def test_the_good_file_is_read_quickly(write, monkeypatch):
    """So that the test above compares two ways."""
    monkeypatch.setattr(row_reader, "_slow", None)
    assert len(read_detections(write("\n".join(random_rows(50))))) == 50
    with pytest.raises(TypeError):
        read_detections(write("\n".join([*random_rows(50), "a,902"])))


def test_names_that_are_not_ascii(write):
    names = ["vidéo", "видео", "動画", " padded ", "x" * 300]
    table = read_truth(write("".join(f"{name},902,0,0,1,1,5\n" for name in names)))
    assert table.videos == tuple(name.strip() for name in names)
    table = read_truth(write(b"caf\xe9,902,0,0,1,1,5\n\xff,902,0,0,1,1,5\n"))
    assert [name.encode("utf-8", "surrogateescape") for name in table.videos] == [b"caf\xe9", b"\xff"]
    assert read_truth(write("\ufeffa,902,0,0,1,1,5\n")).videos == ("a",)


def test_writing_gives_the_same_numbers_to_the_last_bit(tmp_path):
    random = np.random.default_rng(0)
    table = BoxTable(
        videos=("a", "b-c", "é"),
        video=random.integers(0, 3, 200).astype(np.int32),
        seconds=np.where(random.random(200) < 0.5, random.integers(902, 1799, 200), random.random(200) * 1000),
        boxes=random.random((200, 4)),
        actions=random.integers(1, 81, 200).astype(np.int32),
        scores=random.random(200).astype(np.float32).astype(np.float64),
        keyframes=np.array([[0, 902.0], [2, 5.25]]),
    )
    path = tmp_path / "folder" / "rows.csv"
    write_rows(path, table)
    found = read_detections(path)
    assert [found.videos[number] for number in found.video] == [table.videos[number] for number in table.video]
    for name in ("seconds", "boxes", "actions", "scores"):
        assert (getattr(found, name) == getattr(table, name)).all()
    assert [(found.videos[int(video)], second) for video, second in found.keyframes] == [("a", 902), ("é", 5.25)]
    assert path.read_text(encoding="utf-8").endswith("a,0902\né,5.25\n")
    assert [file.name for file in path.parent.iterdir()] == ["rows.csv"]


def test_writing_ground_truth_and_boxes(tmp_path, write):
    truth = read_truth(write(TRUTH))
    write_rows(tmp_path / "out.csv", truth)
    assert (tmp_path / "out.csv").read_text() == (
        "a,0902,0.1,0.2,0.3,0.4,12,0\nb,0903,0.0,0.0,1.0,1.0,80,1\na,0902,0.1,0.2,0.3,0.4,17,0\n"
    )
    boxes = read_boxes(write("a,902,0,0,1,1,,0.95\n"))
    write_rows(tmp_path / "out.csv", boxes)
    assert (tmp_path / "out.csv").read_text() == "a,0902,0.0,0.0,1.0,1.0,-1,0.95\n"


@pytest.mark.parametrize("name", ["", "a,b", 'a"b', "a\nb", " a"])
def test_names_that_a_csv_cannot_hold(name, tmp_path, write):
    table = read_truth(write(TRUTH))
    with pytest.raises(UserError, match="cannot stand in"):
        write_rows(tmp_path / "out.csv", BoxTable((name, "b"), *list(vars(table).values())[1:]))
    assert not (tmp_path / "out.csv").exists()


# ------------------------------------------------------------------------------------------- time stamps and label map


def test_excluded_time_stamps(write):
    assert read_excluded(write("a,0903\n\nb,902.5\n")) == {("a", 903.0), ("b", 902.5)}
    assert read_excluded(write("")) == set()
    for row in ("a", "a,b", "a,902,1", ",902", "video,second"):
        with pytest.raises(UserError, match=r"line 2 "):
            read_excluded(write(f"a,0903\n{row}\n"))


OLD = 'item {\n  name: "stand"\n  id: 12\n}\nitem {\n  name: "talk to (e.g., self, a person, a group)"\n  id: 79\n}\n'
NEW = 'label {\n  name: "stand"\n  label_id: 12\n  label_type: PERSON_MOVEMENT\n}\n'
TIGHT = '# one line each\nitem{name:\'it is {so}\' id:3}item{id:4 name:"a \\"b\\""}'


@pytest.mark.parametrize(
    ("text", "names"),
    [
        (OLD, {12: "stand", 79: "talk to (e.g., self, a person, a group)"}),
        (NEW, {12: "stand"}),
        (TIGHT, {3: "it is {so}", 4: 'a "b"'}),
        (OLD.replace("  ", "\t").replace("\n", "\r\n"), {12: "stand", 79: "talk to (e.g., self, a person, a group)"}),
    ],
)
def test_label_maps(text, names, write):
    assert read_label_map(write(text, "labels.pbtxt")) == names


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("", "names no action"),
        ("stand\nsit\n", "no whole block"),
        (OLD + 'item {\n  name: "sit"\n', r"line 9 .*no whole block"),
        (OLD + 'item {\n  name: "sit"\n}\n', r"line 9 \(name 'sit', id ''\)"),
        (OLD + 'item {\n  name: "sit"\n  id: 0\n}\n', r"line 9 \(name 'sit', id '0'\)"),
        (OLD + "item {\n  id: 3\n}\n", r"line 9 \(name '', id '3'\)"),
        (OLD + 'item {\n  name: "sit"\n  id: 12\n}\n', r"line 9 \(id 12 is 'stand' already\)"),
        (OLD + 'item {\n  name: "stand"\n  id: 13\n}\n', r"line 9 \('stand' has another id already\)"),
        ("sit\n" + OLD, r"line 1 \('sit' is no whole block\)"),
        ("{" * 5000, "no whole block"),
        ("a" * 2**20, "no whole block"),
        ("item {" + "a" * 2**20, "no whole block"),
        ('item { name: "' * 2**15, "no whole block"),
    ],
)
def test_wrong_label_maps(text, named, write):
    with pytest.raises(UserError, match=named):
        read_label_map(write(text, "labels.pbtxt"))


# ----------------------------------------------------------------------------------------------------- lists of frames


HEADER = "original_vido_id video_id frame_id path labels\n"


def test_lists_of_frames(write):
    rows = [
        f'{video} {number} {frame} {video}/{video}_{frame + 1:06d}.jpg ""'
        for number, video in enumerate("ab")
        for frame in range(3)
    ]
    lists = read_frame_list(write(HEADER + "\n".join(rows) + "\n"))
    assert list(lists) == ["a", "b"]
    assert list(lists["b"]) == ["b/b_000001.jpg", "b/b_000002.jpg", "b/b_000003.jpg"]
    assert lists["a"][-1] == "a/a_000003.jpg"
    assert lists["a"][1:] == ["a/a_000002.jpg", "a/a_000003.jpg"]
    assert len(lists["a"]) == 3
    apart = read_frame_list(write(HEADER + "\n".join(rows[:2] + rows[3:] + rows[2:3])))
    assert {name: list(paths) for name, paths in apart.items()} == {name: list(paths) for name, paths in lists.items()}


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ('a 0 0 a/1.jpg ""\n', "there is no header"),
        (HEADER + "a 0 0 a/1.jpg\n", r"line 2 \(4 columns\)"),
        (HEADER + "a,0,0,a/1.jpg,\n", r"line 2 \(1 columns\)"),
        (HEADER + 'a 0 x a/1.jpg ""\n', r"line 2 \(frame_id 'x'\)"),
        (HEADER + 'a 0 1 a/1.jpg ""\na 0 0 a/0.jpg ""\n', r"line 3 \(frame 0 of 'a' stands after frame 1\)"),
    ],
)
def test_wrong_lists_of_frames(text, named, write):
    with pytest.raises(UserError, match=named):
        read_frame_list(write(text))


def test_real_files(assets):
    folder = assets / "ava"
    names = read_label_map(folder / "ava_action_list_v2.1_for_activitynet_2018.pbtxt")
    assert len(names) == 60
    assert set(range(1, 81)) - set(names) == {
        2,
        16,
        18,
        19,
        21,
        23,
        25,
        31,
        32,
        33,
        35,
        39,
        40,
        42,
        44,
        50,
        53,
        55,
        71,
        75,
    }
    assert len(read_truth(folder / "ava_sample.csv")) == 8
    assert read_truth(folder / "ava_boxes_thirdparty_sample.csv").persons is None
    assert read_excluded(folder / "ava_excluded_timestamps_sample.csv") == {
        ("0f39OWEqJ24", 903.0),
        ("_-Z6wFjXtGQ", 902.0),
    }
    with pytest.raises(UserError, match="is ground truth"):
        read_boxes(folder / "shared_small_gt.csv")
