"""``distinit doctor``: what it finds, what it says, and that a crash of what it looks at is only a finding."""

import io
import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
import setuptools
import torch
from small_jobs import small_settings

from distinit_plugin import cli
from distinit_plugin.doctor import configuration, machine, media, packages, pyslowfast, pytorchvideo, report
from distinit_plugin.doctor.findings import Finding, Section, is_usable
from distinit_plugin.doctor.report import Check, all_checks, run_check, run_checks, table_of
from distinit_plugin.hosts.slowfast import boot, checkout, patches
from distinit_plugin.models import conv

ROOT = Path(__file__).resolve().parents[1]


def states(findings):
    return {finding.name: finding.state for finding in findings}


# ---------------------------------------------------------------------------------------------- packages


def test_every_package_that_is_asked_for_is_looked_at(monkeypatch):
    given = {}
    monkeypatch.setattr(setuptools, "setup", given.update)
    runpy.run_path(str(ROOT / "setup.py"))
    extras = [f'{line}; extra == "{name}"' for name, lines in given["extras_require"].items() for line in lines]
    asked = packages.demands_of([*given["install_requires"], *extras])
    assert {name for name, demand in asked.items() if demand.extra != "dev"} == set(packages.PACKAGES)
    needed = {name for name, demand in asked.items() if not demand.extra}
    assert needed == {name for name, package in packages.PACKAGES.items() if not package.purpose}
    assert asked["timm"].extra == "timm"  # not "all"
    assert asked["torch"].versions


@pytest.fixture
def fake(monkeypatch, tmp_path):
    """A distribution ``fake`` in place of all; ``fake(purpose, versions, text)`` writes its module and looks at it."""

    def look(purpose="", versions="", text=None):
        monkeypatch.setattr(packages, "PACKAGES", {"fake": packages.Package("fake_module", purpose)})
        demand = packages.Demand(versions, "extra" if purpose else "")
        monkeypatch.setattr(packages, "demands", lambda: {"fake": demand})
        if text is not None:
            (tmp_path / "fake_module.py").write_text(text)
        monkeypatch.setattr(
            sys, "dont_write_bytecode", True
        )  # it would be taken for that of another text of that second
        monkeypatch.syspath_prepend(str(tmp_path))
        monkeypatch.delitem(sys.modules, "fake_module", raising=False)
        (found,) = packages.look_at_package("fake")
        return found

    return look


def test_absent_packages_say_what_they_are_for(fake):
    found = fake("fun")
    assert (found.state, found.text) == ("absent", "for fun")
    assert "pip install 'distinit-plugin[extra]'" in found.advice
    found = fake(versions=">=2")
    assert found.state == "broken"
    assert "pip install 'fake>=2'" in found.advice


def test_packages_that_cannot_be_imported_are_broken(fake):
    found = fake("fun", text="raise ImportError('libfun.so: cannot open')")
    assert found.state == "broken"
    assert found.text == "ImportError: libfun.so: cannot open"


@pytest.mark.parametrize(("purpose", "state"), [("", "broken"), ("fun", "note")])
def test_versions_are_compared(fake, purpose, state):
    assert fake(purpose, ">=2", "__version__ = '1.9'").state == state
    assert fake(purpose, ">=2", "__version__ = '2.1'").state == "works"


# ---------------------------------------------------------------------------------------------- machine


def test_the_processor_and_its_numbers(monkeypatch):
    assert {"processor", "threads", "precision", "memory"} <= states(machine.look_at_cpu()).keys()
    monkeypatch.setattr(torch, "get_num_threads", lambda: 10_000)
    assert states(machine.look_at_cpu())["threads"] == "note"


def test_wrong_convolutions_are_told(monkeypatch):
    found = machine.look_at_convolutions("cpu", width=2, size=16)
    assert found.state in ("works", "note")
    assert "convolutions" in found.text
    wrong = SimpleNamespace(repaired=[1, 2], verdicts=[1, 2, 3])
    monkeypatch.setattr(conv, "check_convolutions", lambda *_, **__: wrong)
    found = machine.look_at_convolutions("cpu", width=2, size=16)
    assert (found.state, found.text) == ("note", "wrong in 4 of 6 convolutions, with this torch")


def test_a_gpu_that_torch_cannot_use(monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "GPU_FILES", f"{tmp_path}/nvidia[0-9]*")
    assert machine._no_gpu("13.2").state == "absent"
    (tmp_path / "nvidia0").touch()
    assert machine._no_gpu(None).state == "note"
    found = machine._no_gpu("13.2")
    assert found.state == "broken"
    assert "driver" in found.advice


def test_gpus_must_compute(monkeypatch):
    facts = SimpleNamespace(name="Tiny", total_memory=2**33, major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda number: facts)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    monkeypatch.setattr(machine, "look_at_convolutions", lambda device: Finding(device, "works"))
    compute = machine._compute
    monkeypatch.setattr(machine, "_compute", lambda device: compute("cpu"))
    found = machine.look_at_gpus()
    assert states(found) == {"GPU 0": "works", "cuda": "works", "GPU 1": "works"}
    assert found[0].text == "Tiny, 8 GiB, compute capability 9.0, bf16"

    def no_kernel(device):
        raise RuntimeError("CUDA error: no kernel image is available")

    monkeypatch.setattr(machine, "_compute", no_kernel)
    assert states(machine.look_at_gpus()) == {"GPU 0": "broken", "GPU 1": "broken"}
    assert "NCCL" in states(machine.look_at_processes())


def test_little_room_is_told(monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "SHARED_MEMORY", tmp_path)
    free = [2**35]
    usage = type(shutil.disk_usage(tmp_path))
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda place: usage(2**36, 0, free[0]))
    monkeypatch.setattr(machine.os, "access", lambda *_: True)
    roomy = states(machine.look_at_places(str(tmp_path / "not" / "yet")))
    shared = f"shared memory ({tmp_path})"
    assert {roomy[name] for name in (shared, "output folder", "temporary files")} == {"works"}
    free[0] = 2**26
    tight = states(machine.look_at_places())
    assert {tight[name] for name in (shared, "output folder", "temporary files")} == {"note"}


# ---------------------------------------------------------------------------------------------- videos


def test_h264_is_written_read_and_compared(monkeypatch):
    (found,) = media.look_at_codec("H.264")
    assert found.state == "works", found
    monkeypatch.setattr(media, "TOLERANCE", 0.0)
    (found,) = media.look_at_codec("H.264")
    assert found.state == "broken"
    assert "decoded wrongly" in found.text


def test_codecs_without_a_decoder(monkeypatch):
    none = media.Codec("no_such", "no_such", ".mp4")
    monkeypatch.setattr(media, "CODECS", {"H.264": none, "VP9": none, "AV1": none._replace(decoder="h264")})
    assert [media.look_at_codec(name)[0].state for name in media.CODECS] == ["broken", "note", "works"]


def test_extracted_frames_are_read():
    assert states(media.look_at_images()) == {"JPEG frames": "works", "PNG frames": "works"}


# ---------------------------------------------------------------------------------------------- PySlowFast


def test_without_pyslowfast_nothing_is_broken(monkeypatch, tmp_path):
    monkeypatch.delenv(checkout.ROOT_VARIABLE, raising=False)
    find_spec = checkout.importlib.util.find_spec
    monkeypatch.setattr(
        checkout.importlib.util, "find_spec", lambda name: None if name == "slowfast" else find_spec(name)
    )
    (found,) = pyslowfast.look_at_pyslowfast()
    assert found.state == "absent"
    assert "PYSLOWFAST_ROOT" in found.text + found.advice
    monkeypatch.setenv(checkout.ROOT_VARIABLE, str(tmp_path / "nowhere"))
    (found,) = pyslowfast.look_at_pyslowfast()
    assert found.state == "broken"
    old = tmp_path / "old" / "slowfast" / checkout.OF_2020
    old.parent.mkdir(parents=True)
    old.touch()
    monkeypatch.setenv(checkout.ROOT_VARIABLE, str(tmp_path / "old"))
    assert "of January 2020" in pyslowfast.look_at_pyslowfast()[0].text


def test_patches_are_cured_not_needed_or_switched_off(monkeypatch):
    patch = patches.Patch("leak", "it leaks", lambda: True, lambda: None)
    assert pyslowfast.look_at_patch(patch, cured=True).text == "cured here: it leaks"
    assert pyslowfast.look_at_patch(patch, cured=False).text == "not needed"
    monkeypatch.setenv(patches.WITHOUT_VARIABLE, "vision, leak")
    found = pyslowfast.look_at_patch(patch, cured=False)
    assert (found.state, found.text) == ("note", "switched off, and needed: it leaks")


# ---------------------------------------------------------------------------------------------- configurations


@pytest.fixture
def theirs(tmp_path):
    """A YAML file for PySlowFast's own network, on a CPU."""
    path = tmp_path / "theirs.yaml"
    path.write_text(
        f"OUTPUT_DIR: {tmp_path}\nNUM_GPUS: 0\nMODEL: {{NUM_CLASSES: 3}}\nSOLVER: {{CLIP_GRAD_VAL: 1.0}}\n"
        "TRAIN: {ENABLE: True}\n"
    )
    return str(path)


def test_cures_and_refusals_of_a_configuration(theirs, monkeypatch):
    monkeypatch.delenv(patches.WITHOUT_VARIABLE, raising=False)
    found = configuration.look_at_configuration("", [theirs], [])
    assert {finding.state for finding in found} == {"works"}
    assert "cured by distinit slowfast; PySlowFast alone stops" in next(
        finding.text for finding in found if finding.name == "MODEL.NUM_CLASSES"
    )
    assert "SOLVER.CLIP_GRAD_VAL" in states(found)
    monkeypatch.setenv(patches.WITHOUT_VARIABLE, "few_classes")
    found = configuration.look_at_configuration("", [theirs], [])
    assert states(found)["MODEL.NUM_CLASSES"] == "broken"
    assert states(found)["SOLVER.CLIP_GRAD_VAL"] == "works"


@pytest.mark.parametrize(
    ("words", "name"),
    [
        ("MULTIGRID.LONG_CYCLE True", "MULTIGRID"),
        ("NUM_GPUS 64", "NUM_GPUS"),
        ("TRAIN.CHECKPOINT_FILE_PATH /nowhere.pyth", "TRAIN.CHECKPOINT_FILE_PATH"),
        ("DISTILL.GATE skip CORPUS.TRAIN.A.PATH /nowhere", "DISTILL.GATE"),
        ("MODEL.NUM_KLASSES 3", "--opts"),
    ],
)
def test_traps_are_named_by_their_key(theirs, words, name):
    found = configuration.look_at_configuration("slowfast", [theirs], words.split())
    assert name in {finding.name for finding in found if finding.state == "broken"}


def test_the_program_follows_from_the_network(theirs, videos, tmp_path):
    own = tmp_path / "own.yaml"
    settings = small_settings(videos, tmp_path / "run", ACTION={"LOSS_WEIGHT": 1.0})
    settings["CORPUS"]["TRAIN"]["VIDEOS"]["LABELED"] = True
    own.write_text(json.dumps(settings))
    assert states(configuration.look_at_configuration("", [str(own)], [])) == {"distinit run": "works"}
    broken = configuration.look_at_configuration("", [str(own)], ["CORPUS.TRAIN.VIDEOS.PATH", "/nowhere"])
    assert [finding.state for finding in broken] == ["broken"]
    there = configuration.look_at_configuration("slowfast", [str(own)], ["NUM_GPUS", "0"])
    assert (there[-1].name, there[-1].state) == ("distinit slowfast", "works")
    elsewhere = configuration.look_at_configuration("slowfast", [str(own)], ["CORPUS.TRAIN.VIDEOS.PATH", "/nowhere"])
    assert "CORPUS.TRAIN.VIDEOS.PATH" in {found.name for found in elsewhere if found.state == "broken"}


def test_meta_that_cannot_go_to_a_gpu():
    good = (torch.zeros(1), np.zeros(2), [[0, 902]], [torch.zeros(1)])
    assert [configuration._is_tensors(value) for value in good] == [True] * 4
    assert [configuration._is_tensors(value) for value in ("a.mp4", ["a.mp4"], {"a": 1}, None)] == [False] * 4


class Strange:
    """A dataset that somebody registered in PySlowFast."""

    meta: ClassVar[dict] = {}

    def __init__(self, cfg, split):
        pass

    def __getitem__(self, index):
        return [], 0, index, torch.zeros(1), self.meta


def test_datasets_of_others_are_asked_for_their_meta(theirs, monkeypatch):
    for name in ("slowfast", "slowfast.models", "slowfast.datasets"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    registry = ModuleType("slowfast.datasets.build")
    registry.DATASET_REGISTRY = {"Strange": Strange}
    monkeypatch.setitem(sys.modules, registry.__name__, registry)
    cfg = configuration._host_cfg([theirs], ["TRAIN.DATASET", "strange", "NUM_GPUS", "1", "TEST.ENABLE", "False"])
    Strange.meta = {"boxes": torch.zeros(1)}
    assert configuration._their_data(cfg) == []
    Strange.meta = {"boxes": torch.zeros(1), "path": "a.mp4"}
    (found,) = configuration._their_data(cfg)
    assert (found.name, found.state) == ("TRAIN.DATASET", "broken")
    assert "meta has path, which cannot go to a GPU" in found.text
    cfg.NUM_GPUS = 0
    assert configuration._their_data(cfg) == []
    cfg.TEST.ENABLE = True  # of kinetics, which this registry lacks
    assert [(found.name, found.state) for found in configuration._their_data(cfg)] == [("TEST.DATASET", "broken")]


# ---------------------------------------------------------------------------------------------- the report


def test_a_crash_is_one_finding_and_the_rest_goes_on(monkeypatch):
    def crash():
        os.kill(os.getpid(), signal.SIGKILL)

    def fail():
        raise RuntimeError("something\nlong")

    monkeypatch.setattr(packages, "crash", crash, raising=False)
    monkeypatch.setattr(packages, "fail", fail, raising=False)
    begun = []
    checks = [
        Check("One", "first", "packages:crash"),
        Check("One", "second", "packages:fail"),
        Check("Two", "third", "packages:look_at_python"),
    ]
    one, two = run_checks(checks, lambda check: begun.append(check.name))
    assert begun == ["first", "second", "third"]
    assert one.findings[0] == Finding("first", "broken", "Python crashed (SIGKILL)", one.findings[0].advice)
    assert one.findings[1].text == "RuntimeError: something"
    assert two.findings[0].state == "works"
    assert not is_usable([one, two])
    assert is_usable([two, Section("x", [Finding("y", "absent"), Finding("z", "note")])])


def test_brackets_are_no_markup():
    from rich.console import Console

    console = Console(width=100, record=True, file=io.StringIO())
    section = Section("Python", [Finding("timm", "absent", "for [bold]", "pip install 'distinit-plugin[timm]'")])
    console.print(table_of(section))
    text = console.export_text()
    assert "for [bold]" in text
    assert "→ pip install 'distinit-plugin[timm]'" in text


def test_the_command_tells_everything(monkeypatch, capsys, theirs):
    monkeypatch.setattr(report, "PACKAGES", {"numpy": packages.PACKAGES["numpy"]})
    monkeypatch.setattr(report, "CODECS", {"H.264": media.CODECS["H.264"]})
    monkeypatch.setattr(pytorchvideo, "PARTS", ("layers", "transforms"))
    monkeypatch.setenv(checkout.ROOT_VARIABLE, "/nowhere")
    assert cli.main(["doctor", "--json", "--cfg", theirs, "MODEL.NUM_CLASSES", "400"]) == cli.EXIT_USER_ERROR
    told = json.loads(capsys.readouterr().out)
    assert told["usable"] is False
    titles = ["Python", "Machine", "Videos", "PyTorchVideo", "PySlowFast", f"Configuration {theirs}"]
    assert list(told["sections"]) == titles
    broken = [f["name"] for found in told["sections"].values() for f in found if f["state"] == "broken"]
    assert broken == ["checkout"]
    ptv = {finding["name"]: finding for finding in told["sections"]["PyTorchVideo"]}
    assert ptv["pytorchvideo/x3d_xs"]["state"] == "works"
    assert all(finding["state"] != "broken" for finding in ptv.values())
    assert not any(name.startswith("pytorchvideo.transforms") for name in sys.modules)  # all of it in other processes


def test_the_table_ends_with_what_is_broken(monkeypatch, capsys):
    monkeypatch.setattr(packages, "look_at_python", lambda: [Finding("python", "works", "4.0")])
    checks = [Check("Python", "python", "packages:look_at_python")]
    assert report.print_report(checks)
    assert "Everything that is installed here works." in capsys.readouterr().out
    monkeypatch.setattr(packages, "look_at_python", lambda: [Finding("python", "broken", "2.7", "Install 3.11.")])
    assert not report.print_report(checks)
    told = capsys.readouterr().out
    assert "BROKEN" in told
    assert told.rstrip().endswith("Broken: python.")


def test_nothing_that_can_break_is_loaded_beforehand():
    program = (
        "import sys\nfrom distinit_plugin.doctor.report import all_checks\nchecks = all_checks(['a.yaml'])\n"
        "heavy = {'torch', 'numpy', 'av', 'cv2', 'fvcore'} & set(sys.modules)\n"
        "sys.exit(f'loaded: {heavy}' if heavy else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_every_check_names_a_function():
    for check in all_checks(["a.yaml"]):
        module, _, function = check.place.partition(":")
        assert hasattr(sys.modules.get(f"distinit_plugin.doctor.{module}"), function), check
    assert run_check(Check("a", "b", "packages:look_at_python"))[0].name == "python"


@pytest.mark.skipif(not os.environ.get("PYSLOWFAST_ROOT"), reason="PYSLOWFAST_ROOT is not set")
def test_with_pyslowfast_its_parts_work_and_its_traps_are_told(tmp_path):
    config = Path(os.environ["PYSLOWFAST_ROOT"]) / "configs" / "Kinetics" / "SLOW_4x16_R50.yaml"
    words = f"NUM_GPUS 0 MODEL.NUM_CLASSES 3 OUTPUT_DIR {tmp_path} TRAIN.CHECKPOINT_FILE_PATH /nowhere.pyth"
    checks = [check for check in all_checks([str(config)], words.split()) if check.title.startswith(("PyS", "Conf"))]
    host, job = run_checks(checks)
    assert is_usable([host]), host
    named = states(host.findings)
    assert {f"patch {patch.name}" for patch in boot.PATCHES} <= named.keys()
    assert {"its run_net", "DATA.DECODING_BACKEND pyav", "DATA.DECODING_BACKEND torchvision"} <= named.keys()
    broken = [finding.name for finding in job.findings if finding.state == "broken"]
    assert broken == ["TRAIN.CHECKPOINT_FILE_PATH", "TRAIN.DATASET", "TRAIN.DATASET", "TEST.DATASET"]
    assert "train.csv dir not found" in job.findings[-3].text
    assert states(job.findings)["MODEL.NUM_CLASSES"] == "works"
