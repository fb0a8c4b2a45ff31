"""RAFT of torchvision as a back end, meant for a GPU.

Z. Teed, J. Deng, "RAFT: Recurrent All-Pairs Field Transforms for Optical Flow", ECCV 2020 (arXiv 2003.12039).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.optical_flow import Raft_Large_Weights, Raft_Small_Weights, raft_large, raft_small

from distinit_plugin.errors import UserError, WeightsError
from distinit_plugin.flow.backends import FlowBackend, register_backend
from distinit_plugin.registry import near_matches

TAGS = {"large": Raft_Large_Weights, "small": Raft_Small_Weights}
BUILDERS = {"large": raft_large, "small": raft_small}

MULTIPLE = 8
"""Sides of what the network sees are multiples of it, pixels."""

PAIRS_AT_ONCE = 32
"""Computed together: a pair takes about 35 MiB at 224×224 pixels."""

SMALLEST = 128
"""Of what the network sees, pixels; smaller frames are padded."""


@register_backend
class RAFT(FlowBackend):
    """Computes in fp32, on the frames' device."""

    name = "raft"
    min_side = 16

    def __init__(self, weights: str = "", *, size: Literal["large", "small"] = "large", updates: int = 12) -> None:
        """Build the network and load its weights.

        Args:
            weights: torchvision's tag (``C_T_SKHT_V2`` or ``DEFAULT``; downloaded once) or a file with a state dict.
            size: ``large`` or ``small``.
            updates: Recurrent updates of the flow.

        Raises:
            UserError: An argument that is not allowed.
            WeightsError: No such weights, or they are of another network.
        """
        if size not in BUILDERS:
            raise UserError(f"raft: size {size!r}; large or small are allowed.")
        if not weights:
            tags = ", ".join(TAGS[size].__members__)
            raise UserError(f"raft needs weights (--weights, FLOW.WEIGHTS): a file, or a tag of torchvision ({tags}).")
        if not 1 <= updates <= 100:
            raise UserError(f"raft: {updates} updates; 1 to 100 are allowed.")
        self.size, self.updates = size, updates
        state = _read_weights(weights, size)
        network = BUILDERS[size]()
        _load(network, state, weights, size)
        self._network: nn.Module = network.eval().requires_grad_(False)
        self._digest = _digest(state)

    @property
    def identity(self) -> str:
        """See ``FlowBackend``; the weights are named by what is in them, wherever they came from."""
        return (
            f"raft({self.size}, updates={self.updates}, weights sha256 {self._digest}) "
            f"torchvision {torchvision.__version__}"
        )

    def _compute(self, first: Tensor, second: Tensor) -> Tensor:
        height, width = first.shape[-2:]
        self._network.to(first.device)
        flows = []
        with torch.autocast(first.device.type, enabled=False):
            for pair in zip(first.split(PAIRS_AT_ONCE), second.split(PAIRS_AT_ONCE), strict=True):
                frames = (_prepare(part) for part in pair)
                found = self._network(*frames, num_flow_updates=self.updates)[-1]
                flows.append(found[..., :height, :width].float())
        return torch.cat(flows)


def _prepare(frames: Tensor) -> Tensor:
    """To [−1, 1], with the last row and column repeated up to a size that the network takes."""
    height, width = (max(SMALLEST, -(-side // MULTIPLE) * MULTIPLE) for side in frames.shape[-2:])
    pixels = frames.float() / 127.5 - 1
    return F.pad(pixels, (0, width - frames.shape[-1], 0, height - frames.shape[-2]), mode="replicate")


def _read_weights(weights: str, size: str) -> Mapping[str, Tensor]:
    tags = [*TAGS[size].__members__, "DEFAULT"]
    if weights in tags:
        try:
            found: Mapping[str, Tensor] = TAGS[size][weights].get_state_dict(progress=False, check_hash=True)
        except Exception as error:  # no network, no space, a damaged download: urllib and torch raise all kinds
            raise WeightsError(
                f"raft: torchvision's weights {weights} cannot be downloaded ({error}). Download the file elsewhere "
                "and give its path."
            ) from error
        return found
    path = Path(weights).expanduser()
    if not path.is_file():
        raise WeightsError(
            f"raft: {weights} is neither a weights file nor one of torchvision's tags {', '.join(tags)}."
            f"{near_matches(weights, tags)}"
        )
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a hostile pickle can raise anything
        raise WeightsError(
            f"raft: {path} cannot be read as weights: it is damaged or holds more than tensors. Save "
            "network.state_dict() with torch.save."
        ) from error
    if not isinstance(state, Mapping) or not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise WeightsError(f"raft: {path} is not a state dict. Save network.state_dict() with torch.save.")
    return state


def _load(network: nn.Module, state: Mapping[str, Tensor], weights: str, size: str) -> None:
    own = network.state_dict()
    wrong = [key for key in own if key not in state or state[key].shape != own[key].shape]
    wrong += [key for key in state if key not in own]
    if wrong:
        raise WeightsError(
            f"raft: {weights} does not hold the weights of torchvision's raft_{size}: {len(wrong)} keys are missing, "
            f"of another shape or unknown, the first is {wrong[0]}. Give other weights or the other size."
        )
    network.load_state_dict(state)


def _digest(state: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for key in sorted(state):
        digest.update(key.encode())
        digest.update(state[key].detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
