"""``distinit doctor --cfg``: whether a job could start, and what it would do without a word."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Mapping, Sequence
from typing import Any

from distinit_plugin.doctor.findings import Finding, State, first_line
from distinit_plugin.doctor.machine import look_at_places
from distinit_plugin.errors import ConfigError, UserError

PROGRAMS = ("run", "slowfast")
"""Verbs that run configurations."""

COMMAND = {"run": "distinit run", "slowfast": "distinit slowfast"}


def look_at_configuration(program: str, files: Sequence[str], words: Sequence[str]) -> list[Finding]:
    """What a job of these files and ``KEY VALUE`` words would meet.

    Args:
        program: One of ``PROGRAMS``; empty: ``run`` for networks of this package, ``slowfast`` for PySlowFast's.
        files: YAML files.
        words: Overrides.
    """
    try:
        if program != "run":
            cfg = _host_cfg(files, words)
            program = program or program_for(cfg)
            if program == "slowfast":
                return _in_slowfast(cfg)
        return _in_run(files, words)
    except UserError as error:
        return _refused(COMMAND.get(program, "configuration"), error)


def program_for(cfg: Any) -> str:
    """The verb that a configuration is for, by its network."""
    from distinit_plugin.hosts.slowfast.networks import is_own

    return "run" if is_own(cfg.MODEL.MODEL_NAME) else "slowfast"


def look_at_folders(files: Sequence[str], words: Sequence[str]) -> list[Finding]:
    """Shared memory, disks and open files; the disk of OUTPUT_DIR where there is a configuration that can be read."""
    try:
        output = str(_host_cfg(files, words).OUTPUT_DIR) if files else "."
    except UserError:
        output = "."
    return look_at_places(output)


def _refused(command: str, error: UserError) -> list[Finding]:
    problems = error.problems if isinstance(error, ConfigError) else [str(error)]
    return [_of_sentence(problem, "broken", command) for problem in problems]


def _of_sentence(sentence: str, state: State, command: str) -> Finding:
    """A sentence that begins with its key, or is one of the command's."""
    key, colon, text = sentence.partition(": ")
    return Finding(key, state, text) if colon and " " not in key else Finding(command, state, sentence)


def _in_run(files: Sequence[str], words: Sequence[str]) -> list[Finding]:
    """As ``distinit run`` looks at it before its first step."""
    from distinit_plugin.config.load import read_cfg
    from distinit_plugin.jobs.corpora import Corpora
    from distinit_plugin.jobs.preflight import job_problems

    reading = read_cfg(list(files), list(words))
    problems = [*reading.problems, *job_problems(reading.cfg, Corpora(reading.cfg), reading.wrong)]
    if problems:
        raise ConfigError(problems)
    notes = [Finding("distinit run", "note", warning) for warning in reading.warnings]
    return [*notes, Finding("distinit run", "works", "videos, weights and machine are as the job needs them")]


def _host_cfg(files: Sequence[str], words: Sequence[str]) -> Any:
    """PySlowFast's configuration with this package's nodes; where it is absent, by a list of its keys."""
    from distinit_plugin.hosts.slowfast.schema import default_root

    theirs = sys.modules.get("slowfast.config.defaults")
    cfg = theirs.get_cfg() if theirs is not None else default_root()
    for file in files:
        cfg.merge_from_file(file)
    cfg.merge_from_list(list(words))
    return cfg


def _in_slowfast(cfg: Any) -> list[Finding]:
    """As ``distinit slowfast`` settles it, and what PySlowFast says nothing of."""
    from distinit_plugin.hosts.slowfast.schema import own_cfg
    from distinit_plugin.hosts.slowfast.settling import reads_corpora, settle
    from distinit_plugin.hosts.slowfast.traps import needed_cures, surprises

    command = COMMAND["slowfast"]
    findings = [_of_sentence(problem, "broken", command) for problem in _own_checks(cfg)]
    findings += [_cured(cure.patch, cure.key) for cure in needed_cures(cfg)]
    findings += [_of_sentence(sentence, "note", command) for sentence in surprises(cfg)]
    settled = cfg.clone()
    try:
        settle(settled)
    except UserError as error:
        findings += _refused(command, error)
    findings += _own_data(cfg) if reads_corpora(own_cfg(cfg)) else _their_data(cfg)
    if any(finding.state == "broken" for finding in findings):
        return findings
    return [*findings, Finding(command, "works", "nothing stands in its way that can be known before it starts")]


def _own_checks(cfg: Any) -> list[str]:
    """What PySlowFast asserts, and how many GPUs there are."""
    import torch

    problems = []
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count < cfg.NUM_GPUS:
        problems.append(f"NUM_GPUS: {cfg.NUM_GPUS}, but torch sees {count} here. Set it to {count}.")
    theirs = sys.modules.get("slowfast.config.defaults")
    if theirs is not None:
        try:
            theirs.assert_and_infer_cfg(cfg.clone())
        except AssertionError as error:
            line = traceback.extract_tb(error.__traceback__)[-1].line or "an assertion"
            problems.append(f"PySlowFast refuses it: {line.removeprefix('assert ')} does not hold.")
    return problems


def _cured(name: str, key: str) -> Finding:
    """A key that PySlowFast alone would die of, and whether it does here."""
    from distinit_plugin.hosts.slowfast import boot
    from distinit_plugin.hosts.slowfast.patches import WITHOUT_VARIABLE, switched_off

    patch = next(patch for patch in boot.PATCHES if patch.name == name)
    short, _, value = key.partition(" ")
    if name in switched_off(boot.PATCHES):
        if "slowfast.models" in sys.modules and not patch.present():
            return Finding(short, "works", f"{value}: nothing to cure")
        advice = f"Take {name} out of {WITHOUT_VARIABLE}."
        return Finding(short, "broken", f"{value}: not cured, {name} is switched off ({patch.symptom})", advice)
    if "slowfast.models" in sys.modules and patch not in boot.boot():
        return Finding(short, "works", f"{value}: nothing to cure")
    return Finding(short, "works", f"{value}: cured by distinit slowfast; PySlowFast alone stops ({patch.symptom})")


def _own_data(cfg: Any) -> list[Finding]:
    """Videos, teachers and weights of this package's nodes, as ``distinit run`` looks at them."""
    from distinit_plugin.hosts.slowfast.networks import is_own
    from distinit_plugin.hosts.slowfast.schema import own_cfg
    from distinit_plugin.jobs.corpora import Corpora
    from distinit_plugin.jobs.preflight import job_problems

    own = own_cfg(cfg)
    known = {"NUM_GPUS", *(() if is_own(cfg.MODEL.MODEL_NAME) else ("MODEL.MODEL_NAME",))}
    problems = job_problems(own, Corpora(own), known)
    return [_of_sentence(problem, "broken", COMMAND["slowfast"]) for problem in problems]


def _their_data(cfg: Any) -> list[Finding]:
    """PySlowFast's datasets, as it builds them: their lists are read; of those of others a sample is looked at."""
    if "slowfast.models" not in sys.modules:
        return []
    from slowfast.datasets.build import DATASET_REGISTRY

    findings = []
    for use, split in (("TRAIN", "train"), ("TRAIN", "val"), ("TEST", "test")):
        key, name = f"{use}.DATASET", str(cfg[use].DATASET).capitalize()
        if not cfg[use].ENABLE or (name.startswith("Ptv") and cfg.NUM_GPUS > 1):  # those need other processes
            continue
        try:
            kind = DATASET_REGISTRY.get(name)
            dataset = kind(cfg, split)
            if split == "train" and cfg.NUM_GPUS > 0 and kind.__module__.partition(".")[0] != "slowfast":
                findings += _meta_problems(name, dataset[0][4])
        except Exception as error:
            advice = "Say where the lists and videos are: DATA.PATH_TO_DATA_DIR, DATA.PATH_PREFIX, the node AVA."
            findings.append(Finding(key, "broken", f"{name}, {split}: {first_line(error)}", advice))
    return findings


def _meta_problems(name: str, meta: Mapping[str, Any]) -> list[Finding]:
    """The last field of a sample of a dataset ``name``: what goes to the GPU has to be tensors."""
    wrong = [key for key, value in meta.items() if not _is_tensors(value)]
    if not wrong:
        return []
    advice = "Let the dataset give tensors there, or nothing."
    text = f"{name}: its meta has {', '.join(wrong)}, which cannot go to a GPU: training stops for lack of 'cuda'"
    return [Finding("TRAIN.DATASET", "broken", text, advice)]


def _is_tensors(value: Any) -> bool:
    """Whether collating gives something that has ``cuda()``, or a list of that."""
    import numpy as np
    import torch

    values = value if isinstance(value, list | tuple) else [value]
    return all(isinstance(item, torch.Tensor | np.ndarray | int | float | list) for item in values)
