"""What was found out about motion in features: tables, files, and the plot over end-points (D3D, figure 4)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from distinit_plugin.engine.figures import COLOURS, label, new_figure, save_figure
from distinit_plugin.engine.motion import CONTROLS, ControlErrors, LayerMotion
from distinit_plugin.errors import UserError, shown
from distinit_plugin.files import read_json, write_csv, write_json

if TYPE_CHECKING:
    from matplotlib.figure import Figure

JSON_FILE, CSV_FILE, PLOT_FILE = "motion.json", "motion.csv", "motion.png"
PICTURES_FILE, SAMPLES_FILE = "motion_flow.png", "motion_flow.npz"
_MAX_BYTES = 64 * 1024**2
_MOST_PIXELS = 1e9

EXPECTED = {
    "still": "nothing moves: close to 0 against its own flow; low against the original's, motion is guessed from looks",
    "reversed": "as good as the clip itself against its own flow; against the original's about twice the magnitude",
    "shuffled": "no better than all zeros against the original's flow; its own is large and hardly to be predicted",
}
"""Control → what a decoder shows that reads motion and nothing else."""


@dataclass(frozen=True)
class MotionCurve:
    """The errors of one network, by layer.

    Attributes:
        name: In tables and legends.
        layers: In the order of the network.
    """

    name: str
    layers: list[LayerMotion]

    def epe(self, layer: str) -> float:
        """The end-point error of one layer, by the name that it was asked for."""
        return next(found.epe for found in self.layers if found.layer == layer)


def error_table(curves: Sequence[MotionCurve]) -> Table:
    """Layers of the networks under what no motion at all would err by on each grid; pixels."""
    table = Table(title="end-point error of decoded flow, pixels", title_justify="left")
    table.add_column("features")
    for column in ("grid", "EPE", "all zeros", "EPE / zeros"):
        table.add_column(column, justify="right")
    seen: set[tuple[int, int, int]] = set()
    for curve in curves:
        for layer in curve.layers:
            if layer.grid not in seen:
                seen.add(layer.grid)
                table.add_row("all zeros", _times(layer.grid), _number(layer.zeros), _number(layer.zeros), "1.00")
    for curve in curves:
        for layer in curve.layers:
            ratio = layer.epe / layer.zeros if layer.zeros else math.nan
            numbers = (_number(layer.epe), _number(layer.zeros), _number(ratio, 2))
            table.add_row(f"{curve.name}, {layer.layer}", _times(layer.grid), *numbers)
    return table


def control_table(curve: MotionCurve) -> Table:
    """The errors on changed clips: against the changed clip's flow, its magnitude, and against the original's flow."""
    table = Table(title=f"controls, {curve.name}, pixels", title_justify="left")
    table.add_column("features")
    table.add_column("clip")
    for column in ("EPE to its own flow", "all zeros", "EPE to the original's"):
        table.add_column(column, justify="right")
    for layer in curve.layers:
        table.add_row(layer.layer, "as it is", *map(_number, (layer.epe, layer.zeros, layer.epe)))
        for name, errors in layer.controls.items():
            table.add_row(layer.layer, name, *map(_number, errors))
    return table


def write_report(folder: Path, curves: Sequence[MotionCurve], settings: dict[str, Any]) -> None:
    """``motion.json`` and ``motion.csv``; the first curve is the one that ``read_curve`` gives back."""
    write_json(folder / JSON_FILE, {"settings": settings, "curves": [asdict(curve) for curve in curves]})
    write_csv(folder / CSV_FILE, motion_rows(curves))


def motion_rows(curves: Sequence[MotionCurve]) -> list[list[Any]]:
    """A header, and a row for each layer of each network; what is not known stays empty."""
    kinds = [f"{name}_{kind}" for name in CONTROLS for kind in ControlErrors._fields]
    rows: list[list[Any]] = [["network", "layer", "frames", "height", "width", "epe", "zeros", *kinds]]
    for curve in curves:
        for layer in curve.layers:
            changes = [value for name in CONTROLS for value in layer.controls.get(name, [math.nan] * 3)]
            numbers = ["" if math.isnan(value) else f"{value:.6g}" for value in (layer.epe, layer.zeros, *changes)]
            rows.append([curve.name, layer.layer, *layer.grid, *numbers])
    return rows


def read_curve(folder: str | Path) -> MotionCurve:
    """The network's curve that ``write_report`` left in a folder.

    Raises:
        UserError: There is none.
    """
    return read_networks(folder)[0]


def read_networks(folder: str | Path) -> list[MotionCurve]:
    """All curves that ``write_report`` left in a folder, at least one; without those of controls.

    Raises:
        UserError: There are none.
    """
    path = Path(folder) / JSON_FILE
    try:
        curves = [_curve(found) for found in read_json(path, _MAX_BYTES)["curves"]]
        curves[0]
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}). Name the folder of a probe of motion.") from error
    except (ValueError, LookupError, TypeError, ArithmeticError, RecursionError) as error:
        raise UserError(
            f"{path} is no result of a probe of motion ({shown(str(error))}). Name another folder."
        ) from error
    return curves


def _curve(found: Any) -> MotionCurve:
    layers = []
    for layer in found["layers"]:
        frames, height, width = (int(size) for size in layer["grid"])
        epe, zeros, magnitude = (
            math.nan if layer[key] is None else float(layer[key]) for key in ("epe", "zeros", "magnitude")
        )
        if any(value > _MOST_PIXELS for value in (epe, zeros, magnitude)):
            raise ValueError("an error that no picture has")
        layers.append(LayerMotion(str(layer["layer"]), (frames, height, width), epe, zeros, magnitude))
    if not layers:
        raise ValueError("a network without layers")
    return MotionCurve(str(found["name"]), layers)


def plot_motion(curves: Sequence[MotionCurve], output: Path) -> None:
    """``draw_motion`` as a PNG.

    Raises:
        UserError: ``output`` cannot be written.
    """
    save_figure(draw_motion(curves), output)


def draw_motion(curves: Sequence[MotionCurve]) -> Figure:
    """End-point error over end-points, a line for each network, and what no motion at all would err by."""
    names = list(dict.fromkeys(layer.layer for curve in curves for layer in curve.layers))
    figure = new_figure(1.6 + 0.62 * max(len(names), 6), 4.0)
    axis = figure.subplots()
    zeros = {layer.layer: layer.zeros for curve in reversed(curves) for layer in curve.layers}
    lengths = [zeros[name] for name in names]
    axis.plot(range(len(names)), lengths, color="0.55", linestyle="--", marker="_", label="all zeros")
    for place, curve in enumerate(curves):
        axis.plot(
            [names.index(layer.layer) for layer in curve.layers],
            [layer.epe for layer in curve.layers],
            label=label(curve.name),
            color=COLOURS[place % len(COLOURS)],
            marker="o",
            markersize=4,
            linewidth=1.5,
        )
    axis.set_xticks(range(len(names)), [label(name) for name in names], rotation=45 if max(map(len, names)) > 3 else 0)
    axis.set_xlabel("features")
    axis.set_ylabel("end-point error (pixels)")
    errors = [*zeros.values(), *(layer.epe for curve in curves for layer in curve.layers)]
    axis.set_ylim(0, 1.1 * max([error for error in errors if math.isfinite(error)], default=1.0) or 1.0)
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=min(3, len(curves) + 1), frameon=False)
    return figure


def _number(value: float, digits: int = 3) -> str:
    return "–" if math.isnan(value) else f"{value:.{digits}f}"


def _times(sizes: tuple[int, ...]) -> str:
    return "×".join(str(size) for size in sizes)
