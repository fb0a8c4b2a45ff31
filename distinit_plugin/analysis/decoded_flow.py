"""Flow that was decoded from networks' features, as pictures (D3D, arXiv 1812.08249, figures 5 and 6)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn import functional

from distinit_plugin.engine.motion import MotionSample
from distinit_plugin.errors import UserError
from distinit_plugin.files import UNREADABLE_ARCHIVE, write_file
from distinit_plugin.flow.motion import flow_errors
from distinit_plugin.flow.pictures import Picture, colour_flow, large_length, picture_rows

_SMALLEST = 112
"""Pixels of a picture's height that are aimed at."""


def write_samples(path: Path, samples: Sequence[MotionSample]) -> None:
    """Keep the samples of one network, so that they can be drawn beside those of others."""
    arrays: dict[str, Any] = {
        "frames": torch.stack([sample.frame for sample in samples]).numpy(),
        "flow": torch.stack([sample.flow.float() for sample in samples]).numpy(),
        "layers": np.array(list(samples[0].decoded), dtype=np.str_),
    }
    for number, layer in enumerate(samples[0].decoded):
        arrays[f"decoded_{number}"] = torch.stack([sample.decoded[layer].float() for sample in samples]).numpy()
    write_file(path, lambda file: np.savez_compressed(file, **arrays))


def read_samples(path: Path) -> list[MotionSample]:
    """The samples that ``write_samples`` kept.

    Raises:
        UserError: They cannot be read.
    """
    try:
        with np.load(path, allow_pickle=False) as archive:
            frames, flow = torch.from_numpy(archive["frames"]), torch.from_numpy(archive["flow"])
            layers = [str(name) for name in archive["layers"]]
            decoded = {
                layer: torch.from_numpy(archive[f"decoded_{number}"]).float() for number, layer in enumerate(layers)
            }
        count = len(frames)
        fits = frames.dtype == torch.uint8 and frames.shape[1:2] == (3,) and frames.ndim == 4 and count > 0
        fits &= flow.shape == (count, 2, *frames.shape[2:])
        fits &= bool(layers) and all(part.shape[:2] == (count, 2) and part.ndim == 4 for part in decoded.values())
        if not fits:
            raise ValueError("its arrays do not fit together")
    except UNREADABLE_ARCHIVE as error:
        reason = "there is no such file" if isinstance(error, FileNotFoundError) else str(error)
        raise UserError(
            f"{path} cannot be read as the pictures of a probe of motion ({reason}). Name its folder OUTPUT_DIR/motion."
        ) from error
    return [
        MotionSample(frames[row], flow[row].float(), {layer: part[row] for layer, part in decoded.items()})
        for row in range(count)
    ]


def check_same_clips(networks: Mapping[str, Sequence[MotionSample]]) -> None:
    """Refuse to show networks side by side that saw different clips.

    Raises:
        UserError: They did.
    """
    first_name, first = next(iter(networks.items()))
    for name, samples in networks.items():
        pairs = zip(first, samples, strict=False)
        if len(samples) != len(first) or not all(torch.equal(one.frame, other.frame) for one, other in pairs):
            raise UserError(
                f"{name} and {first_name} were probed on different clips, so their flow cannot stand side by side. "
                "Draw each alone, or repeat one probe with the corpus, crop and clips of the other."
            )


def sample_rows(networks: Mapping[str, Sequence[MotionSample]]) -> list[list[Any]]:
    """For CSV: the end-point error of each picture, pixels, on the grid of its layer; and that of no motion."""
    rows: list[list[Any]] = [["network", "layer", "clip", "epe", "zeros"]]
    for name, samples in networks.items():
        for number, sample in enumerate(samples):
            for layer, decoded in sample.decoded.items():
                grid = (decoded.shape[1], decoded.shape[2])
                target = functional.adaptive_avg_pool2d(sample.flow, grid)[None, :, None]
                errors = [float(flow_errors(flow, target).mean()) for flow in (decoded[None, :, None], 0 * target)]
                rows.append([name, layer, number, *errors])
    return rows


def _enlarged(picture: Picture) -> Picture:
    """Small pictures in whole multiples of their size."""
    factor = max(1, _SMALLEST // len(picture))
    return picture.repeat(factor, axis=0).repeat(factor, axis=1)


def draw_samples(networks: Mapping[str, Sequence[MotionSample]], title: str) -> Image.Image:
    """Each sample's frame, its flow, and what was decoded from each layer of each network.

    Args:
        networks: Name (empty: none is written) → samples of the same clips.
        title: Above all.
    """
    first = next(iter(networks.values()))
    flows = [np.ascontiguousarray(sample.flow.permute(1, 2, 0).numpy()) for sample in first]
    largest = large_length(flows)
    columns = ["frame", "flow"]
    columns += [f"{name} {layer}".strip() for name, samples in networks.items() for layer in samples[0].decoded]
    rows: list[list[Picture]] = []
    for number, (sample, flow) in enumerate(zip(first, flows, strict=True)):
        size = (flow.shape[0], flow.shape[1])
        shown: list[Picture] = [sample.frame.permute(1, 2, 0).contiguous().numpy(), colour_flow(flow, largest)]
        for samples in networks.values():
            for decoded in samples[number].decoded.values():
                cells = functional.interpolate(decoded[None].float(), size=size, mode="nearest")[0]
                shown.append(colour_flow(cells.permute(1, 2, 0).contiguous().numpy(), largest))
        rows.append([_enlarged(picture) for picture in shown])
    return picture_rows(rows, columns, title, largest)
