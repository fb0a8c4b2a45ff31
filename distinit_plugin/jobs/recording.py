"""Keeps ``OUTPUT_DIR/run.json`` up to date while a run works."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime

from distinit_plugin.engine import distributed
from distinit_plugin.engine.environment import environment
from distinit_plugin.engine.run_record import RunPart, RunRecord, read_record
from distinit_plugin.engine.train_options import TrainResult
from distinit_plugin.errors import UserError
from distinit_plugin.jobs.session import Session


class Recorder:
    """The record of the process that works on a run; on all ranks but the main one nothing is written."""

    def __init__(self, session: Session) -> None:
        """Note that this process starts, unless the folder has a record: the job may be refused for another run's.

        Raises:
            UserError: The folder cannot be written.
        """
        self._folder = session.output_dir
        ranks = distributed.world_size()
        found = environment(session.device, ranks) if distributed.is_main() else {}
        self._part = RunPart(started=_now(), environment=found)
        self._record = RunRecord(list(session.cfg.source_files), session.cfg.dump(), [self._part])
        self._earlier: RunRecord | None = None
        with contextlib.suppress(UserError):  # a damaged record is written anew
            self._earlier = read_record(self._folder)
        if self._earlier is None:
            self._write(self._record)

    def trained(self, result: TrainResult) -> None:
        """Note how the training ended."""
        self._part.steps = result.steps
        self._part.trained_seconds = result.seconds
        self._part.wait_share = result.wait_share

    def end(self, state: str, error: str = "") -> None:
        """Note how this process ends. What fails in the folder of a finished run leaves that one as it is.

        Raises:
            UserError: The folder cannot be written.
        """
        self._part.ended, self._part.state, self._part.error = _now(), state, error
        earlier = self._earlier
        if earlier is None:
            self._write(self._record)
        elif state == "done":
            self._write(RunRecord(self._record.files, self._record.config, [*earlier.parts, self._part]))
        elif not (earlier.parts and earlier.parts[-1].state == "done"):
            self._write(RunRecord(earlier.files, earlier.config, [*earlier.parts, self._part]))

    def _write(self, record: RunRecord) -> None:
        if distributed.is_main():
            record.write(self._folder)


@contextmanager
def recorded(session: Session) -> Iterator[Recorder]:
    """Record what becomes of the work inside.

    Raises:
        UserError: The folder cannot be written.
    """
    recorder = Recorder(session)
    try:
        yield recorder
    except BaseException as error:
        failed = isinstance(error, Exception)
        text = str(error) if isinstance(error, UserError) or not failed else f"{type(error).__name__}: {error}"
        with contextlib.suppress(UserError):  # the first error is the one that counts
            recorder.end("failed" if failed else "stopped", text or type(error).__name__)
        raise
    recorder.end("done")


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
