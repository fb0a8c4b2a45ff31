"""The two orders in which optimizers number what trains, and the way from one to the other.

This package's optimizer has one list of groups (normalisation, others, without weight decay), in each of them first the
student's parameters and then those of new heads. PySlowFast's has the student's groups first, as it has them without
heads, and then groups of the heads alone. Both number their slots through all groups. So a state is carried over by
naming the parameters of both orders, one against the other.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from distinit_plugin.errors import WeightsError

Group = Mapping[str, Any]


def in_order(groups: Iterable[Group]) -> list[nn.Parameter]:
    """The parameters of an optimizer's groups, as it numbers them."""
    return [parameter for group in groups for parameter in group["params"]]


def apart(groups: Sequence[Group], students: Collection[int]) -> list[nn.Parameter]:
    """PySlowFast's order of the parameters of this package's groups.

    Args:
        groups: Of this package's optimizer.
        students: ``id`` of each parameter of the student.
    """
    order = in_order(groups)
    return [one for one in order if id(one) in students] + [one for one in order if id(one) not in students]


def joint(student: Sequence[Group], heads: Sequence[Group], norms: Collection[int]) -> list[nn.Parameter]:
    """This package's order of the parameters of PySlowFast's groups.

    Args:
        student: The groups of the student.
        heads: Those of new heads.
        norms: ``id`` of each parameter of a normalisation layer.
    """
    parts = [_kinds(groups, norms) for groups in (student, heads)]
    return [one for kind in range(3) for part in parts for one in part[kind]]


def _kinds(groups: Sequence[Group], norms: Collection[int]) -> list[list[nn.Parameter]]:
    """Normalisation, others, without weight decay: of the last two the second is there beside the first alone."""
    norm = [group for group in groups if id(group["params"][0]) in norms]
    others = [group for group in groups if id(group["params"][0]) not in norms]
    return [in_order(norm), in_order(others[:1]), in_order(others[1:])]


def renumbered(
    saved: Mapping[str, Any], before: Sequence[nn.Parameter], after: Sequence[nn.Parameter], groups: Sequence[Group]
) -> dict[str, Any]:
    """An optimizer's state under other numbers.

    Args:
        saved: Its ``state_dict``.
        before: The parameters in the order in which the groups of ``saved`` number them.
        after: The same in the order of the optimizer that takes it.
        groups: That optimizer's own ``state_dict()["param_groups"]``, whose settings stay.

    Raises:
        WeightsError: ``saved`` is not of these parameters.
    """
    numbers = [number for group in saved["param_groups"] for number in group["params"]]
    if any(float(group.get("layer_decay", 1.0)) != 1.0 for group in saved["param_groups"]):
        raise WeightsError(
            "its optimizer has a group for each layer (SOLVER.LAYER_DECAY below 1), which cannot be carried over: set "
            "TRAIN.CHECKPOINT_EPOCH_RESET True to start from its weights."
        )
    if len(numbers) != len(before):
        raise WeightsError(
            f"its optimizer trained {len(numbers)} tensors, this job trains {len(before)}: set MODEL, DISTILL, ACTION "
            "and SOLVER as they were, or TRAIN.CHECKPOINT_EPOCH_RESET True to start from its weights."
        )
    places = {id(parameter): place for place, parameter in enumerate(after)}
    state = {}
    for number, parameter in zip(numbers, before, strict=True):
        if number not in saved["state"]:
            continue
        slots = saved["state"][number]
        for name, value in slots.items():
            if getattr(value, "ndim", 0) and value.shape != parameter.shape:
                raise WeightsError(
                    f"its optimizer's {name} number {number} is {tuple(value.shape)}, this job's tensor is "
                    f"{tuple(parameter.shape)}: set MODEL, DISTILL, ACTION and SOLVER as they were, or "
                    "TRAIN.CHECKPOINT_EPOCH_RESET True to start from its weights."
                )
        state[places[id(parameter)]] = slots
    return {"state": state, "param_groups": [dict(group) for group in groups]}
