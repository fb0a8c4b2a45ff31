"""The YAML files of the motion probe and of the alternatives of D3D's section 4.1 fit together."""

from pathlib import Path

import pytest
import torch
from test_configs import last_checkpoint

from distinit_plugin import build
from distinit_plugin.config.load import load_cfg
from distinit_plugin.jobs.motion_probe import motion_cfg

FOLDER = Path(__file__).resolve().parents[1] / "configs" / "D3D"
NAMES = sorted(path.stem for pattern in ("flow_*", "probe_*") for path in FOLDER.glob(f"{pattern}.yaml"))


def recipe(name):
    return load_cfg(FOLDER / f"{name}.yaml")[0]


@pytest.mark.parametrize("name", NAMES)
def test_files_build(name):
    cfg = recipe(name)
    assert f"./runs/D3D/{name}" == cfg.OUTPUT_DIR
    with torch.device("meta"):
        student = build.build_network(cfg)
        objective = build.build_objective(cfg, student, build.build_teachers(cfg))
    decoders = {term.name: term.student_layer for term in objective.terms if term.teacher}
    assert ("action" in {term.name for term in objective.terms}) == (cfg.ACTION.LOSS_WEIGHT > 0)
    if name.startswith("probe"):
        assert list(decoders.values()) == ["2C", "3A", "3B", "3C", "4B", "4D", "4F", "5B", "5C"]
        assert cfg.INIT.TRAINABLE == "heads"
        assert (cfg.TRAIN.BATCH_SIZE, cfg.SOLVER.MAX_EPOCH, cfg.NUM_GPUS) == (12, 100_000, 2)
    elif name.startswith(("flow_loss", "flow_input_a")):
        assert list(decoders.values()) == ["3A"]
        sizes = [parameter.numel() for parameter in objective.trainable.adapters["FLOW"].parameters()]
        assert sum(sizes) == (579 if name.endswith("simple") else 554_275)
    else:
        assert decoders == {}
    assert (cfg.FLOW.STORE == "") == name.startswith("flow_input_c")


@pytest.mark.parametrize("ending", ["", "_simple"])
def test_the_third_training_takes_what_the_first_two_leave(ending):
    joint = recipe(f"flow_input_c_joint{ending}")
    assert last_checkpoint(recipe(f"flow_input_a_flow_net{ending}")) == joint.INIT.FLOW_NET_WEIGHTS
    assert last_checkpoint(recipe("flow_input_b_stream")) == joint.INIT.STREAM_WEIGHTS
    first = recipe(f"flow_input_a_flow_net{ending}").DISTILL.TEACHERS.FLOW
    assert (joint.MODEL.MODEL_NAME, joint.NETWORK.DECODER) == ("PredictedFlow3D", first.HEAD)


def test_a_probe_trains_what_its_file_says(tmp_path):
    cfg = recipe("probe_d3d")
    probe = motion_cfg(cfg, (), decoder="", weights="w.pyth", finetune=False, output=tmp_path)
    layers = [entry.STUDENT_LAYER for entry in cfg.DISTILL.TEACHERS.values()]
    assert [entry.STUDENT_LAYER for entry in probe.DISTILL.TEACHERS.values()] == layers
    assert {entry.HEAD for entry in probe.DISTILL.TEACHERS.values()} == {"pwc"}
    assert probe.SOLVER == cfg.SOLVER
    other = motion_cfg(cfg, ["1A"], decoder="spatial", weights="random", finetune=True, output=tmp_path)
    (entry,) = other.DISTILL.TEACHERS.values()
    assert (entry.STUDENT_LAYER, entry.HEAD, other.INIT.TRAINABLE) == ("1A", "spatial", "all")
    assert (other.TRAIN.CHECKPOINT_FILE_PATH, probe.TRAIN.CHECKPOINT_FILE_PATH) == ("", "w.pyth")
