"""What feeds a training: the sampler of clips, the finishing of views, batches, the loader."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import time
from collections import Counter

import numpy as np
import pytest
import torch

from distinit_plugin.data import loader
from distinit_plugin.data.collate import collate
from distinit_plugin.data.loader import build_loader
from distinit_plugin.data.sampler import ClipSampler, ViewSampler, allot
from distinit_plugin.data.views import finish_views
from distinit_plugin.errors import UserError
from distinit_plugin.types import BadVideo, Sample, SampleKey, ViewSpec

# ------------------------------------------------------------------------------------------------ sampler


def sampler(sizes=(7,), weights=None, clips=0, step=4, **kwargs) -> ClipSampler:
    return ClipSampler(sizes, weights, num_clips_per_epoch=clips, global_batch_size=step, seed=3, **kwargs)


def stream(chosen: ClipSampler, epochs: int) -> list[SampleKey]:
    keys = []
    for epoch in range(epochs):
        chosen.set_epoch(epoch)
        keys += list(chosen)
    return keys


def test_epoch_is_whole_steps():
    assert (sampler(clips=0).steps_per_epoch, sampler(clips=0).clips_per_epoch) == (1, 4)
    assert sampler(clips=103).clips_per_epoch == 100
    assert sampler(clips=2).clips_per_epoch == 4
    assert len(sampler(clips=100)) == 100
    assert len(list(sampler(clips=100))) == 100


def test_videos_are_drawn_equally_often_across_epochs():
    counts = Counter()
    for number, key in enumerate(stream(sampler((7,), clips=4), 100)):
        counts[key.index] += 1
        if (number + 1) % 7 == 0:
            assert set(counts.values()) == {(number + 1) // 7}
    assert set(counts) == set(range(7))


def test_passes_are_shuffled_differently():
    indices = [key.index for key in stream(sampler((50,), clips=50, step=1), 3)]
    passes = [indices[i : i + 50] for i in (0, 50, 100)]
    assert passes[0] != passes[1] != passes[2]
    assert passes[0] != list(range(50))
    assert [key.index for key in stream(sampler((5,), clips=5, step=1, shuffle=False), 2)] == [*range(5), *range(5)]


def test_weights_hold_exactly_and_within_each_corpus_equally():
    chosen = sampler((3, 1000), (0.25, 0.75), clips=40)
    for epoch in range(5):
        chosen.set_epoch(epoch)
        indices = np.array([key.index for key in chosen])
        assert (indices < 3).sum() == 10
    small = Counter(key.index for key in stream(chosen, 6) if key.index < 3)
    assert small == {0: 20, 1: 20, 2: 20}
    order = (chosen.indices(0) < 3).tolist()
    assert order != (chosen.indices(1) < 3).tolist()  # the mix is shuffled too


@pytest.mark.parametrize(
    ("clips", "weights", "expected"),
    [
        (10, [1, 1], [5, 5]),
        (10, [1, 3], [3, 7]),
        (10, [1, 2], [3, 7]),
        (3, [1e-9, 1, 1e-9], [1, 1, 1]),
        (100, [1e-9, 1], [1, 99]),
        (5, [1, 1, 1], [2, 2, 1]),
    ],
)
def test_allot(clips, weights, expected):
    assert allot(clips, weights) == expected


@pytest.mark.parametrize("world_size", [2, 4])
def test_every_step_holds_the_same_clips_for_any_number_of_ranks(world_size):
    one = stream(sampler((30, 5), (0.5, 0.5), clips=24, step=8), 2)
    ranks = [
        stream(sampler((30, 5), (0.5, 0.5), clips=24, step=8, rank=r, world_size=world_size), 2)
        for r in range(world_size)
    ]
    share = 8 // world_size
    for step in range(6):
        together = [key for rank in ranks for key in rank[step * share : (step + 1) * share]]
        assert sorted(together) == sorted(one[step * 8 : (step + 1) * 8])
    assert len({key for rank in ranks for key in rank}) == 48


def test_resume_in_the_middle_with_other_ranks():
    whole = sampler((30,), clips=24, step=8)
    whole.set_epoch(5)
    expected = list(whole)
    parts = []
    for rank in range(2):
        resumed = sampler((30,), clips=24, step=8, rank=rank, world_size=2)
        resumed.set_epoch(5, start_step=1)
        assert len(resumed) == 8
        parts += list(resumed)
    assert sorted(parts, key=lambda key: key.position) == expected[8:]
    whole.set_epoch(5, start_step=3)
    assert list(whole) == []
    with pytest.raises(ValueError, match="step 4"):
        whole.set_epoch(0, start_step=4)


def test_seed_matters():
    other = ClipSampler((50,), num_clips_per_epoch=50, global_batch_size=1, seed=4)
    assert list(other) != list(sampler((50,), clips=50, step=1))


def test_sampler_errors():
    with pytest.raises(UserError, match="multiple of the number of ranks"):
        sampler(step=4, world_size=3)
    with pytest.raises(UserError, match="too short for 3 corpora"):
        sampler((5, 5, 5), clips=2, step=2)


def test_large_epoch_is_quick():
    chosen = ClipSampler((1_000_000, 500_000), num_clips_per_epoch=1_000_000, global_batch_size=64, seed=0)
    begin = time.process_time()
    chosen.set_epoch(40)
    next(iter(chosen))
    assert time.process_time() - begin < 2


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_view_sampler_covers_each_view_once(world_size):
    clips = [2, 1, 4]
    keys = [list(ViewSampler(clips, 3, rank=rank, world_size=world_size)) for rank in range(world_size)]
    for rank in range(world_size):
        assert len(ViewSampler(clips, 3, rank=rank, world_size=world_size)) == len(keys[rank])
    everything = sorted(key for rank in keys for key in rank)
    assert [(k.index, k.clip, k.crop) for k in everything] == [
        (video, clip, crop) for video, count in enumerate(clips) for clip in range(count) for crop in range(3)
    ]
    assert [key.position for key in everything] == list(range(21))
    videos = [{key.index for key in rank} for rank in keys]
    assert sum(len(rank) for rank in videos) == 3  # no video is split between ranks


# ------------------------------------------------------------------------------------------------ views

A = ViewSpec(num_frames=2, crop_size=4, mean=(0.1, 0.2, 0.3), std=(0.5, 0.4, 0.3))
B = ViewSpec(num_frames=2, crop_size=4, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
C = ViewSpec(num_frames=1, crop_size=6, pick="center")


def raw_views() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        spec.pixels: torch.randint(0, 256, (3, 3, spec.num_frames, spec.crop_size, spec.crop_size), dtype=torch.uint8,
                                   generator=generator)
        for spec in (A, C)
    }  # fmt: skip


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last_3d])
def test_finish_views_values(memory_format):
    raw = raw_views()
    before = {name: view.clone() for name, view in raw.items()}
    views = finish_views(raw, {"student/rgb": A, "T/rgb": B, "U/rgb": C}, "cpu", memory_format=memory_format)
    for name, spec in {"student/rgb": A, "T/rgb": B, "U/rgb": C}.items():
        values = raw[spec.pixels].double() / 255
        mean, std = (torch.tensor(v, dtype=torch.float64).view(1, 3, 1, 1, 1) for v in (spec.mean, spec.std))
        torch.testing.assert_close(views[name].double(), (values - mean) / std, atol=1e-6, rtol=0)
        assert views[name].dtype == torch.float32
        assert views[name].is_contiguous(memory_format=memory_format)
    assert all(torch.equal(raw[name], before[name]) for name in raw)


def test_finish_views_shares_equal_results():
    specs = {"student/rgb": A, "same": A, "other": B}
    views = finish_views(raw_views(), specs, "cpu", dtype=torch.bfloat16)
    assert views["student/rgb"] is views["same"]
    assert views["student/rgb"] is not views["other"]
    assert views["other"].dtype == torch.bfloat16


def test_finish_views_moves_each_tensor_once(monkeypatch):
    moves = []
    real = torch.Tensor.to

    def spy(tensor, *args, **kwargs):
        if "non_blocking" in kwargs and tensor.dtype == torch.uint8:
            moves.append(tuple(tensor.shape))
        return real(tensor, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "to", spy)
    finish_views(raw_views(), {"a": A, "b": B, "c": A}, "cpu")
    assert moves == [(3, 3, 2, 4, 4)]


def test_finish_views_names_a_missing_view():
    with pytest.raises(KeyError, match="view 'x' needs rgb_clip_9x1"):
        finish_views(raw_views(), {"x": ViewSpec(num_frames=9)}, "cpu")


# ------------------------------------------------------------------------------------------------ collate


def make_sample(index: int, value: int | None = 0, label: int | None = None, bad: tuple[BadVideo, ...] = ()) -> Sample:
    views = {} if value is None else {"v": torch.full((3, 2, 4, 4), value, dtype=torch.uint8)}
    targets = {} if label is None else {"label": torch.tensor(label)}
    key = SampleKey(0, index, index)
    return {"views": views, "key": key, "path": f"{index}.mp4", "targets": targets, "bad": list(bad)}


def test_collate_joins():
    batch = collate([make_sample(0, 5, 7), make_sample(1, 6, 8)])
    assert batch["views"]["v"].shape == (2, 3, 2, 4, 4)
    assert batch["views"]["v"].dtype == torch.uint8
    assert batch["views"]["v"][:, 0, 0, 0, 0].tolist() == [5, 6]
    assert batch["targets"]["label"].tolist() == [7, 8]
    assert batch["targets"]["label"].dtype == torch.int64
    assert [key.index for key in batch["keys"]] == [0, 1]


def test_collate_leaves_out_bad_videos():
    bad = BadVideo("1.mp4", "no frames")
    batch = collate([make_sample(0, 5), make_sample(1, None, bad=(bad,)), make_sample(2, 7)])
    assert batch["paths"] == ["0.mp4", "2.mp4"]
    assert batch["views"]["v"].shape[0] == 2
    assert batch["bad"] == [bad]
    assert batch["targets"] == {}
    empty = collate([make_sample(1, None, bad=(bad,))])
    assert (empty["keys"], empty["views"], empty["bad"]) == ([], {}, [bad])


def test_collate_refuses_a_label_on_some():
    with pytest.raises(ValueError, match="differ"):
        collate([make_sample(0, 5, 7), make_sample(1, 6)])


# ------------------------------------------------------------------------------------------------ loader


class Toy(torch.utils.data.Dataset):
    """Returns its key as a view; index 99 kills the worker, 98 raises a user error."""

    def __getitem__(self, key: SampleKey) -> Sample:
        if key.index == 99:
            os.kill(os.getpid(), signal.SIGKILL)
        if key.index == 98:
            raise UserError("corpus 'X' is rotten.")
        return make_sample(key.index, key.index % 256, label=torch.get_num_threads())


@pytest.mark.parametrize("num_workers", [0, 1, 2])
def test_loader_keeps_the_order_and_the_global_random_state(num_workers):
    chosen = sampler((20,), clips=20, step=4)
    before = torch.get_rng_state()
    batches = list(build_loader(Toy(), chosen, 4, num_workers=num_workers))
    assert torch.equal(torch.get_rng_state(), before)
    assert [key.index for batch in batches for key in batch["keys"]] == [key.index for key in chosen]
    if num_workers:
        assert all((batch["targets"]["label"] == 1).all() for batch in batches)  # one thread each


def test_loader_follows_the_epoch():
    chosen = sampler((20,), clips=20, step=4)
    loader = build_loader(Toy(), chosen, 4, num_workers=1)
    first = [batch["paths"] for batch in loader]
    chosen.set_epoch(1, start_step=2)
    second = [batch["paths"] for batch in loader]
    assert len(loader) == len(second) == 3
    assert second != first[2:]


def test_dead_worker_ends_in_a_sentence():
    loader = build_loader(Toy(), [SampleKey(0, i, i) for i in (1, 2, 99, 3)], 2, num_workers=1)
    with pytest.raises(UserError, match=r"decoding process died.*memory.*NUM_WORKERS"):
        list(loader)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_user_error_of_a_worker_is_the_sentence_alone(num_workers):
    loader = build_loader(Toy(), [SampleKey(0, 0, 98)], 1, num_workers=num_workers)
    with pytest.raises(UserError) as caught:
        list(loader)
    assert str(caught.value) == "corpus 'X' is rotten."


def test_keys_survive_pickling():
    assert pickle.loads(pickle.dumps(SampleKey(1, 2, 3, 4, 5))) == (1, 2, 3, 4, 5)


class _Slow(torch.utils.data.Dataset):
    def __getitem__(self, key: SampleKey) -> Sample:
        time.sleep(0.01)
        return make_sample(key.index, key.index % 256)


def test_workers_end_only_as_their_parent_wishes(monkeypatch):
    """A scheduler signals all processes of a job; torch ends a worker that is stuck by SIGTERM."""
    monkeypatch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 0.5)  # seconds until it does so
    loader = build_loader(_Slow(), [SampleKey(0, n, n) for n in range(400)], 1, num_workers=2)
    before = set(multiprocessing.active_children())
    batches = iter(loader)
    for _ in range(2):
        next(batches)  # one of each: both have started
    first, second = set(multiprocessing.active_children()) - before
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        subprocess.run(["kill", f"-{number.value}", str(first.pid), str(second.pid)], check=True)
    for _ in range(20):
        next(batches)
    assert first.is_alive()
    assert second.is_alive()
    first.terminate()
    first.join(timeout=20)
    assert first.exitcode == 0
    batches.close()
    second.join(timeout=20)
    assert second.exitcode == 0


def _told_by_an_orphan(errors: str) -> None:
    """A worker that loses its connection a moment before its parent is gone, as the system ends a killed process."""
    here, there = multiprocessing.Pipe()
    worker = os.fork()
    if worker:
        there.close()
        here.recv_bytes()
        here.close()
        time.sleep(0.2)
        os.kill(os.getpid(), signal.SIGKILL)
    here.close()
    with open(errors, "w", buffering=1) as sys.stderr:
        loader._serve_only(os.getppid())
        there.send_bytes(str(os.getpid()).encode())
        try:
            there.recv_bytes()
        except (ConnectionError, EOFError):
            sys.excepthook(*sys.exc_info())
    os._exit(0)


@pytest.mark.skipif(sys.platform != "linux", reason="workers end with their parent on Linux")
def test_a_worker_whose_parent_was_killed_says_nothing(tmp_path):
    process = multiprocessing.get_context("fork").Process(target=_told_by_an_orphan, args=(str(tmp_path / "errors"),))
    process.start()
    process.join(30)
    assert process.exitcode == -signal.SIGKILL
    time.sleep(0.2)
    assert (tmp_path / "errors").read_text() == ""


@pytest.mark.parametrize(("error", "waits"), [(ConnectionResetError, 1), (EOFError, 1), (ValueError, 0)])
def test_a_worker_that_lives_on_prints_its_errors(error, waits, monkeypatch, capsys):
    waited = []
    monkeypatch.setattr(loader.time, "sleep", waited.append)
    loader._print_unless_orphaned(error, error("lost"), None)
    assert len(waited) == waits
    assert f"{error.__name__}: lost" in capsys.readouterr().err
