"""One page about finished, failed or unfinished runs: the job of ``distinit report``."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import BinaryIO
from urllib.parse import quote

from rich.console import Console

from distinit_plugin.analysis.page import Page, Section
from distinit_plugin.analysis.page_html import html_page
from distinit_plugin.analysis.page_markdown import markdown_page, pictures_of
from distinit_plugin.analysis.report_results import published_section, results_section, study_section
from distinit_plugin.analysis.report_runs import bad_section, class_blocks, runs_section, timings_section
from distinit_plugin.analysis.run_facts import MEASURES, RunFacts, is_run, read_facts
from distinit_plugin.analysis.study_table import Study, read_study, study_rows
from distinit_plugin.engine import checkpoint
from distinit_plugin.errors import UserError
from distinit_plugin.files import write_file, write_text
from distinit_plugin.jobs.report_figures import (
    class_pictures,
    curve_blocks,
    filter_blocks,
    given_blocks,
    representatives,
)
from distinit_plugin.jobs.report_settings import changes_in, read_settings
from distinit_plugin.jobs.session import BAD_VIDEOS_FILE
from distinit_plugin.jobs.testing import RESULTS_FOLDER
from distinit_plugin.version import __version__

REPORT_FILE = "report.html"


def report(
    runs: Sequence[Path],
    output: Path,
    *,
    study: Study | Path | None = None,
    title: str = "",
    pictures: Mapping[str, Path] | None = None,
    markdown: bool = False,
    console: Console | None = None,
) -> Path:
    """Write a page about runs.

    Args:
        runs: Output folders, or folders of such folders.
        output: The HTML file.
        study: How runs belong together, or the file that says so; its runs are of the report, too.
        title: Of the page; empty: made of what it holds.
        pictures: Further ones, caption → PNG.
        markdown: Also write the page as Markdown, its pictures in a folder beside it.
        console: Where to print; the standard output when ``None``.

    Returns:
        ``output``.

    Raises:
        UserError: A folder holds no run, the study or a picture cannot be read, or the file cannot be written.
    """
    if output.suffix.lower() not in (".html", ".htm"):
        raise UserError(f"--output {output}: a report is an HTML file. Name FILE.html.")
    found = read_study(study, list(MEASURES)) if isinstance(study, Path) else study
    facts = [read_run(name, folder) for folder, name in _named(runs, found).items()]
    page = build_page(facts, found, title, pictures or {})
    write_text(output, html_page(page))
    console = console or Console()
    console.print(f"wrote {output}", highlight=False, soft_wrap=True, markup=False)
    if markdown:
        folder = output.with_name(f"{output.stem}_files")
        for picture in pictures_of(page):
            write_file(folder / f"{picture.name}.png", partial(_put, picture.png))
        path = output.with_suffix(".md")
        write_text(path, markdown_page(page, quote(folder.name)))
        console.print(f"wrote {path}", highlight=False, soft_wrap=True, markup=False)
    return output


def _put(contents: bytes, file: BinaryIO) -> None:
    file.write(contents)


def build_page(facts: Sequence[RunFacts], study: Study | None, title: str, pictures: Mapping[str, Path]) -> Page:
    """All sections, pictures included."""
    given = given_blocks(pictures)  # first: what is wrong with them is said at once
    changes = {own.name: changes_in(own) for own in facts}
    sections = [results_section(facts)]
    if study is not None:
        results = {own.folder: own.metrics[study.metric] for own in facts if study.metric in own.metrics}
        sections.append(study_section(study, study_rows(study, results)))
    drawn = representatives(facts, study)
    classes = class_blocks(facts if study is None else drawn)
    classes += class_pictures(drawn, study.base_folders if study is not None else ())
    sections += [
        published_section(facts, changes),
        Section("curves", "Curves", curve_blocks(facts)),
        Section("classes", "Classes", classes),
        Section("filters", "First filters", filter_blocks(drawn)),
        Section("pictures", "Pictures", given),
        timings_section(facts),
        bad_section(facts),
        runs_section(facts),
    ]
    made = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    many = f"{len(facts)} run{'s'[: len(facts) > 1]}"
    own = title or (study.name if study is not None else facts[0].name if len(facts) == 1 else "")
    return Page(
        title=own or f"Report of {many}",
        subtitle=f"{many}, report of {made}" if own else made,
        sections=sections,
        footer=f"distinit-plugin {__version__}. Accuracies are in percent; click a column's head to sort by it.",
    )


def read_run(name: str, folder: Path) -> RunFacts:
    """All that a folder says of its run; what is damaged is a sentence."""
    if not _is_run(folder):
        return RunFacts(name, folder, is_there=False)
    facts = read_facts(name, folder, folder / RESULTS_FOLDER, folder / BAD_VIDEOS_FILE)
    read_settings(facts)
    return facts


# ----------------------------------------------------------------------------------------------------- which runs
def _named(folders: Sequence[Path], study: Study | None) -> dict[Path, str]:
    """Folder → name of each run, those of a study first.

    Raises:
        UserError: There is none, or a folder holds none.
    """
    names: dict[Path, str] = {}
    if study is not None:
        for row, own in study.rows.items():
            for seed, folder in own.items():
                names.setdefault(folder, study.run_name(row, seed))
        for name, folder in study.steps.items():
            names.setdefault(folder, name)
    places = {folder.resolve() for folder in names}
    given = {run.resolve(): run for folder in folders for run in runs_in(folder)}
    others = [run for place, run in given.items() if place not in places]
    names |= dict(zip(others, _short_names(others), strict=True))
    if not names:
        raise UserError("There is nothing to report: name the OUTPUT_DIR of one or more runs, or a --study.")
    return names


def runs_in(folder: Path) -> list[Path]:
    """The folder of a run itself, or those in a folder of runs.

    Raises:
        UserError: It is neither.
    """
    if _is_run(folder):
        return [folder]
    try:
        found = sorted(entry for entry in folder.iterdir() if entry.is_dir() and _is_run(entry))
    except OSError as error:
        raise UserError(f"{folder}: {(error.strerror or str(error)).lower()}. Name the OUTPUT_DIR of a run.") from error
    if not found:
        raise UserError(
            f"{folder} holds no run: there is no run.json, log, checkpoint or test in it, nor in a folder in it. "
            "Name the OUTPUT_DIR of a run, or a folder of such folders."
        )
    return found


def _is_run(folder: Path) -> bool:
    return is_run(folder, RESULTS_FOLDER, checkpoint.FOLDER)


def _short_names(folders: Sequence[Path]) -> list[str]:
    """Names of folders; where two have the same, what tells them apart."""
    names = [folder.resolve().name for folder in folders]
    if len(set(names)) == len(names):
        return names
    common = os.path.commonpath([folder.resolve() for folder in folders])
    return [os.path.relpath(folder.resolve(), common) for folder in folders]
