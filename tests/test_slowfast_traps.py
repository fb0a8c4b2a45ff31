"""What PySlowFast does without a word: refused before a job starts, or told by the doctor. PySlowFast is not needed."""

import pytest
import torch
from iopath.common.file_io import PathManager

from distinit_plugin.errors import ConfigError
from distinit_plugin.hosts.slowfast import traps
from distinit_plugin.hosts.slowfast.boot import PATCHES
from distinit_plugin.hosts.slowfast.checkpoints import WholeFiles
from distinit_plugin.hosts.slowfast.schema import default_root
from distinit_plugin.hosts.slowfast.settling import settle


@pytest.fixture
def cfg(tmp_path):
    """A fine-tuning of PySlowFast's own network with 7 classes, in an empty OUTPUT_DIR, without a test."""
    root = default_root()
    root.merge_from_list(["OUTPUT_DIR", str(tmp_path / "run"), "MODEL.NUM_CLASSES", "7", "TEST.ENABLE", "False"])
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    return root


def write_checkpoint(path, epoch=1, classes=7, key="head.projection.weight"):
    torch.save({"epoch": epoch, "model_state": {"s1.weight": torch.zeros(3), key: torch.zeros(classes, 4)}}, path)
    return path


def cut(path, share=0.5):
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    return path


def refused(cfg):
    found = list(traps.traps(cfg))
    if found:
        with pytest.raises(ConfigError) as caught:
            settle(cfg.clone())
        assert set(found) <= set(caught.value.problems)  # the launcher refuses what the doctor refuses
    return found


def told(cfg):
    return list(traps.surprises(cfg))


def folder_of(cfg, tmp_path):
    return tmp_path / "run" / "checkpoints"


def test_a_good_fine_tuning_meets_nothing(cfg, tmp_path):
    weights = write_checkpoint(tmp_path / "weights.pyth")
    cfg.merge_from_list(["TRAIN.CHECKPOINT_FILE_PATH", str(weights), "TRAIN.CHECKPOINT_EPOCH_RESET", "True"])
    assert refused(cfg) == []
    assert told(cfg) == []


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("MULTIGRID.SHORT_CYCLE True NUM_GPUS 0", "MULTIGRID: it divides by NUM_GPUS"),
        (
            "TENSORBOARD.ENABLE True TENSORBOARD.HISTOGRAM.ENABLE True TENSORBOARD.HISTOGRAM.TOPK 10",
            "TENSORBOARD.HISTOGRAM.TOPK: 10 of 7 classes",
        ),
        ("TRAIN.CHECKPOINT_FILE_PATH /nowhere/a.pyth", "TRAIN.CHECKPOINT_FILE_PATH: there is no file /nowhere/a.pyth"),
        (
            "TEST.ENABLE True TEST.CHECKPOINT_FILE_PATH /nowhere/a.pyth",
            "TEST.CHECKPOINT_FILE_PATH: there is no file /nowhere/a.pyth",
        ),
    ],
)
def test_keys_that_cannot_go_together(cfg, words, sentence):
    assert refused(cfg) == []
    cfg.merge_from_list(words.split())
    (found,) = refused(cfg)
    assert found.startswith(sentence)


def test_sync_batch_norm_of_pytorchvideo(cfg, monkeypatch):
    cfg.BN.NORM_TYPE = "sync_batchnorm"
    monkeypatch.setattr(traps, "sync_norm_fails", lambda: True)
    assert refused(cfg) == [
        "BN.NORM_TYPE: sync_batchnorm cannot be built with PyTorchVideo 0.1.5. Set it to batchnorm."
    ]
    monkeypatch.setattr(traps, "sync_norm_fails", lambda: False)
    assert refused(cfg) == []


def test_a_newest_checkpoint_that_is_cut_off_is_refused(cfg, tmp_path):
    folder = folder_of(cfg, tmp_path)
    write_checkpoint(folder / "checkpoint_epoch_00001.pyth")
    newest = write_checkpoint(folder / "checkpoint_epoch_00002.pyth")
    assert refused(cfg) == []
    cut(newest, 0.9)
    (found,) = refused(cfg)
    assert found.startswith(f"TRAIN.AUTO_RESUME: {newest} is cut off")
    newest.write_bytes(b"")
    assert len(refused(cfg)) == 1
    cfg.TRAIN.AUTO_RESUME = False
    assert refused(cfg) == []
    newest.unlink()
    cfg.TRAIN.AUTO_RESUME = True
    assert refused(cfg) == []  # the one before is whole


def test_what_a_killed_job_left_is_no_checkpoint(cfg, tmp_path):
    folder = folder_of(cfg, tmp_path)
    whole = write_checkpoint(folder / "checkpoint_epoch_00001.pyth")
    cut(write_checkpoint(folder / "checkpoint_epoch_00002.pyth")).rename(folder / "checkpoint_epoch_00002.pyth.tmp")
    assert refused(cfg) == []
    manager = WholeFiles(PathManager())
    assert manager.ls(str(folder)) == [whole.name]
    assert manager.exists(str(whole))
    assert sorted(PathManager().ls(str(folder)))[-1].endswith(".tmp")  # which PySlowFast would take


@pytest.mark.parametrize("share", [0.01, 0.5, 0.99])
def test_cut_off_files_are_known(tmp_path, share):
    path = write_checkpoint(tmp_path / "a.pyth")
    assert not traps.is_cut_off(path)
    assert traps.is_cut_off(cut(path, share))
    torch.save({"epoch": 1}, path, _use_new_zipfile_serialization=False)
    assert not traps.is_cut_off(path)


def test_weights_to_start_from_are_looked_at(cfg, tmp_path):
    weights = cut(write_checkpoint(tmp_path / "weights.pyth"))
    cfg.merge_from_list(["TRAIN.CHECKPOINT_FILE_PATH", str(weights), "TRAIN.CHECKPOINT_EPOCH_RESET", "True"])
    (found,) = refused(cfg)
    assert found.startswith(f"TRAIN.CHECKPOINT_FILE_PATH: {weights} is cut off")
    cfg.TRAIN.CHECKPOINT_FILE_PATH = "https://example.org/a.pyth"
    assert refused(cfg) == []


def test_an_output_folder_wins_over_weights(cfg, tmp_path):
    folder = folder_of(cfg, tmp_path)
    newest = write_checkpoint(folder / "checkpoint_epoch_00002.pyth")
    cfg.merge_from_list(["TRAIN.CHECKPOINT_FILE_PATH", str(write_checkpoint(tmp_path / "weights.pyth"))])
    assert refused(cfg) == []
    assert told(cfg) == [f"TRAIN.CHECKPOINT_FILE_PATH: it is not read, because training goes on from {newest}."]
    cfg.TRAIN.CHECKPOINT_FILE_PATH = str(newest)
    (found,) = refused(cfg)
    assert found.startswith(
        "TRAIN.CHECKPOINT_FILE_PATH: it lies in OUTPUT_DIR, where training goes on from checkpoint_"
    )


def test_what_is_done_already_is_told(cfg, tmp_path):
    newest = write_checkpoint(folder_of(cfg, tmp_path) / "checkpoint_epoch_00002.pyth", epoch=1)
    cfg.SOLVER.MAX_EPOCH = 3
    assert told(cfg) == []
    cfg.SOLVER.MAX_EPOCH = 2
    assert told(cfg) == [f"SOLVER.MAX_EPOCH: nothing is left to train, {newest} has 2 epochs behind it."]


def test_checkpoints_of_another_task(cfg, tmp_path):
    """As PySlowFast does: an evaluation of ssl starts from the checkpoints of ssl, a fine-tuning at random."""
    weights = write_checkpoint(tmp_path / "weights.pyth")
    cfg.merge_from_list(["TRAIN.CHECKPOINT_FILE_PATH", str(weights), "TRAIN.CHECKPOINT_EPOCH_RESET", "True"])
    write_checkpoint(folder_of(cfg, tmp_path) / "ssl_checkpoint_epoch_00002.pyth")
    (found,) = refused(cfg)
    assert "would be ignored" in found
    cfg.TASK = "ssl_eval"
    assert list(traps.traps(cfg)) == []
    cfg.TASK = ""
    cfg.merge_from_list(["TRAIN.ENABLE", "False", "TEST.ENABLE", "True"])
    (found,) = refused(cfg)
    assert found.startswith("OUTPUT_DIR: it holds checkpoints of another TASK only (ssl_checkpoint_epoch_00002.pyth)")


@pytest.mark.parametrize(
    "key", ["head.projection.weight", "model.blocks.5.proj.weight", "fc.weight", "roi_head.projection.weight"]
)
def test_a_last_layer_of_other_classes(cfg, tmp_path, key):
    """Left out with one line in the log: meant when fine-tuning, and a random test otherwise."""
    weights = write_checkpoint(tmp_path / "weights.pyth", classes=400, key=key)
    cfg.merge_from_list(["TRAIN.CHECKPOINT_FILE_PATH", str(weights), "TRAIN.CHECKPOINT_EPOCH_RESET", "True"])
    assert refused(cfg) == []
    (note,) = told(cfg)
    assert note.startswith("MODEL.NUM_CLASSES: 7, but the last layer in")
    cfg.merge_from_list(["TRAIN.ENABLE", "False", "TEST.ENABLE", "True"])
    (found,) = refused(cfg)
    assert found.startswith("MODEL.NUM_CLASSES: 7, but the last layer in")
    assert "400 classes" in found
    cfg.MODEL.NUM_CLASSES = 400
    assert refused(cfg) == []


def test_layers_that_are_not_the_last_are_no_classifier(cfg, tmp_path):
    weights = write_checkpoint(tmp_path / "weights.pyth", classes=400, key="blocks.0.attn.proj.weight")
    cfg.merge_from_list(["TRAIN.CHECKPOINT_FILE_PATH", str(weights), "TRAIN.CHECKPOINT_EPOCH_RESET", "True"])
    assert told(cfg) == []


def test_tests_of_nothing_are_told(cfg, tmp_path):
    cfg.merge_from_list(["TRAIN.ENABLE", "False", "TEST.ENABLE", "True"])
    assert told(cfg) == [
        "TEST.CHECKPOINT_FILE_PATH: none, and OUTPUT_DIR has no checkpoint: random weights are tested."
    ]
    write_checkpoint(folder_of(cfg, tmp_path) / "checkpoint_epoch_00002.pyth")
    assert told(cfg) == []
    cfg.merge_from_list(
        ["TRAIN.ENABLE", "True", "TEST.CHECKPOINT_FILE_PATH", "/a/b.pyth", "SOLVER.CLIP_GRAD_VAL", "1.0"]
    )
    cfg.merge_from_list(["SOLVER.CLIP_GRAD_L2NORM", "1.0", "NUM_GPUS", "2"])
    keys = [sentence.partition(":")[0] for sentence in told(cfg)]
    assert keys == ["TEST.CHECKPOINT_FILE_PATH", "SOLVER.CLIP_GRAD_L2NORM", "NUM_GPUS"]


def test_cures_that_a_configuration_needs(cfg):
    cfg.merge_from_list(["NUM_GPUS", "1", "TRAIN.DATASET", "ssv2"])
    assert traps.needed_cures(cfg) == []
    words = "NUM_GPUS 0 MODEL.NUM_CLASSES 4 SOLVER.CLIP_GRAD_VAL 1.0 SOLVER.OPTIMIZING_METHOD mt_adamw"
    cfg.merge_from_list([*words.split(), "TRAIN.MIXED_PRECISION", "True", "TRAIN.DATASET", "Ptvkinetics"])
    names = {cure.patch for cure in traps.needed_cures(cfg)}
    expected = {
        "few_classes",
        "clip_value",
        "multi_tensor",
        "synchronize",
        "infinite_stats",
        "ptv_fields",
        "ptv_decoder",
    }
    assert names == expected
    cfg.DATA.MULTI_LABEL = True
    assert "few_classes" not in {cure.patch for cure in traps.needed_cures(cfg)}


def test_cures_that_boxes_need(cfg):
    cfg.merge_from_list(["DETECTION.ENABLE", "True", "TRAIN.DATASET", "ava", "NUM_GPUS", "1", "TEST.ENABLE", "False"])
    assert [cure.patch for cure in traps.needed_cures(cfg)] == ["detection_files"]
    cfg.merge_from_list(["NUM_GPUS", "2", "TEST.ENABLE", "True"])
    names = {cure.patch for cure in traps.needed_cures(cfg)}
    assert names == {"detection_files", "detection_test", "padded_keyframes"}
    assert names <= {patch.name for patch in PATCHES}
