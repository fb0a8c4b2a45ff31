"""Stand-ins for what PySlowFast imports and cannot find: its own folder under another name, detectron2, PyTorchVideo.

They go into ``sys.modules`` before anything of PySlowFast is imported, each only where the real thing is absent.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as functional
import torchvision.ops
from torch import Tensor, nn

from distinit_plugin.errors import UserError
from distinit_plugin.hosts.pytorchvideo.alias import alias_functional_tensor, importable, needs_functional_tensor
from distinit_plugin.hosts.slowfast.checkout import find_checkout
from distinit_plugin.hosts.slowfast.patches import Patch

ALIAS = "vision.fair.slowfast"
"""The name under which PySlowFast imports its own folder."""

TOOLS = f"{ALIAS}.tools"

GATHERING = (
    "cat_all_gather",
    "get_local_process_group",
    "get_local_rank",
    "get_local_size",
    "get_world_size",
    "init_distributed_training",
)
"""What ``slowfast.utils.distributed`` takes from PyTorchVideo."""


def put_module(name: str, **contents: Any) -> ModuleType:
    """A module of the given contents in ``sys.modules`` and in its parent, which must be there."""
    module = ModuleType(name)
    vars(module).update(contents)
    sys.modules[name] = module
    parent, _, child = name.rpartition(".")
    if parent:
        setattr(sys.modules[parent], child, module)
    return module


def alias_checkout() -> None:
    """Let ``vision.fair.slowfast`` mean the checkout's folder."""
    put_module("vision", __path__=[])
    put_module("vision.fair", __path__=[])
    put_module(ALIAS, __path__=[str(find_checkout())])


def _needs_alias() -> bool:
    text = (Path(find_checkout()) / "tools" / "run_net.py").read_text(encoding="utf-8")
    return ALIAS in text and not importable(ALIAS)


def _lacks_detectron2() -> bool:
    return not importable("detectron2") or not importable("detectron2.engine")


class ROIAlign(nn.Module):
    """torchvision's RoIAlign with the constructor of detectron2's."""

    def __init__(self, output_size: Any, spatial_scale: float, sampling_ratio: int, aligned: bool = True) -> None:
        """As ``torchvision.ops.roi_align``."""
        super().__init__()
        self.arguments = (output_size, spatial_scale, sampling_ratio, aligned)

    def forward(self, feature_map: Tensor, boxes: Tensor) -> Tensor:
        """(B,C,H,W) and boxes (R,5) → (R,C,h,w)."""
        return torchvision.ops.roi_align(feature_map, boxes.to(feature_map.dtype), *self.arguments)


def _put_roi_align() -> None:
    put_module("detectron2", __path__=[])
    put_module("detectron2.layers", ROIAlign=ROIAlign)


def _refusal(what: str) -> Callable[..., None]:
    def refuse(*_: Any, **__: Any) -> None:
        raise UserError(f"PySlowFast's {what} needs detectron2, which is not installed.")

    return refuse


def _put_demo() -> None:
    importlib.import_module(TOOLS)
    put_module(f"{TOOLS}.demo_net", demo=_refusal("DEMO.ENABLE"))
    put_module(f"{TOOLS}.visualization", visualize=_refusal("TENSORBOARD.MODEL_VIS and WRONG_PRED_VIS"))


# ------------------------------------------------------------------------------ pytorchvideo.layers.distributed

_local_group: list[Any] = []


def get_world_size() -> int:
    """Processes of the job; 1 when it is not distributed."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def init_distributed_training(num_gpus: int, shard_id: int) -> None:
    """Make the group of this machine's processes, which all processes of the job must do for all machines."""
    if num_gpus <= 1 or _local_group:
        return
    groups = [
        dist.new_group(list(range(first, first + num_gpus))) for first in range(0, dist.get_world_size(), num_gpus)
    ]
    _local_group.append(groups[shard_id])


def get_local_process_group() -> Any:
    """The group of this machine's processes."""
    assert _local_group, "init_distributed_training has not been called"
    return _local_group[0]


def get_local_size() -> int:
    """Processes on this machine."""
    return dist.get_world_size(group=_local_group[0]) if _local_group else 1


def get_local_rank() -> int:
    """Number of this process on its machine."""
    return dist.get_rank(group=_local_group[0]) if _local_group else 0


def cat_all_gather(tensors: Tensor, local: bool = False) -> Tensor:
    """The tensors of all processes (``local``: of this machine), one after the other along dimension 0."""
    group = get_local_process_group() if local else None
    parts = [torch.ones_like(tensors) for _ in range(get_local_size() if local else get_world_size())]
    dist.all_gather(parts, tensors, group=group, async_op=False)
    return torch.cat(parts, dim=0)


def _distributed_layers() -> ModuleType:
    return importlib.import_module("pytorchvideo.layers.distributed")


def _lacks_gathering() -> bool:
    return not all(hasattr(_distributed_layers(), name) for name in GATHERING)


def _put_gathering() -> None:
    module = _distributed_layers()
    for name in GATHERING:
        setattr(module, name, globals()[name])


class SoftTargetCrossEntropyLoss(nn.Module):
    """−Σ target · log softmax, over classes; the stand-in for PyTorchVideo's."""

    def __init__(self, ignore_index: int = -100, reduction: str = "mean", normalize_targets: bool = True) -> None:
        """``normalize_targets``: divide each row of targets by its sum. ``reduction``: mean or none."""
        super().__init__()
        if reduction not in ("mean", "none"):
            raise ValueError(f"reduction is {reduction!r}; mean or none are known")
        self.ignore_index, self.reduction, self.normalize_targets = ignore_index, reduction, normalize_targets

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Logits (B,K), targets (B,K), or labels (B,) of which ``ignore_index`` counts as nothing."""
        if targets.ndim == 1:
            kept = targets != self.ignore_index
            rows = functional.one_hot(targets.clamp(min=0), logits.shape[1]).to(logits.dtype)
            targets = rows * kept.unsqueeze(1)
        if self.normalize_targets:
            targets = targets / targets.sum(dim=1, keepdim=True).clamp(min=1e-5)
        losses = -(targets * logits.log_softmax(dim=1)).sum(dim=1)
        return losses.mean() if self.reduction == "mean" else losses


def _put_losses() -> None:
    importlib.import_module("pytorchvideo")
    put_module("pytorchvideo.losses", __path__=[])
    put_module("pytorchvideo.losses.soft_target_cross_entropy", SoftTargetCrossEntropyLoss=SoftTargetCrossEntropyLoss)


MISSING = (
    Patch(
        "vision",
        "No module named 'vision': PySlowFast imports its own tools by the name that its authors' company has for them",
        _needs_alias,
        alias_checkout,
    ),
    Patch(
        "demo",
        "No module named 'detectron2': run_net imports the demonstrations, whoever wants to train or not",
        _lacks_detectron2,
        _put_demo,
    ),
    Patch(
        "roi_align",
        "No module named 'detectron2': every network imports its ROIAlign (torchvision's stands in)",
        lambda: not importable("detectron2.layers"),
        _put_roi_align,
    ),
    Patch(
        "functional_tensor",
        "No module named 'torchvision.transforms.functional_tensor': PyTorchVideo 0.1.5, and with it the Ptv datasets",
        needs_functional_tensor,
        alias_functional_tensor,
    ),
    Patch(
        "gathering",
        "cannot import name 'cat_all_gather' from 'pytorchvideo.layers.distributed' (0.1.5)",
        _lacks_gathering,
        _put_gathering,
    ),
    Patch(
        "soft_targets",
        "No module named 'pytorchvideo.losses' (0.1.5)",
        lambda: not importable("pytorchvideo.losses"),
        _put_losses,
    ),
)
"""Cured before PySlowFast is imported, in this order."""
