"""The writer of files: whole files only, nothing left behind, several writers at once."""

import contextlib
import errno
import fcntl
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from distinit_plugin import files
from distinit_plugin.errors import UserError
from distinit_plugin.files import STALE_SECONDS, write_file, write_text


def test_folders_are_made_and_text_is_kept_byte_for_byte(tmp_path):
    path = tmp_path / "a" / "b" / "x.csv"
    write_text(path, "é\r\n\udcff")
    assert path.read_bytes() == b"\xc3\xa9\r\n\xff"
    write_text(str(path), "new", shared=True, durable=False)
    assert path.read_text() == "new"
    assert os.listdir(path.parent) == ["x.csv"]


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("unexpected pos"), SystemExit])
def test_a_failure_keeps_the_old_file_and_leaves_nothing(tmp_path, shared, error):
    path = tmp_path / "x.bin"
    path.write_bytes(b"old")

    def fail(file):
        file.write(b"ne")
        assert len(os.listdir(tmp_path)) == 2
        raise error

    with pytest.raises(SystemExit if error is SystemExit else UserError) as caught:
        write_file(path, fail, shared=shared)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["x.bin"]
    if error is not SystemExit:
        reason = getattr(error, "strerror", None) or str(error)
        assert f"cannot write {path}: {reason}. Free space there" in str(caught.value)


def test_a_folder_that_is_a_file_or_a_file_that_is_a_folder(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "file" / "x", tmp_path / "folder"):
        with pytest.raises(UserError, match="cannot write"):
            write_text(path, "")
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]


KILLED = """
import os, sys
from distinit_plugin.files import write_file
write_file(sys.argv[1], lambda file: (file.write(b"half"), file.flush(), os._exit(9)), shared=sys.argv[2] == "True")
"""


@pytest.mark.parametrize("shared", [False, True])
def test_what_killed_processes_leave_does_not_pile_up(tmp_path, shared):
    path = tmp_path / "x.bin"
    for _ in range(3):
        assert subprocess.run([sys.executable, "-c", KILLED, str(path), str(shared)]).returncode == 9
    left = os.listdir(tmp_path)
    assert len(left) == (3 if shared else 1)
    assert not path.exists()
    (tmp_path / ".y.bin.1.tmp").write_text("another file's")
    for name in os.listdir(tmp_path):
        os.utime(tmp_path / name, times=(0, time.time() - STALE_SECONDS - 10))
    (tmp_path / ".x.bin.1.tmp").write_text("of a process that still writes")
    write_text(path, "whole", shared=shared)
    assert path.read_text() == "whole"
    assert sorted(os.listdir(tmp_path)) == [".x.bin.1.tmp", ".y.bin.1.tmp", "x.bin"]


def test_many_writers_of_one_file(tmp_path):
    """Every writer ends well, and the file is one of theirs; with one name for all temporaries this fails."""
    path = tmp_path / "x.txt"
    texts = [str(number) * 5000 for number in range(8)]
    problems = []

    def write(text: str) -> None:
        try:
            for _ in range(20):
                write_text(path, text, shared=True, durable=False)
        except BaseException as error:
            problems.append(error)

    threads = [threading.Thread(target=write, args=(text,)) for text in texts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert problems == []
    assert path.read_text() in texts
    assert os.listdir(tmp_path) == ["x.txt"]


def test_others_may_read_what_is_written(tmp_path):
    """Caches and reports are shared: the process's umask decides, not a private temporary."""
    (tmp_path / "plain").write_text("")
    for shared in (False, True):
        write_text(tmp_path / "x", "", shared=shared)
        assert stat.S_IMODE((tmp_path / "x").stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)


def test_durable_files_are_flushed_before_they_get_their_name(tmp_path, monkeypatch):
    calls = []
    flush, replace = os.fsync, os.replace
    monkeypatch.setattr(files.os, "fsync", lambda handle: (calls.append("flush"), flush(handle)))
    monkeypatch.setattr(files.os, "replace", lambda *names: (calls.append("rename"), replace(*names)))
    write_text(tmp_path / "x", "text")
    assert calls == ["flush", "rename", "flush"]  # the file, its name, the folder
    calls.clear()
    write_text(tmp_path / "y", "text", durable=False)
    assert calls == ["rename"]


def test_nothing_else_renames_or_makes_temporaries():
    """There is one writer: no other module does what it does (a defect's log is one more temporary, which stays)."""
    package = Path(files.__file__).parent
    found = {
        str(path.relative_to(package))
        for path in package.rglob("*.py")
        if any(
            word in path.read_text("utf-8") for word in ("os.replace(", "mkstemp", "NamedTemporaryFile", "os.rename(")
        )
    }
    assert found == {"files.py", "cli.py"}


# -------------------------------------------------------------------------------------------------------------- locks
@pytest.mark.parametrize("with_forked", [True, False])
def test_whether_forked_processes_hold_the_folder_too(with_forked, tmp_path, monkeypatch):
    """Workers that only read may outlive a process that was killed by some seconds."""
    monkeypatch.setattr(files, "LOCK_SECONDS", 0.5 if with_forked else 20.0)
    with files.writing_alone(tmp_path, "it", with_forked=with_forked):
        child = os.fork()
        if not child:
            time.sleep(60)
            os._exit(0)
    try:
        held = pytest.raises(UserError, match="another process") if with_forked else contextlib.nullcontext()
        with held, files.writing_alone(tmp_path, "it"):
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_a_file_is_locked_where_folders_cannot_be(tmp_path, monkeypatch):
    """NFS takes locks of files that are open for writing alone."""
    monkeypatch.setattr(files, "LOCK_SECONDS", 0.0)
    flock = fcntl.flock

    def as_nfs(handle, operation):
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(errno.EBADF, "Bad file descriptor")
        flock(handle, operation)

    monkeypatch.setattr(fcntl, "flock", as_nfs)
    opened = len(os.listdir("/proc/self/fd"))
    second = files.writing_alone(tmp_path, "it")
    with files.writing_alone(tmp_path, "it"), pytest.raises(UserError, match="another process is writing it"), second:
        pass
    with files.writing_alone(tmp_path, "it"):
        assert os.listdir(tmp_path) == [files.LOCK_FILE]
    assert len(os.listdir("/proc/self/fd")) == opened


def test_a_file_system_without_locks_is_no_hindrance(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with files.writing_alone(tmp_path, "it"), files.writing_alone(tmp_path, "it"):
        pass
