"""Videos that were bad: which of them can be read by now."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial

from distinit_plugin.video.check import inspect_video
from distinit_plugin.video.isolated import Crash, run_isolated

RECHECK_SECONDS = 60.0
"""Time that is taken to look at all of them."""


def readable_now(paths: Sequence[str], timeout: float) -> set[str]:
    """Those that decode as a whole; once the time is over the rest is not looked at.

    Args:
        paths: Videos, or folders of frames.
        timeout: Seconds that one may take; 0: any time.
    """
    begin = time.monotonic()
    inspect = partial(inspect_video, timeout=timeout or None)
    good = set()
    for path, report in run_isolated(inspect, paths, num_workers=min(1, len(paths)), max_seconds=RECHECK_SECONDS):
        if not isinstance(report, Crash) and not report.reason:
            good.add(path)
        if time.monotonic() - begin > RECHECK_SECONDS:
            break
    return good
