"""``distinit check-inflation``: how far is an inflated network from its image network on a still clip?

Quo Vadis (arXiv 1705.07750) §2.4: on a video of one repeated image both must agree. That needs constant maps along
time, so no zeros there, and the same network in space.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
import torchvision.transforms.functional as transforms
from PIL import Image
from torch import Tensor, nn

from distinit_plugin import build, models
from distinit_plugin.config.node import CfgNode
from distinit_plugin.engine.precise_bn import update_bn_statistics
from distinit_plugin.errors import UserError
from distinit_plugin.models.conv3d import Conv3d, TemporalPadding
from distinit_plugin.models.network import InputSpec, VideoNetwork
from distinit_plugin.models.two_stream import STACK, TwoStreamNetwork
from distinit_plugin.weights.families import CLASSIFIER, FAMILIES
from distinit_plugin.weights.image_networks import LIBRARIES, build_library_network, check_name
from distinit_plugin.weights.inflate import UNTRAINED, check_strides, inflate, inflate_state_dict
from distinit_plugin.weights.load import load_tensors, match_keys
from distinit_plugin.weights.report import LoadReport
from distinit_plugin.weights.sources import source_weights

PADDINGS: tuple[TemporalPadding, ...] = ("zeros", "replicate")
Precision = Literal["float64", "float32"]
TOLERANCE: Mapping[Precision, float] = {"float64": 1e-9, "float32": 1e-3}
"""Relative differences below these are rounding: dozens of calibrated random layers amplify it."""

CALIBRATION_IMAGES = 8
SEED = 0


@dataclass(frozen=True)
class Difference:
    """‖video − image‖ / ‖image‖ of the maps of one layer, over time steps."""

    mean: float
    worst: float


@dataclass(frozen=True)
class InflationCheck:
    """What was found.

    Attributes:
        network: The video network's name.
        source: The image network's, with its weights.
        frames: T of the still clip.
        crop: Its pixels.
        precision: In which it ran.
        layers: Layer → padding in time → difference; ``None``: the maps are of other sizes.
        logits: Padding → difference; empty: the networks have other classifiers.
        fixed_point: Whether all of that is rounding with replicate padding.
        reasons: Why not.
        report: What was loaded.
    """

    network: str
    source: str
    frames: int
    crop: int
    precision: Precision
    layers: dict[str, dict[str, Difference | None]]
    logits: dict[str, float]
    fixed_point: bool
    reasons: tuple[str, ...]
    report: LoadReport

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values."""
        return asdict(self)

    def to_text(self) -> str:
        """The table, the report of the weights, the verdict."""
        return "\n".join([*self._table(), str(self.report), self.verdict()])

    def verdict(self) -> str:
        """Whether there is a fixed point, in one line."""
        last = {padding: difference for padding, difference in list(self.layers.values())[-1].items() if difference}
        ends = self.logits or {padding: difference.worst for padding, difference in last.items()}
        zeros = f"{100 * ends['zeros']:.3g} % off" if "zeros" in ends else "of another size"
        what = "logits" if self.logits else "the last layer, worst step,"
        if self.fixed_point:
            return (
                f"fixed point: yes, with replicate padding in time a still clip gives the image's maps; with zero "
                f"padding {what} {'are' if self.logits else 'is'} {zeros}."
            )
        return f"fixed point: no. {'; '.join(self.reasons)}."

    def _table(self) -> Iterator[str]:
        yield f"inflated {self.network} against {self.source}: {self.frames} still frames of {self.crop}²,"
        yield f"in eval mode, {self.precision}; ‖video − image‖ / ‖image‖ over time steps, by padding in time"
        yield f"{'':<18}{'zeros: mean':>14}{'worst step':>14}{'replicate: mean':>18}{'worst step':>14}"
        for name, found in self.layers.items():
            cells = [f"{d.mean:.2e} {d.worst:.2e}".split() if d else ["size", "differs"] for d in found.values()]
            (zeros, zeros_worst), (replicate, replicate_worst) = cells
            yield f"{name:<18}{zeros:>14}{zeros_worst:>14}{replicate:>18}{replicate_worst:>14}"
        if self.logits:
            yield f"{'logits':<18}{self.logits['zeros']:>14.2e}{'':>14}{self.logits['replicate']:>18.2e}"


class _ImageReference(nn.Module):
    """An image classifier whose maps are caught on the way."""

    def __init__(self, name: str, num_classes: int, clip: InputSpec, depth: int, width: int) -> None:
        super().__init__()
        self.is_ours = name.partition("/")[0] not in LIBRARIES
        self.body: nn.Module
        if self.is_ours:
            self.body = models.build_network(name, num_classes=num_classes, input=clip, depth=depth, width=width)
        else:
            self.body = build_library_network(name, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """(N,3,H,W) → logits (N,K)."""
        return self.body({"rgb": images.unsqueeze(2)}).logits if self.is_ours else self.body(images)

    def calibrate(self, size: int) -> None:
        """Give normalisation the statistics of random images: without them nothing shows in random weights."""
        images = torch.randn(CALIBRATION_IMAGES, 3, size, size)
        update_bn_statistics(_Unpacked(self.train()), [{"rgb": images}], 1)

    def maps(self, images: Tensor, names: Mapping[str, str]) -> tuple[Tensor, dict[str, Tensor]]:
        """Logits, and the maps (N,C,h,w) of layer → module."""
        kept: dict[str, Tensor] = {}

        def keep(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
            return lambda _module, _inputs, output: kept.update({name: output.clone()})

        known = dict(self.body.named_modules())
        handles = [known[path].register_forward_hook(keep(layer)) for layer, path in names.items() if path in known]
        try:
            return self(images), kept
        finally:
            for handle in handles:
                handle.remove()


class _Unpacked(nn.Module):
    """A classifier of images as something that takes views."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, views: Mapping[str, Tensor]) -> Tensor:
        return self.network(views["rgb"])


def check_inflation(cfg: CfgNode, *, image: str = "", precision: Precision = "float64") -> InflationCheck:
    """Build both networks, inflate, run a still clip with zero and with replicate padding in time.

    Args:
        cfg: Names the network, INIT.INFLATE_FROM and INFLATE_WEIGHTS (empty or ``random``: random weights whose
            normalisation is calibrated), DATA.NUM_FRAMES and DATA.TEST_CROP_SIZE.
        image: File of the repeated image; empty: noise.
        precision: Of weights and arithmetic. In ``float32`` rounding alone reaches some 1e-5.

    Raises:
        UserError: The network has no 2D counterpart, or this is not it; or the image cannot be read.
        WeightsError: The weights cannot be had or read.
    """
    source, weights, clip = cfg.INIT.INFLATE_FROM, cfg.INIT.INFLATE_WEIGHTS, build.input_spec(cfg)
    if not source:
        raise UserError("INIT.INFLATE_FROM is empty: name the image network (--from torchvision/resnet18).")
    for key in ("MODALITY", "STREAMS"):
        if cfg.NETWORK[key] == "flow":
            raise UserError(
                f"NETWORK.{key} is flow: there is no image that a flow network could be compared on. Use rgb."
            )
    check_name(source)
    random = weights in UNTRAINED
    dtype = torch.float64 if precision == "float64" else torch.float32
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        file = None if random else source_weights(source, weights)
        num_classes = 1000 if file is None else _classes(file.tensors)
        network = build.build_network(cfg, num_classes=num_classes)
        assert isinstance(network, VideoNetwork)
        _refuse_without_counterpart(network.to(dtype))
        reference = _ImageReference(source, num_classes, clip, cfg.RESNET.DEPTH, cfg.NETWORK.WIDTH)
        if file is None:
            check_strides(reference.body, network, source)
            reference.calibrate(clip.test_crop_size)
            reference.to(dtype)
            report = inflate_state_dict(reference.body.state_dict(), network, f"{source}, random and calibrated")
        else:
            report = inflate(network, source, weights)
            load_tensors(reference.body.state_dict(), file.tensors, file.path)
        frames = _read_image(image, clip) if image else torch.randn(1, 3, clip.test_crop_size, clip.test_crop_size)
    layers, logits = _differences(network.eval(), reference.to(dtype).eval(), frames.to(dtype))
    return _judge(cfg, network, report, layers, logits, precision)


def _judge(
    cfg: CfgNode,
    network: VideoNetwork,
    report: LoadReport,
    layers: dict[str, dict[str, Difference | None]],
    logits: dict[str, float],
    precision: Precision,
) -> InflationCheck:
    still = [found["replicate"] for found in layers.values()]
    worst = max((difference.worst if difference else float("inf") for difference in still), default=float("inf"))
    fixed_point = max(worst, logits.get("replicate", 0.0)) <= TOLERANCE[precision]
    unknown = ("the 2D network differs from the 3D one in more than its weights",)
    return InflationCheck(
        network=cfg.MODEL.MODEL_NAME,
        source=report.source,
        frames=cfg.DATA.NUM_FRAMES,
        crop=cfg.DATA.TEST_CROP_SIZE,
        precision=precision,
        layers=layers,
        logits=logits,
        fixed_point=fixed_point,
        reasons=() if fixed_point else network.image_gaps or unknown,
        report=report,
    )


def _classes(tensors: Mapping[str, Tensor]) -> int:
    """Outputs of the classifier in a file; 1000 when it has none that we know."""
    weight = match_keys(tensors, [CLASSIFIER + "weight", "conv1.weight", "conv1.conv.weight"]).get(
        CLASSIFIER + "weight"
    )
    return 1000 if weight is None else len(weight)


def _refuse_without_counterpart(network: VideoNetwork) -> None:
    if not network.image_trunks:
        inflate_state_dict({}, network)  # says why


def _differences(
    network: VideoNetwork, reference: _ImageReference, images: Tensor
) -> tuple[dict[str, dict[str, Difference | None]], dict[str, float]]:
    """Of each layer that the networks share, and of the logits, by padding in time."""
    prefix, family_name = next(iter(network.image_trunks.items()))  # of two streams, that of the frames
    family = FAMILIES[family_name]
    taps = {}
    for layer in family.layers:
        own = network.own_name(layer)
        taps[layer] = prefix + own if prefix + own in network.layers else own
    frames = network.input.num_frames
    views = {"rgb": images.unsqueeze(2).expand(-1, -1, frames, -1, -1)}
    if isinstance(network, TwoStreamNetwork) and "flow" in network.streams:
        views["flow"] = images.new_zeros(len(images), 2 * STACK, frames, *images.shape[2:])
    layers: dict[str, dict[str, Difference | None]] = {tap: {} for tap in taps.values()}
    logits: dict[str, float] = {}
    with torch.inference_mode():
        expected_logits, expected = reference.maps(images, family.layers)
        for padding in PADDINGS:
            for module in network.modules():
                if isinstance(module, Conv3d):
                    module.temporal_padding = padding
            output = network(views, taps=list(taps.values()))
            for layer, tap in taps.items():
                layers[tap][padding] = _difference(output.taps[tap], expected[layer])
            if not prefix and output.logits is not None:
                logits[padding] = _relative(output.logits, expected_logits)
    return layers, logits


def _difference(video: Tensor, image: Tensor) -> Difference | None:
    """Of maps (B,C,T,H,W) and (B,C,H,W)."""
    if video.shape[3:] != image.shape[2:]:
        return None
    steps = [_relative(video[:, :, step], image) for step in range(video.shape[2])]
    return Difference(sum(steps) / len(steps), max(steps))


def _relative(value: Tensor, expected: Tensor) -> float:
    return float((value - expected).norm() / expected.norm().clamp(min=torch.finfo(expected.dtype).tiny))


def _read_image(path: str, clip: InputSpec) -> Tensor:
    """(1,3,P,P): the file's centre, resized and normalised as test frames are."""
    try:
        with Image.open(path) as file:
            picture = transforms.to_tensor(file.convert("RGB"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"--image {path} cannot be read as an image: {error}.") from error
    size = clip.test_crop_size
    picture = transforms.center_crop(transforms.resize(picture, [size], antialias=True), [size, size])
    return transforms.normalize(picture, list(clip.mean), list(clip.std)).unsqueeze(0)
