"""What a list of videos is in memory: records, and a compact store of a million of them."""

from __future__ import annotations

import os
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from hashlib import sha256
from typing import NamedTuple

import numpy as np

from distinit_plugin.errors import UserError

MAX_SHOWN = 5
"""Items that a message lists before it says how many more there are."""


class VideoRecord(NamedTuple):
    """One video of a corpus.

    Attributes:
        path: The file, or the folder of extracted frames.
        label: Class number from 0, or ``None``: unlabeled.
    """

    path: str
    label: int | None


@dataclass(frozen=True)
class CorpusSource:
    """Where a corpus is and how to read it: the arguments of every reader.

    Attributes:
        where: How messages call the corpus.
        path: The folder, list file, csv, or folder of split files.
        root: Folder that relative paths start from; empty: the folder of the list.
        subset: ``train`` or ``test`` of UCF-101 and HMDB-51; a split name of a Kinetics csv.
        split: Split of UCF-101 and HMDB-51: 1, 2 or 3.
        labeled: Take the labels. Otherwise every label is dropped.
        classes: File of class names, one per line; empty: none.
        separator: Between path and label of a csv; empty: any white space.
    """

    where: str
    path: str
    root: str = ""
    subset: str = ""
    split: int = 1
    labeled: bool = False
    classes: str = ""
    separator: str = " "

    def error(self, problem: str) -> UserError:
        """The error whose text names this corpus."""
        return UserError(f"{self.where}: {problem}")


def shorten(items: list[str], total: int | None = None) -> str:
    """``a, b, c and 7 more``: the first few items."""
    count = len(items) if total is None else total
    text = ", ".join(items[:MAX_SHOWN])
    return f"{text} and {count - MAX_SHOWN} more" if count > MAX_SHOWN else text


class RowProblems:
    """Collects what is wrong with the rows of one file, so that all of it is reported at once."""

    def __init__(self, source: CorpusSource, path: str, allowed: str) -> None:
        """Keep the file's name and the sentence that says how a row must look."""
        self._source = source
        self._path = path
        self._allowed = allowed
        self._shown: list[str] = []
        self._count = 0

    def add(self, line: int, problem: str) -> None:
        """Note a problem of a row; ``line`` counts from 1."""
        self._count += 1
        if len(self._shown) <= MAX_SHOWN:
            self._shown.append(f"line {line} ({problem})")

    def raise_if_any(self) -> None:
        """Raise one UserError for all the rows noted."""
        if self._count:
            rows = "1 row" if self._count == 1 else f"{self._count} rows"
            raise self._source.error(
                f"{rows} of {self._path} cannot be used: {shorten(self._shown, self._count)}. {self._allowed}"
            )


@dataclass
class Listing:
    """What a reader fills: paths joined in one buffer, so that a million of them stay small while they are read.

    Attributes:
        root: Folder that relative paths start from.
        labeled: Whether every row has a label.
        class_names: Name of each class, where the format knows it.
        absent: Videos that are listed and do not exist; they are not in the listing.
        notes: Sentences for the log.
    """

    root: str
    labeled: bool
    class_names: list[str] | None = None
    absent: int = 0
    notes: list[str] = field(default_factory=list)
    blob: bytearray = field(default_factory=bytearray)
    ends: array[int] = field(default_factory=lambda: array("q"))
    labels: array[int] = field(default_factory=lambda: array("i"))
    hashes: array[int] = field(default_factory=lambda: array("q"))

    def add(self, path: str, label: int | None = None) -> None:
        """Append one video."""
        encoded = os.fsencode(path)
        self.blob += encoded
        self.ends.append(len(self.blob))
        self.hashes.append(hash(encoded))
        if self.labeled:
            assert label is not None, path
            self.labels.append(label)

    def __len__(self) -> int:
        return len(self.ends)


class Corpus:
    """A named sequence of VideoRecords.

    The paths are one array of bytes with offsets: a million paths cost what their characters cost, nothing is copied
    when a worker process is forked (no reference counts are touched), and pickling is one copy of three arrays.
    """

    def __init__(self, name: str, listing: Listing, weight: float = 1.0) -> None:
        """Take over what a reader has read.

        Args:
            name: The corpus's name in the configuration.
            listing: Rows; must not be empty.
            weight: Share of the training clips relative to other corpora; -1: by size.
        """
        assert len(listing), "a reader returned an empty listing"
        self.name = name
        self.weight = weight
        self.root = listing.root
        self.class_names = listing.class_names
        self.absent = listing.absent
        self._blob = np.frombuffer(bytes(listing.blob), dtype=np.uint8)
        self._ends = np.array(listing.ends, dtype=np.int64)
        self._labels = np.array(listing.labels, dtype=np.int32) if listing.labeled else None
        self.repeats = self._find_repeats(np.array(listing.hashes, dtype=np.int64))
        self.notes = [*listing.notes, *self._repeat_notes()]

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> VideoRecord:
        if not 0 <= index < len(self):
            raise IndexError(f"corpus '{self.name}' has {len(self)} videos, there is no number {index}")
        label = None if self._labels is None else int(self._labels[index])
        return VideoRecord(os.path.join(self.root, self.relative(index)), label)

    def __iter__(self) -> Iterator[VideoRecord]:
        return (self[index] for index in range(len(self)))

    @property
    def labeled(self) -> bool:
        """Whether the records have labels (all of them have, or none)."""
        return self._labels is not None

    @property
    def num_classes(self) -> int | None:
        """Number of class names; without names the highest label plus 1; ``None`` when unlabeled."""
        if self._labels is None:
            return None
        return len(self.class_names) if self.class_names is not None else int(self._labels.max()) + 1

    @property
    def num_bytes(self) -> int:
        """Memory of the records."""
        labels = 0 if self._labels is None else self._labels.nbytes
        return self._blob.nbytes + self._ends.nbytes + self.repeats.nbytes + labels

    def check_labels(self, num_classes: int) -> None:
        """Refuse labels that a classifier with ``num_classes`` outputs does not have.

        Raises:
            UserError: A label of ``num_classes`` or above; the first few videos are named.
        """
        if self._labels is None:
            return
        wrong = np.flatnonzero(self._labels >= num_classes)
        if len(wrong):
            named = [f"{self[i].path} has {self[i].label}" for i in map(int, wrong[: MAX_SHOWN + 1])]
            raise UserError(
                f"Corpus '{self.name}': {len(wrong)} labels do not fit {num_classes} classes (labels are 0 to "
                f"{num_classes - 1}): {shorten(named, len(wrong))}. Set MODEL.NUM_CLASSES to at least "
                f"{int(self._labels.max()) + 1}, or correct the list."
            )

    def digest(self) -> str:
        """Tells it from a corpus of other names, another order or other labels, wherever it lies."""
        digest = sha256(self._blob.tobytes())
        digest.update(self._ends.tobytes())
        if self._labels is not None:
            digest.update(self._labels.tobytes())
        return digest.hexdigest()[:16]

    def relative(self, index: int) -> str:
        """The path of a video as its list has it: below the root, or a whole one."""
        start = int(self._ends[index - 1]) if index else 0
        return os.fsdecode(self._blob[start : int(self._ends[index])].tobytes())

    def _find_repeats(self, hashes: np.ndarray) -> np.ndarray:
        """Numbers of the rows whose path stands in an earlier row; by hash first, so that no strings are kept."""
        order = np.argsort(hashes, kind="stable")
        same = np.flatnonzero(hashes[order][1:] == hashes[order][:-1])
        suspects = np.unique(np.concatenate([order[same], order[same + 1]])) if len(same) else same
        seen: set[str] = set()
        repeats = []
        for row in map(int, suspects):
            path = self.relative(row)
            if path in seen:
                repeats.append(row)
            seen.add(path)
        return np.array(repeats, dtype=np.int64)

    def _repeat_notes(self) -> list[str]:
        if not len(self.repeats):
            return []
        named = [self.relative(int(row)) for row in self.repeats[: MAX_SHOWN + 1]]
        verb = "row repeats a video" if len(self.repeats) == 1 else "rows repeat a video"
        return [f"{len(self.repeats)} {verb} that is listed before: {shorten(named, len(self.repeats))}."]
