"""Putting a file's weights into a network: all checks first, then the copy, so that nothing is ever half loaded."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from distinit_plugin.errors import WeightsError
from distinit_plugin.types import Network
from distinit_plugin.weights.keymaps import align_prefix, is_counter, modern_key
from distinit_plugin.weights.layouts import Layout, Translation, detect
from distinit_plugin.weights.read import read_checkpoint
from distinit_plugin.weights.report import LoadReport, Mismatch, shorten


def load_weights(
    network: Network,
    path: str | Path,
    *,
    strict: bool = False,
    allow_missing_prefixes: Collection[str] = (),
) -> LoadReport:
    """Load a file into a network, in place; public layouts are translated on the way, and the report says so.

    A classifier for another number of classes is left at its initialisation and reported as mismatched; so are keys
    that only one side has. BN batch counters may be absent.

    Args:
        network: The network, under the keys of its ``bare_state_dict``.
        path: A file that :func:`read_checkpoint` reads.
        strict: Refuse any difference.
        allow_missing_prefixes: Keys of the network that start so may be absent even when ``strict``.

    Raises:
        WeightsError: The file is unreadable or of another network, or differs although ``strict``; the network is
            untouched.
    """
    file = read_checkpoint(path)
    return load_tensors(
        network.bare_state_dict(),
        file.tensors,
        file.path,
        strict=strict,
        allow_missing_prefixes=allow_missing_prefixes,
    )


def load_tensors(
    target: Mapping[str, Tensor],
    tensors: Mapping[str, Tensor],
    source: str,
    *,
    strict: bool = False,
    allow_missing_prefixes: Collection[str] = (),
) -> LoadReport:
    """:func:`load_weights` between two state dicts; ``target`` must share memory with its network.

    Raises:
        WeightsError: As :func:`load_weights`.
    """
    translation = translate(tensors, target)
    report = compare_translation(target, translation, source)
    _refuse_other_network(report, target, detect(tensors)[0])
    if strict:
        _refuse_differences(report, tuple(allow_missing_prefixes))
    copy_tensors(target, translation.tensors, report)
    return report


def translate(tensors: Mapping[str, Tensor], target: Mapping[str, Tensor], layout: Layout | None = None) -> Translation:
    """The file's tensors under the network's names: by its layout where its keys show one, else as they are.

    Args:
        tensors: The file's.
        target: The network's.
        layout: Overrides what the keys show.

    Raises:
        WeightsError: The file holds two networks.
    """
    if layout is None:
        layout, tensors = detect(tensors)
    translation = None if layout is None else layout.translate(tensors, target)
    if layout is None or translation is None:
        return Translation(match_keys(tensors, target))
    note = f"translated from the layout {layout.name}: {layout.origin}"
    return translation._replace(notes=(note, *translation.notes))


def compare_translation(target: Mapping[str, Tensor], translation: Translation, source: str) -> LoadReport:
    """:func:`compare`, with what the translation has to say."""
    report = compare(target, translation.tensors, source)
    return replace(report, skipped=translation.skipped, notes=translation.notes)


def match_keys(tensors: Mapping[str, Tensor], target: Collection[str]) -> dict[str, Tensor]:
    """The file's tensors under today's names, without a prefix that the network does not have."""
    return align_prefix({modern_key(key): value for key, value in tensors.items()}, target)


def compare(target: Mapping[str, Tensor], tensors: Mapping[str, Tensor], source: str) -> LoadReport:
    """What loading would give; nothing is copied."""
    shared = [key for key in target if key in tensors]
    return LoadReport(
        source=source,
        loaded=tuple(key for key in shared if tensors[key].shape == target[key].shape),
        missing=tuple(key for key in target if key not in tensors and not is_counter(key)),
        unexpected=tuple(key for key in tensors if key not in target and not is_counter(key)),
        mismatched=tuple(
            Mismatch(key, tuple(tensors[key].shape), tuple(target[key].shape))
            for key in shared
            if tensors[key].shape != target[key].shape
        ),
    )


def only_classifier(mismatched: Collection[Mismatch]) -> bool:
    """Whether the mismatches are one layer whose number of outputs differs: only a last layer can be alone in that."""
    modules = {mismatch.name.rpartition(".")[0] for mismatch in mismatched}
    return len(modules) == 1 and all(
        file_shape[:1] != network_shape[:1] and file_shape[1:] == network_shape[1:]
        for _, file_shape, network_shape in mismatched
    )


def copy_tensors(target: Mapping[str, Tensor], tensors: Mapping[str, Tensor], report: LoadReport) -> None:
    """Copy the keys that ``report`` names as loaded; types are converted.

    Raises:
        WeightsError: A value is NaN or infinite.
    """
    for key in report.loaded:
        if not torch.isfinite(tensors[key]).all():
            raise WeightsError(
                f"{report.source}: {key} has values that are NaN or infinite; nothing was loaded. The training that "
                "wrote it diverged, or the file is damaged: take another one."
            )
    with torch.no_grad():
        for key in report.loaded:
            target[key].copy_(tensors[key])


def _refuse_other_network(report: LoadReport, target: Mapping[str, Tensor], layout: Layout | None) -> None:
    weights = [key for key in report.loaded if not is_counter(key)]
    if report.mismatched and not only_classifier(report.mismatched):
        shapes = tuple(str(mismatch) for mismatch in report.mismatched)
        raise WeightsError(
            f"{report.source} is of another network: {shorten(shapes)}; nothing was loaded.{_hint(report)}"
        )
    if not weights:
        raise WeightsError(
            f"{report.source} is of another network: none of its tensors ({shorten(report.unexpected) or 'none'}) is "
            f"one of the network's ({shorten(tuple(target))}); nothing was loaded.{layout_hint(layout)}"
        )


def layout_hint(layout: Layout | None) -> str:
    """What the layout of a file says about the networks that it is for."""
    if layout is None:
        return " distinit convert-weights --help lists the public layouts that can be read."
    return f" It has the layout {layout.name}, which is for {layout.networks}."


def _hint(report: LoadReport) -> str:
    if any((len(mismatch.file_shape), len(mismatch.network_shape)) == (4, 5) for mismatch in report.mismatched):
        return " Its kernels have no time axis: weights of an image network are inflated with INIT.INFLATE_FROM."
    return " Check the network's name, depth, width and variant."


def _refuse_differences(report: LoadReport, allowed: tuple[str, ...]) -> None:
    missing = tuple(key for key in report.missing if not key.startswith(allowed)) if allowed else report.missing
    problems = [
        f"{label} {shorten(names)}"
        for label, names in (
            ("missing", missing),
            ("unexpected", report.unexpected),
            ("of another shape", tuple(str(mismatch) for mismatch in report.mismatched)),
        )
        if names
    ]
    if problems:
        raise WeightsError(f"{report.source} does not fit the network: {'; '.join(problems)}. Nothing was loaded.")
