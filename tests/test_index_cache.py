"""The cache of frame indices."""

import os
import pickle
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from videos import frame_numbers, write_video

from distinit_plugin.errors import UserError
from distinit_plugin.video.decode import VideoReader, open_video
from distinit_plugin.video.index import FrameIndex, IndexCache


def _entries(folder):
    return [os.path.join(place, name) for place, _, names in os.walk(folder) for name in names]


def _fields(index):
    return index.to_array().tolist()


def test_an_index_survives_as_a_vector():
    numbers = [np.arange(n, dtype=np.int64) * 3 for n in (5, 5, 2, 2)]
    index = FrameIndex(numbers[0], numbers[1], Fraction(1001, 30000), 48, 64, 90, numbers[2], numbers[3])
    copy = FrameIndex.from_array(index.to_array())
    assert _fields(copy) == _fields(index)
    assert (copy.time_base, copy.rotation, copy.num_frames) == (Fraction(1001, 30000), 90, 5)
    with pytest.raises(ValueError, match="sizes"):
        FrameIndex.from_array(index.to_array()[:-1])


def test_the_cache_spares_the_pass_over_the_file(tmp_path, monkeypatch):
    path = write_video(tmp_path / "a.mp4", 30)
    folder = str(tmp_path / "cache")
    with open_video(path, cache=IndexCache(folder)) as reader:
        fields = _fields(reader.index)
    assert len(_entries(folder)) == 1
    monkeypatch.setattr(VideoReader, "_build_index", lambda reader: pytest.fail("indexed again"))
    cache = IndexCache(folder)
    for other in (cache, cache, pickle.loads(pickle.dumps(cache))):
        with open_video(path, cache=other) as reader:
            assert _fields(reader.index) == fields
            assert frame_numbers(reader.read([20, 21])) == [20, 21]


def test_a_changed_file_is_indexed_again(tmp_path):
    folder = str(tmp_path / "cache")
    path = write_video(tmp_path / "a.mp4", 30)
    cache = IndexCache(folder)
    open_video(path, cache=cache).close()
    write_video(path, 20)
    for one in (cache, IndexCache(folder)):
        with open_video(path, cache=one) as reader:
            assert reader.index.num_frames == 20
    assert len(_entries(folder)) == 1


@pytest.mark.parametrize("damage", [b"", b"x", b"\0" * 400, None])
def test_a_damaged_entry_is_ignored_and_written_again(tmp_path, damage):
    folder = str(tmp_path / "cache")
    path = write_video(tmp_path / "a.mp4", 30)
    open_video(path, cache=IndexCache(folder)).close()
    (entry,) = _entries(folder)
    good = Path(entry).read_bytes()
    flipped = bytearray(good)
    flipped[100] ^= 1
    Path(entry).write_bytes(bytes(flipped) if damage is None else damage)
    with open_video(path, cache=IndexCache(folder)) as reader:
        assert reader.index.num_frames == 30
    assert Path(entry).read_bytes() == good


def test_the_memory_part_is_bounded(tmp_path):
    path = write_video(tmp_path / "a.mp4", 30)
    status = os.stat(path)
    cache = IndexCache(memory_bytes=3000)
    with open_video(path) as reader:
        for number in range(20):
            cache.put(f"/{number}", status, reader.index)
    held = [number for number in range(20) if cache.get(f"/{number}", status) is not None]
    assert held == [18, 19]


def test_a_cache_folder_that_cannot_be_used(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"the folder for frame indices .*file/cache' cannot be made"):
        IndexCache(str(tmp_path / "file" / "cache"))
    cache = IndexCache(str(tmp_path / "gone"))
    os.rmdir(tmp_path / "gone")
    (tmp_path / "gone").write_text("")
    open_video(write_video(tmp_path / "a.mp4", 5), cache=cache).close()
    assert "frame indices are not kept" in caplog.text
