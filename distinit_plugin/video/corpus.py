"""Lists and folders of videos → records.

``load_corpus`` reads one corpus in one of the registered formats (``formats.py``, ``benchmarks.py``); ``Mixture``
joins several.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterator, Sequence

import numpy as np

from distinit_plugin.errors import SAME_ON_ALL_RANKS, UserError
from distinit_plugin.registry import CORPORA, lookup
from distinit_plugin.video import benchmarks, formats
from distinit_plugin.video.records import Corpus, CorpusSource, Listing, VideoRecord

__all__ = ["BY_SIZE", "Corpus", "CorpusSource", "Listing", "Mixture", "VideoRecord", "load_corpus"]

BY_SIZE = -1.0
"""The weight that means: in proportion to the number of videos."""

FORMAT_MODULES = (formats, benchmarks)
"""Imported so that their readers are registered."""

_logger = logging.getLogger(__name__)


def load_corpus(
    fmt: str,
    name: str,
    *,
    path: str,
    root: str = "",
    subset: str = "",
    split: int = 1,
    labeled: bool = False,
    classes: str = "",
    separator: str = " ",
    weight: float = 1.0,
) -> Corpus:
    """Read one corpus. No video is opened or looked at; repeated and absent videos are named in the log.

    Args:
        fmt: ``folder``, ``list``, ``csv``, ``ucf101``, ``hmdb51``, ``kinetics``, ``frames``, or a registered one.
        name: The corpus's name in the configuration, for messages.
        path: The folder, list file, csv, or folder of split files.
        root: Folder that relative paths start from; empty: the folder of the list.
        subset: ``train`` or ``test`` of UCF-101 and HMDB-51; a split name of a Kinetics csv.
        split: Split of UCF-101 and HMDB-51: 1, 2 or 3.
        labeled: Take the labels; otherwise every record's label is ``None``.
        classes: File of class names, one per line (csv, kinetics, folder, frames).
        separator: Between path and label of a csv; the last one in a row counts; empty: any white space.
        weight: Share of the training clips relative to other corpora, above 0; -1: by size.

    Raises:
        UserError: Anything wrong with the arguments or the files.
    """
    reader = lookup(CORPORA, fmt, f"Corpus '{name}', FORMAT")
    source = CorpusSource(
        where=f"Corpus '{name}' ({fmt})",
        path=os.path.expanduser(path),
        root=os.path.expanduser(root),
        subset=subset,
        split=split,
        labeled=labeled,
        classes=os.path.expanduser(classes),
        separator=separator,
    )
    if not path:
        raise source.error("PATH is empty; it must name the folder, list or csv to read.")
    if root and not os.path.isdir(source.root):
        raise source.error(f"ROOT {root} is not a folder; it must be the folder where the videos are.")
    if not (weight == BY_SIZE or (weight > 0 and math.isfinite(weight))):
        raise source.error(f"WEIGHT is {weight:g}; it must be above 0, or -1 for a share in proportion to the size.")
    corpus = Corpus(name, reader(source), weight)
    for note in corpus.notes:
        _logger.warning("%s: %s", source.where, note, extra=SAME_ON_ALL_RANKS)
    return corpus


class Mixture:
    """Several corpora under one index: the videos of the first, then those of the second, and so on.

    Attributes:
        corpora: The corpora.
        sizes: Number of videos of each.
        weights: Share of the training clips of each; they sum to 1.
    """

    def __init__(self, corpora: Sequence[Corpus]) -> None:
        """Join corpora.

        Raises:
            UserError: None given, some labeled and some not, different class names, or a mix of WEIGHT -1 and others.
        """
        if not corpora:
            raise UserError("There is no corpus: name at least one, with its FORMAT and PATH.")
        self.corpora = tuple(corpora)
        self.sizes = tuple(len(corpus) for corpus in corpora)
        self._starts = np.concatenate([[0], np.cumsum(self.sizes)])
        self.weights = self._shares()
        self._check_labels_agree()

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> VideoRecord:
        corpus, local = self.locate(index)
        return self.corpora[corpus][local]

    def __iter__(self) -> Iterator[VideoRecord]:
        return (record for corpus in self.corpora for record in corpus)

    def locate(self, index: int) -> tuple[int, int]:
        """The number of the corpus that holds video ``index``, and the video's number in it."""
        if not 0 <= index < len(self):
            raise IndexError(f"there are {len(self)} videos, there is no number {index}")
        corpus = int(np.searchsorted(self._starts, index, side="right")) - 1
        return corpus, index - int(self._starts[corpus])

    @property
    def digests(self) -> tuple[str, ...]:
        """Of each corpus, see ``Corpus.digest``."""
        return tuple(corpus.digest() for corpus in self.corpora)

    def names(self) -> Iterator[str]:
        """What tells a video from the others wherever the corpora lie, in their order.

        Paths as in the lists; of several corpora the corpus's name stands before.
        """
        for corpus in self.corpora:
            prefix = f"{corpus.name}/" if len(self.corpora) > 1 else ""
            for number in range(len(corpus)):
                yield prefix + corpus.relative(number)

    @property
    def num_videos(self) -> int:
        """Number of videos of all corpora."""
        return len(self)

    @property
    def labeled(self) -> bool:
        """Whether the records have labels (all of them have, or none)."""
        return self.corpora[0].labeled

    @property
    def class_names(self) -> list[str] | None:
        """The names of the classes, from the first corpus that knows them."""
        return next((corpus.class_names for corpus in self.corpora if corpus.class_names is not None), None)

    @property
    def num_classes(self) -> int | None:
        """Number of classes that the labels need; ``None`` when unlabeled."""
        counts = [corpus.num_classes for corpus in self.corpora if corpus.num_classes is not None]
        return max(counts) if counts else None

    def check_labels(self, num_classes: int) -> None:
        """Refuse labels that a classifier with ``num_classes`` outputs does not have (UserError)."""
        for corpus in self.corpora:
            corpus.check_labels(num_classes)

    def _shares(self) -> tuple[float, ...]:
        weights = [corpus.weight for corpus in self.corpora]
        by_size = [weight == BY_SIZE for weight in weights]
        if any(by_size) and not all(by_size):
            named = ", ".join(f"{corpus.name}: {corpus.weight:g}" for corpus in self.corpora)
            raise UserError(
                f"WEIGHT -1 (by size) cannot be mixed with other weights ({named}): set it for all corpora or for none."
            )
        values = [float(size) for size in self.sizes] if all(by_size) else weights
        return tuple(value / sum(values) for value in values)

    def _check_labels_agree(self) -> None:
        labeled = [corpus.name for corpus in self.corpora if corpus.labeled]
        unlabeled = [corpus.name for corpus in self.corpora if not corpus.labeled]
        if labeled and unlabeled:
            raise UserError(
                f"Labeled corpora ({', '.join(labeled)}) cannot be mixed with unlabeled ones ({', '.join(unlabeled)}): "
                "set LABELED to the same value for all of them."
            )
        named = [corpus for corpus in self.corpora if corpus.class_names is not None]
        for corpus in named[1:]:
            if labeled and corpus.class_names != named[0].class_names:
                raise UserError(
                    f"Corpora '{named[0].name}' and '{corpus.name}' have different classes, so that one label would "
                    "mean two things: give both the same CLASSES file."
                )
