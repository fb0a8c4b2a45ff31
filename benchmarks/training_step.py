"""One DistInit step of our loop against its bare parts and against plain PyTorch: time, memory, and what a gate saves.

    python benchmarks/training_step.py [--rounds 9] [--device cpu|cuda] [--batch-size 4] [--options KEY VALUE …]

R(2+1)D-18 on 8 frames of 112², ResNet-50 with random weights on one frame of 224². Every variant is a process of its
own, because allocator and denormal settings belong to a process; the processes take turns, one step each, so that
noise hits all alike. Each is given the same clips.

* ``loop``: ``Trainer.run_step`` on prepared uint8 batches, as ``distinit run`` sets it up.
* ``parts``: forward, backward and update of the bare student and its head, and the bare teacher's forward, on finished
  views: same precision, formulation of convolutions, memory format, allocator and denormal settings; nothing else is
  imported.
* ``plain``: torchvision's ``r2plus1d_18`` and ``resnet50`` in fp32 as one would write it down, no settings;
  ``plain-flushed``: the same with ``torch.set_flush_denormal(True)``.
* ``weight``, ``skip``: ``loop`` with a gate that drops half of each batch.
* ``student``: ``loop`` on labels, without a teacher; ``cached``: ``loop`` on stored targets of the teacher, which are
  read in each step. They run when they are named: ``--variants student cached``.
* With CUDA also ``compiled``: ``loop`` with RUNNER.COMPILE; ``autocast``: ``plain`` in bf16 autocast.

Without CUDA the plain ones, which take minutes, run only when they are named: ``--variants loop plain plain-flushed``.
``--options`` go to the configuration of ``loop`` (``RUNNER.PRECISION fp32``); ``parts`` understands RUNNER.PRECISION,
RESNET.DEPTH and NETWORK.WIDTH.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from common import ROUNDS, Spread, environment, interleave, ratio, spread, table, verdict
from processes import Variant

from distinit_plugin.models.hardware import cpu_flags

CPU_VARIANTS = ("loop", "parts", "weight", "skip")
GPU_VARIANTS = ("loop", "compiled", "parts", "plain", "autocast")
WORKER = Path(__file__).with_name("training_variants.py")


def compare(names: Sequence[str], arguments: Sequence[str], rounds: int, batch_size: int) -> None:
    """Run the variants in turn and print."""
    variants: dict[str, Variant] = {}
    try:
        for name in names:  # one after the other: two that start at once would measure each other
            variants[name] = Variant(WORKER, [name, *arguments])
        seconds = interleave({name: _stepper(variant) for name, variant in variants.items()}, rounds)
        last = {name: variant.close() for name, variant in variants.items()}
    finally:
        for variant in variants.values():
            variant.kill()
    first = variants[names[0]].facts
    flops = first.get("flops")
    rows = []
    for name, values in seconds.items():
        speed = spread(batch_size / value for value in values).median
        counted = flops and last[name]["rate"] and name != "skip"  # which leaves a part out
        rate = f"{100 * flops / spread(values).median / last[name]['rate']:.0f} %" if counted else "–"
        memory = f"{last[name]['memory'] / 2**20:.0f}"
        precision = variants[name].facts["precision"]
        rows.append([name, precision, spread(values).text(3), f"{speed:.2f}", memory, rate])
    header = ["variant", "precision", "s / step (quartiles)", "clips/s", "peak memory, MiB", "of the bf16 rate"]
    print(table(header, rows))
    print()
    _print_ratios(seconds, {name: facts["memory"] for name, facts in last.items()}, first)
    if flops and last[names[0]]["rate"]:
        print(f"A step is {flops / 1e9:.0f} GFLOP; bf16 matrix products: {last[names[0]]['rate'] / 1e9:.0f} GFLOP/s.")
    if "check" in first:
        print(first["check"])


def _stepper(variant: Variant) -> Callable[[int], None]:
    return lambda number: variant.step()


def _print_ratios(seconds: Mapping[str, list[float]], memory: Mapping[str, int], facts: Mapping[str, Any]) -> None:
    """The quotients that have a target; plain PyTorch's have one on CPUs with bf16, unflushed with AMX alone."""
    half = facts["precision"] == "bf16"
    rows: list[list[str]] = []

    def add(text: str, value: Spread, target: str) -> None:
        rows.append([text, value.text(3), target])

    if "parts" in seconds and "loop" in seconds:
        value = ratio(seconds["loop"], seconds["parts"])
        add("time, loop / parts", value, verdict(value.median, at_most=1.03))
        share = memory["loop"] / memory["parts"]
        rows.append(["peak memory, loop / parts", f"{share:.3f}", verdict(share, at_most=1.03)])
    with_amx = 6.0 if "amx_bf16" in cpu_flags() else 0.0
    for name, least in (("plain", with_amx), ("plain-flushed", 2.5), ("autocast", 0.0), ("compiled", 0.0)):
        if name in seconds and "loop" in seconds:
            value = ratio(seconds[name], seconds["loop"])
            aimed = half and least > 0 and facts["device"] == "cpu"
            add(f"time, {name} / loop", value, verdict(value.median, at_least=least) if aimed else "no target here")
    if "skip" in seconds and "weight" in seconds:
        value = ratio(seconds["skip"], seconds["weight"])
        add("time, skip / weight (half kept)", value, verdict(value.median, at_most=0.65))
    if "cached" in seconds and "student" in seconds:
        value = ratio(seconds["cached"], seconds["student"])
        add("time, cached / student", value, verdict(value.median, at_most=1.03))
    print(table(["ratio", "median (quartiles)", "target"], rows))


def main(words: Sequence[str] | None = None) -> int:
    """Compare and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch-size", type=int, default=0, help="clips; 0: 4 on a CPU, 64 on a GPU")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument(
        "--variants", nargs="+", default=[], help="the first one's precision counts; default: loop and others"
    )
    parser.add_argument("--teacher", default="resnet50", help="of torchvision")
    parser.add_argument("--options", nargs="+", default=[], help="KEY VALUE overrides of the loop's configuration")
    chosen = parser.parse_args(words)
    names = chosen.variants or (GPU_VARIANTS if chosen.device == "cuda" else CPU_VARIANTS)
    batch_size = chosen.batch_size or (64 if chosen.device == "cuda" else 4)
    print(f"{environment()}, batch {batch_size}\n")
    arguments = ["--device", chosen.device, "--batch-size", str(batch_size), "--teacher", chosen.teacher]
    compare(names, [*arguments, "--options", *chosen.options], chosen.rounds, batch_size)
    return 0


if __name__ == "__main__":
    sys.exit(main())
