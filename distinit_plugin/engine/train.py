"""The one training loop. It knows no method: an objective gives losses, everything else is a plain collaborator."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from distinit_plugin.engine import checkpoint, distributed, meters
from distinit_plugin.engine.evaluate import Finish
from distinit_plugin.engine.gradients import StepGradients
from distinit_plugin.engine.guard import FiniteGuard, TrainingError, check_weights
from distinit_plugin.engine.modes import set_train_mode
from distinit_plugin.engine.optim import set_lr
from distinit_plugin.engine.progress import NoProgress, ProgressView, Status
from distinit_plugin.engine.run_ahead import RunAhead
from distinit_plugin.engine.signals import Agreement, Stopped, StopSignals
from distinit_plugin.engine.state import Checkpointer, RunState
from distinit_plugin.engine.train_options import ScalarWriter, TrainOptions, TrainResult
from distinit_plugin.types import Batch

logger = logging.getLogger(__name__)


class Trainer:
    """Trains an objective from its current state to the end of the schedule."""

    def __init__(
        self,
        state: RunState,
        *,
        train_batches: Callable[[int, int], Iterable[Batch]],
        steps_per_epoch: int,
        finish: Finish,
        device: torch.device,
        options: TrainOptions,
        checkpointer: Checkpointer | None = None,
        json_logger: meters.JsonLogger | None = None,
        progress: ProgressView | None = None,
        validate: Callable[[], Mapping[str, float]] | None = None,
        precise_bn: Callable[[], None] | None = None,
        scalars: ScalarWriter | None = None,
        no_sync: Callable[[], AbstractContextManager[Any]] = nullcontext,
        timers: Mapping[str, Callable[[], float]] | None = None,
        stop: StopSignals | None = None,
    ) -> None:
        """Put the parts together.

        Args:
            state: Objective, optimizer, schedule, precision, log of bad videos; where the training stands.
            train_batches: (epoch, first optimizer step) → this rank's micro-batches, ``accumulate`` per step.
            steps_per_epoch: Optimizer steps per epoch.
            finish: Makes the objective's views of a batch.
            device: Where the objective is.
            options: See ``TrainOptions``.
            checkpointer: Where states go; ``None``: nothing is saved.
            json_logger: Writer of ``json_stats:`` lines; ``None``: lines go to the log alone.
            progress: What a person sees.
            validate: Returns means, the same on all ranks: ``loss`` and, with labels, ``top1``, ``top5`` (fractions).
            precise_bn: Recomputes BN statistics; called before validations and checkpoints.
            scalars: TensorBoard writer.
            no_sync: Context for all micro-batches of a step but the last (DDP's ``no_sync``).
            timers: Part of the work → seconds spent on it since the last call, of which log lines show the share.
            stop: Tells when a scheduler asks the run to end; whoever gives it enters it.
        """
        self.state = state
        self.options = options
        self.steps_per_epoch = steps_per_epoch
        self.total_steps = state.schedule.total_steps(steps_per_epoch)
        self.num_epochs = -(-self.total_steps // steps_per_epoch)
        self._train_batches = train_batches
        self.finish = finish
        self.device = device
        self._checkpointer = checkpointer
        self._timers = timers or {}
        self._json = json_logger or meters.JsonLogger(None, enabled=distributed.is_main())
        self._progress = progress or NoProgress()
        self._validate = validate
        self._precise_bn = precise_bn
        self.scalars = scalars
        self._guard = FiniteGuard(every_step=device.type == "cpu")
        self._gradients = StepGradients(
            state.objective,
            state.precision,
            finish=finish,
            device=device,
            guard=self._guard,
            accumulate=options.accumulate,
            no_sync=no_sync,
        )
        self._stop, self._agreement = stop or StopSignals(), Agreement()
        self._run_ahead, self._window_meter = RunAhead(device), state.window_meter
        self._window, self._run_clock = meters.Clock(), meters.Clock()
        self._window_begin = 0.0
        self._lr = 0.0

    def close(self) -> None:
        """Let go of what outlives the training; TensorBoard would lose its last values."""
        if self.scalars is not None:
            self.scalars.close()

    @property
    def step(self) -> int:
        """Optimizer steps done in the whole run."""
        return min(self.state.epoch * self.steps_per_epoch + self.state.step_in_epoch, self.total_steps)

    # ------------------------------------------------------------------------------------------------ the loop
    def train(self) -> TrainResult:
        """Run to the end of the schedule.

        Raises:
            TrainingError: The loss is not finite or the data ended early.
            UserError: Too many bad videos, or a checkpoint cannot be written.
            Stopped: A signal asked the run to end; its state is saved.
        """
        begin = time.perf_counter()
        train: dict[str, float] = {}
        validation: dict[str, float] = {}
        with self._progress, self._stop.held():
            while self.state.epoch < self.num_epochs:
                self._train_epoch()
                train, validation = self._end_epoch(validation)
        if self._checkpointer is not None:
            self._checkpointer.finish()
        self._stop.raise_if_received("the training is complete")
        return TrainResult(
            epochs=self.state.epoch,
            steps=self.step,
            train=train,
            validation=validation,
            best=dict(self.state.best),
            seconds=time.perf_counter() - begin,
            wait_share=self._run_clock.wait_share,
        )

    def _train_epoch(self) -> None:
        steps = self._steps_of_epoch()
        if self.state.step_in_epoch >= steps:  # resumed after the last step of an epoch
            return
        with self.open_epoch() as batches:
            while self.state.step_in_epoch < steps:
                self.run_step(batches)
                if self.state.step_in_epoch % self.options.log_period == 0 or self.state.step_in_epoch == steps:
                    self._log_steps()
                self._save_or_stop(last=self.state.step_in_epoch == steps)

    @contextmanager
    def open_epoch(self) -> Iterator[Iterator[Batch]]:
        """The micro-batches of the current epoch from the current step on, with the objective in training mode."""
        set_train_mode(self.state.objective.trainable, self.options.frozen_trunk, self.options.frozen_norm)
        self.restart_clock()
        batches = iter(self._train_batches(self.state.epoch, self.state.step_in_epoch))
        try:
            yield batches
        finally:
            # A loader's workers end with its iterator, not at some later collection.
            if isinstance(batches, Generator):
                batches.close()

    def restart_clock(self) -> meters.Clock:
        """Start a new window of time; the clock that comes back counts the steps from now on."""
        for spent in self._timers.values():
            spent()  # what validation took is not the training's
        self._window, self._window_begin = meters.Clock(), time.perf_counter()
        return self._window

    def _steps_of_epoch(self) -> int:
        return min(self.steps_per_epoch, self.total_steps - self.state.epoch * self.steps_per_epoch)

    def run_step(self, batches: Iterator[Batch]) -> None:
        """One optimizer step on the next ``accumulate`` micro-batches."""
        precision, optimizer = self.state.precision, self.state.optimizer
        self._lr = self.state.schedule.lr(self.step, self.steps_per_epoch)
        set_lr(optimizer, self._lr)
        optimizer.zero_grad(set_to_none=True)
        position = self.state.schedule.position(self.step, self.steps_per_epoch)
        self._gradients.add(lambda: self._take(batches), self._note, self.step, position)
        precision.step(optimizer, self.options.clip_value, self.options.clip_norm)
        self._run_ahead.step_given()
        self.state.step_in_epoch += 1
        self._window.steps += 1
        self._progress.advance(self.step, self.total_steps)

    def _take(self, batches: Iterator[Batch]) -> Batch:
        """The next micro-batch; notes the bad videos that were met."""
        begin = time.perf_counter()
        batch = next(batches, None)
        self._window.waited += time.perf_counter() - begin
        if batch is None:
            raise TrainingError(
                f"the training data of epoch {self.state.epoch + 1} ended at step {self.state.step_in_epoch + 1} "
                f"of {self._steps_of_epoch()}."
            )
        self._window.clips += len(batch["keys"])
        self.state.bad_log.add(batch["bad"])
        if distributed.world_size() == 1:
            self._settle_bad_videos()
        return batch

    def _settle_bad_videos(self) -> None:
        """Bring the ranks' accounts together and stop all of them when too much is bad: not at every step of many."""
        self.state.bad_log.share(distributed.gather_objects)
        self.state.bad_log.check(self.options.corpus_size, self.options.max_bad_fraction)

    def _note(self, values: Mapping[str, Tensor], weight: Tensor | Mapping[str, Tensor]) -> None:
        for meter in (self._window_meter, self.state.epoch_meter):
            meter.update(values, weight)

    # ------------------------------------------------------------------------------------------- what is shown
    def _log_steps(self) -> None:
        """Read the means since the last log line: the only place in an epoch that waits for all of a device's work."""
        self._guard.check()
        self._settle_bad_videos()
        values = self._window_meter.read(distributed.all_reduce_sum) | self._weights()
        self._window.seconds = time.perf_counter() - self._window_begin
        self.state.epoch_clock.add(self._window)
        self._run_clock.add(self._window)
        shares = {part: spent() / max(self._window.seconds, 1e-9) for part, spent in self._timers.items()}
        self._json.iteration(
            meters.train_stats(
                self.state.epoch,
                self.num_epochs,
                step=(self.state.step_in_epoch, self._steps_of_epoch()),
                per_step=self._window.per_step,
                eta=self._seconds_left(),
                lr=self._lr,
                values={**values, **{f"{part}_share": share for part, share in shares.items()}},
            )
        )
        status = Status(
            epoch=f"{self.state.epoch + 1}/{self.num_epochs}",
            loss=values.get("loss", math.nan),
            lr=self._lr,
            clips_per_second=self._window.clips * distributed.world_size() / max(self._window.seconds, 1e-9),
            wait_share=self._window.wait_share,
            seconds_left=self._seconds_left(),
            shares=shares,
        )
        self._progress.show(self.step, self.total_steps, status)
        self._write_scalars("train", {**values, "lr": self._lr, "clips_per_second": status.clips_per_second})
        self._window_meter.reset()
        self.restart_clock()

    def _weights(self) -> dict[str, float]:
        """Factors of terms that still rise, at the last step: like the learning rate, no means."""
        position = self.state.schedule.position(self.step - 1, self.steps_per_epoch)
        return self.state.objective.warming_weights(position)

    def _seconds_left(self) -> float:
        return self._run_clock.per_step[0] * (self.total_steps - self.step)

    def _write_scalars(self, group: str, values: Mapping[str, float]) -> None:
        if self.scalars is not None and distributed.is_main():
            for name, value in values.items():
                self.scalars.add_scalar(f"{group}/{name}", value, self.step)

    # -------------------------------------------------------------------------------------- the end of an epoch
    def _end_epoch(self, validation: dict[str, float]) -> tuple[dict[str, float], dict[str, float]]:
        """Validate and save when it is time; returns the epoch's means and the newest validation."""
        state = self.state
        self._lr = state.schedule.lr(self.step - 1, self.steps_per_epoch)  # a resumed run may have done no step yet
        train = state.epoch_meter.read(distributed.all_reduce_sum) | self._weights()
        if not state.epoch_told:
            self._json.epoch(
                meters.train_stats(
                    state.epoch,
                    self.num_epochs,
                    per_step=state.epoch_clock.per_step,
                    eta=self._seconds_left(),
                    lr=self._lr,
                    values=train,
                )
            )
        state.epoch_told = True
        number, last = state.epoch + 1, state.epoch + 1 == self.num_epochs
        validates = self._validate is not None and (last or number % self.options.eval_period == 0)
        saves = last or number % self.options.checkpoint_period == 0
        precise_bn = self._precise_bn if validates or saves else None
        improved = False
        if precise_bn is not None or validates:
            self._save_resume_state()  # a kill in what follows does not repeat the epoch
            with self._stop.let_through(f"the training of epoch {number} is saved"), checkpoint.rng_kept():
                if precise_bn is not None:
                    precise_bn()
                if validates:
                    validation, improved = self._run_validation()
        if validates or self._validate is None:
            state.schedule.end_of_epoch((validation or train).get("loss", math.nan))
        state.epoch, state.step_in_epoch, state.epoch_told = number, 0, False
        state.epoch_meter.reset()
        state.epoch_clock = meters.Clock()
        if self._checkpointer is not None and (saves or improved):
            self._check_state()
            self._checkpointer.save_epoch(state.state_dict(self.step), best=improved, numbered=saves)
        return train, validation

    def _run_validation(self) -> tuple[dict[str, float], bool]:
        """Validation values, and whether they are the best so far (top-1 with labels, else the loss)."""
        assert self._validate is not None
        begin = time.perf_counter()
        values = dict(self._validate())
        best, improved = meters.better(self.state.best, values, self.state.epoch)
        self.state.best = best
        stats = meters.val_epoch_stats(
            self.state.epoch, self.num_epochs, seconds=time.perf_counter() - begin, values=values, best=best
        )
        self._json.epoch(stats)
        shown = "  ".join(f"{name} {value:.4f}" for name, value in values.items())
        logger.info("validation after epoch %d: %s%s", self.state.epoch + 1, shown, "  (best)" if improved else "")
        self._write_scalars("val", values)
        return values, improved

    def _save_or_stop(self, *, last: bool) -> None:
        """After a step: save a mid-epoch state when it is time, and at once when a signal came; then end the run.

        All ranks do so after the same step, whichever of them got the signal.

        Raises:
            Stopped: A signal came.
            KeyboardInterrupt: Ctrl-C came.
        """
        self._stop.raise_if_interrupted()
        due = self._checkpointer is not None and self._checkpointer.resume_state_is_due()
        received, due = self._agreement.ask(self.step, signal_number=self._stop.received, save=due, at_once=last)
        if received or due:
            self._save_resume_state()
        if received:
            raise Stopped(received, f"the state after step {self.step} of {self.total_steps} is saved")

    def _save_resume_state(self) -> None:
        if self._checkpointer is not None:
            self._check_state()
            self._checkpointer.save_resume(self.state.state_dict(self.step))

    def _check_state(self) -> None:
        """What is saved must be good."""
        self._guard.check()
        check_weights(self.state.objective.trainable)
