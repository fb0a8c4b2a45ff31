"""PySlowFast's networks and files in this package's runner, as far as that goes without PySlowFast."""

import sys
from pathlib import Path
from types import SimpleNamespace

import layouts
import pytest
import torch
import yaml
from small_jobs import brightness_teacher, small_cfg, small_settings
from torch import nn

from distinit_plugin import InputSpec, build, build_network, load_cfg
from distinit_plugin.config.load import parse_cfg, read_cfg
from distinit_plugin.engine import logs
from distinit_plugin.engine.checkpoint import load_checkpoint, newest_state, save_checkpoint
from distinit_plugin.engine.curves import read_curves
from distinit_plugin.engine.optim import build_optimizer, parameter_groups
from distinit_plugin.errors import ConfigError, UserError, WeightsError
from distinit_plugin.hosts.slowfast import checkout
from distinit_plugin.hosts.slowfast.borrowed import BorrowedNetwork, _mean_softmax
from distinit_plugin.hosts.slowfast.checkpoints import split_optimizer, with_head_groups, with_heads
from distinit_plugin.hosts.slowfast.distillation import HEADS, Heads
from distinit_plugin.weights import load_weights
from distinit_plugin.weights.layouts import detect
from distinit_plugin.weights.layouts.pyslowfast_caffe2 import pyslowfast_name

SETTINGS = {
    "MODEL": {"MODEL_NAME": "ResNet", "ARCH": "slow", "NUM_CLASSES": 5},
    "RESNET": {"TRANS_FUNC": "basic_transform", "DEPTH": 18, "NUM_BLOCK_TEMP_KERNEL": [[2], [2], [2], [2]]},
    "DATA": {"PATH_TO_DATA_DIR": "lists"},
}


def written(folder: Path, settings, name="theirs.yaml"):
    (folder / name).write_text(settings if isinstance(settings, str) else yaml.safe_dump(settings))
    return folder / name


# ---------------------------------------------------------------------------------------------------- without it


def test_absent_it_is_one_sentence_and_nothing_is_imported(monkeypatch):
    monkeypatch.delenv(checkout.ROOT_VARIABLE, raising=False)
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *_: None)
    with pytest.raises(
        UserError, match=r"PySlowFast is not here: PYSLOWFAST_ROOT is not set\. Clone https://"
    ) as raised:
        build_network("slowfast/ResNet", num_classes=2, input=InputSpec())
    assert "\n" not in str(raised.value)
    assert not {"slowfast", "slowfast.models"} & set(sys.modules)


# ---------------------------------------------------------------------------------------------------- the network


class Toy(nn.Module):
    """A network in PySlowFast's manner: lists of pathways, places classified alone, probabilities in evaluation."""

    def __init__(self, pathways=1, act=torch.softmax):
        super().__init__()
        self.s1 = nn.ModuleList(nn.Conv3d(3, 4, 1, stride=(1, 4, 4)) for _ in range(pathways))
        self.head = nn.Module()
        self.head.projection = nn.Linear(4 * pathways, 5)
        self.act = act
        self.pool = nn.AvgPool3d((4, 2, 2), stride=1)
        self.given = []

    def forward(self, inputs):
        self.given = [tuple(clip.shape) for clip in inputs]
        maps = [conv(clip) for conv, clip in zip(self.s1, inputs, strict=True)]
        frames = min(x.shape[2] for x in maps)
        x = torch.cat([self.pool(x[:, :, :frames]) for x in maps], 1).permute(0, 2, 3, 4, 1)
        x = self.head.projection(x)
        if not self.training:
            x = (self.act(x, -1) if self.act is torch.softmax else x.sigmoid()).mean((1, 2, 3))
        return x.reshape(len(x), -1)

    def no_weight_decay(self):
        return ["head.projection"]


def borrowed(pathways=1, classifies=True, head="softmax", **options):
    torch.manual_seed(3)
    model = Toy(pathways, torch.softmax if head == "softmax" else None)
    nn.init.normal_(model.head.projection.weight, 0.0, 2.0)
    cfg = SimpleNamespace(
        MODEL=SimpleNamespace(
            HEAD_ACT=head, ARCH="slowfast" if pathways == 2 else "slow", MULTI_PATHWAY_ARCH=["slowfast"]
        ),
        SLOWFAST=SimpleNamespace(ALPHA=2),
        DATA=SimpleNamespace(REVERSE_INPUT_CHANNEL=options.pop("reverse", False)),
    )
    spec = InputSpec(num_frames=4, train_crop_size=8, test_crop_size=16)
    return BorrowedNetwork("slowfast/Toy", model, cfg, input=spec, classifies=classifies)


@pytest.mark.parametrize("head", ["softmax", "sigmoid"])
@pytest.mark.parametrize("size", [8, 16])
def test_logits_are_those_of_its_probabilities(head, size):
    network = borrowed(head=head).eval()
    clip = torch.randn(2, 3, 4, size, size)
    with torch.no_grad():
        output = network({"rgb": clip})
        probabilities = network.model([clip])
    assert output.logits.shape == (2, 5)
    got = output.logits.softmax(1) if head == "softmax" else output.logits.sigmoid()
    assert torch.allclose(got, probabilities, atol=1e-6)
    assert (output.logits.sum(1) - 1).abs().min() > 0.1  # they are no probabilities themselves
    assert output.features.shape == (2, 4)
    if size == 8:  # one place: the layer's own output, of training as well
        assert torch.allclose(output.logits, network.projection(output.features), atol=1e-6)
        assert torch.allclose(network.train()({"rgb": clip}).logits, output.logits, atol=1e-6)


def test_places_that_are_certain_lose_nothing_to_rounding():
    places = torch.tensor([[[3000.0, -3000.0], [-3000.0, 3000.0], [-2000.0, 2000.0], [0.0, 0.0]]])
    wanted = places.softmax(2).mean(1)
    assert torch.allclose(_mean_softmax(places).softmax(1), wanted, atol=1e-6)
    assert wanted.tolist() == [[0.375, 0.625]]


def test_pathways_are_cut_as_pyslowfast_cuts_them():
    network = borrowed(pathways=2)
    network({"rgb": torch.randn(1, 3, 8, 16, 16)})
    assert network.model.given == [(1, 3, 4, 16, 16), (1, 3, 8, 16, 16)]
    clip = torch.arange(8.0).view(1, 1, 8, 1, 1).expand(1, 3, 8, 2, 2)
    slow, fast = network._pathways(clip)
    assert slow[0, 0, :, 0, 0].tolist() == [0, 2, 4, 7]
    assert fast is clip
    colours = torch.arange(3.0).view(1, 3, 1, 1, 1)
    assert borrowed(reverse=True)._pathways(colours)[0].flatten().tolist() == [2, 1, 0]


def test_without_logits_the_classifier_is_there_and_does_not_train():
    network = borrowed(classifies=False)
    output = network({"rgb": torch.randn(1, 3, 4, 8, 8)})
    assert output.logits is None
    assert network.num_classes == 0
    assert network.bare_state_dict().keys() == network.model.state_dict().keys()
    assert [name for name, value in network.named_parameters() if not value.requires_grad] == [
        "model.head.projection.weight",
        "model.head.projection.bias",
    ]
    output.features.sum().backward()
    assert network.model.s1[0].weight.grad.abs().sum() > 0
    network.reset_classifier(7)
    assert network({"rgb": torch.randn(1, 3, 4, 8, 8)}).logits.shape == (1, 7)
    assert network.num_classes == network.bare_state_dict()["head.projection.weight"].shape[0] == 7
    assert network.projection.weight.requires_grad


def test_layers_are_its_stages():
    network = borrowed()
    assert network.layers == {}  # a list of pathways is no stage of one map here
    with pytest.raises(UserError, match="has no layer named 's9'"):
        network({"rgb": torch.randn(1, 3, 4, 8, 8)}, taps=["s9"])


def test_a_file_of_its_model_zoo_starts_it(tmp_path):
    """``model_state`` alone, as published; and one with another number of classes."""
    source, target = borrowed(), borrowed()
    for value in source.bare_state_dict().values():
        value.add_(1.0)
    torch.save({"model_state": source.bare_state_dict()}, tmp_path / "zoo.pyth")
    report = load_weights(target, tmp_path / "zoo.pyth")
    assert report.missing == report.unexpected == report.mismatched == ()
    assert torch.equal(target.model.s1[0].weight, source.model.s1[0].weight)
    target.reset_classifier(9)
    report = load_weights(target, tmp_path / "zoo.pyth")
    assert {mismatch.name for mismatch in report.mismatched} == {"head.projection.weight", "head.projection.bias"}


def test_its_own_names_are_spared_from_weight_decay():
    groups = parameter_groups(borrowed(), weight_decay=0.1, bn_weight_decay=0.0, zero_wd_1d=False)
    assert [(len(group["params"]), group["weight_decay"]) for group in groups] == [(2, 0.1), (2, 0.0)]
    groups = parameter_groups(nn.Linear(2, 2), weight_decay=0.1, bn_weight_decay=0.0, zero_wd_1d=False)
    assert [len(group["params"]) for group in groups] == [2]  # the control


# ---------------------------------------------------------------------------------------------------- its files


def test_a_file_of_pyslowfast_means_the_same(tmp_path):
    cfg, warnings = load_cfg(written(tmp_path, SETTINGS), ["NUM_GPUS", "0", "SOLVER.MAX_EPOCH", "2"])
    assert warnings == []
    assert cfg.MODEL.MODEL_NAME == "slowfast/ResNet"
    assert (cfg.MODEL.ARCH, cfg.RESNET.TRANS_FUNC) == ("slow", "basic_transform")
    assert cfg.RESNET.NUM_BLOCK_TEMP_KERNEL == [[2], [2], [2], [2]]
    # What it does not say has PySlowFast's values, not this package's.
    assert (cfg.DATA.SAMPLING_RATE, cfg.DATA.TEST_CROP_SIZE, cfg.TEST.NUM_SPATIAL_CROPS) == (8, 256, 3)
    assert (cfg.MODEL.DROPOUT_RATE, cfg.SOLVER.LR_POLICY, cfg.TRAIN.EVAL_PERIOD) == (0.5, "cosine", 10)
    assert (cfg.SOLVER.CLIP_GRAD_L2NORM, cfg.SOLVER.STEPS) == (0.0, [0])
    assert (cfg.ACTION.LOSS_WEIGHT, cfg.CORPUS.TARGET_FPS) == (1.0, 30.0)
    again, _ = parse_cfg(cfg.dump(), "its text")
    assert again == cfg


def test_values_that_pyslowfast_writes_otherwise(tmp_path):
    solver = {"LR_POLICY": "steps_with_relative_lrs", "STEPS": [0, 2, 4, 6], "LRS": [1, 0.1, 0.01, 0.001, 1e-4]}
    settings = {**SETTINGS, "TRAIN": {"DATASET": "ptvkinetics"}, "SOLVER": {**solver, "MAX_EPOCH": 6}}
    cfg, _ = load_cfg(written(tmp_path, settings))
    assert (cfg.TRAIN.DATASET, cfg.SOLVER.STEPS, cfg.SOLVER.LRS) == ("kinetics", [0, 2, 4], [1.0, 0.1, 0.01])
    settings["MODEL"] = {"MODEL_NAME": "R2Plus1D"}
    with pytest.raises(ConfigError, match=r"TRAIN\.DATASET: 'ptvkinetics' .*\n.*SOLVER\.LRS: 5 factor"):
        load_cfg(written(tmp_path, settings), ["ACTION.LOSS_WEIGHT", "1"])


def test_one_thing_that_is_wrong_is_said_once(tmp_path):
    reading = read_cfg(written(tmp_path, {**SETTINGS, "MODEL": {"MODEL_NAME": "ResNet", "LOSS_FUNC": "bce_logit"}}))
    assert [problem.split(":")[0] for problem in reading.problems] == ["MODEL.LOSS_FUNC"]


def test_other_files_start_from_this_packages_defaults(tmp_path):
    ours = {"MODEL": {"MODEL_NAME": "R2Plus1D"}, "DATA": {"PATH_TO_DATA_DIR": "lists"}, "ACTION": {"LOSS_WEIGHT": 1.0}}
    cfg, _ = load_cfg(written(tmp_path, ours))
    assert (cfg.DATA.SAMPLING_RATE, cfg.DATA.TEST_CROP_SIZE, cfg.CORPUS.TARGET_FPS) == (1, 112, 0.0)
    named = {**SETTINGS, "ACTION": {"LOSS_WEIGHT": 1.0}}
    cfg, _ = load_cfg(written(tmp_path, named))
    assert (cfg.MODEL.MODEL_NAME, cfg.DATA.SAMPLING_RATE, cfg.MODEL.ARCH) == ("slowfast/ResNet", 1, "slow")
    cfg, warnings = load_cfg(written(tmp_path, SETTINGS), ["MODEL.MODEL_NAME", "Res3D", "ACTION.LOSS_WEIGHT", "1"])
    assert cfg.MODEL.MODEL_NAME == "Res3D"
    assert any(warning.startswith("MODEL.ARCH is 'slow'") for warning in warnings)
    assert "ARCH" not in cfg.MODEL


def test_a_file_of_pyslowfast_with_teachers_trains_on_them(tmp_path):
    written(tmp_path, SETTINGS)
    entry = {**brightness_teacher(tmp_path / "teacher.pyth"), "FRAME_PICK": "center"}
    settings = {"_BASE_": "theirs.yaml", "DISTILL": {"TEACHERS": {"LIGHT": entry}}, "TEST": {"ENABLE": False}}
    cfg, _ = load_cfg(written(tmp_path, settings, "ours.yaml"))
    assert (cfg.ACTION.LOSS_WEIGHT, cfg.DATA.SAMPLING_RATE, cfg.CORPUS.TARGET_FPS) == (0.0, 8, 0.0)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("MODEL: {MODEL_NAME: ResNet, LOSS_FUNC: bce_logit}", r"MODEL\.LOSS_FUNC: bce_logit .* distinit slowfast"),
        ("MODEL: {MODEL_NAME: ContrastiveModel}", r"MODEL\.MODEL_NAME: 'ContrastiveModel' is not allowed"),
        ("MODEL: {MODEL_NAME: ResNet}\nDETECTION: {ENABLE: True}", r"DETECTION\.ENABLE: slowfast/ResNet"),
        ("MODEL: {MODEL_NAME: ResNet}\nMVIT: {DETPH: 3}", r"MVIT\.DETPH .*no such key.* Did you mean DEPTH"),
        ("MODEL: {MODEL_NAME: slowfast/}", r"MODEL\.MODEL_NAME: 'slowfast/' is not allowed"),
    ],
)
def test_what_this_runner_cannot_do_with_them_is_said(tmp_path, text, sentence):
    with pytest.raises(ConfigError, match=sentence):
        load_cfg(written(tmp_path, text), ["DATA.PATH_TO_DATA_DIR", "lists"])


def test_its_keys_that_are_not_honoured_are_named(tmp_path):
    settings = {**SETTINGS, "AUG": {"ENABLE": True}, "SOLVER": {"LAYER_DECAY": 0.75}}
    reading = read_cfg(written(tmp_path, settings))
    assert sorted(reading.unhonoured) == ["AUG.ENABLE", "SOLVER.LAYER_DECAY"]
    assert [warning.split()[0] for warning in reading.warnings] == ["AUG.ENABLE", "SOLVER.LAYER_DECAY"]


def test_a_key_twice_is_read_in_its_files_alone(tmp_path):
    text = "MODEL: {MODEL_NAME: X3D}\nTRAIN: {BATCH_SIZE: 2, BATCH_SIZE: 8}\n"
    words = ["DATA.PATH_TO_DATA_DIR", "lists"]
    cfg, _ = load_cfg(written(tmp_path, text), words)
    assert cfg.TRAIN.BATCH_SIZE == 8
    with pytest.raises(ConfigError, match="BATCH_SIZE is written twice"):
        load_cfg(written(tmp_path, text.replace("X3D", "Res3D")), words)


@pytest.mark.parametrize(
    ("entry", "sentence"),
    [
        (
            {"ARCH": "slowfast/ResNet", "WEIGHTS": "random"},
            r"LIGHT\.CFG: empty, and no weights say what slowfast/ResNet",
        ),
        ({"CFG": "theirs.yaml"}, r"LIGHT\.CFG: theirs\.yaml describes a network of PySlowFast, ARCH is Res2D"),
    ],
)
def test_a_teachers_own_file(tmp_path, entry, sentence):
    base = brightness_teacher(tmp_path / "teacher.pyth")
    if "ARCH" in entry:
        base = {key: value for key, value in base.items() if key not in ("DEPTH", "NETWORK")}
    settings = small_settings(tmp_path, tmp_path / "run", DISTILL={"TEACHERS": {"LIGHT": {**base, **entry}}})
    with pytest.raises(ConfigError, match=sentence):
        load_cfg(written(tmp_path, settings))


def test_a_teachers_weights_must_say_what_it_is(tmp_path):
    torch.save({"model_state": borrowed().bare_state_dict()}, tmp_path / "zoo.pyth")
    entry = {"ARCH": "slowfast/ResNet", "WEIGHTS": str(tmp_path / "zoo.pyth"), "NUM_CLASSES": 5, "FRAME_PICK": "clip"}
    cfg = small_cfg(tmp_path, tmp_path / "run", DISTILL={"TEACHERS": {"ITS": entry}})
    with pytest.raises(
        UserError, match=r"ITS: teacher slowfast/ResNet: .*zoo\.pyth does not say what its network is.*CFG"
    ):
        build.build_teacher(cfg, "ITS")


# ---------------------------------------------------------------------------------------------------- its checkpoints


class Student(nn.Module):
    """Convolution, normalisation and a position embedding that has no decay."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv3d(1, 2, 1)
        self.norm = nn.BatchNorm3d(2)
        self.pos_embed = nn.Parameter(torch.zeros(3))


class Pair(nn.Module):
    """As ``objectives.Trainable``: student, then adapters."""

    def __init__(self):
        super().__init__()
        self.student = Student()
        self.adapters = nn.ModuleDict({"A": nn.Linear(2, 3), "B": nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))})


def hosted(pair, zero_wd):
    """PySlowFast's optimizer of the same modules: the student's groups, then the heads'."""
    model = pair.student
    model.add_module(HEADS, Heads(pair.adapters))
    solver = SimpleNamespace(WEIGHT_DECAY=0.1, ZERO_WD_1D_PARAM=zero_wd)
    cfg = SimpleNamespace(SOLVER=solver, BN=SimpleNamespace(WEIGHT_DECAY=0.0), NUM_GPUS=0)

    def construct(model, cfg):
        groups = parameter_groups(model, weight_decay=0.1, bn_weight_decay=0.0, zero_wd_1d=zero_wd)
        return torch.optim.SGD(groups, lr=0.1, momentum=0.9)

    return with_head_groups(construct)(model, cfg)


def mark(optimizer, names):
    """A slot for every parameter that says whose it is."""
    for number, parameter in enumerate(names.values()):
        optimizer.state[parameter]["momentum_buffer"] = torch.full_like(parameter, number)


def marks(optimizer, names):
    return {name: optimizer.state[parameter]["momentum_buffer"].mean().item() for name, parameter in names.items()}


def named(pair):
    student = {name: value for name, value in pair.student.named_parameters() if HEADS not in name}
    return student | {f"adapters.{name}": value for name, value in pair.adapters.named_parameters()}


@pytest.mark.parametrize("zero_wd", [False, True])
def test_slots_of_the_optimizer_travel_to_pyslowfast(tmp_path, zero_wd):
    ours, theirs = Pair(), Pair()
    optimizer = build_optimizer(ours, "sgd", lr=0.1, weight_decay=0.1, zero_wd_1d=zero_wd)
    mark(optimizer, named(ours))
    own = {"progress": {}, "adapters": ours.adapters.state_dict()}
    state = {
        "epoch": 0,
        "model_state": ours.student.state_dict(),
        "optimizer_state": optimizer.state_dict(),
        "distinit": own,
    }
    save_checkpoint(tmp_path / "ours.pyth", state)
    taken = hosted(theirs, zero_wd)

    def load(path, model, data_parallel, optimizer, scaler, **_):
        optimizer.load_state_dict(load_checkpoint(path)["optimizer_state"])
        return 0

    with_heads(load)(str(tmp_path / "ours.pyth"), theirs.student, False, taken)
    assert marks(taken, named(theirs)) == marks(optimizer, named(ours))
    assert all({"layer_decay", "apply_LARS"} <= group.keys() for group in taken.param_groups)
    assert torch.equal(theirs.adapters["A"].weight, ours.adapters["A"].weight)


@pytest.mark.parametrize("zero_wd", [False, True])
def test_slots_of_the_optimizer_travel_back(zero_wd):
    from distinit_plugin.engine.state import RunState

    theirs, ours = Pair(), Pair()
    there = hosted(theirs, zero_wd)
    mark(there, named(theirs))
    student, heads = split_optimizer(there.state_dict())
    saved = {
        "epoch": 2,
        "model_state": {key: value for key, value in theirs.student.state_dict().items() if HEADS not in key},
        "optimizer_state": student,
        "distinit": {"adapters": theirs.adapters.state_dict(), "optimizer": heads},
    }
    optimizer = build_optimizer(ours, "sgd", lr=0.1, weight_decay=0.1, zero_wd_1d=zero_wd)
    ours.student.bare_state_dict = ours.student.state_dict
    state = RunState(SimpleNamespace(trainable=ours), optimizer, None, None, None)
    state.load_state_dict(saved, torch.device("cpu"))
    assert (state.epoch, state.step_in_epoch) == (3, 0)
    assert marks(optimizer, named(ours)) == marks(there, named(theirs))
    assert torch.equal(ours.adapters["B"][0].weight, theirs.adapters["B"][0].weight)
    with pytest.raises(WeightsError, match="has weights alone"):
        state.load_state_dict({"model_state": saved["model_state"]}, torch.device("cpu"))
    with pytest.raises(WeightsError, match=r"its optimizer trained \d+ tensors, this job trains \d+"):
        state.load_state_dict({**saved, "distinit": {"adapters": saved["distinit"]["adapters"]}}, torch.device("cpu"))
    decayed = {**student, "param_groups": [{**group, "layer_decay": 0.5} for group in student["param_groups"]]}
    with pytest.raises(WeightsError, match=r"SOLVER\.LAYER_DECAY"):
        state.load_state_dict({**saved, "optimizer_state": decayed}, torch.device("cpu"))


def test_the_later_epoch_counts_whichever_program_wrote_it(tmp_path):
    weights = {"model_state": {"weight": torch.zeros(1)}}
    own = {"distinit": {"progress": {"step": 7}}}
    save_checkpoint(tmp_path / "resume.pyth", {"epoch": 0, **weights, **own})
    save_checkpoint(tmp_path / "checkpoint_epoch_00001.pyth", {"epoch": 0, **weights})
    assert newest_state(tmp_path)[0].name == "resume.pyth"
    save_checkpoint(tmp_path / "checkpoint_epoch_00002.pyth", {"epoch": 1, **weights})
    assert newest_state(tmp_path)[0].name == "checkpoint_epoch_00002.pyth"


# ---------------------------------------------------------------------------------------------------- its logs

START = "[11/21 21:00:01][INFO] logging.py:  99: json_stats: "
LOG = f"""\
{START}{{"RAM": "1.80/7.60G", "_type": "train_iter_", "dt": 0.5, "epoch": "1/2", "eta": "0:00:02", "gpu_mem": "0.00G", \
"grad_norm": Infinity, "iter": "1/2", "loss": 2.50000, "lr": 0.01000, "top1_err": 50.00000}}
{START}{{"_type": "train_epoch", "epoch": "1/2", "loss": 2.25000, "loss_0": 1.0, "lr": 0.00500}}
{START}{{"_type": "val_epoch", "epoch": "1/2", "min_top1_err": 75.0, "top1_err": 75.0}}
{START}{{"cur_iter": "1", "eta": "0:00:01", "split": "test_iter", "time_diff": 0.1}}
{START}{{"split": "test_final", "top1_acc": "20.00", "top5_acc": "60.00"}}
{START}{{"_type": "train_epoch", "epoch": "2/2", "los
"""
AVA_LOG = """\
json_stats: {"_type": "train_iter", "cur_epoch": "1/1", "cur_iter": "1", "loss": 0.7, "lr": 0.1, "mode": "train"}
json_stats: {"_type": "train_iter", "cur_epoch": "1/1", "cur_iter": "2", "loss": 0.6, "lr": 0.1, "mode": "train"}
json_stats: {"_type": "val_epoch", "cur_epoch": "1", "map": 0.12500, "mode": "val"}
json_stats: {"map": 0.25000, "mode": "test"}
"""


def test_its_logs_are_read_by_the_same_reader(tmp_path):
    (tmp_path / "stdout.log").write_text(LOG)
    kinds = [line.kind for line in logs.read_log(tmp_path)]
    assert kinds == ["train_iter", "train_epoch", "val_epoch", "test_iter", "test_final"]
    first = logs.read_log(tmp_path)[0]
    assert (first.epoch, first.step, first.steps) == (1, 1, 2)
    assert first.values == {"dt": 0.5, "gpu_mem": 0.0, "loss": 2.5, "lr": 0.01, "top1_err": 50.0}
    assert logs.final_test(tmp_path) == {"top1_acc": 20.0, "top5_acc": 60.0}
    curves = read_curves(tmp_path)
    assert (curves.train_loss, curves.val_top1, curves.lr) == ({0.5: 2.5}, {1.0: 25.0}, {0.5: 0.01, 1.0: 0.005})


def test_so_are_those_of_ava(tmp_path):
    (tmp_path / "stdout.log").write_text(AVA_LOG)
    curves = read_curves(tmp_path)
    assert (curves.train_loss, curves.val_map) == ({0.5: 0.7, 1.0: 0.6}, {1.0: 12.5})
    assert logs.final_test(tmp_path) == {"map": 0.25}


@pytest.mark.parametrize(
    "line", ["", "json_stats: []", "json_stats: {", 'json_stats: {"_type": "train_epoch"}', "x: {}"]
)
def test_other_lines_are_passed_over(line):
    assert logs.parse_line(line) is None


# ---------------------------------------------------------------------------------------------------- its older files


@pytest.mark.parametrize(
    ("blob", "key"),
    [
        ("conv1_w", "s1.pathway0_stem.conv.weight"),
        ("conv1_xy_w", "s1.pathway0_stem.conv_xy.weight"),
        ("t_res_conv1_bn_riv", "s1.pathway1_stem.bn.running_var"),
        ("res4_5_branch2c_bn_s", "s4.pathway0_res5.branch2.c_bn.weight"),
        ("t_res3_1_branch2a_w", "s3.pathway1_res1.branch2.a.weight"),
        ("res2_0_branch1_bn_rm", "s2.pathway0_res0.branch1_bn.running_mean"),
        ("res2_0_branch2b_bn_fc1_w", "s2.pathway0_res0.branch2.se.fc1.weight"),
        ("t_pool1_subsample_w", "s1_fuse.conv_f2s.weight"),
        ("t_res2_2_branch2c_bn_subsample_bn_b", "s2_fuse.bn.bias"),
        ("nonlocal_conv3_1_theta_w", "s3.pathway0_nonlocal1.conv_theta.weight"),
        ("nonlocal_conv4_5_bn_s", "s4.pathway0_nonlocal5.bn.weight"),
        ("pred_b", "head.projection.bias"),
        ("lin_5_w", "head.lin_5.weight"),
        ("model_iter", None),
    ],
)
def test_blobs_of_its_caffe2_files_have_its_names(blob, key):
    assert pyslowfast_name(blob) == key


def test_a_caffe2_file_of_its_model_zoo_is_translated():
    """Every tensor of a network of PyTorchVideo, there and back, without values."""
    with torch.device("meta"):
        network = build_network("pytorchvideo/slow_r50", num_classes=400, input=InputSpec(num_frames=4))
    state = {key: value for key, value in layouts.state_of(network).items() if "tracked" not in key}
    blobs = {layouts.pyslowfast_blob(key): value for key, value in layouts.pyslowfast(state).items()}
    assert len(blobs) == len(state)
    blobs |= {"lr": torch.zeros(1), "pred_w_momentum": torch.zeros(2)}
    layout, _ = detect(blobs)
    assert layout.name == "pyslowfast-c2"
    translation = layout.translate(blobs, network.bare_state_dict())
    assert {key: id(value) for key, value in translation.tensors.items()} == {key: id(state[key]) for key in state}
    assert sorted(translation.skipped) == ["lr", "pred_w_momentum"]
