"""Drawing of the demonstration: a handwritten digit that moves over a drifting, cluttered texture.

Every picture is a pure function of its arguments and of the state of the generator that it is given.
"""

from __future__ import annotations

import colorsys
import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

MOTIONS = ("left", "right", "up", "down", "clockwise", "counterclockwise", "zoom_in", "zoom_out")
"""All motions; the unlabeled videos show every one of them."""

NUM_MOMENTS = 9
"""Moments of a video from which a still's is drawn."""


class Course(NamedTuple):
    """Where a digit is in each frame, in units of half the frame's side; x to the right, y down."""

    x: torch.Tensor  # (T,) centre
    y: torch.Tensor  # (T,)
    angle: torch.Tensor  # (T,) radians, clockwise on the screen
    size: torch.Tensor  # (T,) half the digit's height


def draw_video(
    digit: NDArray[np.float32],
    motion: str,
    *,
    scraps: NDArray[np.float32],
    size: int,
    num_frames: int,
    rng: np.random.Generator,
) -> NDArray[np.uint8]:
    """Draw one video.

    Args:
        digit: (8,8) in [0, 1].
        motion: One of ``MOTIONS``.
        scraps: (N,8,8) in [0, 1], digits of which pieces lie about in the background.
        size: Height and width, pixels.
        num_frames: T.
        rng: Source of the background, the colours and the course.

    Returns:
        (T,H,W,3) RGB.
    """
    return _draw(digit, _course(motion, num_frames, rng), scraps, size, rng)


def draw_still(
    digit: NDArray[np.float32], *, scraps: NDArray[np.float32], size: int, rng: np.random.Generator
) -> NDArray[np.uint8]:
    """Draw one still image, (H,W,3) RGB: a moment of a video of a random motion, before compression."""
    course = _course(MOTIONS[int(rng.integers(len(MOTIONS)))], NUM_MOMENTS, rng)
    moment = int(rng.integers(NUM_MOMENTS))
    return _draw(digit, Course(*(values[moment : moment + 1] for values in course)), scraps, size, rng)[0]


def _draw(
    digit: NDArray[np.float32],
    course: Course,
    scraps: NDArray[np.float32],
    size: int,
    rng: np.random.Generator,
) -> NDArray[np.uint8]:
    """Background, digit and a grain that does not move, as (T,H,W,3)."""
    background = _drifting_background(scraps, size, len(course.x), rng)
    colour = _bright_colour(background, rng).view(1, 3, 1, 1)
    grain = torch.from_numpy(rng.normal(0.0, 0.02, (1, 3, size, size)).astype(np.float32))
    frames = torch.lerp(background, colour, _ink(torch.from_numpy(digit), course, size)) + grain
    pixels = frames.clamp_(0, 1).mul_(255).round_().to(torch.uint8)
    return pixels.permute(0, 2, 3, 1).contiguous().numpy()


def _course(motion: str, num_frames: int, rng: np.random.Generator) -> Course:
    """A course that is in its middle frame like that of any other motion: one frame does not tell the motion."""
    time = torch.linspace(-1.0, 1.0, num_frames)
    constant = torch.ones_like(time)
    x, y = rng.uniform(-0.2, 0.2, 2)
    middle = Course(x * constant, y * constant, rng.uniform(-0.3, 0.3) * constant, rng.uniform(0.5, 0.66) * constant)
    shift = rng.uniform(0.25, 0.45) * time
    turn = math.radians(rng.uniform(25, 45)) * time
    growth = torch.exp(rng.uniform(0.25, 0.4) * time)
    changes = {
        "left": {"x": middle.x - shift},
        "right": {"x": middle.x + shift},
        "up": {"y": middle.y - shift},
        "down": {"y": middle.y + shift},
        "clockwise": {"angle": middle.angle + turn},
        "counterclockwise": {"angle": middle.angle - turn},
        "zoom_in": {"size": middle.size * growth},
        "zoom_out": {"size": middle.size / growth},
    }
    return middle._replace(**changes[motion])


def _ink(images: torch.Tensor, course: Course, size: int) -> torch.Tensor:
    """Opacity (T,1,H,W) of one (8,8) image along a course, or of (T,8,8) images with one place each.

    Smooth up-scaling and the motion are one bicubic resampling.
    """
    cos, sin = course.angle.cos() / course.size, course.angle.sin() / course.size
    to_image = torch.stack(
        [
            torch.stack([cos, sin, -cos * course.x - sin * course.y], dim=1),
            torch.stack([-sin, cos, sin * course.x - cos * course.y], dim=1),
        ],
        dim=1,
    )
    count = len(course.x)
    grid = F.affine_grid(to_image.float(), [count, 1, size, size], align_corners=False)
    ink = F.grid_sample(
        images.expand(count, 8, 8).unsqueeze(1), grid, mode="bicubic", padding_mode="zeros", align_corners=False
    )
    return ((ink - 0.25) * 2.5).clamp(0, 1)  # a pen's edge rather than a blur


def _drifting_background(
    scraps: NDArray[np.float32], size: int, num_frames: int, rng: np.random.Generator
) -> torch.Tensor:
    """Background (T,3,H,W) that drifts slowly in a random direction, whatever the digit does."""
    margin = size // 4
    picture = _scatter(texture(size + 2 * margin, rng), scraps, rng)
    drift = rng.uniform(-0.4, 0.4, 2) * margin
    time = np.linspace(-1.0, 1.0, num_frames) if num_frames > 1 else np.zeros(1)
    lefts, tops = (margin + np.round(axis * time).astype(int) for axis in drift)
    return torch.stack(
        [picture[:, top : top + size, left : left + size] for top, left in zip(tops, lefts, strict=True)]
    )


def _scatter(picture: torch.Tensor, scraps: NDArray[np.float32], rng: np.random.Generator) -> torch.Tensor:
    """Lay small pieces of digits, in any colour, on a picture (3,H,W); as pens' strokes they distract."""
    count = len(scraps)
    pieces = np.zeros_like(scraps)
    for piece, scrap in zip(pieces, scraps, strict=True):
        extent = int(rng.integers(2, 5))
        top, left = rng.integers(0, 8 - extent, 2)
        piece[2 : 2 + extent, 2 : 2 + extent] = scrap[top : top + extent, left : left + extent]
    x, y, angle = (
        torch.from_numpy(rng.uniform(-bound, bound, count).astype(np.float32)) for bound in (0.9, 0.9, math.pi)
    )
    place = Course(x, y, angle, torch.full((count,), 0.45))
    opacity = _ink(torch.from_numpy(pieces), place, picture.shape[-1])
    colours = torch.from_numpy(rng.uniform(0.0, 1.0, (count, 3, 1, 1)).astype(np.float32))
    for cover, colour in zip(opacity, colours, strict=True):
        picture = torch.lerp(picture, colour.expand_as(picture), cover.expand_as(picture))
    return picture


def texture(size: int, rng: np.random.Generator) -> torch.Tensor:
    """A texture (3,H,W) in [0, 1]: noise of several grain sizes, and stripes, between two colours."""
    pattern = torch.zeros(size, size)
    for cells in (4, 10, 24):
        noise = torch.from_numpy(rng.normal(size=(1, 1, cells, cells)).astype(np.float32))
        grain = F.interpolate(noise, size=(size, size), mode="bicubic", align_corners=False)[0, 0]
        pattern += rng.uniform(0.2, 1.0) * grain
    position = torch.linspace(0.0, 1.0, size)
    direction = rng.uniform(0, math.pi)
    along = position[None, :] * math.cos(direction) + position[:, None] * math.sin(direction)
    stripes = torch.sin(2 * math.pi * rng.uniform(3, 14) * along + rng.uniform(0, 2 * math.pi))
    pattern += rng.choice([0.0, 1.5]) * stripes
    blend = torch.sigmoid(rng.uniform(0.8, 2.0) * pattern)
    hue, value = rng.uniform(), rng.uniform(0.25, 0.5)
    dark = colorsys.hsv_to_rgb(hue, rng.uniform(0.2, 0.9), value - 0.2)
    light = colorsys.hsv_to_rgb((hue + rng.uniform(0.0, 0.4)) % 1.0, rng.uniform(0.2, 0.9), value + 0.2)
    first, second = torch.tensor(dark).view(3, 1, 1), torch.tensor(light).view(3, 1, 1)
    return first + blend * (second - first)


def _bright_colour(background: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """A colour (3,) that is clearly brighter than the mean of the background (T,3,H,W)."""
    brightness = min(0.95, float(background.mean()) + rng.uniform(0.45, 0.6))
    tint = torch.from_numpy(rng.uniform(-0.15, 0.15, 3).astype(np.float32))
    return (brightness + tint - tint.mean()).clamp(0, 1)
