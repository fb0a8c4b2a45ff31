import os
from pathlib import Path

import pytest
import torch
from small_jobs import write_videos


@pytest.fixture(scope="session", autouse=True)
def _numerics():
    """One thread per test process (pytest-xdist runs several), and no slow denormals."""
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)


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
