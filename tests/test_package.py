"""The wheel in a fresh environment: the command works from another folder, with every shipped YAML file."""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest
from small_jobs import write_corpus

ROOT = Path(__file__).resolve().parents[1]
SHIPPED = "distinit_plugin/shipped/configs"


def _run(*words: str | Path, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}
    return subprocess.run(
        [str(word) for word in words], cwd=folder, env=kept | environment, capture_output=True, text=True, timeout=240
    )


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy of the sources, so that the checkout stays clean."""
    pytest.importorskip("build")
    source, output = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("distinit_plugin", "configs"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    done = _run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", output, source, folder=source)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = output.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def environment(wheel, tmp_path_factory) -> Path:
    """``bin`` of a new environment with the wheel.

    Its other packages are those of this environment, seen through a path file; what this environment knows by path
    files of its own (an editable installation of the checkout) is thereby not seen.
    """
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False, symlinks=True)
    scripts = folder / "bin"
    python = scripts / "python"
    here = _run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", folder=folder).stdout.strip()
    others = dict.fromkeys([sysconfig.get_path("purelib"), sysconfig.get_path("platlib")])
    Path(here, "dependencies.pth").write_text("".join(f"{other}\n" for other in others))
    nothing = _run(python, "-c", "import torch, distinit_plugin", folder=folder)
    assert "No module named 'distinit_plugin'" in nothing.stderr
    options = ("--no-deps", "--no-index", "--disable-pip-version-check", "--quiet")
    done = _run(sys.executable, "-m", "pip", "--python", python, "install", *options, wheel, folder=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return scripts


def test_wheel_holds_every_config_and_nothing_else_of_the_checkout(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    configs = {f"{SHIPPED}/{path.relative_to(ROOT / 'configs')}" for path in (ROOT / "configs").rglob("*.yaml")}
    assert len(configs) > 30
    assert {name for name in names if name.endswith(".yaml")} == configs
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "distinit_plugin").rglob("*.py")}
    assert {name for name in names if name.endswith(".py")} == modules
    pages = {"analysis/published.csv", "analysis/assets/page.css", "analysis/assets/page.js"}
    assert {f"distinit_plugin/{name}" for name in pages} <= names
    assert any(name.endswith("LICENSE") for name in names)
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"distinit_plugin"}


def test_command_answers_from_another_folder(environment, tmp_path):
    done = _run(environment / "distinit", "--help", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    for verb in ("run", "run-splits", "predict", "probe", "check-corpus", "plot-curves", "quickstart", "demo-d3d"):
        assert verb in done.stdout
    program = (
        "import distinit_plugin, distinit_plugin.config.load as c; print(distinit_plugin.__file__, c.shipped_folder())"
    )
    done = _run(environment / "python", "-c", program, folder=tmp_path)
    module, configs = done.stdout.split()
    assert Path(module).is_relative_to(environment.parent)
    assert Path(configs).is_relative_to(environment.parent)


def test_shipped_config_starts_from_another_folder(environment, tmp_path):
    """A tiny version of a shipped pre-training: the sizes, the videos and the teacher's weights are overridden."""
    for path in sorted(write_corpus(tmp_path / "videos", 2).rglob("*.mp4")):
        for number in range(100):  # an epoch of a million clips of four videos would be 250,000 passes to shuffle
            os.link(path, path.with_name(f"{path.stem}_{number}.mp4"))
    small = {
        "CORPUS.TRAIN.KINETICS.PATH": tmp_path / "videos",
        "DISTILL.TEACHERS.IMAGENET.ARCH": "torchvision/resnet18",
        "DISTILL.TEACHERS.IMAGENET.WEIGHTS": "random",
        "DISTILL.TEACHERS.IMAGENET.CROP_SIZE": 32,
        "NETWORK.WIDTH": 8,
        "DATA.NUM_FRAMES": 4,
        "DATA.TRAIN_CROP_SIZE": 32,
        "DATA.TRAIN_JITTER_SCALES": "[36,40]",
        "DATA_LOADER.NUM_WORKERS": 0,
        "TRAIN.BATCH_SIZE": 2,
        "NUM_GPUS": 0,
        "RUNNER.ACCUMULATE": 1,
        "RUNNER.CHECK_CONVOLUTIONS": False,
        "RUNNER.PRECISION": "fp32",
    }
    words = [word for pair in small.items() for word in pair]
    config = "configs/DistInit/table2_random_pretrain.yaml"
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    done = _run(
        environment / "distinit", "run", "--cfg", config, "--dry-run", "--opts", *map(str, words),
        folder=folder, OMP_NUM_THREADS="1", XDG_CACHE_HOME=str(tmp_path / "cache"),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "GMACs" in done.stdout
    assert "22500000 steps of 2 clips" in done.stdout  # 45 epochs of a million clips, as shipped
    assert list(folder.iterdir()) == []
