"""Readers of plain corpora: a folder of videos, a list, a csv of ``path label`` rows, folders of extracted frames.

A reader is a function ``(CorpusSource) -> Listing`` registered in ``CORPORA`` by ``register_format``. It reads text and
folder listings only; no video is opened or looked at one by one.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable, Iterator

from distinit_plugin.registry import CORPORA
from distinit_plugin.video.images import IMAGE_EXTENSIONS
from distinit_plugin.video.records import CorpusSource, Listing, RowProblems, shorten

Reader = Callable[[CorpusSource], Listing]

_VIDEO_KINDS = "3gp asf avi divx flv m2ts m4v mkv mov mp4 mpeg mpg mts ogv ts vob webm wmv"
VIDEO_EXTENSIONS = frozenset(f".{kind}" for kind in re.findall(r"\w+", _VIDEO_KINDS))
"""What counts as a video in a folder; lists may name anything."""

_INTEGER = re.compile(r"-?\d+")
_MAX_LABEL = 2**31 - 1
_MAX_DIGITS = 10  # of a label; int() refuses thousands of them


def register_format(name: str) -> Callable[[Reader], Reader]:
    """Decorator: make a reader known under ``name`` (lower case), which is what FORMAT says."""

    def register(reader: Reader) -> Reader:
        # The registry's own decorator takes the function's name, and a function named "list" would hide a builtin.
        CORPORA._do_register(name, reader)
        return reader

    return register


# ------------------------------------------------------------------------------------------------ files and folders


def read_rows(source: CorpusSource, path: str) -> Iterator[tuple[int, str]]:
    """Yield (line number from 1, line without surrounding white space) of every line that is not blank.

    File names that are not UTF-8 survive the round trip to the file system.

    Raises:
        UserError: The file does not exist, cannot be read, or is not text.
    """
    try:
        with open(path, encoding="utf-8-sig", errors="surrogateescape") as file:
            for number, line in enumerate(file, start=1):
                if "\0" in line:
                    raise source.error(f"{path} is not a text file (a zero byte in line {number}).")
                row = line.strip()
                if row:
                    yield number, row
    except OSError as error:
        raise source.error(f"{path} cannot be read: {describe(error)}.") from error


def read_classes(source: CorpusSource) -> list[str] | None:
    """The names of the CLASSES file, or ``None`` when there is none.

    Raises:
        UserError: Unreadable, empty, or a name twice.
    """
    if not source.classes:
        return None
    names: dict[str, int] = {}
    problems = RowProblems(source, source.classes, "CLASSES must hold one class name per line, each once.")
    for line, name in read_rows(source, source.classes):
        if name in names:
            problems.add(line, f"'{name}' stands in line {names[name]} already")
        names.setdefault(name, line)
    problems.raise_if_any()
    if not names:
        raise source.error(f"CLASSES file {source.classes} is empty; it must hold one class name per line.")
    return list(names)


def fold_class(name: str) -> str:
    """Class names compare without case, and with spaces and underscores alike (folders are often named so)."""
    return name.replace("_", " ").strip().lower()


def describe(error: OSError) -> str:
    """The system's words for an error, without number and path."""
    if error.errno == errno.EISDIR:
        return "it is a folder"
    return (error.strerror or str(error)).lower()


def list_folder(source: CorpusSource, folder: str) -> list[os.DirEntry[str]]:
    """Entries of a folder by name, without hidden ones (macOS leaves ``._name.mp4`` files that are no videos).

    Raises:
        UserError: It does not exist, is not a folder, or cannot be read.
    """
    try:
        with os.scandir(folder) as entries:
            return sorted((entry for entry in entries if not entry.name.startswith(".")), key=lambda entry: entry.name)
    except OSError as error:
        raise source.error(f"folder {folder} cannot be read: {describe(error)}.") from error


def walk(source: CorpusSource, folder: str) -> Iterator[tuple[str, list[str]]]:
    """Yield (folder relative to the start, its file names) of a folder and all below it, in the order of names.

    Linked folders are followed once.
    """
    seen: set[str] = set()
    stack = [""]
    while stack:
        relative = stack.pop()
        full = os.path.join(folder, relative)
        real = os.path.realpath(full)
        if real in seen:
            continue
        seen.add(real)
        entries = list_folder(source, full)
        folders = [entry.name for entry in entries if entry.is_dir()]
        yield relative, [entry.name for entry in entries if not entry.is_dir()]
        stack += [os.path.join(relative, name) for name in reversed(folders)]


def has_extension(name: str, extensions: frozenset[str]) -> bool:
    """Whether a file name ends with one of the extensions, in any case."""
    return os.path.splitext(name)[1].lower() in extensions


def list_root(source: CorpusSource) -> str:
    """The folder that relative paths of a list start from."""
    return source.root or os.path.dirname(os.path.abspath(source.path))


def refuse(source: CorpusSource, **values: str) -> None:
    """Raise for keys that the format does not read, so that none is ignored without a word."""
    given = [key.upper() for key, value in values.items() if value]
    if given:
        raise source.error(f"{' and '.join(given)} has no meaning for this FORMAT; leave it empty.")


# ------------------------------------------------------------------------------------------------ the readers


@register_format("folder")
def read_folder(source: CorpusSource) -> Listing:
    """Every video below PATH. Labeled: the sub-folders of PATH are the classes, sorted, or numbered by CLASSES."""
    refuse(source, root=source.root, subset=source.subset)
    classes = _folder_classes(source)
    listing = Listing(root=source.path, labeled=source.labeled, class_names=classes.names)
    for relative, names in walk(source, source.path):
        videos = [name for name in names if has_extension(name, VIDEO_EXTENSIONS)]
        top = relative.split(os.sep, 1)[0]
        for name in videos:
            listing.add(os.path.join(relative, name), classes.label(top, os.path.join(relative, name)))
    classes.raise_problems()
    if not len(listing):
        extensions = ", ".join(sorted(extension[1:] for extension in VIDEO_EXTENSIONS))
        raise source.error(f"there is no video in {source.path} or below; files of these kinds count: {extensions}.")
    return listing


@register_format("frames")
def read_frames(source: CorpusSource) -> Listing:
    """Every folder below PATH that holds images is one video. Labeled: the folder around it is its class."""
    refuse(source, root=source.root, subset=source.subset)
    found = [
        relative
        for relative, names in walk(source, source.path)
        if any(has_extension(name, IMAGE_EXTENSIONS) for name in names)
    ]
    if not found:
        extensions = ", ".join(sorted(extension[1:] for extension in IMAGE_EXTENSIONS))
        raise source.error(f"there is no folder with images in {source.path}; these count: {extensions}.")
    parents = [os.path.basename(os.path.dirname(relative)) for relative in found]
    names = read_classes(source) or (sorted({parent for parent in parents if parent}) if source.labeled else None)
    classes = _FolderClasses(source, names, "the folder around a video's folder")
    listing = Listing(root=source.path, labeled=source.labeled, class_names=names)
    for relative, parent in zip(found, parents, strict=True):
        listing.add(relative, classes.label(parent, relative))
    classes.raise_problems()
    return listing


@register_format("list")
def read_list(source: CorpusSource) -> Listing:
    """One path per line, spaces and all; only blank lines are skipped. Never labeled."""
    refuse(source, subset=source.subset, classes=source.classes)
    if source.labeled:
        raise source.error("a list has no labels: use FORMAT csv with rows of 'path label', or LABELED False.")
    listing = Listing(root=list_root(source), labeled=False)
    for _, row in read_rows(source, source.path):
        listing.add(_expand(row))
    return _not_empty(source, listing)


@register_format("csv")
def read_csv(source: CorpusSource) -> Listing:
    """PySlowFast's ``path label`` rows; the last separator counts, so that paths with spaces work.

    Unlabeled, the label may be missing, and a last field that is an integer is dropped.
    """
    refuse(source, subset=source.subset)
    names = read_classes(source)
    separator = source.separator
    allowed = f"A row must be a path, {_name_separator(source)} and a label from 0"
    allowed += f" to {len(names) - 1} (CLASSES has {len(names)} names)." if names else "."
    problems = RowProblems(source, source.path, allowed)
    listing = Listing(root=list_root(source), labeled=source.labeled, class_names=names)
    top = len(names) if names else _MAX_LABEL
    for line, row in read_rows(source, source.path):
        path, _, text = row.rpartition(separator) if separator else _split_last(row)
        path, text = path.rstrip(), text.strip()
        if not source.labeled:
            listing.add(_expand(path if path and _INTEGER.fullmatch(text) else row))
        elif path and text.isdecimal() and len(text) <= _MAX_DIGITS and int(text) < top:
            listing.add(_expand(path), int(text))
        else:
            problems.add(line, _label_problem(path, text))
    problems.raise_if_any()
    return _not_empty(source, listing)


def _split_last(row: str) -> tuple[str, str, str]:
    fields = row.rsplit(None, 1)
    return (fields[0], " ", fields[1]) if len(fields) == 2 else ("", "", row)


def _expand(path: str) -> str:
    """``~`` at the start of a path is the user's home."""
    return os.path.expanduser(path) if path.startswith("~") else path


def _label_problem(path: str, text: str) -> str:
    if not path:
        return "no label"
    if not _INTEGER.fullmatch(text):
        return f"label '{text}' is not an integer"
    return f"label {text} is {'negative' if text.startswith('-') else 'too high'}"


def _name_separator(source: CorpusSource) -> str:
    words = {"": "white space", " ": "a space", "\t": "a tab", ",": "a comma"}
    return words.get(source.separator, f"the separator '{source.separator}'")


def _not_empty(source: CorpusSource, listing: Listing) -> Listing:
    if not len(listing):
        raise source.error(f"{source.path} lists no video; it must hold one per line.")
    return listing


class _FolderClasses:
    """Maps folder names to labels and collects those that cannot be mapped."""

    def __init__(self, source: CorpusSource, names: list[str] | None, meaning: str) -> None:
        self.names = names
        self._source = source
        self._meaning = meaning
        self._labels = {fold_class(name): label for label, name in enumerate(names or [])}
        if not source.classes:  # names taken from the folders themselves may differ in case alone
            self._labels = {name: label for label, name in enumerate(names or [])}
        self._homeless: list[str] = []

    def label(self, folder: str, path: str) -> int | None:
        """The label of a folder; an unknown folder is noted and gets 0 until ``raise_problems``."""
        if not self._source.labeled:
            return None
        found = self._labels.get(fold_class(folder) if self._source.classes else folder)
        if found is None:
            self._homeless.append(path)
        return found or 0

    def raise_problems(self) -> None:
        if self._homeless:
            count = len(self._homeless)
            known = f"a class of {self._source.classes}" if self._source.classes else "its class"
            raise self._source.error(
                f"{count} video{'s have' if count > 1 else ' has'} no label, because {self._meaning} must be {known}: "
                f"{shorten(self._homeless)}. Move them, or set LABELED False."
            )


def _folder_classes(source: CorpusSource) -> _FolderClasses:
    names = read_classes(source)
    if names is None and source.labeled:
        # Empty sub-folders count too: train and test folders must number their classes alike.
        names = [entry.name for entry in list_folder(source, source.path) if entry.is_dir()]
    return _FolderClasses(source, names, "the first folder below PATH")
