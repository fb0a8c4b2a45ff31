"""The configuration tree: PySlowFast's kind of node, with named entries and errors that help.

Differences from ``fvcore.common.config.CfgNode``, all of them in how values are merged:

* an integer is taken for a float, ``1e6`` for an integer, ``1e-4`` for a float (YAML 1.1 calls it a string), a tuple
  for a list;
* an unknown key fails with the key, the file it came from, and the near match;
* a node may have a template: every entry below it, of whatever name, starts with all keys of the template, so that a
  command line reaches keys that no file mentions (``--opts DISTILL.TEACHERS.PLACES.LOSS_WEIGHT 0.5``);
* ``NAME: null`` (or ``{}``) in a child file removes an inherited named entry, ``TEACHERS: null`` removes all of them;
* all problems of a file are reported at once, and nothing is ever executed (no unsafe YAML, no Python files).
"""

from __future__ import annotations

import contextlib
import copy
import os
import re
from ast import literal_eval
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fvcore.common.config import CfgNode as _FvcoreNode

from distinit_plugin.config.yaml_files import parse_yaml, read_chain
from distinit_plugin.errors import ConfigError, shown
from distinit_plugin.registry import near_matches, near_names

_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]*")
_WORDS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
_NULLS = ("null", "none", "~", "{}")
_KINDS = {bool: "True or False", int: "a whole number", float: "a number", str: "text", list: "a list"}


class CfgNode(_FvcoreNode):
    """A node of the configuration tree. Keys are attributes; see the module's docstring for what merging does."""

    _TEMPLATE = "__template__"
    _SOURCES = "__source_files__"

    def set_template(self, template: CfgNode, required: str) -> None:
        """Make this a node of named entries that all start as a copy of ``template``.

        Args:
            template: Every key of an entry with its default.
            required: The key that a new entry must give, so that a mistyped name cannot add an entry.
        """
        self.__dict__[self._TEMPLATE] = (template, required)

    @property
    def template(self) -> tuple[CfgNode, str] | None:
        """(template, required key) of a node of named entries; ``None`` elsewhere."""
        found: tuple[CfgNode, str] | None = self.__dict__.get(self._TEMPLATE)
        return found

    @property
    def source_files(self) -> tuple[str, ...]:
        """The YAML files that the configuration was loaded from, as they were named; empty where it had none."""
        found: tuple[str, ...] = self.__dict__.get(self._SOURCES, ())
        return found

    def note_source_files(self, names: Sequence[str]) -> None:
        """Remember the names of the files."""
        self.__dict__[self._SOURCES] = tuple(names)

    def clone(self) -> CfgNode:
        """A deep copy (frozen when this is)."""
        return copy.deepcopy(self)

    def merge_from_file(self, cfg_filename: str, allow_unsafe: bool = False) -> None:
        """Merge a YAML file and what its ``_BASE_`` names.

        Raises:
            ConfigError: Everything that is wrong with the files.
        """
        _refuse_unsafe(allow_unsafe)
        merger = Merger(self)
        for path, values in read_chain(Path(cfg_filename)):
            merger.merge(values, str(path))
        merger.raise_problems()

    def merge_from_list(self, cfg_list: Sequence[Any]) -> None:
        """Merge ``[KEY, value, KEY, value, …]`` as from a command line."""
        merger = Merger(self)
        merger.merge_pairs(cfg_list, "--opts")
        merger.raise_problems()

    def merge_from_other_cfg(self, cfg_other: Mapping[str, Any]) -> None:
        """Merge another node or plain mapping."""
        merger = Merger(self)
        merger.merge(cfg_other, "the other configuration")
        merger.raise_problems()

    @classmethod
    def load_yaml_with_base(cls, filename: str, allow_unsafe: bool = False) -> dict[str, Any]:
        """The plain mapping of a YAML file joined with its bases; never executes a tag."""
        _refuse_unsafe(allow_unsafe)
        joined: dict[str, Any] = {}
        for _, values in read_chain(Path(filename)):
            join(values, joined)
        return joined

    @classmethod
    def _load_cfg_from_yaml_str(cls, str_obj: str) -> CfgNode:
        return cls(parse_yaml(str_obj, "this text") or {})

    @classmethod
    def _load_cfg_py_source(cls, filename: str) -> CfgNode:
        raise ConfigError([f"{filename}: a configuration is a YAML file; Python files are not executed."])


def _refuse_unsafe(allow_unsafe: bool) -> None:
    if allow_unsafe:
        raise ConfigError(["Unsafe YAML can run any program and is never loaded; leave allow_unsafe out."])


def join(values: Mapping[str, Any], joined: dict[str, Any]) -> None:
    """Put ``values`` over ``joined``, mapping by mapping; ``values`` stay as they are."""
    for key, value in values.items():
        if isinstance(value, dict) and isinstance(joined.get(key), dict):
            join(value, joined[key])
        else:
            joined[key] = copy.deepcopy(value)


class Merger:
    """Merges sources into one tree in turn and collects what is wrong with all of them.

    Attributes:
        problems: One sentence each.
        wrong: The keys that they are about; for a key that does not exist those that may be meant.
        unhonoured: Keys of ``foreign`` that were given, with the last value and where it came from.
    """

    def __init__(self, root: CfgNode, foreign: Mapping[str, object] | None = None) -> None:
        """Merge into ``root``; full keys of ``foreign`` (another program's) are set aside, not errors."""
        if root.is_frozen():
            raise ConfigError(["This configuration is frozen; change a copy: cfg = cfg.clone(); cfg.defrost()."])
        self.problems: list[str] = []
        self.wrong: set[str] = set()
        self.unhonoured: dict[str, tuple[Any, str]] = {}
        self._root = root
        self._foreign = foreign or {}
        self._source = ""
        self._created: dict[str, tuple[str, CfgNode, set[str]]] = {}

    def merge(self, values: Mapping[Any, Any], source: str) -> None:
        """Merge one file's mapping; ``source`` names it in errors."""
        self._source = source
        self._merge(values, self._root, "")
        self._check_created()

    def merge_pairs(self, words: Sequence[Any], source: str) -> None:
        """Merge ``[KEY, value, …]``; a word is read as the type that its key has."""
        self._source = source
        if len(words) % 2:
            last = str(words[-1])
            hint = f" Write {last.replace('=', ' ', 1)}." if "=" in last else ""
            self.problems.append(f"{source}: KEY VALUE pairs are expected, but '{last}' is left over.{hint}")
            self.wrong.add("")  # which word is too many is not known, so any key may be meant
            return
        for key, value in zip(words[0::2], words[1::2], strict=True):
            nested: Any = os.fspath(value) if isinstance(value, os.PathLike) else value
            for part in reversed(str(key).split(".")):
                nested = {part: nested}
            self._merge(nested, self._root, "")
        self._check_created()

    def raise_problems(self) -> None:
        """Raise ``ConfigError`` with every problem, if there is one."""
        if self.problems:
            raise ConfigError(self.problems)

    def _merge(self, values: Mapping[Any, Any], node: CfgNode, prefix: str) -> None:
        for key, value in values.items():
            full_key = f"{prefix}{key}"
            try:
                self._merge_one(key, value, node, full_key)
            except ConfigError as error:  # text that is no YAML
                self.wrong.add(full_key)
                self.problems += [f"{full_key}: {problem}" for problem in error.problems]

    def _merge_one(self, key: Any, value: Any, node: CfgNode, full_key: str) -> None:
        if node.template is not None:
            self._merge_named(str(key), value, node, full_key)
        elif key not in node:
            self._set_aside(key, value, node, full_key)
        elif isinstance(node[key], CfgNode):
            self._merge_node(value, node[key], full_key)
        else:
            self._set_leaf(key, value, node, full_key)
            created = self._created.get(full_key.rpartition(".")[0])
            if created is not None:
                created[2].add(key)

    def _merge_node(self, value: Any, node: CfgNode, full_key: str) -> None:
        value = _mapping_from_text(value, self._source)
        if not value and (value is None or isinstance(value, Mapping)):
            if node.template is not None:
                node.clear()
        elif isinstance(value, Mapping):
            self._merge(value, node, f"{full_key}.")
        else:
            self._problem(full_key, f"is a node with keys of its own ({', '.join(node)}), not {shown(value)}")

    def _merge_named(self, name: str, value: Any, node: CfgNode, full_key: str) -> None:
        assert node.template is not None
        template, required = node.template
        known = ", ".join(node) or "none"
        value = _mapping_from_text(value, self._source)
        if not _NAME.fullmatch(name):
            self._problem(full_key, f"'{name}' is no name; use letters, digits, _ and -, a letter first")
        elif not value and (value is None or isinstance(value, Mapping)):
            if name in node:
                del node[name]
                self._created.pop(full_key, None)
            else:
                hint = near_matches(name, list(node))
                self._problem(
                    full_key, f"nothing of this name to remove (there are: {known}).{hint} A new one needs keys"
                )
        elif not isinstance(value, Mapping):
            self._problem(full_key, f"is a node with keys of its own ({', '.join(template)}), not {shown(value)}")
        else:
            if name not in node:
                node[name] = template.clone()
                node[name].defrost()
                self._created[full_key] = (required, node, set())
            self._merge(value, node[name], f"{full_key}.")

    def _check_created(self) -> None:
        """A new named entry without its required key is most likely a mistyped name."""
        for full_key, (required, node, given) in self._created.items():
            if required not in given:
                parent, _, name = full_key.rpartition(".")
                others = [other for other in node if other != name]
                self._problem(
                    full_key,
                    f"there is no '{name}' in {parent} yet (there are: {', '.join(others) or 'none'})."
                    f"{near_matches(name, others)} To add it, give {full_key}.{required} as well",
                )
                del node[name]
        self._created.clear()

    def _set_aside(self, key: Any, value: Any, node: CfgNode, full_key: str) -> None:
        """Keep a foreign key for a later warning; anything else that the tree lacks is an error."""
        if full_key in self._foreign:
            if isinstance(value, str) and not isinstance(self._foreign[full_key], str):
                value = parse_yaml(value, self._source)
            self.unhonoured[full_key] = (value, self._source)
            return
        below = {name.removeprefix(f"{full_key}.") for name in self._foreign if name.startswith(f"{full_key}.")}
        if below and (value is None or isinstance(value, Mapping)):
            for name, inner in (value or {}).items():
                self._set_aside(name, inner, CfgNode(), f"{full_key}.{name}")
            return
        prefix = full_key.removesuffix(str(key))
        siblings = {name.removeprefix(prefix).split(".")[0] for name in self._foreign if name.startswith(prefix)}
        hint = near_matches(str(key), list(node)) or near_matches(str(key), sorted(siblings))
        elsewhere = [name for name in leaf_keys(self._root) if name.rpartition(".")[2] == key]
        if not hint and elsewhere:
            hint = f" Did you mean {' or '.join(elsewhere[:3])}?"
        keys = f" Keys here: {', '.join(sorted(node))}." if node and not hint else ""
        self.wrong |= {prefix} if prefix else {*near_names(str(key), list(node)), *elsewhere}
        self.problems.append(f"{full_key} (in {self._source}): there is no such key.{hint}{keys}")

    def _set_leaf(self, key: str, value: Any, node: CfgNode, full_key: str) -> None:
        if value is None and full_key in self._foreign and self._foreign[full_key] is None:
            return  # PySlowFast writes "off" as null where our default is "off"
        try:
            node[key] = coerce(value, node[key])
        except ValueError as error:
            self._problem(full_key, str(error))

    def _problem(self, full_key: str, text: str) -> None:
        self.wrong.add(full_key)
        self.problems.append(f"{full_key} (in {self._source}): {text}.")


def leaf_keys(node: CfgNode, prefix: str = "") -> list[str]:
    """Every full key below a node that holds a value."""
    keys: list[str] = []
    for name, value in node.items():
        keys += leaf_keys(value, f"{prefix}{name}.") if isinstance(value, CfgNode) else [f"{prefix}{name}"]
    return keys


def value_at(node: Mapping[str, Any], key: str) -> Any:
    """The value of a full key."""
    value: Any = node
    for name in key.split("."):
        value = value[name]
    return value


def same_value(value: Any, default: Any) -> bool:
    """Equal as configuration values: lists and tuples alike, the word None as null."""
    if isinstance(value, list | tuple) and isinstance(default, list | tuple):
        return len(value) == len(default) and all(map(same_value, value, default))
    return bool(value == default) or (default is None and value in (None, "None"))


def _mapping_from_text(value: Any, source: str) -> Any:
    """A word of a command line where a node is expected: ``null``, or a YAML mapping such as ``{ARCH: …}``."""
    if isinstance(value, str):
        return None if value.strip().lower() in _NULLS else parse_yaml(value, source)
    return value


def coerce(value: Any, default: Any) -> Any:
    """``value`` as the type of ``default``, where nothing is lost by it.

    Raises:
        ValueError: It cannot be taken as that type; the text says what was expected.
    """
    if isinstance(default, list):
        return _coerce_list(value, default)
    kind = type(default)
    taken: Any = None
    if kind is bool:
        taken = _WORDS.get(value.strip().lower()) if isinstance(value, str) else value
    elif kind is str:
        # ``KEY:`` with nothing after it is how people write an empty text.
        taken = "" if value is None else _unquote(value) if isinstance(value, str) else None
    elif not isinstance(value, bool):
        taken = _number(value, whole=kind is int)
    if type(taken) is not kind:
        hint = "; put it in quotes" if kind is str and isinstance(value, int | float) else ""
        raise ValueError(f"{shown(value)} is not {_KINDS[kind]}{hint} (it was {default!r})")
    return taken


def _coerce_list(value: Any, default: list[Any]) -> list[Any]:
    if isinstance(value, str):
        with contextlib.suppress(ValueError, SyntaxError, MemoryError, RecursionError):
            value = literal_eval(value)
    if not isinstance(value, list | tuple):
        raise ValueError(f"{shown(value)} is not a list; write it as [a, b, …] (it was {default!r})")
    kind = default[0] if default else ""  # an empty default is a list of texts
    return [coerce(item, kind) for item in value]


def _number(value: Any, *, whole: bool) -> int | float | None:
    """A number from a number or from text; ``None`` when it is neither, or not whole although it must be."""
    if isinstance(value, str):
        try:
            value = int(value) if re.fullmatch(r"\s*[-+]?[0-9]+\s*", value) else float(value)
        except ValueError:
            return None
    if not isinstance(value, int | float):
        return None
    if not whole:
        try:
            return float(value)
        except OverflowError:  # an integer of hundreds of digits
            return None
    return int(value) if isinstance(value, int) or value.is_integer() else None


def _unquote(text: str) -> str:
    """``"a b"`` with its quotes, as they survive some shells, is the text between them."""
    return text[1:-1] if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"" else text
