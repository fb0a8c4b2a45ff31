"""A public weights file → a file of this program, with an account of every tensor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from distinit_plugin.engine.checkpoint import save_checkpoint
from distinit_plugin.errors import UserError, WeightsError
from distinit_plugin.files import write_file
from distinit_plugin.jobs.described import DescribedNetwork
from distinit_plugin.weights.keymaps import is_counter
from distinit_plugin.weights.layouts import Translation
from distinit_plugin.weights.load import compare_translation, copy_tensors, layout_hint, only_classifier
from distinit_plugin.weights.public import PublicFile, read_public
from distinit_plugin.weights.report import LoadReport

SUFFIXES = (".pyth", ".pth", ".pt", ".safetensors")


def convert(
    source: str,
    destination: str,
    *,
    to: str = "",
    layout_name: str = "",
    cfg_files: Sequence[str] = (),
    opts: Sequence[str] = (),
    drop_classifier: bool = False,
    allow_partial: bool = False,
    verbose: bool = False,
) -> LoadReport:
    """Translate a file, print what became of every tensor, and write it if all are accounted for.

    Args:
        source: Anything that ``read_checkpoint`` reads.
        destination: ``.pyth`` (also ``.pth``, ``.pt``): ``model_state`` and the network's description;
            ``.safetensors``: the same, the description as metadata.
        to: The network; its switches and number of classes are read off the file where ``opts`` do not give them.
        layout_name: Overrides the detection; ``native``: the names are the network's own.
        cfg_files: YAML files to take the network from, as it stands there; then ``to`` is not needed.
        opts: ``KEY VALUE …`` of the nodes that describe a network.
        drop_classifier: Leave the classifier out, on both sides.
        allow_partial: Write even when tensors are missing, unexpected or of another shape.
        verbose: Also print the names of the tensors that were loaded.

    Returns:
        The report, also printed.

    Raises:
        UserError: Something is wrong with the file, the network or the destination, or a tensor is not accounted for;
            nothing is written.
    """
    path = _check_destination(source, destination)
    target = DescribedNetwork.read(to, cfg_files, opts)
    file = read_public(source, layout_name)
    translation, classifier = _translate(file, target, infer=not cfg_files)
    contradictions = target.contradictions(translation)
    network = target.build("meta")
    if drop_classifier:
        network.reset_classifier(0)
        target.num_classes = 0
        dropped = tuple(key for key in translation.tensors if key in classifier)
        kept = {key: value for key, value in translation.tensors.items() if key not in classifier}
        translation = translation._replace(tensors=kept, skipped=(*translation.skipped, *dropped))
    state = network.bare_state_dict()
    report = compare_translation(state, translation, file.title)
    print(_described(target))
    print(report.describe(None, name_loaded=verbose))
    fits = any(not is_counter(key) and key not in translation.filled for key in report.loaded)
    if not fits and not report.mismatched:
        raise WeightsError(file.refusal(target.name, state))
    if not report.complete and not (allow_partial and fits):
        hint = layout_hint(file.layout) if file.layout else ""
        raise WeightsError(_unaccounted(report, destination, target, contradictions) + hint)
    if not target.is_image:  # until here no weights were needed
        state = target.build("cpu").bare_state_dict()
    copy_tensors(state, translation.tensors, report)
    _write(path, state, target, report)
    print(f"wrote {path}")
    return report


def _translate(file: PublicFile, target: DescribedNetwork, *, infer: bool) -> tuple[Translation, frozenset[str]]:
    """The file's tensors under the network's names, and which of the network's are the classifier.

    Args:
        file: The file.
        target: The network.
        infer: Set the network's switches and classes to what the file tells.

    Raises:
        UserError: A key has a value that is not allowed.
    """
    target.take_input(file.layout)
    own, classifier = target.tensors()
    translation = file.translate(own)
    if infer:
        target.take_switches(file, translation)
        target.take_input(file.layout)  # of another modality, maybe
    target.check()
    if target.is_changed:  # names and axes can be others now
        own, classifier = target.tensors()
        translation = file.translate(own)
    if infer:
        target.take_classes(translation.tensors, own, classifier)
    return translation, classifier


def _unaccounted(report: LoadReport, destination: str, target: DescribedNetwork, contradictions: Sequence[str]) -> str:
    """Why nothing is written, and which switch (or what else) to set."""
    parts = (
        ("missing", report.missing),
        ("unexpected", report.unexpected),
        ("of another shape", report.mismatched),
    )
    counts = ", ".join(f"{len(names)} {label}" for label, names in parts if names)
    said = f"not every tensor is accounted for ({counts}), {destination} was not written: "
    if contradictions:
        return (
            f"{said}the file's shapes tell {', '.join(contradictions)}, but the network has {target.switches()}. Leave "
            f"these keys out where they are given, or set them: --opts {' '.join(contradictions)}."
        )
    if only_classifier(report.mismatched) and not report.missing and not report.unexpected:
        name, theirs, ours = report.mismatched[0]
        return (
            f"{said}the classifier {name.rpartition('.')[0]} has {theirs[0]} classes in the file and {ours[0]} in the "
            "network. Set MODEL.NUM_CLASSES to the file's number, or leave the classifier out with --drop-classifier."
        )
    switches = f" with {target.switches()}" if target.switches() else ""
    return (
        f"{said}they are not those of {target.name}{switches}. Name another network with --to, leave a classifier out "
        "with --drop-classifier, or write what there is with --allow-partial."
    )


# ---------------------------------------------------------------------------------------------------- what is written
def _check_destination(source: str, destination: str) -> Path:
    path = Path(destination).expanduser()
    if path.suffix not in SUFFIXES:
        raise UserError(f"{destination} has no suffix that is known. Allowed: {', '.join(SUFFIXES)}.")
    read = Path(source).expanduser()
    if path.is_dir() or (path.exists() and read.exists() and path.samefile(read)):
        what = "a folder" if path.is_dir() else "the file that is to be read"
        raise UserError(f"{destination} is {what}. Name another file.")
    if path.suffix == ".safetensors":
        _safetensors()
    return path


def _described(target: DescribedNetwork) -> str:
    words = [f"{node}.{key} {value}" for node, keys in target.describe().items() for key, value in keys.items()]
    return f"network {target.name}: {', '.join(words[1:])}"


def _write(path: Path, state: Mapping[str, Tensor], target: DescribedNetwork, report: LoadReport) -> None:
    text = yaml.safe_dump(target.describe(), sort_keys=False)
    tensors = {key: value.contiguous() for key, value in state.items()}
    if path.suffix == ".safetensors":
        data = _safetensors().save(tensors, metadata={"format": "pt", "cfg": text, "source": report.source})
        write_file(path, lambda file: file.write(data))
        return
    save_checkpoint(path, {"model_state": tensors, "cfg": text, "source": report.source})


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise UserError("writing .safetensors needs the package safetensors. Install it, or write a .pyth.") from error
    return safetensors.torch
