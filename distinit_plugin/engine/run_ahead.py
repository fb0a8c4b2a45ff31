"""How far the host may be ahead of a GPU."""

from __future__ import annotations

from collections import deque

import torch

STEPS_AHEAD = 2
"""Enough for the GPU never to wait for work that is there."""


class RunAhead:
    """Keeps the host from handing out steps long before a GPU computes them.

    Nothing else in a step waits for the device. Without a limit the host would take batches as fast as the loader has
    them, hold the memory of all that are not computed yet, and count as waiting for data what is in truth the GPU's
    work. A step that is two steps old is mostly done, so waiting for it leaves the GPU busy.
    """

    def __init__(self, device: torch.device) -> None:
        """On a CPU nothing runs ahead."""
        self._counts = device.type == "cuda"
        self._unfinished: deque[torch.cuda.Event] = deque()

    def step_given(self) -> None:
        """A step has been handed out: wait until the one ``STEPS_AHEAD`` before it is computed."""
        if not self._counts:
            return
        event = torch.cuda.Event(blocking=True)  # sleeps, where the default burns a core that decodes videos
        event.record()
        self._unfinished.append(event)
        if len(self._unfinished) > STEPS_AHEAD:
            self._unfinished.popleft().synchronize()
