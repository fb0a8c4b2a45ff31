"""What a scheduler's signals do to a run: it finishes its step, saves its state, and ends with a status that says so.

Schedulers send SIGTERM before they kill a job, SLURM's ``--signal`` often SIGUSR1. The process ends with 128 + the
number of the signal, as a shell reports a process that the signal itself ended: 143 and 138.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType

from distinit_plugin.engine import distributed

SIGNALS = ("SIGTERM", "SIGUSR1")

ASK_SECONDS = 1.0
"""Ranks ask each other about signals about this often, and not at every step."""

logger = logging.getLogger(__name__)


class Stopped(SystemExit):
    """A signal ended the run. As a ``SystemExit`` it is no error, and gives the process its exit status."""

    def __init__(self, number: int, what: str = "") -> None:
        """Signal ``number``; ``what`` was saved, as the end of a sentence."""
        super().__init__(128 + number)
        self.number = number
        self.what = what or "everything that was saved before is complete"

    def __str__(self) -> str:
        return (
            f"{signal.Signals(self.number).name}: {self.what}; the same command goes on from there "
            f"(exit status {self.code})"
        )


class StopSignals:
    """Catches the scheduler's signals while it is entered; the handlers that were there before come back afterwards.

    A signal ends the work at once, by ``Stopped`` from wherever the program is, except while signals are ``held``.
    Only the main thread can catch signals: entered in another one, this does nothing. Ctrl-C interrupts as always,
    also when Python drops the exception because it was raised inside of a destructor: ``raise_if_interrupted``.

    Attributes:
        received: Number of the first signal that came, 0 before.
    """

    def __init__(self) -> None:
        self.received = 0
        self._interrupted = False
        self._held = False
        self._process = 0
        self._before: dict[int, object] = {}

    def __enter__(self) -> StopSignals:
        self._process = os.getpid()
        if threading.current_thread() is threading.main_thread():
            numbers = [int(getattr(signal, name)) for name in SIGNALS if hasattr(signal, name)]
            self._before = {number: signal.signal(number, self._note) for number in numbers}
            if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else the program has its own way
                self._before[signal.SIGINT] = signal.signal(signal.SIGINT, self._interrupt)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._before = {}
        if error is None:
            self.raise_if_interrupted()
        if isinstance(error, RuntimeError) and self.received and distributed.world_size() > 1:
            # The signal came to all ranks: those that have left already make the collectives of this one fail.
            stopped = Stopped(self.received)
            logger.info("%s", stopped)
            raise stopped from error
        if isinstance(error, Stopped):
            logger.info("%s", error)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Inside, signals are noted and nothing else: ``raise_if_received`` where everything is saved."""
        with self._set(held=True):
            yield

    @contextmanager
    def let_through(self, what: str) -> Iterator[None]:
        """Inside of ``held``: a signal ends the work at once, also one that came before. ``what`` is safe already."""
        self.raise_if_received(what)
        try:
            with self._set(held=False):
                yield
        except Stopped as stopped:
            stopped.what = what
            raise
        self.raise_if_interrupted()  # Python drops what a handler raises inside of a destructor
        self.raise_if_received(what)

    def raise_if_interrupted(self) -> None:
        """Act on a Ctrl-C whose exception was lost.

        Raises:
            KeyboardInterrupt: There was one.
        """
        if self._interrupted:
            raise KeyboardInterrupt

    def raise_if_received(self, what: str = "") -> None:
        """Act on a signal that came while signals were held."""
        if self.received:
            raise Stopped(self.received, what)

    @contextmanager
    def _set(self, *, held: bool) -> Iterator[None]:
        before, self._held = self._held, held
        try:
            yield
        finally:
            self._held = before

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        self._interrupted = True
        raise KeyboardInterrupt

    def _note(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process or self.received:
            return  # a forked process that has no handler of its own yet, or the second signal
        self.received = number
        if not self._held:
            raise Stopped(number)


class Agreement:
    """Lets all ranks learn, after the same step, that one of them got a signal or that a state should be saved.

    The ranks ask each other only at some steps, at first at every one, then about every ``ASK_SECONDS``: how many
    steps that is the main rank says in each answer, so that all ranks ask at the same ones. On one process asking
    costs nothing and is done after every step.
    """

    def __init__(self) -> None:
        self._next: int | None = None
        self._last: tuple[int, float] | None = None
        self._interval = 1

    def ask(self, step: int, *, signal_number: int, save: bool, at_once: bool = False) -> tuple[int, bool]:
        """Called by every rank after every step.

        Args:
            step: The step that was done.
            signal_number: The signal that this rank got; 0: none.
            save: This rank wants a state saved; only the main rank's wish counts.
            at_once: Ask now (all ranks must).

        Returns:
            The signal that a rank got (0: none) and whether to save, equal on all ranks; ``(0, False)`` at steps at
            which nothing is asked.
        """
        if distributed.world_size() == 1:
            return signal_number, save
        if not at_once and self._next is not None and step < self._next:
            return 0, False
        answers = distributed.gather_objects((signal_number, save, self._wanted_interval(step)))
        self._interval = answers[0][2]
        self._next, self._last = step + self._interval, (step, time.monotonic())
        return max(answer[0] for answer in answers), answers[0][1]

    def _wanted_interval(self, step: int) -> int:
        """Steps of ``ASK_SECONDS``, by the pace since the last answer; at most twice as many as before."""
        if self._last is None or step <= self._last[0]:
            return 1
        pace = (time.monotonic() - self._last[1]) / (step - self._last[0])
        return max(1, min(2 * self._interval, int(ASK_SECONDS / max(pace, 1e-9))))
