"""Data of this program that a study may ask for, so that one command does everything."""

from __future__ import annotations

from collections.abc import Callable

from distinit_plugin.demos import digits, motions, shifted
from distinit_plugin.errors import naming
from distinit_plugin.studies.spec import Data

_MODULES = {"digits": digits, "motions": motions, "shifted_motions": shifted}
_MAKE: dict[str, Callable[[str], object]] = {
    "digits": digits.make_digits,
    "motions": motions.make_motions,
    "shifted_motions": shifted.make_shifted,
}


def make_data(data: Data) -> None:
    """Write the data, or leave them as they are when they are there.

    Raises:
        UserError: The folder holds other files, or the videos cannot be encoded.
    """
    with naming("DATA.FOLDER"):
        _MAKE[data.maker](data.folder)


def version_of(data: Data | None) -> str:
    """Changes when the data do; empty without data."""
    return "" if data is None else f"{data.maker} {_MODULES[data.maker].LAYOUT_VERSION}"
