"""Facts about PySlowFast that the adapter rests upon, read from its sources without importing anything of it.

``python slowfast_facts.py FOLDER`` prints those of a checkout as JSON; ``assets/slowfast_facts.json`` holds those of
the commit that it names. Each is a name of a parameter, an entry or a class: nothing of the code itself.
"""

import ast
import json
import subprocess
import sys
from pathlib import Path

FUNCTIONS = {
    "slowfast/config/custom_config.py": ["add_custom_config"],
    "slowfast/datasets/decoder.py": ["decode", "get_multiple_start_end_idx"],
    "slowfast/datasets/loader.py": ["construct_loader"],
    "slowfast/datasets/transform.py": ["augment_raw_frames"],
    "slowfast/datasets/utils.py": ["pack_pathway_output"],
    "slowfast/datasets/video_container.py": ["get_video_container"],
    "slowfast/models/build.py": ["build_model"],
    "slowfast/models/losses.py": ["get_loss_func"],
    "slowfast/models/optimizer.py": ["construct_optimizer", "get_epoch_lr"],
    "slowfast/utils/checkpoint.py": [
        *("get_path_to_checkpoint", "load_checkpoint", "save_checkpoint", "sub_to_normal_bn"),
    ],
    "slowfast/utils/distributed.py": ["is_master_proc"],
    "slowfast/utils/metrics.py": ["topks_correct"],
    "slowfast/utils/misc.py": ["launch_job"],
    "slowfast/utils/multiprocessing.py": ["run"],
    "tools/test_net.py": ["test"],
    "tools/train_net.py": ["eval_epoch", "train", "train_epoch"],
}
"""Functions that the adapter replaces, wraps or calls."""

LINES = {
    "TrainMeter.log_iter_stats": "train_iter",
    "TrainMeter.log_epoch_stats": "train_epoch",
    "ValMeter.log_epoch_stats": "val_epoch",
    "AVAMeter.log_iter_stats": "AVA iter",
    "AVAMeter.log_epoch_stats": "AVA epoch",
    "TestMeter.finalize_metrics": "test_final",
}
"""Methods that write lines of the log."""


def facts_of(root):
    """Every fact of a checkout, by its name; what is not found is missing."""
    facts = {}
    for path, names in FUNCTIONS.items():
        for node in parse(root, path).body:
            if isinstance(node, ast.FunctionDef) and node.name in names:
                facts[f"arguments of {path}:{node.name}"] = [argument.arg for argument in node.args.args]
    facts["names of networks"] = sorted(networks(root))
    facts["entries of a checkpoint"] = sorted(
        keys_in(function(root, "slowfast/utils/checkpoint.py", "save_checkpoint"))
    )
    facts["fields of a training clip"] = fields(function(root, "tools/train_net.py", "train_epoch"))
    facts["settings of optimizer groups"] = sorted(
        keys_in(function(root, "slowfast/models/optimizer.py", "construct_optimizer"))
    )
    for name, line in LINES.items():
        facts[f"entries of log line {line}"] = sorted(keys_in(method(root, "slowfast/utils/meters.py", name)))
    facts["keys of the configuration"] = sorted(config_keys(root))
    return facts


def parse(root, path):
    """A module, empty where there is none."""
    file = Path(root) / path
    return ast.parse(file.read_text("utf-8") if file.is_file() else "")


def function(root, path, name):
    """A function of a module."""
    found = [node for node in parse(root, path).body if isinstance(node, ast.FunctionDef) and node.name == name]
    return found[0] if found else ast.parse("")


def method(root, path, name):
    """A method, as ``Class.method``."""
    owner, _, own = name.partition(".")
    for node in parse(root, path).body:
        if isinstance(node, ast.ClassDef) and node.name == owner:
            for inner in node.body:
                if isinstance(inner, ast.FunctionDef) and inner.name == own:
                    return inner
    return ast.parse("")


def keys_in(tree):
    """Texts that are keys of literal mappings, or are assigned by ``name["key"] = …``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Dict):
            yield from (key.value for key in node.keys if isinstance(key, ast.Constant))
        elif isinstance(node, ast.Assign):
            for target in node.targets:
                if isinstance(target, ast.Subscript) and isinstance(target.slice, ast.Constant):
                    yield target.slice.value


def fields(tree):
    """Names that a loop over ``enumerate(train_loader)`` unpacks an item into."""
    for node in ast.walk(tree):
        if isinstance(node, ast.For) and isinstance(node.target, ast.Tuple) and len(node.target.elts) == 2:
            inner = node.target.elts[1]
            if isinstance(inner, ast.Tuple):
                return [name.id for name in inner.elts]
    return []


def networks(root):
    """Classes that are registered as networks."""
    for path in sorted((Path(root) / "slowfast" / "models").glob("*.py")):
        for node in ast.parse(path.read_text("utf-8")).body:
            decorators = [ast.unparse(decorator) for decorator in getattr(node, "decorator_list", [])]
            if isinstance(node, ast.ClassDef) and any("MODEL_REGISTRY.register" in text for text in decorators):
                yield node.name


def config_keys(root):
    """Full keys of the configuration, nodes left out."""
    for node in parse(root, "slowfast/config/defaults.py").body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Attribute):
            name = ast.unparse(node.targets[0])
            if name.startswith("_C.") and not ast.unparse(node.value).startswith("CfgNode("):
                yield name.removeprefix("_C.")


def commit_of(root):
    """Of a checkout."""
    done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True)
    return done.stdout.strip()


if __name__ == "__main__":
    print(json.dumps({"commit": commit_of(sys.argv[1]), "facts": facts_of(sys.argv[1])}, indent=1))
