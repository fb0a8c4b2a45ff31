"""What stands between a layer of the student and what it is compared with."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

import torch.nn.functional as functional
from torch import Tensor, nn

from distinit_plugin.errors import UserError
from distinit_plugin.flow.motion import flow_on_grid
from distinit_plugin.losses import full_precision
from distinit_plugin.models.flow_decoders import FLOW_DECODERS, FlowDecoder
from distinit_plugin.registry import near_matches
from distinit_plugin.types import ModelOutput, Network

POOLED = ("logits", "features")
"""Layers that are vectors per clip; every other layer is a map (B,C,T,H,W)."""

OFFSETS = "offsets"
"""The student's corrections of boxes, one row per box."""

HEADS = ("linear", "own", *FLOW_DECODERS)

Match = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""(prediction, target) → both, so that each position of one is compared with one of the other."""


def build_adapter(
    kind: str,
    student: Network,
    student_layer: str,
    teacher: Network,
    teacher_layer: str,
    *,
    decoder_norm: bool = False,
) -> nn.Module:
    """The layer between a student's layer and what it is compared with.

    ``linear``: a new linear layer, or a 1×1×1 convolution between maps (its output is brought to the teacher's grid
    by ``match_grid``, which commutes with it). ``own``: the identity. ``simple``, ``spatial``, ``pwc``: a decoder of
    flow, with batch normalisation where ``decoder_norm``.

    Raises:
        UserError: There is no such kind or layer, a map meets a vector, or ``own`` and the sizes differ.
    """
    if kind not in HEADS:
        near = near_matches(kind, list(HEADS))
        raise UserError(f"there is no HEAD named '{kind}'.{near} Allowed: {', '.join(HEADS)}.")
    source, target = layer_sizes(student, student_layer, teacher, teacher_layer)
    if kind in FLOW_DECODERS:
        return FlowDecoder(kind, source, norm=decoder_norm)
    if kind == "own":
        check_equal_sizes(student_layer, source, teacher_layer, target)
        return nn.Identity()
    return nn.Linear(source, target) if student_layer in POOLED else nn.Conv3d(source, target, kernel_size=1)


def layer_size(network: Network, layer: str, owner: str) -> int:
    """Size of dimension 1 of a layer: classes, feature dimension or channels.

    Args:
        network: Whose layer.
        layer: ``logits``, ``features`` or a name in ``network.layers``.
        owner: Who the network is, for errors ("the student").

    Returns:
        The size.

    Raises:
        UserError: There is no such layer, or no classifier.
    """
    if layer == "features":
        return network.feature_dim
    if layer == "logits":
        if network.num_classes == 0:
            raise no_classifier(owner)
        return network.num_classes
    if layer not in network.layers:
        known = [*POOLED, *network.layers]
        raise UserError(f"{owner} has no layer named '{layer}'.{near_matches(layer, known)} Known: {', '.join(known)}.")
    return network.layers[layer].channels


def match_grid(prediction: Tensor, target: Tensor) -> Tensor:
    """Bring a map (B,K,T,H,W) to the grid of the target map; anything else comes back as it is.

    In time, and in space where the target is coarser, cells are averaged (adaptive windows that cover the whole clip:
    a teacher of one frame is compared with the mean over the student's frames). In space, where the target is finer,
    values are interpolated linearly.
    """
    if prediction.ndim != 5 or target.ndim != 5 or prediction.shape[2:] == target.shape[2:]:
        return prediction
    frames, height, width = target.shape[2:]
    pooled = functional.adaptive_avg_pool3d(
        full_precision(prediction), (frames, min(height, prediction.shape[3]), min(width, prediction.shape[4]))
    )
    if pooled.shape[3:] == target.shape[3:]:
        return pooled
    return functional.interpolate(pooled, size=(frames, height, width), mode="trilinear", align_corners=False)


def on_teachers_grid(prediction: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """The prediction comes to the target's grid (``match_grid``); a target without steps holds at every one."""
    prediction = match_grid(prediction, target)
    return prediction, at_every_step(target, prediction)


def on_students_grid(alignment: str) -> Match:
    """The target, a flow, comes to the prediction's grid (``flow_on_grid``, with that alignment in time)."""
    return partial(_flow_to_prediction, alignment=alignment)


def _flow_to_prediction(prediction: Tensor, target: Tensor, *, alignment: str) -> tuple[Tensor, Tensor]:
    frames, height, width = prediction.shape[2:]
    return prediction, flow_on_grid(target, (frames, height, width), alignment)


def layer_sizes(student: Network, student_layer: str, teacher: Network, teacher_layer: str) -> tuple[int, int]:
    """Sizes of the student's and of the teacher's layer.

    Raises:
        UserError: One of them does not exist, or a vector meets a map.
    """
    source = layer_size(student, student_layer, "the student")
    target = layer_size(teacher, teacher_layer, "the teacher")
    if (student_layer in POOLED) != (teacher_layer in POOLED):
        raise UserError(
            f"the student's '{student_layer}' cannot be compared with the teacher's '{teacher_layer}': one is a vector "
            "per clip, the other a map. Use logits or features on both sides, or a layer on both sides."
        )
    return source, target


def check_equal_sizes(student_layer: str, source: int, teacher_layer: str, target: int) -> None:
    """Raise :class:`UserError` when the sizes differ."""
    if source != target:
        raise UserError(
            f"the student's {student_layer} have size {source}, the teacher's {teacher_layer} {target}: HEAD own needs "
            "equal sizes. Set MODEL.NUM_CLASSES to the teacher's number of classes, or use HEAD linear."
        )


def no_classifier(owner: str) -> UserError:
    """The error for logits that do not exist."""
    return UserError(
        f"{owner} has no classifier, so it has no logits. Use its features, or build it with a number of classes."
    )


def at_every_step(target: Tensor, prediction: Tensor) -> Tensor:
    """A teacher's vector (B,K) for a prediction over time (B,K,T) holds at every step; anything else comes back."""
    if prediction.ndim == 3 and target.ndim == 2:
        return target.unsqueeze(2).expand(-1, -1, prediction.shape[2])
    return target


def layer_output(output: ModelOutput, layer: str, owner: str) -> Tensor:
    """One layer of what a network returned; logits over time (B,K,T) stand for its logits where it has them.

    Raises:
        UserError: The network returned no logits, features or offsets.
    """
    if layer == "logits":
        if output.logits is None:
            raise no_classifier(owner)
        return output.logits if output.logits_over_time is None else output.logits_over_time
    if layer == "features":
        if output.features is None:
            raise UserError(f"{owner} returns no features; use its logits or one of its layers.")
        return output.features
    if layer == OFFSETS:
        if output.offsets is None:
            raise UserError(f"{owner} corrects no boxes; set ROI.REFINE_BOXES True.")
        return output.offsets
    return output.taps[layer]


def tapped_layers(layers: Iterable[str]) -> tuple[str, ...]:
    """Those that have to be asked for by name, each once."""
    return tuple(dict.fromkeys(layer for layer in layers if layer not in (*POOLED, OFFSETS)))
