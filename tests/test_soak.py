"""The soak of the loader, in small: counts are exact, and its judgement sees what is wrong."""

import copy
import ctypes
import gc
import importlib.util
import sys
from functools import partial
from pathlib import Path

import pytest
from videos import write_video

from distinit_plugin.video import decode
from distinit_plugin.video.index import IndexCache

SIZES = {"samples": 700, "videos": 140, "epochs": 4}
BATCH = 5
"""Batches of it fill an epoch, and every video is drawn five times, though an epoch does not end where a round does."""


@pytest.fixture(scope="module")
def soak():
    path = Path(__file__).resolve().parents[1] / "benchmarks" / "soak.py"
    spec = importlib.util.spec_from_file_location("soak", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["soak"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_counts_are_exact_with_workers_and_broken_files(soak, tmp_path, monkeypatch):
    monkeypatch.setattr(soak, "BATCH", BATCH)
    monkeypatch.setattr(soak, "LOOKS", 60)  # each takes longer than a batch
    monkeypatch.setattr(soak, "open_files", partial(soak.open_files, seconds=1.0))  # always used up by the first epoch
    seen = soak.soak(tmp_path, **SIZES, workers=2)
    assert soak.verdict(tmp_path, seen, **SIZES) == []
    assert seen.samples == 700
    assert seen.replaced == 35
    assert len(seen.bad) == 7  # one of each kind
    assert len(seen.looks) > 40
    assert min(seen.workers) > 1000
    assert set(soak.growth(seen)) == {"parent"}  # too few and too short epochs for the others
    # The judgement is not blind.
    for spoil, part in (
        (lambda m: m.draws.update({3: 2}), "times"),
        (lambda m: m.bad.pop(), "named as bad"),
        (lambda m: m.keys.__setitem__((1, 5), 2), "keys came"),
        (lambda m: m.descriptors.__setitem__(slice(None), [20, 22, 24, 26]), "open files"),
        (lambda m: m.processes.append(1), "processes"),
        (lambda m: setattr(m, "replaced", 99), "replaced"),
        (lambda m: setattr(m, "used_broken", 1), "come from broken files"),
    ):
        spoilt = copy.deepcopy(seen)
        spoil(spoilt)
        assert any(part in text for text in soak.verdict(tmp_path, spoilt, **SIZES)), part


def test_slope_is_that_of_the_second_part(soak):
    looks = [1000 * number for number in range(100)]
    assert soak.slope(looks, [5.0 * min(number, 20) for number in range(100)]) == pytest.approx(0)
    assert soak.slope(looks, [7.0 + 3.5 * number for number in range(100)]) == pytest.approx(3.5)
    assert soak.slope([1, 2], [1.0, 2.0]) == 0.0


_HEAP_FIELDS = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"


class _Heap(ctypes.Structure):
    """``struct mallinfo2`` of glibc."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            "arena",
            "ordblks",
            "smblks",
            "hblks",
            "hblkhd",
            "usmblks",
            "fsmblks",
            "uordblks",
            "fordblks",
            "top",
        )
    ]


@pytest.mark.parametrize("keeps", [False, True], ids=["ours", "PyAV's own"])
def test_reading_a_clip_keeps_nothing_of_the_file(keeps, tmp_path, monkeypatch):
    """Bytes in use by the C libraries, to which a decoder's leak belongs; fragmentation does not count."""
    try:
        statistics = ctypes.CDLL(None).mallinfo2
    except (AttributeError, OSError, TypeError):
        pytest.skip("needs mallinfo2 of glibc 2.33")
    statistics.restype = _Heap
    if keeps:  # the negative control: what made the wrapper necessary
        monkeypatch.setattr(decode, "packets_of", lambda container, stream: container.demux(stream))
    path, cache = write_video(tmp_path / "video.mp4", 24, 48, 64, gop=8), IndexCache(None)

    def read(times: int) -> int:
        for _ in range(times):
            with decode.open_video(path, cache=cache) as reader:
                reader.read([3, 5, 7])  # not to the end
        gc.collect()
        return int(statistics().uordblks)

    before = read(100)
    kept = (read(500) - before) / 500
    if keeps and kept < 50:
        pytest.skip("this PyAV keeps nothing")
    assert (kept > 100) if keeps else (kept < 50)
