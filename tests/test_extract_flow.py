"""``extract-flow`` and ``show-flow``: whole corpora, kills, full disks, bad input."""

import csv
import os
import random
import shutil
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import av
import numpy as np
import pytest
from flows import Difference, Extraction, contents, settings, write_flow_corpus
from PIL import Image
from videos import write_video

from distinit_plugin.errors import UserError
from distinit_plugin.flow.folders import PictureFolder
from distinit_plugin.flow.store import FlowStore
from distinit_plugin.jobs.corpus_check import read_corpus
from distinit_plugin.jobs.flow_extraction import FlowExtraction, common_root, extract_flow
from distinit_plugin.jobs.flow_pictures import show_flow

SLOW = os.environ.get("DISTINIT_TEST_SLOW") == "1"
GOOD = {"one/a.mp4": 12, "one/b.avi": 9, "two/a.mp4": 7, "two/single.mp4": 1}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    return write_flow_corpus(tmp_path_factory.mktemp("flow") / "videos")


def extract(corpus: Path, output: Path, *, verify: bool = False, workers: int = 1, **values: object) -> FlowExtraction:
    return extract_flow(
        read_corpus(str(corpus)),
        output,
        settings(**values),
        backend="test_difference",
        num_workers=workers,
        verify=verify,
    )


@pytest.fixture(scope="module")
def whole(corpus, tmp_path_factory) -> Path:
    """The store of an uninterrupted run."""
    output = tmp_path_factory.mktemp("flow") / "store"
    result = extract(corpus, output)
    assert {os.path.relpath(one.path, corpus): one.frames for one in result.done} == GOOD
    assert [os.path.basename(bad.path) for bad in result.bad] == ["broken.mp4"]
    return output


def test_store_of_a_corpus(corpus, whole):
    names = {f"{name}.flow.mkv" for name in GOOD} | {"store.json", "videos.csv", "bad_videos.csv"}
    assert set(contents(whole)) == names
    store = FlowStore.open(whole)
    for name, frames in GOOD.items():
        with store.reader(str(corpus / name)) as reader:
            assert reader.num_flows == max(frames - 1, 1)
            assert min(reader.height, reader.width) == 32
            reader.read([frames - 1])
    assert "broken.mp4" in (whole / "bad_videos.csv").read_text()


def test_no_process_is_forked_beside_threads_of_opencv(corpus, tmp_path, monkeypatch):
    """It would hang, now and then, when it asks OpenCV for their number."""
    cv2 = pytest.importorskip("cv2")
    counts, start = [], BaseProcess.start
    monkeypatch.setattr(BaseProcess, "start", lambda process: (counts.append(cv2.getNumThreads()), start(process))[1])
    before = cv2.getNumThreads()
    cv2.setNumThreads(2)
    try:
        extract(corpus, tmp_path / "store", workers=2)
        assert counts == [1, 1]
        assert cv2.getNumThreads() == 2
    finally:
        cv2.setNumThreads(before)


def test_the_table_is_of_all_calls(corpus, tmp_path):
    output = tmp_path / "store"
    for part in ("one", "two", "one"):
        listing = tmp_path / f"{part}.txt"
        listing.write_text("".join(f"{name}\n" for name in GOOD if name.startswith(f"{part}/")))
        some = read_corpus(str(listing), root=str(corpus))
        extract_flow(some, output, settings(), backend="test_difference", num_workers=1)
        if part == "two":
            os.unlink(output / "one" / "a.mp4.flow.mkv")  # as good as never made, until it is made again
    with (output / "videos.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {os.path.relpath(row["video"], corpus): int(row["frames"]) for row in rows} == GOOD
    for row in rows:
        assert (output / row["flow"]).stat().st_size == int(row["bytes"])
    (output / "videos.csv").write_text("video,flow\nx\n")  # somebody's own notes
    extract_flow(some, output, settings(), backend="test_difference", num_workers=1)
    assert len((output / "videos.csv").read_text().splitlines()) == 1 + sum(name.startswith("one/") for name in GOOD)


def test_only_what_is_missing_damaged_or_old_is_made_again(corpus, whole, tmp_path):
    videos, output = tmp_path / "videos", tmp_path / "store"
    shutil.copytree(corpus, videos)
    result = extract(videos, output)
    before = contents(output)
    text = result.to_text()
    assert "4 videos done, 0 were there, 1 bad; 29 frames" in text
    assert "folders of JPEG" in text
    assert "were clipped" in text
    result = extract(videos, output)
    assert [one.reused for one in result.done] == [True] * 4
    assert contents(output) == before
    # Cut at its end; damaged inside (seen with --verify); gone; of another state of the video.
    cut, inside = output / "one" / "a.mp4.flow.mkv", output / "one" / "b.avi.flow.mkv"
    cut.write_bytes(cut.read_bytes()[:-300])
    data = bytearray(inside.read_bytes())
    for place in range(len(data) // 3, 2 * len(data) // 3, 50):  # some of it is padding
        data[place] ^= 255
    inside.write_bytes(data)
    (output / "two" / "single.mp4.flow.mkv").unlink()
    changed = write_video(videos / "two" / "a.mp4", 5)
    result = extract(videos, output, verify=True)
    assert [one.reused for one in result.done] == [False] * 4
    after = contents(output)
    assert {name for name in before if before[name] != after[name]} == {"two/a.mp4.flow.mkv", "videos.csv"}
    with FlowStore.open(output).reader(str(changed)) as reader:
        assert reader.num_flows == 4


def test_kills_change_nothing(corpus, whole, tmp_path):
    """``kill -9`` at random moments, then to the end: every byte as if nothing had happened."""
    rng = random.Random(0)
    output, log = tmp_path / "store", tmp_path / "log"
    begin = time.monotonic()
    assert Extraction(corpus, tmp_path / "first", log).end() == 1  # one video is broken
    usual = time.monotonic() - begin
    killed = 0
    for number in range(10 if SLOW else 3):
        running = Extraction(corpus, output, log)
        while number == 0 and running.process.is_alive() and not any(output.rglob("*.mkv*")):
            time.sleep(0.001)  # the first one in the middle of the work, the others anywhere
        time.sleep(rng.uniform(0, 0.02 if number == 0 else usual))
        killed += running.process.is_alive()
        running.process.kill()
        running.process.join()
    assert killed
    last = Extraction(corpus, output, log)
    assert last.end() == 1, last.said
    assert contents(output) == contents(tmp_path / "first") == contents(whole)


def test_full_disk_loses_nothing_finished(corpus, whole, tmp_path):
    output, log = tmp_path / "store", tmp_path / "log"
    largest = max(path.stat().st_size for path in whole.rglob("*.mkv"))
    limited = Extraction(corpus, output, log, limit=largest - 100)
    assert limited.end() == 1
    assert "cannot write" in limited.said
    assert "File too large" in limited.said
    assert "start again to go on" in limited.said
    assert "Traceback" not in limited.said
    # The other worker was ended in the middle of a file, maybe.
    left = {name: data for name, data in contents(output).items() if not name.endswith(".tmp")}
    assert left
    assert all(contents(whole)[name] == data for name, data in left.items())
    assert Extraction(corpus, output, log).end() == 1
    assert contents(output) == contents(whole)


def test_folders_of_pictures(corpus, tmp_path):
    output = tmp_path / "jpg"
    (tmp_path / "videos").mkdir()
    for name in ("one/a.mp4", "two/single.mp4"):
        shutil.copy2(corpus / name, tmp_path / "videos")
    extract(tmp_path / "videos", output, layout="jpg")
    before = contents(output)
    assert sum(name.endswith(".jpg") for name in before) == 2 * (11 + 1)
    store = FlowStore.open(output)
    assert isinstance(store.reader(str(tmp_path / "videos" / "a.mp4")), PictureFolder)
    (output / "a" / "flow_x_00011.jpg").unlink()
    result = extract(tmp_path / "videos", output, layout="jpg")
    assert sorted(one.reused for one in result.done) == [False, True]
    assert contents(output) == before
    (output / "a" / "flow.json").unlink()
    with pytest.raises(UserError, match="was not made by this program"):
        extract(tmp_path / "videos", output, layout="jpg")
    write_video(tmp_path / "videos" / "a.avi", 2, codec="mpeg4")
    with pytest.raises(UserError, match="would have the same name"):
        extract(tmp_path / "videos", tmp_path / "new", layout="jpg")


def test_other_settings_and_other_corpora_are_refused(corpus, whole, tmp_path):
    before = contents(whole)
    with pytest.raises(UserError, match="bound: 20 there, 10 now"):
        extract(corpus, whole, bound=10.0)
    with pytest.raises(UserError, match="not of those below"):
        extract(corpus / "one", whole)
    assert contents(whole) == before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--backend", "tvl2"], "no flow back end named 'tvl2'"),
        (["--size", "0x5"], "is no size"),
        (["--bound", "5000"], "a bound of 5000 px is not possible"),
        (["--fps", "5000"], "a frame rate of 5000"),
        (["--quality", "101"], "quality 101"),
    ],
)
def test_wrong_flags_are_one_sentence(corpus, tmp_path, capsys, words, message):
    from distinit_plugin.cli import main

    assert main(["extract-flow", str(corpus), str(tmp_path / "out"), "--backend", "test_difference", *words]) == 1
    told = capsys.readouterr().err
    assert message in told
    assert told.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_device_that_is_not_there_ends_the_whole(corpus, tmp_path):
    with pytest.raises(UserError, match=r"--device tpu:7 cannot be used.*0 of 5 videos are done"):
        extract_flow(read_corpus(str(corpus)), tmp_path, settings(), backend="test_difference", device="tpu:7")


def test_frames_that_the_back_end_refuses_are_bad_videos(corpus, tmp_path, monkeypatch):
    def refuse(self, first, second):
        raise UserError("frames of 4×5 pixels are too small")

    monkeypatch.setattr(Difference, "_compute", refuse)
    result = extract(corpus / "two", tmp_path / "store")
    reasons = {os.path.basename(bad.path): bad.reason for bad in result.bad}
    assert reasons["a.mp4"] == "its flow cannot be computed: frames of 4×5 pixels are too small"
    assert [os.path.basename(one.path) for one in result.done] == ["single.mp4"]
    assert not any((tmp_path / "store").rglob("*.tmp"))


def test_roots(corpus, tmp_path):
    listing = tmp_path / "list.txt"
    listing.write_text("".join(f"{corpus / name}\n" for name in GOOD))
    listed = read_corpus(str(listing))
    assert common_root(listed, [record.path for record in listed]) == str(corpus)
    found = read_corpus(str(corpus))
    assert common_root(found, [record.path for record in found]) == str(corpus)


def test_second_writer_is_refused(corpus, tmp_path, monkeypatch):
    import fcntl

    monkeypatch.setattr("distinit_plugin.files.LOCK_SECONDS", 0.1)
    handle = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    with pytest.raises(UserError, match="another process"):
        extract(corpus, tmp_path)
    os.close(handle)
    assert list(tmp_path.iterdir()) == []


def test_pictures_of_flow(corpus, whole, tmp_path, capsys):
    for words in ({"store": str(whole)}, {"backend": "test_difference", "size": "32"}):
        show_flow(str(corpus / "one" / "a.mp4"), tmp_path / "a.png", num_frames=5, **words)
        with Image.open(tmp_path / "a.png") as sheet:
            assert sheet.size[1] > 2 * (2 * 32)  # two rows
            assert np.asarray(sheet).std() > 20
        show_flow(str(corpus / "one" / "a.mp4"), tmp_path / "a.mp4", **words)
        with av.open(str(tmp_path / "a.mp4")) as container:
            frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        assert len(frames) == 12
        assert frames[0].shape == (32, 80, 3)
    show_flow(str(corpus / "two" / "single.mp4"), tmp_path / "s.png", store=str(whole))
    for video, output, message in (
        (corpus / "two" / "broken.mp4", "a.png", "broken.mp4"),
        (corpus / "one" / "a.mp4", "a.gif", "png"),
    ):
        with pytest.raises(UserError, match=message):
            show_flow(str(video), tmp_path / output, backend="test_difference")
