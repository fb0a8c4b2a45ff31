"""Checkpoints: layout, safety, atomic writes, damaged files."""

import contextlib
import errno
import os
import random
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch

from distinit_plugin import files
from distinit_plugin.engine import checkpoint
from distinit_plugin.engine.checkpoint import (
    damage,
    epoch_file_name,
    epoch_files,
    load_checkpoint,
    newest_checkpoint,
    newest_state,
    plain,
    prune,
    remove_unfinished,
    rng_state,
    save_checkpoint,
    set_rng_state,
)
from distinit_plugin.errors import UserError, WeightsError


def state_of(step: int) -> dict:
    return {
        "epoch": step - 1,
        "model_state": {"weight": torch.full((50,), float(step))},
        "optimizer_state": {},
        "cfg": "A: 1\n",
        "distinit": {"progress": {"step": step}},
    }


def save_epochs(folder: Path, count: int) -> list[Path]:
    paths = [folder / epoch_file_name(epoch) for epoch in range(count)]
    for number, path in enumerate(paths, start=1):
        save_checkpoint(path, state_of(number))
    return paths


def truncate(path: Path, share: float = 0.5) -> None:
    contents = path.read_bytes()
    path.write_bytes(contents[: int(len(contents) * share)])


def test_names_are_pyslowfasts():
    assert epoch_file_name(9) == "checkpoint_epoch_00010.pyth"
    # PySlowFast: the newest state is the last name, in sorted order, that contains "checkpoint".
    names = [epoch_file_name(epoch) for epoch in (0, 9, 98)] + [checkpoint.BEST_NAME, checkpoint.RESUME_NAME]
    assert [name for name in sorted(names) if "checkpoint" in name][-1] == epoch_file_name(98)


def test_round_trip_of_a_real_optimizer_is_exact(tmp_path):
    network = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(network.parameters(), betas=(0.9, 0.99))
    network(torch.randn(4, 3)).sum().backward()
    optimizer.step()
    state = {**state_of(3), "model_state": network.state_dict(), "optimizer_state": optimizer.state_dict()}
    state["distinit"]["rng"] = [rng_state()]
    save_checkpoint(tmp_path / "a.pyth", state)
    loaded = load_checkpoint(tmp_path / "a.pyth")  # weights_only
    assert loaded["epoch"] == 2
    assert loaded["cfg"] == "A: 1\n"
    assert list(loaded["model_state"]) == ["weight", "bias"]
    torch.testing.assert_close(loaded["model_state"]["weight"], network.weight.detach(), rtol=0, atol=0)
    fresh = torch.optim.AdamW(network.parameters())
    fresh.load_state_dict(loaded["optimizer_state"])
    assert fresh.param_groups[0]["betas"] == (0.9, 0.99)
    moments = optimizer.state[network.weight]["exp_avg"]
    torch.testing.assert_close(fresh.state[network.weight]["exp_avg"], moments, rtol=0, atol=0)


def test_plain_converts_numpy_and_refuses_objects():
    converted = plain({"a": np.float64(0.5), "b": np.arange(3), "c": (1, [None, "x"]), "d": OrderedDict(k=np.int64(1))})
    assert converted["a"] == 0.5
    assert type(converted["a"]) is float
    assert converted["b"].tolist() == [0, 1, 2]
    assert converted["c"] == (1, [None, "x"])
    assert type(converted["d"]) is OrderedDict
    with pytest.raises(
        TypeError, match=r"checkpoint\['meters'\]\[1\] is a Path|checkpoint\['meters'\]\[1\] is a Posix"
    ):
        plain({"meters": [1, Path("x")]})


def test_an_object_in_the_state_leaves_no_file(tmp_path):
    with pytest.raises(TypeError, match="object"):
        save_checkpoint(tmp_path / "a.pyth", {**state_of(1), "cfg": object()})
    assert list(tmp_path.iterdir()) == []


def test_a_kill_before_the_rename_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / epoch_file_name(0)
    save_checkpoint(path, state_of(1))
    before = path.read_bytes()

    class Killed(BaseException):
        pass

    def kill(*_):
        raise Killed

    monkeypatch.setattr(files.os, "replace", kill)
    monkeypatch.setattr(files, "_remove", lambda path: None)
    with pytest.raises(Killed):
        save_checkpoint(path, state_of(2))
    monkeypatch.undo()
    assert path.read_bytes() == before
    (left,) = tmp_path.glob(".*.tmp")  # what a kill leaves: never taken for a checkpoint
    assert newest_checkpoint(tmp_path) == path
    save_checkpoint(path, state_of(2))
    assert load_checkpoint(path)["epoch"] == 1
    assert epoch_files(tmp_path) == [path]
    assert remove_unfinished(tmp_path) == [left]
    assert sorted(tmp_path.iterdir()) == [path]


def test_the_folder_that_is_a_file(tmp_path):
    (tmp_path / "runs").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        save_checkpoint(tmp_path / "runs" / "checkpoints" / "a.pyth", state_of(1))


def test_newest_passes_over_truncated_files_and_names_them(tmp_path, caplog):
    paths = save_epochs(tmp_path, 4)
    assert newest_checkpoint(tmp_path) == paths[3]
    truncate(paths[3])
    paths[2].write_bytes(b"")
    with caplog.at_level("WARNING", logger="distinit_plugin"):
        assert newest_checkpoint(tmp_path) == paths[1]
    assert paths[3].name in caplog.text
    assert paths[2].name in caplog.text
    assert paths[1].name not in caplog.text


def test_newest_is_by_number_not_by_name(tmp_path):
    for epoch in (99998, 99999):
        save_checkpoint(tmp_path / epoch_file_name(epoch), state_of(epoch + 1))
    assert newest_checkpoint(tmp_path).name == "checkpoint_epoch_100000.pyth"


def test_damage_finds_flipped_bytes(tmp_path):
    path = save_epochs(tmp_path, 1)[0]
    assert damage(path) is None
    with zipfile.ZipFile(path) as archive:
        payload = torch.full((50,), 1.0).numpy().tobytes()
        assert any(archive.read(name) == payload for name in archive.namelist())
    contents = path.read_bytes()
    place = contents.index(payload)
    path.write_bytes(contents[:place] + b"\xff" + contents[place + 1 :])
    assert damage(path) is not None
    assert newest_checkpoint(tmp_path) is None


def test_every_flipped_byte_of_the_archive_is_damage_or_harmless(tmp_path):
    """Names, sizes and offsets of the zip file, too: whatever its reader makes of them is no defect of this program."""
    path = save_epochs(tmp_path, 1)[0]
    whole, expected = path.read_bytes(), load_checkpoint(path)
    with zipfile.ZipFile(path) as archive:
        directory = archive.start_dir
    found = 0
    for place in [*range(0, 600, 7), *range(directory, len(whole))]:
        for mask in (0x01, 0x80):
            path.write_bytes(whole[:place] + bytes([whole[place] ^ mask]) + whole[place + 1 :])
            found += damage(path) is not None
            with contextlib.suppress(WeightsError):
                keys = load_checkpoint(path).keys()
                assert damage(path) is not None or keys == expected.keys()
    assert found > 500


@pytest.mark.parametrize(
    "error",
    [
        *(OSError(number, os.strerror(number)) for number in (errno.EACCES, errno.EIO, errno.ESTALE)),
        MemoryError(),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
    ],
    ids=lambda error: str(error)[:12],
)
def test_a_file_that_cannot_be_read_now_is_not_called_damaged(error, tmp_path, monkeypatch):
    """Training would start anew beside it and write over it."""
    path = save_epochs(tmp_path, 2)[1]
    reason = error.strerror.lower() if isinstance(error, OSError) else "too little memory"

    def refuse(*_, **__):
        raise error

    monkeypatch.setattr(checkpoint.zipfile, "ZipFile", refuse)
    with pytest.raises(UserError, match=rf"{path} cannot be read now \({reason}\)"):
        newest_state(tmp_path)
    monkeypatch.undo()
    monkeypatch.setattr(torch, "load", refuse)
    with pytest.raises(UserError, match="cannot be read now"):
        newest_state(tmp_path)
    assert len(epoch_files(tmp_path)) == 2


def test_whole_files_of_another_kind_stay_where_they_are(tmp_path, caplog):
    """They may be of another program: an old torch's, or PySlowFast's with more than tensors in it."""
    paths = save_epochs(tmp_path, 3)
    torch.save(state_of(2), paths[1], _use_new_zipfile_serialization=False)
    torch.save({"weights": 1}, paths[2])
    with caplog.at_level("WARNING", logger="distinit_plugin"):
        assert newest_state(tmp_path)[0] == paths[0]
    assert sorted(tmp_path.iterdir()) == paths
    assert caplog.text.count("passing over") == 2


def test_damaged_files_do_not_push_out_good_ones(tmp_path):
    paths = save_epochs(tmp_path, 3)
    truncate(paths[2])
    assert newest_state(tmp_path)[0] == paths[1]
    assert sorted(path.name for path in tmp_path.iterdir()) == [paths[0].name, paths[1].name, "damaged"]
    assert [path.name for path in (tmp_path / "damaged").iterdir()] == [paths[2].name]
    assert checkpoint.prune(paths[1], 1) == [paths[0]]
    assert newest_state(tmp_path)[0] == paths[1]


def test_nothing_to_find(tmp_path):
    assert newest_checkpoint(tmp_path / "missing") is None
    assert newest_state(tmp_path) is None


def test_newest_state_takes_the_mid_epoch_state_only_when_it_is_ahead(tmp_path):
    paths = save_epochs(tmp_path, 2)
    resume = tmp_path / checkpoint.RESUME_NAME
    save_checkpoint(resume, state_of(1))
    assert newest_state(tmp_path)[0] == paths[1]
    save_checkpoint(resume, state_of(7))
    path, state = newest_state(tmp_path)
    assert path == resume
    assert state["distinit"]["progress"]["step"] == 7
    truncate(resume)
    assert newest_state(tmp_path)[0] == paths[1]


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path: None, "there is no checkpoint"),
        (lambda path: path.write_bytes(b"not a checkpoint"), "cannot be read"),
        (lambda path: path.write_bytes(b""), "cannot be read"),
        (lambda path: torch.save({"epoch": 1}, path), "no entry 'model_state'"),
        (lambda path: torch.save([1], path), "no entry 'model_state'"),
        (lambda path: torch.save({"model_state": {}, "x": Path("x")}, path), "cannot be read"),
        (lambda path: (torch.save(state_of(1), path), truncate(path)), "truncated"),
    ],
)
def test_bad_files_are_refused_with_a_sentence(tmp_path, write, message):
    path = tmp_path / "a.pyth"
    write(path)
    with pytest.raises(WeightsError, match=message) as caught:
        load_checkpoint(path)
    assert str(path) in str(caught.value)


def test_prune_keeps_the_newest_and_other_files(tmp_path):
    paths = save_epochs(tmp_path, 4)
    save_checkpoint(tmp_path / checkpoint.BEST_NAME, state_of(1))
    assert prune(paths[3], 0) == []
    assert prune(paths[2], 1) == paths[:2]  # the last one is of another run
    assert epoch_files(tmp_path) == paths[2:]
    assert (tmp_path / checkpoint.BEST_NAME).exists()
    assert prune(paths[3], 2) == []


def test_rng_state_reproduces_every_generator(tmp_path):
    def draw():
        return torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random(), random.gauss(0, 1)  # noqa: NPY002

    random.gauss(0, 1)  # leaves a second value behind, which is part of the state
    save_checkpoint(tmp_path / "a.pyth", {**state_of(1), "rng": rng_state()})
    first = draw()
    assert draw() != first
    set_rng_state(load_checkpoint(tmp_path / "a.pyth")["rng"])
    assert draw() == first
