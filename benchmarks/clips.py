"""Videos for benchmarks: a camera that moves over a textured picture, with a little noise."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
import torch
from torch.nn import functional as F

FPS = 30


def _scene(seed: int, height: int, width: int) -> np.ndarray:
    """A smooth random picture (H,W,3) uint8."""
    blocks = torch.from_numpy(np.random.default_rng(seed).uniform(0, 255, (1, 3, 40, 60))).float()
    picture = F.interpolate(blocks, size=(height, width), mode="bicubic").clamp(0, 255)
    return picture[0].permute(1, 2, 0).to(torch.uint8).numpy()


def write_clip(
    path: Path, *, num_frames: int = 300, height: int = 256, width: int = 340, gop: int = 250, seed: int = 0
) -> Path:
    """Encode a video as x264 does by default (medium, crf 23), 30 frames a second.

    Args:
        path: An .mp4 file.
        num_frames: Frames.
        height: Pixels, even.
        width: Pixels, even.
        gop: Largest distance between key frames.
        seed: Of the picture.
    """
    scene = _scene(seed, 2 * height, 2 * width)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=FPS)
        stream.height, stream.width, stream.pix_fmt, stream.gop_size = height, width, "yuv420p", gop
        stream.options = {"preset": "medium", "crf": "23"}
        for number in range(num_frames):
            top = int((height - 1) * (0.5 + 0.5 * np.sin(number / 40)))
            left = int((width - 1) * (0.5 + 0.5 * np.cos(number / 60)))
            noise = np.random.default_rng([seed, number]).integers(-6, 7, (height, width, 1))
            picture = scene[top : top + height, left : left + width] + noise
            frame = av.VideoFrame.from_ndarray(picture.clip(0, 255).astype(np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path
