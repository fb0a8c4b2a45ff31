"""The flow of one video into a store: what a worker process of the extraction does."""

from __future__ import annotations

import errno
import json
import os
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from distinit_plugin.errors import UserError, VideoError
from distinit_plugin.files import replace_folder, write_text
from distinit_plugin.flow.backends import FlowBackend, build_flow_backend
from distinit_plugin.flow.codes import Codes
from distinit_plugin.flow.compute import SizeRule, Tally, video_flow
from distinit_plugin.flow.entries import EntryReader, write_entry
from distinit_plugin.flow.folders import PICTURE_NAME, jpeg_bytes
from distinit_plugin.flow.identity import Identity
from distinit_plugin.flow.source import MissingFlowError
from distinit_plugin.flow.store import PICTURES_FILE, FlowStore
from distinit_plugin.video.decode import open_video
from distinit_plugin.video.guard import describe

_SAMPLE_STEP = 50
"""Every so many flows one is also written as JPEG, to tell the size of folders of these."""


def check_device(device: str) -> None:
    """Raise UserError for a device that torch cannot use."""
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"--device {device[:40]} cannot be used: {describe(error)[:200]}. Choose cpu.") from error


@dataclass(frozen=True)
class Outcome:
    """What became of one video.

    Attributes:
        path: The video.
        place: The file or folder of its flow.
        frames: Of the video, at the store's rate.
        num_bytes: Of its flow.
        values: Components of flow.
        clipped: Those beyond the bound.
        jpeg_bytes: Size of the sampled flows as JPEG files.
        sampled: How many these are.
        reused: The flow was there.
        bad: Why there is none; empty: there is one.
        fatal: A sentence that ends the whole extraction; empty: none.
    """

    path: str
    place: str = ""
    frames: int = 0
    num_bytes: int = 0
    values: int = 0
    clipped: int = 0
    jpeg_bytes: int = 0
    sampled: int = 0
    reused: bool = False
    bad: str = ""
    fatal: str = ""


@dataclass
class VideoJob:
    """Path of a video → its outcome, with the flow written; what the user cannot help never raises.

    Attributes:
        store: Where to.
        backend: Name of the back end.
        options: Its arguments.
        device: Where it computes.
        batch_size: Pairs at once.
        timeout: Seconds for the index, and for each frame.
        verify: Decode all of what is there.
        counter: Flows made, by all processes together.
    """

    store: FlowStore
    backend: str
    options: Mapping[str, Any]
    device: str
    batch_size: int
    timeout: float
    verify: bool
    counter: Any
    _loaded: FlowBackend | None = field(default=None, init=False)

    def __call__(self, path: str) -> Outcome:
        """Make or check the flow of a video."""
        place = self.store.place_of(path)
        try:
            return self._known(path, place) or self._make(path, place)
        except VideoError as error:
            return Outcome(path, bad=error.reason)
        except UserError as error:
            return Outcome(path, fatal=str(error))
        except Exception as error:  # of a back end, on pictures that it cannot take; one video must not end all
            return Outcome(path, bad=f"its flow cannot be computed: {type(error).__name__}: {describe(error)}")

    def _known(self, path: str, place: Path) -> Outcome | None:
        """What is there already, when it is whole and of this video."""
        if not place.exists():
            return None
        try:
            with self.store.open_place(place, path, timeout=self.timeout) as reader:
                numbers = range(reader.num_flows) if self.verify else [reader.num_flows - 1]
                for number in numbers:
                    reader.read([number])
                told = reader.description if isinstance(reader, EntryReader) else self.store.describe(place, path)
                if int(told["flows"]) != reader.num_flows:
                    return None
                counts = [int(told[name]) for name in ("frames", "values", "clipped")]
        except (MissingFlowError, LookupError, TypeError, ValueError):
            return None
        frames, values, clipped = counts
        return Outcome(path, str(place), frames, _num_bytes(place), values, clipped, reused=True)

    def _make(self, path: str, place: Path) -> Outcome:
        settings = self.store.settings
        assert settings is not None
        if self._loaded is None:
            self._loaded = self._start()
        source = Identity.of(path)
        tally, sample = Tally(), _Sample(settings.quality)
        with open_video(path, timeout=self.timeout) as video:
            flows = video_flow(
                video,
                self._loaded,
                settings.quantiser,
                size=SizeRule.parse(settings.size),
                fps=settings.fps,
                batch_size=self.batch_size,
                tally=tally,
                device=self.device,
            )

            def told() -> dict[str, Any]:
                return {
                    "backend": settings.backend, "bound": settings.bound, "rounding": settings.rounding,
                    "size": settings.size, "fps": settings.fps, "frames": tally.frames, "values": tally.values,
                    "clipped": tally.clipped, "clipped_share": round(tally.clipped / tally.values, 9),
                    "video": os.path.basename(path), "video_size": [video.index.width, video.index.height],
                    "video_frames": video.index.num_frames, "source": source.to_dict(),
                }  # fmt: skip

            if self.store.layout == "store":
                write_entry(place, self._counted(flows, sample), told, codec=settings.codec)
            else:
                _write_pictures(place, self._counted(flows, sample), told, settings.quality)
        if not source.is_of(path):
            raise VideoError(path, "was changed while it was read")
        return Outcome(
            path,
            str(place),
            tally.frames,
            _num_bytes(place),
            tally.values,
            tally.clipped,
            sample.num_bytes,
            sample.count,
        )

    def _start(self) -> FlowBackend:
        """One thread per process: the processes are the parallelism."""
        torch.set_num_threads(1)
        check_device(self.device)
        backend = build_flow_backend(self.backend, "--backend", **self.options)
        if "cv2" in sys.modules:
            sys.modules["cv2"].setNumThreads(1)
        return backend

    def _counted(self, flows: Iterable[Codes], sample: _Sample) -> Iterator[Codes]:
        for number, codes in enumerate(flows):
            if number % _SAMPLE_STEP == 0:
                sample.add(codes)
            yield codes
            with self.counter.get_lock():
                self.counter.value += 1


@dataclass
class _Sample:
    """Sizes of some flows as JPEG."""

    quality: int
    num_bytes: int = 0
    count: int = 0

    def add(self, codes: Codes) -> None:
        self.num_bytes += sum(map(len, jpeg_bytes(codes, self.quality)))
        self.count += 1


def _write_pictures(place: Path, flows: Iterable[Codes], told: Any, quality: int) -> None:
    """A folder of pictures, under a temporary name until it is whole.

    Raises:
        UserError: It cannot be written, or a folder is there that this program did not make.
    """
    if place.exists() and not (place / PICTURES_FILE).is_file():
        raise UserError(f"{place} is there and was not made by this program. Remove it, or name another folder.")
    temporary = place.with_name(f"{place.name}.flow.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        count = 0
        for count, codes in enumerate(flows, start=1):
            for component, data in zip("xy", jpeg_bytes(codes, quality), strict=True):
                (temporary / PICTURE_NAME.format(component=component, number=count)).write_bytes(data)
        description: Mapping[str, Any] = {**told(), "flows": count}
        write_text(temporary / PICTURES_FILE, json.dumps(description, sort_keys=True) + "\n")
        replace_folder(temporary, place)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        hint = "Free space there" if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) else "Look at its rights"
        raise UserError(f"cannot write {place}: {error.strerror or error}. {hint}, or name another folder.") from error
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _num_bytes(place: Path) -> int:
    if place.is_file():
        return place.stat().st_size
    return sum(entry.stat().st_size for entry in os.scandir(place))
