"""Composition: from a configuration to the parts of a job. Everything else takes plain typed arguments."""

from __future__ import annotations

from distinit_plugin.building.data import (
    CORPUS_KEYS,
    FRAME_INDEX_FOLDER,
    build_corpora,
    build_dataset,
    build_grid_dataset,
    build_records,
    build_test_loader,
    build_train_loader,
    build_train_sampler,
    has_corpus,
    pins_memory,
    view_specs,
)
from distinit_plugin.building.detection import Judge, build_judge, build_selection
from distinit_plugin.building.flow import build_live_flow
from distinit_plugin.building.keyframes import build_keyframes, build_sources
from distinit_plugin.building.networks import (
    build_network,
    build_objective,
    build_teacher,
    build_teachers,
    cache_part,
    initialize_network,
    input_spec,
    needs_own_logits,
    refuse_part_of_a_trunk,
    teacher_view,
)
from distinit_plugin.building.optimisation import build_optimizer, build_schedule
from distinit_plugin.building.targets import build_targets, describe_targets, shown_grid, stores_each_frame

__all__ = [
    "CORPUS_KEYS",
    "FRAME_INDEX_FOLDER",
    "Judge",
    "build_corpora",
    "build_dataset",
    "build_grid_dataset",
    "build_judge",
    "build_keyframes",
    "build_live_flow",
    "build_network",
    "build_objective",
    "build_optimizer",
    "build_records",
    "build_schedule",
    "build_selection",
    "build_sources",
    "build_targets",
    "build_teacher",
    "build_teachers",
    "build_test_loader",
    "build_train_loader",
    "build_train_sampler",
    "cache_part",
    "describe_targets",
    "has_corpus",
    "initialize_network",
    "input_spec",
    "needs_own_logits",
    "pins_memory",
    "refuse_part_of_a_trunk",
    "shown_grid",
    "stores_each_frame",
    "teacher_view",
    "view_specs",
]
