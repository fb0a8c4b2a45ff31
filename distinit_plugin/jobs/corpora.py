"""The videos of a job, each list read once: for the check before the job, and for the job."""

from __future__ import annotations

import logging

from distinit_plugin import build
from distinit_plugin.config.node import CfgNode
from distinit_plugin.types import Split
from distinit_plugin.video.corpus import Mixture

logger = logging.getLogger(__name__)


class Corpora:
    """The corpora of a configuration by use, read when they are first asked for and kept."""

    def __init__(self, cfg: CfgNode) -> None:
        """Nothing is read yet."""
        self._cfg = cfg
        self._known: dict[tuple[Split, bool | None], Mixture] = {}
        self._unsaid: set[tuple[Split, bool | None]] = set()

    def of(self, split: Split, *, labeled: bool | None = None) -> Mixture:
        """The corpora of a use; what is odd about their lists is named in the log once.

        Args:
            split: Which use.
            labeled: Override each node's LABELED.

        Raises:
            UserError: There is none, or something is wrong with one.
        """
        key = (split, labeled)
        if key not in self._known:
            self._known[key] = build.build_corpora(self._cfg, split, labeled=labeled)
        elif key in self._unsaid:
            for corpus in self._known[key].corpora:
                for note in corpus.notes:
                    logger.warning("CORPUS.%s.%s: %s", build.CORPUS_KEYS[split], corpus.name, note)
        self._unsaid.discard(key)
        return self._known[key]

    def peek(self, split: Split, *, labeled: bool | None = None) -> Mixture:
        """As ``of``, before there is a log: the notes are left for ``of``."""
        key = (split, labeled)
        if key not in self._known:
            self._known[key] = build.build_corpora(self._cfg, split, labeled=labeled)
            self._unsaid.add(key)
        return self._known[key]
