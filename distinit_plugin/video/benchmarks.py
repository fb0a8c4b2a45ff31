"""Readers of the official lists of UCF-101, HMDB-51 and Kinetics.

The lists name files; what is on disk may differ: another container (``.mp4`` for ``.avi``), another case, all files in
one folder, a part of them missing. So each folder of videos is listed once, a listed video is found by its name without
extension, and those that do not exist are counted, named in the log and left out.
"""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Iterator

from distinit_plugin.video.formats import (
    VIDEO_EXTENSIONS,
    describe,
    fold_class,
    has_extension,
    list_folder,
    read_classes,
    read_rows,
    refuse,
    register_format,
)
from distinit_plugin.video.records import CorpusSource, Listing, RowProblems, shorten

_HMDB_FILE = re.compile(r"(.+)_test_split([123])\.txt")
_HMDB_FLAGS = {"train": "1", "test": "2"}
_KINETICS_COLUMNS = ("youtube_id", "time_start", "time_end")


class VideoFinder:
    """Finds listed videos in a folder of videos from one listing of each sub-folder, without a look at each file."""

    def __init__(self, source: CorpusSource, root: str) -> None:
        """List ``root`` (UserError when it cannot be read); sub-folders are listed when they are first asked for."""
        self._source = source
        self._root = root
        entries = list_folder(source, root)
        self._folders = {entry.name.lower(): entry.name for entry in entries if entry.is_dir()}
        self._folders |= {entry.name: entry.name for entry in entries if entry.is_dir()}
        self._listings: dict[str, dict[str, str]] = {"": self._names(entries)}

    def find(self, folders: list[str], file_name: str) -> str | None:
        """The path, relative to the root, of a video that lies in one of the folders (``""``: the root itself).

        The exact name first, then the same stem with another video extension or as a folder of frames, then either
        without regard to case.
        """
        for folder in folders:
            actual = self._folders.get(folder) or self._folders.get(folder.lower()) if folder else ""
            if actual is None:
                continue
            if actual not in self._listings:
                self._listings[actual] = self._names(list_folder(self._source, os.path.join(self._root, actual)))
            names = self._listings[actual]
            stem = os.path.splitext(file_name)[0]
            for key in (file_name, f"{stem}/", f"{stem}/".lower()):
                if key in names:
                    return os.path.join(actual, names[key])
        return None

    @staticmethod
    def _names(entries: list[os.DirEntry[str]]) -> dict[str, str]:
        """File names by themselves and by ``stem/`` (a character that no file name holds marks stems)."""
        names: dict[str, str] = {}
        for entry in entries:
            if entry.is_dir():
                stem = entry.name
            elif has_extension(entry.name, VIDEO_EXTENSIONS):
                stem = os.path.splitext(entry.name)[0]
                names[entry.name] = entry.name
            else:
                continue
            names.setdefault(f"{stem}/", entry.name)
            names.setdefault(f"{stem}/".lower(), entry.name)
        return names


class _Collector:
    """Adds the listed videos that exist to a listing and counts the others."""

    def __init__(self, source: CorpusSource, class_names: list[str] | None) -> None:
        self._source = source
        self._root = source.root or (source.path if os.path.isdir(source.path) else os.path.dirname(source.path)) or "."
        self._finder = VideoFinder(source, self._root)
        self._missing: list[str] = []
        self.listing = Listing(root=self._root, labeled=source.labeled, class_names=class_names)

    def add(self, folders: list[str], file_name: str, label: int | None) -> None:
        found = self._finder.find(folders, file_name)
        if found is None:
            self.listing.absent += 1
            if len(self._missing) < 10:
                self._missing.append(file_name)
        else:
            self.listing.add(found, label if self._source.labeled else None)

    def finish(self) -> Listing:
        absent = self.listing.absent
        total = len(self.listing) + absent
        if not total:
            raise self._source.error(f"{self._source.path} lists no video for SUBSET '{self._source.subset}'.")
        if not len(self.listing):
            raise self._source.error(
                f"none of the {total} listed videos is in {self._root} (first: {self._missing[0]}); ROOT must be the "
                "folder that holds the videos, or one folder of them per class."
            )
        if absent:
            self.listing.notes.append(
                f"{absent} of {total} listed videos are not in {self._root} and are left out: "
                f"{shorten(self._missing, absent)}."
            )
        return self.listing


@register_format("ucf101")
def read_ucf101(source: CorpusSource) -> Listing:
    """UCF-101: PATH holds ``classInd.txt`` and ``{train,test}list0N.txt`` (labels from 1), ROOT the videos.

    The label is that of the folder's name, which test lists have too; a train list that says otherwise is refused.
    """
    refuse(source, classes=source.classes)
    _check_subset_and_split(source)
    labels = _read_class_index(source, os.path.join(source.path, "classInd.txt"))
    path = os.path.join(source.path, f"{source.subset}list0{source.split}.txt")
    problems = RowProblems(source, path, "A row must be Class/file.avi, in train lists with the class's number.")
    collector = _Collector(source, list(labels))
    for line, row in read_rows(source, path):
        name, _, number = row.rpartition(" ") if re.search(r" \d+$", row) else (row, "", "")
        folder, _, file_name = name.replace("\\", "/").strip().rpartition("/")
        if folder not in labels:
            problems.add(line, f"class '{folder}' is not in classInd.txt")
        elif number and int(number) != labels[folder] + 1:
            problems.add(line, f"number {number}, but classInd.txt says {labels[folder] + 1} for {folder}")
        else:
            collector.add([folder, ""], file_name, labels[folder])
    problems.raise_if_any()
    return collector.finish()


@register_format("hmdb51")
def read_hmdb51(source: CorpusSource) -> Listing:
    """HMDB-51: PATH holds ``<class>_test_splitN.txt`` of ``file flag`` rows (1 train, 2 test, 0 unused)."""
    refuse(source, classes=source.classes)
    _check_subset_and_split(source)
    files: dict[str, str] = {}
    for entry in list_folder(source, source.path):
        match = _HMDB_FILE.fullmatch(entry.name)
        if match and int(match[2]) == source.split:
            files[match[1]] = entry.path
    if not files:
        raise source.error(f"there is no <class>_test_split{source.split}.txt in {source.path}.")
    class_names = sorted(files)
    collector = _Collector(source, class_names)
    for label, class_name in enumerate(class_names):
        problems = RowProblems(
            source, files[class_name], "A row must be a file name and 0 (unused), 1 (train), 2 (test)."
        )
        for line, row in read_rows(source, files[class_name]):
            file_name, _, flag = row.rpartition(" ")
            if flag not in ("0", "1", "2") or not file_name.strip():
                problems.add(line, f"'{row}'")
            elif flag == _HMDB_FLAGS[source.subset]:
                collector.add([class_name, ""], file_name.strip(), label)
        problems.raise_if_any()
    return collector.finish()


@register_format("kinetics")
def read_kinetics(source: CorpusSource) -> Listing:
    """Kinetics: the official csv; videos are ``{id}_{start:06d}_{end:06d}.mp4`` in ROOT or in ROOT/<class>."""
    known = read_classes(source)
    rows = list(_read_kinetics_rows(source))
    class_names = known or (sorted({label for _, label, _ in rows}) if source.labeled else None)
    labels = {fold_class(name): number for number, name in enumerate(class_names or [])}
    problems = RowProblems(source, source.path, "With LABELED, each row must have a label, one of CLASSES if given.")
    collector = _Collector(source, class_names if source.labeled else None)
    for line, label, file_name in rows:
        if source.labeled and (not label or fold_class(label) not in labels):
            problems.add(line, f"class '{label}'" if label else "no label")
            continue
        folders = [label, label.replace(" ", "_"), ""] if label else [""]
        collector.add(folders, file_name, labels.get(fold_class(label)))
    problems.raise_if_any()
    return collector.finish()


def _read_kinetics_rows(source: CorpusSource) -> Iterator[tuple[int, str, str]]:
    """(line, class, file name) of the rows of SUBSET (empty: all)."""
    problems = RowProblems(source, source.path, "time_start and time_end must be seconds.")
    splits: set[str] = set()
    matched = False
    try:
        with open(source.path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            rows = csv.DictReader(file)
            columns = rows.fieldnames or []
            needed = [*_KINETICS_COLUMNS, *(["label"] if source.labeled else [])]
            if any(name not in columns for name in needed):
                raise source.error(f"{source.path} must have the columns {', '.join(needed)}; it has {columns}.")
            for row in rows:
                splits.add(row.get("split") or "")
                if source.subset and "split" in columns and row["split"] != source.subset:
                    continue
                matched = True
                try:
                    start, end = (int(float(row[name])) for name in ("time_start", "time_end"))
                except (TypeError, ValueError, OverflowError):
                    problems.add(rows.line_num, f"times '{row['time_start']}', '{row['time_end']}'")
                    continue
                yield rows.line_num, row.get("label") or "", f"{row['youtube_id']}_{start:06d}_{end:06d}.mp4"
    except OSError as error:
        raise source.error(f"{source.path} cannot be read: {describe(error)}.") from error
    except csv.Error as error:
        raise source.error(f"{source.path} is not a csv: {error}.") from error
    problems.raise_if_any()
    if splits and not matched:
        raise source.error(f"SUBSET '{source.subset}' is not in {source.path}; its splits are {sorted(splits)}.")


def _check_subset_and_split(source: CorpusSource) -> None:
    if source.subset not in _HMDB_FLAGS:
        raise source.error(f"SUBSET is '{source.subset}'; it must be train or test.")
    if source.split not in (1, 2, 3):
        raise source.error(f"the split is {source.split}; it must be 1, 2 or 3.")


def _read_class_index(source: CorpusSource, path: str) -> dict[str, int]:
    """``1 ApplyEyeMakeup`` rows → class name → label from 0, in the order of the labels."""
    problems = RowProblems(source, path, "A row must be a number and a class name, the numbers 1, 2, 3, … in order.")
    labels: dict[str, int] = {}
    for line, row in read_rows(source, path):
        number, _, name = row.partition(" ")
        if number != str(len(labels) + 1) or not name.strip() or name.strip() in labels:
            problems.add(line, f"'{row}'")
        else:
            labels[name.strip()] = len(labels)
    problems.raise_if_any()
    if not labels:
        raise source.error(f"{path} is empty; it must name the classes.")
    return labels
