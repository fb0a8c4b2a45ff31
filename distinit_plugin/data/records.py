"""What a dataset makes samples of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from distinit_plugin.video.records import VideoRecord


class Records(Protocol):
    """What samples are made of: videos, or keyframes of them, of several corpora under one index."""

    @property
    def sizes(self) -> Sequence[int]:
        """Number of records of each corpus."""
        ...

    @property
    def digests(self) -> Sequence[str]:
        """Of each corpus: tells it from one of other names, another order or other labels, wherever it lies."""
        ...

    @property
    def weights(self) -> Sequence[float]:
        """Share of the training samples of each corpus; they sum to 1."""
        ...

    @property
    def num_videos(self) -> int:
        """Number of files that can be bad."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> VideoRecord: ...

    def locate(self, index: int) -> tuple[int, int]:
        """The number of the corpus that holds a record, and the record's number in it."""
        ...
