"""A report as one HTML file that needs nothing else: styles, the small script and pictures are in it.

Every text goes through ``_text`` or ``_attribute``, so that nothing of it is markup. The page's own policy forbids any
request, and any script but its own.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import html
import re
from importlib import resources

from distinit_plugin.analysis.page import (
    Block,
    Cell,
    Code,
    Column,
    Fold,
    Heading,
    Page,
    Picture,
    Section,
    Table,
    Text,
    Tiles,
    plain,
)

_JOINTS = re.compile(r"([_/](?=[^_/])|(?<=[A-Z])\.(?=[A-Z]))")
_LONG = re.compile(r"[^\s_/]{29}")
"""A word that is broken anywhere, so that it widens no column."""

_TALL = 24
"""Rows from which on a table scrolls in its box."""
_WIDE = 22
"""Letters from which on a head or a cell has several lines, of which none is too short."""


def html_page(page: Page) -> str:
    """The file."""
    script = f"\n{_asset('page.js')}"
    links = "".join(f'<li><a href="#{section.anchor}">{_text(section.title)}</a></li>' for section in page.shown)
    return (
        "<!DOCTYPE html>\n"
        '<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_policy(script)}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="referrer" content="no-referrer">\n'
        '<link rel="icon" href="data:,">\n'
        f"<title>{_text(page.title)}</title>\n"
        f"<style>\n{_asset('page.css')}</style>\n<script>{script}</script>\n</head>\n<body>\n"
        '<a class="skip" href="#content">To the content</a>\n'
        f'<header>\n<div>\n<h1>{_text(page.title)}</h1>\n<p class="soft">{_text(page.subtitle)}</p>\n</div>\n'
        '<button type="button" class="theme" hidden>Dark colours</button>\n</header>\n'
        f'<nav aria-label="Sections">\n<ul>{links}</ul>\n</nav>\n'
        f'<main id="content" tabindex="-1">\n{"".join(map(_section, page.shown))}</main>\n'
        f"<footer>\n<p>{_text(page.footer)}</p>\n</footer>\n"
        '<div id="told" class="unseen" role="status"></div>\n'
        "</body>\n</html>\n"
    )


def _policy(script: str) -> str:
    """No request, and no script but this one."""
    digest = base64.b64encode(hashlib.sha256(script.encode("utf-8")).digest()).decode("ascii")
    return f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"


@functools.cache
def _asset(name: str) -> str:
    return resources.files(__package__).joinpath("assets").joinpath(name).read_text("utf-8")


def _text(text: str) -> str:
    return html.escape(plain(text), quote=True)


_attribute = _text
"""The same characters are all that a quoted attribute needs."""


def _words(text: str) -> str:
    """Text whose names may be broken at their joints."""
    return _JOINTS.sub(r"\1<wbr>", _text(text))


def _section(section: Section) -> str:
    heading = f"{section.anchor}-title"
    return (
        f'<section id="{section.anchor}" aria-labelledby="{heading}">\n'
        f'<h2 id="{heading}">{_text(section.title)}</h2>\n{"".join(map(_block, section.blocks))}</section>\n'
    )


def _block(block: Block) -> str:
    match block:
        case Text():
            return f"<p{_class(block.tone)}>{_text(block.text)}</p>\n"
        case Heading():
            return f"<h3>{_text(block.text)}</h3>\n"
        case Code():
            return f'<pre tabindex="0">{_text(block.text)}</pre>\n'
        case Table():
            return _table(block)
        case Picture():
            return _picture(block)
        case Tiles():
            return _tiles(block)
        case Fold():
            inside = "".join(map(_block, block.blocks))
            return f"<details>\n<summary>{_text(block.title)}</summary>\n{inside}</details>\n"


def _class(*names: str) -> str:
    found = " ".join(filter(None, names))
    return f' class="{found}"' if found else ""


def _table(table: Table) -> str:
    heads = "".join(map(_head, table.columns))
    rows = "".join(
        f"<tr>{''.join(_cell(cell, column, not place) for place, (cell, column) in enumerate(pairs))}</tr>\n"
        for pairs in (zip(row, table.columns, strict=True) for row in table.rows)
    )
    title = _text(table.title)
    return (
        f'<div{_class("scroll", "tall" if len(table.rows) > _TALL else "")} role="region" tabindex="0" '
        f'aria-label="{_attribute(table.title)}">\n<table>\n'
        f"<caption><span>{title}</span></caption>\n<thead><tr>{heads}</tr></thead>\n<tbody>\n{rows}</tbody>\n"
        "</table>\n</div>\n"
    )


def _head(column: Column) -> str:
    classes = _class("n" if column.numeric else "", "wrap" if len(column.name) > _WIDE else "")
    return f'<th scope="col"{classes}>{_words(column.name)}</th>'


def _long(text: str) -> str:
    return "long" if _LONG.search(text) else "text" if len(text) > _WIDE else ""


def _cell(cell: Cell, column: Column, is_first: bool) -> str:
    classes = _class(
        "n" if column.numeric else "", cell.tone, "bar" if cell.share is not None else "", _long(cell.text)
    )
    value = f' data-value="{cell.value!r}"' if cell.value is not None else ""
    share = f' style="--share:{min(max(cell.share, 0.0), 1.0):.4f}"' if cell.share is not None else ""
    if is_first:
        return f'<th scope="row"{classes}{value}>{_words(cell.text)}</th>'
    return f"<td{classes}{value}{share}>{_words(cell.text)}</td>"


def _picture(picture: Picture) -> str:
    data = base64.b64encode(picture.png).decode("ascii")
    return (
        f'<figure>\n<div class="scroll" role="region" tabindex="0" aria-label="{_attribute(picture.caption)}">'
        f'<img style="--width:{picture.width}px" width="{picture.width}" height="{picture.height}" '
        f'alt="{_attribute(picture.alt)}" src="data:image/png;base64,{data}"></div>\n'
        f"<figcaption>{_text(picture.caption)}</figcaption>\n</figure>\n"
    )


def _tiles(tiles: Tiles) -> str:
    parts = [
        f'<div><dt>{_text(tile.label)}</dt><dd class="value">{_text(tile.value)}</dd>'
        + (f'<dd class="note">{_text(tile.note)}</dd>' if tile.note else "")
        + "</div>\n"
        for tile in tiles.tiles
    ]
    return f'<dl class="tiles">\n{"".join(parts)}</dl>\n'
