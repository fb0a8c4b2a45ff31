"""What tests of the adapter run in a process of its own, because PySlowFast made ready changes its process for good.

``python slowfast_programs.py NAME JSON`` calls the function of that name and prints what it returns, as JSON.
"""

import json
import sys

import torch
from torch.utils.data import default_collate


def gradients_of(module):
    """By name."""
    return {name: parameter.grad.clone() for name, parameter in module.named_parameters() if parameter.grad is not None}


def _step_in_runner(config, clips, start):
    """Loss and gradients of one step of this package's own runner, whose weights are written to ``start``."""
    from distinit_plugin import build, load_cfg
    from distinit_plugin.data.collate import collate
    from distinit_plugin.data.views import finish_views
    from distinit_plugin.types import SampleKey

    cfg, _ = load_cfg(config)
    torch.manual_seed(1)
    student, teachers = build.build_network(cfg), build.build_teachers(cfg)
    objective = build.build_objective(cfg, student, teachers)
    specs = build.view_specs(student, teachers, "train")
    videos = build.build_corpora(cfg, "train")
    dataset = build.build_dataset(cfg, videos, specs, "train")
    indices = build.build_train_sampler(cfg, videos).indices(0)
    batch = collate([dataset[SampleKey(0, clip, int(indices[clip]))] for clip in clips])
    sees_flow = any(spec.modality == "flow" for spec in specs.values())
    views = finish_views(batch["views"], specs, "cpu", flow=build.build_live_flow(cfg) if sees_flow else None)
    state = {
        "epoch": 0,
        "model_state": student.bare_state_dict(),
        "adapters": objective.trainable.adapters.state_dict(),
    }
    torch.save(state, start)
    objective.trainable.train()
    prepared = objective.prepare(views, batch["targets"])
    best = next(iter(prepared.targets.values())).reshape(len(clips), -1).argmax(1).tolist()
    step = objective.step(prepared)
    step.loss.backward()
    gradients = gradients_of(student.model if cfg.MODEL.MODEL_NAME.startswith("slowfast/") else student)
    return step.loss.item(), {name: value.item() for name, value in step.terms.items()}, gradients, best


def _step_in_host(config, clips, start):
    """The same step with PySlowFast's functions."""
    from distinit_plugin.hosts.slowfast.boot import boot

    boot()
    from slowfast.config.defaults import get_cfg
    from slowfast.datasets.build import build_dataset
    from slowfast.models import losses
    from slowfast.utils import checkpoint
    from vision.fair.slowfast.tools import train_net

    from distinit_plugin.hosts.slowfast.distillation import HEADS, heads_of
    from distinit_plugin.hosts.slowfast.registration import fit_train_net
    from distinit_plugin.hosts.slowfast.settling import settle

    cfg = get_cfg()
    cfg.merge_from_file(config)
    settle(cfg)
    fit_train_net()
    model = train_net.build_model(cfg)
    checkpoint.load_checkpoint(start, model, False, epoch_reset=True)
    heads = heads_of(model)
    if heads is not None:
        heads.adapters.load_state_dict(torch.load(start)["adapters"])
    dataset = build_dataset(cfg.TRAIN.DATASET, cfg, "train")
    inputs, labels, *_ = default_collate([dataset[clip] for clip in clips])
    model.train()
    loss, terms = losses.get_loss_func(cfg.MODEL.LOSS_FUNC)(reduction="mean")(model(inputs), labels)
    loss.backward()
    gradients = {name: value for name, value in gradients_of(model).items() if not name.startswith(HEADS)}
    return loss.item(), terms, gradients, labels.tolist()


def compare_steps(config, clips, start):
    """Losses of both, terms of both, and the largest relative difference of a parameter's gradient."""
    loss, terms, gradients, best = _step_in_runner(config, clips, start)
    host_loss, host_terms, host_gradients, labels = _step_in_host(config, clips, start)
    assert gradients.keys() == host_gradients.keys(), gradients.keys() ^ host_gradients.keys()
    worst = max(
        ((gradients[name] - host_gradients[name]).norm() / (gradients[name].norm() + 1e-12)).item()
        for name in gradients
    )
    return {
        "loss": [loss, host_loss],
        "terms": [[terms[name] for name in terms], host_terms],
        "gradient": worst,
        "labels": labels,
        "best": best,
        "norm": sum(value.norm().item() for value in gradients.values()),
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    result = globals()[sys.argv[1]](**json.loads(sys.argv[2]))
    print("\n" + json.dumps(result))
