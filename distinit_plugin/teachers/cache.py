"""Outputs of a teacher on a grid of clips of each video, in files: written once, read back in training.

A folder with ``targets.json`` (what the values are of, and their layout), ``videos`` (names, each ended by a zero byte)
and arrays ``shard_00000.npy`` … of some videos each, (videos, clips × crops, frames, …): crops count fastest. The rows
of a video that the teacher could not see are not numbers, and ``shard_00000.json`` says why.
"""

from __future__ import annotations

import io
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from hashlib import sha256
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from distinit_plugin.errors import UserError
from distinit_plugin.files import read_json, why_unusable, write_file, write_text

INDEX_FILE = "targets.json"
NAMES_FILE = "videos"
FORMAT_VERSION = 1
DTYPES = ("float16", "float32")

_MAX_JSON_BYTES = 1 << 28
_MAX_COUNT = 1 << 31
_AGAIN = "Run the same distinit cache-targets again"


@dataclass(frozen=True)
class TargetLayout:
    """How the arrays are laid out.

    Attributes:
        layer: What was stored: ``logits``, ``features`` or a layer of the teacher.
        shape: Of one row: (K,), (D,), or a map (C,H,W) of a frame or (C,T,H,W) of a clip.
        dtype: ``float16`` or ``float32``.
        videos: V.
        clips: Of each video.
        crops: Of each clip, mirrored ones included.
        frames: Rows of each crop: one for each frame that may be picked, or one for the clip.
        each_frame: Rows are those of single frames.
        shard_videos: Videos of one file; the last one may have fewer.
        feature_dim: D of the teacher.
        temporal_stride: Of a map; 0: none.
        spatial_stride: Of a map; 0: none.
    """

    layer: str
    shape: tuple[int, ...]
    dtype: str
    videos: int
    clips: int
    crops: int
    frames: int
    each_frame: bool
    shard_videos: int
    feature_dim: int
    temporal_stride: int = 0
    spatial_stride: int = 0

    def __post_init__(self) -> None:
        """Refuse what cannot be (ValueError)."""
        counts = (self.videos, self.clips, self.crops, self.frames, self.shard_videos, *self.shape)
        if not self.shape or not all(type(count) is int and 0 < count < _MAX_COUNT for count in counts):
            raise ValueError("a count in it is not possible")
        rest = (self.feature_dim, self.temporal_stride, self.spatial_stride)
        if (
            not all(type(count) is int and 0 <= count < _MAX_COUNT for count in rest)
            or type(self.each_frame) is not bool
        ):
            raise ValueError("a number in it is not possible")
        if self.dtype not in DTYPES or (self.frames > 1 and not self.each_frame):
            raise ValueError("its layout is not possible")

    @property
    def shards(self) -> int:
        """Number of files."""
        return -(-self.videos // self.shard_videos)

    def rows(self, shard: int) -> range:
        """Videos of one file."""
        return range(shard * self.shard_videos, min((shard + 1) * self.shard_videos, self.videos))

    def shard_shape(self, shard: int) -> tuple[int, ...]:
        """(videos, clips × crops, frames, …)."""
        return (len(self.rows(shard)), self.clips * self.crops, self.frames, *self.shape)

    @property
    def bytes_per_clip(self) -> int:
        """Of one clip and crop."""
        return math.prod(self.shape) * self.frames * np.dtype(self.dtype).itemsize

    def header(self, shard: int) -> bytes:
        """The first bytes of a file, as numpy writes them."""
        text = io.BytesIO()
        description = {"descr": np.dtype(self.dtype).str, "fortran_order": False, "shape": self.shard_shape(shard)}
        np.lib.format.write_array_header_1_0(text, description)
        return text.getvalue()


class TargetStore:
    """The folder.

    Attributes:
        folder: Where it is.
        layout: Of its arrays.
        identity: What decides the values, in words: item → value. Two stores with equal ones hold the same.
        made: What may change their last bits: precision, versions.
        bad: Row → why the teacher could not see the video.
    """

    def __init__(
        self,
        folder: Path,
        layout: TargetLayout,
        identity: Mapping[str, str],
        made: Mapping[str, str],
        *,
        names_digest: str,
        bad: Mapping[int, str] | None = None,
        complete: bool = False,
    ) -> None:
        """See ``open`` and ``settle``, which check what they are given."""
        self.folder = folder
        self.layout = layout
        self.identity = dict(identity)
        self.made = dict(made)
        self.bad = dict(bad or {})
        self._names_digest = names_digest
        self._complete = complete

    # ------------------------------------------------------------------------------------------------- reading
    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> Self:
        """A store that is complete.

        Raises:
            UserError: There is none, it is damaged, or some of its targets are not computed yet.
        """
        store = cls._read(Path(folder))
        missing = [shard for shard in range(store.layout.shards) if not store.has(shard)]
        if missing and store._complete:
            raise UserError(
                f"{store.place(missing[0])} is missing or cut off ({len(missing)} of {store.layout.shards} files). "
                f"{_AGAIN}, which makes what is missing."
            )
        if not store._complete:
            raise UserError(
                f"{folder} is not complete: {len(missing)} of {store.layout.shards} files are still to be made. "
                f"{_AGAIN}, which goes on where it was."
            )
        return store

    @classmethod
    def _read(cls, folder: Path) -> Self:
        path = folder / INDEX_FILE
        if not path.is_file():
            raise UserError(f"{folder} holds no teacher's targets (distinit cache-targets makes them).")
        try:
            values = read_json(path, _MAX_JSON_BYTES)
            if values.get("format") != "distinit targets" or values.get("version") != FORMAT_VERSION:
                raise ValueError(f"it is not of format version {FORMAT_VERSION}")
            layout = _layout(values["layout"])
            return cls(
                folder,
                layout,
                _words(values["identity"]),
                _words(values["made"]),
                names_digest=str(values["videos_sha256"]),
                bad={int(row): str(reason) for row, reason in values["bad"].items()},
                complete=values["complete"] is True,
            )
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(
                f"{path} is damaged ({why_unusable(error)}). Remove the folder and make the targets again."
            ) from error

    def is_of(self, names: Iterable[str]) -> bool:
        """Whether these are the names of the store's videos, in the order of rows; none of them is kept."""
        digest = sha256()
        for name in names:
            digest.update(os.fsencode(name) + b"\0")
        return digest.hexdigest() == self._names_digest

    @property
    def names(self) -> list[str]:
        """Of the videos, in the order of rows.

        Raises:
            UserError: The list is not the one that was written.
        """
        path = self.folder / NAMES_FILE
        try:
            content = path.read_bytes()
        except OSError as error:
            raise UserError(f"{path} cannot be read ({why_unusable(error)}). {_AGAIN}.") from error
        names = content.split(b"\0")[:-1]
        if sha256(content).hexdigest() != self._names_digest or len(names) != self.layout.videos:
            raise UserError(f"{path} is damaged. Remove the folder and make the targets again.")
        return [os.fsdecode(name) for name in names]

    def place(self, shard: int) -> Path:
        """The file of a shard."""
        return self.folder / f"shard_{shard:05d}.npy"

    def has(self, shard: int) -> bool:
        """Whether the file of a shard is there as a whole."""
        header = self.layout.header(shard)
        size = math.prod(self.layout.shard_shape(shard)) * np.dtype(self.layout.dtype).itemsize
        try:
            with open(self.place(shard), "rb") as file:
                return os.fstat(file.fileno()).st_size == len(header) + size and file.read(len(header)) == header
        except OSError:
            return False

    def read(self, row: int, entry: int, frames: npt.NDArray[np.int64] | None = None) -> Tensor:
        """Outputs for one clip and crop, read through a memory map that is closed again.

        Args:
            row: Of the video.
            entry: clip · crops + crop.
            frames: Which of the rows of single frames; ``None``: all rows.

        Returns:
            (P,…) of the stored type.

        Raises:
            OSError, ValueError: The file has changed since ``open``.
        """
        shard, inside = divmod(row, self.layout.shard_videos)
        values = np.memmap(
            self.place(shard),
            self.layout.dtype,
            "r",
            offset=len(self.layout.header(shard)),
            shape=self.layout.shard_shape(shard),
        )[inside, entry]
        return torch.from_numpy(np.array(values if frames is None else values[frames]))

    # ------------------------------------------------------------------------------------------------- writing
    @classmethod
    def settle(
        cls,
        folder: Path,
        layout: TargetLayout,
        identity: Mapping[str, str],
        made: Mapping[str, str],
        names: Iterable[str],
    ) -> Self:
        """A store to write to: a new one, or one of the same values that goes on.

        Raises:
            UserError: The folder holds other targets, or cannot be written.
        """
        content = b"".join(os.fsencode(name) + b"\0" for name in names)
        digest = sha256(content).hexdigest()
        store = cls(folder, layout, identity, made, names_digest=digest)
        if (folder / INDEX_FILE).exists():
            known = cls._read(folder)
            differing = differences({**known.identity, **known.made}, {**store.identity, **store.made})
            if known._names_digest != digest:
                differing.append(f"corpus: {known.layout.videos} videos there, {layout.videos} now, not the same list")
            if not differing and known.layout != layout:
                differing = differences(
                    {key: str(value) for key, value in asdict(known.layout).items()},
                    {key: str(value) for key, value in asdict(layout).items()},
                )
            if differing:
                raise UserError(f"{folder} holds other targets ({'; '.join(differing)}). Name another folder.")
        else:
            write_file(folder / NAMES_FILE, lambda file: file.write(content))
            store._write_index()
        return store

    def write(self, shard: int, values: npt.NDArray[Any], bad: Mapping[int, str]) -> None:
        """Write a shard.

        Args:
            shard: Its number.
            values: ``layout.shard_shape``.
            bad: Row (of the store) → why it holds no numbers.
        """
        assert values.shape == self.layout.shard_shape(shard)
        assert values.dtype == self.layout.dtype
        reasons = self.place(shard).with_suffix(".json")
        if bad:
            write_text(reasons, json.dumps({str(row): bad[row] for row in sorted(bad)}, indent=2) + "\n")
        else:
            reasons.unlink(missing_ok=True)
        write_file(self.place(shard), lambda file: np.save(file, np.ascontiguousarray(values)))

    def finish(self) -> None:
        """Say that all shards are there, and gather the reasons for bad videos.

        Raises:
            UserError: A list of reasons is damaged.
        """
        self.bad = {row: reason for shard in range(self.layout.shards) for row, reason in self.bad_rows(shard).items()}
        self._complete = True
        self._write_index()

    def bad_rows(self, shard: int) -> dict[int, str]:
        """Row (of the store) → why it holds no numbers, of a shard that is there.

        Raises:
            UserError: The list of reasons is damaged.
        """
        path = self.place(shard).with_suffix(".json")
        if not path.is_file():
            return {}
        try:
            return {int(row): str(reason) for row, reason in read_json(path, _MAX_JSON_BYTES).items()}
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(
                f"{path} is damaged ({why_unusable(error)}). Remove {self.place(shard)}. {_AGAIN}."
            ) from error

    def _write_index(self) -> None:
        values = {
            "format": "distinit targets",
            "version": FORMAT_VERSION,
            "complete": self._complete,
            "identity": self.identity,
            "made": self.made,
            "layout": asdict(self.layout),
            "videos_sha256": self._names_digest,
            "bad": {str(row): self.bad[row] for row in sorted(self.bad)},
        }
        write_text(self.folder / INDEX_FILE, json.dumps(values, indent=2) + "\n")


def differences(there: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """``item: this there, that now`` for each item of ``now`` that differs."""
    return [
        f"{item}: {there.get(item, 'not known')} there, {value} now"
        for item, value in now.items()
        if there.get(item) != value
    ]


def _layout(values: Any) -> TargetLayout:
    casts: dict[str, Callable[[Any], Any]] = {"layer": str, "dtype": str, "shape": tuple}
    known = {
        field.name: casts.get(field.name, lambda value: value)(values[field.name]) for field in fields(TargetLayout)
    }
    return TargetLayout(**known)


def _words(values: Any) -> dict[str, str]:
    return {str(key): str(value) for key, value in values.items()}
