"""Flow as a picture: the angle is the hue, the magnitude the saturation (as in D3D's figures, arXiv 1812.08249)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from distinit_plugin.errors import UserError
from distinit_plugin.flow.measures import known_flow


def flow_to_colour(flow: Tensor, scale: float) -> Tensor:
    """A picture of a flow.

    No motion is white. Motion to the right is red; turning clockwise, as one sees it, downwards is yellow-green, to the
    left cyan, upwards violet (hues 0°, 90°, 180°, 270°). A magnitude of ``scale`` or more has the full colour. Unknown
    flow (see ``measures.known_flow``) is black.

    Args:
        flow: (…,2,H,W), (u,v) in pixels.
        scale: The magnitude of full saturation, pixels.

    Returns:
        (…,3,H,W), uint8 RGB.

    Raises:
        UserError: A tensor of another shape, or a scale that is not positive.
    """
    if flow.ndim < 3 or flow.shape[-3] != 2:
        raise UserError(f"a picture is made of a flow (…,2,H,W), not of {tuple(flow.shape)}.")
    if not 0 < scale < math.inf:
        raise UserError(f"the scale of a flow's picture is {scale}; it must be a number of pixels above 0.")
    known = known_flow(flow)
    u, v = flow.float().where(known.unsqueeze(-3), 0.0).unbind(-3)
    saturation = (torch.hypot(u, v) / scale).clamp(max=1.0)
    sector = torch.atan2(v, u) * (3 / math.pi)  # hue in sixths of the circle, −3 … 3
    # HSV with value 1: each primary is taken from white by its distance from its own hue.
    shares = []
    for own_sector in (0.0, 2.0, 4.0):
        distance = (sector - own_sector).remainder(6.0)
        distance = torch.minimum(distance, 6.0 - distance)
        shares.append(1 - saturation * (distance - 1).clamp(0.0, 1.0))
    colours = (torch.stack(shares, dim=-3) * 255).round().to(torch.uint8)
    return colours * known.unsqueeze(-3)
