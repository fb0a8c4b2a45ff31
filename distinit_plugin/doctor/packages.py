"""Python packages: their versions, whether they can be imported, and what the absent ones are for."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import sys
from collections.abc import Iterable
from typing import Any, NamedTuple

from distinit_plugin.doctor.findings import Finding, State, first_line

DISTRIBUTION = "distinit-plugin"


class Package(NamedTuple):
    """Something that this package imports.

    Attributes:
        module: Its name in Python.
        purpose: What it is for, where it is optional.
    """

    module: str
    purpose: str = ""


PACKAGES = {
    "torch": Package("torch"),
    "torchvision": Package("torchvision"),
    "numpy": Package("numpy"),
    "pillow": Package("PIL"),
    "av": Package("av"),
    "fvcore": Package("fvcore"),
    "iopath": Package("iopath"),
    "yacs": Package("yacs"),
    "pyyaml": Package("yaml"),
    "simplejson": Package("simplejson"),
    "rich": Package("rich"),
    "matplotlib": Package("matplotlib"),
    "scikit-learn": Package("sklearn"),
    "timm": Package("timm", "teachers and initial weights by the name timm/…"),
    "pytorchvideo": Package("pytorchvideo", "networks by the name pytorchvideo/…, and PySlowFast"),
    "opencv-contrib-python-headless": Package("cv2", "OpenCV's optical flow (dual_tvl1, dis_medium), and PySlowFast"),
    "tensorboard": Package("tensorboard", "TENSORBOARD.ENABLE, and PySlowFast"),
    "safetensors": Package("safetensors", "weights in files of that kind"),
    "pyarrow": Package("pyarrow", "extract-features --format parquet"),
    "onnx": Package("onnx", "export to ONNX"),
    "onnxscript": Package("onnxscript", "export to ONNX"),
    "onnxruntime": Package("onnxruntime", "the check of what was exported to ONNX"),
    "pandas": Package("pandas", "PySlowFast"),
    "psutil": Package("psutil", "PySlowFast"),
    "scipy": Package("scipy", "PySlowFast"),
}
"""All that ``setup.py`` asks for (development aside), needed packages first."""


class Demand(NamedTuple):
    """What this package's metadata asks for.

    Attributes:
        versions: ``>=2.6,!=2.13.0``; empty: any.
        extra: The extra that brings it; empty: it is needed.
    """

    versions: str
    extra: str


def demands() -> dict[str, Demand]:
    """Distribution → what is asked of it; empty: this package is not installed."""
    try:
        return demands_of(importlib.metadata.requires(DISTRIBUTION) or [])
    except ImportError:  # PackageNotFoundError is one
        return {}


def demands_of(lines: Iterable[str]) -> dict[str, Demand]:
    """Lines such as ``timm>=1.0; extra == "timm"`` → what is asked, of the smallest extra that has the distribution."""
    from packaging.requirements import Requirement

    sizes: dict[str, int] = {}
    found: dict[str, list[Demand]] = {}
    for line in lines:
        asked = Requirement(line)
        extra = "" if asked.marker is None else str(asked.marker).rpartition("extra ==")[2].strip(" \"'")
        sizes[extra] = sizes.get(extra, 0) + 1
        found.setdefault(asked.name.lower(), []).append(Demand(str(asked.specifier), extra))
    return {
        name: min(some, key=lambda demand: (bool(demand.extra), sizes[demand.extra])) for name, some in found.items()
    }


def look_at_python() -> list[Finding]:
    """The interpreter and this package."""
    from distinit_plugin.version import __version__

    python = ".".join(map(str, sys.version_info[:3]))
    own = Finding(DISTRIBUTION, "works", __version__)
    if not demands():
        own = Finding(
            DISTRIBUTION,
            "note",
            f"{__version__}, not installed",
            "Install the folder that you run: pip install -e '.[all]'.",
        )
    return [Finding("python", "works", f"{python}, {sys.executable}"), own]


def look_at_package(name: str) -> list[Finding]:
    """One of ``PACKAGES``, imported for real."""
    package = PACKAGES[name]
    demand = demands().get(name, Demand("", ""))
    what = f"pip install '{DISTRIBUTION}[{demand.extra}]'" if demand.extra else f"pip install '{name}{demand.versions}'"
    if importlib.util.find_spec(package.module) is None:
        if not package.purpose:
            return [Finding(name, "broken", "not installed", f"Install it: {what}.")]
        return [Finding(name, "absent", f"for {package.purpose}", f"If you want that: {what}.")]
    try:
        module = importlib.import_module(package.module)
    except Exception as error:
        again = f"pip install --force-reinstall '{name}{demand.versions}'"
        return [Finding(name, "broken", first_line(error), f"Its installation is damaged or does not fit: {again}.")]
    version = _version(name, module)
    if demand.versions and not _fits(version, demand.versions):
        state: State = "note" if package.purpose else "broken"
        text = f"{version}, but {demand.versions} is asked for"
        return [Finding(name, state, text, f"Install that: pip install '{name}{demand.versions}'.")]
    return [_detailed(name, version, module)]


def _version(name: str, module: Any) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:  # another distribution has the module, such as opencv-python
        return str(getattr(module, "__version__", "unknown"))


def _fits(version: str, versions: str) -> bool:
    from packaging.specifiers import SpecifierSet
    from packaging.version import InvalidVersion, Version

    try:
        return SpecifierSet(versions).contains(Version(version), prereleases=True)
    except InvalidVersion:
        return True


def _detailed(name: str, version: str, module: Any) -> Finding:
    """What else is worth knowing of a package that works."""
    if name == "torch":
        return Finding(
            name,
            "works",
            f"{module.__version__}, " + (f"CUDA {module.version.cuda}" if module.version.cuda else "for CPUs"),
        )
    if name == "av":
        return Finding(name, "works", f"{version}, FFmpeg {getattr(module, 'ffmpeg_version_info', 'unknown')}")
    if name == "opencv-contrib-python-headless" and not hasattr(module, "optflow"):
        return Finding(
            name,
            "note",
            f"{version}, without its contributed modules",
            f"dual_tvl1 and PySlowFast want them: pip uninstall opencv-python, then pip install {name}.",
        )
    return Finding(name, "works", version)
