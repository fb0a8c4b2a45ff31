"""One trained network in files that need nothing of this package, each compared with the network it was made from."""

from __future__ import annotations

import importlib
import io
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from typing import Any

import torch
from torch import Tensor, nn

from distinit_plugin.engine.evaluate import evaluation_mode
from distinit_plugin.errors import UserError
from distinit_plugin.types import ModelOutput, Network, ViewSpec

FORMATS = ("safetensors", "pt2", "onnx")
"""Endings of the files."""

TRACED_BATCH, OTHER_BATCH = 2, 3
"""Clips with which a network is traced, and with which the file is compared (the batch is free)."""

TOLERANCE = 1e-4
"""Largest difference that is accepted, as a part of the largest value."""

Outputs = dict[str, Tensor]


class Bare(nn.Module):
    """Views as plain arguments in, a dictionary of tensors out: ``logits`` (with a classifier) and ``features``."""

    def __init__(self, network: Network) -> None:
        """Wrap a network; eval mode is the caller's."""
        super().__init__()
        assert isinstance(network, nn.Module)
        self.network = network
        self.view_names = list(network.view_specs("test"))

    def forward(self, *views: Tensor) -> Outputs:
        """Normalised views (B,C,T,H,W), in the order of ``view_names``."""
        output: ModelOutput = self.network(dict(zip(self.view_names, views, strict=True)))
        named = {"logits": output.logits, "features": output.features}
        return {name: value for name, value in named.items() if value is not None}


def random_views(specs: Mapping[str, ViewSpec], batch_size: int, seed: int = 0) -> tuple[Tensor, ...]:
    """Normal noise (B,C,T,H,W) of each view."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [
        (batch_size, (3 if s.modality == "rgb" else 2) * s.stack, s.num_frames or 1, s.crop_size, s.crop_size)
        for s in specs.values()
    ]
    return tuple(torch.randn(shape, generator=generator) for shape in shapes)


def export_network(network: Network, fmt: str, metadata: Mapping[str, str]) -> tuple[bytes, float]:
    """The contents of a file and how far what is read from it is from the network.

    Args:
        network: On the CPU, in fp32.
        fmt: One of ``FORMATS``.
        metadata: Words that travel along; ``network`` is what it is called.

    Returns:
        The bytes, and the largest difference of any output, as a part of the largest value.

    Raises:
        UserError: A library is missing, an operator cannot be exported, or the file does not agree.
    """
    bare = Bare(network)
    specs = network.view_specs("test")
    name = metadata.get("network", type(network).__name__)
    with evaluation_mode(bare), torch.inference_mode(False), torch.no_grad():
        if fmt == "safetensors":
            content = _safetensors(network, metadata)
            found = _from_safetensors(network, content, specs)
        elif fmt == "pt2":
            with _explained(name, "by torch.export", "Export .safetensors instead."):
                content = _pt2(bare, specs, metadata)
                found = torch.export.load(io.BytesIO(content)).module()(*random_views(specs, OTHER_BATCH))
        else:
            with _explained(name, "as ONNX", "Export .pt2 (torch.export) or .safetensors instead."):
                content = _onnx(bare, specs, metadata)
                found = _run_onnx(content, bare, specs)
        expected = bare(*random_views(specs, OTHER_BATCH))
    deviation = _deviation(expected, found)
    if not deviation <= TOLERANCE:
        raise UserError(
            f"what was exported as {fmt} differs from the network by {deviation:.1e} of the largest value (at most "
            f"{TOLERANCE:g} is accepted), so no file is left. Export another format."
        )
    return content, deviation


def _deviation(expected: Outputs, found: Outputs) -> float:
    worst = 0.0
    for name, value in expected.items():
        if not torch.isfinite(value).all():
            raise UserError(f"the network's {name} are not finite: its weights are broken. Take another checkpoint.")
        difference = (value - found[name]).abs().max() / value.abs().max().clamp(min=1e-12)
        worst = max(worst, float(difference)) if bool(torch.isfinite(difference)) else float("inf")
    return worst


def _safetensors(network: Network, metadata: Mapping[str, str]) -> bytes:
    try:
        from safetensors.torch import save
    except ImportError as error:
        raise UserError(
            ".safetensors: the package safetensors is not installed: pip install 'distinit-plugin[safetensors]'."
        ) from error
    tensors = {key: value.detach().clone(memory_format=torch.contiguous_format) for key, value in _state(network)}
    return bytes(save(tensors, dict(metadata)))


def _state(network: Network) -> list[tuple[str, Tensor]]:
    return sorted(network.bare_state_dict().items())


def _from_safetensors(network: Network, content: bytes, specs: Mapping[str, ViewSpec]) -> Outputs:
    """Run the network with the tensors of the file; its own come back afterwards."""
    from safetensors.torch import load

    own = {key: value.clone() for key, value in _state(network)}
    target, read = network.bare_state_dict(), load(content)
    try:
        for value in target.values():
            value.zero_()
        for key, value in read.items():
            target[key].copy_(value)
        outputs: Outputs = Bare(network)(*random_views(specs, OTHER_BATCH))
        return outputs
    finally:
        for key, value in own.items():
            target[key].copy_(value)


@contextmanager
def _explained(name: str, way: str, instead: str) -> Iterator[None]:
    """Whatever the libraries raise becomes one sentence, and what they print beside it is dropped."""
    disabled = logging.root.manager.disable
    logging.disable(max(disabled, logging.WARNING))
    try:
        with redirect_stderr(io.StringIO()):
            yield
    except (UserError, MemoryError):
        raise
    except Exception as error:  # torch.export, torch.onnx and onnxruntime raise many kinds
        raise UserError(f"{name} cannot be exported {way}: {_reason(error)}. {instead}") from error
    finally:
        logging.disable(disabled)


def _reason(error: BaseException) -> str:
    """What stood at the beginning of a chain of errors, with the operator that it is about, where it names one."""
    while (earlier := error.__cause__ or error.__context__) is not None:
        error = earlier
    text = _CONTROL.sub("", str(error))
    line = next((line.strip() for line in text.splitlines() if line.strip()), type(error).__name__)
    operator = _OPERATOR.search(text)
    if operator is None:
        return line[:200].rstrip(".")
    if "No ONNX function found" in text:
        return f"ONNX has no counterpart of its operator {operator[0]}"
    return f"its operator {operator[0]} cannot be translated ({line[:200].rstrip('.')})"


_CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|[\x00-\x08\x0b-\x1f\x7f]")
"""Colours of a terminal, and other characters that would steer it."""

_OPERATOR = re.compile(r"\b(?:aten|prims|torchvision|quantized)(?:\.|::)\w+")


def _traced(bare: Bare, specs: Mapping[str, ViewSpec]) -> torch.export.ExportedProgram:
    views = random_views(specs, TRACED_BATCH, seed=1)
    batch = torch.export.Dim("batch")
    shapes = (tuple({0: batch} for _ in views),)  # of the one *views argument
    return torch.export.export(bare, views, dynamic_shapes=shapes, strict=False)


def _pt2(bare: Bare, specs: Mapping[str, ViewSpec], metadata: Mapping[str, str]) -> bytes:
    buffer = io.BytesIO()
    extra_files = {f"distinit_{key}": value for key, value in metadata.items()}
    torch.export.save(_traced(bare, specs), buffer, extra_files=extra_files)
    return buffer.getvalue()


def _onnx(bare: Bare, specs: Mapping[str, ViewSpec], metadata: Mapping[str, str]) -> bytes:
    import_onnx()
    exported: Any = torch.onnx.export(
        _traced(bare, specs),
        dynamo=True,
        input_names=list(specs),
        output_names=list(bare(*random_views(specs, 1))),
        verbose=False,
    )
    model = exported.model_proto
    for key, value in metadata.items():
        entry = model.metadata_props.add()
        entry.key, entry.value = key, value
    return bytes(model.SerializeToString())


def _run_onnx(content: bytes, bare: Bare, specs: Mapping[str, ViewSpec]) -> Outputs:
    runtime = import_onnx()
    session = runtime.InferenceSession(content, providers=["CPUExecutionProvider"])
    views = random_views(specs, OTHER_BATCH)
    names: Sequence[str] = [output.name for output in session.get_outputs()]
    values = session.run(None, {name: view.numpy() for name, view in zip(bare.view_names, views, strict=True)})
    return {name: torch.from_numpy(value) for name, value in zip(names, values, strict=True)}


def import_onnx() -> Any:
    """``onnxruntime``, once everything that the export needs is there.

    Raises:
        UserError: A package is not installed.
    """
    try:
        for name in ("onnx", "onnxscript"):
            importlib.import_module(name)
        return importlib.import_module("onnxruntime")
    except ImportError as error:
        raise UserError(
            f".onnx: the package {error.name} is not installed: pip install 'distinit-plugin[onnx]', or export "
            ".safetensors or .pt2."
        ) from error
