"""Region proposals of persons: the same as torchvision's from the same weights, a loss without chance, and weights."""

import pytest
import torch
import torchvision
from torch import nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.ops import box_iou

from distinit_plugin import InputSpec
from distinit_plugin.detection import anchors
from distinit_plugin.detection.anchors import Choice, Predictions, assign, level_anchors, rpn_loss
from distinit_plugin.detection.matching import no_boxes
from distinit_plugin.detection.network import PROPOSAL_LOSS
from distinit_plugin.detection.proposals import KEYFRAME
from distinit_plugin.detection.rpn import MapRpn, PersonRpn, load_rpn
from distinit_plugin.errors import UserError, WeightsError
from distinit_plugin.types import LayerInfo

HEIGHT, WIDTH = 50, 60
SIZES = (8, 16, 24, 32, 48)
TRUTH = torch.tensor([[0, 8, 10, 30, 45], [0, 40, 20, 58, 46], [2, 30, 5, 56, 30]], dtype=torch.float32)
"""Of three pictures the middle one is empty."""


class Theirs(nn.Module):
    """The parts of torchvision's Faster R-CNN around a ResNet-18 that propose boxes."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = resnet_fpn_backbone(
            backbone_name="resnet18", weights=None, norm_layer=nn.BatchNorm2d, trainable_layers=5
        )
        generator = AnchorGenerator(tuple((size,) for size in SIZES), ((0.5, 1.0, 2.0),) * 5)
        tops = {"training": 1000, "testing": 1000}, {"training": 60, "testing": 60}
        self.rpn = RegionProposalNetwork(generator, RPNHead(256, 3), 0.7, 0.3, 256, 0.5, *tops, 0.7)


@pytest.fixture(scope="module")
def theirs() -> Theirs:
    """In eval mode, with a head that says something."""
    torch.manual_seed(3)
    model = Theirs()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    nn.init.normal_(model.rpn.head.cls_logits.weight, 0, 0.02)
    nn.init.normal_(model.rpn.head.bbox_pred.weight, 0, 0.01)
    return model.eval()


@pytest.fixture(scope="module")
def frames() -> torch.Tensor:
    return torch.randn(3, 3, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(4))


@pytest.fixture(scope="module")
def ours(theirs, tmp_path_factory) -> PersonRpn:
    path = tmp_path_factory.mktemp("weights") / "detector.pth"
    torch.save({**theirs.state_dict(), "roi_heads.box_predictor.cls_score.weight": torch.zeros(2, 8)}, path)
    rpn = PersonRpn("resnet18_fpn", input=InputSpec(), anchor_sizes=SIZES, choice=Choice(60)).eval()
    report = load_rpn(rpn, str(path))
    assert len(report.loaded) == len(rpn.state_dict())
    return rpn


def their_parts(model, frames):
    """Their maps of padded frames, and the frames with their true sizes."""
    padded = nn.functional.pad(frames, (0, -WIDTH % 32, 0, -HEIGHT % 32))
    return model.backbone(padded), ImageList(padded, [(HEIGHT, WIDTH)] * len(frames))


# --------------------------------------------------------------------------------------------------------- proposals
def test_proposals_are_torchvisions(theirs, ours, frames):
    with torch.no_grad():
        maps, images = their_parts(theirs, frames)
        boxes, _ = theirs.rpn(images, maps)
        found = ours.find(frames)
        same = ours({KEYFRAME: frames[:, :, None]}).boxes
    assert [len(own) for own in boxes] == [int((found.boxes[:, 0] == k).sum()) for k in range(3)]
    assert len(found.boxes) > 100
    torch.testing.assert_close(found.boxes[:, 1:], torch.cat(boxes), atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(same, found.boxes)
    for number in range(3):
        scores = found.scores[found.boxes[:, 0] == number]
        assert (scores.diff() <= 0).all()
    assert found.boxes[:, [1, 3]].max() <= WIDTH
    assert found.boxes[:, [2, 4]].max() <= HEIGHT
    ours_moved = PersonRpn("resnet18_fpn", input=InputSpec(), anchor_sizes=[s + 4 for s in SIZES], choice=Choice(60))
    ours_moved.load_state_dict(ours.state_dict())
    with torch.no_grad():  # the control: other anchors
        other = ours_moved.eval().find(frames).boxes
    assert other.shape != found.boxes.shape or (other - found.boxes).abs().max() > 1


@pytest.mark.parametrize("grid", [(3, 5), (1, 1), (2, 7)])
def test_anchors_are_torchvisions(grid):
    generator = AnchorGenerator(((16, 40),), ((0.5, 1.0, 2.0),))
    images = ImageList(torch.empty(1, 3, grid[0] * 16, grid[1] * 16), [(grid[0] * 16, grid[1] * 16)])
    expected = generator(images, [torch.empty(1, 4, *grid)])[0]
    torch.testing.assert_close(level_anchors((16, 40), grid, (16, 16), torch.device("cpu")), expected, rtol=0, atol=0)


def test_few_good_proposals_are_asked_for(ours, frames):
    ours_all = ours.find(frames)
    middle = float(ours_all.scores.median())
    for choice, check in (
        (Choice(7), lambda found: [int((found.boxes[:, 0] == k).sum()) for k in range(3)] == [7, 7, 7]),
        (Choice(60, floor=middle), lambda found: 80 < len(found.boxes) < 120 and found.scores.min() >= middle),
        (Choice(60, floor=1.0), lambda found: found.boxes.shape == (0, 5)),
        (Choice(60, nms=0.1), lambda found: found.scores.min() < ours_all.scores.min()),  # others take the places
    ):
        before, ours.choice = ours.choice, choice
        try:
            assert check(ours.find(frames)), choice
        finally:
            ours.choice = before


# -------------------------------------------------------------------------------------------------------------- loss
def their_targets():
    return [{"boxes": TRUTH[TRUTH[:, 0] == number, 1:]} for number in range(3)]


def test_the_loss_and_its_gradient_are_torchvisions(theirs, ours, frames, monkeypatch):
    """With every anchor in the sample there is no chance in theirs, either."""
    monkeypatch.setattr(anchors, "SAMPLES", 10**6)
    monkeypatch.setattr(theirs.rpn.fg_bg_sampler, "batch_size_per_image", 10**6)
    maps, images = their_parts(theirs, frames)
    theirs.rpn.train()
    try:
        # One picture at a time: theirs is a mean over the anchors of all pictures together.
        expected = []
        for number in range(3):
            own = {name: part[number : number + 1] for name, part in maps.items()}
            _, losses = theirs.rpn(ImageList(images.tensors[:1], [(HEIGHT, WIDTH)]), own, [their_targets()[number]])
            expected.append(sum(losses.values()))
    finally:
        theirs.rpn.eval()
    torch.stack(expected).sum().backward()
    views = {KEYFRAME: frames[:, :, None]}
    loss = ours(views, boxes=TRUTH, taps=[PROPOSAL_LOSS]).taps[PROPOSAL_LOSS]
    torch.testing.assert_close(loss, torch.stack(expected), rtol=1e-4, atol=1e-6)
    assert loss.shape == (3,)
    loss.sum().backward()
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, theirs.get_parameter(name).grad, rtol=1e-3, atol=1e-5, msg=name)
    ours.zero_grad()
    theirs.zero_grad()
    moved = ours(views, boxes=TRUTH + torch.tensor([0, 8, 0, 8, 0]), taps=[PROPOSAL_LOSS]).taps[PROPOSAL_LOSS]
    assert (moved - loss)[0].abs() > 3e-4  # the control
    assert moved[1] == loss[1]


def test_the_loss_is_the_expectation_over_draws(theirs, ours, frames, monkeypatch):
    monkeypatch.setattr(anchors, "SAMPLES", 64)
    monkeypatch.setattr(theirs.rpn.fg_bg_sampler, "batch_size_per_image", 64)
    with torch.no_grad():
        predictions = ours.predict(frames)
        loss = rpn_loss(predictions, TRUTH)
    rows = [predictions.anchors] * 3
    labels, matched = theirs.rpn.assign_targets_to_anchors(rows, their_targets())
    assert 0 < int((labels[0] == 1).sum()) < 32 < int((labels[0] == 0).sum())
    goals = theirs.rpn.box_coder.encode(matched, rows)
    torch.manual_seed(5)
    draws = torch.stack(
        [
            sum(
                theirs.rpn.compute_loss(
                    predictions.objectness[:1].flatten(), predictions.offsets[0], labels[:1], goals[:1]
                )
            )
            for _ in range(400)
        ]
    )
    error = draws.std() / 20
    assert error < 0.01 * loss[0]
    assert abs(draws.mean() - loss[0]) < 4 * error


def test_pictures_without_boxes(ours, frames):
    """Finite, and every parameter that trains is reached."""
    loss = ours({KEYFRAME: frames[:, :, None]}, boxes=no_boxes(frames), taps=[PROPOSAL_LOSS]).taps[PROPOSAL_LOSS]
    assert torch.isfinite(loss).all()
    assert loss.min() > 0
    loss.sum().backward()
    assert [name for name, parameter in ours.named_parameters() if parameter.grad is None] == []
    ours.zero_grad()
    with torch.no_grad():
        none = ours({KEYFRAME: frames[:, :, None]}, taps=[PROPOSAL_LOSS]).taps[PROPOSAL_LOSS]
    torch.testing.assert_close(none, loss.detach())


def test_who_is_whose():
    rows = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 8], [0, 0, 10, 4], [100, 100, 110, 110], [50, 50, 70, 70]])
    truth = torch.tensor([[0.0, 0, 10, 10], [60, 50, 80, 70], [200, 200, 220, 220]])
    positive, negative, own = assign(rows, truth)
    # Overlaps 1, 0.8, 0.4; none; a third, which is the largest of the second box. The third box overlaps nothing.
    assert positive.tolist() == [True, True, False, False, True]
    assert negative.tolist() == [False, False, False, True, False]
    assert own[[0, 1, 4]].tolist() == [0, 0, 1]
    assert [part.tolist() for part in assign(rows[:2], truth[:0])] == [[False] * 2, [True] * 2, [0, 0]]


# ----------------------------------------------------------------------------------------------------------- weights
def test_files_of_all_kinds(theirs, ours, tmp_path):
    def fresh(**keys: object) -> PersonRpn:
        return PersonRpn("resnet18", input=InputSpec(), **keys)

    def saved(state: object) -> str:
        torch.save(state, tmp_path / "weights.pth")
        return str(tmp_path / "weights.pth")

    old = {}
    for key, value in theirs.state_dict().items():
        key = key.replace("rpn.head.conv.0.0.", "rpn.head.conv.")
        for part in ("inner", "layer"):
            for number in range(4):
                key = key.replace(f"{part}_blocks.{number}.0.", f"{part}_blocks.{number}.")
        old[key] = value
    assert "rpn.head.conv.weight" in old
    before = {key: value.clone() for key, value in ours.state_dict().items()}
    for value in ours.bare_state_dict().values():
        value.zero_()
    load_rpn(ours, saved(old))
    assert all(torch.equal(value, before[key]) for key, value in ours.state_dict().items())
    one, other = fresh(), fresh(frozen_norm=True)
    load_rpn(other, saved({"model_state": one.bare_state_dict()}))
    for key, value in other.state_dict().items():
        torch.testing.assert_close(value, one.state_dict()[key], rtol=0, atol=0)
    body = {key: value + 1 for key, value in one.state_dict().items() if key.startswith("backbone.body.")}
    classifier = {key.removeprefix("backbone.body."): value for key, value in body.items()}
    report = load_rpn(other, saved({**classifier, "layer4.0.conv1.weight": torch.ones(1), "fc.weight": torch.ones(1)}))
    assert all(name.startswith("rpn.") for name in report.missing)
    for key, value in other.state_dict().items():
        torch.testing.assert_close(value, body.get(key, one.state_dict()[key]), rtol=0, atol=0)
    kept = {key: value.clone() for key, value in other.state_dict().items()}
    whole = one.state_dict()
    for state, message in (
        ({**whole, "rpn.head.cls_logits.weight": torch.zeros(4, 256, 1, 1)}, "another network|does not fit"),
        ({"fc.weight": torch.zeros(2, 2)}, "neither an RPN nor a ResNet"),
        ({key: value for key, value in whole.items() if "layer2" not in key}, "another network|does not fit"),
    ):
        with pytest.raises(WeightsError, match=message):
            load_rpn(other, saved(state))
    with pytest.raises(WeightsError, match=r"COCO_V1|IMAGENET1K_V1"):
        load_rpn(other, str(tmp_path / "gone.pth"))
    assert all(torch.equal(value, kept[key]) for key, value in other.state_dict().items())


@pytest.mark.parametrize(("arch", "frozen"), [("resnet50", True), ("resnet50_fpn", True), ("resnet50_fpn_v2", False)])
def test_trunks_hold_what_torchvisions_files_hold(arch, frozen):
    with torch.device("meta"):
        rpn = PersonRpn(arch, input=InputSpec(), frozen_norm=frozen)
        frames = torch.empty(2, 3, 1, 65, 100)
        assert rpn({KEYFRAME: frames}).taps == {}
        assert rpn.eval()({KEYFRAME: frames}).boxes.shape == (0, 5)  # values would tell how many
        predictions = rpn.predict(frames[:, :, 0])
        assert predictions.offsets.shape == (2, len(predictions.anchors), 4)
        assert predictions.objectness.shape == (2, len(predictions.levels))
        if arch == "resnet50_fpn":
            norm = nn.BatchNorm2d if not frozen else torchvision.ops.FrozenBatchNorm2d
            whole = FasterRCNN(resnet_fpn_backbone(backbone_name="resnet50", weights=None, norm_layer=norm), 91)
        elif arch == "resnet50_fpn_v2" and not frozen:
            whole = torchvision.models.detection.fasterrcnn_resnet50_fpn_v2(weights_backbone=None)
        else:
            return
    shapes = {key: value.shape for key, value in whole.state_dict().items() if not key.startswith("roi_heads.")}
    assert {key: value.shape for key, value in rpn.state_dict().items()} == shapes


def test_what_it_must_be_fed():
    spec = InputSpec(num_frames=8, sampling_rate=4, target_fps=30.0, train_crop_size=64, test_crop_size=96)
    rpn = PersonRpn("resnet18", input=spec)
    train, test = rpn.view_specs("train")[KEYFRAME], rpn.view_specs("test")[KEYFRAME]
    assert (train.num_frames, train.pick, train.crop, train.crop_size, train.target_fps) == (
        1,
        "keyframe",
        "shared",
        64,
        30.0,
    )
    assert (test.crop, test.crop_size) == ("whole", 96)
    for keys, message in (
        ({"arch": "resnet19"}, "RPN.ARCH"),
        ({"arch": "resnet18", "anchor_sizes": [1, 2]}, "RPN.ANCHOR_SIZES"),
        ({"arch": "resnet18", "input": InputSpec(modality="flow", mean=(0.5,) * 2, std=(0.5,) * 2)}, "MODALITY"),
    ):
        with pytest.raises(UserError, match=message):
            PersonRpn(**{"input": spec, **keys})
    with pytest.raises(UserError, match=r"RPN\.NUM_PROPOSALS"):
        Choice(0)
    with pytest.raises(UserError, match=r"RPN\.NMS"):
        Choice(nms=1.5)
    with pytest.raises(UserError, match="no classifier"):
        rpn.reset_classifier(3)


# --------------------------------------------------------------------------------------------------- on a map
def test_the_rpn_on_a_map_learns_where_something_is(monkeypatch):
    """A map that tells on the cells of a box where its centre is: after some steps the best proposal is that box."""
    monkeypatch.setattr(anchors, "SAMPLES", 8)  # one anchor of a hundred is positive
    torch.manual_seed(0)
    rpn = MapRpn(LayerInfo(8, 2, 8), anchor_sizes=(16, 32), choice=Choice(10))
    assert {name.split(".")[0] for name in rpn.state_dict()} == {"head"}
    optimizer = torch.optim.Adam(rpn.parameters(), 1e-2)
    generator = torch.Generator().manual_seed(1)
    offsets = torch.arange(5) - 2.0

    def batch():
        feature_map, rows = torch.zeros(2, 8, 8, 11), []
        for number in range(2):
            y, x = (int(torch.randint(0, 4, (), generator=generator)) for _ in range(2))
            inside = feature_map[number, :, y : y + 5, x : x + 5]
            inside[:4] = 1
            inside[4:6], inside[6:] = offsets, offsets[:, None]
            rows.append([number, 8 * x, 8 * y, 8 * x + 32, 8 * y + 32])
        return {"rgb": torch.empty(2, 3, 2, 64, 88), KEYFRAME: torch.empty(2, 3, 1, 16, 16)}, feature_map, rows

    def overlap():
        views, feature_map, rows = batch()
        found = rpn.propose(views, feature_map, None)
        best = [found.boxes[found.boxes[:, 0] == number][0, 1:] for number in range(2)]
        return float(box_iou(torch.stack(best), torch.tensor(rows).float()[:, 1:]).diag().mean())

    before = overlap()
    for _ in range(60):
        views, feature_map, rows = batch()
        found = rpn.propose(views, feature_map, torch.tensor(rows).float())
        assert (found.loss.shape, found.boxes.requires_grad) == ((2,), False)
        optimizer.zero_grad()
        found.loss.mean().backward()
        optimizer.step()
    assert overlap() > max(before, 0.7)


def test_a_coarse_number_format_does_not_move_anchors():
    rpn = MapRpn(LayerInfo(4, 1, 16))
    with torch.autocast("cpu", torch.bfloat16):
        found = rpn.propose({"rgb": torch.empty(1, 3, 1, 320, 320)}, torch.randn(1, 4, 20, 20), TRUTH[:1])
    assert found.boxes.dtype == found.loss.dtype == torch.float32
    predictions = Predictions(torch.zeros(1, 15), torch.zeros(1, 15, 4), torch.zeros(15, 4), torch.zeros(15).long())
    assert torch.isfinite(rpn_loss(predictions, TRUTH[:1])).all()  # anchors without area


def test_it_can_be_described():
    """On the meta device, where values are not known, there are no proposals."""
    with torch.device("meta"):
        rpn = MapRpn(LayerInfo(4, 1, 16))
        found = rpn.propose({"rgb": torch.empty(2, 3, 1, 64, 64)}, torch.empty(2, 4, 4, 4), None)
    assert (found.boxes.shape, found.loss.shape) == ((0, 5), (2,))
