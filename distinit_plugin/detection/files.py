"""The files of AVA, and of any data set in their form: boxes, excluded time stamps, label map, lists of frames.

All of them are read whole and checked; what is wrong is named with its line. Columns and their traps:
https://research.google.com/ava/download.html and PySlowFast's ``slowfast/datasets/ava_helper.py``.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import BinaryIO, overload

import numpy as np
import numpy.typing as npt

from distinit_plugin.detection.rows import Form, read_rows
from distinit_plugin.detection.tables import NO_ACTION, BoxTable
from distinit_plugin.errors import UserError, shown
from distinit_plugin.files import write_file
from distinit_plugin.video import formats
from distinit_plugin.video.records import CorpusSource, RowProblems

TRUTH = Form(
    "Ground truth",
    last="person",
    needs_action=True,
    ordered=True,
    allowed="Rows are video,second,x1,y1,x2,y2,action and, if known, a person's whole number; a row of video,second "
    "alone is a keyframe without boxes; there is no header. (Scores stand in the eighth column of predicted boxes and "
    "of detections; those files are no ground truth.)",
)
BOXES = Form(
    "Predicted boxes",
    last="score",
    needs_action=False,
    ordered=False,
    allowed="Rows are video,second,x1,y1,x2,y2,action,score, where the action may be empty or -1; there is no header.",
)
DETECTIONS = Form(
    "Detections",
    last="score",
    needs_action=True,
    ordered=False,
    allowed="Rows are video,second,x1,y1,x2,y2,action,score, where a missing score is 1; actions count from 1; there "
    "is no header.",
)

_LINES_AT_ONCE = 50_000


def read_truth(path: str | os.PathLike[str]) -> BoxTable:
    """Ground truth: rows of seven or eight columns, the eighth the person's number; scores are 1.

    Raises:
        UserError: It cannot be read, or rows are wrong (the first ones are named): columns, numbers, actions below 1,
            x2 < x1 or y2 < y1, an eighth column that is no whole number.
    """
    return read_rows(os.path.expanduser(path), TRUTH)


def read_boxes(path: str | os.PathLike[str]) -> BoxTable:
    """Predicted boxes of persons: the eighth column is the detector's score, 1 where there is none.

    Raises:
        UserError: It cannot be read, rows are wrong, or it is ground truth: the eighth column holds persons' numbers.
    """
    path = os.path.expanduser(path)
    table = read_rows(path, BOXES)
    if holds_persons(table):
        raise UserError(
            f"{path} is ground truth, not predicted boxes: its eighth column holds whole numbers, which are persons. "
            "Read as scores (as PySlowFast does, in whose configurations ava_train_*.csv stands among "
            "AVA.TRAIN_PREDICT_BOX_LISTS), they would drop every row of person 0. Name the file in "
            "AVA.TRAIN_GT_BOX_LISTS, and predicted boxes with scores in AVA.TRAIN_PREDICT_BOX_LISTS."
        )
    return table


def holds_persons(table: BoxTable) -> bool:
    """Whether the scores of a file can only be persons' numbers: all whole, and not all of them 1."""
    return bool(len(table)) and not (table.scores == 1).all() and bool((table.scores == np.floor(table.scores)).all())


def read_detections(path: str | os.PathLike[str]) -> BoxTable:
    """Detected actions in the official form; the eighth column is the score, 1 where there is none.

    Raises:
        UserError: It cannot be read, or rows are wrong.
    """
    return read_rows(os.path.expanduser(path), DETECTIONS)


def read_excluded(path: str | os.PathLike[str]) -> set[tuple[str, float]]:
    """Keyframes that are not evaluated: rows of (video, second).

    Raises:
        UserError: It cannot be read, or a row has other columns.
    """
    source = CorpusSource(where="Excluded time stamps", path=os.path.expanduser(path))
    problems = RowProblems(source, source.path, "Rows are video,second; there is no header.")
    excluded = set()
    for line, row in formats.read_rows(source, source.path):
        video, _, second = row.rpartition(",")
        if video and "," not in video and re.fullmatch(r"\s*\d{1,9}(\.\d{1,9})?\s*", second):
            excluded.add((video.strip(), float(second)))
        else:
            problems.add(line, f"'{row[:40]}'")
    problems.raise_if_any()
    return excluded


_PAIR = re.compile(r'(?<!\w)(\w{1,40})\s*:\s*(?:"((?:[^"\\]|\\.)*)"|\'((?:[^\'\\]|\\.)*)\'|([^\s{}"\']+))')
_BLOCK = re.compile(r"(?<!\w)\w{1,40}\s*:?\s*\{((?:[^{}\"']|\"(?:[^\"\\]|\\.)*\"|'(?:[^'\\]|\\.)*')*)\}")
_COMMENT = re.compile(r"^\s*#.*$", re.MULTILINE)
_MAX_MAP = 2**20


def read_label_map(path: str | os.PathLike[str]) -> dict[int, str]:
    """Names of the actions that count, by their numbers: blocks with ``name`` and ``id`` (or ``label_id``).

    Both of AVA's forms are read (``item { name: … id: … }``, ``label { name: … label_id: … label_type: … }``).

    Raises:
        UserError: It cannot be read, holds no or incomplete blocks, numbers below 1, or a number or name twice.
    """
    path = os.path.expanduser(path)
    source = CorpusSource(where="Label map", path=path)
    allowed = 'Blocks are: item { name: "stand" id: 12 }, numbers from 1, each number and name once.'
    try:
        with open(path, encoding="utf-8-sig") as file:
            text = file.read(_MAX_MAP)
    except OSError as error:
        raise source.error(f"{path} cannot be read: {formats.describe(error)}.") from error
    except UnicodeDecodeError as error:
        raise source.error(f"{path} is not a text file. {allowed}") from error
    text = _COMMENT.sub("", text)
    problems = RowProblems(source, path, allowed)
    names: dict[int, str] = {}
    rest = 0
    for block in _BLOCK.finditer(text):
        if between := text[rest : block.start()].strip():
            problems.add(_line(text, rest), f"{shown(between)} is no whole block")
        rest = block.end()
        _add_label(dict(_pairs(block[1])), names, _line(text, block.start()), problems)
    if text[rest:].strip():
        problems.add(_line(text, rest), f"{shown(text[rest:].strip())} is no whole block")
    problems.raise_if_any()
    if not names:
        raise source.error(f"{path} names no action. {allowed}")
    return names


def _line(text: str, place: int) -> int:
    """The line of the first character from ``place`` on that is no space; the first line is 1."""
    return text.count("\n", 0, place + len(text[place:]) - len(text[place:].lstrip())) + 1


def _pairs(block: str) -> Iterator[tuple[str, str]]:
    for key, double, single, bare in _PAIR.findall(block):
        yield key, re.sub(r"\\(.)", r"\1", double or single) or bare


def _add_label(values: dict[str, str], names: dict[int, str], line: int, problems: RowProblems) -> None:
    """Note one block, or what is wrong with it."""
    name, number = values.get("name", ""), values.get("id", values.get("label_id", ""))
    if not name or not re.fullmatch(r"[0-9]{1,9}", number) or int(number) < 1:
        problems.add(line, f"name {shown(name)}, id {shown(number)}")
    elif int(number) in names:
        problems.add(line, f"id {number} is {shown(names[int(number)])} already")
    elif name in names.values():
        problems.add(line, f"{shown(name)} has another id already")
    else:
        names[int(number)] = name


class FramePaths(Sequence[str]):
    """Paths of the frames of one video in one block of memory: AVA has six million frames."""

    def __init__(self, paths: Sequence[bytes]) -> None:
        """Keep the paths."""
        self._paths: npt.NDArray[np.bytes_] = np.array(paths, np.bytes_)

    def __len__(self) -> int:
        return len(self._paths)

    @overload
    def __getitem__(self, place: int) -> str: ...

    @overload
    def __getitem__(self, place: slice) -> list[str]: ...

    def __getitem__(self, place: int | slice) -> str | list[str]:
        if isinstance(place, slice):
            return [os.fsdecode(path) for path in self._paths[place].tolist()]
        return os.fsdecode(bytes(self._paths[place]))


def read_frame_list(path: str | os.PathLike[str]) -> Mapping[str, Sequence[str]]:
    """Paths of the frames of each video, in order: rows of ``original_vido_id video_id frame_id path labels``.

    The header is left out; columns are separated by spaces, as in PySlowFast; paths are as they stand in the file.

    Raises:
        UserError: It cannot be read, rows have other columns, or the frames of a video do not stand in their order.
    """
    path = os.path.expanduser(path)
    source = CorpusSource(where="List of frames", path=path)
    problems = RowProblems(
        source,
        path,
        "The first line is a header; rows are original_vido_id video_id frame_id path labels, separated by spaces, "
        'with "" for no labels; frame_id ascends within a video.',
    )
    blobs: dict[str, bytearray] = {}
    last: dict[str, int] = {}
    for line, row in formats.read_rows(source, path):
        cells = row.split()
        if line == 1:
            if len(cells) == 5 and cells[2].isdecimal():
                problems.add(line, "there is no header: the first frame would be lost")
            continue
        if len(cells) != 5 or not cells[2].isdecimal() or len(cells[2]) > 9:
            problems.add(line, f"{len(cells)} columns" if len(cells) != 5 else f"frame_id {shown(cells[2])}")
            continue
        name, frame = cells[0].strip('"'), int(cells[2])
        if frame <= last.get(name, -1):
            problems.add(line, f"frame {frame} of {shown(name)} stands after frame {last[name]}")
        last[name] = frame
        blobs.setdefault(name, bytearray()).extend(os.fsencode(cells[3].strip('"')) + b"\n")
    problems.raise_if_any()
    return {name: FramePaths(bytes(blob).split(b"\n")[:-1]) for name, blob in blobs.items()}


def write_rows(path: str | os.PathLike[str], table: BoxTable) -> None:
    """Write a table in the official form, so that reading it gives the same numbers to the last bit.

    The eighth column is the person where the table knows persons, else the score. Rows without an action have -1 in
    the seventh. Keyframes without boxes are rows of two columns.

    Args:
        path: The csv to be; it appears when it is whole.
        table: The rows, written in their order, then its empty keyframes.

    Raises:
        UserError: The file cannot be written, or a video's name cannot stand in a csv of this form.
    """
    for name in table.videos:
        if not name.strip() or re.search(r'[,"\r\n\0]', name) or name != name.strip():
            raise UserError(f"the video's name {shown(name)} cannot stand in {path}: it holds a comma, quote or space.")

    def write(file: BinaryIO) -> None:
        for lines in _lines(table):
            file.write("".join(lines).encode("utf-8", "surrogateescape"))

    write_file(path, write)


def _lines(table: BoxTable) -> Iterator[list[str]]:
    """The rows, some thousands at a time."""
    last = table.scores if table.persons is None else table.persons
    for start in range(0, len(table), _LINES_AT_ONCE):
        part = slice(start, start + _LINES_AT_ONCE)
        columns = zip(
            table.video[part].tolist(),
            table.seconds[part].tolist(),
            table.boxes[part].tolist(),
            table.actions[part].tolist(),
            last[part].tolist(),
            strict=True,
        )
        yield [
            f"{table.videos[video]},{_stamp(second)},{x1!r},{y1!r},{x2!r},{y2!r},{action},{end!r}\n"
            for video, second, (x1, y1, x2, y2), action, end in columns
        ]
    yield [f"{table.videos[int(video)]},{_stamp(second)}\n" for video, second in table.keyframes.tolist()]


def _stamp(second: float) -> str:
    """``0902``, as AVA writes it; fractions of a second as they are."""
    return f"{int(second):04d}" if second == int(second) else repr(second)


__all__ = [
    "NO_ACTION",
    "FramePaths",
    "holds_persons",
    "read_boxes",
    "read_detections",
    "read_excluded",
    "read_frame_list",
    "read_label_map",
    "read_truth",
    "write_rows",
]
