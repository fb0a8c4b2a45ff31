"""Samples → batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.utils.data import default_collate

from distinit_plugin.types import BOXES, RAGGED, Batch, Sample


def collate(samples: Sequence[Sample]) -> Batch:
    """Join samples along a new first dimension.

    A sample without views (a bad video of a validation or test set) is left out; its file stands in ``bad``. When all
    are, the batch has no keys and no views, and whoever reads it must go on to the next one.

    Args:
        samples: Samples with the same views and the same targets.

    Returns:
        The batch; ``views`` are uint8 (B,C,T,H,W). Targets of which samples have different numbers of rows are joined
        along these: ``BOXES`` (R,5), with the number of the example before each box, and ``ACTIONS`` (R,K).
    """
    good = [sample for sample in samples if sample["views"]]
    batch: Batch = {
        "views": _join([sample["views"] for sample in good]),
        "keys": [sample["key"] for sample in good],
        "paths": [sample["path"] for sample in good],
        "targets": _join([sample["targets"] for sample in good]),
        "bad": [bad for sample in samples for bad in sample["bad"]],
    }
    regions = [sample["region"] for sample in good if "region" in sample]
    if regions:
        batch["regions"] = regions
    return batch


def _join(parts: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    if not parts:
        return {}
    names = parts[0].keys()
    if any(part.keys() != names for part in parts):
        raise ValueError(f"samples of one batch differ in what they hold: {[sorted(part) for part in parts]}")
    return {name: _join_one(name, [part[name] for part in parts]) for name in names}


def _join_one(name: str, values: list[torch.Tensor]) -> torch.Tensor:
    if name not in RAGGED:
        # default_collate stacks into shared memory inside a worker, which saves a copy of every batch.
        joined: torch.Tensor = default_collate(values)
        return joined
    rows = torch.cat(values)
    if name != BOXES:
        return rows
    counts = torch.tensor([len(value) for value in values])
    examples = torch.arange(len(values)).repeat_interleave(counts)
    return torch.cat([examples[:, None].to(rows.dtype), rows], dim=1)
