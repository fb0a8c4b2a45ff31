"""The motion probe of D3D (arXiv 1812.08249 §3): how much flow can be decoded from the features of a network?

Decoders are new heads on layers of the student, their teacher is the flow of the clip: the training is that of
``distinit run``. What is added here is how the configuration of such a training follows from a network, and the
evaluation.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from distinit_plugin import build
from distinit_plugin.analysis.decoded_flow import draw_samples, write_samples
from distinit_plugin.config.load import load_cfg
from distinit_plugin.config.node import CfgNode
from distinit_plugin.config.rules import FLOW, TWO_STREAM_NETWORKS
from distinit_plugin.engine.motion import Changes, LayerMotion, MotionSample, OwnFlow, measure_motion
from distinit_plugin.engine.motion_report import (
    EXPECTED,
    PICTURES_FILE,
    PLOT_FILE,
    SAMPLES_FILE,
    MotionCurve,
    control_table,
    error_table,
    plot_motion,
    read_curve,
    write_report,
)
from distinit_plugin.engine.signals import StopSignals
from distinit_plugin.errors import UserError
from distinit_plugin.files import write_file
from distinit_plugin.flow.codes import Quantiser
from distinit_plugin.jobs.corpora import Corpora
from distinit_plugin.jobs.launching import launch, starts_ranks
from distinit_plugin.jobs.preflight import check_job
from distinit_plugin.jobs.session import Session, open_session
from distinit_plugin.jobs.testing import weights_to_test
from distinit_plugin.jobs.trained import read_trained
from distinit_plugin.jobs.training import train_objective, training_alone
from distinit_plugin.objectives import Objective

logger = logging.getLogger(__name__)

FOLDER = "motion"
"""Below OUTPUT_DIR: the trainings of the decoders, the numbers and the pictures."""

RANDOM = "random"
"""The checkpoint of an untrained network: a control."""

PICTURES = 4
"""Clips that are drawn."""


@dataclass(frozen=True)
class MotionResult:
    """What a probe found.

    Attributes:
        curve: The network's layers.
        flow_stream: Those of the network of flow; ``None`` where none was asked for.
        folder: Where the files are.
    """

    curve: MotionCurve
    flow_stream: MotionCurve | None
    folder: Path


@dataclass(frozen=True)
class _Options:
    """What the evaluation of one training needs."""

    controls: bool = False
    unit_direction: bool = False
    num_samples: int = 0


def probe_motion(
    cfg: CfgNode,
    checkpoint: str | Path = "",
    layers: Sequence[str] = (),
    *,
    decoder: str = "",
    finetune: bool = False,
    controls: bool = False,
    flow_network: str | Path = "",
    unit_direction: bool = False,
    name: str = "",
    beside: Sequence[str | Path] = (),
    console: Console | None = None,
) -> MotionResult:
    """Train decoders of flow on layers of a network, and evaluate them on CORPUS.TEST.

    Tables are printed; numbers, plot and pictures go to ``OUTPUT_DIR/motion``. A probe that was interrupted continues.

    Args:
        cfg: Of any network: its clips, corpora (labels are not needed), schedule and FLOW are those of the decoders'
            training; its teachers and action term are left out.
        checkpoint: The network's weights; empty: as for ``distinit probe``; ``random``: none, as a control.
        layers: Names of layers; empty: those of the configuration's teachers of ARCH flow.
        decoder: ``simple``, ``spatial`` or ``pwc``; empty: as in those teachers, else ``pwc``.
        finetune: The network trains, too, anew for each layer. Otherwise it is frozen, with its BN statistics, and all
            decoders train at once.
        controls: Also evaluate still, reversed and shuffled clips.
        flow_network: YAML or checkpoint of a network that sees flow, whose layers are probed in the same way.
        unit_direction: As in ``flow.motion.polar_to_flow``.
        name: Of the network in tables and plots; empty: the name of OUTPUT_DIR.
        beside: Folders of earlier probes, drawn into the plot.
        console: Where to print; the standard output when ``None``.

    Raises:
        UserError: Anything that the user can put right.
        Stopped: A signal came; what is needed to continue is saved.
    """
    if controls and (cfg.NETWORK.MODALITY == "flow" or cfg.MODEL.MODEL_NAME in TWO_STREAM_NETWORKS):
        raise UserError(f"--controls change frames, and this {cfg.MODEL.MODEL_NAME} sees flow. Leave the flag out.")
    folder = Path(cfg.OUTPUT_DIR) / FOLDER
    others = [read_curve(other) for other in beside]
    weights = str(checkpoint or weights_to_test(cfg))
    options = _Options(controls, unit_direction, PICTURES)
    mode = "fine-tuned" if finetune else "frozen"
    plain = motion_cfg(cfg, layers, decoder=decoder, weights=weights, finetune=finetune, output=folder / "frozen")
    stream = _flow_network_cfg(plain, str(flow_network), folder / "flow_stream") if flow_network else None
    jobs = _one_layer_each(plain, folder) if finetune else [plain]
    for job in [*jobs, *([stream] if stream else [])]:
        check_job(job, Corpora(job))
    console = console or Console()
    found, samples = _join([_probe(job, options, console) for job in jobs])
    curve = MotionCurve(name or f"{Path(cfg.OUTPUT_DIR).name}, {mode}", found)
    flow_stream = None
    if stream is not None:
        flow_stream = MotionCurve(
            "flow stream", _probe(stream, replace(options, controls=False, num_samples=0), console)[0]
        )
    result = MotionResult(curve, flow_stream, folder)
    settings = {"weights": weights, "mode": mode, "unit_direction": unit_direction, "decoder": _decoders(plain)}
    _show(result, samples, others, settings, console)
    return result


def motion_cfg(
    cfg: CfgNode, layers: Sequence[str], *, decoder: str, weights: str, finetune: bool, output: Path
) -> CfgNode:
    """The configuration of the decoders' training; arguments as of ``probe_motion``.

    Raises:
        UserError: No layers are named.
    """
    own = {key: entry for key, entry in cfg.DISTILL.TEACHERS.items() if entry.ARCH == FLOW and entry.LOSS_WEIGHT > 0}
    like = next(iter(own.values()), None)
    wanted = list(dict.fromkeys(layers)) or [entry.STUDENT_LAYER for entry in own.values()]
    if not wanted:
        raise UserError("no layer is named: give --layers 2C 3A …, or DISTILL.TEACHERS of ARCH flow in the YAML file.")
    entries = {
        re.sub(r"[^A-Za-z0-9_-]", "_", f"MOTION_{layer}"): {
            "ARCH": FLOW,
            "LAYER": FLOW,
            "STUDENT_LAYER": layer,
            "HEAD": decoder or (like.HEAD if like is not None else "pwc"),
            "LOSS": "flow_decoding" if like is None else like.LOSS,
            **({} if like is None else {"ALIGNMENT": like.ALIGNMENT, "DECODER_NORM": like.DECODER_NORM}),
        }
        for layer in wanted
    }
    probe = cfg.clone()
    probe.defrost()
    probe.DISTILL.TEACHERS.clear()
    probe.merge_from_other_cfg(
        {
            "OUTPUT_DIR": str(output),
            "DISTILL": {"TEACHERS": entries, "GATE": "weight", "GATE_MEAN": "all"},
            "ACTION": {"LOSS_WEIGHT": 0.0},
            "INIT": {"INFLATE_FROM": "", "INFLATE_WEIGHTS": "", "FLOW_NET_WEIGHTS": "", "STREAM_WEIGHTS": ""},
            "TRAIN": {"ENABLE": True, "CHECKPOINT_FILE_PATH": "" if weights == RANDOM else weights},
            "TEST": {"ENABLE": False},
        }
    )
    probe.INIT.TRAINABLE = "all" if finetune else "heads"
    probe.TRAIN.CHECKPOINT_EPOCH_RESET = True
    probe.freeze()
    return probe


def _one_layer_each(plain: CfgNode, folder: Path) -> list[CfgNode]:
    """A fine-tuned network can serve one layer at a time."""
    jobs = []
    for key, entry in plain.DISTILL.TEACHERS.items():
        job = plain.clone()
        job.defrost()
        for other in [other for other in job.DISTILL.TEACHERS if other != key]:
            del job.DISTILL.TEACHERS[other]
        job.OUTPUT_DIR = str(folder / f"finetuned_{re.sub(r'[^A-Za-z0-9_-]', '_', entry.STUDENT_LAYER)}")
        job.freeze()
        jobs.append(job)
    return jobs


def _flow_network_cfg(plain: CfgNode, source: str, output: Path) -> CfgNode:
    """The probe of a network that sees flow, in all else as ``plain``.

    Raises:
        UserError: It sees frames, or has no weights.
    """
    if source.endswith((".yaml", ".yml")):
        other, _ = load_cfg(source, check=False)
        weights = str(weights_to_test(other))
    else:
        other, weights = read_trained(source).cfg, source
    if other.NETWORK.MODALITY != "flow":
        raise UserError(f"{source} is of a network that sees frames. Name one that sees flow (NETWORK.MODALITY flow).")
    probe = plain.clone()
    probe.defrost()
    for node in ("MODEL", "RESNET", "NETWORK"):
        probe[node] = other[node].clone()
        probe[node].defrost()
    probe.DATA.MEAN, probe.DATA.STD = list(other.DATA.MEAN), list(other.DATA.STD)
    probe.TRAIN.CHECKPOINT_FILE_PATH, probe.INIT.TRAINABLE = weights, "heads"
    probe.OUTPUT_DIR = str(output)
    probe.freeze()
    return probe


def _decoders(cfg: CfgNode) -> str:
    return ", ".join(sorted({entry.HEAD for entry in cfg.DISTILL.TEACHERS.values()}))


# ------------------------------------------------------------------------------------------------------ one training
def _probe(cfg: CfgNode, options: _Options, console: Console) -> tuple[list[LayerMotion], list[MotionSample]]:
    """Train and evaluate, on all ranks that the configuration asks for; these have the standard output."""
    if not starts_ranks(cfg):
        return _probe_here(cfg, options, console)
    found: tuple[list[LayerMotion], list[MotionSample]] = launch(cfg, partial(_probe_here, options=options))
    return found


def _probe_here(
    cfg: CfgNode, options: _Options, console: Console | None = None
) -> tuple[list[LayerMotion], list[MotionSample]]:
    with open_session(cfg, console=console) as session, training_alone(session), StopSignals() as stop:
        _, objective = train_objective(session, stop)
        return _evaluate(session, objective, options)


def _evaluate(
    session: Session, objective: Objective, options: _Options
) -> tuple[list[LayerMotion], list[MotionSample]]:
    """The errors on the clips of CORPUS.TEST."""
    cfg = session.cfg
    student: Any = objective.trainable.student
    teachers: Any = objective.teachers
    specs = build.view_specs(student, teachers, "test")
    frames = [spec for spec in student.view_specs("test").values() if spec.modality == "rgb"]
    changes = None
    if options.controls:
        changes = Changes(_own_flow(session) if cfg.DATA.SAMPLING_RATE == 1 else None, cfg.RNG_SEED)
    videos = session.corpora.clips("test", labeled=False)
    dataset = build.build_dataset(cfg, videos, specs, "test")
    loader = build.build_test_loader(cfg, dataset, num_crops=cfg.TEST.NUM_SPATIAL_CROPS, progress=session.progress)
    with session.read(loader, "test") as batches:
        found, samples = measure_motion(
            objective,
            batches,
            finish=session.finisher(specs),
            device=session.device,
            autocast=session.precision.autocast,
            unit_direction=options.unit_direction,
            pixels=frames[0].pixels if frames else "",
            changes=changes,
            num_samples=options.num_samples,
        )
    session.refuse_bad_corpus(len(videos), "test")
    asked = [entry.STUDENT_LAYER for entry in cfg.DISTILL.TEACHERS.values()]
    return sorted(found, key=lambda layer: asked.index(layer.layer)), samples


def _own_flow(session: Session) -> OwnFlow:
    """Computes the flow between the frames of a clip as that of videos is computed; the last one is given again."""
    live = session.live_flow
    quantiser = Quantiser(session.cfg.FLOW.BOUND, session.cfg.FLOW.ROUNDING)

    def flow(frames: Tensor) -> Tensor:
        last = max(frames.shape[2] - 2, 0)
        first = torch.arange(frames.shape[2], device=frames.device).clamp(max=last)
        second = (first + 1).clamp(max=frames.shape[2] - 1)
        pairs = torch.cat([frames[:, :, first], frames[:, :, second]], dim=1)
        return quantiser.decode_tensor(live(pairs, 1))

    return flow


def _join(
    parts: list[tuple[list[LayerMotion], list[MotionSample]]],
) -> tuple[list[LayerMotion], list[MotionSample]]:
    """All layers; of samples of the same clips what was decoded from each."""
    layers = [layer for found, _ in parts for layer in found]
    samples = []
    for same in zip(*(found for _, found in parts), strict=True):
        decoded = {name: flow for sample in same for name, flow in sample.decoded.items()}
        samples.append(replace(same[0], decoded=decoded))
    return layers, samples


# --------------------------------------------------------------------------------------------------- what is shown
def _show(
    result: MotionResult,
    samples: list[MotionSample],
    others: list[MotionCurve],
    settings: dict[str, Any],
    console: Console,
) -> None:
    curves = [result.curve, *([result.flow_stream] if result.flow_stream else [])]
    write_report(result.folder, curves, settings)
    plot_motion([*curves, *others], result.folder / PLOT_FILE)
    console.print(error_table(curves))
    if result.curve.layers[0].controls:
        console.print(control_table(result.curve))
        for control, text in EXPECTED.items():
            console.print(f"{control}: {text}", highlight=False, soft_wrap=True)
    if samples:
        write_samples(result.folder / SAMPLES_FILE, samples)
        sheet = draw_samples({"": samples}, result.curve.name)
        write_file(result.folder / PICTURES_FILE, lambda file: sheet.save(file, format="PNG"))
    console.print(f"numbers, plot and pictures: {result.folder}", highlight=False, soft_wrap=True)
