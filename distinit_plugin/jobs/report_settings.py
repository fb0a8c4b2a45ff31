"""What a run's configuration says, for a report. An older program may have written it: keys are taken as they are."""

from __future__ import annotations

import functools
import reprlib
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

from distinit_plugin.analysis.published import config_name, rows_of
from distinit_plugin.analysis.run_facts import Described, RunFacts
from distinit_plugin.config.load import load_cfg
from distinit_plugin.config.yaml_files import parse_yaml
from distinit_plugin.engine import checkpoint
from distinit_plugin.errors import ConfigError
from distinit_plugin.jobs.resuming import HARMLESS, STEP_KEYS

MOST_KEYS = 2000
MOST_CHARACTERS = 200_000
"""Of a configuration; what comes after is cut off."""

_LEVELS = 12
_OF_NO_ACCOUNT = (
    *(key for key in HARMLESS if not key.startswith(("TEST", "CORPUS.TEST"))),
    "FLOW.STORE",
    "RNG_SEED",
)
"""Keys (or their beginnings) that do not keep a run from being compared with a paper's row."""
_PLACES = ("PATH", "CLASSES", "CACHE", "CHECKPOINT_FILE_PATH")
"""Last parts of keys that say where things are on somebody's disk."""

_SHOWN = reprlib.Repr()
_SHOWN.maxlevel, _SHOWN.maxlist, _SHOWN.maxtuple, _SHOWN.maxdict = 4, 64, 64, 32
_SHOWN.maxstring, _SHOWN.maxother, _SHOWN.maxlong = 300, 100, 40


def read_settings(facts: RunFacts) -> None:
    """Fill in what the run's configuration says; a sentence where it says nothing that can be read."""
    text = facts.record.config if facts.record is not None else ""
    text = text or checkpoint.saved_config(facts.folder / checkpoint.FOLDER)
    if not text:
        if not facts.failure:  # else it may have failed before it began
            facts.problems.append(
                "its configuration is not known: there is neither run.json nor a checkpoint that has it."
            )
        return
    facts.config = text if len(text) <= MOST_CHARACTERS else f"{text[:MOST_CHARACTERS]}\n… (cut off)"
    try:
        values = parse_yaml(text[:MOST_CHARACTERS], f"the configuration of {facts.name}")
    except ConfigError as error:
        facts.problems.append(f"its configuration cannot be read: {error}")
        return
    if not isinstance(values, dict):
        facts.problems.append("its configuration is no mapping of keys to values.")
        return
    facts.settings = flatten(values)
    files = facts.record.files if facts.record is not None else []
    facts.described = describe(values, files)


def flatten(values: Mapping[Any, Any]) -> dict[str, str]:
    """``{"DATA.NUM_FRAMES": "8", …}`` of nested mappings."""
    found: dict[str, str] = {}
    waiting: list[tuple[str, Mapping[Any, Any], int]] = [("", values, 0)]
    while waiting and len(found) < MOST_KEYS:
        prefix, node, level = waiting.pop()
        for key, value in node.items():
            name = f"{prefix}{_short(key)}"
            if isinstance(value, Mapping) and value and level < _LEVELS:
                if len(waiting) < MOST_KEYS:
                    waiting.append((f"{name}.", value, level + 1))
            else:
                found[name] = _short(value)
    return found


def _short(value: Any) -> str:
    return value if isinstance(value, str) and len(value) <= _SHOWN.maxstring else _SHOWN.repr(value)


def describe(values: Mapping[str, Any], files: list[str]) -> Described:
    """The words of a report for a configuration.

    Args:
        values: Nested mappings.
        files: YAML files that the run was started with, as far as they are known.
    """
    output = _at(values, "OUTPUT_DIR")
    guess = config_name(output) if isinstance(output, str) else ""  # the shipped files' folders have their names
    return Described(
        network=_word(_at(values, "MODEL", "MODEL_NAME")),
        start=_start(values),
        teaching=" and ".join([*(["labels"] if _labels(values) else []), *_teachers(values)]),
        corpus=_corpora(values),
        seed=_word(_at(values, "RNG_SEED")),
        config=config_name(files[-1]) if files else guess if rows_of(guess) else "",
        step_clips=_step_clips(values),
    )


def _at(values: Any, *keys: str) -> Any:
    for key in keys:
        values = values.get(key) if isinstance(values, Mapping) else None
    return values


def _word(value: Any) -> str:
    return "" if value is None or isinstance(value, Mapping) else _short(value)


def _start(values: Mapping[str, Any]) -> str:
    weights = _at(values, "TRAIN", "CHECKPOINT_FILE_PATH")
    if isinstance(weights, str) and weights:
        path = PurePath(weights)
        return f"weights of {path.parent.parent.name if path.parent.name == checkpoint.FOLDER else path.name}"
    inflated = _at(values, "INIT", "INFLATE_FROM")
    return f"inflated {_short(inflated)}" if inflated else "random weights"


def _labels(values: Mapping[str, Any]) -> bool:
    weight = _at(values, "ACTION", "LOSS_WEIGHT")
    return isinstance(weight, int | float) and weight > 0


def _teachers(values: Mapping[str, Any]) -> list[str]:
    teachers = _at(values, "DISTILL", "TEACHERS")
    if not isinstance(teachers, Mapping):
        return []
    return [f"{_short(name)} ({_word(_at(entry, 'ARCH'))})" for name, entry in list(teachers.items())[:8]]


def _corpora(values: Mapping[str, Any]) -> str:
    corpora = _at(values, "CORPUS", "TRAIN")
    if _at(values, "DETECTION", "ENABLE") is True:
        return "keyframes"
    if not isinstance(corpora, Mapping):
        return ""
    names = []
    for name, entry in list(corpora.items())[:8]:
        path = _at(entry, "PATH")
        names.append(f"{_short(name)} ({PurePath(path).name})" if isinstance(path, str) and path else _short(name))
    return ", ".join(names)


def _step_clips(values: Mapping[str, Any]) -> int:
    batch, shards = _at(values, "TRAIN", "BATCH_SIZE"), _at(values, "NUM_SHARDS")
    fits = isinstance(batch, int) and isinstance(shards, int) and 0 < batch < 10**7 and 0 < shards < 10**5
    return batch * shards if fits else 0


# ------------------------------------------------------------------------------------------------ published rows
def changes_in(facts: RunFacts) -> list[str]:
    """What a run whose configuration is a row of a paper changes in the shipped file: ``KEY value (is value)``."""
    if not (facts.settings and rows_of(facts.described.config)):
        return []
    shipped = _shipped(facts.described.config)
    skipped = set(STEP_KEYS) if _clips(facts.settings) == _clips(shipped) else set()
    return [
        f"{key} {facts.settings.get(key, 'not there')} (is {shipped.get(key, 'not there')})"
        for key in sorted({*facts.settings, *shipped})
        if facts.settings.get(key) != shipped.get(key)
        and key not in skipped
        and not key.startswith(_OF_NO_ACCOUNT)
        and key.rpartition(".")[2] not in _PLACES
    ]


def _clips(settings: Mapping[str, str]) -> tuple[int, str]:
    """TRAIN.BATCH_SIZE × NUM_SHARDS; the text keeps apart what are no numbers."""
    words = [settings.get("TRAIN.BATCH_SIZE", ""), settings.get("NUM_SHARDS", "")]
    if all(word.isdecimal() and len(word) < 10 for word in words):
        return int(words[0]) * int(words[1]), ""
    return 0, " ".join(words)


@functools.cache
def _shipped(config: str) -> dict[str, str]:
    cfg, _ = load_cfg(f"configs/{config}.yaml", check=False)
    values = parse_yaml(cfg.dump(), config)
    return flatten(values)
