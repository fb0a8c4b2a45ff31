"""A step of D3D from its YAML on real videos: flow computed in the step, stored flow and cached targets agree."""

from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import pytest
from cached_jobs import write_flow_teacher
from small_jobs import json_stats

from distinit_plugin.cli import main
from distinit_plugin.config.load import load_cfg
from distinit_plugin.config.node import CfgNode
from distinit_plugin.jobs.caching import cache_targets
from distinit_plugin.jobs.running import run

SIDE, FRAMES, FPS = 48, 8, 25
BACKEND = "dis_fast"
NAMES = ("hmdb51/6arrowswithin30seconds_shoot_bow_f_nm_np1_fr_med_3.avi", "mmaction2/test.avi", "intel/eat.mkv")


def squeeze(source: Path, target: Path, frames: int = 20) -> None:
    """The beginning of a video as lossless squares: where no frame is resized, stored flow is live flow."""
    with av.open(str(source)) as old, av.open(str(target), "w") as new:
        stream = new.add_stream("libx264", rate=FPS, options={"qp": "0", "preset": "ultrafast"})
        stream.height, stream.width, stream.pix_fmt = SIDE, SIDE, "yuv420p"
        for number, frame in zip(range(frames), old.decode(video=0), strict=False):
            small = frame.reformat(SIDE, SIDE, "yuv420p")
            small.pts, small.time_base = number, Fraction(1, FPS)
            new.mux(stream.encode(small))
        new.mux(stream.encode())


@pytest.fixture(scope="module")
def world(assets: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``square`` and ``whole``: three real videos with labels, and their flow; a teacher."""
    folder = tmp_path_factory.mktemp("real")
    for kind in ("square", "whole"):
        (folder / kind).mkdir()
        rows = []
        for label, name in enumerate(NAMES):
            target = folder / kind / f"{label}.mkv"
            if kind == "square":
                squeeze(assets / "videos" / name, target)
            else:
                target.symlink_to(assets / "videos" / name)
            rows.append(f"{target.name} {label % 2}\n")
        (folder / f"{kind}.csv").write_text("".join(rows))
        size = "native" if kind == "square" else "64"
        words = ["extract-flow", str(folder / kind), str(folder / f"{kind}_flow"), "--size", size, "--fps", str(FPS)]
        assert main([*words, "--backend", BACKEND, "--workers", "1"]) == 0
    write_flow_teacher(folder / "teacher.pth")
    return folder


@pytest.fixture
def job(world: Path, tmp_path: Path) -> Callable[..., CfgNode]:
    """The configuration of two deterministic steps by name of the run; ``more``: keys over it."""

    def build(name: str, kind: str, **more: object) -> CfgNode:
        teacher = "DISTILL.TEACHERS.FLOW"
        options: dict[str, object] = {
            "OUTPUT_DIR": tmp_path / name,
            "NUM_GPUS": 0,
            "MODEL.NUM_CLASSES": 2,
            "NETWORK.WIDTH": 8,
            f"{teacher}.NETWORK.WIDTH": 8,
            f"{teacher}.NUM_CLASSES": 2,
            f"{teacher}.WEIGHTS": world / "teacher.pth",
            f"{teacher}.CROP_SIZE": SIDE,
            "CORPUS.TRAIN": None,
            "CORPUS.TRAIN.REAL.FORMAT": "csv",
            "CORPUS.TRAIN.REAL.PATH": world / f"{kind}.csv",
            "CORPUS.TRAIN.REAL.ROOT": world / kind,
            "CORPUS.TRAIN.REAL.LABELED": True,
            "CORPUS.INDEX_CACHE": world / "index",
            "DATA.NUM_FRAMES": FRAMES,
            "DATA.TRAIN_CROP_SIZE": SIDE,
            "DATA.TEST_CROP_SIZE": SIDE,
            "DATA.TRAIN_JITTER_SCALES": [SIDE, SIDE],
            "DATA.RANDOM_FLIP": kind != "square",  # a mirrored picture has another flow, by rounding
            "DATA_LOADER.NUM_WORKERS": 0,
            "DISTILL.GRID.CLIPS": 3,
            "DISTILL.GRID.CROPS": 1,
            "TRAIN.BATCH_SIZE": 4,
            "TEST.ENABLE": False,
            "CORPUS.VAL": None,
            "RUNNER.ACCUMULATE": 1,
            "RUNNER.CLIPS_PER_EPOCH": 8,
            "RUNNER.DETERMINISTIC": True,
            "RUNNER.PRECISION": "fp32",
            "LOG_PERIOD": 1,
            "SOLVER.MAX_EPOCH": 2,
            "SOLVER.STEPS": [0],
            "SOLVER.LRS": [1.0],
            "FLOW.STORE": "",
            **more,
        }
        return load_cfg("configs/D3D/kinetics400_d3d.yaml", [str(word) for pair in options.items() for word in pair])[0]

    return build


def losses(cfg: CfgNode) -> list[float]:
    """Of both terms at both steps of a run."""
    run(cfg)
    lines = json_stats(Path(cfg.OUTPUT_DIR), "train_iter_")
    assert len(lines) == 2
    return [line[f"loss/{term}"] for line in lines for term in ("action", "FLOW")]


@pytest.mark.parametrize("kind", ["square", "whole"])
def test_live_flow_stored_flow_and_cached_targets(
    kind: str, world: Path, job: Callable[..., CfgNode], tmp_path: Path
) -> None:
    sources = {
        "live": {"FLOW.BACKEND": BACKEND},
        "stored": {"FLOW.STORE": world / f"{kind}_flow"},
    }
    found = {}
    for name, flow in sources.items():
        cfg = job(name, kind, **flow)
        found[name] = losses(cfg)
        assert min(found[name]) > 1e-2
        cache_targets(cfg, "FLOW", str(tmp_path / f"cache_{name}"), dtype="float32")
        cached = job(f"cached_{name}", kind, **flow, **{"DISTILL.TEACHERS.FLOW.CACHE": tmp_path / f"cache_{name}"})
        assert losses(cached) == found[name]
    if kind == "square":  # the same values of flow
        assert found["stored"] == pytest.approx(found["live"], rel=1e-4)
    else:  # the control: flow of frames of another size is other flow
        assert found["stored"] != pytest.approx(found["live"], rel=1e-4)
