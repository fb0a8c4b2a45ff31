"""All checks, each in a process that may crash, and the report of what they found."""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table
from rich.text import Text

from distinit_plugin.doctor.findings import Finding, Section, State, first_line, is_usable
from distinit_plugin.doctor.media import CODECS
from distinit_plugin.doctor.packages import PACKAGES
from distinit_plugin.video.isolated import Crash, run_isolated

MAX_SECONDS = 180.0
"""Of one check; PySlowFast's imports take longest."""

MARKS: dict[State, tuple[str, str]] = {
    "works": ("ok", "green"),
    "note": ("note", "yellow"),
    "absent": ("–", "dim"),
    "broken": ("BROKEN", "bold red"),
}


class Check(NamedTuple):
    """One thing to look at.

    Attributes:
        title: Of its section.
        name: What stands in the report when it crashes.
        place: ``module:function``, below this folder.
        arguments: Of the function.
    """

    title: str
    name: str
    place: str
    arguments: tuple[Any, ...] = ()


def all_checks(files: Sequence[str] = (), words: Sequence[str] = (), program: str = "") -> list[Check]:
    """Every check in its order; PySlowFast comes last, because it changes the process in which it starts.

    Args:
        files: YAML files of a configuration to look at; none: no configuration.
        words: ``KEY VALUE`` words over it.
        program: The verb that it is for; empty: that of its network.
    """
    given = (tuple(files), tuple(words))
    checks = [
        Check("Python", "python", "packages:look_at_python"),
        *(Check("Python", name, "packages:look_at_package", (name,)) for name in PACKAGES),
        Check("Machine", "processor", "machine:look_at_cpu"),
        Check("Machine", "GPU", "machine:look_at_gpus"),
        Check("Machine", "several processes", "machine:look_at_processes"),
        Check("Machine", "disks", "configuration:look_at_folders", given),
        *(Check("Videos", f"{name} videos", "media:look_at_codec", (name,)) for name in CODECS),
        Check("Videos", "frames", "media:look_at_images"),
        Check("PyTorchVideo", "pytorchvideo", "pytorchvideo:look_at_pytorchvideo"),
        Check("PySlowFast", "start", "pyslowfast:look_at_pyslowfast"),
    ]
    if files:
        title = f"Configuration {', '.join(files)}"
        checks.append(Check(title, "configuration", "configuration:look_at_configuration", (program, *given)))
    return checks


def run_checks(checks: Sequence[Check], on_check: Callable[[Check], None] = lambda check: None) -> Iterator[Section]:
    """Yield each section as soon as all of its checks are done.

    Args:
        checks: In the order of their sections.
        on_check: Called before each check.
    """
    section = Section(checks[0].title, [])
    on_check(checks[0])
    done = run_isolated(run_check, checks, num_workers=1, max_seconds=MAX_SECONDS, what="Python")
    for number, (check, result) in enumerate(done, start=1):
        if check.title != section.title:
            yield section
            section = Section(check.title, [])
        if isinstance(result, Crash):
            advice = "Install again what it belongs to, from binary wheels that fit each other."
            section.findings.append(Finding(check.name, "broken", result.reason, advice))
        else:
            section.findings.extend(result)
        if number < len(checks):
            on_check(checks[number])
    yield section


def run_check(check: Check) -> list[Finding]:
    """What a check found; an error that it did not expect is a finding, too."""
    if multiprocessing.parent_process() is not None:
        _silence()
    module, _, function = check.place.partition(":")
    try:
        look: Any = getattr(importlib.import_module(f"distinit_plugin.doctor.{module}"), function)
        return list(look(*check.arguments))
    except Exception as error:
        return [
            Finding(check.name, "broken", first_line(error), "See what is broken above, or report it with this text.")
        ]


def _silence() -> None:
    """What libraries print in this process goes nowhere."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    os.close(nowhere)


def print_report(checks: Sequence[Check], *, as_json: bool = False) -> bool:
    """Run checks and print what they found, section by section, or all of it as JSON.

    Returns:
        Whether nothing is broken.
    """
    console, sections = Console(), []
    for section in run_checks(checks, lambda check: _show_place(f"looking at {check.name}")):
        sections.append(section)
        _show_place("")
        if section.findings and not as_json:
            console.print(table_of(section))
    usable = is_usable(sections)
    if as_json:
        found = {section.title: [finding._asdict() for finding in section.findings] for section in sections}
        print(json.dumps({"usable": usable, "sections": found}, indent=1, ensure_ascii=False))
        return usable
    broken = {finding.name: "" for section in sections for finding in section.findings if finding.state == "broken"}
    console.print(Text(f"Broken: {', '.join(broken)}." if broken else "Everything that is installed here works."))
    return usable


def _show_place(text: str) -> None:
    """One line on a terminal that the next one replaces; no thread draws it, because processes are forked meanwhile."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)


def table_of(section: Section) -> Table:
    """A section as a table: name, mark, what was found and, below it, what to do."""
    table = Table(title=section.title, title_justify="left", show_header=False, box=None, padding=(0, 1))
    table.add_column(no_wrap=False, max_width=34)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for finding in section.findings:
        mark, style = MARKS[finding.state]
        text = Text(finding.text)  # no markup: pip's extras stand in brackets
        if finding.advice:
            text.append(f"\n→ {finding.advice}" if finding.text else f"→ {finding.advice}", style="dim")
        table.add_row(Text(finding.name), Text(mark, style=style), text)
    return table
