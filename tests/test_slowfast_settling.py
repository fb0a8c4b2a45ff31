"""What becomes of keys, labels and files in PySlowFast where a silent other meaning would be a wrong result."""

import multiprocessing

import pytest
import torch
import yaml
from slowfast_nodes import root_node
from small_jobs import brightness_teacher
from test_slowfast_host import job, root
from torch import nn

from distinit_plugin import cli
from distinit_plugin.engine.checkpoint import save_checkpoint
from distinit_plugin.errors import ConfigError, UserError, WeightsError
from distinit_plugin.hosts.slowfast import boot, defects, settling, traps
from distinit_plugin.hosts.slowfast.checkpoints import with_heads
from distinit_plugin.hosts.slowfast.corpora import UNLABELED, Distinitcorpus
from distinit_plugin.hosts.slowfast.distillation import DistinitLoss, attach, heads_of
from distinit_plugin.hosts.slowfast.networks import build_hosted
from distinit_plugin.hosts.slowfast.schema import own_cfg
from distinit_plugin.hosts.slowfast.settling import can_validate, settle

__all__ = ["job", "root"]  # fixtures

LIGHT = "DISTILL.TEACHERS.LIGHT"


# ---------------------------------------------------------------------------------------------- keys


def problems(cfg):
    try:
        settle(cfg.clone())
    except ConfigError as error:
        return error.problems
    return []


REFUSED = {
    "MODEL.HEAD_ACT tanh": "MODEL.HEAD_ACT: tanh is not allowed. Allowed: none, softmax, sigmoid.",
    "BN.NORM_TYPE sub_batchnorm": "BN.NORM_TYPE: sub_batchnorm is of PySlowFast's networks, not of R2Plus1D",
    "DATA.REVERSE_INPUT_CHANNEL True": "DATA.REVERSE_INPUT_CHANNEL: True, but R2Plus1D sees",
    "DATA.TRAIN_JITTER_SCALES [20,40]": "DATA.TRAIN_JITTER_SCALES: a short side of 20 is smaller",
    "TEST.NUM_SPATIAL_CROPS 2": "TEST.NUM_SPATIAL_CROPS: 2 is not allowed",
    "RUNNER.CPU_RANKS 3": "TRAIN.BATCH_SIZE: 4 clips cannot be shared by 3 processes",
}


def test_what_networks_and_readers_cannot_take_is_refused(job, monkeypatch):
    assert problems(job) == []
    for words, sentence in REFUSED.items():
        cfg = job.clone()
        cfg.merge_from_list(words.split())
        (found,) = problems(cfg)
        assert found.startswith(sentence)
    job.merge_from_list(["RUNNER.CPU_RANKS", "2"])
    assert problems(job) == []
    monkeypatch.setattr(settling.torch.cuda, "is_available", lambda: True)
    (found,) = problems(job)
    assert found.startswith("RUNNER.CPU_RANKS: 2, but there is a GPU here")


def test_weights_of_this_package_are_refused_for_networks_of_pyslowfast(job, caplog):
    job.merge_from_list(["MODEL.MODEL_NAME", "ResNet", "MODEL.ARCH", "slow"])
    assert "NETWORK.WIDTH" in ignored(job, caplog)
    job.merge_from_list(["INIT.INFLATE_FROM", "timm/resnet50", "INIT.INFLATE_WEIGHTS", "timm"])
    keys = [problem.partition(":")[0] for problem in problems(job)]
    assert keys == ["INIT.INFLATE_FROM", "INIT.INFLATE_WEIGHTS"]


def test_steps_are_no_epochs_of_pyslowfasts_datasets():
    cfg = root_node()
    cfg.merge_from_list(["RUNNER.SCHEDULE_UNIT", "step", "TEST.ENABLE", "False"])
    (found,) = problems(cfg)
    assert found.startswith("RUNNER.SCHEDULE_UNIT: step, but with datasets of PySlowFast")
    cfg.RUNNER.SCHEDULE_UNIT = "epoch"
    assert problems(cfg) == []


def ignored(cfg, caplog):
    """Keys that settling names as ignored."""
    settle(cfg.clone())
    return set(caplog.text.rpartition("distinit slowfast does not honour what is set: ")[2].strip().split(", "))


def test_keys_that_nothing_honours_are_named(job, caplog):
    assert ignored(job, caplog) == {"RUNNER.PRECISION", "RUNNER.CHECK_CONVOLUTIONS"}
    words = "DATA.TRAIN_JITTER_SCALES_RELATIVE [0.08,1.0] DATA.TARGET_FPS 15 RESNET.WIDTH_PER_GROUP 8 DATA.MEAN [0,0,0]"
    job.merge_from_list([*words.split(), "CORPUS.MAX_BAD_FRACTION", "0.5"])
    new = {"CORPUS.MAX_BAD_FRACTION", "DATA.TARGET_FPS", "DATA.TRAIN_JITTER_SCALES_RELATIVE", "RESNET.WIDTH_PER_GROUP"}
    assert ignored(job, caplog) == {"RUNNER.PRECISION", "RUNNER.CHECK_CONVOLUTIONS", *new}
    job.BN.WEIGHT_DECAY, job.SOLVER.WEIGHT_DECAY = -1.0, 0.25
    settle(job)
    assert job.BN.WEIGHT_DECAY == 0.25  # that of all weights, and no negative one


def test_validation_is_left_out_where_there_is_none(job, tmp_path):
    assert not can_validate(job)  # no term reads a classifier
    job.DISTILL.TEACHERS.LIGHT.LOSS_WEIGHT = 0.0
    assert not can_validate(job)  # no CORPUS.VAL
    job.TRAIN.DATASET = "ssv2"
    assert can_validate(job)  # PySlowFast's own dataset, whose lists have other names
    job.TRAIN.DATASET, job.DATA.PATH_TO_DATA_DIR = settling.DATASET, str(tmp_path)
    (tmp_path / "val.csv").write_text("a.mp4 0\n")
    assert can_validate(job)


@pytest.mark.parametrize(("use", "expected"), [("TRAIN", {"decoder"}), ("TEST", {"ptv_fields", "ptv_decoder"})])
def test_cures_are_of_the_datasets_that_are_used(use, expected):
    cfg = root_node()
    cfg.merge_from_list(["NUM_GPUS", "1", "TRAIN.DATASET", "kinetics", "TEST.DATASET", "ptvkinetics"])
    other = "TEST" if use == "TRAIN" else "TRAIN"
    cfg[other].ENABLE = False
    assert {cure.patch for cure in traps.needed_cures(cfg)} == expected


# ---------------------------------------------------------------------------------------------- labels


def labels_after_a_step(cfg, indices=range(4)):
    """Labels before and after a loss, the predictions, and what each teacher holds for best."""
    torch.manual_seed(3)
    model = attach(cfg, build_hosted(own_cfg(cfg), has_terms=True, initialize=True, activation="softmax"))
    dataset = Distinitcorpus(cfg, "train")
    inputs, labels, *_ = torch.utils.data.default_collate([dataset[index] for index in indices])
    before = labels.clone()
    preds = model(inputs)
    DistinitLoss()(preds, labels)
    return before, labels, preds


@pytest.fixture
def labelled_job(job, videos):
    """The job with labels in its corpus: 0 for bright videos, which are class 0 of its teacher, and 1 for dark ones."""
    job.merge_from_list(["CORPUS.TRAIN.A.PATH", str(videos / "train"), "CORPUS.TRAIN.A.LABELED", "True"])
    for name in list(job.CORPUS.TRAIN):
        if name != "A":
            del job.CORPUS.TRAIN[name]
    return job


def test_disagreement_is_with_the_teacher_whatever_the_corpus_says(labelled_job):
    """The head has the teacher's classes, so that labels of the corpus would be compared with something else."""
    before, after, preds = labels_after_a_step(labelled_job)
    assert set(before.tolist()) <= {0, 1}
    assert preds.shape[1] == 4
    bright = before == 0
    assert bool((after[bright] == 0).all())
    assert bool((after[~bright] > 0).all())  # class 0 is what the teacher excludes there
    labelled_job.merge_from_list(["DISTILL.TEACHERS.LIGHT.LAYER", "features", "DISTILL.TEACHERS.LIGHT.LOSS", "mse"])
    _, other, _ = labels_after_a_step(labelled_job)
    assert other.tolist() != after.tolist()  # the control: the target decides


def test_disagreement_is_with_the_teacher_that_is_shown(job):
    """The first term whose prediction is a vector is the output; an earlier one of maps is not."""
    teacher = brightness_teacher(job.DISTILL.TEACHERS.LIGHT.WEIGHTS)
    job.merge_from_list(
        [
            *("DISTILL.TEACHERS.AAA", yaml.safe_dump({**teacher, "LAYER": "feature_map", "STUDENT_LAYER": "layer2"})),
            *("DISTILL.TEACHERS.AAA.LOSS", "mse"),
        ]
    )
    _, after, preds = labels_after_a_step(job)
    assert preds.shape == (4, 4)
    assert set(after.tolist()) <= {0, 1, 2, 3}
    job.DISTILL.TEACHERS.LIGHT.LOSS_WEIGHT = 0.0
    _, after, _ = labels_after_a_step(job)
    assert after.tolist() == [UNLABELED] * 4  # nothing can be compared: all count as wrong


def test_labels_stay_where_the_student_has_its_own_classes(labelled_job):
    labelled_job.merge_from_list(["MODEL.NUM_CLASSES", "4", "DISTILL.TEACHERS.LIGHT.HEAD", "own"])
    before, after, preds = labels_after_a_step(labelled_job)
    assert after.tolist() == before.tolist()
    assert preds.shape[1] == 4
    labelled_job.CORPUS.TRAIN.A.LABELED = False
    before, unlabelled, _ = labels_after_a_step(labelled_job)
    assert before.tolist() == [UNLABELED] * 4
    assert min(unlabelled.tolist()) >= 0


# ---------------------------------------------------------------------------------------------- inner layers


class Stage(nn.Conv3d):
    """Of one pathway, or of two, as PySlowFast's: lists of maps in and out."""

    def forward(self, maps):
        return [super(Stage, self).forward(one) for one in maps]


class Theirs(nn.Module):
    """A network in PySlowFast's manner: three stages and a head."""

    def __init__(self):
        super().__init__()
        self.s1, self.s2 = Stage(3, 4, 1, stride=(1, 2, 2)), Stage(4, 6, 1, stride=(2, 2, 2))
        self.s3 = Stage(6, 6, 1)
        self.head = nn.Linear(6, 5)

    def forward(self, inputs, bboxes=None):
        maps = self.s3(self.s2(self.s1(inputs)))
        return self.head(sum(one.mean(dim=(2, 3, 4)) for one in maps))


@pytest.fixture
def on_stage(job):
    """The job with a term on the second stage of such a network."""
    job.merge_from_list(["MODEL.MODEL_NAME", "ResNet", "MODEL.ARCH", "slow", "NETWORK.WIDTH", "64"])
    job.merge_from_list([f"{LIGHT}.LAYER", "feature_map", f"{LIGHT}.STUDENT_LAYER", "s2", f"{LIGHT}.LOSS", "mse"])
    return job


def step_on_stages(cfg, model, num_frames=4):
    """The loss of two clips; fewer frames for a slow pathway come before them."""
    torch.manual_seed(5)
    clip, frame = torch.randn(2, 3, num_frames, 32, 32), torch.randint(0, 255, (2, 3, 1, 32, 32), dtype=torch.uint8)
    inputs = [clip] if cfg.MODEL.ARCH == "slow" else [clip[:, :, ::2], clip]
    preds = model.train()([*inputs, frame])
    loss, _ = DistinitLoss()(preds, torch.full((2,), UNLABELED))
    return loss


def test_terms_read_stages_of_pyslowfasts_networks(on_stage):
    torch.manual_seed(1)
    model = attach(on_stage, Theirs())
    trained = {name.split(".")[0] for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {"s1", "s2", "distinit_heads"}  # processes would wait for gradients of what is behind
    loss = step_on_stages(on_stage, model)
    loss.backward()
    assert all((parameter.grad is not None) == parameter.requires_grad for parameter in model.parameters())
    model.s3.weight.data.add_(1.0)
    assert step_on_stages(on_stage, model).item() == pytest.approx(loss.item(), rel=1e-6)
    model.s2.weight.data.add_(1.0)
    assert abs(step_on_stages(on_stage, model).item() - loss.item()) > 1e-3


def test_terms_read_the_fast_pathway(on_stage):
    on_stage.merge_from_list(["MODEL.ARCH", "slowfast", "SLOWFAST.ALPHA", "2", f"{LIGHT}.STUDENT_LAYER", "s2.fast"])
    torch.manual_seed(1)
    model = attach(on_stage, Theirs())
    found = step_on_stages(on_stage, model)
    on_stage.merge_from_list([f"{LIGHT}.STUDENT_LAYER", "s2"])
    heads = heads_of(model).adapters.state_dict()
    torch.manual_seed(1)
    other = attach(on_stage, Theirs())
    heads_of(other).adapters.load_state_dict(heads)
    assert abs(step_on_stages(on_stage, other).item() - found.item()) > 1e-6  # the control: the slow one's map
    on_stage.merge_from_list([f"{LIGHT}.STUDENT_LAYER", "s9"])
    with pytest.raises(UserError, match=r"no layer named 's9'.*Known: logits, features, s1, s1\.fast, s2, s2\."):
        attach(on_stage, Theirs())


# ---------------------------------------------------------------------------------------------- checkpoints


def test_files_of_networks_of_this_package(job, tmp_path):
    """PySlowFast takes what has the same name and size, and goes on from random weights with the rest."""
    job.DISTILL.TEACHERS.LIGHT.LOSS_WEIGHT = 0.0
    bare = build_hosted(own_cfg(job), has_terms=False, initialize=False, activation="none")
    optimizer, calls = torch.optim.SGD(bare.parameters(), lr=0.1), []
    load = with_heads(lambda *arguments, **options: calls.append(arguments) or 3)

    def file_of(name, **entries):
        save_checkpoint(tmp_path / name, {"epoch": 3, "model_state": bare.state_dict(), **entries})
        return str(tmp_path / name)

    whole, half = file_of("whole.pyth"), file_of("half.pyth", scaler_state={})
    assert load(whole, bare, False, optimizer, "scaler") == load(half, bare, False, optimizer, "scaler") == 3
    assert [call[4] for call in calls] == [None, "scaler"]  # a training in fp32 has no scale to go on with

    state = {key: value for key, value in bare.state_dict().items() if "layer3" not in key}
    with pytest.raises(WeightsError, match=r"lacks \d+ of \d+ tensors of this network \(layer3.*EPOCH_RESET True"):
        load(file_of("part.pyth", model_state=state), bare, False, optimizer)
    state = {**bare.state_dict(), "fc.weight": torch.zeros(7, 3)}
    with pytest.raises(WeightsError, match=r"lacks 1 of \d+ tensors of this network \(fc\.weight"):
        load(file_of("size.pyth", model_state=state), bare, False, optimizer)

    other = file_of("other.pyth", model_state={"s1.weight": torch.zeros(3)})  # CHECKPOINT_TYPE caffe2, which is theirs
    for given in (None, optimizer):
        with pytest.raises(WeightsError):
            load(other, bare, False, given, convert_from_caffe2=True)
    assert len(calls) == 2

    bare.eval()
    clip = torch.zeros(1, 3, 4, 32, 32)
    assert torch.equal(bare([clip]), bare({"rgb": clip}).logits)  # MODEL.HEAD_ACT none


# ---------------------------------------------------------------------------------------------- config --plain

BORROWED = "MODEL: {MODEL_NAME: ResNet, ARCH: slow}\nDISTILL: {TEACHERS: {A: {ARCH: timm/vit_tiny_patch16_224}}}\n"


def plain(tmp_path, *words):
    config, output = tmp_path / "mine.yaml", tmp_path / "plain.yaml"
    config.write_text(BORROWED)
    code = cli.main(["config", "--plain", "--output", str(output), "--cfg", str(config), *map(str, words)])
    return yaml.safe_load(output.read_text()) if code == 0 else None


def test_fine_tuning_does_not_go_on_where_the_pretraining_ended(tmp_path, capsys):
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    assert plain(tmp_path, "OUTPUT_DIR", run)["OUTPUT_DIR"] == str(run)
    assert "OUTPUT_DIR" not in capsys.readouterr().err
    (run / "checkpoints" / "checkpoint_epoch_00002.pyth").write_bytes(b"")
    assert "OUTPUT_DIR" not in plain(tmp_path, "OUTPUT_DIR", run)
    assert "is left out: it holds checkpoints" in capsys.readouterr().err


def test_what_pyslowfasts_keys_cannot_say_is_refused_or_said_otherwise(tmp_path, capsys):
    assert plain(tmp_path, "RUNNER.SCHEDULE_UNIT", "step", "SOLVER.LR_POLICY", "plateau") is None
    said = capsys.readouterr().err
    assert "RUNNER.SCHEDULE_UNIT: step, but PySlowFast counts in epochs" in said
    assert "SOLVER.LR_POLICY: PySlowFast has no plateau" in said
    found = plain(tmp_path, "BN.WEIGHT_DECAY", "-1", "SOLVER.WEIGHT_DECAY", "0.5", "CORPUS.TARGET_FPS", "15")
    assert (found["BN"]["WEIGHT_DECAY"], found["DATA"]["TARGET_FPS"]) == (0.5, 15)
    assert "LOSS_FUNC" not in found["MODEL"]  # cross_entropy is the default
    boxes = plain(tmp_path, "DETECTION.ENABLE", "True")
    assert (boxes["MODEL"]["LOSS_FUNC"], boxes["MODEL"]["HEAD_ACT"]) == ("bce", "sigmoid")
    assert "SPATIAL_SCALE_FACTOR" not in boxes["DETECTION"]


# ---------------------------------------------------------------------------------------------- processes


def test_workers_are_forked_where_python_would_start_them_anew(monkeypatch):
    monkeypatch.setattr(multiprocessing, "get_start_method", lambda allow_none: None)
    assert not defects.workers_start_anew()
    monkeypatch.setattr(multiprocessing, "get_all_start_methods", lambda: ["forkserver", "spawn", "fork"])
    assert defects.workers_start_anew()
    monkeypatch.setattr(multiprocessing, "get_start_method", lambda allow_none: "fork")
    assert not defects.workers_start_anew()
    monkeypatch.setattr(multiprocessing, "get_all_start_methods", lambda: ["spawn"])
    monkeypatch.setattr(multiprocessing, "get_start_method", lambda allow_none: "spawn")
    assert not defects.workers_start_anew()  # nothing could be done


def test_what_a_worker_says_is_one_sentence(monkeypatch, tmp_path):
    """An error in a worker of a loader comes wrapped in its traceback."""

    class RunNet:
        __file__ = "run_net.py"

        @staticmethod
        def main():
            raise UserError(
                "Caught UserError in DataLoader worker process 0.\ndistinit_plugin.errors.UserError: a: bad.\n"
            )

    monkeypatch.setattr(boot, "boot", list)
    monkeypatch.setattr(boot, "find_checkout", lambda: tmp_path)
    monkeypatch.setattr(boot.importlib, "import_module", lambda name: RunNet)
    with pytest.raises(UserError) as caught:
        boot.run_net([])
    assert str(caught.value) == "a: bad."


def test_the_checkout_comes_before_all_others_of_its_name(monkeypatch, tmp_path):
    monkeypatch.setattr(boot.sys, "path", ["/elsewhere", str(tmp_path), "/third"])
    monkeypatch.setattr(boot.sys, "dont_write_bytecode", True)
    boot._put_on_path(tmp_path)
    assert boot.sys.path == [str(tmp_path), "/elsewhere", "/third"]
