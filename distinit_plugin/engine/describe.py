"""What a network is, without weights and without arithmetic: parameters, GMACs, and the geometry of its layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.table import Table
from torch import nn

from distinit_plugin.detection.network import RoiNetwork
from distinit_plugin.engine.evaluate import evaluation_mode
from distinit_plugin.engine.profile import count_macs
from distinit_plugin.engine.receptive import Extent, UntracedError, receptive_fields
from distinit_plugin.errors import UserError
from distinit_plugin.types import Network, Split, ViewSpec


@dataclass(frozen=True)
class LayerRow:
    """One layer that can be tapped.

    Attributes:
        name: Of the layer.
        shape: (C,T,H,W) of its output for one clip.
        temporal_stride: Input positions between neighbouring units, as the network declares.
        spatial_stride: Pixels between them.
        frames: View → what a central unit sees in time; ``None``: nothing of that view. Empty: not known.
        pixels: The same for the height, which equals the width.
    """

    name: str
    shape: tuple[int, ...]
    temporal_stride: int
    spatial_stride: int
    frames: dict[str, Extent | None]
    pixels: dict[str, Extent | None]


@dataclass(frozen=True)
class Description:
    """A network for one size of clips.

    Attributes:
        name: Of the network.
        views: View → (C,T,H,W) of one clip.
        parameters: All of them (BN's running statistics are none).
        trainable: Those that are trained.
        classifier: Those of the classifier.
        macs: Multiply-accumulates of one forward pass of one clip (convolutions and matrix products).
        feature_dim: D of the pooled features.
        num_classes: K of the logits; 0 without a classifier.
        layers: In the order in which they run.
        not_traced: Why no receptive fields are known; empty: they are.
    """

    name: str
    views: dict[str, tuple[int, ...]]
    parameters: int
    trainable: int
    classifier: int
    macs: int
    feature_dim: int
    num_classes: int
    layers: list[LayerRow]
    not_traced: str

    def as_json(self) -> dict[str, Any]:
        """Plain values; an extent is ``{"size", "stride", "everything"}``."""
        plain = asdict(self)
        for row, layer in zip(plain["layers"], self.layers, strict=True):
            for key, extents in (("frames", layer.frames), ("pixels", layer.pixels)):
                row[key] = {view: extent._asdict() if extent else None for view, extent in extents.items()}
        return plain

    @property
    def text(self) -> str:
        """The lines above the table."""
        views = "; ".join(f"{name} {_times(shape)}" for name, shape in self.views.items())
        return (
            f"{self.name} for {views} (C×T×H×W)\n"
            f"parameters: {self.parameters:,}; trainable: {self.trainable:,}; of the classifier: {self.classifier:,} "
            f"({self.feature_dim} features → {self.num_classes} classes)\n"
            f"GMACs per clip: {self.macs / 1e9:.3f}"
        )

    @property
    def table(self) -> Table:
        """The layers; 80 columns hold it, and nothing in it may be broken."""
        table = Table()
        for title in ("layer", "output\nC×T×H×W", "stride\nT", "stride\nHW", "receptive\nfield"):
            table.add_column(title, justify="left" if title == "layer" else "right", no_wrap=True)
        for row in self.layers:
            strides = (str(row.temporal_stride), str(row.spatial_stride))
            table.add_row(row.name, _times(row.shape), *strides, self._field(row))
        return table

    @property
    def notes(self) -> str:
        """What stands below the table; may be empty."""
        notes = []
        if self.not_traced:
            notes.append(f"receptive fields: not known, {self.not_traced}.")
        extents = [e for row in self.layers for part in (row.frames, row.pixels) for e in part.values() if e]
        if any(extent.everything for extent in extents):
            notes.append("+: a global average (a gate) also lets it see the rest of the clip.")
        return "\n".join(notes)

    def _field(self, row: LayerRow) -> str:
        """``23 × 75²`` (frames × pixels), a line for each view where there are several."""
        parts = []
        for view in row.frames:
            frames, pixels = row.frames[view], row.pixels[view]
            if frames is None or pixels is None:
                continue
            size = f"{_size(frames)} × {_size(pixels)}²{'+' if frames.everything or pixels.everything else ''}"
            parts.append(size if len(self.views) == 1 else f"{view} {size}")
        return "\n".join(parts) or "–"


def _times(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape))


def _size(extent: Extent) -> str:
    return "all" if extent.size is None else str(extent.size)


def describe(name: str, network: Network, split: Split = "test") -> Description:
    """Describe a network that stands on the meta device, for the clips of a use.

    Args:
        name: What it is called.
        network: On ``torch.device("meta")``; its classifier is taken off in the end.
        split: Whose views.

    Raises:
        UserError: The network cannot run on clips of this size.
    """
    assert isinstance(network, nn.Module)
    specs = dict(network.view_specs(split))
    views = meta_views(specs)
    layers = list(network.layers)
    try:
        with evaluation_mode(network):
            taps = network(views, taps=layers).taps
        macs = count_macs(network, views)
    except (RuntimeError, ValueError, AssertionError) as error:
        sizes = "; ".join(_times(tuple(view.shape[1:])) for view in views.values())
        raise UserError(
            f"{name} cannot run on clips of {sizes} (C×T×H×W): {str(error).splitlines()[0][:200]}. Give other --frames "
            "or a larger --crop."
        ) from error
    backbone = network.backbone if isinstance(network, RoiNetwork) else network
    frames, pixels, reason = _fields(backbone, specs, layers)
    rows = [
        LayerRow(
            layer,
            tuple(taps[layer].shape[1:]),
            network.layers[layer].temporal_stride,
            network.layers[layer].spatial_stride,
            {view: frames[view][layer] for view in frames},
            {view: pixels[view][layer] for view in pixels},
        )
        for layer in layers
    ]
    num_classes, total = network.num_classes, _count(network)
    trainable = sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad)
    classifier = _classifier(network)
    return Description(
        name=name,
        views={view: tuple(tensor.shape[1:]) for view, tensor in views.items()},
        parameters=total,
        trainable=trainable,
        classifier=classifier,
        macs=macs,
        feature_dim=network.feature_dim,
        num_classes=num_classes,
        layers=rows,
        not_traced=reason,
    )


def meta_views(specs: Mapping[str, ViewSpec], batch_size: int = 1) -> dict[str, torch.Tensor]:
    """Views (B,C,T,H,W) that have a shape and nothing else."""
    views = {}
    for name, spec in specs.items():
        channels = spec.channels
        shape = (batch_size, channels, spec.num_frames or 1, spec.crop_size, spec.crop_size)
        views[name] = torch.empty(shape, device="meta")
    return views


def _count(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def _classifier(network: Network) -> int:
    """Parameters of the classifier, which is taken off; of a network that classifies boxes those of the head."""
    if isinstance(network, RoiNetwork):
        return _count(network.roi_head)
    assert isinstance(network, nn.Module)
    before = _count(network)
    network.reset_classifier(0)
    return before - _count(network)


def _fields(
    network: nn.Module, specs: Mapping[str, ViewSpec], layers: list[str]
) -> tuple[dict[str, dict[str, Extent | None]], dict[str, dict[str, Extent | None]], str]:
    try:
        return (
            receptive_fields(network, specs, layers, "time"),
            receptive_fields(network, specs, layers, "space"),
            "",
        )
    except UntracedError as error:
        return {}, {}, str(error)
