"""Which video a kept flow was made from: size and time of change, and where the time differs the content."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self

from distinit_plugin.video.guard import video_errors
from distinit_plugin.video.images import list_frames

_BLOCK_BYTES = 1 << 20


@dataclass(frozen=True)
class Identity:
    """A video as it was when its flow was made.

    Attributes:
        size: Bytes; of a folder of frames those of all its images.
        mtime_ns: Time of change; of a folder the newest of its images.
        sha256: Of the content; of a folder of the names and contents of its images.
    """

    size: int
    mtime_ns: int
    sha256: str

    @classmethod
    def of(cls, path: str) -> Self:
        """Read all of a video file or folder of frames.

        Raises:
            VideoError: It cannot be read.
        """
        size, mtime_ns = stamp(path)
        return cls(size, mtime_ns, content_hash(path))

    def is_of(self, path: str) -> bool:
        """Whether the video is still the same; its content is read only where the time of change is another.

        Raises:
            VideoError: It cannot be read.
        """
        size, mtime_ns = stamp(path)
        return size == self.size and (mtime_ns == self.mtime_ns or content_hash(path) == self.sha256)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Undo ``to_dict``.

        Raises:
            LookupError, TypeError, ValueError: It is not one.
        """
        return cls(int(values["size"]), int(values["mtime_ns"]), str(values["sha256"]))


def stamp(path: str) -> tuple[int, int]:
    """Size in bytes and time of change, ns.

    Raises:
        VideoError: It is not there.
    """
    with video_errors(path, "cannot be opened"):
        status = [os.stat(file) for file in _files(path)]
        return sum(one.st_size for one in status), max(one.st_mtime_ns for one in status)


def content_hash(path: str) -> str:
    """SHA-256 of a file, or of the names and contents of the images of a folder.

    Raises:
        VideoError: It cannot be read.
    """
    digest = hashlib.sha256()
    with video_errors(path, "cannot be read"):
        whole = os.path.isdir(path)
        for file in _files(path):
            if whole:
                digest.update(f"{os.path.basename(file)}\0{os.path.getsize(file)}\0".encode("utf-8", "surrogateescape"))
            for block in _blocks(file):
                digest.update(block)
    return digest.hexdigest()


def _files(path: str) -> list[str]:
    return list_frames(path) if os.path.isdir(path) else [path]


def _blocks(file: str) -> Iterator[bytes]:
    if not stat.S_ISREG(os.stat(file).st_mode):  # opening a fifo would wait for ever
        raise ValueError(f"{os.path.basename(file)} is not a regular file")
    with open(file, "rb") as stream:
        while block := stream.read(_BLOCK_BYTES):
            yield block
