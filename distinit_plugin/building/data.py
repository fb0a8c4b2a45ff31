"""Corpora, datasets, samplers and loaders."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from distinit_plugin.building.flow import build_stored_flow
from distinit_plugin.building.keyframes import build_keyframe_dataset, build_keyframes
from distinit_plugin.building.networks import needs_own_logits
from distinit_plugin.building.targets import shown_grid, training_grid
from distinit_plugin.config.node import CfgNode
from distinit_plugin.data.dataset import ClipDataset
from distinit_plugin.data.keyframes import KeyframeDataset
from distinit_plugin.data.loader import ClipLoader, build_batch_loader, build_loader
from distinit_plugin.data.records import Records
from distinit_plugin.data.sampler import ClipSampler, KeyframeBatches, ViewSampler
from distinit_plugin.data.targets import CachedTargets
from distinit_plugin.detection.keyframes import Keyframes
from distinit_plugin.engine import distributed
from distinit_plugin.engine.progress import NoProgress, ProgressView
from distinit_plugin.errors import Problems, UserError
from distinit_plugin.types import Network, Split, ViewSpec
from distinit_plugin.video.corpus import Corpus, Mixture, load_corpus


def view_specs(student: Network, teachers: Mapping[str, Network], split: Split) -> dict[str, ViewSpec]:
    """Every view that the job needs, as ``consumer/view``."""
    networks = {"student": student, **teachers}
    return {
        f"{consumer}/{view}": spec
        for consumer, network in networks.items()
        for view, spec in network.view_specs(split).items()
    }


FRAME_INDEX_FOLDER = "frame_index"
"""Below OUTPUT_DIR: workers start anew in each epoch, and files without a container index are slow to index."""

CORPUS_KEYS: dict[Split, str] = {"train": "TRAIN", "val": "VAL", "test": "TEST"}
"""Nodes of CORPUS by use."""


def has_corpus(cfg: CfgNode, split: Split) -> bool:
    """Whether the configuration names videos for a use: in CORPUS, as PySlowFast's ``{split}.csv``, or keyframes."""
    if cfg.DETECTION.ENABLE:
        return True
    has_list = bool(cfg.DATA.PATH_TO_DATA_DIR) and _pyslowfast_list(cfg, split).is_file()
    return has_list or bool(cfg.CORPUS[CORPUS_KEYS[split]])


def build_records(cfg: CfgNode, split: Split, *, labeled: bool | None = None) -> Mixture | Keyframes:
    """What samples of a use are made of: videos, or with DETECTION.ENABLE keyframes; see ``build_corpora``.

    Raises:
        UserError: There are none, or something is wrong with their files.
    """
    return build_keyframes(cfg, split) if cfg.DETECTION.ENABLE else build_corpora(cfg, split, labeled=labeled)


def build_corpora(cfg: CfgNode, split: Split, *, labeled: bool | None = None) -> Mixture:
    """Read the corpora of a use.

    Args:
        cfg: The configuration.
        split: Which of CORPUS.TRAIN, CORPUS.VAL, CORPUS.TEST; without any, PySlowFast's
            ``DATA.PATH_TO_DATA_DIR/{split}.csv`` is read.
        labeled: Override each node's LABELED.

    Raises:
        UserError: There is none, or something is wrong with one.
    """
    nodes = cfg.CORPUS[CORPUS_KEYS[split]]
    if not nodes:
        return Mixture([_load_pyslowfast_list(cfg, split, needs_own_logits(cfg) if labeled is None else labeled)])
    default_subset = "train" if split == "train" else "test"
    corpora: list[Corpus] = []
    problems = Problems()
    for name, node in sorted(nodes.items()):
        with problems.collect():
            corpus = load_corpus(
                node.FORMAT,
                name,
                path=node.PATH,
                root=node.ROOT,
                subset=node.SUBSET or (default_subset if node.FORMAT in ("ucf101", "hmdb51") else ""),
                split=cfg.CORPUS.SPLIT,
                labeled=node.LABELED if labeled is None else labeled,
                classes=node.CLASSES,
                separator=cfg.DATA.PATH_LABEL_SEPARATOR,
                weight=node.WEIGHT,
            )
            corpora.append(corpus)
    problems.raise_if_any()
    return Mixture(corpora)


def _pyslowfast_list(cfg: CfgNode, split: Split) -> Path:
    return Path(cfg.DATA.PATH_TO_DATA_DIR) / f"{split}.csv"


def _load_pyslowfast_list(cfg: CfgNode, split: Split, labeled: bool) -> Corpus:
    path = _pyslowfast_list(cfg, split)
    if not cfg.DATA.PATH_TO_DATA_DIR:
        raise UserError(
            f"There are no videos: name a corpus below CORPUS.{CORPUS_KEYS[split]}, for example --opts "
            f"CORPUS.{CORPUS_KEYS[split]}.VIDEOS.PATH /folder/of/videos, or give PySlowFast's {split}.csv by "
            "DATA.PATH_TO_DATA_DIR."
        )
    return load_corpus(
        "csv",
        f"{split}.csv",
        path=str(path),
        root=cfg.DATA.PATH_PREFIX,
        labeled=labeled,
        separator=cfg.DATA.PATH_LABEL_SEPARATOR,
    )


def build_dataset(
    cfg: CfgNode,
    videos: Records,
    specs: Mapping[str, ViewSpec],
    split: Split,
    *,
    keep_index: bool = True,
    targets: Mapping[str, CachedTargets] | None = None,
    clip_spec: ViewSpec | None = None,
) -> ClipDataset:
    """Records + decoding + sampling + views.

    Args:
        cfg: The configuration.
        videos: From ``build_records``.
        specs: ``consumer/view`` → what that network must be fed.
        split: Which use.
        keep_index: Keep the videos' time stamps on disk (CORPUS.INDEX_CACHE); else in memory only.
        targets: From ``build_targets``.
        clip_spec: What the clip is; ``None``: the student's first view of ``specs``.
    """
    index_cache = _index_folder(cfg) if keep_index else None
    if isinstance(videos, Keyframes):
        return build_keyframe_dataset(cfg, videos, specs, split, index_cache=index_cache)
    clip_spec = clip_spec or next(spec for name, spec in specs.items() if name.startswith("student/"))
    is_test = split == "test"
    low, high = cfg.DATA.TRAIN_JITTER_SCALES
    return ClipDataset(
        videos,
        specs,
        clip_spec=clip_spec,
        split=split,
        seed=cfg.RNG_SEED,
        scales=(low, high),
        flip=cfg.DATA.RANDOM_FLIP,
        test_scale=cfg.CORPUS.TEST_SCALE,
        num_clips=cfg.TEST.NUM_ENSEMBLE_VIEWS if is_test else 1,
        num_crops=cfg.TEST.NUM_SPATIAL_CROPS if is_test else 1,
        test_clips=cfg.CORPUS.TEST_CLIPS if is_test else "uniform",
        dense_stride=cfg.CORPUS.DENSE_STRIDE,
        timeout=cfg.CORPUS.DECODE_TIMEOUT or None,
        index_cache=index_cache,
        flow=build_stored_flow(cfg) if any(spec.modality == "flow" for spec in specs.values()) else None,
        grid=training_grid(cfg),
        targets=targets,
    )


def _index_folder(cfg: CfgNode) -> str:
    return cfg.CORPUS.INDEX_CACHE or str(Path(cfg.OUTPUT_DIR) / FRAME_INDEX_FOLDER)


def build_grid_dataset(
    cfg: CfgNode, videos: Mixture, view: ViewSpec, clip_spec: ViewSpec, split: Split, *, keep_index: bool = True
) -> ClipDataset:
    """One teacher's view of every clip and crop that a training or validation shows, which keys number.

    Args:
        cfg: The configuration.
        videos: From ``build_corpora``.
        view: What the teacher is fed.
        clip_spec: The student's first view.
        split: ``train`` or ``val``.
        keep_index: As for ``build_dataset``.
    """
    grid = shown_grid(cfg, split, view)
    return ClipDataset(
        videos,
        {f"teacher/{view.modality}": view},
        clip_spec=clip_spec,
        split="test",
        seed=cfg.RNG_SEED,
        test_scale=grid.scale,
        num_clips=grid.clips,
        num_crops=grid.crops,
        timeout=cfg.CORPUS.DECODE_TIMEOUT or None,
        index_cache=_index_folder(cfg) if keep_index else None,
        flow=build_stored_flow(cfg) if view.modality == "flow" else None,
    )


def build_train_sampler(cfg: CfgNode, videos: Records, *, all_ranks: bool = False) -> ClipSampler:
    """The stream of training keys of this rank, or of all ranks together."""
    return ClipSampler(
        videos.sizes,
        videos.weights,
        num_clips_per_epoch=cfg.RUNNER.CLIPS_PER_EPOCH,
        global_batch_size=cfg.TRAIN.BATCH_SIZE * cfg.NUM_SHARDS,
        seed=cfg.RNG_SEED,
        rank=0 if all_ranks else distributed.rank(),
        world_size=1 if all_ranks else distributed.world_size(),
    )


def pins_memory(cfg: CfgNode) -> bool:
    """Whether batches are page-locked: a job on the CPU leaves the GPUs of its machine alone."""
    return bool(cfg.DATA_LOADER.PIN_MEMORY and cfg.NUM_GPUS > 0)


def build_train_loader(
    cfg: CfgNode, dataset: ClipDataset, sampler: ClipSampler, *, num_workers: int | None = None
) -> ClipLoader:
    """Micro-batches of this rank; ``num_workers``: instead of DATA_LOADER.NUM_WORKERS."""
    per_step = cfg.TRAIN.BATCH_SIZE * cfg.NUM_SHARDS
    parts = distributed.world_size() * cfg.RUNNER.ACCUMULATE
    if per_step % parts:
        raise UserError(
            f"TRAIN.BATCH_SIZE × NUM_SHARDS = {per_step} cannot be divided among {distributed.world_size()} ranks × "
            f"RUNNER.ACCUMULATE {cfg.RUNNER.ACCUMULATE}: make it a multiple of {parts}."
        )
    return build_loader(
        dataset,
        sampler,
        per_step // parts,
        num_workers=cfg.DATA_LOADER.NUM_WORKERS if num_workers is None else num_workers,
        pin_memory=pins_memory(cfg),
        drop_last=True,
    )


def build_test_loader(
    cfg: CfgNode, dataset: ClipDataset, *, num_crops: int = 1, progress: ProgressView | None = None
) -> ClipLoader:
    """Every clip and crop of every video once, dealt to the ranks by video; of keyframes each one once.

    All ranks must call it: dense clips are counted first, by each rank those of its own videos; ``progress`` shows it.
    """
    rank, world_size = distributed.rank(), distributed.world_size()
    batch_size = max(1, cfg.TEST.BATCH_SIZE // distributed.local_world_size())
    workers, pin_memory = cfg.DATA_LOADER.NUM_WORKERS, pins_memory(cfg)
    if isinstance(dataset, KeyframeDataset):
        crop = int(cfg.AVA.TEST_FORCE_FLIP)
        batches = KeyframeBatches(dataset.keyframes.video, batch_size, crop=crop, rank=rank, world_size=world_size)
        return build_batch_loader(dataset, batches, num_workers=workers, pin_memory=pin_memory)
    own_videos = len(range(rank, len(dataset), world_size))
    shown = progress if progress is not None and dataset.has_dense_clips else NoProgress()
    with shown.work("counting clips", own_videos) as advance:
        clips = dataset.clips_per_video(
            num_workers=workers,
            rank=rank,
            world_size=world_size,
            gather_objects=distributed.gather_objects,
            on_video=advance,
        )
    sampler = ViewSampler(clips, num_crops, rank=rank, world_size=world_size)
    return build_loader(dataset, sampler, batch_size, num_workers=workers, pin_memory=pin_memory)
