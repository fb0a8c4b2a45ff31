"""Composition: from a configuration to the parts of a job. Everything else takes plain typed arguments."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from distinit_plugin.config.node import CfgNode
from distinit_plugin.data.dataset import ClipDataset
from distinit_plugin.data.loader import ClipLoader, build_loader
from distinit_plugin.data.sampler import ClipSampler, ViewSampler
from distinit_plugin.engine import distributed, optim
from distinit_plugin.engine.progress import NoProgress, ProgressView
from distinit_plugin.engine.schedule import Schedule
from distinit_plugin.errors import Problems, UserError, WeightsError, naming
from distinit_plugin.losses import build_loss
from distinit_plugin.models import factory as models
from distinit_plugin.models.network import InputSpec
from distinit_plugin.objectives import Objective, Term, build_adapter
from distinit_plugin.teachers import factory as teacher_factory
from distinit_plugin.types import Network, Split, ViewSpec
from distinit_plugin.video.corpus import Corpus, Mixture, load_corpus
from distinit_plugin.weights import LoadReport, inflate, load_weights


def needs_own_logits(cfg: CfgNode) -> bool:
    """Whether any term reads the student's own classifier; without one, none is built (it would never learn)."""
    return cfg.ACTION.LOSS_WEIGHT > 0 or any(
        entry.HEAD == "own" and entry.LAYER == "logits" and entry.LOSS_WEIGHT > 0
        for entry in cfg.DISTILL.TEACHERS.values()
    )


def input_spec(cfg: CfgNode) -> InputSpec:
    """What the student is fed, from the DATA and CORPUS nodes."""
    return InputSpec(
        num_frames=cfg.DATA.NUM_FRAMES,
        sampling_rate=cfg.DATA.SAMPLING_RATE,
        target_fps=cfg.CORPUS.TARGET_FPS or None,
        train_crop_size=cfg.DATA.TRAIN_CROP_SIZE,
        test_crop_size=cfg.DATA.TEST_CROP_SIZE,
        mean=tuple(cfg.DATA.MEAN),
        std=tuple(cfg.DATA.STD),
        modality=cfg.NETWORK.MODALITY,
        test_num_frames=cfg.CORPUS.TEST_NUM_FRAMES or None,
    )


def build_network(cfg: CfgNode, num_classes: int | None = None) -> Network:
    """The student of a configuration, at its random initialisation.

    Args:
        cfg: The configuration.
        num_classes: Outputs of its classifier; ``None``: ``MODEL.NUM_CLASSES`` where a term reads it, else none.
    """
    if num_classes is None:
        num_classes = cfg.MODEL.NUM_CLASSES if needs_own_logits(cfg) else 0
    return models.build_network(
        cfg.MODEL.MODEL_NAME,
        num_classes=num_classes,
        input=input_spec(cfg),
        dropout=cfg.MODEL.DROPOUT_RATE,
        depth=cfg.RESNET.DEPTH,
        **_switches(cfg.NETWORK),
    )


def _switches(node: CfgNode) -> dict[str, object]:
    """The keys of a NETWORK node as arguments; the modality is part of what a network is fed."""
    return {key.lower(): value for key, value in node.items() if key != "MODALITY"}


def initialize_network(cfg: CfgNode, network: Network) -> list[LoadReport]:
    """Put the weights that INIT and TRAIN.CHECKPOINT_FILE_PATH name into the network; reports of what went where.

    Raises:
        WeightsError: A file is missing, unreadable or of another network.
        UserError: The network has no 2D counterpart to be inflated from.
    """
    reports = []
    if cfg.INIT.INFLATE_FROM:
        with naming("INIT.INFLATE_FROM"):
            reports.append(inflate(network, cfg.INIT.INFLATE_FROM, cfg.INIT.INFLATE_WEIGHTS))
    if cfg.TRAIN.CHECKPOINT_FILE_PATH:
        with naming("TRAIN.CHECKPOINT_FILE_PATH"):
            report = load_weights(network, cfg.TRAIN.CHECKPOINT_FILE_PATH)
            _refuse_part_of_a_trunk(report)
        reports.append(report)
    return reports


def _refuse_part_of_a_trunk(report: LoadReport) -> None:
    """One layer may differ: the classifier. More than that is another network that happens to share names.

    Raises:
        WeightsError: Tensors of several layers are missing from the file, or have no place in the network.
    """
    for what, names in (("misses", report.missing), ("has, without a place for them,", report.unexpected)):
        layers = {name.rpartition(".")[0] for name in names}
        if len(layers) > 1:
            raise WeightsError(
                f"{report.source} {what} {len(names)} tensors of {len(layers)} layers "
                f"({', '.join(names[:3])}, …), so it is of another network. Set MODEL.MODEL_NAME, RESNET.DEPTH and "
                "NETWORK as they were when it was trained."
            )


def build_teachers(cfg: CfgNode) -> dict[str, Network]:
    """Every teacher whose term has weight, frozen, by its name in the configuration."""
    return {
        name: build_teacher(name, entry, input_spec(cfg))
        for name, entry in sorted(cfg.DISTILL.TEACHERS.items())
        if entry.LOSS_WEIGHT > 0
    }


def build_teacher(name: str, entry: CfgNode, clip: InputSpec) -> Network:
    """One frozen teacher from its node.

    Args:
        name: Of the node.
        entry: The node.
        clip: What the student is fed; a teacher with FRAME_PICK clip sees all of its frames.

    Raises:
        UserError: With the teacher's key in front of what is wrong.
    """
    with naming(f"DISTILL.TEACHERS.{name}"):
        return teacher_factory.build_teacher(
            entry.ARCH,
            entry.WEIGHTS,
            num_classes=entry.NUM_CLASSES,
            layer=entry.LAYER,
            num_frames=clip.num_frames if entry.FRAME_PICK == "clip" else entry.NUM_PICKED_FRAMES,
            pick=entry.FRAME_PICK,
            crop_size=entry.CROP_SIZE,
            mean=tuple(entry.MEAN),
            std=tuple(entry.STD),
            depth=entry.DEPTH,
            sampling_rate=clip.sampling_rate,
            target_fps=clip.target_fps,
            modality=entry.NETWORK.MODALITY,
            **_switches(entry.NETWORK),
        )


def build_objective(cfg: CfgNode, student: Network, teachers: Mapping[str, Network]) -> Objective:
    """Student, teachers and weighted terms as one object."""
    terms: list[Term] = []
    adapters: dict[str, nn.Module] = {}
    if cfg.ACTION.LOSS_WEIGHT > 0:
        loss = build_loss(cfg.ACTION.LOSS, label_smoothing=cfg.ACTION.LABEL_SMOOTHING)
        terms.append(Term(name="action", student_layer="logits", loss=loss, weight=cfg.ACTION.LOSS_WEIGHT))
    for name, teacher in teachers.items():
        entry = cfg.DISTILL.TEACHERS[name]
        student_layer = entry.STUDENT_LAYER or _default_student_layer(entry, student)
        terms.append(
            Term(
                name=name,
                student_layer=student_layer,
                loss=build_loss(
                    entry.LOSS,
                    temperature=entry.TEMPERATURE,
                    temper_student=entry.TEMPER_STUDENT,
                    scale_by_temperature=entry.SCALE_BY_TEMPERATURE,
                    class_reduction=entry.CLASS_REDUCTION,
                ),
                weight=entry.LOSS_WEIGHT,
                teacher=name,
                teacher_layer=entry.LAYER,
                max_entropy=entry.MAX_ENTROPY if entry.MAX_ENTROPY >= 0 else None,
                temperature=entry.TEMPERATURE,
            )
        )
        adapters[name] = build_adapter(entry.HEAD, student, student_layer, teacher, entry.LAYER)
    return Objective(student, terms, teachers, adapters, gate=cfg.DISTILL.GATE, gate_mean=cfg.DISTILL.GATE_MEAN)


def _default_student_layer(entry: CfgNode, student: Network) -> str:
    """A new head reads the pooled features (or the last map); an own head reads the student's logits."""
    if entry.LAYER == "feature_map":
        return list(student.layers)[-1]
    return "logits" if entry.HEAD == "own" and entry.LAYER == "logits" else "features"


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
    """Whether the configuration names videos for a use: in CORPUS, or as PySlowFast's ``{split}.csv``."""
    has_list = bool(cfg.DATA.PATH_TO_DATA_DIR) and _pyslowfast_list(cfg, split).is_file()
    return has_list or bool(cfg.CORPUS[CORPUS_KEYS[split]])


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
    cfg: CfgNode, videos: Mixture, specs: Mapping[str, ViewSpec], split: Split, *, keep_index: bool = True
) -> ClipDataset:
    """Records + decoding + sampling + views. The clip is that of the student's first view.

    Args:
        cfg: The configuration.
        videos: From ``build_corpora``.
        specs: ``consumer/view`` → what that network must be fed.
        split: Which use.
        keep_index: Keep the videos' time stamps on disk (CORPUS.INDEX_CACHE); else in memory only.
    """
    clip_spec = next(spec for name, spec in specs.items() if name.startswith("student/"))
    is_test = split == "test"
    low, high = cfg.DATA.TRAIN_JITTER_SCALES
    index_folder = cfg.CORPUS.INDEX_CACHE or str(Path(cfg.OUTPUT_DIR) / FRAME_INDEX_FOLDER)
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
        index_cache=index_folder if keep_index else None,
    )


def build_train_sampler(cfg: CfgNode, videos: Mixture) -> ClipSampler:
    """The stream of training keys of this rank."""
    return ClipSampler(
        videos.sizes,
        videos.weights,
        num_clips_per_epoch=cfg.RUNNER.CLIPS_PER_EPOCH,
        global_batch_size=cfg.TRAIN.BATCH_SIZE * cfg.NUM_SHARDS,
        seed=cfg.RNG_SEED,
        rank=distributed.rank(),
        world_size=distributed.world_size(),
    )


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
        pin_memory=cfg.DATA_LOADER.PIN_MEMORY,
        drop_last=True,
    )


def build_test_loader(
    cfg: CfgNode, dataset: ClipDataset, *, num_crops: int = 1, progress: ProgressView | None = None
) -> ClipLoader:
    """Every clip and crop of every video once, dealt to the ranks by video.

    All ranks must call it: dense clips are counted first, by each rank those of its own videos; ``progress`` shows it.
    """
    rank, world_size = distributed.rank(), distributed.world_size()
    own_videos = len(range(rank, len(dataset), world_size))
    shown = progress if progress is not None and dataset.has_dense_clips else NoProgress()
    with shown.work("counting clips", own_videos) as advance:
        clips = dataset.clips_per_video(
            num_workers=cfg.DATA_LOADER.NUM_WORKERS,
            rank=rank,
            world_size=world_size,
            gather_objects=distributed.gather_objects,
            on_video=advance,
        )
    sampler = ViewSampler(clips, num_crops, rank=rank, world_size=world_size)
    return build_loader(
        dataset,
        sampler,
        max(1, cfg.TEST.BATCH_SIZE // distributed.local_world_size()),
        num_workers=cfg.DATA_LOADER.NUM_WORKERS,
        pin_memory=cfg.DATA_LOADER.PIN_MEMORY,
    )


def build_optimizer(cfg: CfgNode, trainable: nn.Module) -> torch.optim.Optimizer:
    """The optimizer of everything that trains."""
    solver = cfg.SOLVER
    return optim.build_optimizer(
        trainable,
        solver.OPTIMIZING_METHOD,
        lr=solver.BASE_LR,
        momentum=solver.MOMENTUM,
        dampening=solver.DAMPENING,
        nesterov=solver.NESTEROV,
        betas=tuple(solver.BETAS),
        weight_decay=solver.WEIGHT_DECAY,
        bn_weight_decay=cfg.BN.WEIGHT_DECAY,
        zero_wd_1d=solver.ZERO_WD_1D_PARAM,
    )


def build_schedule(cfg: CfgNode) -> Schedule:
    """The learning rate over time."""
    solver = cfg.SOLVER
    return Schedule(
        solver.LR_POLICY,
        base_lr=solver.BASE_LR,
        max_epoch=solver.MAX_EPOCH,
        unit=cfg.RUNNER.SCHEDULE_UNIT,
        steps=solver.STEPS,
        lrs=solver.LRS,
        cosine_end_lr=solver.COSINE_END_LR,
        warmup_epochs=solver.WARMUP_EPOCHS,
        warmup_start_lr=solver.WARMUP_START_LR,
        plateau_patience=cfg.RUNNER.PLATEAU_PATIENCE,
        plateau_factor=cfg.RUNNER.PLATEAU_FACTOR,
    )
