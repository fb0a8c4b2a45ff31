"""A folder with the flow of a corpus: what all of it has in common in ``store.json``, and one file or folder per video.

The files lie as the videos do below their root, so that a store and its corpus can be moved together or apart. Each
knows the video that it was made from.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal, Self

from distinit_plugin.errors import UserError
from distinit_plugin.files import read_json, why_unusable, write_text
from distinit_plugin.flow.codes import DEFAULT_BOUND, Quantiser, Rounding
from distinit_plugin.flow.compute import SizeRule
from distinit_plugin.flow.entries import CODECS, SUFFIX, EntryReader
from distinit_plugin.flow.folders import FlowArray, PictureFolder
from distinit_plugin.flow.identity import Identity, stamp
from distinit_plugin.flow.source import FlowSource, MissingFlowError

Layout = Literal["store", "jpg", "npy"]

STORE_FILE = "store.json"
PICTURES_FILE = "flow.json"
"""In a folder of pictures: what the tag of a flow file says. It is written last."""

FORMAT_VERSION = 1
_MAX_JSON_BYTES = 1 << 20
_MAX_NAME_BYTES = 200
_MAX_VERDICTS = 100_000


@dataclass(frozen=True)
class FlowSettings:
    """What all flows of a store have in common.

    Attributes:
        backend: Identity of what computed them.
        bound: Of the codes, pixels of the flow's own size.
        rounding: Of the codes.
        size: ``SizeRule`` in words; frames were resized before.
        fps: Frames per second that were picked before; ``None``: all of the video's.
        layout: ``store``: one video file each; ``jpg``: folders of pictures.
        codec: Of the video files.
        quality: Of the pictures, 1 to 100.
    """

    backend: str
    bound: float = DEFAULT_BOUND
    rounding: Rounding = "round"
    size: str = "256"
    fps: float | None = None
    layout: Layout = "store"
    codec: str = "h264"
    quality: int = 95

    def __post_init__(self) -> None:
        """Refuse what cannot be (ValueError)."""
        Quantiser(self.bound, self.rounding)
        SizeRule.parse(self.size)
        if self.fps is not None and not 0 < self.fps <= 1000:
            raise ValueError(f"a frame rate of {self.fps} is not possible. Allowed: above 0, at most 1000")
        if self.layout not in ("store", "jpg"):
            raise ValueError(f"layout {self.layout} is not possible. Allowed: store, jpg")
        if self.codec not in CODECS:
            raise ValueError(f"codec {self.codec} is not possible. Allowed: {', '.join(CODECS)}")
        if not 1 <= self.quality <= 100:
            raise ValueError(f"quality {self.quality} is not possible. Allowed: 1 to 100")

    @property
    def quantiser(self) -> Quantiser:
        """What the codes mean."""
        return Quantiser(self.bound, self.rounding)

    def differences(self, other: FlowSettings) -> list[str]:
        """``bound: 20 there, 32 now`` for each setting that matters and differs; ``other`` is that of now."""
        unused = {"quality"} if self.layout == "store" else {"codec"}
        names = [field.name for field in fields(self) if field.name not in unused or self.layout != other.layout]
        pairs = [(name, getattr(self, name), getattr(other, name)) for name in names]
        return [f"{name}: {_word(there)} there, {_word(now)} now" for name, there, now in pairs if there != now]


def _word(value: Any) -> str:
    return "native" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


class FlowStore:
    """Gives the flow of videos by their paths.

    Attributes:
        folder: Where it is.
        settings: What its flows have in common; ``None`` for flow of other programs.
        quantiser: What the codes mean.
        layout: Kind of its files.
        root: Folder of the videos that it was made from.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        quantiser: Quantiser,
        layout: Layout,
        *,
        root: str = "",
        settings: FlowSettings | None = None,
    ) -> None:
        """See ``open``, ``foreign`` and ``settle``, which check what they are given."""
        self.folder = Path(folder)
        self.quantiser = quantiser
        self.layout: Layout = layout
        self.root = root
        self.settings = settings
        self._verdicts: dict[tuple[str, str, tuple[int, int] | None], bool] = {}

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> Self:
        """A store that ``distinit extract-flow`` made.

        Raises:
            UserError: There is none, or its ``store.json`` is damaged.
        """
        path = Path(folder) / STORE_FILE
        settings, root = _read_settings(path)
        return cls(folder, settings.quantiser, settings.layout, root=root, settings=settings)

    @classmethod
    def foreign(cls, folder: str | os.PathLike[str], layout: Layout, quantiser: Quantiser) -> Self:
        """Flow that other programs made: ``jpg`` (denseflow's folders) or ``npy`` (I3D's arrays), named as the videos.

        Args:
            folder: Where it is; videos are found by the last parts of their paths, without the ending.
            layout: ``jpg`` or ``npy``.
            quantiser: How it was quantised, which such files do not say.

        Raises:
            UserError: The folder is not there, or it is a store of this program.
        """
        if not os.path.isdir(folder):
            raise UserError(f"{folder} is no folder of flow. Name one that is there.")
        if (Path(folder) / STORE_FILE).exists():
            raise UserError(f"{folder} has a {STORE_FILE}, which says how its flow was made: set FLOW.LAYOUT store.")
        if layout not in ("jpg", "npy"):
            raise UserError(f"flow of other programs cannot be of layout '{layout}'. Allowed: jpg, npy.")
        return cls(folder, quantiser, layout)

    @classmethod
    def settle(cls, folder: str | os.PathLike[str], settings: FlowSettings, root: str) -> Self:
        """A store to write to: a new one, or one of the same settings and corpus.

        Raises:
            UserError: The folder holds flow that was made otherwise or of another corpus, or cannot be written.
        """
        path = Path(folder) / STORE_FILE
        if path.exists():
            known, known_root = _read_settings(path)
            if differing := known.differences(settings):
                raise UserError(
                    f"the flow in {folder} was made otherwise ({'; '.join(differing)}). Name another folder."
                )
            if known_root != root and os.path.isdir(known_root):
                raise UserError(
                    f"the flow in {folder} is that of the videos below {known_root}, not of those below {root}. Name "
                    "another folder, or the root of both by --root."
                )
            if known_root == root:
                return cls(folder, settings.quantiser, settings.layout, root=root, settings=known)
        head = {"format": "distinit flow", "version": FORMAT_VERSION, "root": root}
        write_text(path, json.dumps({**head, **asdict(settings)}, indent=2) + "\n")
        return cls(folder, settings.quantiser, settings.layout, root=root, settings=settings)

    def place_of(self, path: str) -> Path:
        """The file or folder that holds, or will hold, the flow of a video below the root."""
        return self._place(os.path.relpath(os.path.abspath(path), self.root))

    def reader(self, path: str, *, timeout: float | None = None) -> FlowSource:
        """The flow of a video.

        Args:
            path: The video; where it is not below the store's root, the last parts of its path have to be the same.
            timeout: Seconds that its file may take; ``None``: no limit.

        Raises:
            MissingFlowError: It is not here, is that of another video or an earlier state of this one, or is damaged.
            VideoError: The video itself is not there.
        """
        problem: MissingFlowError | None = None
        for place in self._places(path):
            if not place.exists():
                continue
            try:
                return self.open_place(place, path, timeout=timeout)
            except MissingFlowError as error:
                problem = problem or error
        raise problem or MissingFlowError(path, f"its flow is not in {self.folder} (distinit extract-flow makes it)")

    def open_place(self, place: Path, path: str, *, timeout: float | None = None) -> FlowSource:
        """As ``reader``, where the place is known."""
        if self.layout == "npy":
            return FlowArray(place, self.quantiser, path=path, timeout=timeout)
        if self.layout == "jpg":
            if self.settings is not None:
                self._check(place, path, self.describe(place, path))
            return PictureFolder(place, self.quantiser, path=path, timeout=timeout)
        reader = EntryReader(place, path=path, timeout=timeout)
        try:
            self._check(place, path, reader.description)
        except BaseException:
            reader.close()
            raise
        return reader

    def describe(self, place: Path, path: str) -> dict[str, Any]:
        """What the file that was written last into a folder of pictures says.

        Raises:
            MissingFlowError: It is not there or damaged.
        """
        try:
            return read_json(place / PICTURES_FILE, _MAX_JSON_BYTES)
        except (OSError, ValueError, RecursionError) as error:
            raise MissingFlowError(
                path, f"its flow {place} is not whole ({PICTURES_FILE}: {why_unusable(error)})"
            ) from error

    def _check(self, place: Path, path: str, description: dict[str, Any]) -> None:
        """The flow is of this video and as the store says."""
        assert self.settings is not None
        try:
            source = Identity.from_dict(description["source"])
            made = {name: description[name] for name in ("backend", "bound", "rounding", "size", "fps")}
        except (LookupError, TypeError, ValueError) as error:
            raise MissingFlowError(path, f"its flow {place} does not say how it was made") from error
        wanted = asdict(self.settings)
        for name, value in made.items():
            if value != wanted[name]:
                raise MissingFlowError(
                    path,
                    f"its flow {place} was made otherwise ({name}: {_word(value)}, the store's {_word(wanted[name])})",
                )
        key = (path, source.sha256, stamp(path) if os.path.isfile(path) else None)  # folders are looked at once
        if key not in self._verdicts:
            if len(self._verdicts) >= _MAX_VERDICTS:
                self._verdicts.clear()
            self._verdicts[key] = source.is_of(path)
        if not self._verdicts[key]:
            raise MissingFlowError(path, f"its flow {place} is that of another video, or of an earlier state of it")

    def _place(self, relative: str) -> Path:
        return self.folder / place_name(relative, self.layout)

    def _places(self, path: str) -> Iterator[Path]:
        """Where the flow may be: below the root, then by ever fewer parts of the path."""
        absolute = os.path.abspath(path)
        if self.root and os.path.commonpath([absolute, self.root]) == self.root:
            yield self._place(os.path.relpath(absolute, self.root))
        parts = Path(absolute).parts[1:]
        for first in range(len(parts)):
            yield self._place(os.path.join(*parts[first:]))


def place_name(relative: str, layout: Layout) -> str:
    """Of the flow of a video in a store, by its path below the root."""
    head, name = os.path.split(relative)
    if layout != "store":
        name = os.path.splitext(name)[0]
    if len(os.fsencode(name)) > _MAX_NAME_BYTES:  # with what is added, file systems would refuse it
        name = f"{name[:40]}-{sha256(os.fsencode(name)).hexdigest()[:16]}"
    return os.path.join(head, name + {"store": SUFFIX, "jpg": "", "npy": ".npy"}[layout])


def _read_settings(path: Path) -> tuple[FlowSettings, str]:
    if not path.is_file():
        raise UserError(f"{path.parent} is no flow store: it has no {STORE_FILE} (distinit extract-flow makes one).")
    try:
        values = read_json(path, _MAX_JSON_BYTES)
        if values.get("format") != "distinit flow" or values.get("version") != FORMAT_VERSION:
            raise ValueError(f"it is not of format version {FORMAT_VERSION}")
        casts: dict[str, Callable[[Any], Any]] = {
            "backend": str, "bound": float, "rounding": str, "size": str, "layout": str, "codec": str, "quality": int,
            "fps": lambda fps: None if fps is None else float(fps),
        }  # fmt: skip
        root = values["root"]
        if not isinstance(root, str) or (root and not os.path.isabs(root)):
            raise ValueError("its root is no whole path")
        return FlowSettings(**{name: cast(values[name]) for name, cast in casts.items()}), root
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise UserError(
            f"{path} is damaged ({why_unusable(error)}). Write it as it was (its flow files say the same), or name "
            "another folder."
        ) from error
