"""Kept flow of other programs: denseflow's folders of JPEG pictures, and I3D's arrays."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from io import BytesIO

import numpy as np
import numpy.typing as npt
from PIL import Image

from distinit_plugin.errors import VideoError
from distinit_plugin.flow.codes import Codes, Quantiser
from distinit_plugin.flow.source import MissingFlowError, kept_numbers
from distinit_plugin.video.guard import Closing, Deadline, check_size, stat_file, video_errors
from distinit_plugin.video.images import WHOLE, Window, window_size
from distinit_plugin.video.index import Int64Array

PICTURE_NAME = "flow_{component}_{number:05d}.jpg"
"""Of flow ``number`` − 1, for the components x and y."""

_PICTURE = re.compile(r"flow_([xy])_([0-9]{1,9})\.jpg")
_ARRAY_VERSIONS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


class PictureFolder(Closing):
    """A folder of ``flow_x_00001.jpg``, ``flow_y_00001.jpg``, …: see ``FlowSource``.

    Such pictures do not say how they were quantised, so that bound and rounding have to be known.
    """

    def __init__(
        self, folder: str | os.PathLike[str], quantiser: Quantiser, *, path: str = "", timeout: float | None = None
    ) -> None:
        """List the pictures and look at the first.

        Args:
            folder: Where they are.
            quantiser: How they were made.
            path: The video, for errors.
            timeout: Seconds allowed from now on; ``None``: no limit.

        Raises:
            MissingFlowError: A picture is missing or cannot be read.
        """
        self._folder = os.fspath(folder)
        self.path = path or self._folder
        self.quantiser = quantiser
        self._deadline = Deadline(self.path, timeout)
        self._files = self._list()
        self.num_flows = len(self._files)
        self.height, self.width = self._load(self._files[0][0]).shape

    def read(self, indices: Sequence[int] | Int64Array, window: Window = WHOLE) -> Codes:
        """See ``FlowSource.read``."""
        numbers, places = kept_numbers(self.path, indices, self.num_flows)
        out = np.empty((len(numbers), *window_size(self.height, self.width, window), 2), dtype=np.uint8)
        for slot, number in enumerate(numbers.tolist()):
            for component, name in enumerate(self._files[number]):
                picture = self._load(name)
                if picture.shape != (self.height, self.width):
                    raise self._unavailable(
                        f"{name} is {picture.shape[1]}×{picture.shape[0]}, the first is {self.width}×{self.height}"
                    )
                out[slot, ..., component] = picture[window]
        return out[places]

    def _unavailable(self, reason: str) -> MissingFlowError:
        return MissingFlowError(
            self.path, reason if self.path == self._folder else f"its flow {self._folder}: {reason}"
        )

    def _list(self) -> list[tuple[str, str]]:
        """Names of the pictures of u and v of each flow."""
        found: dict[str, dict[int, str]] = {"x": {}, "y": {}}
        try:
            names = os.listdir(self._folder)
        except OSError as error:
            raise self._unavailable(f"cannot be opened: {error.strerror or error}") from error
        for name in names:
            if match := _PICTURE.fullmatch(name):
                found[match[1]][int(match[2])] = name
        numbers = sorted(found["x"].keys() | found["y"].keys())
        if not numbers:
            raise self._unavailable("has no flow_x_00001.jpg and flow_y_00001.jpg")
        first = min(numbers[0], 1)  # some programs count from 0
        for place, number in enumerate(numbers):
            wanted = first + place
            for component, known in found.items():
                if number != wanted or number not in known:
                    name = PICTURE_NAME.format(component=component, number=wanted)
                    raise self._unavailable(f"{name} is missing, and later ones are there")
        return [(found["x"][number], found["y"][number]) for number in numbers]

    def _load(self, name: str) -> Codes:
        """(H,W) uint8."""
        file = os.path.join(self._folder, name)
        try:
            self._deadline.check()
            stat_file(file)
            with video_errors(file, "cannot be decoded"), Image.open(file, formats=["JPEG"]) as image:
                check_size(*image.size)
                return np.asarray(image.convert("L"))
        except VideoError as error:
            raise self._unavailable(f"{name} {error.reason}") from error


def jpeg_bytes(codes: Codes, quality: int) -> tuple[bytes, bytes]:
    """(H,W,2) uint8 → the JPEG files of u and v, gray; the same bytes every time."""
    files = []
    for component in range(2):
        file = BytesIO()
        Image.fromarray(np.ascontiguousarray(codes[..., component])).save(file, format="JPEG", quality=quality)
        files.append(file.getvalue())
    return files[0], files[1]


class FlowArray(Closing):
    """An ``.npy`` file of I3D's release: (1,T,H,W,2) or (T,H,W,2) in [-1,1], which is the flow by its bound.

    It is mapped, not loaded: a clip of a long video costs what the clip costs. Its values were codes once, and are
    given as these codes again.
    """

    def __init__(
        self, file: str | os.PathLike[str], quantiser: Quantiser, *, path: str = "", timeout: float | None = None
    ) -> None:
        """Read the header.

        Args:
            file: The array.
            quantiser: What 1 means (20 px in I3D's data), and how its values become codes.
            path: The video, for errors.
            timeout: Seconds allowed from now on; ``None``: no limit.

        Raises:
            MissingFlowError: It is no such array.
        """
        self._file = os.fspath(file)
        self.path = path or self._file
        self.quantiser = quantiser
        self._deadline = Deadline(self.path, timeout)
        self._values = self._map()
        self.num_flows, self.height, self.width = self._values.shape[:3]

    def read(self, indices: Sequence[int] | Int64Array, window: Window = WHOLE) -> Codes:
        """See ``FlowSource.read``."""
        self._deadline.check()
        numbers, places = kept_numbers(self.path, indices, self.num_flows)
        rows, columns = window
        values = np.asarray(self._values[numbers][:, rows, columns], dtype=np.float32)
        if not (np.abs(values) <= 1).all():
            raise self._unavailable("has values that are not in [-1, 1]")
        # They stand for codes: the nearest one is right for either rounding.
        return np.rint((values + 1) * np.float32(127.5)).astype(np.uint8)[places]

    def _unavailable(self, reason: str) -> MissingFlowError:
        return MissingFlowError(self.path, reason if self.path == self._file else f"its flow {self._file} {reason}")

    def _map(self) -> npt.NDArray[np.floating]:
        try:
            status = stat_file(self._file)
            with video_errors(self._file, "is no array"), open(self._file, "rb") as file:
                version = np.lib.format.read_magic(file)
                if version not in _ARRAY_VERSIONS:
                    raise ValueError(f"its format has version {version[0]}.{version[1]}")
                shape, by_columns, dtype = _ARRAY_VERSIONS[version](file)
                shape = shape[1:] if len(shape) == 5 and shape[0] == 1 else shape
                if len(shape) != 4 or shape[-1] != 2 or min(shape) < 1 or by_columns or dtype.kind != "f":
                    raise ValueError("it must be (1, T, H, W, 2) floating-point numbers in C order")
                check_size(2 * shape[2], shape[1])
                offset = file.tell()
                if status.st_size != offset + int(np.prod([int(n) for n in shape], dtype=object)) * dtype.itemsize:
                    raise ValueError("its size is not what its header says")
                return np.memmap(self._file, dtype=dtype, mode="r", offset=offset, shape=shape)
        except VideoError as error:
            raise self._unavailable(error.reason) from error
