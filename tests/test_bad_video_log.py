"""The account of bad videos: one line for each, over runs, ranks and checkpoints."""

from __future__ import annotations

import csv
import os
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from distinit_plugin.data.bad import BadVideoLog
from distinit_plugin.errors import UserError
from distinit_plugin.types import BadVideo


def read_rows(path: Path) -> list[list[str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.reader(file))


def test_bad_log_names_each_file_once(tmp_path, caplog):
    path = tmp_path / "out" / "bad_videos.csv"
    log = BadVideoLog(path)
    odd = BadVideo('a, "b"\nc.mp4', "reason, with comma")
    assert log.add([odd, BadVideo("x.mp4", "first"), BadVideo("x.mp4", "second")]) == [odd, BadVideo("x.mp4", "first")]
    assert not path.exists()
    log.share()
    assert log.add([BadVideo("x.mp4", "third")]) == []
    assert log.add([BadVideo("x.mp4", "in another use")], "test") == []
    log.share()
    assert read_rows(path) == [["path", "reason"], list(odd), ["x.mp4", "first"]]
    assert len(log) == 2
    assert log.videos("test") == [BadVideo("x.mp4", "first")]
    assert os.listdir(path.parent) == ["bad_videos.csv"]
    assert caplog.text.count("bad video x.mp4: first") == 1
    assert caplog.text.count("bad video ") == 2


def test_bad_log_keeps_rows_of_an_earlier_run_without_counting_them(tmp_path):
    path = tmp_path / "bad_videos.csv"

    def note(log: BadVideoLog, *bad: BadVideo) -> None:
        log.add(bad)
        log.share()

    note(BadVideoLog(path), BadVideo("old.mp4", "old"))
    log = BadVideoLog(path)
    assert len(log) == 0
    note(log, BadVideo("new.mp4", "new"), BadVideo("old.mp4", "again"))
    assert read_rows(path)[1:] == [["old.mp4", "again"], ["new.mp4", "new"]]
    path.write_bytes(b'\0\xff garbage\n"unclosed')
    note(BadVideoLog(path), BadVideo("z.mp4", "z"))
    assert read_rows(path)[-1] == ["z.mp4", "z"]


def test_bad_log_survives_a_checkpoint(tmp_path):
    log = BadVideoLog(None)
    log.add([BadVideo("a", "b")])
    log.add([BadVideo("a", "b"), BadVideo("c", "d")], "val")
    torch.save(log.state_dict(), tmp_path / "state.pth")
    resumed = BadVideoLog(tmp_path / "bad.csv")
    resumed.load_state_dict(torch.load(tmp_path / "state.pth", weights_only=True))
    assert "a" in resumed
    assert (resumed.videos(), resumed.videos("val")) == (log.videos(), log.videos("val"))
    assert resumed.add([BadVideo("a", "b")]) == []
    assert read_rows(tmp_path / "bad.csv") == [["path", "reason"], ["a", "b"], ["c", "d"]]
    resumed.check(1, 0.9, "val")  # few files
    with pytest.raises(UserError, match="2 of 5 validation videos"):
        resumed.check(5, 0.0, "val")


def test_bad_log_stops_the_job(tmp_path):
    log = BadVideoLog(tmp_path / "bad.csv")
    log.add([BadVideo("a", "why"), BadVideo("b", "x")])
    log.check(corpus_size=2, max_fraction=0.1)  # two files alone stop nothing
    log.add([BadVideo("c", "x")])
    log.check(corpus_size=30, max_fraction=0.1)  # exactly the fraction is allowed
    with pytest.raises(UserError, match=r"3 of 29 videos.*MAX_BAD_FRACTION 0\.1.*a: why.*bad\.csv"):
        log.check(corpus_size=29, max_fraction=0.1)
    log.check(corpus_size=29, max_fraction=0.1, use="test")  # these are training videos
    strict = BadVideoLog(None)
    strict.check(10, 0.0)
    strict.add([BadVideo("a", "why")])
    with pytest.raises(UserError, match="1 of 10"):
        strict.check(10, 0.0)


def test_bad_logs_of_ranks_become_one(tmp_path, caplog):
    """Two ranks, three rounds: whatever each met, both count the same and one of them speaks."""
    logs = [BadVideoLog(tmp_path / "bad.csv"), BadVideoLog(tmp_path / "other.csv", main=False)]
    rounds = [
        ([BadVideo("a", "1"), BadVideo("b", "1")], [BadVideo("b", "2"), BadVideo("c", "2")]),
        ([], [BadVideo("a", "2")]),
        ([BadVideo("c", "1"), BadVideo("d", "1")], []),
    ]
    for number, finds in enumerate(rounds):
        sent: list[list] = []
        for log, bad in zip(logs, finds, strict=True):
            log.add(bad)
            sent.append(list(log._unshared))
        for log in logs:
            log.share(lambda value, sent=sent: sent)
        for log in logs:
            assert len(log) == (3, 3, 4)[number]
    for size, raises in ((39, True), (40, False)):
        for log in logs:
            with pytest.raises(UserError, match="4 of 39") if raises else nullcontext():
                log.check(size, 0.1)
    assert [row[0] for row in read_rows(tmp_path / "bad.csv")[1:]] == ["a", "b", "c", "d"]
    assert os.listdir(tmp_path) == ["bad.csv"]
    assert caplog.text.count("bad video ") == 4


def test_bad_log_knows_which_files_changed(tmp_path):
    names = ["same", "longer", "touched", "gone", "folder", "missing", "came"]
    paths = {name: tmp_path / name for name in names}
    for name in names[:4]:
        paths[name].write_text("x")
    paths["folder"].mkdir()
    (paths["folder"] / "0.png").write_text("x")
    log = BadVideoLog(tmp_path / "bad.csv")
    log.add([BadVideo(str(path), "bad") for path in paths.values()])
    log.share()
    paths["longer"].write_text("xx")
    os.utime(paths["touched"], ns=(0, 12345))
    paths["gone"].unlink()
    os.utime(paths["folder"] / "0.png", ns=(0, 10**19 // 2))
    paths["came"].write_text("x")
    resumed = BadVideoLog(tmp_path / "bad.csv")
    resumed.load_state_dict(log.state_dict())
    assert resumed.unchanged() == [str(paths["same"]), str(paths["missing"])]
    resumed.keep_only(resumed.unchanged())
    assert len(resumed) == len(resumed.videos()) == 2
    assert [row[0] for row in read_rows(tmp_path / "bad.csv")[1:]] == resumed.unchanged()
    with pytest.raises(UserError, match="2 of 9"):
        resumed.check(9, 0.0)


def test_a_bad_log_that_cannot_be_written_is_warned_of(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    log = BadVideoLog(tmp_path / "file" / "bad.csv")
    log.add([BadVideo("a", "b")])
    log.share()
    assert "the list of bad videos is not kept: cannot write" in caplog.text
