"""Errors whose text is meant for the person at the keyboard: what, where, what is allowed, what to do."""

from __future__ import annotations

SAME_ON_ALL_RANKS = {"same_on_all_ranks": True}
"""``extra`` of a warning that all ranks of a job give alike: it is shown for the first of them only."""


class UserError(Exception):
    """Something the user gave is wrong. The command line prints the text alone, without a traceback."""


class ConfigError(UserError):
    """One or more configuration problems, collected so that all are seen at once."""

    def __init__(self, problems: list[str]) -> None:
        """Keep every problem; the text lists them all."""
        self.problems = problems
        super().__init__("\n".join(problems))


class WeightsError(UserError):
    """A weights file that is missing, unreadable, unsafe or of another network."""


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
