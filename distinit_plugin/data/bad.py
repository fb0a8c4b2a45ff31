"""The record of videos that could not be used: one account for all uses and all ranks of a job."""

from __future__ import annotations

import csv
import io
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distinit_plugin.errors import UserError
from distinit_plugin.files import write_text
from distinit_plugin.types import BadVideo, Split

FEW_FILES = 3
"""A job is never stopped for fewer distinct bad files than this (unless none at all is allowed)."""

_COLUMNS = ["path", "reason"]
_NAMES: dict[Split, str] = {"train": "", "val": "validation ", "test": "test "}

logger = logging.getLogger(__name__)


def _alone(value: Any) -> list[Any]:
    return [value]


@dataclass
class _Record:
    """One bad file.

    Attributes:
        reason: Why it cannot be used.
        stamp: Its size and time of change when it was found bad.
        uses: Where it was met.
    """

    reason: str
    stamp: tuple[int, int]
    uses: set[Split] = field(default_factory=set)


class BadVideoLog:
    """Names each bad video once, in the log and with its reason in a csv, and counts them by use.

    What a rank finds is its own until all ranks ``share``; from then on their accounts are equal, so that ``check``
    stops all of them or none. The main rank alone logs and writes. Rows of an earlier run in the same folder stay in
    the csv but do not count.
    """

    def __init__(self, path: str | os.PathLike[str] | None = None, *, main: bool = True) -> None:
        """Start empty.

        Args:
            path: The csv, made with its folder when the first bad video is shared; ``None``: none.
            main: False on all ranks but one: nothing is logged or written there.
        """
        self._path = None if path is None or not main else Path(path)
        self._main = main
        self._records: dict[str, _Record] = {}
        self._unshared: list[tuple[BadVideo, tuple[int, int], Split]] = []
        self._counts: Counter[Split] = Counter()
        self._earlier = self._read()

    def __len__(self) -> int:
        """Number of distinct bad files of this job."""
        return len(self._records)

    def __contains__(self, path: str) -> bool:
        return path in self._records

    def videos(self, use: Split = "train") -> list[BadVideo]:
        """The bad files that were met in one use."""
        return [BadVideo(path, record.reason) for path, record in self._records.items() if use in record.uses]

    def add(self, bad: Iterable[BadVideo], use: Split = "train") -> list[BadVideo]:
        """Note bad videos that this rank met; known ones change nothing.

        Returns:
            Those that were not known before.
        """
        new = []
        for video in bad:
            record = self._records.get(video.path)
            if record is not None and use in record.uses:
                continue
            stamp = _stamp(video.path)
            new += self._merge(video, stamp, use)
            self._unshared.append((video, stamp, use))
        return new

    def share(self, gather_objects: Callable[[Any], list[Any]] = _alone) -> None:
        """Tell the other ranks what was found since the last time, and write the csv. Every rank must call it.

        Args:
            gather_objects: The objects of all ranks.
        """
        found, self._unshared = self._unshared, []
        news = [item for part in gather_objects(found) for item in part]
        for item in news:
            self._merge(*item)
        if news:
            self._write()

    def check(self, corpus_size: int, max_fraction: float, use: Split = "train") -> None:
        """Stop the job when too much of a corpus is bad.

        Args:
            corpus_size: Number of videos.
            max_fraction: Largest accepted share of bad ones, 0 to 1.
            use: Where they were met.

        Raises:
            UserError: More are bad.
        """
        count = self._counts[use]
        needed = FEW_FILES if max_fraction > 0 else 1
        if count < needed or count <= max_fraction * corpus_size:
            return
        first = self.videos(use)[0]
        where = f"all are named in {self._path}; " if self._path is not None else ""
        raise UserError(
            f"{count} of {corpus_size} {_NAMES[use]}videos are bad, more than CORPUS.MAX_BAD_FRACTION "
            f"{max_fraction:g} allows (first: {first.path}: {first.reason}); {where}repair or remove them (distinit "
            "check-corpus finds them all), or raise CORPUS.MAX_BAD_FRACTION."
        )

    def unchanged(self) -> list[str]:
        """Paths whose size and time are those with which they were found bad."""
        return [path for path, record in self._records.items() if _stamp(path) == record.stamp]

    def keep_only(self, paths: Iterable[str]) -> None:
        """Take all other files as good again."""
        kept = set(paths)
        for path in self._records.keys() - kept:
            del self._records[path]
            self._earlier.pop(path, None)
            if self._main:
                logger.info("%s was bad and is used again", path)
        self._count()
        self._write()

    def state_dict(self) -> dict[str, Any]:
        """What a resumed job needs, in plain types."""
        rows = [[path, item.reason, *item.stamp, sorted(item.uses)] for path, item in self._records.items()]
        return {"bad_videos": rows}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from ``state_dict``."""
        self._unshared = []
        self._records = {
            str(path): _Record(str(reason), (int(size), int(time)), set(uses))
            for path, reason, size, time, uses in state["bad_videos"]
        }
        self._count()
        if self._records:
            self._write()

    def _count(self) -> None:
        self._counts = Counter(use for record in self._records.values() for use in record.uses)

    def _merge(self, video: BadVideo, stamp: tuple[int, int], use: Split) -> list[BadVideo]:
        """Put one find into the account; returns it when its file was not known, and names it then."""
        record = self._records.get(video.path)
        if record is not None:
            self._counts[use] += use not in record.uses
            record.uses.add(use)
            return []
        self._counts[use] += 1
        self._records[video.path] = _Record(video.reason, stamp, {use})
        if self._main:
            logger.warning("bad video %s: %s", video.path, video.reason)
        return [video]

    def _read(self) -> dict[str, str]:
        """Rows of an earlier run; what is not such a row is dropped, since the file is only a report."""
        if self._path is None or not self._path.is_file():
            return {}
        try:
            with open(self._path, encoding="utf-8", errors="surrogateescape", newline="") as file:
                rows = [row for row in csv.reader(file) if len(row) == len(_COLUMNS) and row != _COLUMNS]
        except (OSError, csv.Error):
            return {}
        return {row[0]: row[1] for row in rows}

    def _write(self) -> None:
        """The csv is a report, so that a failure is only warned of; the names are in the log as well."""
        if self._path is None:
            return
        rows = self._earlier | {path: record.reason for path, record in self._records.items()}
        text = io.StringIO(newline="")
        writer = csv.writer(text)
        writer.writerow(_COLUMNS)
        writer.writerows(rows.items())
        try:
            write_text(self._path, text.getvalue())
        except UserError as error:
            logger.warning("the list of bad videos is not kept: %s", error)


def _stamp(path: str) -> tuple[int, int]:
    """Size and time of change of a file, −1 where there is none; of a folder of frames: how many, and the newest."""
    try:
        status = os.stat(path)
        if not os.path.isdir(path):
            return status.st_size, status.st_mtime_ns
        with os.scandir(path) as entries:
            times = [entry.stat().st_mtime_ns for entry in entries]
        return len(times), max([status.st_mtime_ns, *times])
    except (OSError, ValueError):
        return -1, -1
