"""From YAML files and ``KEY VALUE`` words to one frozen, checked configuration."""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from distinit_plugin.config.defaults import get_cfg
from distinit_plugin.config.node import CfgNode, Merger, join, same_value
from distinit_plugin.config.pyslowfast_keys import PYSLOWFAST_DEFAULTS
from distinit_plugin.config.theirs import (
    TOLD_BY_CONTENTS,
    is_their_file,
    keep_architecture,
    read_their_way,
    take_their_defaults,
    train_on_labels,
)
from distinit_plugin.config.validate import network_problems, problems_of
from distinit_plugin.config.yaml_files import base_beside, parse_yaml, read_chain
from distinit_plugin.errors import ConfigError, shown
from distinit_plugin.registry import near_matches

HOME_PATHS = (
    "OUTPUT_DIR",
    "AVA.ANNOTATION_DIR",
    "AVA.FRAME_DIR",
    "AVA.FRAME_LIST_DIR",
    "CORPUS.INDEX_CACHE",
    "DATA.PATH_TO_DATA_DIR",
    "DATA.PATH_PREFIX",
    "INIT.FLOW_NET_WEIGHTS",
    "INIT.INFLATE_WEIGHTS",
    "INIT.STREAM_WEIGHTS",
    "KEYFRAMES.VIDEO_DIR",
    "TEST.CHECKPOINT_FILE_PATH",
    "TRAIN.CHECKPOINT_FILE_PATH",
)
"""Keys whose ``~`` means the home folder (corpora and teachers expand their own paths)."""

OTHER_DEFAULTS = {"DATA.TARGET_FPS": "frames are taken as they are; CORPUS.TARGET_FPS resamples"}
"""PySlowFast keys whose default this runner does not follow, and what it does."""

THEIR_NODES = frozenset(key.split(".")[0] for key in PYSLOWFAST_DEFAULTS)
"""PySlowFast's top-level nodes and keys."""

Chain = list[tuple[Path, dict[Any, Any]]]

_PACKAGE = Path(__file__).resolve().parents[1]


class Reading(NamedTuple):
    """What came of reading a configuration, whether or not it can be used.

    Attributes:
        cfg: Frozen; a value that could not be taken is still the default.
        warnings: One sentence for each PySlowFast key that was set and is not honoured.
        problems: One sentence each; none: the configuration is good.
        wrong: The (starts of) keys that the problems are about, so that nothing is said twice about them.
        unhonoured: The keys that the warnings are about → what was given.
    """

    cfg: CfgNode
    warnings: list[str]
    problems: list[str]
    wrong: frozenset[str]
    unhonoured: dict[str, Any]


def load_cfg(
    paths: str | os.PathLike[str] | Sequence[str | os.PathLike[str]], opts: Sequence[Any] = (), *, check: bool = True
) -> tuple[CfgNode, list[str]]:
    """Load one or more YAML files, then overrides.

    Args:
        paths: YAML files, later ones override earlier ones; names of shipped files work too (``resolve_config``).
        opts: ``[KEY, value, KEY, value, …]``; values are words of a command line or Python values.
        check: Also ``validate`` the result (without looking for the files that it names).

    Returns:
        The frozen configuration, and one sentence for each PySlowFast key that was set and is not honoured.

    Raises:
        ConfigError: Everything that is wrong, at once.
    """
    return _good(read_cfg(paths, opts, check=check))


def read_cfg(
    paths: str | os.PathLike[str] | Sequence[str | os.PathLike[str]], opts: Sequence[Any] = (), *, check: bool = True
) -> Reading:
    """As ``load_cfg``, but what is wrong with keys and values comes back, so that more can be found out.

    Raises:
        ConfigError: Files that cannot be read, all of them.
    """
    names = [paths] if isinstance(paths, str | os.PathLike) else list(paths)
    cfg = get_cfg()
    cfg.note_source_files([os.fspath(name) for name in names])
    chains: list[Chain] = []
    unreadable: list[str] = []
    for name in names:
        try:
            chains.append(_read_chain(resolve_config(name), opts))
        except ConfigError as error:
            unreadable += error.problems
    if unreadable:
        raise ConfigError(unreadable)
    theirs = bool(chains) and _are_theirs(chains, opts)
    if theirs:
        take_their_defaults(cfg)
    merger = Merger(cfg, PYSLOWFAST_DEFAULTS)
    for path, values in chain.from_iterable(chains):
        merger.merge(values, str(path))
    merger.merge_pairs(list(opts), "--opts")
    return _finish(cfg, merger, check, theirs=theirs)


def _read_chain(path: Path, opts: Sequence[Any]) -> Chain:
    """A file and what it inherits; some of PySlowFast's own files have a key twice, and there the last counts."""
    try:
        return read_chain(path, find_base)
    except ConfigError:
        with contextlib.suppress(ConfigError):
            found = read_chain(path, find_base, repeats=True)
            if _are_theirs([found], opts):
                return found
        raise


def _are_theirs(chains: Sequence[Chain], opts: Sequence[Any]) -> bool:
    joined: dict[str, Any] = {}
    for _, values in chain.from_iterable(chains):
        join(copy.deepcopy(values), joined)
    first, contents = chains[0][0]
    shipped = first.resolve().is_relative_to(shipped_folder().resolve())
    own = [str(name) for name in contents if name in get_cfg() and str(name) not in THEIR_NODES]
    return not shipped and is_their_file(joined, list(opts), own)


def load_network_cfg(files: Sequence[str], words: Sequence[str]) -> CfgNode:
    """Load a configuration of which only the network counts.

    Args:
        files: YAML files.
        words: ``KEY VALUE`` words over them.

    Raises:
        UserError: Anything wrong with the keys or the network's switches, everything at once.
    """
    reading = read_cfg(list(files), list(words), check=False)
    problems = [*reading.problems, *network_problems(reading.cfg, reading.wrong)]
    if problems:
        raise ConfigError(problems)
    return reading.cfg


def _good(reading: Reading) -> tuple[CfgNode, list[str]]:
    if reading.problems:
        raise ConfigError(reading.problems)
    return reading.cfg, reading.warnings


def parse_cfg(text: str, source: str, *, check: bool = True) -> tuple[CfgNode, list[str]]:
    """Load a configuration from YAML text, for example the one that a checkpoint holds.

    Args:
        text: What ``cfg.dump()`` gave.
        source: Where it comes from, for errors.
        check: As in ``load_cfg``.

    Raises:
        ConfigError: Everything that is wrong, at once.
    """
    values = parse_yaml(text, source)
    if not isinstance(values, dict):
        raise ConfigError([f"{source}: a mapping of KEY: value is expected."])
    cfg = get_cfg()
    merger = Merger(cfg, PYSLOWFAST_DEFAULTS)
    merger.merge(values, source)
    return _good(_finish(cfg, merger, check))


def cfg_text(path: str | os.PathLike[str]) -> str:
    """The YAML text of a file of PySlowFast with all that it inherits.

    Raises:
        ConfigError: It cannot be read.
    """
    joined: dict[str, Any] = {}
    for _, values in read_chain(resolve_config(path), find_base, repeats=True):
        join(values, joined)
    return yaml.safe_dump(joined)


def resolve_config(path: str | os.PathLike[str]) -> Path:
    """Find a YAML file: as a path from here first, else among the shipped ones.

    ``configs/DistInit/X.yaml`` and ``DistInit/X.yaml`` both name a shipped file, from any folder.

    Raises:
        ConfigError: There is no such file; the text names shipped files that are near.
    """
    given = Path(path).expanduser()
    if given.is_file():
        return given
    shipped = _shipped(os.fspath(path))
    if shipped is not None:
        return shipped
    names = shipped_configs()
    by_stem = {Path(name).stem: name for name in names}
    hint = near_matches(os.fspath(path), names) or near_matches(given.stem, list(by_stem))
    for stem, name in by_stem.items():
        hint = hint.replace(f" {stem}?", f" {name}?").replace(f" {stem} ", f" {name} ")
    if not os.fspath(path):
        raise ConfigError(["the name of a configuration is empty. Give the path of a YAML file."])
    what = "a folder, not a YAML file" if given.is_dir() else "no such file"
    raise ConfigError([f"{path}: {what}, from {Path.cwd()} or among the shipped configs ({shipped_folder()}).{hint}"])


def shipped_folder() -> Path:
    """The folder of the shipped YAML files: inside the installed package, or ``configs/`` of a source checkout."""
    installed = _PACKAGE / "shipped" / "configs"
    return installed if installed.is_dir() else _PACKAGE.parent / "configs"


def shipped_configs() -> list[str]:
    """The names of all shipped YAML files that can be run (``configs/DistInit/X.yaml``), sorted."""
    folder = shipped_folder()
    names = (path.relative_to(folder) for path in folder.rglob("*.yaml"))
    return sorted(f"configs/{name.as_posix()}" for name in names if name.parts[0] not in ("_base_", "studies"))


def _shipped(name: str) -> Path | None:
    """The shipped file of that name, never one outside the shipped folder."""
    parts = [part for part in Path(name).parts if part != "."]
    if parts[:1] == ["configs"]:
        parts = parts[1:]
    if not parts or ".." in parts or Path(name).is_absolute():
        return None
    candidate = shipped_folder().joinpath(*parts)
    return candidate if candidate.is_file() else None


def find_base(path: Path, base: str) -> Path | None:
    """Beside the file that names it, else shipped, so that a user's own YAML can start from a shipped one."""
    return base_beside(path, base) or _shipped(base)


def _finish(cfg: CfgNode, merger: Merger, check: bool, *, theirs: bool = False) -> Reading:
    for key in HOME_PATHS:
        node, name = cfg[key.split(".")[0]] if "." in key else cfg, key.split(".")[-1]
        node[name] = os.path.expanduser(node[name])
    problems, wrong = list(merger.problems), set(merger.wrong)
    keep_architecture(cfg, merger.unhonoured)
    honoured = set(TOLD_BY_CONTENTS)
    if theirs:
        read_their_way(cfg)
        further, settled = train_on_labels(cfg, merger.unhonoured)
        problems += further
        wrong |= {"ACTION.", "DISTILL.TEACHERS."} if further else set()
        honoured |= settled
    if check:
        found = problems_of(cfg, wrong)
        problems += found
        wrong |= {problem.partition(":")[0] for problem in found}
    cfg.freeze()
    warnings = [
        f"{key} is {shown(value)} (in {source}), but this runner does not honour it: it behaves as with PySlowFast's "
        f"default, {PYSLOWFAST_DEFAULTS[key]!r}."
        for key, (value, source) in merger.unhonoured.items()
        if not same_value(value, PYSLOWFAST_DEFAULTS[key]) and key not in OTHER_DEFAULTS and key not in honoured
    ]
    for key in (OTHER_DEFAULTS.keys() & merger.unhonoured.keys()) - honoured:
        value, source = merger.unhonoured[key]
        warnings.append(
            f"{key} is {shown(value)} (in {source}), but this runner does not honour it: {OTHER_DEFAULTS[key]}."
        )
    given = {key: value for key, (value, _) in merger.unhonoured.items()}
    return Reading(cfg, warnings, problems, frozenset(wrong), given)
