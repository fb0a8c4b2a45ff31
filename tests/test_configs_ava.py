"""The configurations of AVA fit together and build what they say."""

import re
from pathlib import Path

import pytest
import torch
from test_configs import last_checkpoint

from distinit_plugin import build
from distinit_plugin.building.detection import box_terms
from distinit_plugin.config.load import load_cfg
from distinit_plugin.losses import build_loss

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted((ROOT / "configs" / "AVA").glob("*.yaml"))
ACTIONS = [path for path in FILES if not path.stem.startswith("person_rpn")]


def test_the_project_names_every_file_and_no_other():
    text = (ROOT / "projects" / "ava" / "README.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`((?:table5|slow|slowfast|d3d|person)_\w+)`", text)) | set(
        re.findall(r"configs/AVA/(\w+)\.yaml", text.replace("NAME.yaml", ""))
    )
    assert named == {path.stem for path in FILES}
    assert len(ACTIONS) >= 6


@pytest.mark.parametrize("path", ACTIONS, ids=lambda path: path.stem)
def test_weights_are_those_that_another_configuration_leaves_behind(path):
    cfg, _ = load_cfg(path)
    assert f"./runs/AVA/{path.stem}" == cfg.OUTPUT_DIR
    named = [cfg.TRAIN.CHECKPOINT_FILE_PATH, *([cfg.RPN.WEIGHTS] if cfg.ROI.PROPOSALS == "rpn" else [])]
    for weights in named:
        found = re.fullmatch(r"\./runs/(\w+/\w+)/checkpoints/\w+\.pyth", weights)
        assert found or re.fullmatch(r"\./weights/SLOW(FAST)?_8x8_R50\.pyth", weights)
        if found:
            before, _ = load_cfg(ROOT / "configs" / f"{found[1]}.yaml")
            assert last_checkpoint(before) == weights
            if before.MODEL.MODEL_NAME != "PersonRpn":
                assert (before.MODEL.MODEL_NAME, before.NETWORK) == (cfg.MODEL.MODEL_NAME, cfg.NETWORK)
                assert (before.DATA.MEAN, before.DATA.STD) == (cfg.DATA.MEAN, cfg.DATA.STD)
            else:
                assert before.RPN.ARCH == cfg.RPN.ARCH


@pytest.mark.parametrize("name", ["d3d_given_boxes", "slowfast_32x2_r50_short", "table5_i3d_own_rpn"])
def test_what_is_built(name):
    path = ROOT / "configs" / "AVA" / f"{name}.yaml"
    cfg, _ = load_cfg(path, ["ROI.PROPOSALS", "given", "ROI.REFINE_BOXES", "False"])  # proposers are built from files
    with torch.device("meta"):
        network = build.build_network(cfg)
        spec = next(iter(network.view_specs("test").values()))
        clip = torch.zeros(1, 3, spec.num_frames, spec.crop_size, 2 * spec.crop_size)
        output = network({"rgb": clip}, boxes=torch.zeros(2, 5))
    assert spec.crop == "whole"
    assert output.logits.shape == (2, 80)
    assert {network.layers[layer].spatial_stride for layer in network.roi_layers} == {16}
    assert spec.num_frames == (50 if name.startswith("table5") else 32)
    if name.startswith("slowfast"):  # both pathways
        assert network.roi_layers == ("blocks.4", "blocks.4.fast")
        assert network.roi_head.feature_dim == 2048 + 256
    terms = build.build_objective(cfg, network, {}).terms
    assert [term.name for term in terms] == ["action"]


def test_table_5_learns_one_correction_of_each_proposal():
    cfg, _ = load_cfg(ROOT / "configs" / "AVA" / "table5_d3d_resnet_rpn.yaml")
    assert (cfg.ROI.PROPOSALS, cfg.ROI.REFINE_BOXES, cfg.SOLVER.MAX_EPOCH) == ("rpn", True, 500_000)
    assert [term.name for term in box_terms(cfg, build_loss("bce"))] == ["action", "box"]
