"""What a check found, in one form for all of them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, NamedTuple

State = Literal["works", "note", "absent", "broken"]
"""``note``: something to know. ``absent``: optional and not here. ``broken``: promised, and does not work."""


class Finding(NamedTuple):
    """One line of the report.

    Attributes:
        name: What was looked at.
        state: What came of it.
        text: A version, a number, the first line of an error.
        advice: One sentence: what to do; empty: nothing.
    """

    name: str
    state: State
    text: str = ""
    advice: str = ""


class Section(NamedTuple):
    """Findings under one title."""

    title: str
    findings: list[Finding]


def is_usable(sections: Iterable[Section]) -> bool:
    """Whether nothing is broken."""
    return not any(finding.state == "broken" for section in sections for finding in section.findings)


def first_line(error: BaseException) -> str:
    """Kind and first line of an error, cut to what a line of a report bears."""
    text = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}: {text[:200]}".rstrip(": ")
