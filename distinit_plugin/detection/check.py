"""Look through a folder of AVA's form before a long job does: what is missing, wrong or odd."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from distinit_plugin.detection.check_pictures import Progress, check_pictures
from distinit_plugin.detection.check_report import AvaFolders, AvaReport
from distinit_plugin.detection.files import read_boxes, read_excluded, read_label_map, read_truth
from distinit_plugin.detection.geometry import has_area
from distinit_plugin.detection.tables import NO_ACTION, BoxTable
from distinit_plugin.errors import UserError
from distinit_plugin.video.records import shorten

_SAMPLE = 2**16
_FAR_OUTSIDE = 2.0
"""Coordinates beyond this are pixels, not fractions."""


def check_ava(folders: AvaFolders, *, on_progress: Progress | None = None) -> AvaReport:
    """Read all annotations, compare them with each other, and look for the pictures of every annotated video.

    No picture is decoded; videos are opened and their length is read.

    Args:
        folders: Where the parts are.
        on_progress: Called with (videos done, videos).

    Raises:
        UserError: The folder of annotations cannot be read.
    """
    report = AvaReport()
    files = _kinds(folders.annotations, report)
    names = _label_map(files["label map"], folders.annotations, report)
    truths = _tables(files["truth"], read_truth, report)
    boxes = _tables(files["boxes"], read_boxes, report)
    if not truths:
        report.add("missing", folders.annotations, "there is no csv of ground truth (video,second,x1,y1,x2,y2,action)")
    for path, table in truths.items():
        _check_table(path, table, folders.seconds, report)
        _check_truth(path, table, names, report)
    for path, table in boxes.items():
        _check_table(path, table, folders.seconds, report)
        _check_boxes(path, table, truths, report)
    _check_splits(truths, report)
    _check_excluded(files["excluded"], truths, report)
    check_pictures(folders, _last_seconds([*truths.values(), *boxes.values()], folders.seconds), report, on_progress)
    return report


def _kinds(folder: Path, report: AvaReport) -> dict[str, list[Path]]:
    """The files of a folder and of those in it, by what their content is."""
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder. Name the folder of AVA's csv files and label map.")
    files: dict[str, list[Path]] = defaultdict(list)
    for place, inner, names in os.walk(folder):
        inner.sort()
        for name in sorted(names):
            path = Path(place) / name
            if name.startswith(".") or not name.lower().endswith((".csv", ".pbtxt", ".pbtxt.txt")):
                continue
            try:
                files[_kind(path)].append(path)
            except OSError as error:
                report.add("wrong", path, f"cannot be read: {(error.strerror or str(error)).lower()}")
    for path in files["else"]:
        report.add("odd", path, "is no csv of boxes or time stamps: neither 2 nor 7 nor 8 columns, or a header")
    return files


def _kind(path: Path) -> str:
    """``label map``, ``excluded``, ``truth``, ``boxes`` or ``else``, from the beginning of the file."""
    if not path.name.lower().endswith(".csv"):
        return "label map"
    with open(path, encoding="utf-8-sig", errors="replace") as file:
        text = file.read(_SAMPLE)
    lines = text.split("\n")[: -1 if len(text) == _SAMPLE else None]
    rows = [line.rstrip().split(",") for line in lines if line.strip()]
    fitting = [row for row in rows if len(row) in (2, 7, 8) and _is_number(row[1])]
    if not rows or len(fitting) < len(rows) / 2:  # one bad row makes no other kind: its reader names it
        return "else"
    if all(len(row) == 2 for row in fitting):
        return "excluded"
    scores = [row[7] for row in fitting if len(row) == 8]
    if any("." in score for score in scores) or any(row[6].strip() in ("", "-1") for row in fitting if len(row) > 2):
        return "boxes"
    return "truth"


def _is_number(text: str) -> bool:
    return text.strip().replace(".", "", 1).isdecimal()


def _label_map(paths: Sequence[Path], folder: Path, report: AvaReport) -> dict[int, str] | None:
    """The actions that count; of several maps, those of all."""
    names: dict[int, str] = {}
    for path in paths:
        try:
            found = read_label_map(path)
        except UserError as error:
            report.add("wrong", path, str(error))
            continue
        other = [number for number, name in found.items() if names.get(number, name) != name]
        if other:
            report.add("odd", path, f"another label map has other names for {shorten([str(n) for n in sorted(other)])}")
        names |= found
        report.facts.append(f"{path}: label map of {len(found)} actions, {min(found)} to {max(found)}")
    if not names:
        report.add("missing", folder, "there is no label map (*.pbtxt): without one nothing can be evaluated")
        return None
    return names


def _tables(paths: Sequence[Path], read: Callable[[Path], BoxTable], report: AvaReport) -> dict[Path, BoxTable]:
    """The tables that can be read."""
    tables = {}
    for path in paths:
        try:
            tables[path] = read(path)
        except UserError as error:
            report.add("wrong", path, str(error))
    return tables


def _check_table(path: Path, table: BoxTable, seconds: tuple[float, float], report: AvaReport) -> None:
    """What holds for every csv of boxes."""
    keyframes = len(np.unique(np.column_stack([table.video, table.seconds]), axis=0))
    report.facts.append(f"{path}: {len(table)} rows, {keyframes} keyframes of {len(table.videos)} videos")
    if not len(table):
        report.add("wrong", path, "has no row with a box")
        return
    if np.median(np.abs(table.boxes).max(axis=1)) > _FAR_OUTSIDE:
        report.add("wrong", path, "its boxes are pixels; they must be fractions of the frame's width and height")
    else:
        outside = np.asarray(((table.boxes < 0) | (table.boxes > 1)).any(axis=1))
        _count(outside, path, "boxes reach beyond the frame (they are cut there)", report)
    _count(~has_area(table.boxes), path, "boxes have no area (they are left out)", report)
    unused = (table.seconds < seconds[0]) | (table.seconds > seconds[1])
    _count(unused, path, f"rows are outside of seconds {seconds[0]:g} to {seconds[1]:g} (they are not used)", report)
    if unused.all():
        report.add("wrong", path, f"has no row between seconds {seconds[0]:g} and {seconds[1]:g}")
    columns: list[np.ndarray] = [table.video, table.seconds, table.boxes, table.actions]
    distinct = len(np.unique(np.column_stack(columns), axis=0))
    if distinct < len(table):
        report.add("odd", path, f"{len(table) - distinct} rows repeat video, second, box and action of another one")


def _count(rows: np.ndarray, path: Path, what: str, report: AvaReport) -> None:
    if rows.any():
        report.add("odd", path, f"{int(rows.sum())} of {len(rows)} {what}")


def _check_truth(path: Path, table: BoxTable, names: dict[int, str] | None, report: AvaReport) -> None:
    if names is None or not len(table):
        return
    known = np.isin(table.actions, list(names))
    others = sorted(set(table.actions[~known].tolist()))
    if others:
        detail = (
            f"{int((~known).sum())} rows are of actions that the label map lacks: {shorten([str(n) for n in others])}"
        )
        report.add("odd" if known.any() else "wrong", path, f"{detail} (AVA evaluates 60 of its 80 actions)")
    absent = sorted(set(names) - set(table.actions.tolist()))
    if absent:
        detail = f"{len(absent)} actions of the label map do not occur: {shorten([names[number] for number in absent])}"
        report.add("odd", path, detail)


def _check_boxes(path: Path, table: BoxTable, truths: Mapping[Path, BoxTable], report: AvaReport) -> None:
    if not len(table):
        return
    shares = ", ".join(f"{float((table.scores >= least).mean()):.0%} at least {least}" for least in (0.8, 0.9))
    labeled = float((table.actions != NO_ACTION).mean())
    report.facts.append(f"{path}: predicted boxes, scores {shares}; {labeled:.0%} have an action")
    if ((table.scores < 0) | (table.scores > 1)).any():
        report.add("odd", path, "scores are not within 0 and 1, which AVA.DETECTION_SCORE_THRESH supposes")
    known = {video for truth in truths.values() for video in truth.videos}
    strange = sorted(set(table.videos) - known)
    if truths and strange:
        report.add("odd", path, f"{len(strange)} videos have no ground truth: {shorten(strange)}")


def _check_splits(truths: Mapping[Path, BoxTable], report: AvaReport) -> None:
    """Videos that are trained on and validated with."""
    named = {split: {p: t for p, t in truths.items() if split in p.name.lower()} for split in ("train", "val")}
    for train, table in named["train"].items():
        for val, other in named["val"].items():
            both = sorted(set(table.videos) & set(other.videos))
            if both and train != val:
                report.add("odd", val, f"{len(both)} videos are in {train.name}, too: {shorten(both)}")


def _check_excluded(paths: Sequence[Path], truths: Mapping[Path, BoxTable], report: AvaReport) -> None:
    annotated = {
        (table.videos[video], second)
        for table in truths.values()
        for video, second in {*zip(table.video.tolist(), table.seconds.tolist(), strict=True)}
    }
    for path in paths:
        try:
            excluded = read_excluded(path)
        except UserError as error:
            report.add("wrong", path, str(error))
            continue
        report.facts.append(f"{path}: {len(excluded)} excluded keyframes")
        if excluded & annotated:
            report.add("odd", path, f"{len(excluded & annotated)} excluded keyframes have ground truth")


def _last_seconds(tables: Sequence[BoxTable], seconds: tuple[float, float]) -> dict[str, float]:
    """The last keyframe in use of each video, in the order of the names."""
    last: dict[str, float] = {}
    for table in tables:
        used = (table.seconds >= seconds[0]) & (table.seconds <= seconds[1])
        latest = np.full(len(table.videos), -np.inf)
        np.maximum.at(latest, table.video[used], table.seconds[used])
        for video, second in zip(table.videos, latest.tolist(), strict=True):
            if np.isfinite(second):
                last[video] = max(last.get(video, second), second)
    return dict(sorted(last.items()))
