"""Rows of AVA's csv files → columns: quickly where they are as they should be, row by row where one has to be named.

A row is ``video,second,x1,y1,x2,y2,action`` and, mostly, an eighth column; one of two columns is a keyframe without a
box. Source: https://research.google.com/ava/download.html.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from distinit_plugin.detection.tables import NO_ACTION, BoxTable
from distinit_plugin.errors import shown
from distinit_plugin.video.formats import describe
from distinit_plugin.video.records import CorpusSource, RowProblems

BLOCK = 4 * 2**20
"""Characters that are read at once."""

MAX_LINE = 2**16
"""Characters; a longer line is no row."""

_QUICK_LINE = 256
_MAX_ID = 2**31 - 1
_MAX_SECOND = 10**9
_FEWEST, _MOST = 7, 8
_NOBODY = -1


@dataclass(frozen=True)
class Form:
    """What the rows of one kind of file must be.

    Attributes:
        what: The kind, for messages.
        last: Meaning of the eighth column.
        needs_action: Whether the seventh column must hold one (else it may be empty or -1).
        ordered: Whether x2 < x1 or y2 < y1 is refused.
        allowed: One sentence for the person who has to put the file right.
    """

    what: str
    last: Literal["person", "score"]
    needs_action: bool
    ordered: bool
    allowed: str


class _Block(NamedTuple):
    """Columns of some rows; ``last`` is NaN where a row has seven columns."""

    video: npt.NDArray[np.int32]
    seconds: npt.NDArray[np.float64]
    boxes: npt.NDArray[np.float64]
    actions: npt.NDArray[np.int64]
    last: npt.NDArray[np.float64]


def read_rows(path: str, form: Form) -> BoxTable:
    """All rows of a file, in its order.

    Args:
        path: The csv file.
        form: What its rows must be.

    Raises:
        UserError: It cannot be read, or rows of it are wrong; all of them are counted and the first few named.
    """
    source = CorpusSource(where=form.what, path=path)
    problems = RowProblems(source, path, form.allowed)
    numbers: dict[str, int] = {}
    keyframes: dict[tuple[int, float], None] = {}
    blocks: list[_Block] = []
    first = 1
    try:
        with open(path, encoding="utf-8-sig", errors="surrogateescape") as file:
            while text := file.read(BLOCK):
                text += file.readline(MAX_LINE)
                if "\0" in text:
                    raise source.error(f"{path} is not a text file (it holds a zero byte).")
                lines = text.split("\n")
                block = None if '"' in text else _quick(lines, form, numbers)
                if block is None:
                    block = _slow(lines, form, numbers, keyframes, _adder(problems, first))
                blocks.append(block)
                first += len(lines) - 1
    except OSError as error:
        raise source.error(f"{path} cannot be read: {describe(error)}.") from error
    problems.raise_if_any()
    return _joined(blocks, numbers, keyframes, form)


def _adder(problems: RowProblems, first: int) -> Callable[[int, str], None]:
    return lambda offset, problem: problems.add(first + offset, problem)


def _quick(lines: list[str], form: Form, numbers: dict[str, int]) -> _Block | None:
    """Rows that all have the same columns and are all good; ``None``: look at them one by one."""
    columns = lines[0].count(",") + 1
    if columns not in (_FEWEST, _MOST) or max(map(len, lines)) > _QUICK_LINE:
        return None
    width = max(1, *(line.find(",") for line in lines))
    fields = [("video", f"S{width}"), ("numbers", "f8", (5,)), ("action", "i8"), ("last", "f8")]
    if columns == _FEWEST:
        fields.pop()
    try:
        rows = np.loadtxt(lines, delimiter=",", dtype=np.dtype(fields), comments=None, ndmin=1)
    except (ValueError, OverflowError, UnicodeError):
        return None
    listed = rows["video"].tolist()
    names = _Names(numbers)
    if not all(map(bytes.strip, set(listed))):
        return None
    video = np.fromiter(map(names.__getitem__, listed), np.int32, len(rows))
    last = rows["last"].copy() if columns == _MOST else np.full(len(rows), np.nan)
    values = rows["numbers"]
    block = _Block(video, values[:, 0].copy(), values[:, 1:].copy(), rows["action"].copy(), last)
    return block if _is_good(block, form, columns) else None


class _Names(dict[bytes, int]):
    """Names as they stand in a column of bytes → places in the table's ``videos``."""

    def __init__(self, numbers: dict[str, int]) -> None:
        super().__init__()
        self._numbers = numbers

    def __missing__(self, name: bytes) -> int:
        place = self[name] = self._numbers.setdefault(name.decode("latin-1").strip(), len(self._numbers))
        return place


def _is_good(block: _Block, form: Form, columns: int) -> bool:
    """Whether nothing in the block has to be named."""
    seconds, boxes, actions, last = block.seconds, block.boxes, block.actions, block.last
    good = bool(np.isfinite(seconds).all() and (seconds >= 0).all() and np.isfinite(boxes).all())
    good = good and bool((seconds <= _MAX_SECOND).all())
    good = good and bool(
        (actions <= _MAX_ID).all() and ((actions >= 1) | ((actions == NO_ACTION) & (not form.needs_action))).all()
    )
    if columns == _MOST:
        good = good and bool(np.isfinite(last).all())
        if form.last == "person":
            good = good and bool((np.abs(last) <= _MAX_ID).all() and (last == np.floor(last)).all())
    if form.ordered:
        good = good and bool((boxes[:, 2:] >= boxes[:, :2]).all())
    return good


def _slow(
    lines: list[str],
    form: Form,
    numbers: dict[str, int],
    keyframes: dict[tuple[int, float], None],
    add: Callable[[int, str], None],
) -> _Block:
    """The same row by row: ``add`` is told (place in ``lines``, what is wrong) of every bad one."""
    rows: list[tuple[int, float, list[float], int, float]] = []
    for offset, line in enumerate(lines):
        if not line.strip():
            continue
        try:
            cells = next(csv.reader([line], strict=True))
            if len(cells) == 2:
                second = _second(cells[1])
                keyframes[_video(cells[0], numbers), second] = None
            else:
                rows.append(_row(cells, form, numbers))
        except (ValueError, csv.Error) as error:
            add(offset, str(error))
    return _Block(
        np.array([row[0] for row in rows], np.int32),
        np.array([row[1] for row in rows], np.float64),
        np.array([row[2] for row in rows], np.float64).reshape(-1, 4),
        np.array([row[3] for row in rows], np.int64),
        np.array([row[4] for row in rows], np.float64),
    )


def _row(cells: list[str], form: Form, numbers: dict[str, int]) -> tuple[int, float, list[float], int, float]:
    """The columns of a row of seven or eight; ValueError says what is wrong."""
    if len(cells) not in (_FEWEST, _MOST):
        raise ValueError(f"{len(cells)} columns")
    second = _second(cells[1])
    box = [_number(cell, f"column {column}") for column, cell in enumerate(cells[2:6], start=3)]
    if form.ordered and (box[2] < box[0] or box[3] < box[1]):
        raise ValueError(f"the box {', '.join(cells[2:6])} has x2 < x1 or y2 < y1")
    action = NO_ACTION if not cells[6].strip() else _whole(cells[6], "the action in column 7")
    if action < 1 and (form.needs_action or action != NO_ACTION):
        raise ValueError(f"the action in column 7 is {shown(cells[6])}; they count from 1")
    last = math.nan
    if len(cells) == _MOST:
        if form.last == "score":
            last = _number(cells[7], "the score in column 8")
        else:
            last = _whole(cells[7], "the person's number in column 8")
    return _video(cells[0], numbers), second, box, action, last


def _video(text: str, numbers: dict[str, int]) -> int:
    if not text.strip():
        raise ValueError("column 1 names no video")
    return numbers.setdefault(text.strip(), len(numbers))


def _second(text: str) -> float:
    second = _number(text, "the second in column 2")
    if not 0 <= second <= _MAX_SECOND:
        raise ValueError(f"the second in column 2 is {shown(text)}")
    return second


def _number(text: str, what: str) -> float:
    try:
        value = float(text) if "_" not in text else math.nan
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(f"{what} is {shown(text)}, no number")
    return value


def _whole(text: str, what: str) -> int:
    digits = text.strip()
    if len(digits) > 11 or not digits.lstrip("+-").isdecimal() or abs(int(digits)) > _MAX_ID:
        raise ValueError(f"{what} is {shown(text)}, no whole number")
    return int(digits)


def _joined(
    blocks: list[_Block], numbers: dict[str, int], keyframes: dict[tuple[int, float], None], form: Form
) -> BoxTable:
    """One table of all blocks."""
    blocks = blocks or [_slow([], form, numbers, keyframes, lambda offset, problem: None)]
    last = np.concatenate([block.last for block in blocks])
    absent = np.isnan(last)
    persons = None
    if form.last == "person" and not absent.all():
        persons = np.where(absent, _NOBODY, last).astype(np.int64)
    return BoxTable(
        videos=tuple(numbers),
        video=np.concatenate([block.video for block in blocks]),
        seconds=np.concatenate([block.seconds for block in blocks]),
        boxes=np.concatenate([block.boxes for block in blocks]),
        actions=np.concatenate([block.actions for block in blocks]).astype(np.int32),
        scores=np.where(absent, 1.0, last) if form.last == "score" else np.ones(len(last)),
        keyframes=np.array(list(keyframes), np.float64).reshape(-1, 2),
        persons=persons,
    )
