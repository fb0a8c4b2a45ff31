"""Teachers' targets that are cached: for which clips and crops, what decides their values, and where they are read."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping

from distinit_plugin.building.networks import cache_part, input_spec, teacher_view
from distinit_plugin.config.defaults import TEACHER_ENTRY
from distinit_plugin.config.load import cfg_text
from distinit_plugin.config.node import CfgNode
from distinit_plugin.config.rules import NETWORK_DEPTHS
from distinit_plugin.data.targets import CachedTargets, rows_of
from distinit_plugin.detection.keyframes import Keyframes
from distinit_plugin.errors import UserError, naming
from distinit_plugin.flow.store import FlowStore
from distinit_plugin.teachers.cache import TargetStore, differences
from distinit_plugin.types import Split, ViewSpec
from distinit_plugin.video.corpus import Mixture
from distinit_plugin.video.grid import Grid
from distinit_plugin.weights.sources import weights_digest

FIXED_PICKS = ("center", "keyframe", "uniform", "clip")
"""Frame picks that need no random numbers: what a teacher gives for a clip is then one row."""


def training_grid(cfg: CfgNode) -> Grid:
    """The clips and crops that a training shows."""
    grid = cfg.DISTILL.GRID
    scale = grid.SCALE or sum(cfg.DATA.TRAIN_JITTER_SCALES) // 2
    return Grid(clips=grid.CLIPS, crops=grid.CROPS, scale=scale, flip=cfg.DATA.RANDOM_FLIP)


def shown_grid(cfg: CfgNode, split: Split, view: ViewSpec) -> Grid:
    """The clips and crops that one teacher is shown: in training those of the grid, in validation the middle."""
    if split != "train":
        return Grid(clips=1, crops=1, scale=cfg.CORPUS.TEST_SCALE or cfg.DATA.TEST_CROP_SIZE)
    grid = training_grid(cfg)
    return Grid(grid.clips, 1, grid.scale) if view.crop == "center" else grid


def stores_each_frame(view: ViewSpec) -> bool:
    """Whether any frame of the clip may be picked, so that the outputs of all of them are stored."""
    return view.pick not in FIXED_PICKS


def build_targets(
    cfg: CfgNode, videos: Mixture | Keyframes, split: Split, clip_spec: ViewSpec, *, only: str = ""
) -> dict[str, CachedTargets]:
    """The cached targets of a use, by the names of their teachers.

    Neither the teacher's network nor what makes its view is touched.

    Args:
        cfg: The configuration.
        videos: Of this use; targets of keyframes cannot be cached.
        split: ``train`` or ``val``.
        clip_spec: The student's first view.
        only: The one teacher that is asked for; empty: all.

    Raises:
        UserError: A cache is not there, damaged, not complete, or of another teacher, view, grid or corpus: each item
            that differs is named.
    """
    found = {}
    for name, entry in sorted(cfg.DISTILL.TEACHERS.items()):
        if not entry.CACHE or entry.LOSS_WEIGHT <= 0 or only not in ("", name):
            continue
        with naming(f"DISTILL.TEACHERS.{name}.CACHE"):
            store = TargetStore.open(cache_part(entry.CACHE, split))
            view = teacher_view(cfg, name, input_spec(cfg))
            differing = _differences(store, describe_targets(cfg, name, split, clip_spec))
            if differing:
                raise UserError(
                    f"{store.folder} holds targets that are not those of this job ({'; '.join(differing)}). Set what "
                    "differs as it was, or make targets for this job (distinit cache-targets, into another folder)."
                )
            frames = (view.pick_from or clip_spec.num_frames) if store.layout.each_frame else 1
            if store.layout.frames != frames:
                raise UserError(
                    f"{store.folder} is damaged: its layout has {store.layout.frames} frames a clip, and this job's "
                    f"clips have {frames}. Remove the folder and make the targets again."
                )
            assert not isinstance(videos, Keyframes), name
            found[name] = CachedTargets(store, rows_of(store, videos), view)
    return found


def describe_targets(cfg: CfgNode, name: str, split: Split, clip_spec: ViewSpec) -> dict[str, str]:
    """What decides a teacher's targets, but for the corpus: item → value in words; empty: not to be known here.

    Args:
        cfg: The configuration.
        name: Of the teacher.
        split: ``train`` or ``val``.
        clip_spec: The student's first view.
    """
    entry = cfg.DISTILL.TEACHERS[name]
    view = teacher_view(cfg, name, input_spec(cfg))
    rate = f"{clip_spec.target_fps:g} frames per second" if clip_spec.target_fps else "the video's frames"
    mean, std = (", ".join(f"{value:g}" for value in values) for values in (view.mean, view.std))
    words = {
        "teacher": _network_words(entry),
        "layer": f"logits of {entry.NUM_CLASSES} classes" if entry.LAYER == "logits" else entry.LAYER,
        "weights": weights_digest(entry.ARCH, entry.WEIGHTS),
        "view": f"{view.modality}, {view.crop_size} pixels, mean {mean}, std {std}",
        "frames": _frames_words(view, clip_spec),
        "clip": f"{clip_spec.num_frames} frames, {clip_spec.sampling_rate} apart, of {rate}",
        "grid": _grid_words(shown_grid(cfg, split, view), view, clip_spec),
    }
    if view.modality == "flow":
        words["flow"] = _flow_words(cfg)
    return words


def _network_words(entry: CfgNode) -> str:
    depth = [f"DEPTH {entry.DEPTH}"] if entry.ARCH in NETWORK_DEPTHS else []
    if entry.CFG:
        depth.append(f"CFG {hashlib.sha256(cfg_text(entry.CFG).encode()).hexdigest()[:16]}")
    default = TEACHER_ENTRY.NETWORK
    switches = [f"{key} {value}" for key, value in sorted(entry.NETWORK.items()) if value != default[key]]
    return ", ".join([entry.ARCH, *depth, *switches])


def _frames_words(view: ViewSpec, clip_spec: ViewSpec) -> str:
    count = view.pick_from or clip_spec.num_frames
    if view.pick == "clip":
        return "the clip"
    return f"each of {count}" if stores_each_frame(view) else f"{view.pick}, {view.num_frames} of {count}"


def _grid_words(grid: Grid, view: ViewSpec, clip_spec: ViewSpec) -> str:
    crops = "the centre crop" if grid.crops == 1 else f"{grid.crops} crops"
    mirrored = " and mirrored" if grid.flip else ""
    region = f"{clip_spec.crop_size} pixels of a short side of {grid.scale}"
    return f"{grid.clips} clips of a video, {crops}{mirrored}, {region}, VIEW {view.crop}"


def _flow_words(cfg: CfgNode) -> str:
    flow = cfg.FLOW
    seen = f"seen within {flow.BOUND:g} pixels"
    computed = f"{flow.BACKEND}{f' {flow.RAFT_SIZE} {os.path.basename(flow.WEIGHTS)}' if flow.WEIGHTS else ''}"
    if not flow.STORE:
        return f"computed by {computed}, rounding {flow.ROUNDING}, {seen}"
    gaps = f", gaps filled by {computed}" if flow.MISSING == "live" else ""
    if flow.LAYOUT != "store":
        return f"stored as {flow.LAYOUT}, rounding {flow.ROUNDING}, {seen}{gaps}"
    if not os.path.exists(os.path.expanduser(flow.STORE)):
        return ""
    with naming("FLOW.STORE"):
        made = FlowStore.open(flow.STORE).settings
    assert made is not None
    rate = "" if made.fps is None else f", {made.fps:g} fps"
    return (
        f"stored by {made.backend} at size {made.size}{rate}, within {made.bound:g} pixels, rounding {made.rounding}, "
        f"{seen}{gaps}"
    )


def _differences(store: TargetStore, now: Mapping[str, str]) -> list[str]:
    """What differs, as far as it can be known here."""
    known = {item: value for item, value in now.items() if value}
    there = store.identity
    if known.get("weights") and there.get("weights", "").startswith(known["weights"]):
        del known["weights"]
    if store.layout.each_frame and there.get("frames", "").removeprefix("each of ") == known["frames"].split()[-1]:
        del known["frames"]  # any pick among the same frames is served
    return differences(there, known)
