"""Networks that a few keys of the configuration describe: what converted files hold, and what fills these keys."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from distinit_plugin import build
from distinit_plugin.config.load import parse_cfg, read_cfg
from distinit_plugin.config.node import CfgNode
from distinit_plugin.config.rules import NETWORK_DEPTHS, NETWORK_SWITCHES
from distinit_plugin.config.validate import network_problems
from distinit_plugin.config.yaml_files import parse_yaml
from distinit_plugin.errors import ConfigError, UserError
from distinit_plugin.models.factory import SWITCHES
from distinit_plugin.models.inception import shorthand
from distinit_plugin.teachers.image import TimmClassifier, TorchvisionClassifier
from distinit_plugin.types import Network, ViewSpec
from distinit_plugin.weights.image_networks import is_image_network
from distinit_plugin.weights.layouts import Layout, Translation
from distinit_plugin.weights.public import PublicFile
from distinit_plugin.weights.switches import switches_of

NODES = ("MODEL", "RESNET", "NETWORK", "DATA")
"""The nodes whose keys describe a network."""

NEUTRAL_RANGE = 0.5
"""Mean and deviation, pixels or flow to [-1, 1], where nothing says how many channels are normalised with what."""

_KEYS = {**{switch: key for switch, (key, _) in SWITCHES.items()}, "modality": "NETWORK.MODALITY"}


def description_in(text: object) -> dict[str, Any] | None:
    """The nodes in a converted file's ``cfg``; ``None`` for anything else, such as another program's configuration."""
    try:
        nodes = parse_yaml(text, "cfg") if isinstance(text, str) else None
    except ConfigError:
        return None
    if not isinstance(nodes, dict) or not set(nodes) <= set(NODES):
        return None
    model = nodes.get("MODEL")
    return nodes if isinstance(model, dict) and isinstance(model.get("MODEL_NAME"), str) else None


class DescribedNetwork:
    """A network by name, its configuration, and which keys the user has set.

    Attributes:
        name: Of the network.
        cfg: Its configuration.
        is_image: Whether it is another library's image network, which has no switches.
        num_classes: Outputs of its classifier; 0: none.
        is_changed: Whether a switch has got another value than it had at first.
    """

    def __init__(self, name: str, cfg: CfgNode, given: Collection[str]) -> None:
        """Take them; ``name`` overrides MODEL.MODEL_NAME."""
        self.name, self.cfg = name, cfg
        self.is_image = is_image_network(name)
        self.num_classes = cfg.MODEL.NUM_CLASSES
        self.is_changed = False
        self._given = given
        self._knows_input = {"DATA.MEAN", "DATA.STD"} <= set(given)

    @classmethod
    def read(cls, name: str, cfg_files: Sequence[str], opts: Sequence[str]) -> DescribedNetwork:
        """From the words of a command line.

        Args:
            name: Of the network; empty: that of ``cfg_files``.
            cfg_files: YAML files.
            opts: ``KEY VALUE …`` of :data:`NODES`.

        Raises:
            UserError: No network is named, or something is wrong with keys or files.
        """
        if not name and not cfg_files:
            raise UserError("no network is named: give --to NETWORK (or --cfg YAML).")
        for key in opts[0::2]:
            if key.split(".")[0] not in NODES:
                raise UserError(f"--opts: {key} does not describe a network. Allowed: keys of {', '.join(NODES)}.")
        is_image = bool(name) and is_image_network(name)
        words = [*opts] if is_image or not name else ["MODEL.MODEL_NAME", name, *opts]
        reading = read_cfg(list(cfg_files), words, check=False)
        if reading.problems:
            raise ConfigError(reading.problems)
        cfg = reading.cfg
        cfg.defrost()
        return cls(name or cfg.MODEL.MODEL_NAME, cfg, set(opts[0::2]))

    def build(self, device: str) -> Network:
        """The network, with random weights (none on ``meta``)."""
        if self.is_image:  # its builder runs it once to see its shapes, which takes a real device
            library, _, model = self.name.partition("/")
            view = ViewSpec(num_frames=1, pick="center", crop_size=224)
            return (TimmClassifier if library == "timm" else TorchvisionClassifier)(model, self.num_classes, view)
        with torch.device(device):
            return build.build_network(self.cfg, num_classes=self.num_classes)

    def tensors(self) -> tuple[dict[str, Tensor], frozenset[str]]:
        """Key → tensor without values, and the keys of the classifier."""
        network = self.build("meta")
        tensors = network.bare_state_dict()
        network.reset_classifier(0)
        return tensors, frozenset(tensors) - frozenset(network.bare_state_dict())

    def describe(self) -> dict[str, dict[str, Any]]:
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
        if self._knows_input and not self.is_image:
            nodes["DATA"] = {key: list(self.cfg.DATA[key]) for key in ("MEAN", "STD")}
        return nodes

    def take_switches(self, file: PublicFile, translation: Translation) -> None:
        """Set what the shapes, the layout and a description in the file tell.

        Raises:
            ConfigError: The description is damaged.
        """
        found = switches_of(translation.tensors, translation.filled)
        if file.layout is None:
            found.setdefault("variant", "torchvision")  # the public files with these names
        for switch, value in {**found, **(file.layout.switches if file.layout else {})}.items():
            self._set(_KEYS[switch], value)
        if file.layout is None:
            self._take_description(file)

    def take_input(self, layout: Layout | None) -> None:
        """Set what the input is normalised with, as the layout has it, for as many channels as there are."""
        channels = 3 if self.cfg.NETWORK.MODALITY == "rgb" else 2
        self._knows_input |= layout is not None
        for key, values in (("MEAN", layout.mean if layout else None), ("STD", layout.std if layout else None)):
            if values is not None:
                self._set(f"DATA.{key}", list(values[:channels]))
            elif len(self.cfg.DATA[key]) != channels:
                self._set(f"DATA.{key}", [NEUTRAL_RANGE] * channels)

    def take_classes(
        self, tensors: Mapping[str, Tensor], own: Mapping[str, Tensor], classifier: frozenset[str]
    ) -> None:
        """Set the number of classes that the file's classifier has.

        Args:
            tensors: The file's, under the network's names.
            own: The network's.
            classifier: Its keys of the classifier.
        """
        if "MODEL.NUM_CLASSES" in self._given:
            return
        for key in sorted(classifier & tensors.keys()):
            if own[key].shape[:1] == (self.num_classes,) and tensors[key].ndim:
                self.num_classes = self.cfg.MODEL.NUM_CLASSES = len(tensors[key])
                return

    def check(self) -> None:
        """Raise :class:`ConfigError` with all that is wrong with values and with switches among themselves."""
        problems = [] if self.is_image else network_problems(self.cfg)
        if problems:
            raise ConfigError(problems)

    def contradictions(self, translation: Translation) -> list[str]:
        """``KEY VALUE`` of the switches that the file's shapes tell otherwise than the network has them."""
        found = switches_of(translation.tensors, translation.filled)
        told = []
        for switch, value in found.items():
            key = _KEYS[switch]
            node, _, leaf = key.partition(".")
            if self._reads(key) and _plain(self.cfg[node][leaf]) != value:
                told.append(f"{key} {value}")
        return told

    def switches(self) -> str:
        """Its switches and their values, in words."""
        keys = ["RESNET.DEPTH"] * (self.name in NETWORK_DEPTHS)
        keys += [f"NETWORK.{key}" for key in NETWORK_SWITCHES.get(self.name, ())]
        return ", ".join(f"{key} {self.cfg[key.split('.')[0]][key.split('.')[1]]}" for key in keys)

    def _reads(self, key: str) -> bool:
        node, _, leaf = key.partition(".")
        if key == "RESNET.DEPTH":
            return self.name in NETWORK_DEPTHS
        return node != "NETWORK" or leaf == "MODALITY" or leaf in NETWORK_SWITCHES.get(self.name, ())

    def _set(self, key: str, value: object) -> None:
        """Set a key that the user has not set and that the network has."""
        node, _, leaf = key.partition(".")
        if self._reads(key) and key not in self._given:
            self.is_changed |= node != "DATA" and self.cfg[node][leaf] != value
            self.cfg[node][leaf] = value

    def _take_description(self, file: PublicFile) -> None:
        """A file of this program says itself what its network is: what shapes cannot tell (padding, BN's eps), too."""
        text = file.details.get("cfg")
        if not isinstance(text, str):
            return
        own, _ = parse_cfg(text, f"the configuration in {file.path}", check=False)
        if self.name != own.MODEL.MODEL_NAME:
            return
        for key in ("RESNET.DEPTH", *(f"NETWORK.{key}" for key in own.NETWORK), "DATA.MEAN", "DATA.STD"):
            node, _, leaf = key.partition(".")
            self._set(key, own[node][leaf])
        self._knows_input = True


def _plain(value: object) -> object:
    """End-points by the papers' names: Mixed_4f as 4F."""
    return shorthand(value) if isinstance(value, str) and "_" in value else value
