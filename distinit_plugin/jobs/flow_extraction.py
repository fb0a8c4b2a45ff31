"""The flow of a corpus into a store, by worker processes; what was interrupted goes on where it was."""

from __future__ import annotations

import contextlib
import csv
import logging
import multiprocessing
import os
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from distinit_plugin.engine.meters import duration_text
from distinit_plugin.engine.progress import RunLog, open_progress
from distinit_plugin.errors import UserError
from distinit_plugin.files import write_csv, writing_alone
from distinit_plugin.flow.backends import build_flow_backend
from distinit_plugin.flow.entries import SUFFIX
from distinit_plugin.flow.store import FlowSettings, FlowStore
from distinit_plugin.flow.writing import Outcome, VideoJob
from distinit_plugin.types import BadVideo
from distinit_plugin.video.corpus import Corpus
from distinit_plugin.video.isolated import Crash, run_isolated

logger = logging.getLogger(__name__)

TABLE_FILE = "videos.csv"
"""Below the store: which file is of which video, of all calls."""
BAD_FILE = "bad_videos.csv"
_COLUMNS = ["video", "flow", "frames", "bytes", "clipped"]


@dataclass
class FlowExtraction:
    """What became of the videos.

    Attributes:
        done: Outcomes of this call's work, and of what was there.
        bad: Videos without flow.
        seconds: That the call took.
        jpeg_quality: Of the pictures whose size is estimated.
    """

    done: list[Outcome] = field(default_factory=list)
    bad: list[BadVideo] = field(default_factory=list)
    seconds: float = 0.0
    jpeg_quality: int = 95

    def to_text(self) -> str:
        """What a person wants to know at the end."""
        new = [outcome for outcome in self.done if not outcome.reused]
        frames = sum(outcome.frames for outcome in new)
        lines = [
            f"{len(new)} videos done, {len(self.done) - len(new)} were there, {len(self.bad)} bad"
            + (
                f"; {frames} frames in {duration_text(self.seconds)}: {frames / self.seconds:.1f} frames/s"
                if new
                else ""
            )
        ]
        total, num_bytes = sum(outcome.frames for outcome in self.done), sum(outcome.num_bytes for outcome in self.done)
        if total:
            text = f"{num_bytes / 1e6:.4g} MB, {num_bytes / total:.0f} bytes per frame"
            sampled = sum(outcome.sampled for outcome in new)
            if sampled:
                jpeg = sum(outcome.jpeg_bytes for outcome in new) / sampled
                text += (
                    f"; folders of JPEG (quality {self.jpeg_quality}) would take about {jpeg:.0f} bytes per frame "
                    f"({sampled} flows sampled)"
                )
            lines.append(text)
        values = sum(outcome.values for outcome in self.done)
        if values:
            share = sum(outcome.clipped for outcome in self.done) / values
            lines.append(f"{100 * share:.3g} % of the values are beyond the bound and were clipped")
        return "\n".join(lines)


def extract_flow(
    corpus: Corpus,
    output: Path,
    settings: FlowSettings,
    *,
    backend: str,
    options: Mapping[str, Any] | None = None,
    device: str = "cpu",
    num_workers: int = 1,
    batch_size: int = 8,
    timeout: float = 300.0,
    verify: bool = False,
    console: Console | None = None,
) -> FlowExtraction:
    """Compute and keep the flow of every video that has none, an old one or a damaged one.

    Args:
        corpus: The videos.
        output: Folder of the store.
        settings: How flow is made and kept.
        backend: Name of the back end, which has the identity that ``settings`` names.
        options: The back end's arguments.
        device: Where it computes.
        num_workers: Processes.
        batch_size: Pairs that the back end gets at once.
        timeout: Seconds that a video may take to be indexed, or to give its next frame.
        verify: Decode all of what is there; otherwise only the last flow of each video.
        console: For the progress; the standard error when ``None``.

    Returns:
        What became of each video.

    Raises:
        UserError: The store is of other settings or another corpus, in use, or cannot be written (the disk is full).
    """
    paths = list(dict.fromkeys(os.path.abspath(record.path) for record in corpus))
    root = common_root(corpus, paths)
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{output} cannot be made: {error.strerror}. Name a folder that can be written.") from error
    with writing_alone(output, "flow"):
        store = FlowStore.settle(output, settings, root)
        _check_places(store, paths)
        if settings.layout == "store":  # half a folder of pictures is written over, and there may be millions of files
            _remove_leftovers(output)
        counter: Any = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn").Value("q", 0)
        job = VideoJob(store, backend, options or {}, device, batch_size, timeout, verify, counter)
        result = FlowExtraction(jpeg_quality=settings.quality)
        log = RunLog(None, console=console or Console(stderr=True))
        try:
            _run(job, paths, num_workers, log.console, result)
        finally:
            log.close()
        _write_tables(output, result)
    return result


def _run(job: VideoJob, paths: list[str], num_workers: int, console: Console, result: FlowExtraction) -> None:
    begin, finished, made = time.monotonic(), 0, 0
    progress = open_progress(console, enabled=True, main=True)
    with progress.work("flow", len(paths)) as advance:

        def show() -> None:
            seconds = time.monotonic() - begin
            status = f"{job.counter.value / max(seconds, 1e-9):.1f} frames/s"
            if made:
                status += f"  {duration_text(seconds / made * (len(paths) - finished))} left"
            advance(finished, status)

        jobs = run_isolated(
            job, paths, num_workers=min(num_workers, len(paths)), max_seconds=float("inf"), on_wait=show
        )
        with contextlib.closing(jobs):
            for path, outcome in jobs:
                finished += 1
                if isinstance(outcome, Crash):
                    outcome = Outcome(path, bad=outcome.reason)
                if outcome.fatal:
                    raise UserError(
                        f"{outcome.fatal} {finished - 1} of {len(paths)} videos are done; start again to go on."
                    )
                made += not outcome.reused
                if outcome.bad:
                    result.bad.append(BadVideo(path, outcome.bad))
                    logger.warning("bad video %s: %s", path, outcome.bad)
                else:
                    result.done.append(outcome)
                show()
    result.seconds = time.monotonic() - begin


def make_settings(backend: str, options: Mapping[str, Any], **values: Any) -> FlowSettings:
    """Settings with the identity of a back end.

    Raises:
        UserError: There is no such back end, or a value is not possible.
    """
    identity = build_flow_backend(backend, "--backend", **options).identity
    try:
        return FlowSettings(backend=identity, **values)
    except ValueError as error:
        raise UserError(f"{error}.") from error


def common_root(corpus: Corpus, paths: list[str]) -> str:
    """The corpus's own folder, or where videos are outside of it the folder that all are in."""
    root = os.path.abspath(corpus.root)
    if all(path.startswith(os.path.join(root, "")) for path in paths):
        return root
    return os.path.commonpath([os.path.dirname(path) for path in paths])


def _check_places(store: FlowStore, paths: list[str]) -> None:
    """Two videos must not share a place, nor lie in each other's."""
    known: dict[Path, str] = {}
    for path in paths:
        other = known.setdefault(store.place_of(path), path)
        if other != path:
            raise UserError(
                f"the flow of {path} and of {other} would have the same name. Use --format store, which keeps "
                "their endings."
            )
    for place, path in known.items():
        for parent in place.parents:
            if parent in known:
                raise UserError(f"the flow of {path} would lie inside that of {known[parent]}. Use --format store.")


def _remove_leftovers(output: Path) -> None:
    """What a killed call was about to write."""
    for folder, _, names in os.walk(output):
        for name in names:
            if name.endswith(f"{SUFFIX}.tmp") or (name.startswith(".flow-") and name.endswith(".tmp")):
                with contextlib.suppress(OSError):
                    os.unlink(os.path.join(folder, name))


def _write_tables(output: Path, result: FlowExtraction) -> None:
    done = sorted(result.done, key=lambda outcome: outcome.path)
    rows = [
        [
            one.path,
            os.path.relpath(one.place, output),
            one.frames,
            one.num_bytes,
            f"{one.clipped / max(one.values, 1):.3g}",
        ]
        for one in done
    ]
    table = {row[0]: row for row in _earlier_rows(output)} | {row[0]: row for row in rows}
    for bad in result.bad:
        table.pop(bad.path, None)
    write_csv(output / TABLE_FILE, [_COLUMNS, *(row for _, row in sorted(table.items()))])
    if result.bad:
        write_csv(output / BAD_FILE, [["path", "reason"], *sorted([bad.path, bad.reason] for bad in result.bad)])
    else:
        (output / BAD_FILE).unlink(missing_ok=True)


def _earlier_rows(output: Path) -> list[list[Any]]:
    """What earlier calls did, as far as it is still there."""
    try:
        with (output / TABLE_FILE).open(encoding="utf-8", newline="") as file:
            rows = list(csv.reader(file))
    except (OSError, UnicodeDecodeError, csv.Error):
        return []
    if not rows or rows[0] != _COLUMNS:
        return []
    return [row for row in rows[1:] if len(row) == len(_COLUMNS) and (output / row[1]).exists()]
