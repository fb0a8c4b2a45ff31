"""The test loop of networks that classify boxes: keyframes → detections, in fractions of the picture."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from distinit_plugin.detection.files import write_rows
from distinit_plugin.detection.frame_map import FrameMap
from distinit_plugin.detection.geometry import Boxes, clip_boxes, to_fractions
from distinit_plugin.detection.matching import decode
from distinit_plugin.detection.results import Detections, Selection, select
from distinit_plugin.detection.tables import BoxTable
from distinit_plugin.engine import distributed
from distinit_plugin.engine.evaluate import Finish, evaluation_mode
from distinit_plugin.engine.refinement import Corrected, Refinement
from distinit_plugin.errors import UserError
from distinit_plugin.files import write_text
from distinit_plugin.types import BOXES, BadVideo, Batch, ModelOutput

DETECTIONS_FILE = "detections.csv"
"""Below the folder of a test's results; in the official form, which evaluators of others read, too."""


@dataclass(frozen=True)
class KeyframeScores:
    """What was found in a list of keyframes.

    Attributes:
        detections: Of all keyframes of all ranks.
        seen: (k,) whether the keyframe could be read.
        bad: Files that could not be, with the reason.
    """

    detections: Detections
    seen: npt.NDArray[np.bool_]
    bad: list[BadVideo]


@dataclass(frozen=True)
class BoxEvaluation:
    """Detections of a list of keyframes, and how good they are.

    Attributes:
        result: Frame-mAP.
        evaluator: The rules that it follows.
        table: The detections.
        num_keyframes: Keyframes of the list.
        num_seen: Of them, those that could be read.
        num_videos: Videos that they are of.
        bad: Files that could not be, with the reason.
        corrected: What corrections of proposals are worth, where they are learned.
    """

    result: FrameMap
    evaluator: str
    table: BoxTable
    num_keyframes: int
    num_seen: int
    num_videos: int
    bad: list[BadVideo]
    corrected: Corrected | None = None

    def metrics(self) -> dict[str, Any]:
        """Everything in numbers, ready for JSON: APs are fractions, ``None`` where there is no ground truth."""
        result = self.result
        return {
            "map": _number(result.map),
            "evaluator": self.evaluator,
            "num_keyframes": self.num_seen,
            "num_unread": self.num_keyframes - self.num_seen,
            "num_detections": len(self.table),
            "per_class": {name: _number(value) for name, value in result.ap.items()},
            "num_truth": result.num_truth,
            "counts": result.counts.to_dict(),
            "corrections": None if self.corrected is None else self.corrected.metrics(),
            "bad": [{"path": path, "reason": reason} for path, reason in self.bad],
        }

    def write(self, folder: str | Path) -> None:
        """Write ``metrics.json`` and ``detections.csv`` to ``folder``."""
        folder = Path(folder)
        write_text(folder / "metrics.json", json.dumps(self.metrics(), indent=2, ensure_ascii=False) + "\n")
        write_rows(folder / DETECTIONS_FILE, self.table)


def _number(value: float) -> float | None:
    return None if math.isnan(value) else float(value)


def detect(
    network: nn.Module,
    batches: Iterable[Batch],
    *,
    finish: Finish,
    num_keyframes: int,
    given: Callable[[int], Boxes] | None,
    selection: Selection,
    device: torch.device,
    refinement: Refinement | None = None,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    gather_objects: Callable[[Any], list[Any]] = distributed.gather_objects,
) -> KeyframeScores:
    """Score every keyframe that ``batches`` gives.

    Args:
        network: One that classifies boxes (``ModelOutput.boxes``).
        batches: The keyframes of this rank; a sample's ``key.index`` is its number. One that comes twice counts once.
        finish: Makes the network's views of a batch.
        num_keyframes: k.
        given: Number of a keyframe → its boxes (n,4), in fractions, as rows of the sample's ``boxes``; ``None``: the
            network proposes boxes itself.
        selection: Which detections are kept.
        device: Where the network is.
        refinement: Gets the boxes that the network proposes, and corrects.
        autocast: Context of the forward pass.
        gather_objects: The objects of all ranks.

    Raises:
        UserError: No keyframe could be read, or the network's scores are not finite.
    """
    parts: dict[int, Detections] = {}
    bad: dict[str, str] = {}
    with evaluation_mode(network):
        for batch in batches:
            bad.update(batch["bad"])
            if batch["keys"]:
                parts |= dict(_of_batch(network, batch, finish(batch), given, selection, device, refinement, autocast))
    seen = np.zeros(num_keyframes, dtype=bool)
    rows: list[Detections] = []
    for numbers, joined, others in gather_objects((list(parts), Detections.joined(parts.values()), bad)):
        bad.update(others)
        fresh = [number for number in numbers if not seen[number]]
        seen[fresh] = True
        own = np.isin(joined.keyframe, fresh)
        rows.append(Detections(*(column[own] for column in joined)))
    if not seen.any():
        reasons = "; ".join(f"{path}: {reason}" for path, reason in list(bad.items())[:3])
        raise UserError(
            f"none of the {num_keyframes} keyframes could be read{': ' + reasons if reasons else ''}. See where "
            "AVA.FRAME_DIR or KEYFRAMES.VIDEO_DIR lead."
        )
    named = [BadVideo(path, reason) for path, reason in sorted(bad.items())]
    return KeyframeScores(Detections.joined(rows), seen, named)


def _of_batch(
    network: nn.Module,
    batch: Batch,
    views: Any,
    given: Callable[[int], Boxes] | None,
    selection: Selection,
    device: torch.device,
    refinement: Refinement | None,
    autocast: Callable[[], AbstractContextManager[Any]],
) -> Iterator[tuple[int, Detections]]:
    """Number of each keyframe of a batch → its detections."""
    boxes = batch["targets"][BOXES].to(device) if given is not None else None
    with autocast():
        output: ModelOutput = network(views, boxes=boxes)
    assert output.logits is not None
    assert output.boxes is not None
    scores = output.logits.float().sigmoid().cpu()
    if not torch.isfinite(scores).all():
        raise UserError(
            "the network's scores of boxes are not finite: its weights are broken or RUNNER.PRECISION is too coarse "
            "for it; try another checkpoint or RUNNER.PRECISION fp32."
        )
    found = output.boxes[:, 1:] if output.offsets is None else decode(output.boxes[:, 1:], output.offsets.float())
    found, clips = found.double().cpu(), output.boxes[:, 0].long().cpu()
    proposed = output.boxes[:, 1:].double().cpu()
    for number, (key, region) in enumerate(zip(batch["keys"], batch["regions"], strict=True)):
        own = (clips == number).nonzero().flatten()
        fractions = (
            clip_boxes(to_fractions(found[own].numpy(), region), 1.0, 1.0) if given is None else given(key.index)
        )
        assert len(fractions) == len(own), (len(fractions), len(own), key)
        if refinement is not None:
            refinement.add(key.index, to_fractions(proposed[own].numpy(), region), fractions)
        yield key.index, select(key.index, fractions, scores[own], selection)
