"""Videos whose motion is known, and a back end that finds it by search, for tests of decoded flow."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from small_jobs import merged, small_cfg
from videos import write_video

from distinit_plugin.config.node import CfgNode
from distinit_plugin.flow.backends import FlowBackend
from distinit_plugin.registry import FLOW_BACKENDS

SIDE = 40  # pixels of the videos
CELL, PERIOD = 6, 20  # pixels of a cell of the texture, cells before it repeats
REACH = 4  # pixels that the back end searches
DIRECTIONS = ((3, 0), (-3, 0))


class Search(FlowBackend):
    """One whole (u,v) for the picture: the shift after which the second frame fits the first one best."""

    name = "test_search"
    min_side = 4 * REACH
    identity = "test_search 1"

    def _compute(self, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        one, two = first[:, 0].float(), second[:, 0].float()
        inner = slice(REACH, -REACH)
        steps = range(-REACH, REACH + 1)
        shifts = torch.tensor([(u, v) for v in steps for u in steps], dtype=torch.float32)
        # Still frames first: of equal fits the smaller motion.
        shifts = shifts[shifts.square().sum(1).argsort(stable=True)]
        errors = [
            (two.roll((-int(v), -int(u)), (1, 2)) - one)[:, inner, inner].square().mean((1, 2)) for u, v in shifts
        ]
        found = shifts[torch.stack(errors, dim=1).argmin(1)]
        return found[:, :, None, None].expand(-1, -1, *first.shape[-2:]).contiguous()


@FLOW_BACKENDS.register()
def test_search() -> Search:
    return Search()


test_search.__test__ = False  # a back end, not a test


def moving(u: int, v: int, seed: int) -> Callable[[int, int, int], np.ndarray]:
    """A smooth grey texture that moves by (u,v) pixels a frame."""
    texture = np.random.default_rng(seed).integers(0, 255, (PERIOD, PERIOD)).astype(float)

    def frame(number: int, height: int, width: int) -> np.ndarray:
        y, x = np.meshgrid(np.arange(height) - number * v, np.arange(width) - number * u, indexing="ij")
        x, y = x / CELL % PERIOD, y / CELL % PERIOD
        left, upper = x.astype(int), y.astype(int)
        right, lower, dx, dy = (left + 1) % PERIOD, (upper + 1) % PERIOD, x - left, y - upper
        top = texture[upper, left] * (1 - dx) + texture[upper, right] * dx
        bottom = texture[lower, left] * (1 - dx) + texture[lower, right] * dx
        grey = (top * (1 - dy) + bottom * dy).astype(np.uint8)
        return np.repeat(grey[:, :, None], 3, axis=2)

    return frame


def write_motions(folder: Path) -> Path:
    """``folder/train`` (four textures for each direction) and ``folder/test`` (two others)."""
    for use, seeds in (("train", range(4)), ("test", range(10, 12))):
        (folder / use).mkdir(parents=True)
        for seed in seeds:
            for number, (u, v) in enumerate(DIRECTIONS):
                pattern = moving(u, v, 10 * seed + number)
                write_video(folder / use / f"{seed}_{number}.mp4", 6, SIDE, SIDE, pattern=pattern)
    return folder


FLOW_TEACHER = {"ARCH": "flow", "LAYER": "flow", "HEAD": "spatial", "LOSS": "flow_decoding", "STUDENT_LAYER": "stem"}


def motion_job(videos: Path, output: Path, **sections: Any) -> CfgNode:
    """A narrow Res3D on 4 frames of 32², whose flow the search finds; AdamW for 1 step. The teacher is the flow."""
    base: dict[str, Any] = {
        "DATA": {"SAMPLING_RATE": 1, "TRAIN_JITTER_SCALES": [SIDE, SIDE], "RANDOM_FLIP": False},
        "MODEL": {"MODEL_NAME": "Res3D"},
        "CORPUS": {"TEST": {"VIDEOS": {"PATH": str(videos / "test")}}, "TEST_SCALE": SIDE},
        "FLOW": {"BACKEND": "test_search"},
        "SOLVER": {"OPTIMIZING_METHOD": "adamw", "BASE_LR": 0.003, "WEIGHT_DECAY": 0.0, "LR_POLICY": "cosine"},
        "TRAIN": {"BATCH_SIZE": 8, "CHECKPOINT_PERIOD": 100},
        "TEST": {"NUM_ENSEMBLE_VIEWS": 1},
        "RUNNER": {"CLIPS_PER_EPOCH": 8, "PROGRESS": False, "RESUME_MINUTES": 0.0},
        "LOG_PERIOD": 100,
    }
    if not sections.keys() & {"ACTION", "DISTILL"}:
        base["DISTILL"] = {"TEACHERS": {"FLOW": FLOW_TEACHER}}
    return small_cfg(videos, output, **merged(base, sections))
