"""Reading ``study.yaml`` strictly: everything that is wrong with it is told at once."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from distinit_plugin.config.load import resolve_config
from distinit_plugin.config.yaml_files import read_yaml
from distinit_plugin.errors import ConfigError, Problems, shown
from distinit_plugin.registry import near_matches
from distinit_plugin.studies.spec import MAKERS, METRICS, REFERENCE, Choice, Data, Options, Step, Study

MAX_CELLS = 10_000
MAX_NAME = 60

_KEYS = (
    "NAME",
    "OUTPUT_DIR",
    "CFG",
    "OPTS",
    "STEPS",
    "AXES",
    "EXCLUDE",
    "AVERAGE",
    "BEST_OF",
    "BASELINE",
    "METRIC",
    "DATA",
)
_STEP_NAME = re.compile(r"[a-z][a-z0-9_]{0,39}")
_FORBIDDEN = re.compile(r"[\x00-\x1f\x7f-\x9f/\\<>&\"'`|$\u2028\u2029\u202a-\u202e\u2066-\u2069]")


def read_study(path: str | Path, *, output: str = "") -> Study:
    """Read ``study.yaml``.

    Args:
        path: The file, or the name of a shipped one.
        output: Instead of its OUTPUT_DIR.

    Raises:
        ConfigError: Everything that is wrong with it, at once.
    """
    source = resolve_config(path)
    return _Reader(source, read_yaml(source)).study(output)


class _Reader:
    """Takes a study apart and collects what is wrong with it."""

    def __init__(self, source: Path, values: Mapping[Any, Any]) -> None:
        self._source = source
        self._values = values
        self.problems = Problems()

    def study(self, output: str) -> Study:
        """The study.

        Raises:
            ConfigError: Everything that is wrong.
        """
        stem = self._source.stem
        self._known("", self._values, _KEYS)
        name = self._named("NAME", self._values.get("NAME", stem))
        folder = self._text("OUTPUT_DIR", self._values.get("OUTPUT_DIR", f"./runs/studies/{stem}"))
        steps = self._steps()
        last = Step("", self._files("CFG", self._values.get("CFG")), self._options("OPTS", self._values.get("OPTS")))
        axes = self._axes(list(steps))
        average = self._average(axes)
        best_of = self._one_of("BEST_OF", self._values.get("BEST_OF", ""), ["", *axes])
        if best_of and best_of in average:
            self.problems.append(f"BEST_OF: {best_of} is averaged over (AVERAGE); name another axis.")
        study = Study(
            source=self._source,
            name=name,
            output=Path(output or folder).expanduser(),
            last=last,
            steps=steps,
            axes=axes,
            exclude=self._exclude(axes),
            average=average,
            best_of=best_of,
            baseline=self._baseline(axes, average, best_of),
            metric=self._one_of("METRIC", self._values.get("METRIC", "top1"), list(METRICS)),
            data=self._data(),
        )
        self._check_references(study)
        self._check_size(axes)
        if self.problems:
            raise ConfigError([f"{self._source}: {problem}" for problem in self.problems])
        return study

    # ------------------------------------------------------------------------------------------------------- parts
    def _steps(self) -> dict[str, Step]:
        steps = {}
        for key, entry in self._mapping("STEPS", self._values.get("STEPS")).items():
            where = f"STEPS.{key}"
            if not isinstance(key, str) or not _STEP_NAME.fullmatch(key):
                self.problems.append(
                    f"STEPS: the name {shown(key)} is not allowed. Allowed: small letters, digits and _, first a letter"
                )
                continue
            values = self._mapping(where, entry)
            self._known(where, values, ("CFG", "OPTS"))
            files = self._files(f"{where}.CFG", values.get("CFG"))
            steps[key] = Step(key, files, self._options(f"{where}.OPTS", values.get("OPTS")))
        return steps

    def _axes(self, steps: list[str]) -> dict[str, dict[str, Choice]]:
        axes: dict[str, dict[str, Choice]] = {}
        for key, entry in self._mapping("AXES", self._values.get("AXES")).items():
            axis = self._named("AXES", key)
            where = f"AXES.{axis}"
            choices: dict[str, Choice] = {}
            for given, meaning in self._mapping(where, entry).items():
                value = self._named(where, given)
                if value in choices:
                    self.problems.append(f"{where}: the value {value} is there twice.")
                choices[value] = self._choice(f"{where}.{value}", meaning, steps)
            if not choices:
                self.problems.append(f"{where}: the axis has no values; write value: {{KEY: …}}, or remove it.")
            if axis in axes:
                self.problems.append(f"AXES: the axis {axis} is there twice.")
            axes[axis] = choices
        if not axes:
            self.problems.append("AXES: there are none; write axis: {value: {KEY: …}, …} for what is compared.")
        return axes

    def _choice(self, where: str, meaning: object, steps: list[str]) -> Choice:
        values = self._mapping(where, meaning)
        own, of_steps = {}, {}
        for key, value in values.items():
            if isinstance(key, str) and _STEP_NAME.fullmatch(key):
                if key not in steps:
                    hint = near_matches(key, steps)
                    self.problems.append(f"{where}: there is no step named {shown(key)} (STEPS).{hint}")
                of_steps[key] = self._options(f"{where}.{key}", value)
            else:
                own[key] = value
        return Choice(self._options(where, own), of_steps)

    def _average(self, axes: Mapping[str, object]) -> tuple[str, ...]:
        default = ["seed"] if "seed" in axes else []
        given = self._values.get("AVERAGE", default)
        names = given if isinstance(given, list) else [given] if given is not None else []
        found = tuple(self._one_of("AVERAGE", name, list(axes)) for name in names)
        if len(set(found)) < len(found):
            self.problems.append("AVERAGE: an axis is there twice.")
        if found and len(set(found)) == len(axes):
            self.problems.append("AVERAGE: all axes are averaged over, so nothing is compared; leave one out.")
        return found

    def _place(self, where: str, given: object, axes: Mapping[str, Mapping[str, object]]) -> dict[str, str]:
        """``{axis: value}``."""
        place = {}
        for key, value in self._mapping(where, given).items():
            axis = self._one_of(where, key, list(axes))
            if axis in axes:
                place[axis] = self._one_of(f"{where}.{axis}", value, list(axes[axis]))
        return place

    def _exclude(self, axes: Mapping[str, Mapping[str, object]]) -> list[dict[str, str]]:
        given = self._values.get("EXCLUDE") or []
        if not isinstance(given, list):
            self.problems.append(f"EXCLUDE: a list of {{axis: value}} is expected, not {shown(given)}.")
            return []
        places = [self._place("EXCLUDE", entry, axes) for entry in given]
        if {} in places:
            self.problems.append("EXCLUDE: an entry names no place; write {axis: value, …}, or remove it.")
        return places

    def _baseline(
        self, axes: Mapping[str, Mapping[str, object]], average: tuple[str, ...], best_of: str
    ) -> dict[str, str]:
        place = self._place("BASELINE", self._values.get("BASELINE"), axes)
        for axis in place:
            if axis in average or axis == best_of:
                role = "averaged over (AVERAGE)" if axis in average else "chosen from (BEST_OF)"
                self.problems.append(f"BASELINE: {axis} is {role}, so no row has a value of it; name another axis.")
        return place

    def _data(self) -> Data | None:
        values = self._mapping("DATA", self._values.get("DATA"))
        if not values:
            return None
        self._known("DATA", values, ("MAKER", "FOLDER"))
        maker = self._one_of("DATA.MAKER", values.get("MAKER", ""), list(MAKERS))
        return Data(maker, self._text("DATA.FOLDER", values.get("FOLDER", "")))

    def _check_references(self, study: Study) -> None:
        """``$name`` is a step; a step starts from those before it only."""
        names = list(study.steps)
        for where, options, place in _all_options(study):
            before = names if place is None else names[: names.index(place)]
            for key, value in options.items():
                if not isinstance(value, str) or not value.startswith("$"):
                    continue
                found = REFERENCE.fullmatch(value)
                if found is None or found[1] not in before:
                    hint = near_matches(value[1:], before)
                    later = " written before it" if place is not None else ""
                    self.problems.append(
                        f"{where}.{key}: {shown(value)} is no step{later}.{hint} Steps: {', '.join(before) or 'none'}."
                    )

    def _check_size(self, axes: Mapping[str, Mapping[str, object]]) -> None:
        cells = 1
        for values in axes.values():
            cells *= max(len(values), 1)
        if cells > MAX_CELLS:
            self.problems.append(f"AXES: the grid has {cells} places; at most {MAX_CELLS} are taken.")

    # ------------------------------------------------------------------------------------------------------ values
    def _known(self, where: str, values: Mapping[Any, Any], allowed: tuple[str, ...]) -> None:
        for key in values:
            if key not in allowed:
                place = f"{where}: " if where else ""
                hint = near_matches(str(key), list(allowed))
                self.problems.append(f"{place}there is no key {shown(key)}.{hint} Known: {', '.join(allowed)}.")

    def _mapping(self, where: str, value: object) -> Mapping[Any, Any]:
        if value is None:
            return {}
        if not isinstance(value, Mapping):
            self.problems.append(f"{where}: a mapping (name: value) is expected, not {shown(value)}.")
            return {}
        return value

    def _options(self, where: str, value: object) -> Options:
        options = {}
        for key, given in self._mapping(where, value).items():
            if not isinstance(key, str) or not key or key == "OUTPUT_DIR":
                fix = "the study names the runs' folders" if key == "OUTPUT_DIR" else "KEY: value is expected"
                self.problems.append(f"{where}: {shown(key)} cannot be set here, {fix}.")
                continue
            options[key] = given
        return options

    def _text(self, where: str, value: object) -> str:
        if not isinstance(value, str) or not value.strip() or "\0" in value:
            self.problems.append(f"{where}: {shown(value)} is not allowed; the name of a folder is expected.")
            return "."
        return value

    def _named(self, where: str, value: object) -> str:
        """A name that may stand in tables, pages and names of files."""
        text = str(value) if isinstance(value, str | int | float) and not isinstance(value, bool) else ""
        if not text or text != text.strip() or len(text) > MAX_NAME or _FORBIDDEN.search(text) or text[0] in ".-=+@":
            self.problems.append(
                f"{where}: the name {shown(value)} is not allowed. Allowed: 1 to {MAX_NAME} characters without "
                "/ \\ < > & | $, quotes, line breaks, blanks at an end, or . - = + @ first."
            )
            return "?"
        return text

    def _one_of(self, where: str, value: object, allowed: list[str]) -> str:
        text = "" if value is None else str(value)
        if text in allowed:
            return text
        known = ", ".join(name for name in allowed if name) or "none"
        self.problems.append(f"{where}: {shown(value)} is not known.{near_matches(text, allowed)} Known: {known}.")
        return text

    def _files(self, where: str, value: object) -> tuple[str, ...]:
        given = value if isinstance(value, list) else [value]
        names = [name for name in given if isinstance(name, str) and name]
        if not names or len(names) < len(given):
            self.problems.append(
                f"{where}: the name of a YAML file (or a list of them) is expected, not {shown(value)}."
            )
            return ()
        found = []
        for name in names:
            beside = self._source.parent / name
            with self.problems.collect(f"{where}: "):
                found.append(str(beside if beside.is_file() else resolve_config(name)))
        return tuple(found)


def _all_options(study: Study) -> Iterator[tuple[str, Options, str | None]]:
    """Where options stand, they, and the step that they are of (``None``: the runs that are compared)."""
    yield "OPTS", study.last.options, None
    for step in study.steps.values():
        yield f"STEPS.{step.name}.OPTS", step.options, step.name
    for axis, choices in study.axes.items():
        for value, choice in choices.items():
            yield f"AXES.{axis}.{value}", choice.options, None
            for name, options in choice.of_steps.items():
                if name in study.steps:
                    yield f"AXES.{axis}.{value}.{name}", options, name
