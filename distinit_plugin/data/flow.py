"""Views of optical flow: computed from pairs of frames on the device, or read from a store of flow.

Flow is coded in bytes, u and v of [-bound, bound] pixels as [0, 255], whether it was stored or not, so that a network
sees the same numbers either way.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from distinit_plugin.flow.backends import FlowBackend
from distinit_plugin.flow.codes import Quantiser
from distinit_plugin.flow.source import FlowSource, MissingFlowError
from distinit_plugin.flow.store import FlowStore
from distinit_plugin.types import ViewSpec
from distinit_plugin.video.sampling import Clip
from distinit_plugin.video.transforms import Geometry, view_positions, view_size


class LiveFlow:
    """Flow of pairs of frames, coded; keeps account of the time that it takes."""

    def __init__(self, backend: FlowBackend, quantiser: Quantiser) -> None:
        """Take what computes flow, and how it is coded."""
        self._backend, self._quantiser = backend, quantiser
        self._seconds = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def __call__(self, pairs: Tensor, stack: int) -> Tensor:
        """(B,6,T·stack,H,W) uint8 → codes uint8 (B,2·stack,T,H,W)."""
        with self._timed(pairs.device), torch.no_grad():
            batch, _, count, height, width = pairs.shape
            frames = pairs.transpose(1, 2).reshape(batch * count, 2, 3, height, width)
            flow = self._backend(frames[:, 0].contiguous(), frames[:, 1].contiguous())
            codes = self._quantiser.encode_tensor(flow)
            # (B·T·stack,2,H,W) → (B,T,2·stack,H,W) → channels first
            codes = codes.view(batch, count // stack, 2 * stack, height, width).transpose(1, 2)
        return codes.contiguous()

    @property
    def identity(self) -> str:
        """What computes it, as a store records it."""
        return self._backend.identity

    def seconds(self) -> float:
        """Seconds spent since the last call of this; waits for the device."""
        for begin, end in self._events:
            self._add(begin, end)
        seconds, self._seconds, self._events = self._seconds, 0.0, []
        return seconds

    @contextmanager
    def _timed(self, device: torch.device) -> Iterator[None]:
        if device.type != "cuda":
            start = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - start
            return
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        yield
        end.record()
        self._events.append((begin, end))
        while self._events and self._events[0][1].query():  # nobody may ever ask for the seconds
            self._add(*self._events.pop(0))

    def _add(self, begin: torch.cuda.Event, end: torch.cuda.Event) -> None:
        end.synchronize()
        self._seconds += begin.elapsed_time(end) / 1000


@dataclass(frozen=True)
class StoredFlow:
    """Views from a store.

    Attributes:
        store: Where flow is read.
        bound: Of the views' codes, pixels; the store may have another.
        live: Computes the flow of videos that the store lacks; ``None``: they are bad videos.
    """

    store: FlowStore
    bound: float
    live: LiveFlow | None = None

    def open(self, path: str, num_frames: int) -> FlowSource | None:
        """The flow of a video; ``None``: it is to be computed from its frames.

        Args:
            path: The video.
            num_frames: Frames of it (after resampling).

        Raises:
            MissingFlowError: It is not in the store, stale, damaged, or of another length.
        """
        try:
            reader = self.store.reader(path)
        except MissingFlowError:
            if self.live is None:
                raise
            return None
        if reader.num_flows not in (max(num_frames - 1, 1), num_frames):
            reader.close()
            raise MissingFlowError(
                path,
                f"its video has {num_frames} frames, but {reader.num_flows} flows are stored: extract it again, with "
                "--fps as CORPUS.TARGET_FPS",
            )
        return reader

    def compute(self, pairs: Tensor, stack: int) -> Tensor:
        """As ``LiveFlow``, of one sample: (6,T·stack,H,W) uint8 → codes uint8 (2·stack,T,H,W)."""
        assert self.live is not None
        return self.live(pairs[None], stack)[0]

    def views(
        self,
        reader: FlowSource,
        clip: Clip,
        specs: Mapping[str, ViewSpec],
        geometry: Geometry,
        size: tuple[int, int],
        seed: int,
    ) -> dict[str, Tensor]:
        """The views of flow of one sample.

        Args:
            reader: Of the sample's video.
            clip: Its frames.
            specs: Of modality ``flow``, by any names.
            geometry: The region of the source picture, with its flip.
            size: Height and width of the source picture.
            seed: As in ``build_views``.

        Returns:
            ``ViewSpec.pixels`` → codes uint8 (2·stack,T',height,width).
        """
        distinct = {spec.pixels: spec for _, spec in sorted(specs.items())}
        region = in_store(geometry, size, (reader.height, reader.width))
        numbers = {
            pixels: clip.flow_places(view_positions(spec, len(clip), seed), spec.stack)
            for pixels, spec in distinct.items()
        }
        needed = np.unique(np.concatenate(list(numbers.values())))
        codes = torch.from_numpy(reader.read(needed, region.window)).permute(0, 3, 1, 2)
        views = {}
        for pixels, spec in distinct.items():
            height, width = view_size(spec, geometry)
            flow = render_flow(codes, reader.quantiser, self.bound, (height, width), flip=region.flip)
            shown = flow[torch.from_numpy(np.searchsorted(needed, numbers[pixels]))]
            views[pixels] = shown.reshape(-1, 2 * spec.stack, height, width).transpose(0, 1).contiguous()
        return views


def in_store(geometry: Geometry, source: tuple[int, int], stored: tuple[int, int]) -> Geometry:
    """A region of the source picture in the pixels of stored flow, rounded to whole ones, at least one.

    Args:
        geometry: The region.
        source: Height and width of the source picture.
        stored: Height and width of the stored flow.
    """

    def scaled(start: int, length: int, old: int, new: int) -> tuple[int, int]:
        first = min(round(start * new / old), new - 1)
        return first, max(min(round((start + length) * new / old), new) - first, 1)

    top, height = scaled(geometry.top, geometry.height, source[0], stored[0])
    left, width = scaled(geometry.left, geometry.width, source[1], stored[1])
    return Geometry(top, left, height, width, geometry.flip)


def render_flow(codes: Tensor, stored: Quantiser, bound: float, size: tuple[int, int], *, flip: bool) -> Tensor:
    """Resize and mirror a region of stored flow: values scale with the picture, a flip negates u.

    Args:
        codes: (n,2,h,w) uint8.
        stored: How they are coded.
        bound: Of the result, pixels.
        size: Height and width of the result, pixels.
        flip: Mirror left to right.

    Returns:
        (n,2,*size) uint8; bilinear with antialiasing. Codes stay what they are where neither size nor bound change;
        new ones are the nearest, for both roundings (what is coded already was rounded down once).
    """
    height, width = codes.shape[-2:]
    if flip:
        codes = codes.flip(-1)
        codes[:, 0] = 255 - codes[:, 0]  # decodes to -u exactly
    if (height, width) == size and stored.bound == bound:
        return codes
    flow = stored.decode_tensor(codes)
    if (height, width) != size:
        flow = F.interpolate(flow, size=size, mode="bilinear", antialias=True)
        flow *= torch.tensor([size[1] / width, size[0] / height]).view(2, 1, 1)
    return Quantiser(bound).encode_tensor(flow)
