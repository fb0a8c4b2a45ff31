"""What a person sees of a run: a progress bar on a terminal, plain lines anywhere else, and ``stdout.log``."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Protocol

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

from distinit_plugin.engine import distributed
from distinit_plugin.engine.meters import JSON_PREFIX, duration_text
from distinit_plugin.errors import UserError, note_log

LOG_FILE = "stdout.log"
PACKAGE = "distinit_plugin"
PLAIN_SECONDS = 30.0
"""Between two lines about a work that is neither a training step nor on a terminal."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Status:
    """What is known at a log step.

    Attributes:
        epoch: ``1/6``.
        loss: Mean loss since the last status.
        lr: Learning rate.
        clips_per_second: Of the whole job.
        wait_share: Fraction of the time spent waiting for data.
        seconds_left: To the end of the training.
        shares: Part of the work → fraction of the time spent on it, for parts that are worth a number of their own.
    """

    epoch: str
    loss: float
    lr: float
    clips_per_second: float
    wait_share: float
    seconds_left: float
    shares: Mapping[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        shares = "".join(f"  {part} {100 * share:.0f} %" for part, share in self.shares.items())
        return (
            f"epoch {self.epoch}  loss {self.loss:.4f}  lr {self.lr:.3g}  {self.clips_per_second:.1f} clips/s  "
            f"data wait {100 * self.wait_share:.0f} %{shares}  {duration_text(self.seconds_left)} left"
        )


class Advance(Protocol):
    """Called with how much of a work is done so far, and with what else there is to say of it. Cheap."""

    def __call__(self, done: int, status: str = "") -> None:
        """``done`` parts are done."""
        ...


class ProgressView(Protocol):
    """Shows how far the training is, used as a context manager, and within it or alone how far other long works are."""

    def __enter__(self) -> ProgressView:
        """Start showing."""
        ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop showing."""
        ...

    def advance(self, step: int, total: int) -> None:
        """``step`` of ``total`` optimizer steps are done. Cheap: called every step."""
        ...

    def show(self, step: int, total: int, status: Status) -> None:
        """New figures, once per log period."""
        ...

    def work(self, name: str, total: int) -> AbstractContextManager[Advance]:
        """Show another work of ``total`` parts (a validation, a test) while it lasts."""
        ...


class NoProgress:
    """Shows nothing: other ranks than the main one, and tests."""

    def __enter__(self) -> NoProgress:
        """Nothing to start."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Nothing to stop."""

    def advance(self, step: int, total: int) -> None:
        """Nothing."""

    def show(self, step: int, total: int, status: Status) -> None:
        """Nothing."""

    @contextmanager
    def work(self, name: str, total: int) -> Iterator[Advance]:
        """Nothing."""
        yield lambda done, status="": None


class PlainProgress(NoProgress):
    """One log line per log period, and one every half minute of other works."""

    def show(self, step: int, total: int, status: Status) -> None:
        """Log the figures."""
        logger.info("step %d/%d  %s", step, total, status)

    @contextmanager
    def work(self, name: str, total: int) -> Iterator[Advance]:
        """Log how far it is, when it takes long."""
        last = time.monotonic()

        def advance(done: int, status: str = "") -> None:
            nonlocal last
            if time.monotonic() - last >= PLAIN_SECONDS:
                logger.info("%s %d/%d%s", name, done, total, f"  {status}" if status else "")
                last = time.monotonic()

        yield advance


class BarProgress:
    """A bar at the bottom of the terminal; log lines scroll above it."""

    def __init__(self, console: Console) -> None:
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[status]}"),
            console=console,
        )
        self._train = TaskID(0)

    def __enter__(self) -> BarProgress:
        """Draw the bar."""
        self._train = self._bar.add_task("train", total=None, status="")
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave the terminal as it was."""
        self._bar.stop()
        self._bar.remove_task(self._train)

    def advance(self, step: int, total: int) -> None:
        """Move the bar."""
        self._bar.update(self._train, completed=step, total=total)

    def show(self, step: int, total: int, status: Status) -> None:
        """Put the figures beside the bar, and into the run's file only."""
        self._bar.update(self._train, completed=step, total=total, status=str(status))
        logger.info("step %d/%d  %s", step, total, status, extra={"file_only": True})

    @contextmanager
    def work(self, name: str, total: int) -> Iterator[Advance]:
        """A bar of its own, below that of the training while that one stands."""
        alone = not self._bar.live.is_started
        if alone:
            self._bar.start()
        task = self._bar.add_task(name, total=total, status="")
        try:
            yield lambda done, status="": self._bar.update(task, completed=done, status=status)
        finally:
            if alone:
                self._bar.stop()
            self._bar.remove_task(task)


def open_progress(console: Console, *, enabled: bool, main: bool) -> ProgressView:
    """The bar when ``enabled`` and the console is a terminal, lines otherwise, nothing on other ranks."""
    if not main:
        return NoProgress()
    return BarProgress(console) if enabled and console.is_terminal else PlainProgress()


class RunLog:
    """The log of one run, on the console and in ``OUTPUT_DIR/stdout.log``; ``close`` detaches both."""

    def __init__(self, output_dir: str | Path | None, *, main: bool = True, console: Console | None = None) -> None:
        """Attach handlers to the package's logger.

        Args:
            output_dir: Folder of the run (made if missing); ``None``: console only.
            main: False on all ranks but one: only warnings that the main rank does not give itself reach the console,
                with the number of the rank; no file is written.
            console: Where to print; the standard output when ``None``.

        Raises:
            UserError: The folder cannot be written.
        """
        self.console = console if console is not None else Console()
        self._handlers: list[logging.Handler] = [self._console_handler(main)]
        if main and output_dir is not None:
            self._handlers.append(_file_handler(Path(output_dir)))
        self._logger = logging.getLogger(PACKAGE)
        self._before = (self._logger.level, self._logger.propagate)
        self._logger.setLevel(logging.INFO)
        self._logger.propagate = False  # else a root handler of the embedding program prints each line twice
        for handler in self._handlers:
            self._logger.addHandler(handler)

    def _console_handler(self, main: bool) -> logging.Handler:
        handler: logging.Handler
        if not main:
            handler = _ConsoleHandler(self.console.file)
            handler.setFormatter(_formatter(f"rank {distributed.rank()}: "))
            handler.addFilter(lambda record: not getattr(record, "same_on_all_ranks", False))
        elif self.console.is_terminal:
            handler = RichHandler(console=self.console, show_path=False, show_level=False, log_time_format="[%H:%M:%S]")
            handler.addFilter(lambda record: not getattr(record, "file_only", False))
        else:
            handler = _ConsoleHandler(self.console.file)
            handler.setFormatter(_formatter())
        handler.addFilter(lambda record: not str(record.msg).startswith(JSON_PREFIX))
        handler.setLevel(logging.INFO if main else logging.WARNING)
        return handler

    def record(self, error: Exception) -> None:
        """Write the traceback of an error to the run's file, and note that place with it; the console stays clean."""
        record = self._logger.makeRecord(
            PACKAGE, logging.ERROR, __file__, 0, "the run ends with an error", (), (type(error), error, None)
        )
        record.exc_text = "".join(traceback.format_exception(error)).rstrip()
        for handler in self._handlers:
            if isinstance(handler, logging.FileHandler):
                handler.emit(record)
                note_log(error, handler.baseFilename)

    def close(self) -> None:
        """Detach and close the handlers."""
        for handler in self._handlers:
            self._logger.removeHandler(handler)
            handler.close()
        self._logger.setLevel(self._before[0])
        self._logger.propagate = self._before[1]


class _FileHandler(logging.FileHandler):
    """A log file that may become unwritable (a full disk): said once, and the run goes on without it."""

    _told = False

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 (logging names it)
        """Instead of logging's traceback for each line."""
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
        elif not self._told:
            self._told = True
            reason = (error.strerror or str(error)).lower()
            print(f"warning: {self.baseFilename} cannot be written: {reason}. The run goes on.", file=sys.stderr)

    def close(self) -> None:
        """What is still buffered is lost on a full disk."""
        with contextlib.suppress(OSError):
            super().close()


class _ConsoleHandler(logging.StreamHandler[IO[str]]):
    """A console whose reader may go away (``| head``, a lost connection): the run goes on, its file has the lines."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 (logging names it)
        """Instead of logging's traceback for each line."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)
            return
        # What is still buffered must not fail again at the end of the program.
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())


def _formatter(prefix: str = "") -> logging.Formatter:
    return logging.Formatter(f"[%(asctime)s] {prefix}%(message)s", "%m/%d %H:%M:%S")


def _file_handler(output_dir: Path) -> logging.Handler:
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        handler = _FileHandler(output_dir / LOG_FILE, encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise UserError(
            f"OUTPUT_DIR: cannot write to {output_dir} ({error.strerror or error}). Name a folder that you "
            "may write to."
        ) from error
    handler.setFormatter(_formatter())
    return handler
