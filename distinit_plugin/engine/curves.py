"""Curves of one or several runs, read back from their logs and drawn as a PNG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distinit_plugin.engine.figures import COLOURS, new_figure, save_figure
from distinit_plugin.engine.figures import label as shown
from distinit_plugin.engine.logs import LogLine, read_log
from distinit_plugin.engine.meters import JSON_FILE, JSON_PREFIX
from distinit_plugin.engine.progress import LOG_FILE
from distinit_plugin.errors import UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Curve = dict[float, float]
"""Epoch (fractions between epochs) → value. A later line for the same moment replaces the earlier (resumed runs)."""

_DOTS_UP_TO = 60
_LOG_RANGE = 20  # a learning rate that falls by more than this is drawn on a logarithmic scale
_INCHES_A_LETTER = 0.08  # of a legend


@dataclass
class RunCurves:
    """What a run logged over its epochs: losses in nats or the loss's own unit, accuracies in percent."""

    train_loss: Curve = field(default_factory=dict)
    train_top1: Curve = field(default_factory=dict)
    val_loss: Curve = field(default_factory=dict)
    val_top1: Curve = field(default_factory=dict)
    val_map: Curve = field(default_factory=dict)
    lr: Curve = field(default_factory=dict)


def read_curves(folder: str | Path) -> RunCurves:
    """Read ``stdout.log`` (steps and epochs) or, where it is missing, ``json_stats.log`` (epochs) of a run.

    The run may be one of PySlowFast.

    Raises:
        UserError: Neither file exists or neither has a line of training or validation.
    """
    curves = curves_of(read_log(folder))
    if curves is None:
        raise UserError(
            f"{folder} has no curves: there is no '{JSON_PREFIX.strip()}' line in its {JSON_FILE} or {LOG_FILE}. Name "
            "the OUTPUT_DIR of a run that has trained."
        )
    return curves


def curves_of(lines: Sequence[LogLine]) -> RunCurves | None:
    """The curves in the lines of ``read_log``; ``None``: none of them is of training or validation."""
    curves = RunCurves()
    # AVA's lines of PySlowFast do not say how many steps an epoch has: as many as were seen of the longest one.
    longest = max((line.step for line in lines if line.kind == "train_iter"), default=0)
    for line in lines:
        _take(curves, line, longest)
    return curves if any((curves.train_loss, curves.val_loss, curves.val_top1, curves.val_map)) else None


def _take(curves: RunCurves, line: LogLine, longest: int) -> None:
    """Add one line of a log."""
    epoch, values = line.epoch, line.values
    if line.kind == "train_iter":
        steps = line.steps or longest
        if steps:
            moment = epoch - 1 + line.step / steps
            _put(curves.train_loss, moment, values.get("loss"))
            _put(curves.train_top1, moment, _accuracy(values))
            _put(curves.lr, moment, values.get("lr"))
    elif line.kind == "train_epoch":
        # An epoch's mean is drawn only where there are no steps: the two differ and would make a saw.
        if not any(epoch - 1 < other < epoch for other in curves.train_loss):
            _put(curves.train_loss, epoch, values.get("loss"))
            _put(curves.train_top1, epoch, _accuracy(values))
        _put(curves.lr, epoch, values.get("lr"))
    elif line.kind == "val_epoch":
        _put(curves.val_loss, epoch, values.get("loss"))
        _put(curves.val_map, epoch, 100 * values["map"] if "map" in values else None)
        _put(curves.val_top1, epoch, _accuracy(values))


def _accuracy(values: Mapping[str, float]) -> float | None:
    """Top-1 in percent."""
    return 100 - values["top1_err"] if "top1_err" in values else None


def _put(curve: Curve, moment: float, value: float | None) -> None:
    if value is not None:
        curve[float(moment)] = value


def plot_curves(runs: Mapping[str, str | Path], output: str | Path) -> None:
    """Draw training loss, validation and learning rate of runs against epochs.

    Args:
        runs: Name in the legend → OUTPUT_DIR of the run.
        output: The PNG to write.

    Raises:
        UserError: A run has no curves, or ``output`` cannot be written.
    """
    save_figure(draw_curves({name: read_curves(folder) for name, folder in runs.items()}), output)


def curve_rows(curves: Mapping[str, RunCurves]) -> list[list[Any]]:
    """A header, and a row for each point of each curve: run, what it is of, epoch, value."""
    rows: list[list[Any]] = [["run", "curve", "epoch", "value"]]
    for name, run in curves.items():
        for curve in fields(run):
            rows += [[name, curve.name, *point] for point in sorted(getattr(run, curve.name).items())]
    return rows


def draw_curves(curves: Mapping[str, RunCurves]) -> Figure:
    """The picture of ``plot_curves``, from what is read already."""
    panels = [("training loss", "train_loss")]
    if any(run.train_top1 for run in curves.values()):
        panels.append(("training top-1 (%)", "train_top1"))
    if any(run.val_loss for run in curves.values()):
        panels.append(("validation loss", "val_loss"))
    if any(run.val_top1 for run in curves.values()):
        panels.append(("validation top-1 (%)", "val_top1"))
    if any(run.val_map for run in curves.values()):
        panels.append(("validation frame-mAP (%)", "val_map"))
    panels.append(("learning rate", "lr"))
    columns = 2 if len(panels) == 4 else min(len(panels), 3)
    lines = -(-len(panels) // columns)
    figure = new_figure(4.8 * columns, 3.4 * lines + 0.4)
    axes = figure.subplots(lines, columns, squeeze=False).flatten()
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    for axis, (label, attribute) in zip(axes, panels, strict=False):
        _draw(axis, label, {name: getattr(run, attribute) for name, run in curves.items()})
    if len(curves) > 1:
        handles, names = axes[0].get_legend_handles_labels()
        fitting = int(4.8 * columns / (_INCHES_A_LETTER * max(map(len, names)) + 0.6))
        across = max(1, min(4, len(names), fitting))
        figure.legend(handles, names, loc="outside lower center", ncols=across, frameon=False)
    else:
        figure.suptitle(shown(next(iter(curves))), fontsize=11)
    return figure


def _draw(axis: Axes, label: str, curves: Mapping[str, Curve]) -> None:
    from matplotlib.ticker import MaxNLocator

    for place, (name, curve) in enumerate(curves.items()):
        moments = sorted(curve)
        # A legend needs an entry for every run, also in a panel for which the run has no points.
        axis.plot(
            moments,
            [curve[moment] for moment in moments],
            label=shown(name),
            color=COLOURS[place % len(COLOURS)],
            linestyle="-" if place < len(COLOURS) else "--",
            marker="o" if len(moments) <= _DOTS_UP_TO else None,
            markersize=3,
            linewidth=1.5,
        )
    axis.set_xlabel("epoch")
    axis.set_ylabel(label)
    last = max((max(curve) for curve in curves.values() if curve), default=0.0)
    axis.xaxis.set_major_locator(MaxNLocator(nbins=6, min_n_ticks=1, integer=last >= 2))
    values = [value for curve in curves.values() for value in curve.values()]
    if label == "learning rate" and min(values, default=0.0) > 0 and max(values) > _LOG_RANGE * min(values):
        axis.set_yscale("log")
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
