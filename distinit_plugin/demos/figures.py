"""Drawn persons over a moving texture: what they are, where they are at any time, and the pictures of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from distinit_plugin.demos.drawing import texture

POSES = ("stand", "sit", "raise arms")
MOVES = ("stay", "climb", "descend")

LANES = 3
"""Persons side by side, each in a lane of its own, so that none hides another."""

_SPEED = 0.2  # of the picture's height per second
_FLASHES = 3.0  # per second
_DIM = 0.5  # brightness between flashes, and the least of who does not flash
_STEPS = 4  # places in a pixel at which a person can be
_EMPTY = 0.12  # share of the seconds in which nobody is there
_VACANT = 0.3  # probability that a lane stays free when somebody has left


class _Part(NamedTuple):
    """A stroke with round ends from (x1, y1) to (x2, y2), in units of the figure's height, y down."""

    x1: float
    y1: float
    x2: float
    y2: float
    radius: float


_BODY = (_Part(0, 0.12, 0, 0.12, 0.11), _Part(0, 0.24, 0, 0.58, 0.07))
_LEGS = (_Part(0, 0.58, -0.1, 0.95, 0.05), _Part(0, 0.58, 0.1, 0.95, 0.05))
_PARTS: dict[str, tuple[_Part, ...]] = {
    "stand": (*_BODY, *_LEGS, _Part(0, 0.3, -0.17, 0.54, 0.045), _Part(0, 0.3, 0.17, 0.54, 0.045)),
    "raise arms": (*_BODY, *_LEGS, _Part(0, 0.3, -0.22, 0.05, 0.045), _Part(0, 0.3, 0.22, 0.05, 0.045)),
    "sit": (
        *(part._replace(y1=part.y1 + 0.25, y2=part.y2 + 0.22) for part in _BODY),
        _Part(0, 0.8, 0.24, 0.8, 0.055),
        _Part(0.24, 0.8, 0.24, 0.95, 0.05),
        _Part(0, 0.55, 0.2, 0.64, 0.045),
    ),
}
_BALL = _Part(-0.28, 0.6, -0.28, 0.6, 0.1)
"""What a person carries."""

_BALL_COLOUR = np.array([1.0, 0.6, 0.1], np.float32)


@dataclass(frozen=True)
class Figure:
    """One person.

    Attributes:
        number: Tells it from the others of its video.
        pose: Of ``POSES``.
        carries: With a ball.
        flashes: Its brightness goes up and down.
        phase: Of that, radians.
        facing: 1, or −1: mirrored.
        x: Of its axis, pixels.
        height: Pixels.
        colour: (3,) in [0, 1].
        first: The second in which it comes.
        tops: y of the upper end of its unit at the beginning of each of its seconds and at the end of the last.
        moves: What it does in each of its seconds, of ``MOVES``.
    """

    number: int
    pose: str
    carries: bool
    flashes: bool
    phase: float
    facing: int
    x: float
    height: float
    colour: NDArray[np.float32]
    first: int
    tops: tuple[float, ...]
    moves: tuple[str, ...]

    @property
    def last(self) -> int:
        """The second after which it is gone."""
        return self.first + len(self.moves) - 1

    @property
    def parts(self) -> tuple[_Part, ...]:
        """Its strokes, the ball last."""
        return _PARTS[self.pose] + ((_BALL,) if self.carries else ())

    def top(self, time: float) -> float:
        """Upper end of its unit, in quarters of a pixel; second s lasts from s − ½ to s + ½."""
        exact = float(np.interp(time, self.first - 0.5 + np.arange(len(self.tops)), self.tops))
        return round(exact * _STEPS) / _STEPS

    def extent(self) -> tuple[float, float, float, float]:
        """x1, y1, x2, y2 of what is drawn, in units of its height, from its axis and its upper end."""
        x1, y1, x2, y2, radius = np.array(self.parts).T
        xs = self.facing * np.concatenate([x1, x2])
        ys = np.concatenate([y1, y2])
        reach = np.concatenate([radius, radius])
        return (
            float((xs - reach).min()),
            float((ys - reach).min()),
            float((xs + reach).max()),
            float((ys + reach).max()),
        )

    def box(self, second: float) -> tuple[float, float, float, float]:
        """x1, y1, x2, y2 of what is drawn at a time, pixels."""
        left, upper, right, lower = (self.height * value for value in self.extent())
        top = self.top(second)
        return self.x + left, top + upper, self.x + right, top + lower

    def brightness(self, time: float) -> float:
        """Factor of its colour at a time."""
        if not self.flashes:
            return 1.0
        return _DIM + (1 - _DIM) * (0.5 + 0.5 * float(np.cos(2 * np.pi * _FLASHES * time + self.phase)))


def cast(seconds: range, height: int, width: int, rng: np.random.Generator) -> list[Figure]:
    """The persons of one video.

    Args:
        seconds: Those in which somebody may be there.
        height: Of the pictures, pixels.
        width: Of the pictures, pixels.
        rng: Source of everything.
    """
    empty = set(rng.choice(seconds, round(_EMPTY * len(seconds)), replace=False).tolist())
    figures: list[Figure] = []
    for lane in range(LANES):
        second = seconds[0]
        while second < seconds.stop:
            if second in empty or rng.random() < _VACANT:
                second += 1
                continue
            stay = int(rng.integers(2, 6))
            until = next((s for s in range(second, min(second + stay, seconds.stop)) if s in empty), None)
            last = min(second + stay, seconds.stop) if until is None else until
            figures.append(_figure(len(figures), lane, range(second, last), height, width, rng))
            second = last
    return figures


def _figure(number: int, lane: int, seconds: range, height: int, width: int, rng: np.random.Generator) -> Figure:
    size = float(rng.uniform(0.4, 0.5)) * height
    step = _SPEED * height
    lowest, highest = 1.0, height - size - 1.0
    tops = [float(rng.uniform(lowest, highest))]
    moves = []
    for _ in seconds:
        shifts = {"stay": 0.0, "climb": -step, "descend": step}
        move = str(rng.choice([name for name in MOVES if lowest <= tops[-1] + shifts[name] <= highest]))
        moves.append(move)
        tops.append(tops[-1] + shifts[move])
    flashes = bool(rng.random() < 0.4)
    bright = 1.0 if flashes else float(rng.uniform(_DIM, 1.0))  # so that one frame does not tell who flashes
    tint = rng.uniform(0.8, 1.0, 3)
    return Figure(
        number=number,
        pose=str(rng.choice(POSES)),
        carries=bool(rng.random() < 0.4),
        flashes=flashes,
        phase=float(rng.uniform(0, 2 * np.pi)),
        facing=int(rng.choice((-1, 1))),
        x=(lane + 0.5) * width / LANES + float(rng.uniform(-0.02, 0.02)) * width,
        height=size,
        colour=(bright * tint).astype(np.float32),
        first=seconds[0],
        tops=tuple(tops),
        moves=tuple(moves),
    )


def draw(
    figures: list[Figure], times: NDArray[np.float64], height: int, width: int, rng: np.random.Generator
) -> NDArray[np.uint8]:
    """The pictures of a video.

    Args:
        figures: The persons.
        times: (T,) of the pictures, seconds.
        height: Pixels.
        width: Pixels.
        rng: Source of the background.

    Returns:
        (T,H,W,3) RGB.
    """
    frames = _background(len(times), height, width, rng)
    for figure in figures:
        covers = [_cover(figure, step / _STEPS) for step in range(_STEPS)]
        for number in np.flatnonzero((times >= figure.first - 0.5) & (times < figure.last + 0.5)):
            _paint(frames[number], figure, float(times[number]), covers)
    frames += rng.normal(0.0, 0.02, (height, width, 3)).astype(np.float32)
    frames *= 255
    return np.clip(frames, 0, 255, out=frames).round(out=frames).astype(np.uint8)


def _background(num_frames: int, height: int, width: int, rng: np.random.Generator) -> NDArray[np.float32]:
    """(T,H,W,3) in [0, 1]: a texture, darker than the persons, that wanders."""
    margin = max(height, width) // 8
    picture = texture(max(height, width) + 2 * margin, rng).permute(1, 2, 0).numpy() * 0.7
    turn = np.linspace(0, 2 * np.pi * num_frames / 250, num_frames)
    phases = rng.uniform(0, 2 * np.pi, 2)
    tops, lefts = (np.round(margin * (1 + 0.9 * np.sin(turn + phase))).astype(int) for phase in phases)
    return np.stack(
        [picture[top : top + height, left : left + width] for top, left in zip(tops, lefts, strict=True)]
    ).astype(np.float32)


class _Cover(NamedTuple):
    """How much of each pixel a person's body and its ball cover, at one place in a pixel."""

    row: int  # of the first pixel, from the whole pixels of the person's upper end
    column: int
    body: NDArray[np.float32]  # (h,w,1)
    ball: NDArray[np.float32]


def _cover(figure: Figure, offset: float) -> _Cover:
    """Soft edges of one pixel lie inside the box."""
    left, upper, right, lower = (figure.height * value for value in figure.extent())
    row, column = int(np.floor(offset + upper)), int(np.floor(figure.x + left))
    ys = np.arange(row, int(np.ceil(offset + lower)), dtype=np.float32)[:, None] + 0.5 - offset
    xs = np.arange(column, int(np.ceil(figure.x + right)), dtype=np.float32)[None, :] + 0.5 - figure.x
    scale = np.float32(1 / figure.height)
    strokes = [_stroke(part, figure.facing * xs * scale, ys * scale) / scale for part in figure.parts]
    body = np.maximum.reduce(strokes[: len(_PARTS[figure.pose])]).clip(0, 1)
    ball = strokes[-1].clip(0, 1) if figure.carries else np.zeros_like(body)
    return _Cover(row, column, body[..., None], ball[..., None])


def _stroke(part: _Part, xs: NDArray[np.float32], ys: NDArray[np.float32]) -> NDArray[np.float32]:
    """Depth of each point below the edge of a stroke, negative outside."""
    dx, dy = part.x2 - part.x1, part.y2 - part.y1
    length = max(dx * dx + dy * dy, 1e-9)
    along = np.clip(((xs - part.x1) * dx + (ys - part.y1) * dy) / length, 0, 1)
    return np.asarray(part.radius - np.hypot(xs - part.x1 - along * dx, ys - part.y1 - along * dy), np.float32)


def _paint(frame: NDArray[np.float32], figure: Figure, time: float, covers: list[_Cover]) -> None:
    """Draw a person into a picture (H,W,3) in [0, 1]; what lies beyond its borders is left out."""
    whole, step = divmod(round(figure.top(time) * _STEPS), _STEPS)
    row, column, body, ball = covers[step]
    top, left = max(whole + row, 0), max(column, 0)
    region = frame[top : whole + row + len(body), left : column + body.shape[1]]
    inside = (slice(top - whole - row, None), slice(left - column, None))
    body, ball = (cover[inside][: region.shape[0], : region.shape[1]] for cover in (body, ball))
    region += body * (figure.colour * figure.brightness(time) - region)
    region += ball * (figure.colour[::-1] * _BALL_COLOUR - region)
