"""The processes of ``training_step.py``: each builds one variant, and makes a step for each line it is sent.

What a variant does not need is not imported, because its peak memory is compared.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import repeat
from pathlib import Path
from typing import Any

import torch
from processes import Built, serve
from torch import Tensor, nn
from torch.nn import functional as F

TEACHER = "IMAGENET"
CONFIG = "configs/DistInit/table1_r2plus1d18_distinit_pretrain.yaml"
NUM_FRAMES, STUDENT_SIZE, TEACHER_SIZE, NUM_CLASSES = 8, 112, 224, 1000
PRODUCT_SIZES = {"cuda": 8192, "cpu": 4096}
GRID_CLIPS, TAG = 10, "IMAGENET1K_V1"


def random_clips(batch_size: int, num_frames: int, size: int) -> Tensor:
    """(B,3,T,size,size) uint8: smooth clips, each of its own contrast, so that a teacher is not equally sure of all."""
    generator = torch.Generator().manual_seed(num_frames)
    coarse = torch.rand(batch_size, 3, num_frames, 8, 8, generator=generator) - 0.5
    contrast = torch.linspace(0.2, 1.0, batch_size).view(-1, 1, 1, 1, 1)
    clips = F.interpolate(coarse * contrast + 0.5, size=(num_frames, size, size), mode="trilinear")
    return (255 * clips).to(torch.uint8)


# --------------------------------------------------------------------------------------------------- our loop
def build_trainer(arguments: argparse.Namespace, stack: contextlib.ExitStack, **keys: object) -> tuple[Any, Any]:
    """The trainer as ``distinit run`` sets it up, and one batch; its corpus is never read."""
    from distinit_plugin import build
    from distinit_plugin.config.load import load_cfg
    from distinit_plugin.engine.train import set_train_mode
    from distinit_plugin.jobs import training
    from distinit_plugin.jobs.session import open_session

    folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    (folder / "videos" / "all").mkdir(parents=True)
    (folder / "videos" / "all" / "video.mp4").touch()
    pairs: dict[str, object] = {
        "OUTPUT_DIR": folder / "run",
        "NUM_GPUS": int(arguments.device == "cuda"),
        "TRAIN.BATCH_SIZE": arguments.batch_size,
        "RUNNER.ACCUMULATE": 1,
        "RUNNER.CLIPS_PER_EPOCH": 1_000_000,
        "RUNNER.PROGRESS": False,
        "LOG_MODEL_INFO": False,
        "CORPUS.TRAIN.KINETICS.PATH": folder / "videos",
        "NETWORK.VARIANT": "torchvision",  # so that plain PyTorch computes the same network
        f"DISTILL.TEACHERS.{TEACHER}.ARCH": f"torchvision/{arguments.teacher}",
        f"DISTILL.TEACHERS.{TEACHER}.WEIGHTS": "random",
        **{key.replace("__", "."): value for key, value in keys.items()},
    }
    words = [str(word) for pair in pairs.items() for word in pair] + arguments.options
    cfg = load_cfg(CONFIG, words)[0]
    if cfg.DISTILL.GRID.CLIPS:
        cfg = write_cache(cfg, folder / "targets")
    session = stack.enter_context(open_session(cfg, log_to_folder=False))
    trainer = training.build_trainer(session, saves=False)
    objective = trainer.state.objective
    set_train_mode(objective.trainable, False)
    specs = build.view_specs(objective.trainable.student, objective.teachers, "train")
    size = arguments.batch_size
    views = {spec.pixels: random_clips(size, spec.num_frames or 1, spec.crop_size) for spec in specs.values()}
    if arguments.device == "cuda":
        views = {pixels: view.pin_memory() for pixels, view in views.items()}  # as a loader hands them over
    batch = {"views": views, "keys": list(range(size)), "paths": ["video.mp4"] * size, "targets": {}, "bad": []}
    return trainer, batch


def build_loop(arguments: argparse.Namespace, stack: contextlib.ExitStack, **keys: object) -> Built:
    """``Trainer.run_step``; ``keys`` override the configuration (two underscores for a dot)."""
    trainer, batch = build_trainer(arguments, stack, **keys)
    facts = {"precision": trainer.state.precision.name, "device": trainer.device.type}
    if trainer.state.precision.name == "bf16" or trainer.device.type == "cuda":
        facts["flops"] = count_flops(trainer, batch)
    if trainer.state.precision.name == "bf16":
        facts["check"] = check_convolutions(trainer, batch)
    return lambda: trainer.run_step(repeat(batch)), facts


def build_gated(arguments: argparse.Namespace, stack: contextlib.ExitStack, *, gate: str) -> Built:
    """The loop with a threshold that half of the batch is above."""
    keys = {"DISTILL__GATE": gate, f"DISTILL__TEACHERS__{TEACHER}__MAX_ENTROPY": 1.0}  # put right below
    trainer, batch = build_trainer(arguments, stack, **keys)
    from distinit_plugin.losses import entropy

    objective, precision, views = trainer.state.objective, trainer.state.precision, trainer.finish(batch)
    (term,) = objective.terms
    with precision.autocast():
        logits = objective.teachers[TEACHER]({"rgb": views[f"{TEACHER}/rgb"]}).logits.float()
        middle = entropy(logits, term.temperature).sort().values[len(logits) // 2 - 1 :][:2].mean()
        objective.terms = (replace(term, max_entropy=float(middle)),)
        kept = objective.prepare(views, {}).weights[term.name].sum()
    assert int(kept) == len(logits) // 2, "the gate does not keep half"
    return lambda: trainer.run_step(repeat(batch)), {"precision": precision.name, "device": trainer.device.type}


def build_student(arguments: argparse.Namespace, stack: contextlib.ExitStack) -> Built:
    """The loop without a teacher: the same network with a classifier as large as the teacher's, on labels."""
    keys = {
        "ACTION__LOSS_WEIGHT": 1.0,
        "MODEL__NUM_CLASSES": NUM_CLASSES,
        "CORPUS__TRAIN__KINETICS__LABELED": True,
        f"DISTILL__TEACHERS__{TEACHER}__LOSS_WEIGHT": 0,
    }
    trainer, batch = build_trainer(arguments, stack, **keys)
    batch["targets"] = {"label": torch.arange(arguments.batch_size)}
    return lambda: trainer.run_step(repeat(batch)), {
        "precision": trainer.state.precision.name,
        "device": trainer.device.type,
    }


def build_cached(arguments: argparse.Namespace, stack: contextlib.ExitStack) -> Built:
    """The loop on stored targets, which are read for each step (in a training, workers do it)."""
    keys = {"DISTILL__GRID__CLIPS": GRID_CLIPS, "DISTILL__GRID__CROPS": 3}
    trainer, batch = build_trainer(arguments, stack, **keys, **{f"DISTILL__TEACHERS__{TEACHER}__WEIGHTS": TAG})
    from distinit_plugin import build
    from distinit_plugin.config.load import parse_cfg
    from distinit_plugin.video.grid import Place

    cfg, _ = parse_cfg(trainer.state.config_text, "the loop's")
    clip = build.input_spec(cfg).view_specs("train")["rgb"]
    stored = build.build_targets(cfg, build.build_corpora(cfg, "train"), "train", clip)[TEACHER]
    numbers = torch.Generator().manual_seed(0)

    def step() -> None:
        places = torch.randint(6 * GRID_CLIPS, (arguments.batch_size,), generator=numbers).tolist()
        rows = [stored.read("video.mp4", 0, Place(*divmod(place, 6)), NUM_FRAMES, 0) for place in places]
        batch["targets"] = {TEACHER: torch.stack(rows)}
        trainer.run_step(repeat(batch))

    return step, {"precision": trainer.state.precision.name, "device": trainer.device.type}


def write_cache(cfg: Any, folder: Path) -> Any:
    """Any targets of the teacher for all of the grid of the one video; the configuration that reads them."""
    from distinit_plugin import build
    from distinit_plugin.teachers.cache import TargetLayout, TargetStore

    clip = build.input_spec(cfg).view_specs("train")["rgb"]
    layout = TargetLayout(
        layer="logits",
        shape=(NUM_CLASSES,),
        dtype="float16",
        videos=1,
        clips=GRID_CLIPS,
        crops=6,
        frames=1,
        each_frame=False,
        shard_videos=1,
        feature_dim=1,
    )
    names = build.build_corpora(cfg, "train").names()
    identity = build.describe_targets(cfg, TEACHER, "train", clip)
    store = TargetStore.settle(build.cache_part(folder, "train"), layout, identity, {}, names)
    store.write(0, torch.randn(layout.shard_shape(0)).half().numpy(), {})
    store.finish()
    cfg = cfg.clone()
    cfg.defrost()
    cfg.DISTILL.TEACHERS[TEACHER].CACHE = str(folder)
    cfg.freeze()
    return cfg


def count_flops(trainer: Any, batch: Any) -> int:
    """Floating point operations of a step: three forward passes of the student and one of the teacher."""
    from distinit_plugin.engine.profile import count_macs

    objective, views = trainer.state.objective, trainer.finish(batch)
    student = count_macs(objective.trainable.student, {"rgb": views["student/rgb"]})
    teacher = count_macs(objective.teachers[TEACHER], {"rgb": views[f"{TEACHER}/rgb"]})
    return 2 * (3 * student + teacher) * len(batch["keys"])


def check_convolutions(trainer: Any, batch: Any) -> str:
    """Each distinct convolution in the formulation that the job runs it in, output and gradients, against fp32."""
    from distinit_plugin.models.conv import measure_case, record_cases

    student = trainer.state.objective.trainable.student
    chosen = {module: module.formulation for module in student.modules() if hasattr(module, "formulation")}
    cases = record_cases(student, {"rgb": trainer.finish(batch)["student/rgb"]})
    worst = plain = 0.0
    for case in cases:
        errors = measure_case(case, dtype=torch.bfloat16, device=trainer.device, timing=False).errors
        plain = max(plain, *errors["conv3d"])
        formulation = chosen[case.modules[0]]
        worst = max(worst, *errors[formulation]) if formulation in errors else worst  # else it runs in fp32
    for module, formulation in chosen.items():  # recording has set conv3d everywhere
        module.formulation = formulation
    return (
        f"Gradients of {len(cases)} distinct convolutions against fp32, worst relative error: {worst:.2g} as they run "
        f"(at most 0.01: {'yes' if worst <= 1e-2 else 'NO'}), {plain:.2g} as conv3d."
    )


# ------------------------------------------------------------------------------------------------- its bare parts
def build_parts(arguments: argparse.Namespace, stack: contextlib.ExitStack) -> Built:
    """Student, head and teacher without a loop around them, with the loop's settings."""
    from torchvision.models import get_model

    from distinit_plugin.engine.memory import keep_freed_memory
    from distinit_plugin.engine.precision import choose_memory_format, choose_precision, set_flush_denormals
    from distinit_plugin.models import InputSpec, build_network
    from distinit_plugin.models.conv import check_convolutions as set_formulations
    from distinit_plugin.models.hardware import hardware_has_bf16

    device = torch.device(arguments.device)
    options = dict(zip(arguments.options[::2], arguments.options[1::2], strict=True))
    set_flush_denormals(True)
    if device.type == "cpu":
        keep_freed_memory()
    torch.backends.cudnn.benchmark = device.type == "cuda"
    torch.manual_seed(0)
    precision = choose_precision(
        options.get("RUNNER.PRECISION", "auto"), device, has_bf16=hardware_has_bf16(device)
    ).name
    memory_format = choose_memory_format(options.get("RUNNER.CHANNELS_LAST", "auto"), precision)
    network: Any = build_network(
        "R2Plus1D",
        num_classes=0,
        input=InputSpec(num_frames=NUM_FRAMES, train_crop_size=STUDENT_SIZE),
        depth=int(options.get("RESNET.DEPTH", 18)),
        width=int(options.get("NETWORK.WIDTH", 64)),
        variant="torchvision",
    )
    student = network.to(device=device, memory_format=memory_format)
    head = nn.Linear(network.feature_dim, NUM_CLASSES).to(device)
    teacher = get_model(arguments.teacher, weights=None).to(device).eval().requires_grad_(False)
    clip = (random_clips(arguments.batch_size, NUM_FRAMES, STUDENT_SIZE) / 255).to(device)
    clip = clip.contiguous(memory_format=memory_format)
    frame = (random_clips(arguments.batch_size, 1, TEACHER_SIZE)[:, :, 0] / 255).to(device)
    dtype = torch.bfloat16
    if precision != "fp32":
        set_formulations(student, {"rgb": clip[:2]}, dtype=dtype, device=device, cache_path=_conv_cache())
    optimizer = _sgd([*student.parameters(), *head.parameters()])
    student.train()

    def step() -> None:
        with torch.autocast(device.type, dtype=dtype, enabled=precision != "fp32"):
            with torch.no_grad():
                targets = teacher(frame).float().softmax(1)
            logits = head(student({"rgb": clip}).features)
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(logits.float(), targets).backward()
        optimizer.step()

    return step, {"precision": precision, "device": device.type}


def _conv_cache() -> str:
    """The file in which a job keeps what it measured, so that both take the same formulations."""
    from distinit_plugin.jobs.session import cache_folder

    return str(cache_folder() / "convolutions.json")


def _sgd(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """As in the configuration."""
    return torch.optim.SGD(parameters, lr=0.01, momentum=0.9, nesterov=True, weight_decay=1e-4)


# ------------------------------------------------------------------------------------------------- plain PyTorch
def build_plain(
    arguments: argparse.Namespace, stack: contextlib.ExitStack, *, flush: bool = False, autocast: bool = False
) -> Built:
    """The same in a script that somebody might write with torchvision."""
    from torchvision.models import get_model
    from torchvision.models.video import r2plus1d_18

    if flush:
        torch.set_flush_denormal(True)
    device = torch.device(arguments.device)
    torch.backends.cudnn.benchmark = device.type == "cuda"
    torch.manual_seed(0)
    student = r2plus1d_18(num_classes=NUM_CLASSES).to(device).train()
    teacher = get_model(arguments.teacher, weights=None).to(device).eval()
    clip = (random_clips(arguments.batch_size, NUM_FRAMES, STUDENT_SIZE) / 255).to(device)
    frame = (random_clips(arguments.batch_size, 1, TEACHER_SIZE)[:, :, 0] / 255).to(device)
    optimizer = _sgd(list(student.parameters()))

    def step() -> None:
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=autocast):
            with torch.no_grad():
                targets = teacher(frame).softmax(1)
            loss = F.cross_entropy(student(clip), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step, {"precision": "bf16" if autocast else "fp32", "device": device.type}


BUILDERS: dict[str, Callable[[argparse.Namespace, contextlib.ExitStack], Built]] = {
    "loop": build_loop,
    "compiled": partial(build_loop, RUNNER__COMPILE=True),
    "weight": partial(build_gated, gate="weight"),
    "skip": partial(build_gated, gate="skip"),
    "student": build_student,
    "cached": build_cached,
    "parts": build_parts,
    "plain": build_plain,
    "plain-flushed": partial(build_plain, flush=True),
    "autocast": partial(build_plain, autocast=True),
}


# --------------------------------------------------------------------------------------------------- the process
def matrix_rate(device: str) -> float:
    """Floating point operations per second of large bf16 matrix products, measured."""
    size = PRODUCT_SIZES[device]
    left, right = (torch.randn(size, size, device=device).bfloat16() for _ in range(2))
    seconds = []
    for _ in range(20):
        _synchronize(device)
        begin = time.perf_counter()
        left @ right
        _synchronize(device)
        seconds.append(time.perf_counter() - begin)
    return 2 * size**3 / sorted(seconds)[len(seconds) // 2]


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def last_words(device: str) -> dict[str, Any]:
    """Peak memory of the process or of its GPU; where bf16 is computed in hardware also the rate to compare with."""
    if device == "cuda":
        memory = torch.cuda.max_memory_allocated()
    else:
        from common import peak_memory

        memory = peak_memory()
    from distinit_plugin.models.hardware import hardware_has_bf16

    return {"memory": memory, "rate": matrix_rate(device) if hardware_has_bf16(device) else 0.0}


def main() -> int:
    """Build, say so, step on demand."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("variant", choices=BUILDERS)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--teacher", default="resnet50")
    parser.add_argument("--options", nargs="*", default=[])
    arguments = parser.parse_args()
    return serve(
        partial(BUILDERS[arguments.variant], arguments), partial(last_words, arguments.device), arguments.device
    )


if __name__ == "__main__":
    sys.exit(main())
