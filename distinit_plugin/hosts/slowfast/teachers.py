"""What teachers are shown in PySlowFast: further tensors after the student's pathways, in training alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from distinit_plugin import build
from distinit_plugin.config.node import CfgNode
from distinit_plugin.config.rules import FLOW
from distinit_plugin.data.flow import LiveFlow
from distinit_plugin.data.views import finish_views
from distinit_plugin.hosts.slowfast.networks import is_own
from distinit_plugin.teachers import FlowView
from distinit_plugin.types import Sample, Split, ViewSpec


def student_specs(cfg: CfgNode, split: Split) -> dict[str, ViewSpec]:
    """The student's views by its own names; those of a network of PySlowFast are one clip."""
    if not is_own(cfg.MODEL.MODEL_NAME):
        return dict(build.input_spec(cfg).view_specs(split))
    with torch.device("meta"):
        return dict(build.build_network(cfg).view_specs(split))


def sees_flow(specs: Mapping[str, ViewSpec]) -> bool:
    """Whether one of the views is flow."""
    return any(spec.modality == "flow" for spec in specs.values())


class Extras:
    """The tensors that follow the pathways: raw views, each distinct one once, then stored targets.

    Attributes:
        specs: ``TEACHER/view`` → what that teacher must be fed.
        cached: Teachers whose outputs are stored.
        names: What each tensor is: keys of ``Sample.views``, then names of ``cached``.
    """

    def __init__(self, cfg: CfgNode | None = None) -> None:
        """Those of a configuration; without one, none."""
        self.specs: dict[str, ViewSpec] = {}
        self.cached: list[str] = []
        self.names: list[str] = []
        if cfg is None:
            return
        clip = build.input_spec(cfg)
        for name, entry in sorted(cfg.DISTILL.TEACHERS.items()):
            if entry.LOSS_WEIGHT <= 0:
                continue
            if entry.CACHE:
                self.cached.append(name)
            elif entry.ARCH == FLOW:
                self.specs |= {f"{name}/{view}": spec for view, spec in FlowView(clip).view_specs("train").items()}
            else:
                spec = build.teacher_view(cfg, name, clip)
                self.specs[f"{name}/{spec.modality}"] = spec
        live = not cfg.FLOW.STORE
        raw = [spec.pairs if spec.modality == "flow" and live else spec.pixels for spec in self.specs.values()]
        self.names = [*dict.fromkeys(raw), *self.cached]

    @property
    def computes_flow(self) -> bool:
        """Whether flow has to be computed from pairs of frames."""
        return any(spec.pairs in self.names for spec in self.specs.values())

    def of(self, sample: Sample) -> list[Tensor]:
        """The tensors of a sample, in the order of ``names``."""
        return [sample["targets"][name] if name in self.cached else sample["views"][name] for name in self.names]

    def finish(self, tensors: Sequence[Tensor], flow: LiveFlow | None) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Batches of those tensors → views as ``Objective.prepare`` takes them, and stored targets."""
        given: Mapping[str, Tensor] = dict(zip(self.names, tensors, strict=True))
        views = {name: tensor for name, tensor in given.items() if name not in self.cached}
        targets = {name: given[name] for name in self.cached}
        if not self.specs:
            return {}, targets
        return finish_views(views, self.specs, tensors[0].device, flow=flow), targets
