"""What a report consists of, whatever it is written as. All texts are plain: writers escape them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

MISSING = "–"
"""Stands where a table has nothing to say."""

_CONTROLS = dict.fromkeys((*range(9), 11, 12, *range(14, 32), *range(127, 160)), "�")
# Marks that turn the direction of what follows could make a name look like another one.
_CONTROLS |= dict.fromkeys((*range(0x202A, 0x202F), *range(0x2066, 0x206A)), "\N{REPLACEMENT CHARACTER}")


def plain(text: str) -> str:
    """Text that any reader can show: names of files need not be valid UTF-8, and files may hold control characters."""
    return text.encode("utf-8", "replace").decode("utf-8").translate(_CONTROLS)


@dataclass(frozen=True)
class Cell:
    """One cell of a table.

    Attributes:
        text: Shown.
        value: It is sorted by this number; ``None``: by its text.
        share: Length of a bar behind it, 0 to 1; ``None``: no bar.
        tone: ``good``, ``bad``, ``warn``, or nothing.
    """

    text: str
    value: float | None = None
    share: float | None = None
    tone: str = ""


@dataclass(frozen=True)
class Column:
    """A column; numbers stand at the right, and their largest comes first when it is sorted."""

    name: str
    numeric: bool = False


@dataclass(frozen=True)
class Table:
    """A table whose first column names the rows.

    Attributes:
        title: Above it; no two tables of a page have the same.
        columns: Of each row.
        rows: Their cells.
    """

    title: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[Cell]]


@dataclass(frozen=True)
class Text:
    """A paragraph; its tone is as a cell's, or ``soft``."""

    text: str
    tone: str = ""


@dataclass(frozen=True)
class Heading:
    """Above a part of a section."""

    text: str


@dataclass(frozen=True)
class Code:
    """Text whose lines stay as they are."""

    text: str


@dataclass(frozen=True)
class Picture:
    """A PNG.

    Attributes:
        name: Of its file, without ending, where pictures are files.
        png: Its contents.
        width: Pixels.
        height: Pixels.
        alt: What it shows, for those who do not see it.
        caption: Below it.
    """

    name: str
    png: bytes
    width: int
    height: int
    alt: str
    caption: str


@dataclass(frozen=True)
class Tile:
    """A number that is worth to be seen first."""

    label: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Tiles:
    """Some of them, side by side."""

    tiles: Sequence[Tile]


@dataclass(frozen=True)
class Fold:
    """Blocks that are shown when somebody asks for them."""

    title: str
    blocks: Sequence[Block]


Block = Text | Heading | Code | Table | Picture | Tiles | Fold


@dataclass
class Section:
    """A part of the page with a heading of its own.

    Attributes:
        anchor: Its address within the page: lower-case letters.
        title: Its heading.
        blocks: What it holds.
    """

    anchor: str
    title: str
    blocks: list[Block] = field(default_factory=list)


@dataclass
class Page:
    """All of it.

    Attributes:
        title: Its name.
        subtitle: What it is of, in a line.
        sections: Its parts; those without blocks are left out.
        footer: Who made it.
    """

    title: str
    subtitle: str
    sections: list[Section]
    footer: str

    @property
    def shown(self) -> list[Section]:
        """Sections that hold something."""
        return [section for section in self.sections if section.blocks]
