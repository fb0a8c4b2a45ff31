"""Does a teacher suit these videos? Its entropy over a corpus, from cached targets or by asking it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from rich.console import Console
from torch import Tensor

from distinit_plugin import build
from distinit_plugin.analysis.entropy import (
    EntropyDensity,
    EntropyMeter,
    EntropyStudy,
    Example,
    draw_entropy,
    entropy_numbers,
    entropy_rows,
)
from distinit_plugin.analysis.output import check_output, write_picture
from distinit_plugin.config.node import CfgNode
from distinit_plugin.config.rules import FLOW
from distinit_plugin.data.dataset import ClipDataset
from distinit_plugin.data.targets import CachedTargets
from distinit_plugin.engine import distributed
from distinit_plugin.engine.ensemble import read_scores
from distinit_plugin.engine.evaluate import top_k
from distinit_plugin.errors import UserError
from distinit_plugin.jobs.caching import outline
from distinit_plugin.jobs.ensembling import scores_file
from distinit_plugin.jobs.prediction import read_class_names
from distinit_plugin.jobs.session import Session, open_session
from distinit_plugin.jobs.testing import class_names_of, saved_class_names
from distinit_plugin.objectives.adapters import no_classifier
from distinit_plugin.teachers.frames import joined
from distinit_plugin.types import SampleKey, ViewSpec
from distinit_plugin.video.corpus import Mixture
from distinit_plugin.video.transforms import picked_frames
from distinit_plugin.weights.sources import torchvision_categories

MOST_CLIPS = 10_000
"""Clips that a teacher is asked for unless the user says otherwise; a smaller corpus is shown once."""


class EntropyOptions(NamedTuple):
    """What a study of a teacher shows.

    Attributes:
        teacher: Name below DISTILL.TEACHERS; empty: the only one.
        num_clips: Of the training that are looked at; 0: one a video, at most :data:`MOST_CLIPS`; of a cache all.
        thresholds: Gates of which the kept share is told, beside MAX_ENTROPY.
        runs: (threshold, folder) of tested runs; an infinite threshold: no gate.
        class_file: Names of the teacher's classes, one per line; empty: those that its weights come with.
        num_examples: Frames of low, of median and of high entropy.
    """

    teacher: str = ""
    num_clips: int = 0
    thresholds: Sequence[float] = ()
    runs: Sequence[tuple[float, Path]] = ()
    class_file: str = ""
    num_examples: int = 6


@dataclass(frozen=True)
class _Seen:
    """What a teacher saw: the examples' entropies, and how to see one of them again."""

    density: EntropyDensity
    frame_of: Callable[[int], tuple[npt.NDArray[np.uint8] | None, str]]
    """Place of an example → (H,W,3) or, where it cannot be read any more, ``None``; and the video."""


def visualize_entropy(
    cfg: CfgNode, output: Path, options: EntropyOptions, *, console: Console | None = None
) -> EntropyStudy:
    """Draw the entropy of a teacher over the training videos of a configuration.

    Args:
        cfg: Of the training: its clips, crops, frame picks and temperature are those of the examples. A teacher with a
            CACHE is not run.
        output: The PNG.
        options: What is shown.
        console: Where to print; the standard output when ``None``.

    Raises:
        UserError: Anything that the user can put right.
    """
    check_output(output)
    name = _teacher_name(cfg, options.teacher)
    entry = cfg.DISTILL.TEACHERS[name]
    accuracies = _accuracies(options.runs)
    gates = [entry.MAX_ENTROPY] if entry.MAX_ENTROPY >= 0 else []
    thresholds = sorted({*gates, *options.thresholds, *(key for key in accuracies if math.isfinite(key))})
    console = console or Console()
    with open_session(cfg, log_to_folder=False, console=console) as session:
        if distributed.world_size() > 1:
            raise UserError("Pictures are drawn by one process: start it without torchrun.")
        seen = (_from_cache if entry.CACHE else _from_teacher)(session, name, options.num_clips)
        names = class_names_of(
            _class_names(entry, options.class_file, seen.density.num_classes), seen.density.num_classes
        )
        examples = _examples(seen, names, options.num_examples)
    study = EntropyStudy(name, seen.density, names, thresholds, accuracies, examples)
    write_picture(output, draw_entropy(study), entropy_numbers(study), entropy_rows(study))
    _tell(study, console)
    console.print(f"wrote {output}", highlight=False, soft_wrap=True, markup=False)
    return study


def _teacher_name(cfg: CfgNode, wanted: str) -> str:
    known = [key for key, entry in cfg.DISTILL.TEACHERS.items() if entry.LOSS_WEIGHT > 0 and entry.ARCH != FLOW]
    if wanted in known or (len(known) == 1 and not wanted):
        return wanted or known[0]
    problem = f"there is no teacher {wanted} that classifies" if wanted else f"there are {len(known)} teachers"
    raise UserError(f"{problem} (DISTILL.TEACHERS: {', '.join(known) or 'none'}). Name one of them by --teacher.")


def _accuracies(runs: Sequence[tuple[float, Path]]) -> dict[float, list[float]]:
    found: dict[float, list[float]] = {}
    for threshold, folder in runs:
        scores = read_scores(scores_file(folder), "probs")
        found.setdefault(threshold, []).append(top_k(scores.values, scores.labels, 1))
    return found


def _class_names(entry: CfgNode, class_file: str, num_classes: int) -> list[str]:
    """Those of a file, of torchvision's weights, or of a checkpoint of this program; none where nothing says them."""
    if class_file:
        return read_class_names(class_file, num_classes)
    if entry.ARCH.startswith("torchvision/"):
        return torchvision_categories(entry.ARCH.partition("/")[2], entry.WEIGHTS)
    return saved_class_names(entry.WEIGHTS) if Path(entry.WEIGHTS).is_file() else []


def _tell(study: EntropyStudy, console: Console) -> None:
    numbers = entropy_numbers(study)
    middle = numbers["quantiles"]["0.5"]
    lines = [
        f"{study.teacher}: {numbers['examples']} examples, entropy {numbers['mean']:.3f} nats in the mean, "
        f"{middle:.3f} in the median, of at most {study.density.largest:.3f}",
        *(f"a gate at {key} nats keeps {100 * share:.1f} %" for key, share in numbers["kept_share"].items()),
        f"{len(study.answers)} of {len(study.class_names)} classes are ever its first answer; the most frequent: "
        + ", ".join(f"{name} {100 * count / numbers['examples']:.1f} %" for name, count in study.answers[:5]),
    ]
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True, markup=False)


# --------------------------------------------------------------------------------------------- the teacher is asked
def _from_teacher(session: Session, name: str, num_clips: int) -> _Seen:
    """The first clips of the training, as it would show them to the teacher."""
    cfg = session.cfg
    clip = _clip_spec(cfg)
    videos = session.corpora.clips("train")
    teacher = build.build_teacher(cfg, name)
    (view,) = teacher.view_specs("train").values()
    module = session.place(teacher)
    finish = session.finisher({view.modality: view})
    dataset = build.build_dataset(
        cfg, videos, {f"{name}/{view.modality}": view}, "train", clip_spec=clip, keep_index=False
    )
    wanted = num_clips or min(len(videos), MOST_CLIPS)
    meter = EntropyMeter(cfg.DISTILL.TEACHERS[name].TEMPERATURE)
    keys: list[SampleKey] = []
    with session.progress.work(f"entropy of {name}", wanted) as advance:
        for batch in _training_batches(session, videos, dataset):
            left = wanted - len(keys)
            with torch.no_grad(), session.precision.autocast():
                logits = module(finish(batch)).logits
            if logits is None:
                raise no_classifier(f"the teacher {name}")
            _add(meter, logits[:left], name)
            keys += batch["keys"][:left]
            advance(len(keys))
            if len(keys) == wanted:
                break
    again = build.build_dataset(
        cfg, videos, {f"{name}/rgb": _as_frames(view)}, "train", clip_spec=clip, keep_index=False
    )

    def frame_of(place: int) -> tuple[npt.NDArray[np.uint8] | None, str]:
        sample = again[keys[place]]
        return _middle(sample["views"], _as_frames(view)), sample["path"]

    return _Seen(meter.read(), frame_of)


def _training_batches(session: Session, videos: Mixture, dataset: ClipDataset) -> Iterator[Any]:
    sampler = build.build_train_sampler(session.cfg, videos)
    epoch = 0
    while True:
        sampler.set_epoch(epoch)
        for batch in build.build_train_loader(session.cfg, dataset, sampler):
            session.bad_videos.add(batch["bad"], "train")
            if batch["keys"]:
                yield batch
        session.refuse_bad_corpus(len(videos), "train")
        epoch += 1


def _clip_spec(cfg: CfgNode) -> ViewSpec:
    return next(iter(outline(cfg).view_specs("train").values()))


def _add(meter: EntropyMeter, logits: Tensor, name: str) -> None:
    if not torch.isfinite(logits).all():
        raise UserError(
            f"the teacher {name} gives values that are not finite. Look at its weights, or use RUNNER.PRECISION fp32."
        )
    meter.add(logits)


# ------------------------------------------------------------------------------------------------ what was stored
def _from_cache(session: Session, name: str, num_clips: int) -> _Seen:
    """What is stored, without the teacher; examples need the videos, entropies do not."""
    cfg = session.cfg
    clip = _clip_spec(cfg)
    videos = session.corpora.clips("train")
    targets = build.build_targets(cfg, videos, "train", clip, only=name)[name]
    layout = targets.store.layout
    if layout.layer != "logits":
        raise UserError(
            f"DISTILL.TEACHERS.{name}.CACHE holds the teacher's {layout.layer}, which have no entropy. Clear CACHE, so "
            "that the teacher is asked."
        )
    entries = layout.clips * layout.crops
    order = np.arange(len(videos))
    if num_clips:
        order = np.random.default_rng(cfg.RNG_SEED).permutation(order)[: -(-num_clips // entries)]
    assert clip.num_frames is not None
    meter = EntropyMeter(cfg.DISTILL.TEACHERS[name].TEMPERATURE)
    places: list[npt.NDArray[np.int32]] = []
    with session.progress.work(f"stored entropy of {name}", len(order)) as advance:
        for done, index in enumerate(order.tolist(), start=1):
            if int(targets.rows[index]) not in targets.store.bad:
                logits, own = _stored(targets, index, clip.num_frames)
                _add(meter, logits, name)
                places.append(own)
            advance(done)
    if not places:
        raise UserError(f"{targets.store.folder} has no targets of any of these videos: all of them are bad.")
    return _Seen(meter.read(), _stored_frames(cfg, videos, targets, clip, np.concatenate(places)))


def _stored(targets: CachedTargets, index: int, num_frames: int) -> tuple[Tensor, npt.NDArray[np.int32]]:
    """The logits (n,K) of all examples that a training draws from one video; and video, clip and crop, frame of each.

    A gate looks at the mean over the picked frames. Of one random frame all are examples, they are equally likely.
    """
    layout, view = targets.store.layout, targets.view
    every_frame = layout.each_frame and view.pick == "random" and view.num_frames == 1
    logits, places = [], []
    for entry in range(layout.clips * layout.crops):
        if every_frame:
            logits.append(targets.store.read(int(targets.rows[index]), entry).float())
            places += [[index, entry, frame] for frame in range(layout.frames)]
            continue
        frames = picked_frames(view, num_frames, index + entry) if layout.each_frame else None
        stored = targets.store.read(int(targets.rows[index]), entry, frames)
        logits.append(joined(stored.unsqueeze(0)) if layout.each_frame else stored.float())
        places.append([index, entry, -1 if frames is None else int(frames[len(frames) // 2])])
    return torch.cat(logits), np.array(places, dtype=np.int32)


def _stored_frames(
    cfg: CfgNode, videos: Mixture, targets: CachedTargets, clip: ViewSpec, places: npt.NDArray[np.int32]
) -> Callable[[int], tuple[npt.NDArray[np.uint8] | None, str]]:
    layout, view = targets.store.layout, _as_frames(targets.view)
    if layout.each_frame:
        view = replace(view, pick="uniform", num_frames=view.pick_from or clip.num_frames)
    dataset = build.build_grid_dataset(cfg, videos, view, clip, "train", keep_index=False)

    def frame_of(place: int) -> tuple[npt.NDArray[np.uint8] | None, str]:
        index, entry, frame = places[place].tolist()
        number, crop = divmod(entry, layout.crops)
        position = (index * layout.clips + number) * layout.crops + crop
        sample = dataset[SampleKey(0, position, index, number, crop)]
        return _middle(sample["views"], view, frame), videos[index].path

    return frame_of


# ------------------------------------------------------------------------------------------------------- examples
def _as_frames(view: ViewSpec) -> ViewSpec:
    """The same places of the video as pictures, also where the teacher sees their flow."""
    return replace(view, modality="rgb", stack=1, mean=(0.5,) * 3, std=(0.5,) * 3)


def _middle(views: Mapping[str, Tensor], view: ViewSpec, frame: int = -1) -> npt.NDArray[np.uint8] | None:
    """(H,W,3) of a view (C,T,H,W): the frame, or the middle one."""
    if view.pixels not in views:
        return None
    clip = views[view.pixels]
    shown: npt.NDArray[np.uint8] = clip[:, frame if frame >= 0 else clip.shape[1] // 2].permute(1, 2, 0).numpy()
    return shown


def _examples(seen: _Seen, names: list[str], count: int) -> dict[str, list[Example]]:
    """Frames by level; those whose video cannot be read are left out."""
    found: dict[str, list[Example]] = {}
    if not count:
        return found
    for level, places in seen.density.examples(count).items():
        for place in places:
            frame, path = seen.frame_of(place)
            if frame is not None:
                entropy, answer = float(seen.density.entropies[place]), names[int(seen.density.answers[place])]
                found.setdefault(level, []).append(Example(frame, entropy, answer, path))
    return found
