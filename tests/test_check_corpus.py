"""check-corpus: what it names, what it survives, what it writes."""

from __future__ import annotations

import csv
import faulthandler
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
from videos import write_video

from distinit_plugin.errors import UserError
from distinit_plugin.video import check as check_module
from distinit_plugin.video.check import CorpusReport, FileReport, check_corpus, inspect_video
from distinit_plugin.video.corpus import Corpus, load_corpus
from distinit_plugin.video.isolated import Crash, run_isolated


def corpus_of(folder: Path) -> Corpus:
    return load_corpus("folder", "X", path=str(folder))


def rows(report: CorpusReport, kind: str) -> dict[str, str]:
    return {os.path.basename(finding.path): finding.detail for finding in report.of_kind(kind)}


@pytest.mark.parametrize("num_workers", [0, 2])
def test_report(tmp_path, num_workers):
    (tmp_path / "v").mkdir()
    write_video(tmp_path / "v" / "a.mp4", 20)
    write_video(tmp_path / "v" / "b.mp4", 21)
    write_video(tmp_path / "v" / "short.mp4", 3)
    shutil.copy(tmp_path / "v" / "a.mp4", tmp_path / "v" / "copy.mp4")
    (tmp_path / "v" / "empty.mp4").write_bytes(b"")
    (tmp_path / "v" / "text.mp4").write_text("hello")
    (tmp_path / "v" / "cut.mp4").write_bytes((tmp_path / "v" / "b.mp4").read_bytes()[:600])
    steps: list[tuple[int, int]] = []
    report = check_corpus(
        [corpus_of(tmp_path / "v")], min_frames=8, num_workers=num_workers, on_progress=lambda *s: steps.append(s)
    )
    assert set(rows(report, "broken")) == {"empty.mp4", "text.mp4", "cut.mp4"}
    assert all(rows(report, "broken").values())
    assert rows(report, "short") == {"short.mp4": "3 frames, fewer than 8 (it is repeated)"}
    assert list(rows(report, "duplicated")) == ["copy.mp4"]
    assert rows(report, "odd") == {}
    assert steps == [(number, 7) for number in range(1, 8)]
    total = report.summary()
    assert (total["files"], total["listed"], total["broken"], total["frames"]) == (7, 7, 3, 64)
    text = report.to_text()
    assert "broken: 3" in text
    assert "text.mp4" in text


def test_repeated_rows_and_several_corpora(tmp_path):
    (tmp_path / "v").mkdir()
    path = write_video(tmp_path / "v" / "a.mp4", 4)
    listing = tmp_path / "list.txt"
    listing.write_text(f"{path}\n{path}\n")
    report = check_corpus([load_corpus("list", "L", path=str(listing)), corpus_of(tmp_path / "v")], num_workers=0)
    assert rows(report, "duplicated") == {"a.mp4": "listed 3 times"}
    assert len(report.files) == 1
    assert report.summary()["listed"] == 3


def test_folders_of_frames(tmp_path):
    from PIL import Image

    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        for number in range(3):
            Image.new("RGB", (20, 10), (number, 0, 0)).save(tmp_path / name / f"{number}.png")
    (tmp_path / "two" / "1.png").write_bytes(b"broken")
    report = check_corpus([load_corpus("frames", "F", path=str(tmp_path))], num_workers=0)
    assert list(rows(report, "broken")) == ["two"]
    assert report.files[0] == FileReport(f"{tmp_path}/one", "", 3, pytest.approx(0.08), 20, 10, 0, ())


def test_absent_videos_are_counted(tmp_path):
    (tmp_path / "v" / "wave").mkdir(parents=True)
    write_video(tmp_path / "v" / "wave" / "a.mp4", 4)
    (tmp_path / "wave_test_split1.txt").write_text("a.avi 1\nb.avi 1\n")
    corpus = load_corpus("hmdb51", "H", path=str(tmp_path), root=str(tmp_path / "v"), subset="train")
    report = check_corpus([corpus], num_workers=0)
    assert report.num_absent == 1
    assert report.broken == []
    assert "1 videos of the lists are not on disk" in report.to_text()


def test_files(tmp_path):
    (tmp_path / "v").mkdir()
    (tmp_path / "v" / 'odd ", name.mp4').write_text("x")
    report = check_corpus([corpus_of(tmp_path / "v")], num_workers=0)
    report.write_csv(tmp_path / "out" / "findings.csv")
    with open(tmp_path / "out" / "findings.csv", newline="") as file:
        table = list(csv.reader(file))
    assert table[0] == ["kind", "path", "detail"]
    assert table[1][:2] == ["broken", str(tmp_path / "v" / 'odd ", name.mp4')]
    assert sorted(os.listdir(tmp_path / "out")) == ["findings.csv"]
    with pytest.raises(UserError, match="cannot write"):
        report.write_csv(tmp_path / "v" / 'odd ", name.mp4' / "x.csv")


def test_names_cannot_drive_the_terminal(tmp_path):
    (tmp_path / "a\x1b[31mred\n.mp4").write_text("x")
    text = check_corpus([corpus_of(tmp_path)], num_workers=0).to_text()
    assert "\x1b" not in text
    assert "a\\x1b[31mred\\x0a.mp4" in text


def test_long_lists_are_cut(tmp_path):
    for number in range(9):
        (tmp_path / f"{number}.mp4").write_text("x" * number)
    text = check_corpus([corpus_of(tmp_path)], num_workers=0).to_text(max_rows=4)
    assert "… and 5 more" in text
    assert "3.mp4" in text
    assert "4.mp4" not in text


def test_blocks_cover_every_frame_once(tmp_path, monkeypatch):
    path = str(write_video(tmp_path / "a.mp4", 20, 32, 40, gop=8, options={"sc_threshold": "0"}))
    with check_module.open_video(path) as reader:
        index = reader.index
    assert index.key_positions.tolist() == [0, 8, 16]
    monkeypatch.setattr(check_module, "_BLOCK_BYTES", 40 * 32 * 3 * 10)
    assert [(b[0], b[-1]) for b in check_module._blocks(index)] == [(0, 7), (8, 15), (16, 19)]
    monkeypatch.setattr(check_module, "_BLOCK_BYTES", 1)
    assert [int(b[0]) for b in check_module._blocks(index)] == list(range(20))
    assert inspect_video(path).num_frames == 20


def crash_on(item: int) -> int:
    if item == 3:
        faulthandler.disable()  # pytest's would print a page
        os.kill(os.getpid(), signal.SIGSEGV)
    if item == 5:
        os._exit(7)
    if item == 6:
        time.sleep(60)
    return item * 10


@pytest.mark.parametrize("num_workers", [1, 3])
def test_processes_that_crash_or_hang_cost_their_item_only(num_workers):
    begin = time.monotonic()
    results = dict(run_isolated(crash_on, range(10), num_workers=num_workers, max_seconds=2))
    assert time.monotonic() - begin < 20
    assert {item: result for item, result in results.items() if not isinstance(result, Crash)} == {
        item: item * 10 for item in (0, 1, 2, 4, 7, 8, 9)
    }
    assert "SIGSEGV" in results[3].reason
    assert "exit code 7" in results[5].reason
    assert "hangs" in results[6].reason


def test_crashed_decoder_is_a_broken_video(tmp_path, monkeypatch):
    for number in range(4):
        write_video(tmp_path / f"{number}.mp4", 4 + number)
    real = check_module.open_video

    def fatal(path, **kwargs):
        if path.endswith("2.mp4"):
            os.kill(os.getpid(), signal.SIGKILL)
        return real(path, **kwargs)

    monkeypatch.setattr(check_module, "open_video", fatal)
    report = check_corpus([corpus_of(tmp_path)], num_workers=2)
    assert rows(report, "broken") == {"2.mp4": "the decoder crashed (SIGKILL)"}


def test_real_videos_only_the_corrupted_one_is_broken(assets):
    corpus = load_corpus("folder", "REAL", path=str(assets / "videos"))
    report = check_corpus([corpus], min_frames=8, num_workers=2)
    assert report.broken == [str(assets / "videos" / "decord" / "corrupted.mp4")]
    assert set(rows(report, "short")) == {"unordered.mov", *(f"video_{turn}.mov" for turn in (0, 90, 180, 270))}
    odd = rows(report, "odd")
    assert odd["video_90.mov"] == "is turned by 270° when shown"
    assert sum("the header says" in detail for detail in odd.values()) >= 3  # the HMDB-51 originals
    assert rows(report, "duplicated") == {}
