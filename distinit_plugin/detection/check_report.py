"""What a look through a data set of AVA's form is told and what it finds."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

from distinit_plugin.detection.keyframes import AVA_SECONDS

Kind = Literal["missing", "wrong", "odd"]
KINDS: tuple[Kind, ...] = ("missing", "wrong", "odd")

_MAX_ROWS = 20


class AvaFinding(NamedTuple):
    """One thing that somebody should look at."""

    kind: Kind
    path: str
    detail: str


@dataclass(frozen=True)
class AvaFolders:
    """Where the parts of a data set are.

    Attributes:
        annotations: Folder of csv files and of the label map; its folders are looked through, too.
        frame_lists: Folder of lists of frames; ``None``: there are none.
        frames: Folder of extracted frames; ``None``: there are none.
        videos: Folder of the videos; ``None``: there are none.
        video_start: Time stamp of the first picture of the videos, seconds.
        frames_start: Time stamp of the first extracted frame, seconds.
        fps: Extracted frames per second.
        seconds: First and last time stamp that is used.
    """

    annotations: Path
    frame_lists: Path | None = None
    frames: Path | None = None
    videos: Path | None = None
    video_start: float = 0.0
    frames_start: float = 900.0
    fps: float = 30.0
    seconds: tuple[float, float] = AVA_SECONDS


@dataclass
class AvaReport:
    """What was found.

    Attributes:
        facts: A sentence for each file that could be read.
        findings: What somebody should look at.
    """

    facts: list[str] = field(default_factory=list)
    findings: list[AvaFinding] = field(default_factory=list)

    def add(self, kind: Kind, path: str | os.PathLike[str], detail: str) -> None:
        """Note a finding."""
        self.findings.append(AvaFinding(kind, os.fspath(path), detail))

    @property
    def usable(self) -> bool:
        """Whether nothing is missing or wrong."""
        return all(finding.kind == "odd" for finding in self.findings)

    def to_text(self) -> str:
        """For the terminal."""
        lines = [*self.facts]
        for kind in KINDS:
            rows = [finding for finding in self.findings if finding.kind == kind]
            lines.append(f"{kind}: {len(rows)}")
            lines += [f"  {row.path}: {row.detail}" for row in rows[:_MAX_ROWS]]
            if len(rows) > _MAX_ROWS:
                lines.append(f"  … and {len(rows) - _MAX_ROWS} more")
        return "\n".join(lines)
