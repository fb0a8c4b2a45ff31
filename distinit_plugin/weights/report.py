"""What came of loading a file into a network."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

NAMES_SHOWN = 6
"""Names printed per line of the report; the rest is counted."""


class Mismatch(NamedTuple):
    """A tensor that both sides have, with different shapes."""

    name: str
    file_shape: tuple[int, ...]
    network_shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.name} (file {_shape(self.file_shape)}, network {_shape(self.network_shape)})"


@dataclass(frozen=True)
class LoadReport:
    """Which tensors were loaded and which were not.

    Attributes:
        source: File or tag that the weights came from.
        loaded: Keys of the network that now hold the file's values.
        missing: Keys of the network that the file does not have (they keep their initialisation). BN's batch counters
            are not counted.
        unexpected: Keys of the file that the network does not have.
        mismatched: Keys with different shapes on both sides (they keep their initialisation).
        skipped: Names of the file that are no weights of a network (slots of the optimizer), or that nobody wants.
        notes: Remarks for the reader.
    """

    source: str
    loaded: tuple[str, ...]
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    mismatched: tuple[Mismatch, ...] = ()
    skipped: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def complete(self) -> bool:
        """Whether every tensor of the file went into the network and every one of the network was filled."""
        return not (self.missing or self.unexpected or self.mismatched)

    def __str__(self) -> str:
        return self.describe()

    def describe(self, names_shown: int | None = NAMES_SHOWN, *, name_loaded: bool = False) -> str:
        """A line for each kind, with up to ``names_shown`` names (``None``: all), of what was loaded only if asked."""
        lines = [f"weights from {self.source}"]
        for label, names in (
            ("loaded", self.loaded if name_loaded else ()),
            ("missing", self.missing),
            ("unexpected", self.unexpected),
            ("mismatched", tuple(str(mismatch) for mismatch in self.mismatched)),
            ("skipped", self.skipped),
        ):
            count = len(self.loaded) if label == "loaded" else len(names)
            if label == "skipped" and not names:
                continue
            shown = ", ".join(names) if names_shown is None else shorten(names, names_shown)
            lines.append(f"  {label:<11} {count:5d}{'  ' if shown else ''}{shown}")
        return "\n".join(lines + [f"  note: {note}" for note in self.notes])


def shorten(names: tuple[str, ...], names_shown: int = NAMES_SHOWN) -> str:
    """The first few names, and how many more there are."""
    more = len(names) - names_shown
    return ", ".join(names[:names_shown]) + (f", … and {more} more" if more > 0 else "")


def _shape(shape: tuple[int, ...]) -> str:
    return "×".join(str(size) for size in shape) or "scalar"
