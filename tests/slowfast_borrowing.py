"""What tests of borrowed networks run in a process of its own: importing PySlowFast changes its process for good.

``python slowfast_borrowing.py NAME JSON`` calls the function of that name and prints what it returns, as JSON.
"""

import json
import sys
from ast import literal_eval

import torch


def _value(word):
    try:
        return literal_eval(word)
    except (ValueError, SyntaxError):
        return word


def _theirs(file, words):
    """PySlowFast's configuration and network of one of its files, with a classifier that prefers classes."""
    import slowfast.models  # noqa: F401 (fills the registry)
    from slowfast.config.defaults import get_cfg
    from slowfast.models.build import MODEL_REGISTRY

    cfg = get_cfg()
    cfg.merge_from_file(file)
    cfg.merge_from_list([word if number % 2 == 0 else _value(word) for number, word in enumerate(words)])
    torch.manual_seed(0)
    model = dict(MODEL_REGISTRY)[cfg.MODEL.MODEL_NAME](cfg)
    last = [module for module in model.modules() if isinstance(module, torch.nn.Linear)][-1]
    torch.nn.init.normal_(last.weight, 0.0, 1.0)
    return cfg, model


def compare_networks(jobs, folder):
    """For each (file, words): how PySlowFast's own network and the borrowed one agree."""
    from distinit_plugin import build, load_cfg
    from distinit_plugin.hosts.slowfast.boot import make_importable
    from distinit_plugin.weights import load_weights

    make_importable()
    from slowfast.datasets.utils import pack_pathway_output

    found = {}
    for number, (file, words) in enumerate(jobs):
        their_cfg, theirs = _theirs(file, words)
        ours_cfg, warnings = load_cfg(file, ["NUM_GPUS", "0", "DATA.PATH_TO_DATA_DIR", "lists", *words])
        ours = build.build_network(ours_cfg, num_classes=their_cfg.MODEL.NUM_CLASSES)
        path = f"{folder}/zoo{number}.pyth"
        torch.save({"model_state": theirs.state_dict()}, path)
        report = load_weights(ours, path)
        sizes = {their_cfg.DATA.TRAIN_CROP_SIZE, their_cfg.DATA.TEST_CROP_SIZE}
        differences, sums = [], []
        for size in sorted(sizes):
            clip = torch.randn(2, 3, their_cfg.DATA.NUM_FRAMES, size, size)
            packed = [pack_pathway_output(their_cfg, one) for one in clip]
            inputs = [torch.stack(parts) for parts in zip(*packed, strict=True)]
            with torch.no_grad():
                theirs.eval()
                ours.eval()
                output = ours({"rgb": clip})
                differences.append((output.logits.softmax(1) - theirs(list(inputs))).abs().max().item())
                sums += output.logits.sum(1).tolist()
                if size == their_cfg.DATA.TRAIN_CROP_SIZE:
                    theirs.train()
                    ours.train()
                    torch.manual_seed(5)
                    wanted = theirs(list(inputs))
                    torch.manual_seed(5)
                    trained = (ours({"rgb": clip}).logits - wanted).abs().max().item()
        back = theirs.load_state_dict(ours.bare_state_dict(), strict=False)
        found[file] = {
            "warnings": warnings,
            "report": [len(report.missing), len(report.unexpected), len(report.mismatched)],
            "back": [back.missing_keys, back.unexpected_keys],
            "keys": list(theirs.state_dict()) == list(ours.bare_state_dict()),
            "difference": max(differences),
            "training": trained,
            "sums": sums,
            "features": ours.feature_dim == output.features.shape[1],
            "layers": {name: list(info) for name, info in ours.layers.items()},
        }
    return found


def write_weights(config, path, words):
    """A checkpoint of the student of a configuration, with a classifier that prefers classes."""
    from distinit_plugin import build, load_cfg

    cfg, _ = load_cfg(config, words)
    torch.manual_seed(4)
    network = build.build_network(cfg, num_classes=cfg.MODEL.NUM_CLASSES)
    state = network.bare_state_dict()
    named = [key for key, value in state.items() if key.endswith("weight") and value.ndim == 2]
    weight, bias = state[named[-1]], state[named[-1].replace("weight", "bias")]
    size = cfg.DATA.TEST_CROP_SIZE
    clips = torch.linspace(-2, 2, 8).view(8, 1, 1, 1, 1) + torch.randn(8, 3, cfg.DATA.NUM_FRAMES, size, size)
    with torch.no_grad():
        torch.nn.init.normal_(weight)
        for module in network.modules():
            if isinstance(module, torch.nn.BatchNorm3d):
                module.momentum = None  # statistics of these clips
        network.train()({"rgb": clips})
        logits = network.eval()({"rgb": clips}).logits
        spread = (logits[:, 0] - logits[:, 1]).std()
        weight.mul_(2 / spread)
        bias.copy_(-2 * logits.mean(0) / spread)
    torch.save({"epoch": 0, "model_state": state}, path)
    return sorted(state)


def survey(files):
    """What this package's runner says about files of PySlowFast: problems of each."""
    from distinit_plugin.config.load import read_cfg
    from distinit_plugin.errors import ConfigError

    found = {}
    for file in files:
        try:
            reading = read_cfg(file, ["NUM_GPUS", "0", "DATA.PATH_TO_DATA_DIR", "lists"])
            found[file] = {
                "problems": reading.problems,
                "warnings": reading.warnings,
                "model": reading.cfg.MODEL.MODEL_NAME,
            }
        except ConfigError as error:
            found[file] = {"problems": error.problems, "warnings": [], "model": ""}
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    result = globals()[sys.argv[1]](**json.loads(sys.argv[2]))
    print("\n" + json.dumps(result))
