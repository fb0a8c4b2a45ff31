"""Image networks' weights put into video networks: 2D kernels repeated along time and divided by its extent.

Sources: J. Carreira and A. Zisserman, "Quo Vadis" (arXiv 1705.07750) §2.4. DistInit (arXiv 1901.09244) describes the
repetition alone; without the division activations explode, so it is always done. Temporal convolutions of their own
(S3D-G's) become the identity, as TF-slim's ``nets/s3dg.py`` starts them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from distinit_plugin.errors import UserError
from distinit_plugin.models.inception3d import BATCH_NORM_EPS
from distinit_plugin.models.network import VideoNetwork
from distinit_plugin.types import Network
from distinit_plugin.weights.families import CLASSIFIER, FAMILIES, Family
from distinit_plugin.weights.image_networks import LIBRARIES, build_library_network, check_name
from distinit_plugin.weights.keymaps import is_counter
from distinit_plugin.weights.load import compare, copy_tensors, match_keys, only_classifier
from distinit_plugin.weights.read import CheckpointFile
from distinit_plugin.weights.report import LoadReport, shorten
from distinit_plugin.weights.sources import TIMM_DEFAULT, file_of, source_weights, torchvision_tags

UNTRAINED = ("", "random")
"""Values of INIT.INFLATE_WEIGHTS that name no weights."""

GOOGLENET = "torchvision/googlenet"
GOOGLENET_RANGE = 0.5
"""Mean and std of what torchvision's GoogLeNet weights see: its ``transform_input`` turns ImageNet's into these."""

_GATE = re.compile(r"\.gate\.")
_TEMPORAL = re.compile(r"\.temporal(_bn)?\.")


def inflate_kernel(kernel: Tensor, in_channels: int, num_taps: int) -> Tensor:
    """(O,I,h,w) → (O,I',N,h,w): each tap is the 2D kernel divided by N.

    For another number of input channels I' (flow has 2) every one of them gets the mean of the image channels, as in
    DistInit table 5.
    """
    kernel = _to_channels(kernel, in_channels)
    return kernel.unsqueeze(2).expand(-1, -1, num_taps, -1, -1) / num_taps


def inflate_state_dict(
    state_2d: Mapping[str, Tensor], network_3d: Network, source: str = "the 2D network"
) -> LoadReport:
    """Put an image network's weights into the trunks of a video network that correspond to it, in place.

    BN parameters and statistics are copied as they are. The classifier is copied when the video network has the same
    one for as many classes, else it is left at its initialisation and reported. What the image network does not have
    (an LSTM, a fusion, gates) keeps its initialisation and is reported as missing; temporal convolutions become the
    identity.

    Args:
        state_2d: State dict with torchvision's or timm's keys.
        network_3d: The network to fill.
        source: Where ``state_2d`` is from, for the report.

    Raises:
        UserError: ``network_3d`` has no 2D counterpart, or this is not it; it is untouched.
    """
    network, families = _counterparts(network_3d)
    target = network.bare_state_dict()
    placed: dict[str, Tensor] = {}
    used: set[str] = set()
    for prefix, family in families.items():
        state = match_keys(state_2d, (*family.kernels, CLASSIFIER + "weight", *family.unused))
        _check_family(state, family, network, source)
        for key, value in state.items():
            if prefix and key.startswith(CLASSIFIER):
                continue  # that of a network around its trunk is another
            name = prefix + network.own_name(family.rename(key))
            _refuse_without_factor(name, target, network)
            if name in target:
                placed[name] = _fit(value, target[name], is_stem=name == prefix + network.own_name(family.stem))
                used.add(key)
    unexpected = tuple(key for key in state if key not in used and not is_counter(key))
    report = replace(compare(target, placed, source), unexpected=unexpected)
    _refuse_unequal(report, families)
    report = replace(report, notes=tuple(_notes(network, report, families)))
    copy_tensors(target, placed, report)
    with torch.no_grad():
        for key in filter(_TEMPORAL.search, report.missing):
            target[key].copy_(_identity(key, target[key]))
    return report


def inflate(network: Network, source_name: str, weights: str) -> LoadReport:
    """Fill a video network from the weights of an image network by name.

    Args:
        network: The network to fill.
        source_name: ``torchvision/NAME``, ``timm/NAME``, or a registered image network (``Res2D``).
        weights: torchvision tag, ``timm``, or a file.

    Raises:
        UserError: No counterpart (see :func:`inflate_state_dict`), or the weights expect other inputs.
        WeightsError: The weights cannot be had or read.
    """
    _counterparts(network)
    check_name(source_name)
    if weights in UNTRAINED:
        raise UserError(
            f"INIT.INFLATE_WEIGHTS is '{weights}': inflating {source_name} needs trained weights. Give a torchvision "
            "tag (IMAGENET1K_V1), 'timm', or a file."
        )
    if weights == TIMM_DEFAULT and not source_name.startswith("timm/"):
        raise UserError(f"INIT.INFLATE_WEIGHTS is 'timm', but {source_name} is not of timm. Give a tag or a file.")
    file = source_weights(source_name, weights)
    range_notes = _check_range(network, source_name, file)
    if source_name.partition("/")[0] in LIBRARIES:
        with torch.device("meta"), torch.random.fork_rng(devices=[]):
            body = build_library_network(source_name)
        check_strides(body, network, source_name)
    report = inflate_state_dict(file.tensors, network, f"{source_name} ({file.path}), inflated")
    return replace(report, notes=report.notes + range_notes)


def check_strides(body: nn.Module, network_3d: Network, source_name: str) -> None:
    """Compare the convolutions of an image network with their counterparts, beyond what keys and shapes tell.

    timm has ResNets with the keys of the plain one that blur before they take every second pixel.

    Raises:
        UserError: A convolution has other strides in space.
    """
    network, families = _counterparts(network_3d)
    own = {name.removeprefix("model."): module for name, module in network.named_modules()}
    for prefix, family in families.items():
        for name, conv in body.named_modules():
            if not isinstance(conv, nn.Conv2d):
                continue
            counterpart = own.get(prefix + network.own_name(family.rename(f"{name}.weight")).removesuffix(".weight"))
            if isinstance(counterpart, nn.Conv2d | nn.Conv3d) and counterpart.stride[-2:] != conv.stride:
                raise UserError(
                    f"INIT.INFLATE_FROM: {source_name} is not the 2D counterpart of the network: its {name} has stride "
                    f"{conv.stride}, where the network has {counterpart.stride[-2:]}, though their weights have the "
                    f"same shapes. Use {family.example} or one like it."
                )


def _counterparts(network: Network) -> tuple[VideoNetwork, dict[str, Family]]:
    """The network, and the family of each trunk by the prefix of its keys; refuses one without."""
    name = str(getattr(network, "name", type(network).__name__))  # a library's networks are of one class
    if not isinstance(network, VideoNetwork) or not network.image_trunks:
        reason = network.no_counterpart if isinstance(network, VideoNetwork) else "it is no network of this package"
        raise UserError(
            f"INIT.INFLATE_FROM: {name} has no 2D counterpart: {reason}. Clear INIT.INFLATE_FROM, or choose a network "
            "that can be inflated (Res3D, I3D, S3DG, ConvLSTM, TwoStream, Fused3D)."
        )
    return network, {prefix: FAMILIES[family] for prefix, family in network.image_trunks.items()}


def _check_family(state: Mapping[str, Tensor], family: Family, network: VideoNetwork, source: str) -> None:
    if not all(key in state and state[key].ndim == 4 for key in family.kernels):
        raise UserError(
            f"INIT.INFLATE_FROM: {source} is not a 2D {family.title} (its tensors: {shorten(tuple(state)) or 'none'}), "
            f"so it is not the 2D counterpart of {type(network).__name__}. Use {family.example} or one like it."
        )


def _refuse_without_factor(name: str, target: Mapping[str, Tensor], network: VideoNetwork) -> None:
    stem, _, part = name.rpartition(".")
    if part == "weight" and name not in target and f"{stem}.running_mean" in target:
        raise UserError(
            f"INIT.INFLATE_FROM: BN of {type(network).__name__} has no factor, that of the image network has "
            f"({name}), and in training none can be put elsewhere. Set NETWORK.AFFINE_NORM True."
        )


def _to_channels(kernel: Tensor, in_channels: int) -> Tensor:
    """(O,I,h,w) → (O,I',h,w), the mean over I for each where I' is another number."""
    if kernel.shape[1] == in_channels:
        return kernel
    return kernel.mean(dim=1, keepdim=True).expand(-1, in_channels, -1, -1)


def _fit(value: Tensor, wanted: Tensor, *, is_stem: bool) -> Tensor:
    """Give a 2D kernel the shape that the network wants; anything else stays as it is."""
    if value.ndim != 4 or wanted.ndim not in (4, 5):
        return value
    value = value.to(torch.promote_types(value.dtype, wanted.dtype))  # so that the division rounds no more than it must
    in_channels = wanted.shape[1] if is_stem else value.shape[1]
    if wanted.ndim == 4:
        return _to_channels(value, in_channels)
    return inflate_kernel(value, in_channels, wanted.shape[2])


def _identity(key: str, like: Tensor) -> Tensor:
    """What makes a temporal convolution, and BN behind it in eval mode, hand on what it gets."""
    part = key.rpartition(".")[2]
    value = torch.zeros(like.shape, dtype=torch.float64)
    if ".temporal." in key:
        return nn.init.dirac_(value) if part == "weight" else value
    return value + {"weight": 1.0, "running_var": 1.0 - BATCH_NORM_EPS}.get(part, 0.0)


def _refuse_unequal(report: LoadReport, families: Mapping[str, Family]) -> None:
    """Everything in the trunks but the classifier must have its counterpart, in both directions."""
    classifier = {mismatch.name for mismatch in report.mismatched} if only_classifier(report.mismatched) else set()
    classifier |= {key for key in (*report.missing, *report.unexpected) if key.startswith(CLASSIFIER)}
    unused = tuple(start for family in families.values() for start in family.unused)
    missing = _in_trunks(report.missing, families)
    problems = [
        f"{label}: {shorten(names)}"
        for label, names in (
            ("only in 3D", tuple(key for key in missing if key not in classifier and not _is_added(key))),
            ("only in 2D", tuple(k for k in report.unexpected if k not in classifier and not k.startswith(unused))),
            ("of another shape", tuple(str(m) for m in report.mismatched if m.name not in classifier)),
        )
        if names
    ]
    if problems or not any(not is_counter(key) for key in report.loaded):
        advice = next(iter(families.values())).advice
        raise UserError(
            f"INIT.INFLATE_FROM: {report.source} is not the 2D counterpart of the network ({'; '.join(problems)}). "
            f"{advice}"
        )


def _in_trunks(keys: tuple[str, ...], families: Mapping[str, Family]) -> tuple[str, ...]:
    return tuple(key for key in keys if key.startswith(tuple(families)))


def _is_added(key: str) -> bool:
    """Whether a key is of what a trunk has beyond the image network."""
    return bool(_GATE.search(key) or _TEMPORAL.search(key))


def _check_range(network: Network, source_name: str, file: CheckpointFile) -> tuple[str, ...]:
    """The published GoogLeNet weights see other numbers than torchvision's other weights do.

    Returns:
        A note about a file of which nobody can know; none where all is well.
    """
    if source_name != GOOGLENET or not isinstance(network, VideoNetwork) or network.input.modality != "rgb":
        return ()
    if all(value == GOOGLENET_RANGE for value in (*network.input.mean, *network.input.std)):
        return ()
    published = {file_of(member) for member in torchvision_tags(GOOGLENET.partition("/")[2]).values()}
    if Path(file.path).name in published:
        raise UserError(
            "INIT.INFLATE_FROM: torchvision's GoogLeNet weights see frames in [-1, 1] (its transform_input turns "
            f"ImageNet's normalisation into that), but DATA.MEAN is {list(network.input.mean)} and DATA.STD "
            f"{list(network.input.std)}. Set both to [0.5, 0.5, 0.5]."
        )
    return (
        "GoogLeNet weights trained with torchvision's transform_input need DATA.MEAN and DATA.STD of 0.5 each; these "
        "frames are normalised otherwise",
    )


def _notes(network: VideoNetwork, report: LoadReport, families: Mapping[str, Family]) -> Iterator[str]:
    if report.mismatched or any(key.startswith(CLASSIFIER) for key in report.missing):
        yield "the classifier keeps its random initialisation"
    if any(key.startswith(CLASSIFIER) for key in report.unexpected):
        yield "the image network's classifier has no place in this network"
    for family in dict.fromkeys(family.title for family in families.values()):
        unused = next(f.unused for f in families.values() if f.title == family)
        found = sorted({key.partition(".")[0] for key in report.unexpected if key.startswith(unused)}) if unused else []
        if found:
            yield f"{', '.join(found)}: extra classifiers of {family} for its own training, not used"
    outside = {key.partition(".")[0] for key in report.missing if not key.startswith(tuple(families))} - {"fc"}
    if outside:
        yield f"{', '.join(sorted(outside))}: not in an image network, random initialisation kept"
    if any(_TEMPORAL.search(key) for key in report.missing):
        yield "temporal convolutions are the identity"
    if any(_GATE.search(key) for key in report.missing):
        yield "gates keep their random initialisation"
    yield from network.image_gaps
