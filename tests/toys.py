"""Tiny networks, corpora in memory and objectives for tests of the engine."""

from collections.abc import Collection, Iterable, Mapping
from types import MappingProxyType

import numpy as np
import torch
from torch import Tensor, nn

from distinit_plugin.types import BadVideo, Batch, LayerInfo, ModelOutput, SampleKey, ViewSpec

SIZE, FRAMES = 8, 4
SPEC = ViewSpec(num_frames=FRAMES, crop_size=SIZE)


class ToyNetwork(nn.Module):
    """conv – BN – ReLU – pool – dropout – fc; the ``Network`` contract."""

    def __init__(self, num_classes: int = 3, width: int = 4, dropout: float = 0.0, seed: int = 0) -> None:
        super().__init__()
        generator_state = torch.get_rng_state()
        torch.manual_seed(seed)
        self.conv = nn.Conv3d(3, width, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm3d(width)
        self.dropout = nn.Dropout(dropout)
        self.feature_dim = width
        self.layers = MappingProxyType({"conv": LayerInfo(width, 1, 1)})
        self.reset_classifier(num_classes)
        torch.set_rng_state(generator_state)

    def reset_classifier(self, num_classes: int) -> None:
        self.num_classes = num_classes
        self.fc = nn.Linear(self.feature_dim, num_classes) if num_classes else None

    def view_specs(self, split: str) -> Mapping[str, ViewSpec]:
        return {"rgb": SPEC}

    def forward(
        self, views: Mapping[str, Tensor], *, boxes: Tensor | None = None, taps: Collection[str] = ()
    ) -> ModelOutput:
        maps = self.bn(self.conv(views["rgb"])).relu()
        features = self.dropout(maps.mean((2, 3, 4)))
        logits = None if self.fc is None else self.fc(features)
        return ModelOutput(logits, features, dict.fromkeys(taps, maps))

    def bare_state_dict(self) -> dict[str, Tensor]:
        return dict(self.state_dict())


class Net(nn.Module):
    """conv with bias – BN – frozen conv – fc, and one parameter that two modules share."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv3d(3, 4, 1)
        self.bn = nn.BatchNorm3d(4)
        self.frozen = nn.Conv3d(4, 4, 1).requires_grad_(False)
        self.fc = nn.Linear(4, 2)
        self.again = nn.Linear(4, 2)
        self.again.weight = self.fc.weight

    def forward(self, views: dict[str, Tensor]) -> Tensor:
        return self.fc(self.frozen(self.bn(self.conv(views["rgb"]))).mean((2, 3, 4)))


def clip_pixels(seed: int, label: int = 0) -> Tensor:
    """uint8 (3,T,H,W): noise of a random colour, a little brighter in the channel of the label."""
    rng = np.random.default_rng([seed, label])
    pixels = rng.integers(0, 100, (3, FRAMES, SIZE, SIZE)) + rng.integers(0, 100, (3, 1, 1, 1))
    pixels[label % 3] += 50
    return torch.from_numpy(pixels).to(torch.uint8)


def batch_of(
    keys: Iterable[SampleKey], *, labeled: bool = True, bad: Iterable[BadVideo] = (), classes: int = 3
) -> Batch:
    """The clips of some keys: video ``index`` has label ``index % classes``; bad ones are left out by the caller."""
    keys = list(keys)
    labels = [key.index % classes for key in keys]
    pixels = [clip_pixels(1000 * key.index + 10 * key.clip + key.crop, key.index % classes) for key in keys]
    return {
        "views": {SPEC.pixels: torch.stack(pixels)} if keys else {},
        "keys": keys,
        "paths": [f"video{key.index}.mp4" for key in keys],
        "targets": {"label": torch.tensor(labels)} if labeled and keys else {},
        "bad": list(bad),
    }
