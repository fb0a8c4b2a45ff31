"""Where PySlowFast is on this machine."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

from distinit_plugin.errors import UserError

ROOT_VARIABLE = "PYSLOWFAST_ROOT"

WHERE_TO_GET_IT = (
    f"Clone https://github.com/facebookresearch/SlowFast and set {ROOT_VARIABLE} to that folder; nothing has to be "
    "installed or built there."
)

NEEDED = ("slowfast/config/defaults.py", "slowfast/models/build.py", "slowfast/datasets/build.py", "tools/run_net.py")
"""Files by which a checkout is known."""

OF_2020 = "models/model_builder.py"
"""Below the package: the release 1.0 in package registries has it, later trees have ``models/build.py`` instead."""

PACKAGES = {
    "pytorchvideo": "pytorchvideo==0.1.5",
    "cv2": "opencv-contrib-python-headless",
    "pandas": "pandas",
    "psutil": "psutil",
    "scipy": "scipy",
    "sklearn": "scikit-learn",
    "simplejson": "simplejson",
    "tensorboard": "tensorboard",
}
"""Module → what to install, of all that PySlowFast imports at its start and this package does without."""


def find_checkout() -> Path:
    """The folder of the checkout: ``PYSLOWFAST_ROOT``, else where the importable ``slowfast`` lies.

    Raises:
        UserError: There is none, the folder is no checkout, or it is the package of 2020.
    """
    given = os.environ.get(ROOT_VARIABLE, "")
    if given:
        root = Path(given).expanduser().resolve()
        if not root.is_dir():
            raise UserError(f"{ROOT_VARIABLE} is {given}, which is not a folder. {WHERE_TO_GET_IT}")
        return _checked(root, f"{ROOT_VARIABLE} is {given}, which")
    spec = importlib.util.find_spec("slowfast")
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"PySlowFast is not here: {ROOT_VARIABLE} is not set. {WHERE_TO_GET_IT}")
    package = Path(next(iter(spec.submodule_search_locations))).resolve()
    return _checked(package.parent, f"the importable package slowfast ({package})")


def _checked(root: Path, what: str) -> Path:
    if (root / "slowfast" / OF_2020).is_file() and not (root / NEEDED[1]).is_file():
        raise UserError(
            f"{what} is release 1.0 of slowfast, of January 2020, which has no registries to plug into. "
            f"{WHERE_TO_GET_IT}"
        )
    missing = [name for name in NEEDED if not (root / name).is_file()]
    if missing:
        raise UserError(f"{what} is no checkout of PySlowFast: {', '.join(missing)} is missing. {WHERE_TO_GET_IT}")
    return root


def check_packages() -> None:
    """Raise :class:`UserError` that names everything PySlowFast imports and this machine lacks."""
    missing = [package for module, package in PACKAGES.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise UserError(
            f"PySlowFast imports packages that are not installed: pip install {' '.join(missing)} (or "
            "'distinit-plugin[slowfast]', which has all of them)."
        )
