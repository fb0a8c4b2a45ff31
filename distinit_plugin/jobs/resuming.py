"""Continuing a run: which state, whether it is of this run, and what may change on the way."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distinit_plugin import build
from distinit_plugin.config.load import parse_cfg
from distinit_plugin.config.node import CfgNode, leaf_keys
from distinit_plugin.engine import checkpoint, distributed
from distinit_plugin.engine.state import RunState
from distinit_plugin.errors import UserError, WeightsError, shown
from distinit_plugin.jobs.repaired import readable_now
from distinit_plugin.jobs.session import Session
from distinit_plugin.weights import read_checkpoint

NEUTRAL = (
    "CORPUS.DECODE_TIMEOUT",
    "CORPUS.INDEX_CACHE",
    "DATA_LOADER.",
    "LOG_",
    "OUTPUT_DIR",
    "RUNNER.COLLECTIVE_TIMEOUT",
    "RUNNER.DRY_RUN",
    "RUNNER.INIT_METHOD",
    "RUNNER.JOIN_TIMEOUT",
    "RUNNER.KEEP_CHECKPOINTS",
    "RUNNER.KEEP_MEMORY",
    "RUNNER.NUM_THREADS",
    "RUNNER.PROGRESS",
    "RUNNER.RESUME_MINUTES",
    "TENSORBOARD.",
    "TRAIN.AUTO_RESUME",
    "TRAIN.CHECKPOINT_PERIOD",
)
"""Keys (or their beginnings) of which a run's result does not depend."""

HARMLESS = (
    *NEUTRAL,
    "CORPUS.MAX_BAD_FRACTION",
    "CORPUS.TEST.",
    "RUNNER.CHANNELS_LAST",
    "RUNNER.COMPILE",
    "TEST.",
    "TRAIN.EVAL_PERIOD",
)
"""Keys (or their beginnings) that a continued run may change: they decide nothing about what is learnt."""

STEP_KEYS = ("NUM_GPUS", "NUM_SHARDS", "RUNNER.ACCUMULATE", "RUNNER.CPU_RANKS", "SHARD_ID", "TRAIN.BATCH_SIZE")
"""Keys that may change as long as TRAIN.BATCH_SIZE × NUM_SHARDS, and so the clips of each step, stay the same."""

SCHEDULE_KEYS = ("SOLVER.LRS", "SOLVER.MAX_EPOCH", "SOLVER.STEPS")
"""Keys that may change as long as the learning rate of every step that is done stays what it was."""

SHOWN_KEYS = 20

_PLACES = re.compile(r"CORPUS\.(TRAIN|VAL)\.[^.]+\.(?:PATH|ROOT)")
"""Keys that may change as long as the videos' names, order and labels stay what they were."""

logger = logging.getLogger(__name__)


def refuse_other_run(session: Session) -> None:
    """A new run beside old states would be tested, pruned and continued as if it were the old one.

    Raises:
        UserError: OUTPUT_DIR holds states and TRAIN.AUTO_RESUME is off.
    """
    folder = session.output_dir / checkpoint.FOLDER
    if not session.cfg.TRAIN.AUTO_RESUME and checkpoint.state_files(folder):
        raise UserError(
            f"{folder} holds checkpoints of an earlier run and TRAIN.AUTO_RESUME is False: name another OUTPUT_DIR, "
            "remove them, or set TRAIN.AUTO_RESUME True to continue that run."
        )


def resume(session: Session, state: RunState, steps_per_epoch: int) -> bool:
    """Continue the run of this folder, or take epoch and optimizer of another one when asked to.

    Args:
        session: Of the job.
        state: Freshly built; holds the loaded state afterwards.
        steps_per_epoch: Optimizer steps of an epoch.

    Returns:
        Whether there was something to continue from.

    Raises:
        UserError: The state is of another run, or cannot be read.
    """
    cfg = session.cfg
    found = _newest_state(session) if cfg.TRAIN.AUTO_RESUME else None
    if found is not None:
        path, saved = found
        _refuse_changes(cfg, state, saved, path, steps_per_epoch)
        _load(session, state, saved, path)
        if checkpoint.is_of_runner(saved):
            _reopen_cut_epoch(state, saved, steps_per_epoch)
    elif cfg.TRAIN.CHECKPOINT_FILE_PATH and not cfg.TRAIN.CHECKPOINT_EPOCH_RESET:
        path = Path(cfg.TRAIN.CHECKPOINT_FILE_PATH)
        if "epoch" not in read_checkpoint(path).details:
            logger.info("%s has weights alone: the training starts from them", path)
            return False
        saved = checkpoint.load_checkpoint(path)
        _load(session, state, saved, path)
        if checkpoint.is_of_runner(saved):
            _start_epoch_anew(cfg, state, saved, path)
    else:
        return False
    logger.info("continuing from %s (%d epochs and %d steps are done)", path, state.epoch, state.step_in_epoch)
    return True


def _newest_state(session: Session) -> tuple[Path, dict[str, Any]] | None:
    """The state furthest in the training; the main rank chooses it for all.

    Raises:
        UserError: A rank cannot read what the main rank has found.
    """
    folder = session.output_dir / checkpoint.FOLDER
    found = None
    if distributed.is_main():
        checkpoint.remove_unfinished(folder)
        states = checkpoint.state_files(folder)
        found = checkpoint.newest_state(folder)
        if found is None and states:
            logger.warning("no state in %s can be read: the training starts from its beginning", folder)
    name = distributed.gather_objects(found[0].name if found else "")[0]
    if not name or found is not None:
        return found
    try:
        return folder / name, checkpoint.load_checkpoint(folder / name)
    except WeightsError as error:
        raise UserError(
            f"rank {distributed.rank()} cannot read the state that rank 0 continues from ({error}). OUTPUT_DIR must be "
            "on storage that all machines of the job share."
        ) from error


def _load(session: Session, state: RunState, saved: Mapping[str, Any], path: Path) -> None:
    try:
        state.load_state_dict(saved, session.device)
    except WeightsError as error:
        raise WeightsError(f"{path}: {error}") from error
    _forget_repaired(session)


def _forget_repaired(session: Session) -> None:
    """Videos that were bad in the earlier run are used again when they changed since, or now decode as a whole.

    A file that is still as it was is not opened in training, as it would not have been without the interruption.
    """
    account, cfg = session.bad_videos, session.cfg
    bad: list[str] = []
    if distributed.is_main():
        unchanged = account.unchanged()
        good = readable_now(unchanged, cfg.CORPUS.DECODE_TIMEOUT)
        bad = [path for path in unchanged if path not in good]
    account.keep_only(distributed.gather_objects(bad)[0])


def _reopen_cut_epoch(state: RunState, saved: Mapping[str, Any], steps_per_epoch: int) -> None:
    """A training that counts in steps may have ended within an epoch; made longer, it goes on within it."""
    done = int(saved["distinit"]["progress"]["step"])
    if done < min(state.epoch * steps_per_epoch, state.schedule.total_steps(steps_per_epoch)):
        state.epoch -= 1
        state.step_in_epoch = done - state.epoch * steps_per_epoch


def _start_epoch_anew(cfg: CfgNode, state: RunState, saved: Mapping[str, Any], path: Path) -> None:
    """The middle of an epoch has a meaning only for the run that was there: same videos, same configuration."""
    changed = [*changes(_saved_cfg(saved, path), cfg), *_corpus_change(state, saved)]
    if changed and state.step_in_epoch:
        logger.warning(
            "%s is in the middle of an epoch of another run (%s): epoch %d starts anew",
            path,
            "; ".join(changed[:SHOWN_KEYS]),
            state.epoch + 1,
        )
        state.start_epoch_anew()


# --------------------------------------------------------------------------------------------- is it the same run?
def _refuse_changes(cfg: CfgNode, state: RunState, saved: Mapping[str, Any], path: Path, steps_per_epoch: int) -> None:
    """Name the keys that decide the result and differ from those that the run started with.

    Raises:
        UserError: There are some, or the training videos are others.
    """
    if not checkpoint.is_of_runner(saved):
        return  # PySlowFast's configuration says the same in other words, and more
    before = _saved_cfg(saved, path)
    changed = changes(before, cfg)
    allowed = [key for key in changed if _is_moved(key, state, saved)]
    if before.TRAIN.BATCH_SIZE * before.NUM_SHARDS == cfg.TRAIN.BATCH_SIZE * cfg.NUM_SHARDS:
        allowed += [key for key in STEP_KEYS if key in changed]
    if _same_past(before, cfg, checkpoint.steps_done(saved), steps_per_epoch):
        allowed += [key for key in SCHEDULE_KEYS if key in changed]
    for key in allowed:
        logger.info("this run goes on with another %s: %s", key, changed.pop(key))
    problems = [f"{key}: {change}" for key, change in changed.items()] + _corpus_change(state, saved)
    if not problems:
        return
    more = f"; and {len(problems) - SHOWN_KEYS} more" if len(problems) > SHOWN_KEYS else ""
    notes = ""
    if any(key in changed for key in STEP_KEYS):
        notes += " TRAIN.BATCH_SIZE × NUM_SHARDS, the clips of a step, must stay the same."
    if any(key in changed for key in SCHEDULE_KEYS):
        notes += " MAX_EPOCH, STEPS and LRS may only change learning rates of steps to come."
    raise UserError(
        f"{path} is of another run (its value → the value now): {'; '.join(problems[:SHOWN_KEYS])}{more}.{notes} "
        "Name another OUTPUT_DIR for a new run, or set these keys as they were to continue that one. To go on from its "
        f"state with the new values, name another OUTPUT_DIR and give TRAIN.CHECKPOINT_FILE_PATH {path} with "
        "TRAIN.CHECKPOINT_EPOCH_RESET False."
    )


def changes(before: CfgNode, now: CfgNode) -> dict[str, str]:
    """Keys whose values differ, the harmless ones left out → ``old → new``; an added or removed entry counts as one."""
    old, new = ({key: _value(node, key) for key in leaf_keys(node)} for node in (before, now))
    changed = {}
    for key in sorted(old.keys() | new.keys()):
        if key.startswith(HARMLESS) or old.get(key) == new.get(key):
            continue
        if key in old and key in new:
            changed[key] = f"{shown(old[key])} → {shown(new[key])}"
        else:
            changed[key.rpartition(".")[0]] = "there → not there" if key in old else "not there → there"
    return changed


def _same_past(before: CfgNode, now: CfgNode, steps: int, steps_per_epoch: int) -> bool:
    """Whether each of the first ``steps`` steps would have had its learning rate with the SCHEDULE_KEYS of ``now``."""
    changed = before.clone()
    changed.defrost()
    for key in SCHEDULE_KEYS:
        changed.SOLVER[key.rpartition(".")[2]] = _value(now, key)
    old, new = build.build_schedule(before), build.build_schedule(changed)
    return steps <= new.total_steps(steps_per_epoch) and all(
        old.lr(step, steps_per_epoch) == new.lr(step, steps_per_epoch) for step in range(steps)
    )


def _corpus_change(state: RunState, saved: Mapping[str, Any]) -> list[str]:
    """The lists of videos may have changed under the same configuration."""
    before = saved["distinit"].get("corpus_sizes", state.corpus_sizes)
    if not (isinstance(before, list) and all(type(size) is int for size in before)):
        return ["videos below CORPUS.TRAIN: the state is damaged and does not say how many there were"]
    if before != state.corpus_sizes:
        return [f"videos below CORPUS.TRAIN: {before} → {state.corpus_sizes}"]
    return [
        f"videos below CORPUS.{use}: other names, another order or other labels"
        for use, digests in state.corpus_digests.items()
        if _digests(saved, use) not in (None, digests)
    ]


def _is_moved(key: str, state: RunState, saved: Mapping[str, Any]) -> bool:
    """Whether a key says where videos lie, which are the same ones."""
    found = _PLACES.fullmatch(key)
    return found is not None and _digests(saved, found[1]) == state.corpus_digests.get(found[1], [])


def _digests(saved: Mapping[str, Any], use: str) -> Any:
    """``None`` in states of earlier versions."""
    known = saved["distinit"].get("corpus_digests")
    found = known.get(use) if isinstance(known, Mapping) else None
    return found if isinstance(found, list) and all(isinstance(digest, str) for digest in found) else None


def _saved_cfg(saved: Mapping[str, Any], path: Path) -> CfgNode:
    return parse_cfg(str(saved.get("cfg", "")), f"the configuration in {path}", check=False)[0]


def _value(node: CfgNode, key: str) -> Any:
    value: Any = node
    for part in key.split("."):
        value = value[part]
    return list(value) if isinstance(value, tuple) else value
