"""Networks whose outputs for a clip are those for its frames: averaged, and maps one after the other."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from distinit_plugin.types import Network


def averages_frames(network: Network) -> bool:
    """Whether a network sees each frame alone: its logits and features are means over frames, its maps (B,C,T,H,W)."""
    return bool(getattr(network, "averages_frames", False))


def as_examples(views: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Every frame as an example: (B,C,T,H,W) → (B·T,C,1,H,W)."""
    return {name: view.transpose(1, 2).flatten(0, 1).unsqueeze(2).contiguous() for name, view in views.items()}


def joined(per_frame: Tensor) -> Tensor:
    """What such a network gives for clips, from what it gives for their frames.

    Args:
        per_frame: Logits or features (B,P,K), or maps (B,P,C,H,W).

    Returns:
        (B,K), the fp32 mean, or (B,C,P,H,W).
    """
    return per_frame.float().mean(dim=1) if per_frame.ndim == 3 else per_frame.transpose(1, 2)
