"""``distinit check-ava``: from flags to a report."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from distinit_plugin.detection.check import check_ava
from distinit_plugin.detection.check_report import AvaFolders, AvaReport
from distinit_plugin.errors import UserError


def check(
    path: Path,
    *,
    annotations: Path | None = None,
    frame_lists: Path | None = None,
    frames: Path | None = None,
    videos: Path | None = None,
    video_start: float = 0.0,
    frames_start: float = 900.0,
    fps: float = 30.0,
    seconds: tuple[float, float] = (902.0, 1798.0),
) -> AvaReport:
    """Look through a data set and print what was found.

    Args:
        path: Its folder.
        annotations: Folder of csv files and label map; ``None``: ``path``/annotations, or ``path`` itself.
        frame_lists: Folder of lists of frames; ``None``: ``path``/frame_lists, where it exists. So the others:
        frames: Folder of extracted frames.
        videos: Folder of videos.
        video_start: Time stamp of the videos' first picture, seconds.
        frames_start: Time stamp of the first extracted frame, seconds.
        fps: Extracted frames per second.
        seconds: First and last time stamp in use.

    Raises:
        UserError: A folder that was named does not exist.
    """
    given = {"--annotations": annotations, "--frame-lists": frame_lists, "--frames": frames, "--videos": videos}
    for flag, folder in {"PATH": path, **given}.items():
        if folder is not None and not folder.is_dir():
            raise UserError(f"{flag}: {folder} is no folder.")

    def usual(folder: Path | None, name: str) -> Path | None:
        return folder or (path / name if (path / name).is_dir() else None)

    folders = AvaFolders(
        annotations=usual(annotations, "annotations") or path,
        frame_lists=usual(frame_lists, "frame_lists"),
        frames=usual(frames, "frames"),
        videos=usual(videos, "videos"),
        video_start=video_start,
        frames_start=frames_start,
        fps=fps,
        seconds=seconds,
    )
    columns = (TextColumn("looking for pictures"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("videos", total=None)
        report = check_ava(folders, on_progress=lambda done, total: progress.update(task, completed=done, total=total))
    print(report.to_text())
    return report
