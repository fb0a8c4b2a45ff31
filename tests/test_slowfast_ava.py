"""Boxes and actions in PySlowFast, as far as it goes without PySlowFast; with it: ``test_slowfast_ava_runs.py``."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fvcore.common.timer import Timer
from slowfast_nodes import joined, root_node
from small_jobs import brightness_teacher, write_teacher
from torch import nn

from distinit_plugin import build
from distinit_plugin.data.collate import collate
from distinit_plugin.data.views import finish_views
from distinit_plugin.detection.network import RoiNetwork
from distinit_plugin.engine.checkpoint import save_checkpoint
from distinit_plugin.errors import ConfigError, UserError, WeightsError
from distinit_plugin.hosts.slowfast.checkpoints import with_heads
from distinit_plugin.hosts.slowfast.detection_defects import falls_through, first_rows, score_boxes
from distinit_plugin.hosts.slowfast.distillation import DistinitLoss, attach
from distinit_plugin.hosts.slowfast.keyframes import Distinitava, one_by_one, their_truth
from distinit_plugin.hosts.slowfast.networks import build_hosted
from distinit_plugin.hosts.slowfast.schema import own_cfg
from distinit_plugin.hosts.slowfast.settling import settle
from distinit_plugin.types import SampleKey

YAML = Path(__file__).resolve().parents[1] / "configs" / "quickstart" / "persons.yaml"
SMALL = (
    *("DATA.NUM_FRAMES", "4", "DATA.TRAIN_CROP_SIZE", "32", "DATA.TEST_CROP_SIZE", "32", "NETWORK.WIDTH", "4"),
    *("DATA.TRAIN_JITTER_SCALES", "[80,120]", "TRAIN.BATCH_SIZE", "2", "ROI.LAYER", "layer2", "NUM_GPUS", "0"),
    *("SOLVER.MAX_EPOCH", "12", "DATA_LOADER.NUM_WORKERS", "0"),
)


@pytest.fixture
def unsettled(persons, tmp_path):
    """Our configuration of the small set, read by PySlowFast's node."""
    cfg = root_node()
    cfg.merge_from_file(str(YAML))
    cfg.merge_from_list([*SMALL, *persons.options(), "OUTPUT_DIR", str(tmp_path / "run")])
    return cfg


@pytest.fixture
def job(unsettled):
    """The same, settled."""
    settle(unsettled)
    return unsettled


def hosted(cfg, *, has_terms=True):
    torch.manual_seed(5)
    return build_hosted(own_cfg(cfg), has_terms=has_terms, initialize=True, activation="softmax")


# ---------------------------------------------------------------------------------------------- defects

LOOP = """
def perform_test(loader, meter, cfg):
    for number, item in enumerate(loader):
        if cfg.DETECTION.ENABLE:
            meter.iter_toc()
            {end}
        else:
            pass
        {behind}
"""


@pytest.mark.parametrize(
    ("end", "behind", "expected"),
    [
        ("pass", "meter.iter_toc()", True),
        ("continue", "meter.iter_toc()", False),
        ("pass", "meter.iter_tic()", False),
    ],
)
def test_a_test_that_stops_the_clock_twice_is_known(end, behind, expected):
    assert falls_through(LOOP.format(end=end, behind=behind)) is expected
    assert not falls_through(LOOP.format(end=end, behind=behind).replace("perform_test", "other"))


def test_boxes_count_once_in_the_order_of_one_process():
    """Two ranks of three keyframes, the first of which fills up the second batch of the second rank."""
    metadata = torch.tensor([[0, 902], [0, 902], [1, 903], [0, 904], [0, 902], [0, 902]])
    boxes = torch.rand(6, 5, generator=torch.Generator().manual_seed(0))
    boxes[4:, 1:] = boxes[:2, 1:]
    boxes[4:, 0] = 1
    assert first_rows(boxes, metadata).tolist() == [0, 1, 3, 2]
    boxes[5, 1] += 1e-3  # another box of that keyframe
    assert first_rows(boxes, metadata).tolist() == [0, 1, 5, 3, 2]
    assert first_rows(boxes[:0], metadata[:0].float()).tolist() == []


class Meter:
    """The clock of PySlowFast's meter, and what it was given."""

    def __init__(self):
        self.iter_timer, self.net_timer, self.rows, self.lines, self.is_final = Timer(), Timer(), [], [], False

    def iter_tic(self):
        self.iter_timer.reset()

    def data_toc(self):
        self.net_timer.reset()

    def iter_toc(self):
        self.iter_timer.pause()
        self.net_timer.pause()

    def update_stats(self, preds, ori_boxes, metadata):
        self.rows.append((preds, ori_boxes, metadata))

    def log_iter_stats(self, cur_epoch, cur_iter):
        self.lines.append((cur_epoch, cur_iter))

    def finalize_metrics(self):
        self.is_final = True


def test_every_batch_of_a_test_is_counted_once(job):
    dataset = Distinitava(job, "test")
    loader = []
    for number in range(3):
        inputs, labels, boxes, originals, metadata = joined([dataset[number]])
        meta = {"boxes": boxes, "ori_boxes": originals, "metadata": metadata}
        loader.append((inputs, labels, torch.tensor([number]), torch.zeros(1, 1), meta))
    meter, model = Meter(), hosted(job).train()
    assert score_boxes(loader, model, meter, 0) is meter
    assert meter.is_final
    assert not model.training
    assert meter.lines == [(None, 0), (None, 1), (None, 2)]
    for (scores, originals, metadata), (*_, meta) in zip(meter.rows, loader, strict=True):
        assert scores.shape == (len(originals), 8)
        assert torch.equal(originals, meta["ori_boxes"])
        assert torch.equal(metadata, meta["metadata"])
    with pytest.raises(ValueError, match="already paused"):  # the control: what goes wrong without the cure
        meter.iter_toc()


# ---------------------------------------------------------------------------------------------- networks


def test_a_network_of_boxes_has_the_keys_of_its_checkpoints(job, tmp_path):
    model = hosted(job)
    assert isinstance(model, RoiNetwork)
    bare = model.bare_state_dict()
    assert list(model.state_dict()) == list(bare)
    assert not [key for key in bare if key.startswith("backbone.")]
    wrapped = nn.ModuleDict({"module": model})
    assert list(wrapped.state_dict()) == [f"module.{key}" for key in bare]
    changed = {key: value + 1 for key, value in bare.items()}
    model.load_state_dict(changed)
    assert all(torch.equal(value, changed[key]) for key, value in model.state_dict().items())
    first = next(iter(bare))
    del changed[first]
    changed["other.weight"] = torch.zeros(3)
    report = model.load_state_dict(changed, strict=False)
    assert (report.missing_keys, report.unexpected_keys) == ([first], ["other.weight"])


def test_scores_are_probabilities_always(job):
    model = hosted(job)
    inputs, _, boxes, *_ = joined([Distinitava(job, "train")[index] for index in range(2)])
    for mode in (False, True):
        model.train(mode)
        with torch.no_grad():
            logits = RoiNetwork.forward(model, {"rgb": inputs[0]}, boxes=boxes).logits
            scores = model(inputs, boxes)
        torch.testing.assert_close(scores, logits.sigmoid())
        assert scores.shape == (len(boxes), 8)
        assert len(boxes) > 0


def test_layers_behind_the_boxes_stay(job):
    job.ACTION.LOSS_WEIGHT, job.MODEL.LOSS_FUNC = 0.0, "bce"
    model = hosted(job, has_terms=False)
    trained = {name.split(".")[1] for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {"stem", "layer1", "layer2", "projection"}
    inputs, labels, boxes, *_ = joined([Distinitava(job, "train")[index] for index in range(2)])
    nn.BCELoss()(model.train()(inputs, boxes), labels).backward()
    assert all((parameter.grad is not None) == parameter.requires_grad for parameter in model.parameters())


def load(path, model, **options):
    """What PySlowFast's own function does is not asked for."""

    def theirs(*_, **__):
        raise AssertionError("PySlowFast would have loaded it")

    return with_heads(theirs)(str(path), model, False, torch.optim.SGD(model.parameters(), lr=1.0), **options)


def test_a_backbone_starts_the_trunk(job, tmp_path, caplog):
    caplog.set_level("INFO")
    model = hosted(job)
    trunk = build.build_network(without_boxes(own_cfg(job)), 5)
    save_checkpoint(tmp_path / "trunk.pyth", {"epoch": 3, "model_state": trunk.bare_state_dict()})
    assert load(tmp_path / "trunk.pyth", model, epoch_reset=True) == -1
    (text,) = [record.getMessage() for record in caplog.records if "weights from" in record.getMessage()]
    assert "missing         2  roi_head.projection.weight, roi_head.projection.bias" in text
    assert "unexpected      2  fc.weight, fc.bias" in text
    own = dict(model.state_dict())
    assert all(torch.equal(own[key], value) for key, value in trunk.bare_state_dict().items() if key[:3] != "fc.")
    deep = without_boxes(own_cfg(job))
    deep.RESNET.DEPTH = 18
    deeper = build.build_network(deep, 5)
    save_checkpoint(tmp_path / "deeper.pyth", {"epoch": 3, "model_state": deeper.bare_state_dict()})
    with pytest.raises(WeightsError, match=r"TRAIN\.CHECKPOINT_FILE_PATH: .*so it is of another network"):
        load(tmp_path / "deeper.pyth", model, epoch_reset=True)
    with pytest.raises(WeightsError, match=r"does not fit the network: missing roi_head\.projection"):
        with_heads(load)(str(tmp_path / "trunk.pyth"), model, False)  # a test


def without_boxes(own):
    own.DETECTION.ENABLE = False
    return own


# ---------------------------------------------------------------------------------------------- data


def test_keyframes_of_a_test_in_its_tuple(job, persons):
    dataset = Distinitava(job, "test")
    own = own_cfg(job)
    keyframes = build.build_keyframes(own, "test")
    specs = {f"student/{name}": spec for name, spec in build.build_network(own).view_specs("test").items()}
    data = build.build_dataset(own, keyframes, specs, "test")
    assert len(dataset) == dataset.num_videos == len(keyframes) == 7
    for number in (0, 6):
        inputs, actions, index, time, meta = dataset[number]
        sample = data[SampleKey(0, number, number)]
        whole = finish_views(collate([sample])["views"], specs, "cpu")["student/rgb"][0]
        (clip,) = inputs
        assert torch.equal(clip, whole)
        assert clip.shape[2:] == (32, 48)  # all of a picture of 64 × 96
        assert (index, time.tolist(), actions.shape) == (number, [0.0], (len(meta["boxes"]), 8))
        np.testing.assert_array_equal(meta["ori_boxes"], keyframes.boxes(number))
        np.testing.assert_allclose(meta["boxes"], keyframes.boxes(number) * [48, 32, 48, 32], rtol=1e-5)
        moment = keyframes.moment(number)
        assert meta["metadata"] == [[keyframes.videos.index(moment.video), moment.second]] * len(actions)
    job.AVA.TEST_FORCE_FLIP = True
    mirrored, *_, meta = Distinitava(job, "test")[6]
    torch.testing.assert_close(mirrored[0].flip(-1), whole)
    np.testing.assert_array_equal(meta["ori_boxes"], keyframes.boxes(6))


def test_an_epoch_of_keyframes_is_that_of_the_runner(job):
    job.RUNNER.CLIPS_PER_EPOCH = 20
    dataset = Distinitava(job, "train")
    own = own_cfg(job)
    sampler = build.build_train_sampler(own, build.build_keyframes(own, "train"))
    for epoch in (0, 3):
        dataset._set_epoch_num(epoch)
        sampler.set_epoch(epoch)
        assert [dataset._key(index) for index in range(len(dataset))] == list(sampler)


def test_a_step_is_the_runners(job):
    """Loss and gradients on crops of which one holds nobody, and the loss of nobody at all."""
    job.DATA.TRAIN_JITTER_SCALES = [200, 200]
    dataset = Distinitava(job, "train")
    items = [dataset[index] for index in range(12)]
    empty = [item for item in items if not len(item[1])]
    chosen = [*[item for item in items if len(item[1])][:2], *empty[:1]]
    assert [len(item[1]) > 0 for item in chosen] == [True, True, False]
    inputs, labels, boxes, *_ = joined(chosen)
    model = attach(job, hosted(job)).train()
    loss, terms = DistinitLoss()(model(inputs, boxes), labels)
    loss.backward()
    own = own_cfg(job)
    objective = build.build_objective(own, hosted(job), {})
    objective.trainable.student.load_state_dict(model.state_dict())
    objective.trainable.train()
    step = objective({"student/rgb": inputs[0]}, {"boxes": boxes, "actions": labels})
    step.loss.backward()
    assert loss.item() == pytest.approx(step.loss.item(), rel=1e-5)
    assert loss.item() == pytest.approx(terms[0], rel=1e-5)
    assert loss.item() > 0.1
    wanted = dict(objective.trainable.student.named_parameters())
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, wanted[name].grad)
    model.zero_grad()
    inputs, labels, boxes, *_ = joined(empty[:2])
    loss, _ = DistinitLoss()(model(inputs, boxes), labels)
    loss.backward()
    assert loss.item() == 0
    assert all((parameter.grad is not None) == parameter.requires_grad for parameter in model.parameters())


def test_a_teacher_of_clips_goes_along(unsettled, tmp_path):
    teacher = write_teacher(tmp_path / "teacher.pyth")
    for key, value in brightness_teacher(teacher, LOSS_WEIGHT=0.5).items():
        nodes = "DISTILL.TEACHERS.LIGHT" + (".NETWORK.WIDTH" if key == "NETWORK" else f".{key}")
        unsettled.merge_from_list([nodes, str(value["WIDTH"] if key == "NETWORK" else value)])
    settle(unsettled)
    model = attach(unsettled, hosted(unsettled)).train()
    dataset = Distinitava(unsettled, "train")
    inputs, labels, boxes, *_ = joined([dataset[index] for index in range(3)])
    assert len(inputs) == 2
    loss, (action, light) = DistinitLoss()(model(inputs, boxes), labels)
    assert loss.item() == pytest.approx(action + 0.5 * light, rel=1e-5)
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert min(action, light) > 0.01
    assert len(Distinitava(unsettled, "val")[0][0]) == 1


def test_a_keyframe_within_a_second_is_refused(job, persons, tmp_path):
    folder = tmp_path / "annotations"
    folder.mkdir()
    for path in persons.annotations.iterdir():
        (folder / path.name).write_text(path.read_text().replace(",0903,", ",903.5,"))
    job.AVA.ANNOTATION_DIR = str(folder)
    with pytest.raises(UserError, match=r"val_0000 has a keyframe at 903\.5 s, but .* whole seconds alone"):
        Distinitava(job, "test")


def test_the_meter_gets_the_ground_truth_of_our_evaluator(job, persons):
    judge = build.build_judge(own_cfg(job), "test")
    boxes, actions, scores = their_truth(judge)
    rows = [line.split(",") for line in (persons.annotations / "ava_val_v2.2.csv").read_text().splitlines()]
    assert sum(map(len, boxes.values())) == len(rows)
    for key in boxes:
        own = [row for row in rows if f"{row[0]},{row[1]}" == key]
        assert boxes[key] == [[float(row[place]) for place in (3, 2, 5, 4)] for row in own]
        assert actions[key] == [int(row[6]) for row in own]
        assert scores[key] == [1.0] * len(own)


def test_keyframes_of_a_validation_come_one_by_one(job):
    made = one_by_one(lambda cfg, split, precise: (cfg.TRAIN.BATCH_SIZE, split, precise))
    job.TRAIN.BATCH_SIZE = 6
    assert made(job, "val") == (1, "val", False)
    job.NUM_GPUS = 2
    assert made(job, "val") == (2, "val", False)
    assert made(job, "train", is_precise_bn=True) == (6, "train", True)
    job.TRAIN.DATASET = "ava"
    assert made(job, "val") == (6, "val", False)
    assert job.TRAIN.BATCH_SIZE == 6


# ---------------------------------------------------------------------------------------------- what it means


def test_what_follows_from_boxes(unsettled):
    unsettled.merge_from_list(["RUNNER.CPU_RANKS", "2"])
    for _ in range(2):  # training, then the test
        settle(unsettled)
        assert (unsettled.TRAIN.DATASET, unsettled.TEST.DATASET) == ("distinitava", "distinitava")
        assert (unsettled.MODEL.LOSS_FUNC, unsettled.MODEL.HEAD_ACT) == ("distinit", "sigmoid")
        assert unsettled.TEST.BATCH_SIZE == 2
        assert unsettled.SOLVER.MAX_EPOCH == 1  # of 12 steps
    unsettled.merge_from_list(["MODEL.MODEL_NAME", "ResNet"])
    settle(unsettled)
    assert unsettled.DETECTION.SPATIAL_SCALE_FACTOR == 16


def test_its_own_set_is_left_to_it():
    cfg = root_node()
    words = "DETECTION.ENABLE True TRAIN.DATASET ava TEST.DATASET ava MODEL.LOSS_FUNC bce TEST.BATCH_SIZE 8 NUM_GPUS 0"
    cfg.merge_from_list(words.split())
    settle(cfg)
    assert (cfg.TRAIN.DATASET, cfg.MODEL.LOSS_FUNC, cfg.MODEL.HEAD_ACT) == ("ava", "bce", "softmax")
    assert cfg.TEST.BATCH_SIZE == 8
    cfg.NUM_GPUS = 4
    settle(cfg)
    assert cfg.TEST.BATCH_SIZE == 4  # what PySlowFast asserts
    cfg.merge_from_list(["KEYFRAMES.VIDEO_DIR", "/videos"])
    with pytest.raises(ConfigError, match=r"KEYFRAMES\.VIDEO_DIR: /videos, but TRAIN\.DATASET ava"):
        settle(cfg)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("ROI.PROPOSALS own", r"ROI\.PROPOSALS: own is not possible in PySlowFast"),
        ("ROI.PROPOSALS rpn RPN.WEIGHTS COCO_V1", r"ROI\.PROPOSALS: rpn is not possible in PySlowFast"),
        ("MODEL.MODEL_NAME PersonRpn", r"MODEL\.MODEL_NAME: PersonRpn is not possible in PySlowFast"),
        ("MODEL.MODEL_NAME SlowFast BN.USE_PRECISE_STATS True", r"BN\.USE_PRECISE_STATS: .* without boxes"),
        ("ACTION.LOSS_WEIGHT 0", r"MODEL\.LOSS_FUNC: cross_entropy, but RoI heads give the probability"),
        ("MODEL.MODEL_NAME SlowFast DISTILL.TEACHERS.A.ARCH Res2D", r"DISTILL\.TEACHERS: on boxes they need a network"),
        ("AVA.ANNOTATION_DIR ''", r"AVA\.ANNOTATION_DIR: empty"),
        ("TRAIN.DATASET ava KEYFRAMES.VIDEO_DIR ''", r"TRAIN\.DATASET: ava is a dataset of PySlowFast"),
        ("TASK ssl", r"TASK, MASK\.ENABLE: PySlowFast's other tasks"),
    ],
)
def test_what_cannot_be_done_with_boxes_there_is_refused(unsettled, words, sentence):
    unsettled.merge_from_list(["" if word == "''" else word for word in words.split()])
    with pytest.raises(ConfigError, match=sentence):
        settle(unsettled)


def test_rules_that_its_evaluation_does_not_know_are_named(unsettled, caplog):
    unsettled.merge_from_list(["ROI.EVALUATOR", "mmaction2", "ROI.MAX_DETECTIONS", "0", "ROI.SCORE_FLOOR", "0.1"])
    settle(unsettled)
    (text,) = [record.getMessage() for record in caplog.records if "does not honour" in record.getMessage()]
    assert text.endswith("ROI.SCORE_FLOOR, ROI.EVALUATOR")


def test_a_loss_of_its_own_trains_our_network(unsettled):
    unsettled.merge_from_list(["ACTION.LOSS_WEIGHT", "0", "MODEL.LOSS_FUNC", "bce"])
    settle(unsettled)
    assert (unsettled.MODEL.LOSS_FUNC, unsettled.TRAIN.DATASET) == ("bce", "distinitava")


def test_terms_read_the_logits_of_its_own_heads(job, monkeypatch):
    """A stand-in for a network of PySlowFast, whose RoI head ends in a linear layer and an activation."""
    job.MODEL.MODEL_NAME = "ResNet"
    job.MODEL.ARCH = "slow"

    class Theirs(nn.Module):
        def __init__(self):
            super().__init__()
            self.projection = nn.Linear(3, 8)

        def forward(self, inputs, bboxes=None):
            features = inputs[0].mean(dim=(2, 3, 4))[bboxes[:, 0].long()]
            return self.projection(features).sigmoid()

    torch.manual_seed(2)
    model = attach(job, Theirs()).train()
    inputs = [torch.randn(2, 3, 4, 8, 8)]
    boxes = torch.tensor([[0, 1.0, 1, 4, 4], [1, 0, 0, 8, 8], [1, 2, 2, 4, 4]])
    labels = (torch.rand(3, 8) > 0.5).float()
    preds = model(inputs, boxes)
    loss, _ = DistinitLoss()(preds, labels)
    wanted = nn.functional.binary_cross_entropy(preds, labels)
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)
    loss.backward()
    (gradient,) = torch.autograd.grad(
        nn.functional.binary_cross_entropy(model(inputs, boxes), labels), [model.projection.bias]
    )
    torch.testing.assert_close(model.projection.bias.grad, gradient)


def test_several_processes_score_boxes_together(monkeypatch):
    """What the gathering of PySlowFast gives is joined row by row, also where a process has no box."""
    from distinit_plugin.hosts.slowfast import detection_defects

    parts = [
        [torch.ones(2, 3), torch.ones(2, 5), torch.ones(2, 2)],
        [torch.zeros(0, 3), torch.zeros(0, 5), torch.zeros(0, 2)],
        [torch.full((1, 3), 7.0), torch.zeros(1, 5), torch.zeros(1, 2)],
    ]
    fake = SimpleNamespace(all_gather_unaligned=lambda rows: parts)
    monkeypatch.setitem(__import__("sys").modules, "slowfast", SimpleNamespace(utils=None))
    monkeypatch.setitem(__import__("sys").modules, "slowfast.utils", SimpleNamespace(distributed=fake))
    scores, boxes, metadata = detection_defects._of_all_processes(parts[0])
    assert scores[:, 0].tolist() == [1.0, 1.0, 7.0]
    assert (len(boxes), len(metadata)) == (3, 3)
