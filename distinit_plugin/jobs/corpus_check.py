"""``distinit check-corpus``: from flags to a report."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from distinit_plugin.config.paths import unwritable
from distinit_plugin.errors import UserError
from distinit_plugin.video.check import CorpusReport, check_corpus
from distinit_plugin.video.corpus import Corpus, load_corpus

VIDEO_LISTS = {".csv": "csv", ".txt": "list", ".lst": "list"}


def guess_format(path: str) -> str:
    """The format of a corpus that the user only named: a folder of videos, a list, a csv, split files."""
    place = Path(path).expanduser()
    if not place.is_dir():
        return VIDEO_LISTS.get(place.suffix.lower(), "list")
    if (place / "classInd.txt").is_file():
        return "ucf101"
    return "hmdb51" if any(place.glob("*_test_split1.txt")) else "folder"


def read_corpus(path: str, *, fmt: str = "", root: str = "", subset: str = "", split: int = 1) -> Corpus:
    """A corpus as a command line names it.

    Args:
        path: Folder of videos, list, csv, or folder of split files.
        fmt: Its format; empty: ``guess_format``.
        root: Where the videos of a list are.
        subset: ``train`` or ``test`` of UCF-101 and HMDB-51; empty: ``train``.
        split: Their split.

    Raises:
        UserError: It cannot be read.
    """
    fmt = fmt or guess_format(path)
    if fmt in ("ucf101", "hmdb51"):
        subset = subset or "train"
    return load_corpus(fmt, "corpus", path=path, root=root, subset=subset, split=split)


def check(
    path: str,
    *,
    fmt: str = "",
    root: str = "",
    subset: str = "",
    split: int = 1,
    min_frames: int = 8,
    num_workers: int = 1,
    timeout: float = 300.0,
    output: Path | None = None,
) -> CorpusReport:
    """Decode a corpus and print what was found.

    Args:
        path: Folder of videos, list, csv, or folder of split files.
        fmt: Its format; empty: ``guess_format``.
        root: Where the videos of a list are.
        subset: ``train`` or ``test`` of UCF-101 and HMDB-51.
        split: Their split.
        min_frames: Videos with fewer frames are called short.
        num_workers: Decoding processes.
        timeout: Seconds for one file.
        output: A csv with every finding.

    Raises:
        UserError: The corpus cannot be read, or ``output`` not be written.
    """
    if output is not None:  # found out before hours of decoding
        for problem in unwritable("--output", str(output.parent), "--output FOLDER/FILE.csv"):
            raise UserError(problem)
    corpus = read_corpus(path, fmt=fmt, root=root, subset=subset, split=split)
    columns = (TextColumn("decoding"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("decoding", total=len(corpus))
        report = check_corpus(
            [corpus],
            min_frames=min_frames,
            num_workers=num_workers,
            timeout=timeout,
            on_progress=lambda done, total: progress.update(task, completed=done, total=total),
        )
    print(report.to_text())
    if output is not None:
        report.write_csv(output)
        print(f"wrote {output}")
    return report
