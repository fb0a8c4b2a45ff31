"""What TensorBoard shows of a run beside its curves: the first filters, and the confusion matrix."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

from torch import nn

from distinit_plugin.analysis.confusion import draw_confusion
from distinit_plugin.analysis.filters import draw_filters, first_filters
from distinit_plugin.engine import distributed
from distinit_plugin.engine.evaluate import Evaluation
from distinit_plugin.errors import UserError
from distinit_plugin.jobs.session import Session
from distinit_plugin.types import Network


class Board:
    """A training's writer: takes scalars as TensorBoard's own does, and draws where the training stands."""

    def __init__(self, writer: Any, name: str, network: Network, step: Callable[[], int]) -> None:
        """Take the parts.

        Args:
            writer: TensorBoard's.
            name: Of the run, in pictures.
            network: The student.
            step: Optimizer steps done.
        """
        self._writer, self._name, self._network, self._step = writer, name, network, step
        self._drawn = -1

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> None:
        """Note a value."""
        self._writer.add_scalar(tag, scalar_value, global_step)

    def draw(self, evaluation: Evaluation | None = None) -> None:
        """Note the first filters, and of a validation with labels the confusion matrix."""
        step = self._step()
        if step != self._drawn:
            self._drawn = step
            self._draw_filters(step)
        if evaluation is not None:
            _add_confusion(self._writer, "val", self._name, evaluation, step)

    def _draw_filters(self, step: int) -> None:
        assert isinstance(self._network, nn.Module)
        with contextlib.suppress(UserError):  # of another library's networks not all see pixels by a convolution
            filters = first_filters(self._name, self._network, self._network.view_specs("train"))
            self._writer.add_figure("filters", draw_filters(filters), step)

    def close(self) -> None:
        """Write everything out."""
        self._writer.close()


def open_writer(session: Session, purge_step: int | None = None) -> Any:
    """TensorBoard's writer, ``None`` where it is not asked for or another rank has it.

    Args:
        session: Of the job.
        purge_step: What earlier processes wrote from this step on is hidden.
    """
    cfg = session.cfg
    if not (cfg.TENSORBOARD.ENABLE and distributed.is_main()):
        return None
    return import_tensorboard()(
        str(session.output_dir / (cfg.TENSORBOARD.LOG_DIR or "tensorboard")), purge_step=purge_step
    )


def note_test(session: Session, evaluation: Evaluation, step: int) -> None:
    """Note the accuracies and the confusion matrix of a test, where TensorBoard is asked for."""
    writer = open_writer(session)
    if writer is not None:
        metrics = evaluation.metrics()
        for name in ("top1", "top5", "clip_top1", "mean_class_accuracy"):
            writer.add_scalar(f"test/{name}", metrics[name], step)
        _add_confusion(writer, "test", session.output_dir.name, evaluation, step)
        writer.close()


def _add_confusion(writer: Any, group: str, name: str, evaluation: Evaluation, step: int) -> None:
    figure = draw_confusion(name, evaluation.confusion, evaluation.class_names)
    writer.add_figure(f"{group}/confusion", figure, step)


def import_tensorboard() -> Any:
    """``SummaryWriter``.

    Raises:
        UserError: The package is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter  # only with the extra
    except ImportError as error:
        raise UserError(
            "TENSORBOARD.ENABLE: True, but tensorboard is not installed: pip install 'distinit-plugin[tensorboard]', "
            "or set it False."
        ) from error
    return SummaryWriter
