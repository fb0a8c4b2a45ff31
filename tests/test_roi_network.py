"""The network that classifies boxes: what it pools, whose weights it has, who proposes."""

import pytest
import torch
from torch import nn

from distinit_plugin import build
from distinit_plugin.config.defaults import get_cfg
from distinit_plugin.detection.dilation import dilate_last_stage
from distinit_plugin.detection.matching import Sampling
from distinit_plugin.detection.network import PROPOSAL_LOSS, RoiNetwork
from distinit_plugin.detection.proposals import KEYFRAME, KeyframeProposer, Proposals
from distinit_plugin.detection.roi_head import RoiHead
from distinit_plugin.engine.checkpoint import save_checkpoint
from distinit_plugin.errors import UserError, WeightsError
from distinit_plugin.models import InputSpec, build_network
from distinit_plugin.types import ViewSpec

INPUT = InputSpec(num_frames=4, train_crop_size=64, test_crop_size=64)


def small(name="Res3D", **switches):
    torch.manual_seed(0)
    return build_network(name, num_classes=0, input=INPUT, width=8, **switches)


def clip(height=64, width=64, clips=2):
    return {"rgb": torch.randn(clips, 3, 4, height, width, generator=torch.Generator().manual_seed(1))}


BOXES = torch.tensor([[0, 4.0, 6, 40, 60], [1, 10, 10, 50, 30], [1, 0, 0, 64, 64]])


def config(**keys):
    cfg = get_cfg()
    cfg.DETECTION.ENABLE, cfg.ACTION.LOSS, cfg.ACTION.LOSS_WEIGHT = True, "bce", 1.0
    cfg.MODEL.NUM_CLASSES = 80
    cfg.merge_from_list([item for pair in keys.items() for item in (pair[0].replace("__", "."), pair[1])])
    return cfg


# ------------------------------------------------------------------------------------------------------------ the head
def test_boxes_are_pooled_where_they_are():
    """On a map whose values are its cells' places, the last of 7 cells of a box has its place in pixels."""
    stride, size = 16, 12
    places = (torch.arange(size) + 0.5) * stride
    across = places.view(1, 1, 1, 1, size).expand(1, 1, 3, size, size)
    maps = torch.cat([across, across.transpose(3, 4)], 1)
    head = RoiHead([2], [stride], num_classes=2)
    nn.init.eye_(head.projection.weight)
    boxes = torch.tensor([[0, 20.0, 50, 120, 150], [0, 33, 24, 103, 59]])
    logits, offsets = head([maps], boxes)
    wanted = boxes[:, 3:] - (boxes[:, 3:] - boxes[:, 1:3]) / 14
    torch.testing.assert_close(logits, wanted, rtol=1e-5, atol=1e-3)
    assert offsets is None
    # The control: PySlowFast's old, shifted form is half a cell off.
    shifted = RoiHead([2], [stride], num_classes=2, aligned=False)
    shifted.load_state_dict(head.state_dict())
    assert (shifted([maps], boxes)[0] - logits).abs().min() > 1


@pytest.mark.parametrize(("pool", "wanted"), [("avg", 2.0), ("max", 5.0)])
def test_maps_are_pooled_over_time_and_joined(pool, wanted):
    first = torch.tensor([1.0, 0.0, 5.0]).view(1, 1, 3, 1, 1).expand(1, 1, 3, 4, 4)
    head = RoiHead([1, 2], [16, 32], num_classes=3, pool=pool)
    nn.init.eye_(head.projection.weight)
    logits, _ = head([first, torch.full((1, 2, 1, 2, 2), 7.0)], torch.tensor([[0, 8.0, 8, 40, 40]]))
    torch.testing.assert_close(logits, torch.tensor([[wanted, 7.0, 7.0]]))


def test_without_boxes_there_are_no_rows_but_gradients():
    network = RoiNetwork(small(), ["layer4"], num_classes=3)
    output = network(clip())
    assert output.logits.shape == (0, 3)
    output.logits.sum().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())


# ----------------------------------------------------------------------------------------------------------- backbones
@pytest.mark.parametrize(
    ("name", "layer", "dilated", "strides", "features"),
    [
        ("S3DG", "4F", "False", [16], 832),
        ("S3DG", "5C", "False", [32], 1024),
        ("S3DG", "", "True", [16], 1024),
        ("I3D", "4F+5C", "False", [16, 32], 832 + 1024),
        ("Res3D", "", "False", [16], 512),
        ("R2Plus1D", "layer3", "False", [8], 256),
    ],
)
def test_any_backbone_has_a_head(name, layer, dilated, strides, features):
    cfg = config(MODEL__MODEL_NAME=name, ROI__LAYER=layer, ROI__DILATION=dilated)
    with torch.device("meta"):
        network = build.build_network(cfg)
        view = {"rgb": torch.zeros(2, 3, 8, 96, 128)}
        output = network(view, boxes=torch.zeros(3, 5))
    assert [network.layers[layer].spatial_stride for layer in network.roi_layers] == strides
    assert network.roi_head.feature_dim == features
    assert output.logits.shape == (3, 80) == (3, network.num_classes)
    assert output.features.shape == (2, network.feature_dim)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"DETECTION__SPATIAL_SCALE_FACTOR": "16", "ROI__LAYER": "5C"}, "stride of 32"),
        ({"ROI__LAYER": "6A"}, "no layer named '6A'"),
        ({"MODEL__MODEL_NAME": "torchvision/swin3d_t", "ROI__DILATION": "True"}, "no last stage"),
    ],
)
def test_layers_that_do_not_fit_are_refused(keys, message):
    with torch.device("meta"), pytest.raises(UserError, match=message):
        build.build_network(config(**{"MODEL__MODEL_NAME": "S3DG", **keys}))


@pytest.mark.parametrize(
    ("name", "layer", "switches"),
    [
        ("Res3D", "layer4", {"depth": 18}),
        ("Res3D", "layer4", {"depth": 50}),
        ("R2Plus1D", "layer4", {}),
        ("S3DG", "5C", {"gating_from": "none"}),
        ("I3D", "5C", {}),
    ],
)
def test_dilation_computes_the_same_at_every_second_cell(name, layer, switches):
    plain, dilated = (small(name, **switches) for _ in range(2))
    for module in plain.modules():  # statistics of these clips: at their initialisation, maps are all but zero
        if isinstance(module, nn.BatchNorm3d):
            module.momentum = 1.0
    plain(clip(96, 64))
    dilated.load_state_dict(plain.state_dict())
    plain.eval(), dilated.eval()
    before = plain.layers[layer].spatial_stride
    assert dilate_last_stage(dilated)[layer].spatial_stride == before // 2
    with torch.no_grad():
        coarse, fine = (network(clip(96, 64), taps=[layer]).taps[layer] for network in (plain, dilated))
    assert fine.shape[3:] == (96 * 2 // before, 64 * 2 // before)
    assert coarse.std() > 1e-3
    torch.testing.assert_close(fine[:, :, :, ::2, ::2], coarse, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(fine[:, :, :, 1::2, 1::2], coarse, rtol=1e-3, atol=1e-4)  # the control


# -------------------------------------------------------------------------------------------------------- its weights
def test_a_checkpoint_of_the_backbone_starts_the_trunk(tmp_path):
    """Of D3D, DistInit or Kinetics: its classifier has no place, the head stays as it was drawn."""
    cfg = config(MODEL__MODEL_NAME="S3DG", NETWORK__WIDTH="8", MODEL__NUM_CLASSES="5")
    trained = build_network("S3DG", num_classes=400, input=INPUT, width=8)
    save_checkpoint(tmp_path / "d3d.pyth", {"model_state": trained.bare_state_dict()})
    network = build.build_network(cfg)
    head = {key: value.clone() for key, value in network.roi_head.state_dict().items()}
    cfg.TRAIN.CHECKPOINT_FILE_PATH = str(tmp_path / "d3d.pyth")
    (report,) = build.initialize_network(cfg, network)
    assert {name.split(".")[0] for name in report.unexpected} == {"fc"}
    assert {name.split(".")[0] for name in report.missing} == {"roi_head"}
    for key, value in trained.bare_state_dict().items():
        if not key.startswith("fc."):
            assert torch.equal(network.bare_state_dict()[key], value), key
    assert all(torch.equal(value, head[key]) for key, value in network.roi_head.state_dict().items())
    # Its own checkpoint fits as a whole; half a trunk does not.
    own = network.bare_state_dict()
    save_checkpoint(tmp_path / "own.pyth", {"model_state": own})
    cfg.TRAIN.CHECKPOINT_FILE_PATH = str(tmp_path / "own.pyth")
    (report,) = build.initialize_network(cfg, network)
    assert not report.missing
    assert not report.unexpected
    save_checkpoint(tmp_path / "half.pyth", {"model_state": {k: v for k, v in own.items() if "Mixed_4" not in k}})
    cfg.TRAIN.CHECKPOINT_FILE_PATH = str(tmp_path / "half.pyth")
    with pytest.raises(WeightsError, match="another network"):
        build.initialize_network(cfg, network)


def test_a_fresh_classifier_is_a_fresh_head():
    network = RoiNetwork(small(), ["layer4"], num_classes=3, refines=True, build_proposer=OwnRpn, sampling=Sampling(4))
    network.requires_grad_(False)
    network.reset_classifier(7)
    assert network.num_classes == 7
    trained = {name.split(".")[0] for name, parameter in network.named_parameters() if parameter.requires_grad}
    assert trained == {"roi_head"}
    assert network(clip(), boxes=BOXES).logits.shape[1] == 7
    with pytest.raises(UserError, match="NUM_CLASSES"):
        network.reset_classifier(0)


# ----------------------------------------------------------------------------------------------------------- proposals
class OwnRpn(nn.Module):
    """Proposes quarters of the view; its loss counts the annotated boxes of each clip."""

    trains = True

    def __init__(self, info):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(info.channels))

    def view_specs(self, split):
        return {}

    def propose(self, views, feature_map, boxes):
        clips = len(feature_map)
        height, width = views["rgb"].shape[-2:]
        quarter = torch.tensor([[0.0, 0, width / 2, height / 2], [width / 2, height / 2, width, height]])
        rows = torch.cat([torch.arange(clips).repeat_interleave(2)[:, None].float(), quarter.repeat(clips, 1)], 1)
        loss = (feature_map.mean((2, 3)) * self.weight).sum(1)
        return Proposals(rows, torch.ones(len(rows)), loss)


class FrameRpn(nn.Module):
    """Proposes the brightest pixel of a keyframe, as a box of 2 × 1 pixels."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 1, 1)
        self.norm = nn.BatchNorm2d(3)

    def view_specs(self, split):
        return {KEYFRAME: ViewSpec(num_frames=1, pick="keyframe", crop_size=32)}

    def find(self, frames):
        self.norm(frames)
        brightest = frames.sum(1).flatten(1).argmax(1)
        y, x = (brightest // frames.shape[-1]).float(), (brightest % frames.shape[-1]).float()
        boxes = torch.stack([torch.arange(len(frames)).float(), x, y, x + 2, y + 1], 1)
        return Proposals(boxes, torch.ones(len(frames)))


def test_a_frozen_rpn_sees_the_keyframe_and_leaves_no_trace():
    rpn = FrameRpn()
    network = RoiNetwork(
        small(), ["layer4"], num_classes=3, build_proposer=lambda info: KeyframeProposer(rpn), sampling=Sampling(4)
    )
    assert network.view_specs("train")[KEYFRAME].crop == "shared"
    assert {spec.crop for spec in network.view_specs("test").values()} == {"whole"}
    keyframe = torch.zeros(2, 3, 1, 32, 40)
    keyframe[0, :, 0, 8, 10] = keyframe[1, :, 0, 30, 20] = 9.0
    views = {**clip(64, 80), KEYFRAME: keyframe}
    state = {key: value.clone() for key, value in rpn.state_dict().items()}
    output = network.eval()(views)
    assert output.boxes.tolist() == [[0, 20, 16, 24, 18], [1, 40, 60, 44, 62]]
    network.train()(views, boxes=BOXES).logits.sum().backward()
    assert not rpn.training
    assert all(torch.equal(value, state[key]) for key, value in rpn.state_dict().items())
    assert not any(parameter.requires_grad for parameter in rpn.parameters())
    for keys in (network.state_dict(), network.bare_state_dict(), dict(network.named_parameters())):
        assert not any("norm.num" in key or key.startswith("rpn") or "conv.bias" in key for key in keys)
        assert not any(value is own for value in dict(keys).values() for own in rpn.state_dict().values())
    network.to(torch.float64)  # but it goes where the network goes
    assert rpn.conv.weight.dtype == torch.float64


def test_training_draws_from_proposals_and_annotated_boxes_and_the_test_takes_the_proposals():
    network = RoiNetwork(
        small(), ["layer4"], num_classes=3, refines=True, build_proposer=OwnRpn, sampling=Sampling(3, 0.34)
    )
    trained = network.train()(clip(), boxes=BOXES, taps=[PROPOSAL_LOSS, "layer3"])
    assert trained.boxes[:, 0].tolist() == [0, 0, 0, 1, 1, 1]
    assert trained.logits.shape == (6, 3)
    assert trained.offsets.shape == (6, 4)
    assert set(trained.taps) == {PROPOSAL_LOSS, "layer3"}
    trained.taps[PROPOSAL_LOSS].sum().backward()
    assert network.rpn.weight.grad is not None
    assert all(parameter.grad is not None for parameter in network.backbone.parameters())
    tested = network.eval()(clip(), boxes=BOXES)
    assert tested.boxes.shape == (4, 5)
    assert "rpn.weight" in network.bare_state_dict()
    assert "rpn.weight" in dict(network.named_parameters())
