"""The record of videos that could not be used."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from distinit_plugin.errors import UserError
from distinit_plugin.files import write_text
from distinit_plugin.types import BadVideo

FEW_FILES = 3
"""A job is never stopped for fewer distinct bad files than this (unless none at all is allowed)."""

_COLUMNS = ["path", "reason"]


class BadVideoLog:
    """Counts bad videos and names each once, with its reason, in a csv.

    Rows of an earlier run in the same folder stay in the csv but do not count. The csv is written anew to a temporary
    file that then takes its place, so that it is whole at any time.
    """

    def __init__(self, path: str | os.PathLike[str] | None = None) -> None:
        """Start empty.

        Args:
            path: The csv, made with its folder when the first bad video comes; ``None``: count only (ranks above 0).
        """
        self._path = None if path is None else Path(path)
        self._reasons: dict[str, str] = {}
        self._earlier = self._read()

    def __len__(self) -> int:
        """Number of distinct bad files of this job."""
        return len(self._reasons)

    def videos(self) -> list[BadVideo]:
        """The bad files of this job."""
        return [BadVideo(path, reason) for path, reason in self._reasons.items()]

    def __contains__(self, path: str) -> bool:
        return path in self._reasons

    def add(self, bad: Iterable[BadVideo]) -> list[BadVideo]:
        """Note bad videos; known ones change nothing.

        Returns:
            Those that were not known before, for the log.
        """
        new = []
        for video in bad:
            if video.path not in self._reasons:
                self._reasons[video.path] = video.reason
                new.append(video)
        if new:
            self._write()
        return new

    def check(self, corpus_size: int, max_fraction: float) -> None:
        """Stop the job when too much of the corpus is bad.

        Args:
            corpus_size: Number of videos.
            max_fraction: Largest accepted share of bad ones, 0 to 1.

        Raises:
            UserError: More are bad.
        """
        count = len(self)
        needed = FEW_FILES if max_fraction > 0 else 1
        if count < needed or count <= max_fraction * corpus_size:
            return
        path, reason = next(iter(self._reasons.items()))
        where = f"all are named in {self._path}; " if self._path is not None else ""
        raise UserError(
            f"{count} of {corpus_size} videos are bad, more than CORPUS.MAX_BAD_FRACTION {max_fraction:g} allows "
            f"(first: {path}: {reason}); {where}repair or remove them (distinit check-corpus finds them all), or raise "
            "CORPUS.MAX_BAD_FRACTION."
        )

    def state_dict(self) -> dict[str, Any]:
        """What a resumed job needs, in plain types."""
        return {"bad_videos": [[path, reason] for path, reason in self._reasons.items()]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from ``state_dict``."""
        self._reasons = {str(path): str(reason) for path, reason in state["bad_videos"]}
        if self._reasons:
            self._write()

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
        if self._path is None:
            return
        rows = self._earlier | self._reasons
        text = io.StringIO(newline="")
        writer = csv.writer(text)
        writer.writerow(_COLUMNS)
        writer.writerows(rows.items())
        write_text(self._path, text.getvalue())
