"""Whether annotated videos have their pictures, as videos or as extracted frames, up to their last keyframe."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import av

from distinit_plugin.detection.check_report import AvaFinding, AvaFolders, AvaReport
from distinit_plugin.detection.files import read_frame_list
from distinit_plugin.detection.sources import VIDEO_EXTENSIONS, VideoFiles
from distinit_plugin.errors import UserError, VideoError
from distinit_plugin.video.guard import video_errors
from distinit_plugin.video.images import list_frames
from distinit_plugin.video.records import shorten

Progress = Callable[[int, int], None]


def check_pictures(
    folders: AvaFolders, last: Mapping[str, float], report: AvaReport, on_progress: Progress | None
) -> None:
    """Look for the pictures of every annotated video.

    Args:
        folders: Where they are.
        last: Video → time stamp of its last keyframe.
        report: What is found goes there.
        on_progress: Called with (videos done, videos).
    """
    if folders.videos is None and folders.frames is None and folders.frame_lists is None:
        report.add("missing", folders.annotations, "there are neither videos nor frames to go with the annotations")
    total = len(last) * sum(place is not None for place in (folders.videos, folders.frames))
    done = 0

    def step() -> None:
        nonlocal done
        done += 1
        if on_progress is not None:
            on_progress(done, total)

    lists = _read_lists(folders.frame_lists, report) if folders.frame_lists is not None else None
    if folders.frames is not None:
        listings: dict[str, set[str]] = {}
        for video, second in last.items():
            for finding in _frames_of(video, second, folders, lists, listings):
                report.findings.append(finding)
            step()
    if folders.videos is not None:
        try:
            sources = VideoFiles(folders.videos, start=folders.video_start)
        except UserError as error:
            report.add("missing", folders.videos, str(error))
            return
        for video, second in last.items():
            if not sources.has(video):
                endings = ", ".join(VIDEO_EXTENSIONS)
                report.add("missing", sources.path(video), f"there is no video of this name ({endings})")
            else:
                _check_video(sources.path(video), second - folders.video_start, report)
            step()


def _read_lists(folder: Path, report: AvaReport) -> dict[str, Sequence[str]] | None:
    """The lists of frames of a folder; ``None``: there are none."""
    paths = sorted(folder.glob("*.csv")) if folder.is_dir() else []
    if not paths:
        report.add("missing", folder, "there is no list of frames (train.csv, val.csv)")
        return None
    lists: dict[str, Sequence[str]] = {}
    for path in paths:
        try:
            found = read_frame_list(path)
        except UserError as error:
            report.add("wrong", path, str(error))
            continue
        lists.update(found)
        report.facts.append(f"{path}: {sum(map(len, found.values()))} frames of {len(found)} videos")
    return lists


def _frames_of(
    video: str,
    second: float,
    folders: AvaFolders,
    lists: Mapping[str, Sequence[str]] | None,
    listings: dict[str, set[str]],
) -> Iterator[AvaFinding]:
    """What is wrong with the frames of one video; ``listings`` keeps the folder looked at last."""
    assert folders.frames is not None
    if lists is None:
        place = folders.frames / video
        try:
            number = len(list_frames(str(place)))
        except VideoError as error:
            yield AvaFinding("missing", str(place), error.reason)
            return
    else:
        place = folders.frames
        if video not in lists:
            yield AvaFinding("missing", str(folders.frame_lists), f"no list has frames of {video}")
            return
        number = len(lists[video])
        absent = []
        for path in lists[video]:
            folder, name = os.path.split(os.path.join(folders.frames, path))
            if folder not in listings:
                listings.clear()
                listings[folder] = set(os.listdir(folder)) if os.path.isdir(folder) else set()
            if name not in listings[folder]:
                absent.append(path)
        if absent:
            yield AvaFinding("missing", str(place), f"{len(absent)} of {number} frames of {video}: {shorten(absent)}")
    needed = int((second - folders.frames_start) * folders.fps) + 1
    if number < needed:
        yield AvaFinding(
            "wrong",
            str(place),
            f"{video} has {number} frames, and its keyframe at second {second:g} is frame {needed} (at {folders.fps:g} "
            f"frames per second from second {folders.frames_start:g} on)",
        )


def _check_video(path: str, last: float, report: AvaReport) -> None:
    """Whether a video opens and, as far as its header says, lasts for ``last`` seconds."""
    try:
        with video_errors(path, "cannot be opened"), av.open(os.path.abspath(path), metadata_errors="replace") as file:
            if not file.streams.video:
                raise VideoError(path, "has no pictures")
            length = None if file.duration is None else file.duration / av.time_base
    except VideoError as error:
        report.add("wrong", path, error.reason)
        return
    if length is not None and length < last:
        report.add("wrong", path, f"lasts {length:.1f} s, and its last keyframe is {last:.1f} s from its beginning")
