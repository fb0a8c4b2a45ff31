"""The adapter to PySlowFast, as far as it goes without PySlowFast; with it: ``test_slowfast_runs.py``."""

import ast
import os
import pickle
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from fvcore.common.config import CfgNode as FvcoreNode
from slowfast_nodes import root_node
from small_jobs import brightness_teacher, small_settings, write_teacher
from torch.utils.data import default_collate

from distinit_plugin import InputSpec, build, build_network, cli
from distinit_plugin.config.load import shipped_configs
from distinit_plugin.config.pyslowfast_keys import PYSLOWFAST_DEFAULTS
from distinit_plugin.engine.checkpoint import load_checkpoint as read_checkpoint
from distinit_plugin.engine.checkpoint import save_checkpoint as write_checkpoint
from distinit_plugin.errors import ConfigError, UserError, WeightsError
from distinit_plugin.hosts.slowfast import boot, checkout, launching
from distinit_plugin.hosts.slowfast.checkpoints import (
    join_optimizer,
    split_optimizer,
    with_head_groups,
    with_heads,
    with_position,
)
from distinit_plugin.hosts.slowfast.corpora import Distinitcorpus
from distinit_plugin.hosts.slowfast.distillation import DistinitLoss, attach, heads_of
from distinit_plugin.hosts.slowfast.missing import ROIAlign, SoftTargetCrossEntropyLoss
from distinit_plugin.hosts.slowfast.networks import build_hosted, hosted_class
from distinit_plugin.hosts.slowfast.patches import WITHOUT_VARIABLE, Patch, apply_patches, switched_off
from distinit_plugin.hosts.slowfast.schema import OWN_NODES, HostNode, own_cfg
from distinit_plugin.hosts.slowfast.settling import settle
from distinit_plugin.types import SampleKey

PACKAGE = Path(cli.__file__).parent


def write_tree(root: Path, names: tuple[str, ...]) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("")
    return root


# ---------------------------------------------------------------------------------------------- where it is


def test_nothing_but_its_command_and_the_doctor_import_the_adapter():
    importing = set()
    for path in PACKAGE.rglob("*.py"):
        text = path.read_text("utf-8")
        for node in ast.walk(ast.parse(text)) if "distinit_plugin.hosts" in text else ():
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if any(name.startswith("distinit_plugin.hosts") for name in names):
                importing.add(path.relative_to(PACKAGE).parts[0] + "/" + path.name)
    assert {name for name in importing if not name.startswith(("hosts/", "doctor/"))} == {"commands/run_slowfast.py"}


def test_absent_it_is_one_sentence(monkeypatch, capsys, tmp_path):
    monkeypatch.delenv(checkout.ROOT_VARIABLE, raising=False)
    monkeypatch.setattr(checkout.importlib.util, "find_spec", lambda name: None)
    assert cli.main(["slowfast", "--cfg", "x.yaml"]) == cli.EXIT_USER_ERROR
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "PYSLOWFAST_ROOT" in said
    monkeypatch.setenv(checkout.ROOT_VARIABLE, str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match=r"PYSLOWFAST_ROOT is .*nowhere, which is not a folder"):
        checkout.find_checkout()


def test_the_package_of_2020_and_other_folders_are_told_apart(monkeypatch, tmp_path):
    old = write_tree(tmp_path / "old", ("slowfast/__init__.py", f"slowfast/{checkout.OF_2020}"))
    monkeypatch.setenv(checkout.ROOT_VARIABLE, str(old))
    with pytest.raises(UserError, match=r"release 1\.0 of slowfast, of January 2020"):
        checkout.find_checkout()
    part = write_tree(tmp_path / "part", checkout.NEEDED[:3])
    monkeypatch.setenv(checkout.ROOT_VARIABLE, str(part))
    with pytest.raises(UserError, match=r"no checkout of PySlowFast: tools/run_net\.py is missing"):
        checkout.find_checkout()
    whole = write_tree(tmp_path / "whole", checkout.NEEDED)
    monkeypatch.setenv(checkout.ROOT_VARIABLE, str(whole))
    assert checkout.find_checkout() == whole.resolve()


def test_an_importable_package_is_found(monkeypatch, tmp_path):
    root = write_tree(tmp_path, ("slowfast/__init__.py", *checkout.NEEDED))
    monkeypatch.delenv(checkout.ROOT_VARIABLE, raising=False)
    monkeypatch.syspath_prepend(str(root))
    monkeypatch.delitem(sys.modules, "slowfast", raising=False)
    assert checkout.find_checkout() == root.resolve()


def test_absent_packages_are_named_together(monkeypatch):
    monkeypatch.setattr(checkout, "PACKAGES", {"absent_one": "one==1", "json": "json", "absent_two": "two"})
    with pytest.raises(UserError, match="pip install one==1 two "):
        checkout.check_packages()


# ---------------------------------------------------------------------------------------------- patches


def test_patches_are_applied_where_the_defect_is_and_switched_off_by_name(monkeypatch):
    cured = []
    patches = [
        Patch(name, "", lambda here=here: here, lambda name=name: cured.append(name))
        for name, here in (("one", True), ("two", False), ("three", True))
    ]
    monkeypatch.setenv(WITHOUT_VARIABLE, "three")
    applied = apply_patches(patches, switched_off(patches))
    assert cured == ["one"]
    assert [patch.name for patch in applied] == ["one"]
    monkeypatch.setenv(WITHOUT_VARIABLE, "tree")
    with pytest.raises(UserError, match=r"no patch named 'tree'.*Did you mean three"):
        switched_off(patches)


def test_patches_are_documented_each_once():
    names = [patch.name for patch in boot.PATCHES]
    assert len(set(names)) == len(names) > 10
    text = (PACKAGE.parent / "projects" / "slowfast_host" / "README.md").read_text("utf-8")
    assert [name for name in names if f"| `{name}` |" not in text] == []


def test_soft_targets_against_a_loop():
    logits = torch.tensor([[1.0, 2.0, -1.0], [0.5, 0.0, 0.25]], dtype=torch.float64)
    targets = torch.tensor([[0.5, 0.5, 1.0], [0.0, 2.0, 0.0]], dtype=torch.float64)
    each = []
    for row, weights in zip(logits.tolist(), targets.tolist(), strict=True):
        normalizer = sum(torch.tensor(value, dtype=torch.float64).exp().item() for value in row)
        log_probs = [value - torch.tensor(normalizer).log().item() for value in row]
        each.append(-sum(weight * value for weight, value in zip(weights, log_probs, strict=True)))
    plain = SoftTargetCrossEntropyLoss(normalize_targets=False, reduction="none")(logits, targets)
    assert plain.tolist() == pytest.approx(each, abs=1e-6)
    normalised = SoftTargetCrossEntropyLoss()(logits, targets)
    assert normalised.item() == pytest.approx((each[0] / 2 + each[1] / 2) / 2, abs=1e-6)
    labels = torch.tensor([2, -100])
    expected = torch.nn.functional.cross_entropy(logits[:1], labels[:1]) / 2
    assert SoftTargetCrossEntropyLoss(normalize_targets=False)(logits, labels).item() == pytest.approx(expected.item())


def test_roi_align_takes_the_mean_of_a_box():
    feature_map = torch.arange(16.0).view(1, 1, 4, 4)
    pooled = ROIAlign(1, 1.0, 0, aligned=True)(feature_map, torch.tensor([[0, 0, 0, 4, 4]]))
    assert pooled.item() == pytest.approx(feature_map.mean().item())


# ---------------------------------------------------------------------------------------------- configuration


@pytest.fixture
def root():
    """PySlowFast's root node, from the table of its keys, with our nodes in it."""
    return root_node()


def test_each_file_starts_from_the_defaults_it_was_written_for(root, tmp_path):
    assert (root.MODEL.MODEL_NAME, root.DATA.TRAIN_CROP_SIZE) == ("SlowFast", 224)
    theirs = tmp_path / "theirs.yaml"
    theirs.write_text("SOLVER: {BASE_LR: 1, BASE_LR: 2}\n")
    on_it = tmp_path / "on_it.yaml"
    on_it.write_text("_BASE_: theirs.yaml\nDISTILL: {TEACHERS: {A: {ARCH: timm/vit, LOSS_WEIGHT: 3}}}\n")
    cfg = root.clone()
    cfg.merge_from_file(str(on_it))
    assert (cfg.MODEL.MODEL_NAME, cfg.DATA.TRAIN_CROP_SIZE, cfg.SOLVER.BASE_LR) == ("SlowFast", 224, 2.0)
    assert cfg.DISTILL.TEACHERS.A.LOSS_WEIGHT == 3.0
    assert cfg.DISTILL.TEACHERS.A.TEMPERATURE == 1.0
    assert "A" not in root.DISTILL.TEACHERS
    alone = tmp_path / "alone.yaml"
    alone.write_text("CORPUS: {TRAIN: {A: {PATH: /videos}}}\n")
    standing_alone = root.clone()
    standing_alone.merge_from_file(str(alone))
    assert (standing_alone.MODEL.MODEL_NAME, standing_alone.DATA.TRAIN_CROP_SIZE) == ("R2Plus1D", 112)
    ours = root.clone()
    ours.merge_from_file("configs/DistInit/table1_r2plus1d18_scratch.yaml")
    assert (ours.MODEL.MODEL_NAME, ours.DATA.TRAIN_CROP_SIZE) == ("R2Plus1D", 112)
    again = pickle.loads(pickle.dumps(ours))
    assert isinstance(again, HostNode)
    assert again == ours


def test_every_shipped_file_loads_there(root):
    names = shipped_configs()
    assert len(names) > 100
    for name in names[::7]:
        root.clone().merge_from_file(name)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["SOLVER.BASE_RL", "1"], r"SOLVER\.BASE_RL\. Did you mean SOLVER\.BASE_LR"),
        (["SOLVER.BASE_LR", "much"], r"Type mismatch .*SOLVER\.BASE_LR"),
        (["DISTILL.GAET", "skip"], r"DISTILL\.GAET .*Did you mean GATE"),
        (["DISTILL.TEACHERS.X.LOSS_WEIGHT", "1"], r"give DISTILL\.TEACHERS\.X\.ARCH"),
        (["NUM_GPUS"], "'NUM_GPUS' is left over"),
    ],
)
def test_a_wrong_word_is_one_sentence(root, words, sentence):
    with pytest.raises(ConfigError, match=sentence):
        root.clone().merge_from_list(words)


def test_words_are_merged_by_the_rules_of_their_node(root):
    cfg = root.clone()
    words = "DISTILL.TEACHERS.X.ARCH timm/vit DISTILL.TEACHERS.X.LOSS_WEIGHT 2 SOLVER.BASE_LR 1 DATA.MEAN [0,0,1]"
    cfg.merge_from_list(words.split())
    assert (cfg.DISTILL.TEACHERS.X.LOSS_WEIGHT, cfg.SOLVER.BASE_LR, cfg.DATA.MEAN) == (2.0, 1.0, [0, 0, 1])
    assert not {node for node in OWN_NODES if node in PYSLOWFAST_DEFAULTS}


# ---------------------------------------------------------------------------------------------- processes


def test_a_free_port_is_free():
    host, port = launching.free_port().removeprefix("tcp://").split(":")
    with socket.socket() as there:
        there.bind((host, int(port)))


def test_what_a_process_says_to_people_comes_through():
    text = "\n-- Process 1 terminated\nTraceback …\ndistinit_plugin.errors.UserError: DATA is empty. Fill it.\n"
    assert launching.told(text) == "DATA is empty. Fill it."
    assert launching.told("Traceback\nValueError: 3\n") is None


def test_a_command_without_a_yaml_file_says_so():
    program = [sys.executable, "-m", "distinit_plugin.hosts.slowfast"]
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE.parent)}
    done = subprocess.run(program, capture_output=True, text=True, env=environment)
    assert done.returncode == 2
    assert "--cfg" in done.stderr


# ---------------------------------------------------------------------------------------------- config --plain


def test_the_plain_part_is_what_it_alone_reads(root, tmp_path, capsys):
    config = tmp_path / "mine.yaml"
    config.write_text(
        "MODEL: {MODEL_NAME: ResNet, ARCH: slow, LOSS_FUNC: bce, NUM_CLASSES: 7}\nSOLVER: {CLIP_GRAD_L2NORM: 0.0}\n"
        "DISTILL: {TEACHERS: {A: {ARCH: timm/vit_tiny_patch16_224}}}\nCORPUS: {TRAIN: {A: {PATH: /videos}}}\n"
    )
    output = tmp_path / "plain.yaml"
    words = ["config", "--plain", "--output", str(output), "--cfg", str(config), "DATA.NUM_FRAMES", "4"]
    assert cli.main(words) == 0
    assert "CORPUS is left out" in capsys.readouterr().err
    alone = FvcoreNode(yaml.safe_load(output.read_text()))
    assert alone.MODEL == {"MODEL_NAME": "ResNet", "ARCH": "slow", "NUM_CLASSES": 7, "DROPOUT_RATE": 0.0}
    assert (alone.DATA.NUM_FRAMES, alone.DATA.TRAIN_CROP_SIZE) == (4, 112)
    assert alone.TRAIN.CHECKPOINT_EPOCH_RESET is True
    assert "CLIP_GRAD_L2NORM" not in alone.SOLVER
    assert not set(OWN_NODES) & set(alone)
    FvcoreNode.merge_from_other_cfg(root.clone(), alone)
    assert cli.main(["config", "--plain", "--cfg", "configs/DistInit/table1_r2plus1d18_scratch.yaml"]) == 1
    assert "R2Plus1D is a network of this package" in capsys.readouterr().err


def test_a_configuration_is_printed_whole(capsys):
    assert cli.main(["config", "--cfg", "configs/DistInit/table1_r2plus1d18_scratch.yaml", "DATA.NUM_FRAMES", "4"]) == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["DATA"]["NUM_FRAMES"] == 4
    assert printed["RUNNER"]["ACCUMULATE"] >= 1


# ---------------------------------------------------------------------------------------------- terms, heads, traps


@pytest.fixture
def job(root, videos, tmp_path):
    """A DistInit job of the adapter, settled: PySlowFast is not needed for a network of this package."""
    teacher = write_teacher(tmp_path / "teacher.pyth")
    settings = small_settings(
        videos, tmp_path / "run", DISTILL={"TEACHERS": {"LIGHT": brightness_teacher(teacher, LOSS_WEIGHT=0.5)}}
    )
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(settings))
    cfg = root.clone()
    cfg.merge_from_file(str(path))
    settle(cfg)
    return cfg


def hosted(cfg):
    own = own_cfg(cfg)
    return attach(cfg, build_hosted(own, has_terms=True, initialize=True, activation="softmax"))


def test_terms_reach_the_loss_through_hooks(job, caplog):
    torch.manual_seed(3)
    caplog.set_level("INFO")
    assert (job.MODEL.LOSS_FUNC, job.TRAIN.DATASET, job.MODEL.ARCH) == ("distinit", "distinitcorpus", "distinit")
    model = hosted(job)
    assert "loss_0: LIGHT" in caplog.text
    dataset = Distinitcorpus(job, "train")
    inputs, labels, _, times, meta = default_collate([dataset[index] for index in range(4)])
    assert labels.tolist() == [-1] * 4
    assert (meta, times.shape, inputs[0].dtype, inputs[1].dtype) == ({}, (4, 1), torch.float32, torch.uint8)
    preds = model(inputs)
    loss, terms = DistinitLoss(reduction="mean")(preds, labels)
    assert set(labels.tolist()) <= {0, 1, 2, 3}  # the teacher's best classes
    assert loss.item() == pytest.approx(0.5 * terms[0], rel=1e-5)
    loss.backward()
    heads = heads_of(model)
    assert heads is not None
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert any(parameter.grad.abs().max() > 0 for parameter in heads.parameters())
    assert preds.shape == (4, 4)
    with pytest.raises(AssertionError, match="before the model ran"):
        DistinitLoss()(preds, labels)  # what a pass left is taken once
    with torch.no_grad():
        assert model(inputs[:1]).shape == (4, model.feature_dim)  # precise BN: nothing is kept for a loss


def test_layers_behind_what_is_read_stay(job):
    job.merge_from_list(
        ["DISTILL.TEACHERS.LIGHT.LAYER", "feature_map", "DISTILL.TEACHERS.LIGHT.STUDENT_LAYER", "layer2"]
    )
    job.merge_from_list(["DISTILL.TEACHERS.LIGHT.LOSS", "mse"])
    model = hosted(job)
    trained = {name.split(".")[0] for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {"stem", "layer1", "layer2", "distinit_heads"}
    inputs, labels, *_ = default_collate([Distinitcorpus(job, "train")[0]])
    loss, _ = DistinitLoss()(model(inputs), labels)
    loss.backward()
    assert all((parameter.grad is not None) == parameter.requires_grad for parameter in model.parameters())


def test_heads_are_trained_and_not_shown(job):
    model = hosted(job)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert not [name for name in before if "heads" in name]
    assert type(model).__name__ == "R2Plus1D"
    assert any(name.startswith("distinit_heads.") for name, _ in model.named_parameters())
    incompatible = model.load_state_dict(before, strict=False)
    assert (incompatible.missing_keys, incompatible.unexpected_keys) == ([], [])
    model.load_state_dict(before)  # strictly, too
    del before["stem.0.weight" if "stem.0.weight" in before else next(iter(before))]
    assert len(model.load_state_dict(before, strict=False).missing_keys) == 1  # the control: others are still missed


def test_the_optimizer_is_split_and_joined(job):
    model = hosted(job)

    def theirs(model, cfg):
        assert heads_of(model) is None, "PySlowFast must not see the heads here"
        return torch.optim.SGD([{"params": list(model.parameters()), "layer_decay": 1.0}], lr=0.1, momentum=0.9)

    optimizer = with_head_groups(theirs)(model, job)
    assert heads_of(model) is not None
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    student, own = split_optimizer(optimizer.state_dict())
    alone = torch.optim.SGD([parameter for name, parameter in model.named_parameters() if "heads" not in name], lr=0.1)
    alone.load_state_dict(student)  # what a PySlowFast without heads does with it
    assert len(own["state"]) == len(list(heads_of(model).parameters())) == 2
    again = with_head_groups(theirs)(model, job)
    again.load_state_dict(join_optimizer(student, own))
    saved, restored = optimizer.state_dict(), again.state_dict()
    assert saved["param_groups"] == restored["param_groups"]
    assert all(
        torch.equal(slot["momentum_buffer"], restored["state"][number]["momentum_buffer"])
        for number, slot in saved["state"].items()
    )


def plain_sgd(model, cfg):
    """PySlowFast's part."""
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def test_heads_continue_from_their_entry(job, tmp_path):
    """What ``load_checkpoint`` of PySlowFast does with optimizer and model is played here."""
    model = hosted(job)
    optimizer = with_head_groups(plain_sgd)(model, job)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    student, own = split_optimizer(optimizer.state_dict())
    heads = heads_of(model)
    state = {"epoch": 0, "model_state": model.state_dict(), "optimizer_state": student}
    write_checkpoint(tmp_path / "alone.pyth", state)
    entry = {"adapters": heads.adapters.state_dict(), "optimizer": own}
    write_checkpoint(tmp_path / "whole.pyth", {**state, "distinit": entry})

    def theirs(path, model, data_parallel, optimizer, scaler, epoch_reset=False):
        file = read_checkpoint(path)
        model.load_state_dict(file["model_state"])
        if optimizer is not None and not epoch_reset:
            optimizer.load_state_dict(file["optimizer_state"])
        return 0

    other = hosted(job)
    again = with_head_groups(plain_sgd)(other, job)
    load = with_heads(theirs)
    assert load(tmp_path / "whole.pyth", other, False, again) == 0
    assert all(map(torch.equal, heads.adapters.state_dict().values(), heads_of(other).adapters.state_dict().values()))
    assert len(again.state_dict()["state"]) == len(list(model.parameters()))
    with pytest.raises(WeightsError, match=r"alone\.pyth has no heads for the terms LIGHT .*EPOCH_RESET True"):
        load(tmp_path / "alone.pyth", other, False, again)
    load(tmp_path / "alone.pyth", other, False, again, epoch_reset=True)
    load(tmp_path / "alone.pyth", other, False)  # a test asks for no optimizer


def test_a_term_warms_up_by_the_epochs_of_the_host(job):
    job.DISTILL.TEACHERS.LIGHT.WARMUP = 4.0
    model = hosted(job)
    inputs, labels, *_ = default_collate([Distinitcorpus(job, "train")[0]])
    assert with_position(lambda epoch, cfg: 10 * epoch)(1.0, job) == 10.0
    loss, (term,) = DistinitLoss()(model(inputs), labels)
    assert loss.item() == pytest.approx(0.5 * term / 4, rel=1e-5)


def test_an_epoch_is_that_of_the_runner(job):
    job.RUNNER.CLIPS_PER_EPOCH = 20
    dataset = Distinitcorpus(job, "train")
    own = own_cfg(job)
    sampler = build.build_train_sampler(own, build.build_corpora(own, "train"))
    for epoch in (0, 3):
        dataset._set_epoch_num(epoch)
        sampler.set_epoch(epoch)
        assert len(dataset) == 20
        assert [dataset._key(index) for index in range(20)] == list(sampler)


def test_views_of_a_test_are_numbered_as_pyslowfast_counts(job, videos):
    job.TEST.NUM_ENSEMBLE_VIEWS, job.TEST.NUM_SPATIAL_CROPS = 2, 3
    job.merge_from_list(["CORPUS.TEST.A.PATH", str(videos / "test"), "CORPUS.TEST.A.LABELED", "True"])
    dataset = Distinitcorpus(job, "test")
    assert dataset.num_videos == 6 * 6
    assert dataset._key(6 * 4 + 5) == SampleKey(0, 29, 4, 1, 2)
    inputs, label, index, *_ = dataset[6 * 4 + 5]
    assert (len(inputs), label, index) == (1, 1, 29)


def test_evaluation_gives_probabilities():
    network = build_network("C3D", num_classes=3, input=InputSpec(num_frames=16), width=4)
    network.__class__ = hosted_class(type(network))
    clip = torch.randn(2, 3, 16, 112, 112)
    network.eval()
    with torch.no_grad():
        probabilities = network([clip])
        network.activation = "sigmoid"
        each = network([clip])
    assert probabilities.sum(1).tolist() == pytest.approx([1.0, 1.0])
    assert each.sum(1).tolist() != pytest.approx([1.0, 1.0], abs=1e-3)


def test_lengths_in_steps_become_epochs(job):
    words = "RUNNER.SCHEDULE_UNIT step SOLVER.MAX_EPOCH 10 SOLVER.STEPS [0,6] SOLVER.LRS [1,0.1] SOLVER.WARMUP_EPOCHS 3"
    job.merge_from_list([*words.split(), "DISTILL.TEACHERS.LIGHT.WARMUP", "6"])
    for _ in range(2):  # training, then the test
        settle(job)
        assert (job.SOLVER.MAX_EPOCH, job.SOLVER.STEPS, job.SOLVER.WARMUP_EPOCHS) == (4, [0.0, 2.0], 1.0)  # 12 videos
        assert job.DISTILL.TEACHERS.LIGHT.WARMUP == 2.0


def test_silent_traps_are_refused(root, tmp_path):
    weights = tmp_path / "weights.pyth"
    torch.save({"epoch": 6, "model_state": {}}, weights)
    cfg = root.clone()
    cfg.merge_from_list(["TRAIN.CHECKPOINT_FILE_PATH", str(weights), "OUTPUT_DIR", str(tmp_path)])
    settle(cfg)  # 7 of 300 epochs: there is something left to train
    cfg.SOLVER.MAX_EPOCH = 7
    with pytest.raises(ConfigError, match=r"CHECKPOINT_EPOCH_RESET: False, and .* 7 epochs behind it"):
        settle(cfg)
    cfg.TRAIN.CHECKPOINT_EPOCH_RESET = True
    settle(cfg)
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "ssl_checkpoint_epoch_00002.pyth").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"would be ignored, because OUTPUT_DIR holds checkpoints of another TASK"):
        settle(cfg)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["DISTILL.GATE", "skip"], r"DISTILL\.GATE: skip is not possible"),
        (["INIT.TRAINABLE", "heads"], r"INIT\.TRAINABLE: heads is not possible"),
        (["SOLVER.LR_POLICY", "plateau"], r"SOLVER\.LR_POLICY: PySlowFast has no plateau"),
        (["TRAIN.DATASET", "ssv2"], r"TRAIN\.DATASET: ssv2 is a dataset of PySlowFast"),
        (["AUG.NUM_SAMPLE", "2"], r"AUG\.ENABLE: AUG and several crops"),
        (["MODEL.DETACH_FINAL_FC", "True"], r"MODEL\.DETACH_FINAL_FC"),
        (["DISTILL.TEACHERS.LIGHT.LOSS", "mze"], r"DISTILL\.TEACHERS\.LIGHT\.LOSS: .*mse"),
    ],
)
def test_what_pyslowfasts_loop_cannot_do_is_refused(job, words, sentence):
    job.merge_from_list(words)
    with pytest.raises(ConfigError, match=sentence):
        settle(job)
