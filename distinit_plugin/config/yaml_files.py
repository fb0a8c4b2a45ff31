"""Reading YAML files strictly: safe tags only, no duplicate keys, YAML 1.2 scalars, and ``_BASE_`` inheritance.

PyYAML follows YAML 1.1, where ``1e-4`` is a string, ``on`` and ``no`` are booleans, ``010`` is eight and ``1:30`` is
ninety. None of these is what somebody who writes a configuration means, so the scalars here are those of YAML 1.2.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any

import yaml

from distinit_plugin.errors import ConfigError, shown

BASE_KEY = "_BASE_"

FindBase = Callable[[Path, str], Path | None]
"""(file that names a base, what it names) → the base's path, or ``None`` when there is no such file."""


class _StrictLoader(yaml.SafeLoader):
    """``yaml.SafeLoader`` with YAML 1.2 scalars that refuses a key written twice in one mapping."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012 (PyYAML's protocol)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """Build a mapping; a duplicate key is an error with its line instead of a silent overwrite."""
        seen: set[str] = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                continue
            if key_node.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key_node.value} is written twice", key_node.start_mark
                )
            seen.add(key_node.value)
        return super().construct_mapping(node, deep)

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Join ``<<`` mappings; a key stays once, so that merges of merges do not grow without bound."""
        super().flatten_mapping(node)
        node.value = list({(key.tag, str(key.value)): (key, value) for key, value in node.value}.values())


_SCALARS = {
    "bool": (r"true|True|TRUE|false|False|FALSE", "tTfF"),
    "int": (r"[-+]?(?:0|[1-9][0-9]*)", "-+0123456789"),
    "float": (
        r"[-+]?(?:\.[0-9]+|[0-9]+\.[0-9]*|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        "-+0123456789.",
    ),
    "null": (r"~|null|Null|NULL|", "~nN\0"),
    "merge": (r"<<", "<"),
}
for _tag, (_pattern, _first) in _SCALARS.items():
    _characters = ["" if character == "\0" else character for character in _first]
    _StrictLoader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})$"), _characters)


class _RepeatsLoader(_StrictLoader):
    """The same, but of a key that is written twice the last counts."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """Build a mapping."""
        return yaml.SafeLoader.construct_mapping(self, node, deep)


_HINTS = {
    "'\\t'": " Indent with spaces; YAML allows no tabs there.",
    "constructor for the tag": " Tags (!…) can run programs and are never followed; write the plain value.",
}
"""Part of PyYAML's words → what to do."""


def parse_yaml(text: str, source: str, *, repeats: bool = False) -> Any:
    """Parse one YAML document.

    Args:
        text: The document.
        source: What to call it in an error (a file name, ``--opts``).
        repeats: A key may be written twice in a mapping, and the last counts: PySlowFast's own files have some.

    Raises:
        ConfigError: A syntax error, an unsafe tag or a duplicate key; the text gives line and column.
    """
    try:
        return yaml.load(text, Loader=_RepeatsLoader if repeats else _StrictLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{source}, line {mark.line + 1}, column {mark.column + 1}" if mark else source
        hint = next((text for part, text in _HINTS.items() if part in str(error.problem)), "")
        raise ConfigError([f"{place}: cannot be read as YAML: {error.problem}.{hint}"]) from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError([f"{source}: cannot be read as YAML: {' '.join(str(error).split())}."]) from None


def read_yaml(path: Path, *, repeats: bool = False) -> dict[Any, Any]:
    """Read one YAML file whose top level is a mapping (an empty file is an empty mapping).

    Raises:
        ConfigError: The file is missing, unreadable, not YAML, or not a mapping.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError([f"{path}: there is no such file."]) from None
    except UnicodeDecodeError:
        raise ConfigError([f"{path}: this is not a text file; a YAML file in UTF-8 is expected."]) from None
    except OSError as error:
        raise ConfigError([f"{path}: cannot be read: {error.strerror}."]) from None
    values = parse_yaml(text, str(path), repeats=repeats)
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError([f"{path}: the top level is a {type(values).__name__}; a mapping of KEY: value is expected."])
    return values


def base_beside(path: Path, base: str) -> Path | None:
    """The usual meaning of ``_BASE_``: relative to the file that names it (``~`` and absolute paths work)."""
    candidate = path.parent / Path(base).expanduser()
    return candidate if candidate.is_file() else None


def read_chain(
    path: Path, find_base: FindBase = base_beside, *, repeats: bool = False
) -> list[tuple[Path, dict[Any, Any]]]:
    """Read a file and everything it inherits from, the most basic file first, ``_BASE_`` keys removed.

    ``repeats``: as in ``parse_yaml``.

    Raises:
        ConfigError: As ``read_yaml``; a base that does not exist, is a list, or inherits from itself.
    """
    chain: list[tuple[Path, dict[Any, Any]]] = []
    seen: set[Path] = set()
    current: Path | None = path
    while current is not None:
        if current.resolve() in seen:
            raise ConfigError([f"{chain[-1][0]}: {BASE_KEY} leads back to {current}; a file cannot inherit itself."])
        seen.add(current.resolve())
        values = read_yaml(current, repeats=repeats)
        chain.append((current, values))
        current = _find(current, values.pop(BASE_KEY, None), find_base)
    return chain[::-1]


def _find(path: Path, base: object, find_base: FindBase) -> Path | None:
    """The file that ``_BASE_: base`` in ``path`` means; ``None`` without a base."""
    if base is None:
        return None
    if not isinstance(base, str) or not base:
        raise ConfigError(
            [f"{path}: {BASE_KEY} is {shown(base)}; one file name is expected (chain files for several)."]
        )
    found = find_base(path, base)
    if found is None:
        raise ConfigError([f"{path}: {BASE_KEY} names {base}, which is not a file beside {path.parent}."])
    return found
