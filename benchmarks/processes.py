"""Variants of a benchmark in processes of their own, which make one step whenever they are told to.

Allocator and denormal settings belong to a process, and so does its peak memory.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

Built = tuple[Callable[[], object], dict[str, Any]]
"""A step, and what is known of it: ``precision``, ``device``, …"""


class Variant:
    """A process that makes one step whenever it is told to."""

    def __init__(self, script: Path, arguments: Sequence[str]) -> None:
        """Start ``script``, which calls :func:`serve`; returns when it is ready."""
        command = [sys.executable, str(script), *arguments]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.facts = self._answer()

    def step(self) -> None:
        """One step; returns when it is done."""
        self._ask("step")

    def close(self) -> dict[str, Any]:
        """End the process; returns what it has to say at its end."""
        last = self._ask("end")
        self._process.wait(timeout=60)
        return last

    def kill(self) -> None:
        """End the process in any state."""
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()

    def _ask(self, word: str) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{word}\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("answer: "):
                answer: dict[str, Any] = json.loads(line.removeprefix("answer: "))
                return answer
        raise SystemExit("a variant ended early; its error stands above.")


def serve(
    build: Callable[[contextlib.ExitStack], Built], last_words: Callable[[], dict[str, Any]], device: str = "cpu"
) -> int:
    """The other side: build, say so, step on demand until told to end.

    What is not needed is not imported here: peak memory is compared.
    """
    import torch

    pipe = sys.stdout

    def answer(**values: Any) -> None:
        print(f"answer: {json.dumps(values)}", file=pipe, flush=True)

    # What others print goes to the standard error: the pipe is for answers.
    with contextlib.redirect_stdout(sys.stderr), contextlib.ExitStack() as stack:
        step, facts = build(stack)
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        answer(**facts)
        for line in sys.stdin:
            if line.strip() == "end":
                answer(**last_words())
                return 0
            step()
            if device == "cuda":
                torch.cuda.synchronize()
            answer()
    return 0
