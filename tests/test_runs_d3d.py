"""D3D from YAML: the flow stream, the student that learns from it, and what needs neither teacher nor flow any more."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_jobs import (
    CLASSES,
    checkpoint,
    json_stats,
    labelled,
    merged,
    small_cfg,
    state_of,
    weights_of,
    write_squares,
)

from distinit_plugin.cli import main
from distinit_plugin.config.validate import validate
from distinit_plugin.engine.checkpoint import load_checkpoint
from distinit_plugin.errors import ConfigError, UserError
from distinit_plugin.jobs.running import run

SIDE, LAMBDA = 32, 0.5
S3DG = {
    "MODEL": {"MODEL_NAME": "S3DG"},
    "RESNET": {"DEPTH": 18},
    "DATA": {
        "MEAN": [0.5, 0.5, 0.5],
        "STD": [0.5, 0.5, 0.5],
        "SAMPLING_RATE": 1,
        # The whole picture, as it is: what is stored is then what would be computed.
        "TRAIN_CROP_SIZE": SIDE,
        "TEST_CROP_SIZE": SIDE,
        "TRAIN_JITTER_SCALES": [SIDE, SIDE],
        "RANDOM_FLIP": False,
    },
    "SOLVER": {"BASE_LR": 0.02},
}
TESTED = {
    "TEST": {"ENABLE": True},
    "BN": {"USE_PRECISE_STATS": True, "NUM_BATCHES_PRECISE": 1},  # S3D-G keeps 0.999 of its statistics a step
}
FLOW_MEAN = {"MEAN": [0.5, 0.5], "STD": [0.5, 0.5]}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Square videos of two classes with stored flow, and the tested runs of a flow and an RGB stream and of D3D."""
    folder = write_squares(tmp_path_factory.mktemp("square"), 5, SIDE)
    sees_flow = {"NETWORK": {"MODALITY": "flow"}, "DATA": FLOW_MEAN, **stored(folder)}
    for name, sections in (("flow", sees_flow), ("rgb", {}), ("d3d", merged(teacher(folder), stored(folder)))):
        output = folder / "runs" / name
        assert run(job(folder, output, **merged(sections, TESTED))).evaluation is not None
        if name == "flow":
            make_sure(checkpoint(output), folder / "teacher.pyth")
    return folder


def make_sure(source: Path, target: Path) -> None:
    """A checkpoint whose logits are as large as those of a long training: one step leaves hardly any."""
    state = load_checkpoint(source)
    state["model_state"]["fc.weight"] *= 5000
    torch.save(state, target)


def job(world: Path, output: Path, **sections: Any) -> Any:
    return small_cfg(world, output, **merged(merged(S3DG, labelled(world)), sections))


def teacher(world: Path, **keys: Any) -> dict[str, Any]:
    entry = {
        "ARCH": "S3DG",
        "WEIGHTS": str(world / "teacher.pyth"),
        "NUM_CLASSES": len(CLASSES),
        "NETWORK": {"MODALITY": "flow", "WIDTH": 8},
        **FLOW_MEAN,
        "CROP_SIZE": SIDE,
        "FRAME_PICK": "clip",
        "HEAD": "own",
        "LOSS": "mse",
        "LOSS_WEIGHT": LAMBDA,
        **keys,
    }
    return {"DISTILL": {"TEACHERS": {"FLOW": entry}}}


def stored(world: Path) -> dict[str, Any]:
    return {"FLOW": {"STORE": str(world / "flow")}}


# ---------------------------------------------------------------------------------------------------------- training
def test_d3d_with_stored_and_with_live_flow(world: Path, tmp_path: Path) -> None:
    run(job(world, tmp_path / "live", **teacher(world)))
    run(job(world, tmp_path / "other", **merged(merged(teacher(world), stored(world)), {"FLOW": {"BOUND": 5.0}})))
    folders = (world / "runs" / "d3d", tmp_path / "live", tmp_path / "other")
    (with_store,), (live,), (other,) = (json_stats(folder, "train_iter_") for folder in folders)
    for line in (with_store, live):
        assert line["loss"] == pytest.approx(line["loss/action"] + LAMBDA * line["loss/FLOW"], abs=3e-5)
        assert "weight/FLOW" not in line
        assert line["loss/FLOW"] > 0.1
    assert with_store["loss/FLOW"] == pytest.approx(live["loss/FLOW"], rel=1e-4)
    assert other["loss/FLOW"] != pytest.approx(live["loss/FLOW"], rel=1e-3)  # the control: other flow
    state = state_of(world / "runs" / "d3d")
    assert not state["distinit"]["adapters"]  # the student's own logits
    assert state["model_state"].keys() == weights_of(world / "runs" / "rgb").keys()


def test_a_layer_of_the_teacher_by_name(world: Path, tmp_path: Path) -> None:
    """Table 6: end-point 4F with λ = 100; through a new layer where the student calls it otherwise; no action loss."""
    own = teacher(world, LAYER="4F", LOSS_WEIGHT=100, NORMALIZE="variance")
    run(job(world, tmp_path / "own", **merged(own, stored(world))))
    for line in json_stats(tmp_path / "own", "train_iter_"):
        assert line["loss"] == pytest.approx(line["loss/action"] + 100 * line["loss/FLOW"], abs=2e-3)
        assert "entropy/FLOW" not in line
        assert "agreement/FLOW" not in line
    linear = teacher(world, LAYER="4F", STUDENT_LAYER="4C", HEAD="linear")
    silent = merged(merged(linear, stored(world)), {"ACTION": {"LOSS_WEIGHT": 0}})
    run(job(world, tmp_path / "linear", **silent))
    adapters = state_of(tmp_path / "linear")["distinit"]["adapters"]
    assert adapters["FLOW.weight"].shape[2:] == (1, 1, 1)
    with pytest.raises(UserError, match=r"FLOW.*LAYER is '4G'.*Known"):
        run(job(world, tmp_path / "wrong", **teacher(world, LAYER="4G")))


def test_a_warming_weight_is_in_the_log_lines(world: Path, tmp_path: Path) -> None:
    solver = {"MAX_EPOCH": 3, "LR_POLICY": "cosine"}
    sections = merged(teacher(world, WARMUP=2.0), {"SOLVER": solver})
    run(job(world, tmp_path / "run", **merged(sections, stored(world))))
    lines = json_stats(tmp_path / "run", "train_iter_")
    assert [line.get("weight/FLOW") for line in lines] == [0, LAMBDA / 2, None]
    assert [line.get("weight/FLOW") for line in json_stats(tmp_path / "run", "train_epoch")] == [0, LAMBDA / 2, None]
    for line, factor in zip(lines, (0, LAMBDA / 2, LAMBDA), strict=True):
        assert line["loss"] == pytest.approx(line["loss/action"] + factor * line["loss/FLOW"], abs=3e-5)


# ---------------------------------------------------------------------------------------------------------- inference
def test_a_d3d_checkpoint_needs_neither_teacher_nor_flow(world: Path, tmp_path: Path) -> None:
    files = tmp_path / "files"
    files.mkdir()
    weights = Path(shutil.copy(world / "teacher.pyth", files))
    shutil.copytree(world / "flow", files / "flow")
    d3d = merged(teacher(world, WEIGHTS=str(weights)), {"FLOW": {"STORE": str(files / "flow")}})
    source = str(shutil.copy(checkpoint(world / "runs" / "d3d"), files / "d3d.pyth"))
    validate(job(world, tmp_path / "again", **d3d), check_paths=True)
    weights.unlink()
    shutil.rmtree(files / "flow")
    # The control: the training needs both.
    with pytest.raises(UserError) as told:
        run(job(world, tmp_path / "again", **d3d))
    assert "teacher.pyth" in str(told.value)
    with pytest.raises(ConfigError) as told:
        validate(job(world, tmp_path / "again", **d3d), check_paths=True)
    assert {problem.partition(":")[0] for problem in told.value.problems} == {
        "DISTILL.TEACHERS.FLOW.WEIGHTS",
        "FLOW.STORE",
    }

    finetuning = {"TRAIN": {"CHECKPOINT_FILE_PATH": source}, "TEST": {"ENABLE": True}}
    result = run(job(world, tmp_path / "finetuned", **finetuning))
    assert result.training is not None
    assert result.evaluation is not None
    alone = {"TRAIN": {"ENABLE": False}, "TEST": {"ENABLE": True, "CHECKPOINT_FILE_PATH": source}}
    scores = [run(job(world, tmp_path / "test", **alone)).evaluation.scores]
    # The file that D3D was trained with tests it, too, though the teacher and the store that it names are gone.
    cfg = job(world, tmp_path / "same", **merged(d3d, alone))
    validate(cfg, check_paths=True)
    scores.append(run(cfg).evaluation.scores)
    np.testing.assert_array_equal(scores[0], scores[1])


def test_ensembles_of_streams_from_saved_scores(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two-stream (RGB + flow), D3D + S3D-G, all three: one command, whatever the networks saw."""
    runs = {name: world / "runs" / name for name in ("rgb", "flow", "d3d")}
    saved = {}
    for name, folder in runs.items():
        with np.load(folder / "test" / "scores.npz") as archive:
            saved[name] = dict(zip(archive["paths"].tolist(), archive["scores"], strict=True))
            labels = dict(zip(archive["paths"].tolist(), archive["labels"].tolist(), strict=True))
    for names in (("rgb", "flow"), ("d3d", "rgb"), ("rgb", "flow", "d3d")):
        file = tmp_path / "out.json"
        capsys.readouterr()
        assert main(["ensemble", *(str(runs[name]) for name in names), "--json", str(file)]) == 0
        assert "2 test videos" in capsys.readouterr().out
        right = [np.mean([saved[name][path] for name in names], axis=0).argmax() == labels[path] for path in labels]
        found = json.loads(file.read_text())
        assert found["together"]["top1"] == np.mean(right)
        assert found["missing"] == {}
        scores = [np.stack([saved[name][path] for path in sorted(labels)]) for name in names]
        assert np.abs(scores[0] - scores[1]).max() > 1e-6  # two runs, not one twice
