"""Where a picture and its numbers go: PNG, CSV and JSON of one name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distinit_plugin.engine.figures import save_figure
from distinit_plugin.errors import UserError
from distinit_plugin.files import write_csv, write_json

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def check_output(output: Path) -> None:
    """Refuse what is no name of a PNG, before anything is computed.

    Raises:
        UserError: It is none.
    """
    if output.suffix.lower() != ".png":
        raise UserError(f"--output {output}: pictures are written as .png, with .csv and .json beside. Name FILE.png.")


def write_numbers(output: Path, numbers: Mapping[str, Any], rows: Sequence[Sequence[Any]]) -> None:
    """The numbers of a picture beside it, all of them as JSON, the table (header first) as CSV."""
    write_json(output.with_suffix(".json"), numbers)
    write_csv(output.with_suffix(".csv"), rows)


def write_picture(output: Path, figure: Figure, numbers: Mapping[str, Any], rows: Sequence[Sequence[Any]]) -> None:
    """A picture with its numbers; each file is whole or not there.

    Raises:
        UserError: They cannot be written.
    """
    save_figure(figure, output)
    write_numbers(output, numbers, rows)
