"""Look at every video of a corpus before a long job does: what is broken, short, odd, duplicated."""

from __future__ import annotations

import csv
import io
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from hashlib import sha256
from typing import Any, Literal, NamedTuple

import av
import numpy as np
from av.video.stream import VideoStream

from distinit_plugin.errors import VideoError
from distinit_plugin.files import write_text
from distinit_plugin.video.corpus import Corpus
from distinit_plugin.video.decode import open_video
from distinit_plugin.video.index import FrameIndex
from distinit_plugin.video.isolated import Crash, run_isolated

Kind = Literal["broken", "short", "odd", "duplicated"]

KINDS: tuple[Kind, ...] = ("broken", "short", "odd", "duplicated")

_MAX_ROWS = 30
_BLOCK_BYTES = 128 * 2**20
_HASH_BYTES = 2**20
# A process that takes this much longer than the decoder's own limit does not look at the clock any more.
_HANG_FACTOR = 2.0
_HANG_SECONDS = 30.0


@dataclass(frozen=True)
class FileReport:
    """What was found out about one video.

    Attributes:
        path: The file, or the folder of frames.
        reason: Why it cannot be used; empty: it can.
        num_frames: Frames that are presented.
        seconds: From the first frame to the last.
        width: Pixels.
        height: Pixels.
        num_bytes: Size of the file; 0 for folders.
        odd: What is unusual, and does no harm.
    """

    path: str
    reason: str = ""
    num_frames: int = 0
    seconds: float = 0.0
    width: int = 0
    height: int = 0
    num_bytes: int = 0
    odd: tuple[str, ...] = ()


class Finding(NamedTuple):
    """One row of the report."""

    kind: Kind
    path: str
    detail: str


@dataclass
class CorpusReport:
    """Everything found in one or several corpora.

    Attributes:
        files: One report for each distinct path, in the order of the corpora.
        findings: Rows for people; a file may have several.
        num_listed: Rows of the corpora, repeated ones too.
        num_absent: Videos of official lists that are not on disk.
    """

    files: list[FileReport]
    findings: list[Finding]
    num_listed: int
    num_absent: int = 0
    _counts: Counter[str] = field(init=False)

    def __post_init__(self) -> None:
        """Count the findings."""
        self._counts = Counter(finding.kind for finding in self.findings)

    def of_kind(self, kind: Kind) -> list[Finding]:
        """The findings of one kind."""
        return [finding for finding in self.findings if finding.kind == kind]

    @property
    def broken(self) -> list[str]:
        """Paths of the videos that cannot be used."""
        return [finding.path for finding in self.of_kind("broken")]

    def summary(self) -> dict[str, Any]:
        """Counts and totals, for JSON."""
        good = [file for file in self.files if not file.reason]
        frames = np.array([file.num_frames for file in good] or [0])
        return {
            "listed": self.num_listed,
            "absent": self.num_absent,
            "files": len(self.files),
            **{kind: self._counts[kind] for kind in KINDS},
            "frames": int(frames.sum()),
            "frames_min": int(frames.min()),
            "frames_median": float(np.median(frames)),
            "frames_max": int(frames.max()),
            "hours": round(sum(file.seconds for file in good) / 3600, 4),
            "gigabytes": round(sum(file.num_bytes for file in self.files) / 1e9, 4),
        }

    def to_text(self, max_rows: int = _MAX_ROWS) -> str:
        """A table for the terminal: totals, then the first ``max_rows`` findings of each kind."""
        total = self.summary()
        good = total["files"] - total["broken"]
        lines = [
            f"{total['files']} videos, {total['gigabytes']:.3g} GB; {good} can be used: {total['frames']} frames in "
            f"{total['hours']:.3g} h, {total['frames_min']} to {total['frames_max']} per video "
            f"(median {total['frames_median']:g})",
        ]
        if self.num_absent:
            lines.append(f"{self.num_absent} videos of the lists are not on disk")
        for kind in KINDS:
            rows = self.of_kind(kind)
            lines.append(f"{kind}: {len(rows)}")
            width = max((len(row.path) for row in rows[:max_rows]), default=0)
            lines += [f"  {_printable(row.path):<{width}}  {_printable(row.detail)}" for row in rows[:max_rows]]
            if len(rows) > max_rows:
                lines.append(f"  … and {len(rows) - max_rows} more")
        return "\n".join(lines)

    def write_csv(self, path: str | os.PathLike[str]) -> None:
        """Write every finding: kind, path, detail.

        Raises:
            UserError: The file cannot be written.
        """
        text = io.StringIO(newline="")
        writer = csv.writer(text)
        writer.writerow(Finding._fields)
        writer.writerows(self.findings)
        write_text(path, text.getvalue())


def check_corpus(
    corpora: Sequence[Corpus],
    *,
    min_frames: int = 1,
    num_workers: int = 1,
    timeout: float | None = 300.0,
    on_progress: Callable[[int, int], None] | None = None,
) -> CorpusReport:
    """Decode every frame of every video, as training would.

    Args:
        corpora: What to look at; a path that is listed several times is decoded once.
        min_frames: Videos with fewer are called short.
        num_workers: Processes; a decoder that crashes or hangs costs its own file only. 0: in this process.
        timeout: Seconds that one file may take; ``None``: any time.
        on_progress: Called with (videos done, videos).

    Returns:
        The report.
    """
    times_listed = Counter(record.path for corpus in corpora for record in corpus)
    max_seconds = float("inf") if timeout is None else timeout * _HANG_FACTOR + _HANG_SECONDS
    reports: dict[str, FileReport] = {}
    jobs = run_isolated(
        partial(inspect_video, timeout=timeout), times_listed, num_workers=num_workers, max_seconds=max_seconds
    )
    for path, result in jobs:
        reports[path] = FileReport(path, reason=result.reason) if isinstance(result, Crash) else result
        if on_progress is not None:
            on_progress(len(reports), len(times_listed))
    files = [reports[path] for path in times_listed]
    findings = [finding for file in files for finding in _judge(file, min_frames)]
    findings += [
        Finding("duplicated", path, f"listed {times} times") for path, times in times_listed.items() if times > 1
    ]
    findings += _find_copies(files, num_workers, max_seconds)
    absent = sum(corpus.absent for corpus in corpora)
    return CorpusReport(files, findings, sum(times_listed.values()), absent)


def inspect_video(path: str, *, timeout: float | None = None) -> FileReport:
    """Decode every frame of one video; never raises for what is in the file.

    Args:
        path: The file, or a folder of frames.
        timeout: Seconds that it may take.
    """
    try:
        num_bytes = os.path.getsize(path) if os.path.isfile(path) else 0
    except (OSError, ValueError):
        num_bytes = 0
    try:
        with open_video(path, timeout=timeout) as reader:
            index = reader.index
            for block in _blocks(index):
                reader.read(block)
    except VideoError as error:
        return FileReport(path, reason=error.reason, num_bytes=num_bytes)
    return FileReport(
        path,
        num_frames=index.num_frames,
        seconds=float(index.seconds[-1] - index.seconds[0]),
        width=index.width,
        height=index.height,
        num_bytes=num_bytes,
        odd=tuple(_oddities(path, index)),
    )


def _blocks(index: FrameIndex) -> Iterator[np.ndarray]:
    """All frame numbers, in blocks that fit in memory and begin at key frames where there are any."""
    size = max(1, _BLOCK_BYTES // (index.width * index.height * 3))
    keys = [int(key) for key in index.key_positions if key > 0]
    begin = 0
    while begin < index.num_frames:
        end = min(begin + size, index.num_frames)
        if end < index.num_frames:
            end = max((key for key in keys if begin < key <= end), default=end)
        yield np.arange(begin, end)
        begin = end


def _oddities(path: str, index: FrameIndex) -> Iterator[str]:
    """What is unusual about a good video."""
    if index.rotation:
        yield f"is turned by {index.rotation}° when shown"
    steps = np.diff(index.seconds)
    if len(steps) and steps.max() > 2.5 * max(float(np.median(steps)), 1e-6):
        yield f"uneven time stamps (a gap of {steps.max():.3g} s, usually {np.median(steps):.3g} s)"
    if not os.path.isfile(path):
        return
    if not len(index.stamps):
        yield "no usable time stamps (frames are counted)"
    try:
        # Sizes change at key frames only, so that the others need not be decoded.
        with av.open(os.path.abspath(path), metadata_errors="replace") as container:
            stream = container.streams.best("video")
            if not isinstance(stream, VideoStream):
                return
            stream.thread_type = "NONE"
            stream.codec_context.skip_frame = "NONKEY"
            declared = stream.frames
            sizes = {(frame.width, frame.height) for frame in container.decode(stream)}
    except (av.error.FFmpegError, LookupError, ValueError, RuntimeError):
        return  # an image, or a file whose damage the reader passes over
    if declared not in (0, index.num_frames):
        yield f"the header says {declared} frames, there are {index.num_frames}"
    if len(sizes) > 1:
        yield "its size changes: " + ", ".join(f"{width}×{height}" for width, height in sorted(sizes))


def _judge(file: FileReport, min_frames: int) -> Iterator[Finding]:
    if file.reason:
        yield Finding("broken", file.path, file.reason)
        return
    if file.num_frames < min_frames:
        frames = "1 frame" if file.num_frames == 1 else f"{file.num_frames} frames"
        yield Finding("short", file.path, f"{frames}, fewer than {min_frames} (it is repeated)")
    for detail in file.odd:
        yield Finding("odd", file.path, detail)


def _find_copies(files: list[FileReport], num_workers: int, max_seconds: float) -> list[Finding]:
    """Files with the same bytes under several names; only files of equal size are read."""
    same_size: dict[int, list[str]] = defaultdict(list)
    for file in files:
        if file.num_bytes:
            same_size[file.num_bytes].append(file.path)
    suspects = [path for paths in same_size.values() if len(paths) > 1 for path in paths]
    first: dict[str, str] = {}
    findings = []
    workers = min(num_workers, len(suspects))
    hashes = dict(run_isolated(hash_file, suspects, num_workers=workers, max_seconds=max_seconds))
    for path in suspects:
        digest = hashes[path]
        if isinstance(digest, Crash) or not digest:
            continue
        if digest in first:
            findings.append(Finding("duplicated", path, f"the same bytes as {first[digest]}"))
        first.setdefault(digest, path)
    return findings


def hash_file(path: str) -> str:
    """SHA-256 of a file's bytes; empty when it cannot be read."""
    digest = sha256()
    try:
        with open(path, "rb") as file:
            while block := file.read(_HASH_BYTES):
                digest.update(block)
    except OSError:
        return ""
    return digest.hexdigest()


def _printable(text: str) -> str:
    """File names may hold what a terminal must not get."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8").translate(_CONTROL)


_CONTROL = {code: f"\\x{code:02x}" for code in [*range(32), 127]}
