"""A report as Markdown, with its pictures as files. Every text is escaped, so that nothing of it is markup."""

from __future__ import annotations

import re
from collections.abc import Iterator

from distinit_plugin.analysis.page import Block, Code, Fold, Heading, Page, Picture, Table, Text, Tiles, plain

_ENTITIES = {"&": "&amp;", "<": "&lt;", ">": "&gt;"}


def markdown_page(page: Page, folder: str) -> str:
    """The file.

    Args:
        page: What it holds.
        folder: Of the pictures, as seen from it, as an address has it.
    """
    parts = [f"# {_text(page.title)}", _text(page.subtitle)]
    for section in page.shown:
        parts += [f"## {_text(section.title)}", *_blocks(section.blocks, folder)]
    parts += ["---", _text(page.footer)]
    return "\n\n".join(parts) + "\n"


def pictures_of(page: Page) -> Iterator[Picture]:
    """All pictures, which have names of their own."""
    for section in page.shown:
        for block in section.blocks:
            if isinstance(block, Picture):
                yield block


def _text(text: str) -> str:
    """One line in which Markdown sees text alone; what no reader takes for markup stays readable."""
    line = " ".join(plain(text).split())
    line = "".join(_ENTITIES.get(character, character) for character in line)
    return re.sub(r"([\\`*_\[\]|~$#!])", r"\\\1", line)


def _blocks(blocks: tuple[Block, ...] | list[Block], folder: str) -> list[str]:
    return [part for block in blocks for part in _block(block, folder)]


def _block(block: Block, folder: str) -> list[str]:
    match block:
        case Text():
            return [_starting(_text(block.text))]
        case Heading():
            return [f"### {_text(block.text)}"]
        case Code():
            fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", block.text)), default=0))
            return [f"{fence}\n{plain(block.text).rstrip()}\n{fence}"]
        case Table():
            return [f"**{_text(block.title)}**", _table(block)]
        case Picture():
            return [f"![{_text(block.alt)}]({folder}/{block.name}.png)", f"*{_text(block.caption)}*"]
        case Tiles():
            lines = [
                f"* {_text(tile.label)}: **{_text(tile.value)}**{f' ({_text(tile.note)})' if tile.note else ''}"
                for tile in block.tiles
            ]
            return ["\n".join(lines)]
        case Fold():
            inside = _blocks(list(block.blocks), folder)
            return [f"<details><summary>{_summary(block.title)}</summary>", *inside, "</details>"]


def _starting(line: str) -> str:
    """A line whose first characters would begin a list, a heading or a rule."""
    return re.sub(r"^([-+=]|\d+[.)])", lambda found: found[0][:-1] + "\\" + found[0][-1], line)


def _summary(title: str) -> str:
    """Inside of HTML, where Markdown's own marks are text."""
    return "".join(_ENTITIES.get(character, character) for character in " ".join(plain(title).split()))


def _table(table: Table) -> str:
    lines = [
        [_text(column.name) for column in table.columns],
        ["---:" if column.numeric else "---" for column in table.columns],
        *([_text(cell.text) for cell in row] for row in table.rows),
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
