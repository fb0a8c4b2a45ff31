"""The outputs of a teacher for all that a training will show it, into a cache; what was interrupted goes on."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from rich.console import Console
from torch import Tensor, nn

from distinit_plugin import build
from distinit_plugin.config.node import CfgNode
from distinit_plugin.data.loader import build_batch_loader
from distinit_plugin.engine import distributed
from distinit_plugin.engine.meters import duration_text
from distinit_plugin.errors import UserError, naming
from distinit_plugin.files import writing_alone
from distinit_plugin.jobs.launching import launch, starts_ranks
from distinit_plugin.jobs.repaired import readable_now
from distinit_plugin.jobs.session import Session, example_views, open_session
from distinit_plugin.objectives.adapters import POOLED, layer_output, tapped_layers
from distinit_plugin.registry import near_matches
from distinit_plugin.teachers.cache import TargetLayout, TargetStore
from distinit_plugin.teachers.frames import as_examples, averages_frames
from distinit_plugin.types import BadVideo, Batch, Network, SampleKey, Split, ViewSpec
from distinit_plugin.video.corpus import Mixture

logger = logging.getLogger(__name__)

SHARD_VIDEOS = 64
"""Videos of one file: what a kill costs at most."""


@dataclass
class CachedPart:
    """What became of the videos of one use.

    Attributes:
        folder: Of the store.
        videos: Number of them.
        clips: Clips and crops of all of them.
        made: Those of this call.
        bytes_per_clip: Of the store.
        seconds: That this call took.
        bad: Videos without targets.
    """

    folder: Path
    videos: int
    clips: int
    made: int
    bytes_per_clip: int
    seconds: float = 0.0
    bad: list[BadVideo] = field(default_factory=list)

    def to_text(self) -> str:
        """What a person wants to know at the end."""
        speed = f" ({self.made / max(self.seconds, 1e-9):.1f} clips/s)" if self.made else ""
        return (
            f"{self.folder}: {self.clips} clips of {self.videos} videos, {self.made} of them made now{speed}, "
            f"{len(self.bad)} videos bad; {self.bytes_per_clip} bytes per clip, "
            f"{self.bytes_per_clip / 1e3:.4g} GB per million clips"
        )


def cache_targets(
    cfg: CfgNode,
    teacher: str,
    output: str = "",
    *,
    dtype: str = "float16",
    shard_videos: int = SHARD_VIDEOS,
    console: Console | None = None,
) -> list[CachedPart]:
    """Compute and keep what a teacher gives for every clip and crop of the training grid, and for the validation.

    Ranks share the work, file by file.

    Args:
        cfg: The configuration that will train; the teacher's own CACHE does not count.
        teacher: Its name below DISTILL.TEACHERS.
        output: Folder of the cache; empty: the teacher's CACHE.
        dtype: ``float16`` or ``float32``.
        shard_videos: Videos of one file.
        console: For the progress; the standard output when ``None``, and in processes that are started.

    Raises:
        UserError: Anything that the user can put right.
    """
    folder = output or _entry(cfg, teacher).CACHE
    if not folder:
        raise UserError(f"where to? DISTILL.TEACHERS.{teacher}.CACHE is empty: set it, or name a folder by --output.")
    cfg = cfg.clone()
    cfg.defrost()
    cfg.DISTILL.TEACHERS[teacher].CACHE = ""
    cfg.freeze()
    _check(cfg, teacher)
    job = partial(
        _cache_here, teacher=teacher, folder=Path(folder).expanduser(), dtype=dtype, shard_videos=shard_videos
    )
    if starts_ranks(cfg):
        parts: list[CachedPart] = launch(cfg, job)
        return parts
    return job(cfg, console=console)


def _entry(cfg: CfgNode, teacher: str) -> CfgNode:
    known = list(cfg.DISTILL.TEACHERS)
    if teacher not in known:
        raise UserError(
            f"--teacher {teacher}: DISTILL.TEACHERS has no such entry.{near_matches(teacher, known)} Known: "
            f"{', '.join(known) or 'none'}."
        )
    entry: CfgNode = cfg.DISTILL.TEACHERS[teacher]
    return entry


def _check(cfg: CfgNode, teacher: str) -> None:
    entry, grid = _entry(cfg, teacher), cfg.DISTILL.GRID
    where = f"DISTILL.TEACHERS.{teacher}"
    if not grid.CLIPS:
        raise UserError("DISTILL.GRID.CLIPS: 0 is any clip, of which there are too many to store. Set a number (10).")
    if entry.VIEW == "shared" and not grid.CROPS:
        raise UserError(
            f"DISTILL.GRID.CROPS: 0 is any crop, of which there are too many to store. Set it to 1 or 3, or "
            f"{where}.VIEW center, with which the student keeps its random crops."
        )
    if entry.WEIGHTS == "random":
        raise UserError(f"{where}.WEIGHTS: random has no targets worth storing. Name the teacher's weights.")


def _cache_here(
    cfg: CfgNode, *, teacher: str, folder: Path, dtype: str, shard_videos: int, console: Console | None = None
) -> list[CachedPart]:
    """The work of one rank."""
    with open_session(cfg, log_to_folder=False, console=console) as session:
        student = outline(cfg)
        network = build.build_teacher(cfg, teacher)
        session.place(network)
        parts = []
        uses: list[Split] = ["train", "val"] if build.has_corpus(cfg, "val") else ["train"]
        for split in uses:
            part = build.cache_part(folder, split)
            if distributed.is_main():
                part.mkdir(parents=True, exist_ok=True)
            distributed.barrier()
            with writing_alone(part, "targets") if distributed.is_main() else nullcontext():
                clip = next(iter(student.view_specs(split).values()))
                job = _Part(session, network, teacher, split, clip)
                parts.append(job.run(part, dtype, shard_videos))
    return parts


def outline(cfg: CfgNode) -> Network:
    """The student without memory: only what it is fed counts."""
    try:
        with torch.device("meta"), torch.random.fork_rng(devices=[]):
            return build.build_network(cfg)
    except (NotImplementedError, RuntimeError):  # a registered network whose constructor computes with values
        return build.build_network(cfg)


class _Part:
    """One use of the videos."""

    def __init__(self, session: Session, teacher: Network, name: str, split: Split, clip: ViewSpec) -> None:
        cfg = session.cfg
        self._session, self._split, self._clip, self._name = session, split, clip, name
        self._network = teacher
        self._module = cast(nn.Module, teacher)
        self._layer: str = cfg.DISTILL.TEACHERS[name].LAYER
        (view,) = teacher.view_specs(split).values()
        self._each_frame = build.stores_each_frame(view)
        self._view = view
        if self._each_frame:
            self._refuse_joint_frames(view)
            self._view = replace(view, pick="uniform", num_frames=view.pick_from or clip.num_frames)
        self._grid = build.shown_grid(cfg, split, view)
        self._finish = session.finisher({view.modality: self._view})
        self._batch_size: int = max(1, cfg.TEST.BATCH_SIZE // distributed.local_world_size())

    def run(self, folder: Path, dtype: str, shard_videos: int) -> CachedPart:
        """Make what is missing."""
        session, cfg = self._session, self._session.cfg
        videos = session.corpora.clips(self._split)
        layout = self._layout(len(videos), dtype, shard_videos)
        identity = build.describe_targets(cfg, self._name, self._split, self._clip)
        store = None
        for turn in (True, False):  # the main rank first, the others find what it has written
            if distributed.is_main() is turn:
                store = TargetStore.settle(folder, layout, identity, self._made(), videos.names())
            distributed.barrier()
        assert store is not None
        begin = time.monotonic()
        missing = [shard for shard in range(layout.shards) if not store.has(shard)]
        missing += distributed.gather_objects(self._repaired(store, videos) if distributed.is_main() else [])[0]
        distributed.barrier()  # all have looked before one writes
        own = missing[distributed.rank() :: distributed.world_size()]
        if own:
            self._make(store, videos, own)
        distributed.barrier()
        if distributed.is_main():
            store.finish()
        distributed.barrier()
        entries = layout.clips * layout.crops
        made = sum(row not in store.bad for shard in missing for row in layout.rows(shard)) * entries
        bad = [BadVideo(videos[row].path, reason) for row, reason in sorted(store.bad.items())]
        seconds = time.monotonic() - begin
        return CachedPart(folder, len(videos), len(videos) * entries, made, layout.bytes_per_clip, seconds, bad)

    def _repaired(self, store: TargetStore, videos: Mixture) -> list[int]:
        """Shards that are there and lack videos which can be read by now."""
        rows = {row: shard for shard in range(store.layout.shards) if store.has(shard) for row in store.bad_rows(shard)}
        paths = {row: videos[row].path for row in rows if 0 <= row < len(videos)}
        good = readable_now(sorted(paths.values()), self._session.cfg.CORPUS.DECODE_TIMEOUT)
        return sorted({rows[row] for row, path in paths.items() if path in good})

    # ------------------------------------------------------------------------------------------------ shards
    def _make(self, store: TargetStore, videos: Mixture, shards: list[int]) -> None:
        layout, session = store.layout, self._session
        dataset = build.build_grid_dataset(session.cfg, videos, self._view, self._clip, self._split)
        loader = build_batch_loader(
            dataset,
            _Batches(layout, shards, self._batch_size),
            num_workers=session.cfg.DATA_LOADER.NUM_WORKERS,
            pin_memory=build.pins_memory(session.cfg),
        )
        total = sum(len(layout.rows(shard)) for shard in shards) * layout.clips * layout.crops
        begin, done = time.monotonic(), 0
        with session.progress.work(f"targets of {self._name}, {self._split}", total) as advance:
            stream = iter(loader)
            for shard in shards:
                values = np.full(layout.shard_shape(shard), np.nan, dtype=layout.dtype)
                filled = np.zeros(values.shape[:2], dtype=bool)
                reasons: dict[str, str] = {}
                for keys in _keys(layout, shard, self._batch_size):
                    batch = next(stream)
                    reasons.update(batch["bad"])
                    self._fill(values, filled, layout, shard, batch)
                    done += len(keys)
                    seconds = max(time.monotonic() - begin, 1e-9)
                    left = duration_text(seconds / done * (total - done))
                    advance(done, f"{done / seconds:.1f} clips/s  {left} left")
                store.write(shard, values, _settle_bad(values, filled, layout.rows(shard), videos, reasons))

    def _fill(
        self,
        values: npt.NDArray[Any],
        filled: npt.NDArray[np.bool_],
        layout: TargetLayout,
        shard: int,
        batch: Batch,
    ) -> None:
        if not batch["keys"]:
            return
        outputs = self._outputs(self._finish(batch)).cpu().numpy()
        with np.errstate(over="ignore"):
            rounded = outputs.astype(layout.dtype)
        for key, path, output, kept in zip(batch["keys"], batch["paths"], outputs, rounded, strict=True):
            if not np.isfinite(kept).all():
                beyond = np.isfinite(output).all()
                problem = "beyond 65504, which float16 does not hold" if beyond else "not finite"
                fix = (
                    "Store them with --dtype float32."
                    if beyond
                    else "Look at its weights, or use RUNNER.PRECISION fp32."
                )
                raise UserError(f"the teacher {self._name} gives values for {path} that are {problem}. {fix}")
            place = key.index - layout.rows(shard).start, key.clip * layout.crops + key.crop
            values[place], filled[place] = kept, True

    # ----------------------------------------------------------------------------------------------- network
    def _outputs(self, views: dict[str, Tensor]) -> Tensor:
        """(B,frames,…), fp32, of finished views."""
        taps = tapped_layers([self._layer])

        def run(seen: dict[str, Tensor]) -> Tensor:
            with torch.no_grad(), self._session.precision.autocast():
                output = self._module(seen, taps=taps)
            return layer_output(output, self._layer, f"the teacher {self._name}").float()

        if not self._each_frame:
            return run(views).unsqueeze(1)
        clips = len(next(iter(views.values())))
        frames = as_examples(views)
        count = len(next(iter(frames.values())))
        rows = torch.cat(
            [
                run({name: view[begin : begin + self._batch_size] for name, view in frames.items()})
                for begin in range(0, count, self._batch_size)
            ]
        )
        return (rows if self._layer in POOLED else rows.squeeze(2)).unflatten(0, (clips, -1))

    def _layout(self, num_videos: int, dtype: str, shard_videos: int) -> TargetLayout:
        session = self._session
        views = example_views({self._view.modality: self._view}, 1, session.device, session.memory_format)
        with naming(f"DISTILL.TEACHERS.{self._name}"):
            _, frames, *shape = self._outputs(views).shape
        info = self._network.layers.get(self._layer)
        return TargetLayout(
            layer=self._layer,
            shape=tuple(shape),
            dtype=dtype,
            videos=num_videos,
            clips=self._grid.clips,
            crops=self._grid.crops_per_clip,
            frames=frames,
            each_frame=self._each_frame,
            shard_videos=min(shard_videos, num_videos),
            feature_dim=self._network.feature_dim,
            temporal_stride=info.temporal_stride if info else 0,
            spatial_stride=info.spatial_stride if info else 0,
        )

    def _made(self) -> dict[str, str]:
        session = self._session
        alone = ", one example at a time" if session.cfg.RUNNER.DETERMINISTIC else f", batches of {self._batch_size}"
        made = {"precision": session.precision.name + alone}
        if self._view.modality == "flow" and not session.cfg.FLOW.STORE:
            made["flow computed by"] = session.live_flow.identity
        return made

    def _refuse_joint_frames(self, view: ViewSpec) -> None:
        frozen: Any = self._network
        if not averages_frames(frozen.network):
            raise UserError(
                f"DISTILL.TEACHERS.{self._name}.FRAME_PICK: {view.pick} of a network that looks at its frames together "
                "has too many outcomes to store. Use clip, uniform or center."
            )


@dataclass(frozen=True)
class _Batches:
    """The batches of several files, listed as they are asked for: a corpus has millions of keys."""

    layout: TargetLayout
    shards: list[int]
    batch_size: int

    def __iter__(self) -> Iterator[list[SampleKey]]:
        for shard in self.shards:
            yield from _keys(self.layout, shard, self.batch_size)


def _keys(layout: TargetLayout, shard: int, batch_size: int) -> Iterator[list[SampleKey]]:
    """The batches of a file. None has clips of two files, so that what a batch holds does not depend on a kill."""
    keys = [
        SampleKey(0, (row * layout.clips + clip) * layout.crops + crop, row, clip, crop)
        for row in layout.rows(shard)
        for clip in range(layout.clips)
        for crop in range(layout.crops)
    ]
    for begin in range(0, len(keys), batch_size):
        yield keys[begin : begin + batch_size]


def _settle_bad(
    values: npt.NDArray[Any],
    filled: npt.NDArray[np.bool_],
    rows: range,
    videos: Mixture,
    reasons: dict[str, str],
) -> dict[int, str]:
    """A video of which one clip is missing has no targets at all; row → why."""
    bad = {}
    for place in map(int, np.flatnonzero(~filled.all(axis=1))):
        values[place] = np.nan
        bad[rows[place]] = reasons[videos[rows[place]].path]
    return bad
