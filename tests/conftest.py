import gc
import os
from pathlib import Path

import pytest
import torch
from small_jobs import only_read_curves, write_videos

from distinit_plugin.cli import FILE_COLUMNS
from distinit_plugin.demos.persons import PersonData, make_persons
from distinit_plugin.engine.curves import plot_curves
from distinit_plugin.jobs import running


@pytest.fixture(scope="session", autouse=True)
def _numerics():
    """One thread per test process (pytest-xdist runs several), and no slow denormals."""
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)


@pytest.fixture(scope="session", autouse=True)
def _width_of_files():
    """What programs print has the width that it has in a file, whichever test comes first."""
    os.environ["COLUMNS"] = FILE_COLUMNS


@pytest.fixture(scope="module", autouse=True)
def _quick_collections():
    """The loader collects garbage before each epoch; it must not look through a million imported objects every time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _few_pictures():
    """Curves are only read, in forked processes too, unless a test has ``drawn_curves``."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(running, "plot_curves", only_read_curves)
        yield


@pytest.fixture
def drawn_curves(monkeypatch):
    """Runs of this process draw their curves."""
    monkeypatch.setattr(running, "plot_curves", plot_curves)


@pytest.fixture(scope="session")
def assets() -> Path:
    """The folder of real files."""
    folder = os.environ.get("DISTINIT_TEST_ASSETS")
    if not folder:
        pytest.skip("DISTINIT_TEST_ASSETS is not set: no real files")
    return Path(folder)


@pytest.fixture(scope="session")
def videos(tmp_path_factory) -> Path:
    """The small corpora of ``write_videos``; no test may change them."""
    return write_videos(tmp_path_factory.mktemp("videos"))


@pytest.fixture(scope="session")
def persons(tmp_path_factory) -> PersonData:
    """A small set in AVA's form, as videos and as extracted frames; no test may change it."""
    folder = tmp_path_factory.mktemp("persons")
    return make_persons(folder, num_train=3, num_test=2, num_keyframes=4, height=64, width=96, extract=True)


def pytest_unconfigure():
    """Undo ``_quick_collections``: extension modules look at the end for what was not freed."""
    gc.unfreeze()


SLOWEST_FIRST = (
    "test_resuming",
    "test_launch",
    "test_convolution_sweep",
    "test_runs_formats",
    "test_bad_machines",
    "test_runs_ranks",
    "test_ranks_exact",
    "test_benchmark_scripts",
    "test_package",
    "test_models",
    "test_soak",
    "test_demo_d3d",
    "test_model_parity",
    "test_export",
    "test_runs_networks",
    "test_runs_d3d",
    "test_teachers",
    "test_cached_targets",
    "test_real_videos",
    "test_study",
    "test_visualize",
)
"""Files that keep a process busy for long: begun last, they would leave the others idle."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The slowest files first (``--no-loadscope-reorder`` keeps pytest-xdist from changing that)."""

    def place(item: pytest.Item) -> int:
        return SLOWEST_FIRST.index(item.path.stem) if item.path.stem in SLOWEST_FIRST else len(SLOWEST_FIRST)

    items.sort(key=place)
