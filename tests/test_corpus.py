"""Every corpus format on real and hostile files: exact records, and errors that say what and where."""

from __future__ import annotations

import os
import pickle
import time
from pathlib import Path

import pytest

from distinit_plugin.errors import UserError
from distinit_plugin.video.corpus import Mixture, load_corpus
from distinit_plugin.video.records import Corpus, CorpusSource, Listing


def touch(folder: Path, *names: str) -> Path:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    return folder


def relative(corpus: Corpus, root: Path) -> list[str]:
    return [os.path.relpath(record.path, root) for record in corpus]


def write(path: Path, text: str) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return str(path)


# ------------------------------------------------------------------------------------------------ folder


def test_folder_is_recursive_sorted_and_takes_videos_only(tmp_path):
    touch(tmp_path, "b/2.mp4", "b/deep/er/1.MKV", "a.avi", "b/notes.txt", "b/._2.mp4", ".hidden/x.mp4", "c/frame.png")
    corpus = load_corpus("folder", "HOME", path=str(tmp_path))
    assert relative(corpus, tmp_path) == ["a.avi", "b/2.mp4", "b/deep/er/1.MKV"]
    assert [record.label for record in corpus] == [None, None, None]
    assert not corpus.labeled
    assert corpus.num_classes is None


def test_folder_classes_are_its_first_sub_folders(tmp_path):
    touch(tmp_path, "walk/x/1.mp4", "run/2.mp4", "walk/3.mp4")
    (tmp_path / "empty").mkdir()  # counts, so that train and test number alike
    corpus = load_corpus("folder", "HOME", path=str(tmp_path), labeled=True)
    assert corpus.class_names == ["empty", "run", "walk"]
    assert [(name, r.label) for name, r in zip(relative(corpus, tmp_path), corpus, strict=True)] == [
        ("run/2.mp4", 1),
        ("walk/3.mp4", 2),
        ("walk/x/1.mp4", 2),
    ]


def test_folder_with_classes_file(tmp_path):
    touch(tmp_path / "videos", "Playing_guitar/1.mp4", "abseiling/2.mp4")
    classes = write(tmp_path / "classes.txt", "playing guitar\nzumba\nabseiling\n")
    corpus = load_corpus("folder", "HOME", path=str(tmp_path / "videos"), labeled=True, classes=classes)
    assert [record.label for record in corpus] == [0, 2]
    touch(tmp_path / "videos", "unknown/1.mp4")
    with pytest.raises(UserError, match=r"unknown/1\.mp4"):
        load_corpus("folder", "HOME", path=str(tmp_path / "videos"), labeled=True, classes=classes)


def test_folder_labeled_with_loose_videos_is_refused(tmp_path):
    touch(tmp_path, "loose.mp4", "run/2.mp4")
    with pytest.raises(UserError, match=r"HOME.*loose\.mp4.*LABELED False"):
        load_corpus("folder", "HOME", path=str(tmp_path), labeled=True)
    assert len(load_corpus("folder", "HOME", path=str(tmp_path))) == 2


def test_folder_with_a_link_to_itself_ends(tmp_path):
    touch(tmp_path, "a/1.mp4")
    (tmp_path / "a" / "loop").symlink_to(tmp_path)
    assert relative(load_corpus("folder", "HOME", path=str(tmp_path)), tmp_path) == ["a/1.mp4"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: p / "nowhere", "no such file or directory"),
        (lambda p: touch(p, "file.mp4") / "file.mp4", "not a directory"),
        (lambda p: touch(p, "notes.txt"), "there is no video"),
    ],
)
def test_folder_errors(tmp_path, make, message):
    with pytest.raises(UserError, match=message):
        load_corpus("folder", "HOME", path=str(make(tmp_path)))


# ------------------------------------------------------------------------------------------------ list, csv


def test_list_keeps_every_line(tmp_path):
    path = write(tmp_path / "list.txt", "\ufeffa b/c 1.mp4\r\n\r\n# not a comment.mp4\r\n/abs/ü.mp4 3\r\n")
    corpus = load_corpus("list", "L", path=path)
    assert [r.path for r in corpus] == [f"{tmp_path}/a b/c 1.mp4", f"{tmp_path}/# not a comment.mp4", "/abs/ü.mp4 3"]
    assert {r.label for r in corpus} == {None}


def test_list_paths_start_from_root(tmp_path):
    path = write(tmp_path / "lists" / "list.txt", "1.mp4\n")
    (tmp_path / "videos").mkdir()
    assert load_corpus("list", "L", path=path, root=str(tmp_path / "videos"))[0].path == f"{tmp_path}/videos/1.mp4"
    with pytest.raises(UserError, match=r"ROOT .*nowhere is not a folder"):
        load_corpus("list", "L", path=path, root=str(tmp_path / "nowhere"))


def test_list_keeps_names_that_are_not_utf8(tmp_path):
    path = tmp_path / "list.txt"
    path.write_bytes(b"caf\xe9.mp4\n")
    corpus = pickle.loads(pickle.dumps(load_corpus("list", "L", path=str(path))))
    assert os.fsencode(corpus[0].path) == os.fsencode(str(tmp_path)) + b"/caf\xe9.mp4"


def test_csv_splits_at_the_last_separator(tmp_path):
    path = write(tmp_path / "train.csv", "my videos/a 1.mp4 3\nb.mp4\t0\nc.mp4   12 \n")
    path_only_spaces = write(tmp_path / "spaces.csv", "my videos/a 1.mp4 3\nc.mp4   12 \n")
    corpus = load_corpus("csv", "C", path=path_only_spaces, labeled=True)
    assert [(os.path.basename(r.path), r.label) for r in corpus] == [("a 1.mp4", 3), ("c.mp4", 12)]
    assert corpus.num_classes == 13
    corpus = load_corpus("csv", "C", path=path, labeled=True, separator="")
    assert [r.label for r in corpus] == [3, 0, 12]


def test_csv_with_comma(tmp_path):
    path = write(tmp_path / "train.csv", "a, b.mp4,7\n")
    assert load_corpus("csv", "C", path=path, labeled=True, separator=",")[0] == (f"{tmp_path}/a, b.mp4", 7)


def test_csv_unlabeled_drops_labels_and_takes_bare_paths(tmp_path):
    path = write(tmp_path / "train.csv", "a.mp4 3\nmy video 2.mp4\nb c.mp4 -1\n")
    corpus = load_corpus("csv", "C", path=path)
    assert [os.path.basename(r.path) for r in corpus] == ["a.mp4", "my video 2.mp4", "b c.mp4"]
    assert {r.label for r in corpus} == {None}


def test_csv_errors_name_every_row(tmp_path):
    rows = ["ok.mp4 0", "bare.mp4", "x.mp4 two", "y.mp4 -1", "z.mp4 1.5", "", "w.mp4 99999999999", "v.mp4 1"]
    path = write(tmp_path / "train.csv", "\n".join(rows))
    with pytest.raises(UserError) as caught:
        load_corpus("csv", "C", path=path, labeled=True)
    text = str(caught.value)
    for part in [
        "'C'",
        path,
        "5 rows",
        "line 2 (no label)",
        "line 3 (label 'two'",
        "line 4 (label -1 is neg",
        "line 5",
    ]:
        assert part in text
    assert "line 7 (label 99999999999 is too high)" in text


def test_csv_error_shows_the_first_few_of_many(tmp_path):
    path = write(tmp_path / "train.csv", "\n".join(f"{i}.mp4" for i in range(1000)))
    with pytest.raises(UserError, match=r"1000 rows .* and 995 more") as caught:
        load_corpus("csv", "C", path=path, labeled=True)
    assert len(str(caught.value)) < 500


def test_csv_labels_fit_the_classes(tmp_path):
    classes = write(tmp_path / "classes.txt", "run\nwalk\n")
    path = write(tmp_path / "train.csv", "a.mp4 0\nb.mp4 1\nc.mp4 2\n")
    with pytest.raises(UserError, match=r"line 3 \(label 2 is too high\).*0 to 1"):
        load_corpus("csv", "C", path=path, labeled=True, classes=classes)
    corpus = load_corpus("csv", "C", path=path, labeled=True)
    corpus.check_labels(3)
    with pytest.raises(UserError, match=r"c\.mp4 has 2.*NUM_CLASSES to at least 3"):
        corpus.check_labels(2)


def test_classes_file_with_a_name_twice(tmp_path):
    classes = write(tmp_path / "classes.txt", "run\nwalk\nrun\n")
    path = write(tmp_path / "train.csv", "a.mp4 0\n")
    with pytest.raises(UserError, match=r"classes\.txt.*line 3 \('run' stands in line 1"):
        load_corpus("csv", "C", path=path, labeled=True, classes=classes)


@pytest.mark.parametrize("fmt", ["list", "csv", "kinetics"])
def test_text_formats_refuse_what_is_not_text(tmp_path, fmt):
    binary = tmp_path / "video.mp4"
    binary.write_bytes(b"youtube_id,time_start,time_end\n\0\0\0\x18ftypmp42\0\0")
    for path in (binary, tmp_path, tmp_path / "nowhere.csv", Path(write(tmp_path / "empty.csv", "\n \n"))):
        with pytest.raises(UserError, match=f"'X' .*{path.name}"):
            load_corpus(fmt, "X", path=str(path))


def test_repeated_rows_are_reported_and_kept(tmp_path):
    path = write(tmp_path / "list.txt", "a.mp4\nb.mp4\na.mp4\nc.mp4\na.mp4\n")
    corpus = load_corpus("list", "L", path=path)
    assert len(corpus) == 5
    assert corpus.repeats.tolist() == [2, 4]
    assert "2 rows repeat a video" in corpus.notes[0]
    assert load_corpus("list", "M", path=write(tmp_path / "m.txt", "a\nb\n")).notes == []


# ------------------------------------------------------------------------------------------------ frames


def test_frames_every_folder_with_images_is_a_video(tmp_path):
    touch(tmp_path, "run/v1/0001.jpg", "run/v1/0002.jpg", "walk/v 2/f.PNG", "walk/readme.txt")
    corpus = load_corpus("frames", "F", path=str(tmp_path), labeled=True)
    assert relative(corpus, tmp_path) == ["run/v1", "walk/v 2"]
    assert corpus.class_names == ["run", "walk"]
    assert [r.label for r in corpus] == [0, 1]
    assert [r.label for r in load_corpus("frames", "F", path=str(tmp_path))] == [None, None]


def test_frames_errors(tmp_path):
    touch(tmp_path, "v1/0001.jpg")
    assert len(load_corpus("frames", "F", path=str(tmp_path))) == 1
    with pytest.raises(UserError, match="v1"):
        load_corpus("frames", "F", path=str(tmp_path), labeled=True)
    with pytest.raises(UserError, match="no folder with images"):
        load_corpus("frames", "F", path=str(touch(tmp_path / "none", "a.mp4")))


# ------------------------------------------------------------------------------------------------ all formats


def test_unknown_format_names_the_near_one():
    with pytest.raises(UserError, match=r"FORMAT: there is no corpus format named 'ucf'.*ucf101"):
        load_corpus("ucf", "X", path="/")


@pytest.mark.parametrize("weight", [0.0, -2.0, float("nan"), float("inf")])
def test_weight_is_checked(tmp_path, weight):
    with pytest.raises(UserError, match="WEIGHT"):
        load_corpus("list", "X", path=write(tmp_path / "l.txt", "a\n"), weight=weight)


def test_many_paths_are_fast_and_small(tmp_path):
    path = tmp_path / "big.csv"
    path.write_text("".join(f"class {i % 400}/some_video_of_{i:07d}.mp4 {i % 400}\n" for i in range(300_000)))
    begin = time.process_time()
    corpus = load_corpus("csv", "BIG", path=str(path), labeled=True)
    seconds = time.process_time() - begin
    assert seconds < 4
    assert corpus.num_bytes < 30e6
    assert len(pickle.dumps(corpus)) < 30e6
    assert corpus[165_432] == (f"{tmp_path}/class {165_432 % 400}/some_video_of_0165432.mp4", 165_432 % 400)
    assert len(corpus.repeats) == 0


def test_mixture_indexes_corpora_in_order(tmp_path):
    first = load_corpus("list", "A", path=write(tmp_path / "a.txt", "1\n2\n3\n"), weight=3)
    second = load_corpus("list", "B", path=write(tmp_path / "b.txt", "4\n"), weight=1)
    mixture = Mixture([first, second])
    assert relative(mixture, tmp_path) == ["1", "2", "3", "4"]
    assert [mixture.locate(i) for i in range(4)] == [(0, 0), (0, 1), (0, 2), (1, 0)]
    assert mixture.weights == (0.75, 0.25)
    with pytest.raises(IndexError):
        mixture[4]
    with pytest.raises(IndexError):
        mixture[-1]


def test_mixture_weights_by_size(tmp_path):
    lists = [write(tmp_path / "a.txt", "1\n2\n3\n"), write(tmp_path / "b.txt", "4\n")]
    by_size = [load_corpus("list", str(i), path=path, weight=-1) for i, path in enumerate(lists)]
    assert Mixture(by_size).weights == (0.75, 0.25)
    with pytest.raises(UserError, match="cannot be mixed with other weights"):
        Mixture([by_size[0], load_corpus("list", "B", path=lists[1], weight=1)])


def test_mixture_refuses_labels_that_disagree(tmp_path):
    plain = load_corpus("list", "A", path=write(tmp_path / "a.txt", "1\n"))
    labeled = load_corpus("csv", "B", path=write(tmp_path / "b.csv", "1 0\n"), labeled=True)
    with pytest.raises(UserError, match=r"Labeled corpora \(B\) .* unlabeled ones \(A\)"):
        Mixture([plain, labeled])
    one = load_corpus("folder", "C", path=str(touch(tmp_path / "c", "run/1.mp4")), labeled=True)
    two = load_corpus("folder", "D", path=str(touch(tmp_path / "d", "walk/1.mp4")), labeled=True)
    with pytest.raises(UserError, match="'C' and 'D' have different classes"):
        Mixture([one, two])
    with pytest.raises(UserError, match="no corpus"):
        Mixture([])
    assert Mixture([one, labeled]).class_names == ["run"]


def test_no_file_is_looked_at_one_by_one(tmp_path, monkeypatch):
    lists = write(tmp_path / "a.txt", "1.mp4\n2.mp4\n")
    touch(tmp_path / "v", *(f"run/{i}.mp4" for i in range(50)))
    looked: list[str] = []
    real = os.stat
    monkeypatch.setattr(os, "stat", lambda path, *a, **k: looked.append(str(path)) or real(path, *a, **k))
    load_corpus("list", "A", path=lists)
    load_corpus("folder", "B", path=str(tmp_path / "v"))
    assert not [path for path in looked if path.endswith(".mp4")]


def test_a_reader_of_ones_own_can_be_registered(tmp_path):
    from distinit_plugin.registry import CORPORA
    from distinit_plugin.video.formats import register_format

    @register_format("one_file")
    def read_one_file(source: CorpusSource) -> Listing:
        listing = Listing(root="", labeled=False)
        listing.add(source.path)
        return listing

    try:
        assert load_corpus("one_file", "X", path="/x.mp4")[0] == ("/x.mp4", None)
    finally:
        CORPORA._obj_map.pop("one_file")
