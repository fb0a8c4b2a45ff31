"""The official lists of UCF-101, HMDB-51 and Kinetics, on what people have on disk."""

from __future__ import annotations

import os
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import pytest
from test_corpus import relative, touch, write

from distinit_plugin.errors import UserError
from distinit_plugin.video import benchmarks
from distinit_plugin.video.corpus import load_corpus

# ------------------------------------------------------------------------------------------------ UCF-101


def make_ucf(folder: Path) -> Path:
    write(folder / "classInd.txt", "1 HandstandPushups\r\n2 HammerThrow\r\n3 Hammering\r\n")
    write(folder / "trainlist01.txt", "HammerThrow/v_a.avi 2\r\nHandstandPushups/v_HandStandPushups_b.avi 1\r\n")
    write(folder / "testlist01.txt", "Hammering/v_c.avi\r\n")
    return folder


def test_ucf101_labels_and_containers(tmp_path):
    lists = make_ucf(tmp_path / "lists")
    videos = touch(tmp_path / "v", "HammerThrow/v_a.mp4", "HandStandPushups/v_HandStandPushups_b.avi", "v_c.mkv")
    load = {"path": str(lists), "root": str(videos), "labeled": True}
    train = load_corpus("ucf101", "UCF", subset="train", **load)
    assert relative(train, videos) == ["HammerThrow/v_a.mp4", "HandStandPushups/v_HandStandPushups_b.avi"]
    assert [r.label for r in train] == [1, 0]
    test = load_corpus("ucf101", "UCF", subset="test", **load)
    assert relative(test, videos) == ["v_c.mkv"]
    assert [r.label for r in test] == [2]
    assert test.class_names == ["HandstandPushups", "HammerThrow", "Hammering"]


def test_ucf101_prefers_the_listed_file(tmp_path):
    lists = make_ucf(tmp_path / "lists")
    videos = touch(tmp_path / "v", "Hammering/v_c.mp4", "Hammering/v_c.avi", "Hammering/v_c.txt")
    corpus = load_corpus("ucf101", "UCF", path=str(lists), root=str(videos), subset="test")
    assert relative(corpus, videos) == ["Hammering/v_c.avi"]


def test_ucf101_counts_absent_videos(tmp_path):
    lists = make_ucf(tmp_path / "lists")
    videos = touch(tmp_path / "v", "HammerThrow/v_a.avi")
    corpus = load_corpus("ucf101", "UCF", path=str(lists), root=str(videos), subset="train")
    assert (len(corpus), corpus.absent) == (1, 1)
    assert "1 of 2 listed videos" in corpus.notes[0]
    with pytest.raises(UserError, match=r"none of the 1 listed videos.*ROOT"):
        load_corpus("ucf101", "UCF", path=str(lists), root=str(videos), subset="test")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"subset": ""}, "SUBSET is ''; it must be train or test"),
        ({"subset": "val"}, "train or test"),
        ({"subset": "train", "split": 4}, "1, 2 or 3"),
        ({"subset": "train", "split": 2}, r"trainlist02\.txt cannot be read"),
        ({"subset": "train", "classes": "x"}, "CLASSES has no meaning"),
    ],
)
def test_ucf101_errors(tmp_path, arguments, message):
    with pytest.raises(UserError, match=message):
        load_corpus("ucf101", "UCF", path=str(make_ucf(tmp_path)), **arguments)


def test_ucf101_lists_that_contradict(tmp_path):
    write(make_ucf(tmp_path) / "trainlist01.txt", "HammerThrow/v_a.avi 3\nSwim/v_b.avi 1\n")
    with pytest.raises(UserError, match=r"line 1 \(number 3, but classInd.txt says 2.*line 2 \(class 'Swim'"):
        load_corpus("ucf101", "UCF", path=str(tmp_path), subset="train")
    write(tmp_path / "classInd.txt", "1 A\n3 B\n")
    with pytest.raises(UserError, match=r"classInd\.txt.*line 2"):
        load_corpus("ucf101", "UCF", path=str(tmp_path), subset="train")


class FakeEntry(NamedTuple):
    name: str
    folder: bool

    def is_dir(self) -> bool:
        return self.folder


@pytest.fixture
def pretend(monkeypatch, tmp_path):
    """Make videos appear in ``tmp_path`` without making thousands of files."""

    def fill(videos: list[str]) -> None:
        folders = defaultdict(list)
        for video in videos:
            folder, name = video.split("/")
            folders[str(tmp_path / folder)].append(FakeEntry(name, False))
        folders[str(tmp_path)] = [FakeEntry(os.path.basename(folder), True) for folder in folders]
        real = benchmarks.list_folder
        monkeypatch.setattr(benchmarks, "list_folder", lambda source, path: folders.get(path) or real(source, path))

    return fill


@pytest.mark.parametrize(("split", "train", "test"), [(1, 9537, 3783), (2, 9586, 3734), (3, 9624, 3696)])
def test_ucf101_official_lists(assets, pretend, tmp_path, split, train, test):
    lists = assets / "splits" / "ucf101"
    for subset, size in (("train", train), ("test", test)):
        names = [row.split()[0] for row in (lists / f"{subset}list0{split}.txt").read_text().splitlines()]
        pretend(names)
        corpus = load_corpus(
            "ucf101", "UCF", path=str(lists), root=str(tmp_path), subset=subset, split=split, labeled=True
        )
        assert (len(corpus), corpus.absent, corpus.num_classes) == (size, 0, 101)
        assert corpus.class_names[34:37] == ["Hammering", "HammerThrow", "HandstandPushups"]
        assert relative(corpus, tmp_path) == names
        assert {record.label for record in corpus} == set(range(101))


# ------------------------------------------------------------------------------------------------ HMDB-51


def test_hmdb51_flags_spaces_and_flat_videos(tmp_path):
    lists = tmp_path / "lists"
    write(lists / "wave_test_split1.txt", "a#1 (b)!.avi 1 \nunused.avi 0 \nc[2].avi 2 \n")
    write(lists / "dive_test_split1.txt", "d & e.avi 1 \n")
    write(lists / "dive_test_split2.txt", "other.avi 1 \n")
    write(lists / "class_list.txt", "ignored\n")
    videos = touch(tmp_path / "v", "wave/a#1 (b)!.avi", "c[2].mp4", "dive/d & e.avi", "wave/unused.avi")
    load = {"path": str(lists), "root": str(videos), "labeled": True}
    train = load_corpus("hmdb51", "HMDB", subset="train", **load)
    assert train.class_names == ["dive", "wave"]
    assert relative(train, videos) == ["dive/d & e.avi", "wave/a#1 (b)!.avi"]
    assert [r.label for r in train] == [0, 1]
    assert relative(load_corpus("hmdb51", "HMDB", subset="test", **load), videos) == ["c[2].mp4"]


def test_hmdb51_errors(tmp_path):
    with pytest.raises(UserError, match=r"no <class>_test_split1\.txt"):
        load_corpus("hmdb51", "HMDB", path=str(tmp_path), subset="train")
    write(tmp_path / "wave_test_split1.txt", "a.avi 1\nb.avi\nc.avi 3\n")
    with pytest.raises(UserError, match=r"wave_test_split1\.txt.*line 2 \('b\.avi'\), line 3"):
        load_corpus("hmdb51", "HMDB", path=str(tmp_path), subset="train")


@pytest.mark.parametrize("split", [1, 2, 3])
def test_hmdb51_official_lists(assets, pretend, tmp_path, split):
    lists = assets / "splits" / "hmdb51"
    suffix = f"_test_split{split}.txt"
    pretend(
        [
            f"{file.name.removesuffix(suffix)}/{row.strip()[:-2].strip()}"
            for file in lists.glob(f"*{suffix}")
            for row in file.read_text().splitlines()
        ]
    )
    for subset, size in (("train", 3570), ("test", 1530)):
        corpus = load_corpus(
            "hmdb51", "H", path=str(lists), root=str(tmp_path), subset=subset, split=split, labeled=True
        )
        assert (len(corpus), corpus.absent) == (size, 0)
        assert corpus.class_names == sorted((lists / "class_list.txt").read_text().split())


# ------------------------------------------------------------------------------------------------ Kinetics

KINETICS = """label,youtube_id,time_start,time_end,split
"playing guitar",-abc_DEF123,5,15,train
abseiling,0123456789a,120,130,train
zumba,missing0000,1,11,train
abseiling,valvalvalva,0.0,10.0,validate
"""


def test_kinetics_official_csv(tmp_path):
    path = write(tmp_path / "k.csv", KINETICS)
    videos = touch(
        tmp_path / "v", "playing_guitar/-abc_DEF123_000005_000015.mp4", "0123456789a_000120_000130.mkv",
        "abseiling/valvalvalva_000000_000010.mp4",
    )  # fmt: skip
    corpus = load_corpus("kinetics", "K", path=path, root=str(videos), labeled=True)
    assert corpus.class_names == ["abseiling", "playing guitar", "zumba"]
    assert [r.label for r in corpus] == [1, 0, 0]
    assert corpus.absent == 1
    assert "missing0000_000001_000011.mp4" in corpus.notes[0]
    corpus = load_corpus("kinetics", "K", path=path, root=str(videos), subset="validate")
    assert relative(corpus, videos) == ["abseiling/valvalvalva_000000_000010.mp4"]
    assert corpus[0].label is None


def test_kinetics_errors(tmp_path):
    path = write(tmp_path / "k.csv", KINETICS)
    with pytest.raises(UserError, match=r"SUBSET 'val' .*\['train', 'validate'\]"):
        load_corpus("kinetics", "K", path=path, root=str(tmp_path), subset="val")
    classes = write(tmp_path / "classes.txt", "abseiling\nplaying guitar\n")
    with pytest.raises(UserError, match=r"line 4 \(class 'zumba'\)"):
        load_corpus("kinetics", "K", path=path, root=str(tmp_path), labeled=True, classes=classes)
    with pytest.raises(UserError, match=r"columns youtube_id, time_start, time_end, label"):
        load_corpus("kinetics", "K", path=write(tmp_path / "x.csv", "a.mp4 1\n"), labeled=True)
    with pytest.raises(UserError, match=r"line 2 \(times 'x', '3'\)"):
        load_corpus("kinetics", "K", path=write(tmp_path / "y.csv", "youtube_id,time_start,time_end\na,x,3\n"))
