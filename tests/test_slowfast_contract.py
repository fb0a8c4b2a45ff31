"""What the adapter takes for granted about PySlowFast: without a checkout as data, with one compared with it."""

import inspect
import json
import os
from pathlib import Path

import pytest
from slowfast_facts import facts_of

from distinit_plugin.config.pyslowfast_keys import PYSLOWFAST_DEFAULTS
from distinit_plugin.config.theirs import THEIR_NETWORKS
from distinit_plugin.engine import meters
from distinit_plugin.engine.logs import parse_line
from distinit_plugin.engine.optim import build_optimizer
from distinit_plugin.hosts.slowfast import checkpoints, decoding, launching
from distinit_plugin.hosts.slowfast.borrowed import OTHER_TASKS
from distinit_plugin.hosts.slowfast.corpora import Item

ASSET = Path(__file__).with_name("assets") / "slowfast_facts.json"
FACTS = json.loads(ASSET.read_text("utf-8"))["facts"]


def arguments(path, name):
    return FACTS[f"arguments of {path}:{name}"]


def parameters(replacement):
    return list(inspect.signature(replacement).parameters)


# ---------------------------------------------------------------------------------------- the adapter, against the data


def replaced(path, name, replacement, in_order=99):
    """Whatever PySlowFast's own callers pass can be passed to what stands in its place: some in order, all by name."""
    signature = inspect.signature(replacement)
    names = arguments(path, name)
    signature.bind(*names[:in_order], **dict.fromkeys(names[in_order:]))
    signature.bind(**dict.fromkeys(names))


def test_what_is_replaced_takes_the_same_arguments():
    replaced("slowfast/utils/checkpoint.py", "save_checkpoint", checkpoints.save_checkpoint)
    replaced("slowfast/utils/checkpoint.py", "load_checkpoint", checkpoints.with_heads(lambda *_, **__: 0), 5)
    replaced("slowfast/models/optimizer.py", "construct_optimizer", checkpoints.with_head_groups(lambda *_: None))
    replaced("slowfast/models/optimizer.py", "get_epoch_lr", checkpoints.with_position(lambda *_: 0.0))
    replaced("slowfast/utils/misc.py", "launch_job", launching.launch_job)
    with pytest.raises(TypeError):
        replaced("slowfast/utils/misc.py", "launch_job", checkpoints.with_position(lambda *_: 0.0))  # the control


def test_the_decoder_has_the_same_arguments_in_the_same_order():
    theirs = arguments("slowfast/datasets/decoder.py", "decode")
    assert parameters(decoding.decode)[1:] == theirs[1:]  # in place of an open container it is given a file's name


def test_what_is_called_takes_what_it_is_given():
    run = arguments("slowfast/utils/multiprocessing.py", "run")
    assert run[:8] == ["local_rank", "num_proc", "func", "init_method", "shard_id", "num_shards", "backend", "cfg"]
    spans = arguments("slowfast/datasets/decoder.py", "get_multiple_start_end_idx")
    assert {"min_delta", "max_delta", "use_offset"} <= set(spans)
    assert spans[:4] == ["video_size", "clip_sizes", "clip_idx", "num_clips_uniform"]
    assert arguments("slowfast/utils/checkpoint.py", "get_path_to_checkpoint") == ["path_to_job", "epoch", "task"]
    assert arguments("slowfast/datasets/utils.py", "pack_pathway_output") == ["cfg", "frames"]
    assert arguments("slowfast/models/losses.py", "get_loss_func") == ["loss_name"]
    evaluation = arguments("tools/train_net.py", "eval_epoch")
    assert evaluation[:5] == ["val_loader", "model", "val_meter", "cur_epoch", "cfg"]


def test_a_clip_has_as_many_fields():
    assert FACTS["fields of a training clip"] == ["inputs", "labels", "index", "time", "meta"]
    assert len(Item.__args__) == 5


def test_a_checkpoint_has_the_same_entries(tmp_path):
    assert set(FACTS["entries of a checkpoint"]) == {
        *("cfg", "epoch", "model_state", "optimizer_state", "scaler_state"),
    }
    text = inspect.getsource(checkpoints.save_checkpoint)
    assert [entry for entry in FACTS["entries of a checkpoint"] if f'"{entry}"' not in text] == []


def test_groups_of_an_optimizer_have_the_same_settings():
    import torch

    (group,) = build_optimizer(torch.nn.Linear(2, 1), "sgd", lr=0.1).param_groups
    assert set(FACTS["settings of optimizer groups"]) <= group.keys()


def test_every_network_is_known():
    assert sorted([*THEIR_NETWORKS, *OTHER_TASKS]) == FACTS["names of networks"]


def test_every_key_of_the_configuration_is_known():
    missing = set(FACTS["keys of the configuration"]) - PYSLOWFAST_DEFAULTS.keys()
    assert {key for key in missing if not any(known.startswith(f"{key}.") for known in PYSLOWFAST_DEFAULTS)} == set()


def test_lines_of_the_log_have_the_same_entries():
    values = {"loss": 1.0, "top1": 0.5, "top5": 1.0, "grad_norm": 1.0}
    common = {"per_step": (1.0, 0.5), "eta": 1.0, "lr": 0.1, "values": values}
    ours = {
        "train_iter": meters.train_stats(0, 2, step=(1, 2), **common),
        "train_epoch": meters.train_stats(0, 2, **common),
        "val_epoch": meters.val_epoch_stats(
            0, 2, seconds=1.0, values=values, best={"name": "top1", "value": 0.5, "top5": 1.0}
        ),
        "test_final": meters.final_test_stats({"top1_acc": 0.5, "top5_acc": 1.0}),
    }
    several = {"map", "top{}_acc"}  # written only with labels of several classes, or with other names
    for line, entries in ours.items():
        theirs = set(FACTS[f"entries of log line {line}"]) - several
        assert theirs - entries.keys() <= {"loss_{}", "RAM", "gpu_mem"}, line
        parsed = parse_line(meters.json_line(entries))
        assert parsed is not None
        assert parsed.kind == line


# ---------------------------------------------------------------------------------------- the data, against a checkout


@pytest.fixture(scope="module")
def checkout():
    root = os.environ.get("PYSLOWFAST_ROOT")
    if not root:
        pytest.skip("PYSLOWFAST_ROOT is not set")
    return facts_of(root)


@pytest.mark.parametrize("name", FACTS)
def test_fact(checkout, name):
    """One named check for each: what upstream has changed."""
    assert checkout.get(name) == FACTS[name]


def test_no_fact_is_new(checkout):
    assert checkout.keys() == FACTS.keys()
