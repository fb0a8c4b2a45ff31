"""PySlowFast's configuration with this package's nodes in it: both programs' YAML files, each by its own rules."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from fvcore.common.config import CfgNode as FvcoreNode

from distinit_plugin.config.defaults import get_cfg
from distinit_plugin.config.load import find_base, resolve_config, shipped_folder
from distinit_plugin.config.node import CfgNode, Merger, leaf_keys
from distinit_plugin.config.pyslowfast_keys import PYSLOWFAST_DEFAULTS
from distinit_plugin.config.yaml_files import read_chain
from distinit_plugin.errors import ConfigError
from distinit_plugin.registry import near_matches

THEIR_NODES = frozenset(key.split(".")[0] for key in PYSLOWFAST_DEFAULTS)

OWN_NODES = tuple(name for name in get_cfg() if name not in THEIR_NODES)
"""Top-level nodes that PySlowFast does not have: DISTILL, CORPUS, NETWORK, …"""


class HostNode(CfgNode):
    """PySlowFast's root node: this package's nodes are merged by this package's rules, all others by PySlowFast's.

    A file whose most basic ``_BASE_`` is shipped with this package, or has one of its nodes, starts from this package's
    defaults, for which it was written, so that it means the same in both programs; any other from PySlowFast's.
    """

    def merge_from_file(self, cfg_filename: str, allow_unsafe: bool = False) -> None:
        """Merge a YAML file of either program, by path or shipped name, and what its ``_BASE_`` names.

        Raises:
            ConfigError: Something is wrong with it.
        """
        chain = read_chain(resolve_config(cfg_filename), find_base, repeats=True)
        first, contents = chain[0]
        if first.resolve().is_relative_to(shipped_folder().resolve()) or not contents.keys().isdisjoint(OWN_NODES):
            self.take_own_defaults()
        for path, values in chain:
            self._merge_both(values, str(path))

    def merge_from_list(self, cfg_list: Sequence[Any]) -> None:
        """Merge ``[KEY, value, KEY, value, …]``.

        Raises:
            ConfigError: Something is wrong with it.
        """
        words = list(cfg_list)
        if len(words) % 2:
            raise ConfigError([f"--opts: KEY VALUE pairs are expected, but '{words[-1]}' is left over."])
        for key, value in zip(words[0::2], words[1::2], strict=True):
            if str(key).split(".")[0] in OWN_NODES:
                merger = Merger(self)
                merger.merge_pairs([key, value], "--opts")
                merger.raise_problems()
            else:
                self._merge_theirs("--opts", nested(str(key).split("."), value))

    def take_own_defaults(self) -> None:
        """Give PySlowFast's keys the values that this package has for them, where it has any."""
        own = get_cfg()
        for key in leaf_keys(own):
            *nodes, name = key.split(".")
            if key in PYSLOWFAST_DEFAULTS:
                source, target = own, self
                for node in nodes:
                    source, target = source[node], target[node]
                target[name] = source[name]

    @classmethod
    def _decode_cfg_value(cls, value: Any) -> Any:
        """Mappings become PySlowFast's plain nodes, which all nodes below the root are."""
        return FvcoreNode._decode_cfg_value(value)

    def _merge_both(self, values: Mapping[str, Any], source: str) -> None:
        merger = Merger(self)
        merger.merge({name: value for name, value in values.items() if name in OWN_NODES}, source)
        merger.raise_problems()
        theirs = {name: value for name, value in values.items() if name not in OWN_NODES}
        self._merge_theirs(source, theirs)

    def _merge_theirs(self, source: str, values: Mapping[str, Any]) -> None:
        try:
            FvcoreNode.merge_from_other_cfg(self, FvcoreNode(with_floats(values, self)))
        except (KeyError, ValueError, AssertionError) as error:
            text = (str(error.args[0]).splitlines() or [""])[0][:200] if error.args else type(error).__name__
            known = [*PYSLOWFAST_DEFAULTS, *(key for key in leaf_keys(self) if key.split(".")[0] in OWN_NODES)]
            hint = near_matches(text.rpartition(" ")[2], known) if "xist" in text else ""
            raise ConfigError([f"{source}: {text}.{hint}"]) from None


def own_cfg(cfg: Mapping[str, Any]) -> CfgNode:
    """What this package reads of a configuration of PySlowFast, as one of its own.

    Args:
        cfg: With this package's nodes. A value of ``None`` stands for this package's default.
    """
    own = get_cfg()
    _copy_known(cfg, own)
    return own


def _copy_known(source: Mapping[str, Any], target: CfgNode) -> None:
    if target.template is not None:
        for name, entry in source.items():
            target[name] = entry.clone()
        return
    for name, value in target.items():
        given = source.get(name)
        if isinstance(value, CfgNode) and isinstance(given, Mapping):
            _copy_known(given, value)
        elif given is not None:
            target[name] = list(given) if isinstance(given, tuple) else given


def nested(keys: Sequence[str], value: Any) -> dict[str, Any]:
    """``{A: {B: value}}`` of the keys A, B."""
    for key in reversed(keys):
        value = {key: value}
    return dict(value)


def with_floats(values: Mapping[str, Any], like: Mapping[str, Any]) -> dict[str, Any]:
    """Whole numbers as floats where ``like`` has one: PySlowFast's nodes take no 1 for a 1.0."""
    result: dict[str, Any] = dict(values)
    for key, value in values.items():
        known = like.get(key)
        if isinstance(value, Mapping) and isinstance(known, Mapping):
            result[key] = with_floats(value, known)
        elif isinstance(known, float) and re.fullmatch(r"[-+]?[0-9]+", str(value)):
            result[key] = float(value)
    return result


def add_nodes(root: Any) -> None:
    """Put this package's nodes into PySlowFast's defaults, and its way of merging; twice is as once.

    Args:
        root: ``slowfast.config.defaults._C``, what ``add_custom_config`` is given.
    """
    if isinstance(root, HostNode):
        return
    defaults = get_cfg()
    for name in OWN_NODES:
        root[name] = defaults[name]
    object.__setattr__(root, "__class__", HostNode)  # the node's own way takes this for a key


def default_root() -> HostNode:
    """PySlowFast's defaults with this package's nodes, from the list of its keys: PySlowFast need not be here."""
    root = FvcoreNode()
    for key, value in PYSLOWFAST_DEFAULTS.items():
        *parents, name = key.split(".")
        inner = root
        for parent in parents:
            inner = inner.setdefault(parent, FvcoreNode())
        inner[name] = value
    add_nodes(root)
    assert isinstance(root, HostNode)
    return root
