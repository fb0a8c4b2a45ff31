"""Students, teachers and their terms."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from torch import nn

from distinit_plugin.building.detection import box_terms, build_roi_network
from distinit_plugin.building.parts import load_flow_net, load_stream
from distinit_plugin.building.proposers import build_person_rpn, load_person_rpn
from distinit_plugin.config.load import cfg_text
from distinit_plugin.config.node import CfgNode
from distinit_plugin.config.rules import PERSON_RPN
from distinit_plugin.config.theirs import is_borrowed
from distinit_plugin.detection.network import OWN_PREFIXES, PROPOSAL_LOSS, RoiNetwork
from distinit_plugin.detection.rpn import PersonRpn
from distinit_plugin.errors import UserError, WeightsError, naming
from distinit_plugin.losses import build_loss
from distinit_plugin.models import factory as models
from distinit_plugin.models.network import InputSpec
from distinit_plugin.objectives import Objective, Term, build_adapter, on_students_grid, proposal_term
from distinit_plugin.teachers import FlowView, freeze
from distinit_plugin.teachers import factory as teacher_factory
from distinit_plugin.teachers.cache import TargetStore
from distinit_plugin.teachers.cached import CachedNetwork
from distinit_plugin.teachers.flow import FLOW
from distinit_plugin.types import Network, Split, ViewSpec
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
        flow_bound=cfg.FLOW.BOUND,
    )


def build_network(cfg: CfgNode, num_classes: int | None = None) -> Network:
    """The student of a configuration, at its random initialisation.

    Args:
        cfg: The configuration.
        num_classes: Outputs of its classifier; ``None``: ``MODEL.NUM_CLASSES`` where a term reads it, else none.
    """
    if num_classes is None:
        num_classes = cfg.MODEL.NUM_CLASSES if needs_own_logits(cfg) else 0
    if cfg.MODEL.MODEL_NAME == PERSON_RPN:
        return build_person_rpn(cfg, input_spec(cfg))
    network = models.build_network(
        cfg.MODEL.MODEL_NAME,
        num_classes=0 if cfg.DETECTION.ENABLE else num_classes,
        input=input_spec(cfg),
        dropout=cfg.MODEL.DROPOUT_RATE,
        depth=cfg.RESNET.DEPTH,
        description=cfg.dump() if is_borrowed(cfg.MODEL.MODEL_NAME) else "",
        **_switches(cfg.NETWORK),
    )
    return build_roi_network(cfg, network) if cfg.DETECTION.ENABLE else network


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
    if isinstance(network, PersonRpn) and (loaded := load_person_rpn(cfg, network)) is not None:
        reports.append(loaded)
    trunk: Network = network.backbone if isinstance(network, RoiNetwork) else network
    if cfg.INIT.INFLATE_FROM:
        with naming("INIT.INFLATE_FROM"):
            reports.append(inflate(trunk, cfg.INIT.INFLATE_FROM, cfg.INIT.INFLATE_WEIGHTS))
    if cfg.INIT.FLOW_NET_WEIGHTS:
        with naming("INIT.FLOW_NET_WEIGHTS"):
            reports.append(load_flow_net(trunk, cfg.INIT.FLOW_NET_WEIGHTS))
    if cfg.INIT.STREAM_WEIGHTS:
        with naming("INIT.STREAM_WEIGHTS"):
            report = load_stream(trunk, cfg.INIT.STREAM_WEIGHTS)
            refuse_part_of_a_trunk(report)
        reports.append(report)
    if cfg.TRAIN.CHECKPOINT_FILE_PATH:
        with naming("TRAIN.CHECKPOINT_FILE_PATH"):
            report = load_weights(network, cfg.TRAIN.CHECKPOINT_FILE_PATH)
            refuse_part_of_a_trunk(report)
        reports.append(report)
    return reports


def refuse_part_of_a_trunk(report: LoadReport) -> None:
    """One layer may differ: the classifier. More than that is another network that happens to share names.

    What a network that classifies boxes adds to its backbone may be missing as a whole.

    Raises:
        WeightsError: Tensors of several layers are missing from the file, or have no place in the network.
    """
    missing = tuple(name for name in report.missing if not name.startswith(OWN_PREFIXES))
    for what, names in (("misses", missing), ("has, without a place for them,", report.unexpected)):
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
        name: build_teacher(cfg, name) for name, entry in sorted(cfg.DISTILL.TEACHERS.items()) if entry.LOSS_WEIGHT > 0
    }


def teacher_view(cfg: CfgNode, name: str, clip: InputSpec) -> ViewSpec:
    """What a teacher is fed, from its node; ``clip``: what the student is fed."""
    entry = cfg.DISTILL.TEACHERS[name]
    sees_clip = entry.FRAME_PICK == "clip"
    return ViewSpec(
        modality=entry.NETWORK.MODALITY,
        num_frames=clip.num_frames if sees_clip else entry.NUM_PICKED_FRAMES,
        sampling_rate=clip.sampling_rate,
        target_fps=clip.target_fps,
        pick=entry.FRAME_PICK,
        crop_size=entry.CROP_SIZE,
        mean=tuple(entry.MEAN),
        std=tuple(entry.STD),
        crop=entry.VIEW,
        pick_from=0 if sees_clip else cfg.DISTILL.GRID.FRAMES,
    )


def build_teacher(cfg: CfgNode, name: str, clip: InputSpec | None = None) -> Network:
    """One frozen teacher from its node, or what stands in for it where its outputs are cached.

    Args:
        cfg: The configuration.
        name: Of the node.
        clip: What the student is fed (FRAME_PICK clip: all of its frames; ARCH flow: their flow); ``None``: as ``cfg``
            says.

    Raises:
        UserError: With the teacher's key in front of what is wrong.
    """
    entry = cfg.DISTILL.TEACHERS[name]
    clip = clip or input_spec(cfg)
    if entry.ARCH == FLOW:
        return FlowView(clip)
    if entry.CACHE:
        return _build_cached_teacher(name, entry)
    with naming(f"DISTILL.TEACHERS.{name}"):
        view = teacher_view(cfg, name, clip)
        teacher = teacher_factory.build_teacher(
            entry.ARCH,
            entry.WEIGHTS,
            num_classes=entry.NUM_CLASSES,
            layer=entry.LAYER,
            num_frames=entry.NUM_PICKED_FRAMES if view.num_frames is None else view.num_frames,
            pick=view.pick,
            crop_size=view.crop_size,
            mean=view.mean,
            std=view.std,
            depth=entry.DEPTH,
            description=_description(entry),
            sampling_rate=view.sampling_rate,
            target_fps=view.target_fps,
            modality=view.modality,
            crop=view.crop,
            pick_from=view.pick_from,
            **_switches(entry.NETWORK),
        )
    teacher.one_at_a_time = cfg.RUNNER.DETERMINISTIC
    return teacher


def _description(entry: CfgNode) -> str:
    """The text of a teacher's own configuration file; empty: what its weights say about it."""
    return cfg_text(entry.CFG) if entry.CFG else ""


def _build_cached_teacher(name: str, entry: CfgNode) -> Network:
    with naming(f"DISTILL.TEACHERS.{name}.CACHE"):
        layout = TargetStore.open(cache_part(entry.CACHE, "train")).layout
        if layout.layer != entry.LAYER:
            raise UserError(
                f"{entry.CACHE} holds the teacher's {layout.layer}, LAYER is {entry.LAYER}. Set LAYER {layout.layer}, "
                "or make the targets again (distinit cache-targets)."
            )
        if layout.layer == "logits" and layout.shape[0] != entry.NUM_CLASSES:
            raise UserError(
                f"{entry.CACHE} holds logits of {layout.shape[0]} classes, NUM_CLASSES is {entry.NUM_CLASSES}. Set "
                f"NUM_CLASSES {layout.shape[0]}, or make the targets again (distinit cache-targets)."
            )
    return freeze(CachedNetwork(layout))


def cache_part(folder: str | Path, split: Split) -> Path:
    """The store of one use below a teacher's CACHE."""
    return Path(folder).expanduser() / split


def build_objective(cfg: CfgNode, student: Network, teachers: Mapping[str, Network]) -> Objective:
    """Student, teachers and weighted terms as one object."""
    terms: list[Term] = []
    adapters: dict[str, nn.Module] = {}
    if cfg.ACTION.LOSS_WEIGHT > 0:
        loss = build_loss(cfg.ACTION.LOSS, label_smoothing=cfg.ACTION.LABEL_SMOOTHING)
        terms += (
            box_terms(cfg, loss)
            if cfg.DETECTION.ENABLE
            else [Term(name="action", student_layer="logits", loss=loss, weight=cfg.ACTION.LOSS_WEIGHT)]
        )
    if isinstance(student, PersonRpn):
        terms.append(proposal_term(PROPOSAL_LOSS))
    for name, teacher in teachers.items():
        entry = cfg.DISTILL.TEACHERS[name]
        student_layer = entry.STUDENT_LAYER or _default_student_layer(entry, student)
        term = Term(
            name=name,
            student_layer=student_layer,
            loss=build_loss(
                entry.LOSS,
                temperature=entry.TEMPERATURE,
                temper_student=entry.TEMPER_STUDENT,
                scale_by_temperature=entry.SCALE_BY_TEMPERATURE,
                class_reduction=entry.CLASS_REDUCTION,
                normalize=entry.NORMALIZE,
            ),
            weight=entry.LOSS_WEIGHT,
            warmup=entry.WARMUP,
            teacher=name,
            teacher_layer=entry.LAYER,
            max_entropy=entry.MAX_ENTROPY if entry.MAX_ENTROPY >= 0 else None,
            temperature=entry.TEMPERATURE,
        )
        terms.append(replace(term, match=on_students_grid(entry.ALIGNMENT)) if entry.ARCH == FLOW else term)
        adapters[name] = build_adapter(
            entry.HEAD, student, student_layer, teacher, entry.LAYER, decoder_norm=entry.DECODER_NORM
        )
    return Objective(student, terms, teachers, adapters, gate=cfg.DISTILL.GATE, gate_mean=cfg.DISTILL.GATE_MEAN)


def _default_student_layer(entry: CfgNode, student: Network) -> str:
    """A new head reads the pooled features, an own head what is matched; a map goes with the layer of its name."""
    if entry.LAYER == "feature_map":
        return list(student.layers)[-1]
    if entry.LAYER not in ("logits", "features"):
        return str(entry.LAYER)
    return "logits" if entry.HEAD == "own" and entry.LAYER == "logits" else "features"
