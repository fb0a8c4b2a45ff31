"""The videos of a job, each list read once: for the check before the job, and for the job."""

from __future__ import annotations

import logging

from distinit_plugin import build
from distinit_plugin.config.node import CfgNode
from distinit_plugin.detection.keyframes import Keyframes
from distinit_plugin.errors import UserError
from distinit_plugin.types import Split
from distinit_plugin.video.corpus import Mixture

logger = logging.getLogger(__name__)


class Corpora:
    """The corpora of a configuration by use, read when they are first asked for and kept."""

    def __init__(self, cfg: CfgNode) -> None:
        """Nothing is read yet."""
        self._cfg = cfg
        self._known: dict[tuple[Split, bool | None], Mixture | Keyframes] = {}
        self._unsaid: set[tuple[Split, bool | None]] = set()

    def of(self, split: Split, *, labeled: bool | None = None) -> Mixture | Keyframes:
        """The corpora of a use (keyframes with DETECTION.ENABLE); what is odd about them is named in the log once.

        Args:
            split: Which use.
            labeled: Override each node's LABELED.

        Raises:
            UserError: There is none, or something is wrong with one.
        """
        key = (split, labeled)
        if key in self._unsaid:  # otherwise they are said when they are read
            self._say(split, self._known[key])
        self._unsaid.discard(key)
        return self._read(key)

    def clips(self, split: Split, *, labeled: bool | None = None) -> Mixture:
        """As ``of``, for jobs that show whole videos or clips of them.

        Raises:
            UserError: As ``of``, or the configuration is one of keyframes.
        """
        videos = self.of(split, labeled=labeled)
        if isinstance(videos, Keyframes):
            raise UserError(
                "DETECTION.ENABLE: True, but this job works on clips of videos, not on boxes in keyframes. Set it "
                "False, and name videos in CORPUS."
            )
        return videos

    def peek(self, split: Split, *, labeled: bool | None = None) -> Mixture | Keyframes:
        """As ``of``, before there is a log: the notes are left for ``of``."""
        key = (split, labeled)
        if key not in self._known:
            self._unsaid.add(key)
        return self._read(key)

    def _read(self, key: tuple[Split, bool | None]) -> Mixture | Keyframes:
        if key not in self._known:
            self._known[key] = build.build_records(self._cfg, key[0], labeled=key[1])
        return self._known[key]

    def _say(self, split: Split, videos: Mixture | Keyframes) -> None:
        for part in [videos] if isinstance(videos, Keyframes) else videos.corpora:
            name = part.name if isinstance(part, Keyframes) else f"CORPUS.{build.CORPUS_KEYS[split]}.{part.name}"
            for note in part.notes:
                logger.warning("%s: %s", name, note)
