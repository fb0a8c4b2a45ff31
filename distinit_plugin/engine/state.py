"""Everything that a run needs to continue, as one object with a state dictionary, and where it is saved."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from distinit_plugin.data.bad import BadVideoLog
from distinit_plugin.engine import checkpoint, distributed
from distinit_plugin.engine.meters import Clock, MeanMeter
from distinit_plugin.engine.optimizer_layouts import apart, in_order, renumbered
from distinit_plugin.engine.precision import Precision
from distinit_plugin.engine.schedule import Schedule
from distinit_plugin.errors import UserError, WeightsError
from distinit_plugin.files import write_text
from distinit_plugin.objectives import Objective
from distinit_plugin.types import Network


def copy_into_network(network: Network, weights: Mapping[str, Tensor]) -> None:
    """Copy a checkpoint's ``model_state`` into the network that it was saved from; every key must fit.

    Raises:
        WeightsError: Keys or shapes differ.
    """
    own = network.bare_state_dict()
    missing, unexpected = sorted(own.keys() - weights.keys()), sorted(weights.keys() - own.keys())
    different = [name for name in sorted(own.keys() & weights.keys()) if own[name].shape != weights[name].shape]
    if missing or unexpected or different:
        parts = (("missing", missing), ("unexpected", unexpected), ("of another shape", different))
        found = "; ".join(f"{title}: {', '.join(names[:5])}" for title, names in parts if names)
        raise WeightsError(
            f"the checkpoint is of another network ({found}): name another OUTPUT_DIR, or set MODEL, RESNET and "
            "NETWORK as they were."
        )
    with torch.no_grad():
        for name, tensor in own.items():  # state dictionaries share memory with the network
            tensor.copy_(weights[name])


@dataclass
class RunState:
    """The parts of a run that a checkpoint holds.

    Attributes:
        objective: Its student goes to ``model_state``, its adapters to the ``distinit`` entry; teachers are not saved.
        optimizer: Saved as it is.
        schedule: Saved as it is.
        precision: Its scaler's state with fp16.
        bad_log: Bad videos so far, of all uses and ranks.
        config_text: The configuration as YAML.
        class_names: Names of the classes, for whoever reads the student's predictions; empty without labels.
        epoch: Epochs done.
        step_in_epoch: Optimizer steps done of the current epoch.
        epoch_told: The line of the current epoch is in the logs.
        best: ``{"name", "value", "epoch"}`` of the best validation so far.
        epoch_meter: Means over the current epoch.
        window_meter: Means since the last log line.
        epoch_clock: Time and clips of the current epoch, up to the last log line.
        corpus_sizes: Videos of each training corpus, which with the step decide what comes next.
        corpus_digests: ``TRAIN`` and ``VAL`` → the digest of each corpus's names, order and labels.
    """

    objective: Objective
    optimizer: torch.optim.Optimizer
    schedule: Schedule
    precision: Precision
    bad_log: BadVideoLog
    config_text: str = ""
    class_names: list[str] = field(default_factory=list)
    epoch: int = 0
    step_in_epoch: int = 0
    epoch_told: bool = False
    best: dict[str, Any] = field(default_factory=dict)
    epoch_meter: MeanMeter = field(default_factory=MeanMeter)
    window_meter: MeanMeter = field(default_factory=MeanMeter)
    epoch_clock: Clock = field(default_factory=Clock)
    corpus_sizes: list[int] = field(default_factory=list)
    corpus_digests: dict[str, list[str]] = field(default_factory=dict)

    def state_dict(self, step: int) -> dict[str, Any]:
        """PySlowFast's layout plus the ``distinit`` entry. Called on every rank: states of all ranks are gathered.

        Args:
            step: Optimizer steps done in the whole run, by which states are compared.
        """
        trainable = self.objective.trainable
        self.bad_log.share(distributed.gather_objects)
        scaler = self.precision.state_dict()
        return {
            "epoch": self.epoch - 1,  # PySlowFast: the 0-based number of the last epoch done
            "model_state": cast(Network, trainable.student).bare_state_dict(),
            "optimizer_state": self.optimizer.state_dict(),
            "cfg": self.config_text,
            **({"scaler_state": scaler} if scaler else {}),
            "distinit": {
                "format": checkpoint.FORMAT_VERSION,
                "class_names": self.class_names,
                "adapters": trainable.adapters.state_dict(),
                "schedule": self.schedule.state_dict(),
                "progress": {
                    "epoch": self.epoch,
                    "step_in_epoch": self.step_in_epoch,
                    "step": step,
                    "told": self.epoch_told,
                },
                "rng": distributed.gather_objects(checkpoint.rng_state()),
                "bad": self.bad_log.state_dict(),
                "meters": distributed.gather_objects(
                    {"epoch": self.epoch_meter.state_dict(), "window": self.window_meter.state_dict()}
                ),
                "epoch_clock": self.epoch_clock.state_dict(),
                "corpus_sizes": self.corpus_sizes,
                "corpus_digests": self.corpus_digests,
                "best": self.best,
            },
        }

    def start_epoch_anew(self) -> None:
        """Forget how far the current epoch is; weights and optimizer stay."""
        self.step_in_epoch, self.epoch_told = 0, False
        self.epoch_meter.reset()
        self.window_meter.reset()
        self.epoch_clock = Clock()

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Continue from ``state_dict``.

        Raises:
            WeightsError: The state is of another network, of another version of this program, or not what this program
                or PySlowFast writes.
        """
        try:
            self._load(state, device)
        except (LookupError, TypeError, AttributeError, ValueError, RuntimeError) as error:
            raise WeightsError(
                f"the checkpoint is not complete ({type(error).__name__}: {error}): remove it to continue from the one "
                "before."
            ) from error

    def _load_hosted(self, state: Mapping[str, Any], own: Mapping[str, Any]) -> None:
        """Continue where PySlowFast has ended an epoch: weights, heads, optimizer; nothing else is in its files."""
        if "optimizer_state" not in state or "epoch" not in state:
            raise WeightsError(
                "the checkpoint has weights alone, so training cannot continue from it: give it as "
                "TRAIN.CHECKPOINT_FILE_PATH with TRAIN.CHECKPOINT_EPOCH_RESET True to start from them."
            )
        trainable = self.objective.trainable
        if len(trainable.adapters) and "adapters" not in own:
            raise WeightsError(
                f"the checkpoint has no heads for the terms {', '.join(trainable.adapters)}: set "
                "TRAIN.CHECKPOINT_EPOCH_RESET True to start from its weights."
            )
        groups = [*state["optimizer_state"]["param_groups"], *own.get("optimizer", {}).get("param_groups", [])]
        slots = {**state["optimizer_state"]["state"], **own.get("optimizer", {}).get("state", {})}
        students = {id(parameter) for parameter in trainable.student.parameters()}
        optimizer = renumbered(
            {"state": slots, "param_groups": groups},
            apart(self.optimizer.param_groups, students),
            in_order(self.optimizer.param_groups),
            self.optimizer.state_dict()["param_groups"],
        )
        copy_into_network(cast(Network, trainable.student), state["model_state"])
        try:
            trainable.adapters.load_state_dict(own.get("adapters", {}))
            self.optimizer.load_state_dict(optimizer)
        except (RuntimeError, ValueError) as error:
            raise WeightsError(
                f"the checkpoint is of another job ({str(error).splitlines()[0]}): set DISTILL, ACTION and SOLVER as "
                "they were."
            ) from error
        if "scaler_state" in state:
            self.precision.load_state_dict(state["scaler_state"])
        self.epoch = int(state["epoch"]) + 1
        self.start_epoch_anew()

    def _load(self, state: Mapping[str, Any], device: torch.device) -> None:
        own = state.get("distinit")
        if own is None or not checkpoint.is_of_runner(state):
            self._load_hosted(state, {} if own is None else own)
            return
        if own["format"] > checkpoint.FORMAT_VERSION:
            raise WeightsError(f"the checkpoint has format {own['format']}: it is of a newer version of this program.")
        if own["format"] < checkpoint.FORMAT_VERSION:
            raise WeightsError(
                f"the checkpoint has format {own['format']}, of an earlier version of this program, from which "
                "training cannot continue: name another OUTPUT_DIR and give it as TRAIN.CHECKPOINT_FILE_PATH for its "
                "weights."
            )
        trainable = self.objective.trainable
        copy_into_network(cast(Network, trainable.student), state["model_state"])
        try:
            trainable.adapters.load_state_dict(own["adapters"])
            _check_slots(state["optimizer_state"])
            self.optimizer.load_state_dict(state["optimizer_state"])
        except (RuntimeError, ValueError) as error:
            raise WeightsError(
                f"the checkpoint is of another job ({str(error).splitlines()[0]}): name another OUTPUT_DIR, or set "
                "DISTILL, ACTION and SOLVER as they were."
            ) from error
        self.schedule.load_state_dict(own["schedule"])
        if "scaler_state" in state:
            self.precision.load_state_dict(state["scaler_state"])
        self.bad_log.load_state_dict(own["bad"])
        for name, meter in (("epoch", self.epoch_meter), ("window", self.window_meter)):
            meter.load_state_dict(_own_share([part[name] for part in own["meters"]]), device)
        clock = own["epoch_clock"]
        self.epoch_clock = Clock(
            float(clock["seconds"]), float(clock["waited"]), int(clock["steps"]), int(clock["clips"])
        )
        self.best = dict(own["best"])
        self.epoch = int(own["progress"]["epoch"])
        self.step_in_epoch = int(own["progress"]["step_in_epoch"])
        self.epoch_told = bool(own["progress"].get("told", False))
        if distributed.rank() < len(own["rng"]):
            checkpoint.set_rng_state(own["rng"][distributed.rank()])


def _check_slots(state: Mapping[str, Any]) -> None:
    """PyTorch takes anything, and fails at the first step."""
    for number, slots in state["state"].items():
        if not isinstance(slots, Mapping):
            raise TypeError(f"the optimizer's state of parameter {number} is no mapping")


def _own_share(parts: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """What this rank takes of all ranks' meters: its own, or an equal share where the number of ranks has changed."""
    world_size = distributed.world_size()
    if len(parts) == world_size:
        return parts[distributed.rank()]
    return {
        kind: {name: sum(part[kind].get(name, 0.0) for part in parts) / world_size for name in parts[0][kind]}
        for kind in ("sums", "weights")
    }


class Checkpointer:
    """Writes a run's states below ``OUTPUT_DIR/checkpoints``, from the main rank."""

    def __init__(self, output_dir: str | Path, *, keep: int = 0, resume_minutes: float = 0.0) -> None:
        """Set where and how often.

        Args:
            output_dir: Folder of the run.
            keep: Newest epoch checkpoints to keep; 0: all.
            resume_minutes: Minutes between mid-epoch states; 0: only where the training loop asks for one.
        """
        self.folder = Path(output_dir) / checkpoint.FOLDER
        self.resume_path = self.folder / checkpoint.RESUME_NAME
        self._keep = keep
        self._resume_seconds = 60 * resume_minutes
        self._last = time.monotonic()

    def save_epoch(self, state: Mapping[str, Any], *, best: bool, numbered: bool) -> None:
        """Save after an epoch.

        Args:
            state: ``RunState.state_dict()``.
            best: Also as ``best.pyth``.
            numbered: As ``checkpoint_epoch_00010.pyth``, pruning old ones.
        """
        if not distributed.is_main():
            return
        if best:
            checkpoint.save_checkpoint(self.folder / checkpoint.BEST_NAME, state)
        if numbered:
            saved = self.folder / checkpoint.epoch_file_name(state["epoch"])
            checkpoint.save_checkpoint(saved, state)
            checkpoint.prune(saved, self._keep)
            self._last = time.monotonic()

    def resume_state_is_due(self) -> bool:
        """Whether enough time has passed for a mid-epoch state, by this rank's clock."""
        return 0 < self._resume_seconds <= time.monotonic() - self._last

    def save_resume(self, state: Mapping[str, Any]) -> None:
        """Save a mid-epoch state as ``resume.pyth``."""
        if distributed.is_main():
            checkpoint.save_checkpoint(self.resume_path, state)
        self._last = time.monotonic()

    def finish(self) -> None:
        """Remove the mid-epoch state of a run that is complete."""
        if distributed.is_main():
            self.resume_path.unlink(missing_ok=True)


def check_writable(output_dir: str | Path) -> None:
    """Find out before the first step, not at the first checkpoint.

    Raises:
        UserError: Nothing can be written there.
    """
    probe = Path(output_dir) / checkpoint.FOLDER / ".write_test"
    try:
        write_text(probe, "")
        probe.unlink()
    except (OSError, UserError) as error:
        raise UserError(f"OUTPUT_DIR: {output_dir} cannot be written ({error}).") from error
