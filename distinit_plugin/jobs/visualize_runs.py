"""Pictures of finished runs: classes, confusions, curves, end-point errors, flow."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from distinit_plugin.analysis.confusion import confusion_numbers, draw_confusion, mistakes
from distinit_plugin.analysis.decoded_flow import check_same_clips, draw_samples, read_samples, sample_rows
from distinit_plugin.analysis.output import check_output, write_numbers, write_picture
from distinit_plugin.analysis.per_class import (
    MOST,
    RESAMPLES,
    Comparison,
    compare_runs,
    comparison_numbers,
    comparison_rows,
    draw_comparison,
    summary,
)
from distinit_plugin.engine.curves import curve_rows, draw_curves, read_curves
from distinit_plugin.engine.ensemble import Scores, missing_sentences, read_scores
from distinit_plugin.engine.evaluate import confusion_of, confusion_rows
from distinit_plugin.engine.logs import final_test
from distinit_plugin.engine.motion_report import SAMPLES_FILE, MotionCurve, draw_motion, motion_rows, read_networks
from distinit_plugin.errors import UserError
from distinit_plugin.files import write_file
from distinit_plugin.jobs.ensembling import scores_file
from distinit_plugin.jobs.flow_pictures import FlowLengths, show_flow
from distinit_plugin.jobs.visualize_networks import distinct_names


def visualize_per_class(
    first: Path,
    second: Path,
    output: Path,
    *,
    names: Sequence[str] = (),
    resamples: int = RESAMPLES,
    seed: int = 0,
    most: int = MOST,
    console: Console | None = None,
) -> Comparison:
    """Draw what one run gains over another, class by class, on the videos that both tested.

    Args:
        first: Its output folder, the folder of its results, or ``scores.npz``.
        second: Of the run that it is compared with.
        output: The PNG.
        names: Of both; empty: of their folders.
        resamples: Draws of the bootstrap.
        seed: Of the draws.
        most: Classes at each end that are drawn.
        console: Where to print; the standard output when ``None``.

    Raises:
        UserError: The results cannot be read, or are not of the same classes and labels.
    """
    check_output(output)
    titles = _run_names([first, second], names)
    runs = [_scores(run, title) for run, title in zip((first, second), titles, strict=True)]
    found = compare_runs(runs[0], runs[1], resamples=resamples, seed=seed)
    numbers = {**comparison_numbers(found), "resamples": resamples, "seed": seed}
    write_picture(output, draw_comparison(found, most=most), numbers, comparison_rows(found))
    lines = [f"warning: {sentence}" for sentence in missing_sentences(found.missing)]
    _say(console, *lines, f"{found.first} − {found.second}: {summary(found)}", f"wrote {output}")
    return found


def visualize_confusion(run: Path, output: Path, *, names: Sequence[str] = (), console: Console | None = None) -> None:
    """Draw which classes a run takes for which.

    Args:
        run: As for ``visualize_per_class``.
        output: The PNG.
        names: One name for the run; empty: of its folder.
        console: Where to print; the standard output when ``None``.

    Raises:
        UserError: Its results cannot be read.
    """
    check_output(output)
    (title,) = _run_names([run], names)
    scores = _scores(run, title)
    table = confusion_of(scores.labels, scores.values.argmax(axis=1), len(scores.class_names))
    write_picture(
        output,
        draw_confusion(title, table, scores.class_names),
        confusion_numbers(title, table, scores.class_names),
        confusion_rows(table, scores.class_names),
    )
    worst = [
        f"'{own}' taken for '{other}': {count} videos, {100 * share:.0f} %"
        for own, other, count, share in mistakes(table, scores.class_names)[:5]
    ]
    _say(console, *worst, f"wrote {output}")


def visualize_curves(
    runs: Sequence[Path], output: Path, *, names: Sequence[str] = (), console: Console | None = None
) -> None:
    """Draw the curves of runs.

    Args:
        runs: Output folders.
        output: The PNG.
        names: Of the runs; empty: of their folders.
        console: Where to print; the standard output when ``None``.

    Raises:
        UserError: A run has no curves.
    """
    check_output(output)
    titles = distinct_names(runs, names)
    curves = {title: read_curves(run) for title, run in zip(titles, runs, strict=True)}
    rows = curve_rows(curves)
    numbers: dict[str, dict[str, list[list[float]]]] = {title: {} for title in titles}
    for title, what, epoch, value in rows[1:]:
        numbers[title].setdefault(what, []).append([epoch, value])
    tests = {title: found for title, run in zip(titles, runs, strict=True) if (found := final_test(run))}
    written = {"runs": numbers, "points": ["epoch", "value"], "tests": tests}
    write_picture(output, draw_curves(curves), written, rows)
    told = [f"{title}: test {', '.join(f'{key} {value:g}' for key, value in tests[title].items())}" for title in tests]
    _say(console, *told, f"wrote {output}")


def visualize_epe(
    probes: Sequence[Path], output: Path, *, names: Sequence[str] = (), console: Console | None = None
) -> list[MotionCurve]:
    """Draw the end-point errors that probes of motion found, over layers (D3D, figure 4).

    Args:
        probes: Folders ``OUTPUT_DIR/motion`` of ``distinit probe-motion``.
        output: The PNG.
        names: Of the probed networks; empty: as the probes called them.
        console: Where to print; the standard output when ``None``.

    Raises:
        UserError: A folder holds no probe, or two networks have one name.
    """
    check_output(output)
    found = [read_networks(probe) for probe in probes]
    titles = distinct_names(probes, names or [curves[0].name for curves in found])
    curves: list[MotionCurve] = []
    for title, (own, *others) in zip(titles, found, strict=True):
        curves.append(MotionCurve(title, own.layers))
        curves += [other for other in others if other not in curves]
    layers = [
        {"network": curve.name, "layer": own.layer, "grid": own.grid, "epe": own.epe, "zeros": own.zeros}
        for curve in curves
        for own in curve.layers
    ]
    write_picture(output, draw_motion(curves), {"unit": "pixels", "layers": layers}, motion_rows(curves))
    _say(console, f"wrote {output}")
    return curves


def visualize_flow(
    sources: Sequence[str],
    output: Path,
    *,
    names: Sequence[str] = (),
    console: Console | None = None,
    **options: Any,
) -> None:
    """Draw the flow of a video, or what was decoded from networks' features in probes of motion (figures 5 and 6).

    Args:
        sources: One video, or folders ``OUTPUT_DIR/motion`` of ``distinit probe-motion`` on the same clips.
        output: The PNG.
        names: Of the probed networks; empty: as the probes called them.
        console: Where to print; the standard output when ``None``.
        **options: Of ``show_flow``, for a video.

    Raises:
        UserError: A source cannot be read, or the probes' clips differ.
    """
    check_output(output)
    probes = [Path(source) for source in sources if (Path(source) / SAMPLES_FILE).is_file()]
    if not probes and len(sources) == 1:
        found = show_flow(sources[0], output, **options)
        write_numbers(output, {"unit": "pixels", "frames": found}, [FlowLengths._fields, *found])
        return
    if len(probes) < len(sources):
        wrong = next(source for source in sources if Path(source) not in probes)
        raise UserError(
            f"{wrong} holds no pictures of a probe of motion ({SAMPLES_FILE}). Name one video, or folders of "
            "distinit probe-motion."
        )
    titles = distinct_names(probes, names or [read_networks(probe)[0].name for probe in probes])
    samples = {title: read_samples(probe / SAMPLES_FILE) for title, probe in zip(titles, probes, strict=True)}
    check_same_clips(samples)
    rows = sample_rows(samples)
    sheet = draw_samples(samples, "decoded flow")
    pictures = [dict(zip(rows[0], row, strict=True)) for row in rows[1:]]
    write_file(output, lambda file: sheet.save(file, format="PNG"))
    write_numbers(output, {"unit": "pixels", "pictures": pictures}, rows)
    _say(console, f"wrote {output}")


def _run_names(runs: Sequence[Path], names: Sequence[str]) -> list[str]:
    """Of the run's folder, also where the folder of its results or the file in it is named."""
    folders = [run.parent if run.suffix == ".npz" else run for run in map(Path.resolve, runs)]
    return distinct_names([folder.parent if folder.name == "test" else folder for folder in folders], names)


def _scores(run: Path, name: str) -> Scores:
    scores = read_scores(scores_file(run), "probs")
    return Scores(name, scores.paths, scores.labels, scores.values, scores.class_names)


def _say(console: Console | None, *lines: str) -> None:
    console = console or Console()
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True, markup=False)
