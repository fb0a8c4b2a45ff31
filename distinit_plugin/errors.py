"""Errors whose text is meant for the person at the keyboard: what, where, what is allowed, what to do."""

from __future__ import annotations

import reprlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

SAME_ON_ALL_RANKS = {"same_on_all_ranks": True}
"""``extra`` of a warning that all ranks of a job give alike: it is shown for the first of them only."""

_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxlist, _SHORT.maxtuple, _SHORT.maxdict = 3, 8, 8, 6
_SHORT.maxstring, _SHORT.maxother, _SHORT.maxlong = 100, 100, 40


def shown(value: Any) -> str:
    """``repr`` of something that a user gave, cut to a length that a sentence bears, however large the value is."""
    return _SHORT.repr(value)


class UserError(Exception):
    """Something the user gave is wrong. The command line prints the text alone, without a traceback."""


class ConfigError(UserError):
    """One or more configuration problems, collected so that all are seen at once."""

    def __init__(self, problems: list[str]) -> None:
        """Keep every problem; the text lists them all."""
        self.problems = problems
        super().__init__("\n".join(problems))


class Problems(list[str]):
    """Sentences about what is wrong, from steps that each may fail without keeping the next one from being tried."""

    @contextmanager
    def collect(self, prefix: str = "") -> Iterator[None]:
        """A step: its UserError is noted, with ``prefix`` before each sentence, and goes no further."""
        try:
            yield
        except ConfigError as error:
            self += [prefix + problem for problem in error.problems]
        except UserError as error:
            self.append(f"{prefix}{error}")

    def raise_if_any(self) -> None:
        """Raise ConfigError with all of them."""
        if self:
            raise ConfigError(list(self))


class WeightsError(UserError):
    """A weights file that is missing, unreadable, unsafe or of another network."""


@contextmanager
def naming(key: str) -> Iterator[None]:
    """Put the key of the configuration that is to blame before a UserError that does not name it."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError([f"{key}: {problem}" for problem in error.problems]) from error
    except UserError as error:
        if str(error).startswith(key):
            raise
        raise type(error)(f"{key}: {error}") from error


_LOGGED = "The traceback is in "


def note_log(error: BaseException, path: str) -> None:
    """Remember with an error that its traceback is in a file."""
    error.add_note(_LOGGED + path)


def log_of(error: BaseException) -> str | None:
    """The file that has the traceback of an error; ``None``: no file has."""
    notes: list[str] = getattr(error, "__notes__", [])
    return next((note.removeprefix(_LOGGED) for note in notes if note.startswith(_LOGGED)), None)


class VideoError(Exception):
    """A video that cannot give the frames asked for. Skipped and counted by the data side, never fatal by itself."""

    def __init__(self, path: str, reason: str) -> None:
        """Name the file and the reason, in one clause each."""
        self.path = path
        self.reason = reason
        super().__init__(f"{path}: {reason}")

    def __reduce__(self) -> tuple[type[VideoError], tuple[str, str]]:
        """Survive the trip between worker processes."""
        return type(self), (self.path, self.reason)
