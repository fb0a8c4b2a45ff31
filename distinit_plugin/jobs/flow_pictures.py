"""The flow of one video as pictures."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from distinit_plugin.errors import UserError, VideoError
from distinit_plugin.files import write_file
from distinit_plugin.flow.backends import FlowBackend, build_flow_backend
from distinit_plugin.flow.compute import SizeRule, resize_frame
from distinit_plugin.flow.pictures import Flow, Picture, colour_flow, contact_sheet, large_length
from distinit_plugin.flow.source import FlowSource
from distinit_plugin.flow.store import FlowStore
from distinit_plugin.flow.writing import check_device
from distinit_plugin.video.decode import open_video
from distinit_plugin.video.encode import write_mp4
from distinit_plugin.video.guard import check_size
from distinit_plugin.video.source import FrameSource

_SAMPLE = 8
"""Flows that tell the length of the full colour of a video."""


class FlowLengths(NamedTuple):
    """How long the flow of a frame is, pixels.

    Attributes:
        frame: Number in the video.
        mean: Over the frame.
        most: What 99 % of the vectors stay below.
        largest: Of all.
    """

    frame: int
    mean: float
    most: float
    largest: float


def show_flow(
    video: str,
    output: Path,
    *,
    store: str = "",
    backend: str = "dual_tvl1",
    options: Mapping[str, Any] | None = None,
    device: str = "cpu",
    size: str = "256",
    num_frames: int = 8,
    largest: float | None = None,
    timeout: float = 300.0,
) -> list[FlowLengths]:
    """Draw frames and their flow.

    Args:
        video: A file or a folder of frames.
        output: ``.png`` for a sheet of some frames, ``.mp4`` for all of them.
        store: Folder of kept flow; empty: it is computed.
        backend: By which.
        options: Its arguments.
        device: Where.
        size: See ``SizeRule``; the kept flow has its own.
        num_frames: Of the sheet.
        largest: Length of the full colour, pixels; ``None``: from the video.
        timeout: Seconds for the index, and for each frame.

    Returns:
        The lengths of the flow of each frame of a sheet; of a video none.

    Raises:
        UserError: The video or its flow cannot be read, or the output cannot be written.
    """
    ending = output.suffix.lower()
    if ending not in (".png", ".mp4"):
        raise UserError(f"{output}: pictures are written as .png (a sheet) or .mp4 (a video). Name such a file.")
    try:
        with open_video(video, timeout=timeout) as source:
            if store:
                kept = FlowStore.open(store)
                assert kept.settings is not None
                with kept.reader(video, timeout=timeout) as reader:
                    shown: _Shown = _Kept(source, reader, kept.settings.fps)
                    title = f"{os.path.basename(video)}  {_short(kept.settings.backend)}"
                    return _draw(shown, output, title, num_frames, largest)
            check_device(device)
            shown = _Live(
                source, build_flow_backend(backend, "--backend", **(options or {})), device, SizeRule.parse(size)
            )
            title = f"{os.path.basename(video)}  {_short(shown.backend.identity)}"
            return _draw(shown, output, title, num_frames, largest)
    except VideoError as error:
        raise UserError(f"{error}.") from error
    except ValueError as error:  # a size that cannot be
        raise UserError(f"{error}.") from error


def _short(identity: str) -> str:
    """Without the parameters."""
    return identity.split("(")[0].strip()


def _draw(shown: _Shown, output: Path, title: str, num_frames: int, largest: float | None) -> list[FlowLengths]:
    count = len(shown.numbers)
    lengths: list[FlowLengths] = []
    if output.suffix.lower() == ".png":
        places = np.unique(np.linspace(0, max(count - 2, 0), min(num_frames, count)).round().astype(int)).tolist()
        pairs = [shown.at(place) for place in places]
        full = largest or large_length([flow for _, flow in pairs])
        captions = [f"frame {shown.numbers[place]}" for place in places]
        lengths = [_lengths(int(shown.numbers[place]), flow) for place, (_, flow) in zip(places, pairs, strict=True)]
        sheet = contact_sheet([frame for frame, _ in pairs], [flow for _, flow in pairs], captions, title, full)
        file = BytesIO()
        sheet.save(file, format="PNG")
        write_file(output, lambda target: target.write(file.getvalue()))
    else:
        sample = np.unique(np.linspace(0, max(count - 2, 0), _SAMPLE).astype(int)).tolist()
        full = largest or large_length([shown.at(place)[1] for place in sample])
        write_mp4(
            output,
            (
                (number / shown.rate, np.concatenate([frame, colour_flow(flow, full)], axis=1))
                for number, (frame, flow) in enumerate(shown.all())
            ),
        )
    print(f"wrote {output} (full colour: {full:.3g} px)")
    return lengths


def _lengths(frame: int, flow: Flow) -> FlowLengths:
    lengths = np.hypot(flow[..., 0], flow[..., 1])
    return FlowLengths(frame, float(lengths.mean()), float(np.quantile(lengths, 0.99)), float(lengths.max()))


class _Shown:
    """Frames and flow of the same size."""

    def __init__(self, source: FrameSource, fps: float | None) -> None:
        self._source = source
        self.numbers = source.index.timeline(fps)
        seconds = float(source.index.seconds[-1] - source.index.seconds[0])
        own = (source.index.num_frames - 1) / seconds if seconds > 0 else 25.0
        self.rate = min(max(fps or own, 1.0), 120.0)

    def at(self, place: int) -> tuple[Picture, Flow]:
        """Frame (H,W,3) and flow (H,W,2) of a place."""
        raise NotImplementedError

    def all(self) -> Iterator[tuple[Picture, Flow]]:
        """Those of every place, the last flow twice."""
        raise NotImplementedError


class _Kept(_Shown):
    def __init__(self, source: FrameSource, reader: FlowSource, fps: float | None) -> None:
        super().__init__(source, fps)
        self._reader = reader

    def _flow(self, place: int) -> Flow:
        return self._reader.quantiser.decode(self._reader.read([place])[0])

    def _small(self, frame: Picture) -> Picture:
        return resize_frame(frame, self._reader.height, self._reader.width).permute(1, 2, 0).numpy()

    def at(self, place: int) -> tuple[Picture, Flow]:
        return self._small(self._source.read([self.numbers[place]])[0]), self._flow(place)

    def all(self) -> Iterator[tuple[Picture, Flow]]:
        numbers, places = np.unique(self.numbers, return_index=True)
        ends = [*places[1:].tolist(), len(self.numbers)]
        for frame, first, end in zip(self._source.stream(numbers), places.tolist(), ends, strict=True):
            small = self._small(frame)
            for place in range(first, end):
                yield small, self._flow(place)


class _Live(_Shown):
    def __init__(self, source: FrameSource, backend: FlowBackend, device: str, size: SizeRule) -> None:
        super().__init__(source, None)
        self._device = device
        self.backend = backend
        self._size = size.of(source.index.height, source.index.width)
        check_size(self._size[1], 2 * self._size[0])

    def _pair(self, first: Picture, second: Picture) -> tuple[Picture, Flow]:
        one, two = (resize_frame(frame, *self._size) for frame in (first, second))
        flow = self.backend(one[None].to(self._device), two[None].to(self._device))[0].permute(1, 2, 0).cpu().numpy()
        return one.permute(1, 2, 0).numpy(), flow

    def at(self, place: int) -> tuple[Picture, Flow]:
        frames = self._source.read([place, min(place + 1, len(self.numbers) - 1)])
        return self._pair(frames[0], frames[1])

    def all(self) -> Iterator[tuple[Picture, Flow]]:
        before: Picture | None = None
        last: Flow | None = None
        for frame in self._source.stream(self.numbers):
            if before is not None:
                shown, last = self._pair(before, frame)
                yield shown, last
            before = frame
        assert before is not None
        alone, still = self._pair(before, before)
        yield alone, still if last is None else last
