"""Our networks against torchvision's: one forward and backward of the same network with the same weights.

    python benchmarks/networks.py [--networks r2plus1d_18 r3d_18 s3d] [--rounds 9] [--device cpu|cuda]

Each variant is a process of its own; the processes take turns.

* ``ours``: our network with torchvision's middle channels, eps, padding.
* ``torchvision``: torchvision's, with the same precision, memory format, allocator and denormal settings.
* ``defaults``: our network as ``distinit run`` sets it up, in the best precision that is right on this hardware.
* ``users``: torchvision's in fp32 without any of that, as one would write it down.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from common import ROUNDS, environment, interleave, peak_memory, ratio, spread, table, verdict
from processes import Built, Variant, serve
from torch import Tensor, nn
from torch.nn import functional as F

from distinit_plugin.models.hardware import cpu_flags

VARIANTS = ("ours", "torchvision", "defaults", "users")
NUM_CLASSES = 400


class Case(NamedTuple):
    """One of torchvision's networks, ours that equals it, and the clips that both see."""

    name: str
    switches: dict[str, Any]
    batch_size: int
    num_frames: int
    size: int


CASES = {
    "r2plus1d_18": Case("R2Plus1D", {"variant": "torchvision"}, 2, 8, 112),
    "r3d_18": Case("Res3D", {"variant": "torchvision"}, 2, 8, 112),
    "s3d": Case(
        "S3DG",
        {
            "padding": "symmetric",
            "affine_norm": True,
            "stem_frames": 7,
            "separable_stem": True,
            "temporal_norm": True,
            "gating_from": "none",
        },
        1,
        16,
        224,
    ),
}


def build_network(case: Case) -> Any:
    """Ours."""
    from distinit_plugin.models import InputSpec
    from distinit_plugin.models import build_network as build

    spec = InputSpec(num_frames=case.num_frames, train_crop_size=case.size, test_crop_size=case.size)
    return build(case.name, num_classes=NUM_CLASSES, input=spec, dropout=0.0, **case.switches)


def build(arguments: argparse.Namespace, stack: contextlib.ExitStack) -> Built:
    """One variant in this process."""
    from torchvision.models import video

    case, variant, device = CASES[arguments.network], arguments.serve, torch.device(arguments.device)
    ours = variant in ("ours", "defaults")
    precision, memory_format = ("fp32", torch.contiguous_format) if variant == "users" else _settings(device)
    if variant in ("ours", "torchvision") and arguments.precision != "auto":
        precision = arguments.precision
    torch.backends.cudnn.benchmark = device.type == "cuda"
    torch.manual_seed(0)
    network: Any = build_network(case) if ours else getattr(video, arguments.network)(num_classes=NUM_CLASSES)
    for module in network.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    network = network.to(device=device, memory_format=memory_format)
    clip = torch.rand(case.batch_size, 3, case.num_frames, case.size, case.size, device=device)
    clip = clip.contiguous(memory_format=memory_format)
    if precision != "fp32" and ours:
        from distinit_plugin.models.conv import check_convolutions

        check_convolutions(network, {"rgb": clip}, dtype=torch.bfloat16, device=device)
    labels = torch.zeros(case.batch_size, dtype=torch.int64, device=device)
    network.train()

    def step() -> None:
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision != "fp32"):
            logits: Tensor = network({"rgb": clip}).logits if ours else network(clip)
        network.zero_grad(set_to_none=True)
        F.cross_entropy(logits.float(), labels).backward()

    parameters = sum(parameter.numel() for parameter in network.parameters())
    return step, {"precision": precision, "device": device.type, "parameters": parameters}


def _settings(device: torch.device) -> tuple[str, torch.memory_format]:
    """What ``distinit run`` chooses and sets."""
    from distinit_plugin.engine.memory import keep_freed_memory
    from distinit_plugin.engine.precision import choose_memory_format, choose_precision, set_flush_denormals
    from distinit_plugin.models.hardware import hardware_has_bf16

    set_flush_denormals(True)
    if device.type == "cpu":
        keep_freed_memory()
    precision = choose_precision("auto", device, has_bf16=hardware_has_bf16(device)).name
    return precision, choose_memory_format("auto", precision)


def compare(network: str, arguments: Sequence[str], names: Sequence[str], rounds: int) -> list[list[str]]:
    """The rows of one network."""
    variants: dict[str, Variant] = {}
    try:
        for name in names:
            variants[name] = Variant(Path(__file__), [*arguments, "--network", network, "--serve", name])
        seconds = interleave({name: _stepper(variant) for name, variant in variants.items()}, rounds)
        memory = {name: variant.close()["memory"] for name, variant in variants.items()}
    finally:
        for variant in variants.values():
            variant.kill()
    if {"ours", "torchvision"} <= set(names):
        assert variants["ours"].facts["parameters"] == variants["torchvision"].facts["parameters"]
    rows = []
    for name, values in seconds.items():
        precision = variants[name].facts["precision"]
        rows.append([f"{network}, {name}", precision, spread(values).text(3), f"{memory[name] / 2**20:.0f}", ""])
    if {"ours", "torchvision"} <= set(names):
        value = ratio(seconds["ours"], seconds["torchvision"])
        rows[0][-1] = f"ours / torchvision {value.text(3)} {verdict(value.median, at_most=1.05)}"
    if {"defaults", "users"} <= set(names):
        value = ratio(seconds["users"], seconds["defaults"])
        aimed = network == "r2plus1d_18" and "amx_bf16" in cpu_flags()
        rows[-1][-1] = f"users / defaults {value.text(2)}" + (
            f" {verdict(value.median, at_least=5)}" if aimed else ", no target here"
        )
    return rows


def _stepper(variant: Variant) -> Callable[[int], None]:
    return lambda number: variant.step()


def main(words: Sequence[str] | None = None) -> int:
    """Compare and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--precision", choices=("auto", "fp32", "bf16"), default="auto", help="of ours and torchvision")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    parser.add_argument("--network", help=argparse.SUPPRESS)
    chosen = parser.parse_args(words)
    if chosen.serve:
        return serve(partial(build, chosen), partial(_last_words, chosen.device), chosen.device)
    print(environment())
    arguments = ["--device", chosen.device, "--precision", chosen.precision]
    rows: list[list[str]] = []
    for network in chosen.networks:
        rows += compare(network, arguments, chosen.variants, chosen.rounds)
    print(table(["network, variant", "precision", "s, forward + backward (quartiles)", "peak MiB", "ratio"], rows))
    return 0


def _last_words(device: str) -> dict[str, Any]:
    return {"memory": torch.cuda.max_memory_allocated() if device == "cuda" else peak_memory()}


if __name__ == "__main__":
    sys.exit(main())
