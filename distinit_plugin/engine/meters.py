"""Running means that stay on the device, and the ``json_stats:`` lines that PySlowFast writes.

Format of a line: ``json_stats: {…}`` with sorted keys and floats as ``%.5f`` (PySlowFast's
``slowfast/utils/logging.py``). Iteration lines go to ``stdout.log`` alone, epoch lines to ``stdout.log`` and
``json_stats.log``, as there.
"""

from __future__ import annotations

import json
import logging
import math
import os
import resource
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

JSON_PREFIX = "json_stats: "
JSON_FILE = "json_stats.log"

logger = logging.getLogger(__name__)

_GIB = 1024**3


@dataclass
class Clock:
    """Time and clips of some steps.

    Attributes:
        seconds: Wall time.
        waited: Of it, waiting for data.
        steps: Optimizer steps.
        clips: Clips of this rank.
    """

    seconds: float = 0.0
    waited: float = 0.0
    steps: int = 0
    clips: int = 0

    def add(self, other: Clock) -> None:
        """Add another window of time."""
        self.seconds += other.seconds
        self.waited += other.waited
        self.steps += other.steps
        self.clips += other.clips

    def state_dict(self) -> dict[str, Any]:
        """Primitives only."""
        return asdict(self)

    @property
    def per_step(self) -> tuple[float, float]:
        """Seconds per step, and of these waiting for data."""
        return self.seconds / max(1, self.steps), self.waited / max(1, self.steps)

    @property
    def wait_share(self) -> float:
        """Fraction of the time spent waiting for data."""
        return self.waited / self.seconds if self.seconds > 0 else 0.0


class MeanMeter:
    """Weighted means of named scalars, summed where the tensors are: nothing waits for the device until ``read``."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._weights: dict[str, Tensor] = {}

    @property
    def names(self) -> list[str]:
        """Of all scalars met so far, sorted."""
        return sorted(self._sums)

    def update(self, values: Mapping[str, Tensor], weight: Tensor | float | Mapping[str, Tensor] = 1.0) -> None:
        """Add scalars (0-d tensors on one device) that are means over ``weight`` examples (a mapping: each its own)."""
        for name, value in values.items():
            value = value.detach().to(torch.float64)
            own = weight[name] if isinstance(weight, Mapping) else weight
            amount = torch.as_tensor(own, dtype=torch.float64, device=value.device)
            # A mean over nothing is undefined (0/0) and must not spoil the others.
            part = torch.where(amount > 0, value * amount, torch.zeros_like(value))
            self._sums[name] = self._sums[name] + part if name in self._sums else part
            self._weights[name] = self._weights[name] + amount if name in self._weights else amount

    def read(self, all_reduce_sum: Callable[[Tensor], Tensor] | None = None) -> dict[str, float]:
        """The means so far, over all ranks with ``all_reduce_sum``; a mean over nothing is NaN. Waits for the device.

        Every rank must have met the same names.
        """
        if not self._sums:
            return {}
        names = sorted(self._sums)
        table = torch.stack([torch.stack([self._sums[name], self._weights[name]]) for name in names])
        if all_reduce_sum is not None:
            table = all_reduce_sum(table)
        return {
            name: total / weight if weight > 0 else math.nan
            for name, (total, weight) in zip(names, table.tolist(), strict=True)
        }

    def read_all(
        self,
        device: torch.device,
        all_reduce_sum: Callable[[Tensor], Tensor],
        gather_objects: Callable[[Any], list[Any]],
    ) -> dict[str, float]:
        """The means over all ranks, of which some may have met nothing, or other names; empty: no rank met any.

        Args:
            device: Where the scalars are.
            all_reduce_sum: Sum of a tensor over ranks.
            gather_objects: The objects of all ranks.
        """
        for names in gather_objects(self.names):  # who has met nothing takes part in the sums with nothing
            self.update({name: torch.zeros((), device=device) for name in names}, 0.0)
        return self.read(all_reduce_sum)

    def reset(self) -> None:
        """Forget everything."""
        self._sums.clear()
        self._weights.clear()

    def state_dict(self) -> dict[str, Any]:
        """This rank's sums and weights as numbers, for a checkpoint. Waits for the device."""
        return {
            "sums": {name: float(value) for name, value in self._sums.items()},
            "weights": {name: float(value) for name, value in self._weights.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device | str = "cpu") -> None:
        """Continue from ``state_dict``'s sums, on ``device``."""
        self._sums, self._weights = (
            {name: torch.tensor(value, dtype=torch.float64, device=device) for name, value in state[kind].items()}
            for kind in ("sums", "weights")
        )


def json_line(stats: Mapping[str, Any]) -> str:
    """``json_stats: {…}``: valid JSON in PySlowFast's form.

    Floats have five decimals. Values that JSON does not know (NaN, infinity) become ``null``. A learning rate gets as
    many more decimals as its first three digits need, so that small ones do not read as zero.
    """
    parts = []
    for key in sorted(stats):
        value = stats[key]
        if isinstance(value, float):
            text = _decimal(value, digits=3 if key == "lr" else 0)
        else:
            text = json.dumps(value, allow_nan=False)
        parts.append(f"{json.dumps(key)}: {text}")
    return f"{JSON_PREFIX}{{{', '.join(parts)}}}"


def _decimal(value: float, digits: int) -> str:
    if not math.isfinite(value):
        return "null"
    places = 5
    if digits and 0 < abs(value) < 1:
        places = max(places, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:.{places}f}"


class JsonLogger:
    """Writes ``json_stats:`` lines: all to the run's log, epoch lines to ``OUTPUT_DIR/json_stats.log`` as well."""

    def __init__(self, output_dir: str | Path | None, *, enabled: bool = True) -> None:
        """``enabled`` is false on every rank but the main one; without a folder lines go to the log alone."""
        self._path = Path(output_dir) / JSON_FILE if output_dir is not None else None
        self._enabled = enabled

    def iteration(self, stats: Mapping[str, Any]) -> None:
        """One line in the log (``train_iter_``, ``test_final``, …)."""
        if self._enabled:
            logger.info(json_line(stats))

    def epoch(self, stats: Mapping[str, Any]) -> None:
        """One line in the log and in ``json_stats.log`` (``train_epoch``, ``val_epoch``)."""
        if not self._enabled:
            return
        line = json_line(stats)
        logger.info(line)
        if self._path is None:
            return
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with open(self._path, "a", encoding="utf-8") as file:
                file.write(line + "\n")
        except OSError as error:  # a full disk; the run's log has the lines, too
            reason = (error.strerror or str(error)).lower()
            logger.warning("%s cannot be written: %s. The run goes on without this line.", self._path, reason)


def train_stats(
    epoch: int,
    num_epochs: int,
    *,
    per_step: tuple[float, float],
    eta: float,
    lr: float,
    values: Mapping[str, float],
    step: tuple[int, int] | None = None,
) -> dict[str, Any]:
    """One ``train_iter_`` line (with ``step``) or ``train_epoch`` line.

    Args:
        epoch: 0-based.
        num_epochs: Epochs of the run.
        per_step: Seconds per step, and of these waiting for data.
        eta: Seconds to the end of the run.
        lr: Learning rate.
        values: Means: ``loss``, the terms, the report.
        step: Steps done of the epoch, and steps of the epoch.
    """
    return {
        "_type": "train_iter_" if step else "train_epoch",
        "epoch": f"{epoch + 1}/{num_epochs}",
        **({"iter": f"{step[0]}/{step[1]}"} if step else {}),
        "dt": per_step[0],
        "dt_data": per_step[1],
        "dt_net": per_step[0] - per_step[1],
        "eta": duration_text(eta),
        "lr": lr,
        **memory_stats(),
        **pyslowfast_values(values),
    }


def val_epoch_stats(
    epoch: int, num_epochs: int, *, seconds: float, values: Mapping[str, float], best: Mapping[str, Any]
) -> dict[str, Any]:
    """One ``val_epoch`` line: ``top1_err`` and ``top5_err`` (percent) with their minima, or the mean terms.

    Args:
        epoch: 0-based.
        num_epochs: Epochs of the run.
        seconds: That the validation took.
        values: Means of this validation.
        best: ``name`` and ``value`` of the best one, and the best ``top5``.
    """
    minima = {"min_top1_err": 100 * (1 - best["value"])} if best.get("name") == "top1" else {}
    if "top5" in best:
        minima["min_top5_err"] = 100 * (1 - best["top5"])
    return {
        "_type": "val_epoch",
        "epoch": f"{epoch + 1}/{num_epochs}",
        "time_diff": seconds,
        **memory_stats(),
        **pyslowfast_values(values),
        **minima,
    }


def final_test_stats(values: Mapping[str, float]) -> dict[str, Any]:
    """The ``test_final`` line: accuracies in percent as text with two decimals, as PySlowFast writes them.

    Args:
        values: Fractions by name; ``top1_acc`` and ``top5_acc`` are PySlowFast's, others are added beside them.
    """
    return {"split": "test_final", **{name: f"{100 * value:.2f}" for name, value in values.items()}}


def pyslowfast_values(values: Mapping[str, float]) -> dict[str, float]:
    """Our values under PySlowFast's names: ``top1`` (fraction) → ``top1_err`` (percent); the rest is kept.

    With several terms, each comes twice: as ``loss/NAME`` and as PySlowFast's ``loss_0``, ``loss_1``, … in that order.
    """
    renamed: dict[str, float] = {}
    for name, value in values.items():
        if name in ("top1", "top5"):
            renamed[f"{name}_err"] = 100 * (1 - value)
        else:
            renamed[name] = value
    terms = sorted(name for name in values if name.startswith(term_key("")))
    if len(terms) > 1:
        renamed.update({f"loss_{index}": values[name] for index, name in enumerate(terms)})
    return renamed


def better(best: Mapping[str, Any], values: Mapping[str, float], epoch: int) -> tuple[dict[str, Any], bool]:
    """The best validation so far and whether it is this one: highest ``top1`` or ``map``, without them lowest ``loss``.

    ``top5`` is kept at its own maximum, for PySlowFast's ``min_top5_err``.
    """
    name = next((name for name in ("top1", "map") if name in values), "loss")
    value = values.get(name, math.nan)
    known = best.get("value") if best.get("name") == name else None
    improved = math.isfinite(value) and (known is None or (value < known if name == "loss" else value > known))
    kept = {"name": name, "value": value, "epoch": epoch} if improved else dict(best)
    if "top5" in values:
        kept["top5"] = max(values["top5"], best.get("top5", 0.0))
    return kept, improved


def term_key(name: str) -> str:
    """Name of a term's value in ``StepOutput.terms`` and in logs: ``loss/IMAGENET``."""
    return f"loss/{name}"


def duration_text(seconds: float) -> str:
    """``1 day, 2:03:04``, without fractions of a second; ``?`` when unknown."""
    return str(timedelta(seconds=int(seconds))) if math.isfinite(seconds) else "?"


def memory_stats() -> dict[str, str]:
    """``gpu_mem`` (peak of this process) and ``RAM`` (used/total of the machine), as PySlowFast writes them."""
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    used, total = machine_memory()
    return {"gpu_mem": f"{peak / _GIB:.2f}G", "RAM": f"{used / _GIB:.2f}/{total / _GIB:.2f}G"}


def machine_memory() -> tuple[int, int]:
    """Used and total main memory of the machine, bytes; zeros where the system does not say."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            fields = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in file if len(line.split()) > 1}
        return fields["MemTotal"] - fields["MemAvailable"], fields["MemTotal"]
    except (OSError, KeyError, ValueError):
        return 0, 0


def process_peak_memory() -> int:
    """Largest main memory that this process has held, bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if os.uname().sysname == "Darwin" else peak * 1024
