"""What tests of boxes in the adapter run in a process of their own; see ``slowfast_programs``."""

import json
import sys

import numpy as np
import torch
from slowfast_programs import gradients_of

from distinit_plugin import build, load_cfg
from distinit_plugin.data.collate import collate
from distinit_plugin.data.views import finish_views
from distinit_plugin.detection.frame_map import frame_map
from distinit_plugin.detection.tables import BoxTable
from distinit_plugin.types import SampleKey


def _made_ready(config):
    """PySlowFast's configuration of a file, after everything that a job of it begins with."""
    from distinit_plugin.hosts.slowfast.boot import boot

    boot()
    from slowfast.config.defaults import get_cfg

    from distinit_plugin.hosts.slowfast.registration import fit_train_net
    from distinit_plugin.hosts.slowfast.settling import settle

    cfg = get_cfg()
    cfg.merge_from_file(config)
    settle(cfg)
    fit_train_net()
    return cfg


def compare_maps(config):
    """Frame-mAP by PySlowFast's meter and by our evaluator, of random scores of each box and of a shifted copy."""
    cfg = _made_ready(config)
    from slowfast.datasets.loader import construct_loader
    from slowfast.utils.meters import AVAMeter

    from distinit_plugin.hosts.slowfast.schema import own_cfg

    loader = construct_loader(cfg, "test")
    meter = AVAMeter(len(loader), cfg, mode="test")
    generator = torch.Generator().manual_seed(4)
    for _, labels, _, _, meta in loader:
        for _ in range(2):
            boxes = meta["ori_boxes"] + 0.05 * torch.randn(meta["ori_boxes"].shape, generator=generator)
            meter.update_stats(torch.rand(labels.shape, generator=generator), boxes, meta["metadata"])
    meter.finalize_metrics()
    scores, boxes, metadata = map(torch.cat, (meter.all_preds, meter.all_ori_boxes, meter.all_metadata))
    rows, num_classes = scores.shape
    judge = build.build_judge(own_cfg(cfg), "test")
    table = BoxTable(
        tuple(meter.video_idx_to_name),
        np.repeat(metadata[:, 0].numpy().astype(np.int32), num_classes),
        np.repeat(metadata[:, 1].numpy().astype(np.float64), num_classes),
        np.repeat(boxes[:, 1:].double().numpy(), num_classes, axis=0),
        np.tile(np.arange(1, num_classes + 1, dtype=np.int32), rows),
        scores.double().numpy().reshape(-1),
    )
    rules = ("pyslowfast", "official")
    found = {
        variant: frame_map(judge.truth, table, judge.label_map, variant=variant, excluded=judge.excluded).map
        for variant in rules
    }
    return {"meter": meter.full_map, **found, "detections": len(table)}


def compare_box_steps(config, clips, start):
    """Losses of one step of both programs on the same keyframes, and the largest relative difference of a gradient."""
    cfg, _ = load_cfg(config)
    torch.manual_seed(1)
    student = build.build_network(cfg)
    objective = build.build_objective(cfg, student, {})
    specs = build.view_specs(student, {}, "train")
    keyframes = build.build_records(cfg, "train")
    dataset = build.build_dataset(cfg, keyframes, specs, "train")
    indices = build.build_train_sampler(cfg, keyframes).indices(0)
    batch = collate([dataset[SampleKey(0, clip, int(indices[clip]))] for clip in clips])
    torch.save({"epoch": 0, "model_state": student.bare_state_dict()}, start)
    objective.trainable.train()
    step = objective(finish_views(batch["views"], specs, "cpu"), batch["targets"])
    step.loss.backward()
    wanted = gradients_of(student)

    theirs = _made_ready(config)
    from slowfast.datasets.build import build_dataset
    from slowfast.datasets.loader import detection_collate
    from slowfast.models import losses
    from slowfast.utils import checkpoint
    from vision.fair.slowfast.tools import train_net

    model = train_net.build_model(theirs)
    checkpoint.load_checkpoint(start, model, False, torch.optim.SGD(model.parameters(), lr=1.0), epoch_reset=True)
    items = build_dataset(theirs.TRAIN.DATASET, theirs, "train")
    inputs, labels, _, _, meta = detection_collate([items[clip] for clip in clips])
    preds = model.train()(inputs, meta["boxes"])
    loss, _ = losses.get_loss_func(theirs.MODEL.LOSS_FUNC)(reduction="mean")(preds, labels)
    loss.backward()
    found = gradients_of(model)
    return {
        "loss": [step.loss.item(), loss.item()],
        "keys": sorted(name.removeprefix("backbone.") for name in wanted.keys() ^ found.keys()),
        "gradient": max(
            ((wanted[name] - found[name]).norm() / (wanted[name].norm() + 1e-12)).item() for name in wanted
        ),
        "boxes": [len(batch["targets"]["boxes"]), len(labels)],
        "range": [preds.min().item(), preds.max().item()],
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    result = globals()[sys.argv[1]](**json.loads(sys.argv[2]))
    print("\n" + json.dumps(result))
