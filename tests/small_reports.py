"""Folders as runs leave them, written by hand: a report reads files alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from distinit_plugin.engine.meters import json_line, train_stats, val_epoch_stats
from distinit_plugin.engine.run_record import RunPart, RunRecord

ENVIRONMENT = {"distinit-plugin": "0.1.0", "commit": "0123456789ab", "torch": "2.9.0", "processor": "small, 2 cores"}


def settings(seed: int = 0, **nodes: Any) -> dict[str, Any]:
    """A configuration, as far as reports look at it."""
    base: dict[str, Any] = {
        "OUTPUT_DIR": "runs/small",
        "RNG_SEED": seed,
        "NUM_SHARDS": 1,
        "MODEL": {"MODEL_NAME": "Res3D", "NUM_CLASSES": 2},
        "TRAIN": {"BATCH_SIZE": 8, "CHECKPOINT_FILE_PATH": ""},
        "INIT": {"INFLATE_FROM": ""},
        "ACTION": {"LOSS_WEIGHT": 1.0},
        "DISTILL": {"TEACHERS": {}},
        "CORPUS": {"TRAIN": {"DIGITS": {"PATH": "data/train.csv"}}},
    }
    return base | nodes


def write_run(
    folder: Path,
    *,
    top1: float | None = 0.5,
    config: dict[str, Any] | None = None,
    files: tuple[str, ...] = ("configs/quickstart/finetune_res3d.yaml",),
    state: str = "done",
    error: str = "",
    classes: tuple[str, ...] = ("left", "right"),
    epochs: int = 0,
    bad: tuple[tuple[str, str], ...] = (),
) -> Path:
    """A run with logs of ``epochs`` epochs of two; ``top1`` ``None``: without a test."""
    folder.mkdir(parents=True)
    ended = "" if state == "running" else "2026-01-02T03:05:06+00:00"
    part = RunPart("2026-01-02T03:04:05+00:00", ended, state, error, ENVIRONMENT, 20, 60.0, 0.25)
    RunRecord(list(files), yaml.safe_dump(config or settings()), [part]).write(folder)
    lines = []
    for epoch in range(epochs):
        values = {"loss": 2.0 - epoch / 4, "top1": 0.25 + epoch / 8}
        lines.append(train_stats(epoch, 2, per_step=(0.5, 0.125), eta=0.0, lr=0.1, values=values))
        best = {"name": "top1", "value": 0.3, "epoch": 0}
        lines.append(val_epoch_stats(epoch, 2, seconds=3.0, values=values, best=best))
    (folder / "json_stats.log").write_text("".join(f"{json_line(line)}\n" for line in lines))
    if top1 is not None:
        write_metrics(
            folder,
            top1=top1,
            top5=1.0,
            clip_top1=top1,
            num_videos=40,
            per_class=dict.fromkeys(classes, top1),
            bad=[{"path": path, "reason": reason} for path, reason in bad],
        )
    return folder


def write_metrics(folder: Path, **values: Any) -> None:
    """The result of a test."""
    (folder / "test").mkdir(exist_ok=True)
    (folder / "test" / "metrics.json").write_text(json.dumps(values))
