"""A public weights file → a file of this program, with an account of every tensor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torchvision.models
import torchvision.models.video
import yaml
from torch import Tensor

from distinit_plugin import build
from distinit_plugin.config.defaults import get_cfg
from distinit_plugin.config.load import parse_cfg, read_cfg
from distinit_plugin.config.node import CfgNode
from distinit_plugin.config.rules import NETWORK_DEPTHS, NETWORK_SWITCHES, RULES
from distinit_plugin.engine.checkpoint import save_checkpoint
from distinit_plugin.errors import ConfigError, UserError, WeightsError
from distinit_plugin.files import write_file
from distinit_plugin.models.factory import SWITCHES
from distinit_plugin.teachers.image import TimmClassifier, TorchvisionClassifier
from distinit_plugin.types import Network, ViewSpec
from distinit_plugin.weights.keymaps import is_counter
from distinit_plugin.weights.layouts import LAYOUTS, NATIVE, Layout, Translation, detect, named
from distinit_plugin.weights.load import (
    compare_translation,
    copy_tensors,
    layout_hint,
    match_keys,
    only_classifier,
    translate,
)
from distinit_plugin.weights.read import CheckpointFile, read_checkpoint
from distinit_plugin.weights.report import LoadReport
from distinit_plugin.weights.switches import switches_of

NODES = ("MODEL", "RESNET", "NETWORK", "DATA")
"""The nodes whose keys describe a network."""

SUFFIXES = (".pyth", ".pth", ".pt", ".safetensors")

_KEYS = {**{switch: key for switch, (key, _) in SWITCHES.items()}, "modality": "NETWORK.MODALITY"}


class Target:
    """The network to be filled: its name and configuration, and which keys the user has set."""

    def __init__(self, name: str, cfg: CfgNode, given: set[str]) -> None:
        """Take them; ``name`` overrides MODEL.MODEL_NAME."""
        self.name, self.cfg, self.given = name, cfg, given
        self.is_image = _is_image_network(name)
        self.num_classes = cfg.MODEL.NUM_CLASSES
        self.knows_input = {"DATA.MEAN", "DATA.STD"} <= given

    def build(self, device: str) -> Network:
        """The network, with random weights (none on ``meta``)."""
        if self.is_image:  # its builder runs it once to see its shapes, which takes a real device
            return _image_network(self.name, self.num_classes)
        with torch.device(device):
            return build.build_network(self.cfg, num_classes=self.num_classes)

    def tensors(self) -> dict[str, Tensor]:
        """Key → tensor without values."""
        return self.build("meta").bare_state_dict()

    def set(self, key: str, value: object) -> None:
        """Set a key that the user has not set and that the network has."""
        node, _, leaf = key.partition(".")
        reads = self.name in NETWORK_DEPTHS if key == "RESNET.DEPTH" else True
        if node == "NETWORK" and leaf != "MODALITY":
            reads = leaf in NETWORK_SWITCHES.get(self.name, ())
        if reads and key not in self.given:
            self.cfg[node][leaf] = value

    def description(self) -> dict[str, dict[str, Any]]:
        """The keys that say how to build it, as in a YAML file."""
        model: dict[str, Any] = {"MODEL_NAME": self.name}
        if self.num_classes:
            model["NUM_CLASSES"] = self.num_classes
        nodes: dict[str, dict[str, Any]] = {"MODEL": model}
        if self.name in NETWORK_DEPTHS:
            nodes["RESNET"] = {"DEPTH": self.cfg.RESNET.DEPTH}
        if not self.is_image:
            keys = ("MODALITY", *NETWORK_SWITCHES.get(self.name, ()))
            nodes["NETWORK"] = {key: self.cfg.NETWORK[key] for key in keys}
        if self.knows_input and not self.is_image:
            nodes["DATA"] = {key: list(self.cfg.DATA[key]) for key in ("MEAN", "STD")}
        return nodes


def convert(
    source: str,
    destination: str,
    *,
    to: str = "",
    layout_name: str = "",
    cfg_files: Sequence[str] = (),
    opts: Sequence[str] = (),
    drop_classifier: bool = False,
    allow_partial: bool = False,
    verbose: bool = False,
) -> LoadReport:
    """Translate a file, print what became of every tensor, and write it if all are accounted for.

    Args:
        source: Anything that ``read_checkpoint`` reads.
        destination: ``.pyth`` (also ``.pth``, ``.pt``): ``model_state`` and the network's description;
            ``.safetensors``: the same, the description as metadata.
        to: The network; its switches and number of classes are read off the file where ``opts`` do not give them.
        layout_name: Overrides the detection; ``native``: the names are the network's own.
        cfg_files: YAML files to take the network from, as it stands there; then ``to`` is not needed.
        opts: ``KEY VALUE …`` of the nodes that describe a network.
        drop_classifier: Leave the classifier out, on both sides.
        allow_partial: Write even when tensors are missing, unexpected or of another shape.
        verbose: Also print the names of the tensors that were loaded.

    Returns:
        The report, also printed.

    Raises:
        UserError: Something is wrong with the file, the network or the destination, or a tensor is not accounted for;
            nothing is written.
    """
    path = _check_destination(source, destination)
    target = _target(to, cfg_files, opts)
    layout = named(layout_name) if layout_name else None
    file = read_checkpoint(source)
    file, layout = _recognise(file, layout, layout_name)
    _fit_switches(target, file, layout, infer=not cfg_files)
    gone = _classifier_keys(target) if drop_classifier else {}
    network = target.build("cpu")
    if drop_classifier:
        network.reset_classifier(0)
        target.num_classes = 0
    state = network.bare_state_dict()
    translation = _translation(file, layout, {**gone, **state})
    dropped = tuple(key for key in translation.tensors if drop_classifier and key in gone)
    kept = {key: value for key, value in translation.tensors.items() if key not in dropped}
    translation = translation._replace(tensors=kept, skipped=(*translation.skipped, *dropped))
    report = compare_translation(state, translation, f"{file.path} ({layout.name if layout else NATIVE})")
    print(_described(target))
    print(report.describe(None, name_loaded=verbose))
    if not any(not is_counter(key) and key not in translation.filled for key in report.loaded):
        raise WeightsError(_nothing_fits(file, layout, target, state))
    if not report.complete and not allow_partial:
        raise WeightsError(_unaccounted(report, destination) + (layout_hint(layout) if layout else ""))
    copy_tensors(state, translation.tensors, report)
    _write(path, state, target, report)
    print(f"wrote {path}")
    return report


# ------------------------------------------------------------------------------------------------------ the network
def _target(to: str, cfg_files: Sequence[str], opts: Sequence[str]) -> Target:
    if not to and not cfg_files:
        raise UserError("no network is named: give --to NETWORK (or --cfg YAML).")
    for key in opts[0::2]:
        if key.split(".")[0] not in NODES:
            raise UserError(f"--opts: {key} does not describe a network. Allowed: keys of {', '.join(NODES)}.")
    is_image = bool(to) and _is_image_network(to)
    words = [*opts] if is_image or not to else ["MODEL.MODEL_NAME", to, *opts]
    reading = read_cfg(list(cfg_files), words, check=False)
    if reading.problems:
        raise ConfigError(reading.problems)
    cfg = reading.cfg
    cfg.defrost()
    return Target(to or cfg.MODEL.MODEL_NAME, cfg, set(opts[0::2]))


def _is_image_network(name: str) -> bool:
    library, _, model = name.partition("/")
    if library == "timm":
        return True
    return library == "torchvision" and model not in torchvision.models.list_models(torchvision.models.video)


def _image_network(name: str, num_classes: int) -> Network:
    library, _, model = name.partition("/")
    view = ViewSpec(num_frames=1, pick="center", crop_size=224)
    return (TimmClassifier if library == "timm" else TorchvisionClassifier)(model, num_classes, view)


def _fit_switches(target: Target, file: CheckpointFile, layout: Layout | None, *, infer: bool) -> None:
    """Set what the file tells of the network: switches, number of classes, what its input is normalised with.

    Raises:
        UserError: A key has a value that is not allowed.
    """
    if infer:
        first = _translation(file, layout, target.tensors())
        found = switches_of(first.tensors, first.filled)
        if layout is None:
            found.setdefault("variant", "torchvision")  # the public files with these names
        for switch, value in {**found, **(layout.switches if layout else {})}.items():
            target.set(_KEYS[switch], value)
        if layout is None:
            _take_description(target, file)
    channels = 3 if target.cfg.NETWORK.MODALITY == "rgb" else 2
    target.knows_input |= layout is not None
    for key, values in (("MEAN", layout.mean if layout else None), ("STD", layout.std if layout else None)):
        if values is not None:
            target.set(f"DATA.{key}", list(values[:channels]))
        elif len(target.cfg.DATA[key]) != channels:
            target.set(f"DATA.{key}", [0.5] * channels)
    if not target.is_image:
        _check_values(target.cfg)
    if infer and "MODEL.NUM_CLASSES" not in target.given:
        state = target.tensors()
        report = compare_translation(state, _translation(file, layout, state), file.path)
        if only_classifier(report.mismatched):
            target.num_classes = report.mismatched[0].file_shape[0]
            target.set("MODEL.NUM_CLASSES", target.num_classes)


def _take_description(target: Target, file: CheckpointFile) -> None:
    """A file of this program says itself what its network is: what shapes cannot tell (padding, BN's eps), too.

    Raises:
        ConfigError: What it says is damaged.
    """
    text = file.details.get("cfg")
    if not isinstance(text, str):
        return
    own, _ = parse_cfg(text, f"the configuration in {file.path}", check=False)
    if target.name != own.MODEL.MODEL_NAME:
        return
    for key in ("RESNET.DEPTH", *(f"NETWORK.{key}" for key in own.NETWORK), "DATA.MEAN", "DATA.STD"):
        node, _, leaf = key.partition(".")
        target.set(key, own[node][leaf])
    target.knows_input = True


def _check_values(cfg: CfgNode) -> None:
    problems = []
    for key, rule in RULES.items():
        node, _, leaf = key.partition(".")
        problem = rule.problem(key, cfg[node][leaf], get_cfg()[node][leaf]) if node in NODES else None
        if problem is not None:
            problems.append(problem)
    if problems:
        raise ConfigError(problems)


def _classifier_keys(target: Target) -> dict[str, Tensor]:
    """What the network with a classifier has and the one without has not."""
    network = target.build("meta")
    before = network.bare_state_dict()
    network.reset_classifier(0)
    after = network.bare_state_dict()
    return {key: value for key, value in before.items() if key not in after}


# --------------------------------------------------------------------------------------------------------- the file
def _recognise(file: CheckpointFile, layout: Layout | None, layout_name: str) -> tuple[CheckpointFile, Layout | None]:
    """The layout, and the file without leading parts that all of its keys share."""
    if layout_name == NATIVE:
        return file, None
    found, tensors = detect(file.tensors)
    if layout is not None and not layout.recognises(tensors):
        shown = ", ".join(list(file.tensors)[:3])
        raise WeightsError(f"--from {layout.name}: {file.path} has not the keys of that layout (it has {shown}, …).")
    return replace(file, tensors=dict(tensors)), layout or found


def _translation(file: CheckpointFile, layout: Layout | None, target: Mapping[str, Tensor]) -> Translation:
    if layout is None:
        return Translation(match_keys(file.tensors, target))
    return translate(file.tensors, target, layout)


def _nothing_fits(file: CheckpointFile, layout: Layout | None, target: Target, state: Mapping[str, Tensor]) -> str:
    found, own = (", ".join(list(keys)[:3]) for keys in (file.tensors, state))
    candidates = "; ".join(f"{candidate.name} for {candidate.networks}" for candidate in LAYOUTS)
    hint = layout_hint(layout) if layout else f" Layouts that are known: {candidates}; and {NATIVE} names."
    return (
        f"no tensor of {file.path} ({found}, …) has a place in {target.name} ({own}, …); nothing was written.{hint} "
        "Give another network with --to, or the layout with --from."
    )


def _unaccounted(report: LoadReport, destination: str) -> str:
    counts = [
        f"{len(names)} {label}"
        for label, names in (
            ("missing", report.missing),
            ("unexpected", report.unexpected),
            ("of another shape", report.mismatched),
        )
        if names
    ]
    classifier = only_classifier(report.mismatched) and not report.missing and not report.unexpected
    if classifier:
        name, theirs, ours = report.mismatched[0]
        what = (
            f"the classifier {name.rpartition('.')[0]} has {theirs[0]} classes in the file and {ours[0]} in the "
            "network. Set MODEL.NUM_CLASSES to the file's number, or leave the classifier out with --drop-classifier."
        )
    else:
        what = (
            "Set the network as it was when the file was made (--to, --opts RESNET.DEPTH, NETWORK), leave a classifier "
            "out with --drop-classifier, or write what there is with --allow-partial."
        )
    return f"not every tensor is accounted for ({', '.join(counts)}), {destination} was not written: {what}"


# ---------------------------------------------------------------------------------------------------- what is written
def _check_destination(source: str, destination: str) -> Path:
    path = Path(destination).expanduser()
    if path.suffix not in SUFFIXES:
        raise UserError(f"{destination} has no suffix that is known. Allowed: {', '.join(SUFFIXES)}.")
    read = Path(source).expanduser()
    if path.is_dir() or (path.exists() and read.exists() and path.samefile(read)):
        what = "a folder" if path.is_dir() else "the file that is to be read"
        raise UserError(f"{destination} is {what}. Name another file.")
    if path.suffix == ".safetensors":
        _safetensors()
    return path


def _described(target: Target) -> str:
    words = [f"{node}.{key} {value}" for node, keys in target.description().items() for key, value in keys.items()]
    return f"network {target.name}: {', '.join(words[1:])}"


def _write(path: Path, state: Mapping[str, Tensor], target: Target, report: LoadReport) -> None:
    text = yaml.safe_dump(target.description(), sort_keys=False)
    tensors = {key: value.contiguous() for key, value in state.items()}
    if path.suffix == ".safetensors":
        data = _safetensors().save(tensors, metadata={"format": "pt", "cfg": text, "source": report.source})
        write_file(path, lambda file: file.write(data))
        return
    save_checkpoint(path, {"model_state": tensors, "cfg": text, "source": report.source})


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise UserError("writing .safetensors needs the package safetensors. Install it, or write a .pyth.") from error
    return safetensors.torch
