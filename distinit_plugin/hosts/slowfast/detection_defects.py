"""What PySlowFast's detection of actions fails in: its test, the place of its files, keyframes that count twice."""

from __future__ import annotations

import ast
import os
from collections.abc import Callable
from functools import wraps
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distinit_plugin.hosts.slowfast.checkout import find_checkout
from distinit_plugin.hosts.slowfast.missing import ALIAS, importable
from distinit_plugin.hosts.slowfast.patches import Patch, replaced

_cures_of_tools: list[Callable[[], None]] = []

# --------------------------------------------------------------------------------------------------------- the test


def falls_through(source: str) -> bool:
    """Whether ``perform_test`` goes on behind its branch for boxes with what is for classes.

    Args:
        source: The text of ``tools/test_net.py``.
    """
    functions = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)]
    loops = [
        node
        for function in functions
        if function.name == "perform_test"
        for node in ast.walk(function)
        if isinstance(node, ast.For)
    ]
    for loop in loops:
        for place, node in enumerate(loop.body):
            if isinstance(node, ast.If) and "DETECTION" in ast.unparse(node.test):
                leaves = any(
                    isinstance(inner, ast.Continue) for statement in node.body for inner in ast.walk(statement)
                )
                behind = "".join(ast.unparse(statement) for statement in loop.body[place + 1 :])
                return not leaves and "iter_toc" in ast.unparse(node) and "iter_toc" in behind
    return False


def _test_falls_through() -> bool:
    return falls_through((find_checkout() / "tools" / "test_net.py").read_text(encoding="utf-8"))


def _replace_test() -> None:
    """``tools/test_net.py`` binds what it imports, so it is imported as late as possible: see ``cure_tools``."""
    _cures_of_tools.append(_replace_perform_test)


def cure_tools() -> None:
    """Cure what is in PySlowFast's tools; before they run, and after everything that they import is in place."""
    while _cures_of_tools:
        _cures_of_tools.pop()()


def _replace_perform_test() -> None:
    from vision.fair.slowfast.tools import test_net

    theirs = test_net.perform_test

    @wraps(theirs)
    def perform_test(test_loader: Any, model: Any, test_meter: Any, cfg: Any, writer: Any = None) -> Any:
        if not cfg.DETECTION.ENABLE:
            return theirs(test_loader, model, test_meter, cfg, writer)
        return score_boxes(test_loader, model, test_meter, cfg.NUM_GPUS)

    test_net.perform_test = perform_test


@torch.no_grad()
def score_boxes(loader: Any, model: Any, meter: Any, num_gpus: int) -> Any:
    """Score all boxes of a loader and let the meter conclude.

    Args:
        loader: Batches (inputs, labels, index, time, meta) of PySlowFast's ``detection_collate``.
        model: In evaluation afterwards.
        meter: Its ``AVAMeter``.
        num_gpus: Processes of this machine; boxes of several need not be equally many.

    Returns:
        The meter.
    """

    def move(value: Tensor) -> Tensor:
        return value.cuda(non_blocking=True) if num_gpus else value

    model.eval()
    meter.iter_tic()
    for number, (inputs, _, _, _, meta) in enumerate(loader):
        pathways, boxes = [move(pathway) for pathway in inputs], move(meta["boxes"])
        meter.data_toc()
        scores = model(pathways, boxes).float().cpu()
        rows = [scores, meta["ori_boxes"].cpu(), meta["metadata"].cpu()]
        if num_gpus > 1:
            rows = _of_all_processes(rows)
        meter.iter_toc()
        meter.update_stats(*rows)
        meter.log_iter_stats(None, number)
        meter.iter_tic()
    meter.finalize_metrics()
    return meter


def _of_all_processes(rows: list[Tensor]) -> list[Tensor]:
    """Tensors on the CPU, joined along their rows; gathered without a GPU, whatever the back end."""
    from slowfast.utils import distributed

    return [torch.cat(parts) for parts in zip(*distributed.all_gather_unaligned(rows), strict=True)]


# -------------------------------------------------------------------------------------------------------- the meter


class _CallError(Exception):
    """What a function was called with, in a test for a defect."""


def _raise_call(*arguments: Any, **_: Any) -> None:
    raise _CallError(*arguments)


def has_meter() -> bool:
    """Whether its meter can be imported: it asks for PySlowFast by the name of ``missing.ALIAS``."""
    return importable(ALIAS)


def _writes_where_it_stands() -> bool:
    """Whether ``evaluate_ava`` names its files without a folder."""
    if not has_meter():
        return False
    from slowfast.utils import ava_eval_helper

    nothing: tuple[dict[str, Any], ...] = ({}, {}, {})
    try:
        with replaced(ava_eval_helper, write_results=_raise_call):
            ava_eval_helper.evaluate_ava(
                torch.zeros(0, 1), torch.zeros(0, 5), [], set(), {1}, [], groundtruth=nothing, video_idx_to_name=[]
            )
    except _CallError as call:
        return os.path.dirname(str(call.args[1])) == ""
    return False


def _write_below_output_dir() -> None:
    from slowfast.utils import ava_eval_helper, distributed, meters

    theirs, finalize = ava_eval_helper.write_results, meters.AVAMeter.finalize_metrics
    folders: list[str] = []

    def write_results(detections: Any, filename: str) -> None:
        if distributed.is_root_proc():  # all processes hold the same
            theirs(detections, os.path.join(folders[-1] if folders else "", filename))

    @wraps(finalize)
    def finalize_metrics(self: Any, *arguments: Any, **options: Any) -> Any:
        folders.append(self.output_dir)
        try:
            return finalize(self, *arguments, **options)
        finally:
            folders.pop()

    ava_eval_helper.write_results = write_results
    meters.AVAMeter.finalize_metrics = finalize_metrics


def _counts_all_rows() -> bool:
    """Whether a meter counts a box that it was given twice."""
    if not has_meter():
        return False
    from slowfast.utils import meters

    meter: Any = object.__new__(meters.AVAMeter)
    names = ("excluded_keys", "class_whitelist", "categories", "full_groundtruth", "video_idx_to_name", "output_dir")
    vars(meter).update(dict.fromkeys(names), mode="test", full_ava_test=False)
    meter.all_preds, meter.all_ori_boxes = [torch.zeros(1, 1)] * 2, [torch.zeros(1, 5)] * 2
    meter.all_metadata = [torch.zeros(1, 2)] * 2
    try:
        with replaced(meters, evaluate_ava=_raise_call):
            meter.finalize_metrics()
    except _CallError as call:
        return len(call.args[0]) == 2
    return False


def _count_boxes_once() -> None:
    from slowfast.utils import distributed, meters

    finalize = meters.AVAMeter.finalize_metrics

    @wraps(finalize)
    def finalize_metrics(self: Any, *arguments: Any, **options: Any) -> Any:
        if distributed.get_world_size() > 1 and self.all_metadata:
            scores, boxes, metadata = map(torch.cat, (self.all_preds, self.all_ori_boxes, self.all_metadata))
            rows = first_rows(boxes, metadata)
            self.all_preds, self.all_ori_boxes, self.all_metadata = [scores[rows]], [boxes[rows]], [metadata[rows]]
        return finalize(self, *arguments, **options)

    meters.AVAMeter.finalize_metrics = finalize_metrics


def first_rows(boxes: Tensor, metadata: Tensor) -> Tensor:
    """Rows of distinct boxes, the first of each, by keyframe as one process would meet them.

    Args:
        boxes: (n,5) number of the clip in its batch, x1, y1, x2, y2.
        metadata: (n,2) number of the video, second.

    Returns:
        int64, at most n.
    """
    keys = torch.cat([metadata.double(), boxes[:, 1:].double()], dim=1).numpy()
    _, first = np.unique(keys, axis=0, return_index=True)
    first = np.sort(first)
    return torch.from_numpy(first[np.lexsort((keys[first, 1], keys[first, 0]))])


DETECTION_DEFECTS = (
    Patch(
        "detection_test",
        "DETECTION.ENABLE, in the test: Trying to pause a Timer that is already paused! (GPUs: Tensors must be CUDA)",
        _test_falls_through,
        _replace_test,
    ),
    Patch(
        "padded_keyframes",
        "DETECTION.ENABLE on several GPUs: keyframes that fill up the last batches count twice, and as wrong",
        _counts_all_rows,
        _count_boxes_once,
    ),
    Patch(
        "detection_files",
        "detections_latest.csv and groundtruth_latest.csv are written to the current folder, not below OUTPUT_DIR",
        _writes_where_it_stands,
        _write_below_output_dir,
    ),
)
"""Cured after PySlowFast is imported, in this order."""
