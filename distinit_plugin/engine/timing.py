"""Times that can be compared: interleaved rounds, medians with quartiles."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

ROUNDS = 9
"""Rounds of every comparison, at least, unless somebody asks for fewer."""


class Spread(NamedTuple):
    """Median and quartiles of repeated measurements."""

    low: float
    median: float
    high: float

    def text(self, digits: int = 2) -> str:
        """``median (low … high)``."""
        return f"{self.median:.{digits}f} ({self.low:.{digits}f} … {self.high:.{digits}f})"


def spread(values: Iterable[float]) -> Spread:
    """Median and quartiles."""
    low, median, high = np.percentile(list(values), [25, 50, 75])
    return Spread(float(low), float(median), float(high))


def ratio(values: Sequence[float], others: Sequence[float]) -> Spread:
    """Spread of the rounds' own quotients: what slows a whole round down, slows both of its sides."""
    return spread(value / other for value, other in zip(values, others, strict=True))


def interleave(
    variants: Mapping[str, Callable[[int], object]],
    rounds: int = ROUNDS,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Time every variant once a round, A B C A B C …, after one round that is not counted.

    Args:
        variants: Name → what is timed; it is given the round's number (the first, uncounted one is −1).
        rounds: Counted rounds.
        clock: ``time.process_time`` where other jobs take turns with this one.

    Returns:
        Name → seconds of each counted round.
    """
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(-1, rounds):
        for name, run in variants.items():
            begin = clock()
            run(number)
            if number >= 0:
                seconds[name].append(clock() - begin)
    return seconds
