"""The machine: cores, number formats, memory, disks, GPUs, and how processes talk to each other."""

from __future__ import annotations

import os
import resource
import shutil
import tempfile
from pathlib import Path

from distinit_plugin.doctor.findings import Finding, first_line

SHARED_MEMORY = Path("/dev/shm")
"""Through which decoding processes hand over batches."""

ENOUGH_SHARED = 2**30
"""Bytes of it that a few workers with ordinary batches need."""

ENOUGH_DISK = 5 * 2**30
"""Bytes: a handful of checkpoints."""

ENOUGH_FILES = 1024

GPU_FILES = "/dev/nvidia[0-9]*"


def look_at_cpu() -> list[Finding]:
    """Cores, threads, memory, and whether bf16 is right."""
    import torch

    from distinit_plugin.engine.precision import choose_precision
    from distinit_plugin.models.hardware import hardware_has_bf16, hardware_key, num_cores

    cores, threads = num_cores(), torch.get_num_threads()
    name = hardware_key("cpu", torch.float32).partition(", ")[0]
    findings = [
        Finding(
            "processor", "works", f"{name}, {torch.backends.cpu.get_cpu_capability()}, {cores} cores for this process"
        )
    ]
    advice = ""
    if threads > cores:
        advice = f"More threads than cores slow everything down: set OMP_NUM_THREADS to {cores} at most."
    findings.append(Finding("threads", "note" if advice else "works", f"torch computes with {threads}", advice))
    device = torch.device("cpu")
    has_bf16 = hardware_has_bf16(device)
    choice = choose_precision("auto", device, has_bf16=has_bf16)
    findings.append(Finding("precision", "works", f"{choice.name}: {choice.reason}"))
    if has_bf16:
        findings.append(look_at_convolutions("cpu"))
    return [*findings, _memory()]


def look_at_convolutions(device: str, *, width: int = 16, size: int = 56) -> Finding:
    """The check of ``models.conv`` in bf16, on one small network of either kind of convolution."""
    import torch

    from distinit_plugin.models.conv import check_convolutions
    from distinit_plugin.models.factory import build_network
    from distinit_plugin.models.network import InputSpec

    input = InputSpec(num_frames=8, train_crop_size=size, test_crop_size=size)
    views = {"rgb": torch.zeros(2, 3, 8, size, size, device=device)}
    wrong = total = 0
    for name in ("R2Plus1D", "Res3D"):
        network = build_network(name, num_classes=0, input=input, depth=10, width=width).to(device)
        report = check_convolutions(network, views, dtype=torch.bfloat16, device=device, timing=False)
        wrong, total = wrong + len(report.repaired), total + len(report.verdicts)
    where = f"bf16 conv3d on {device}"
    if not wrong:
        return Finding(where, "works", f"right in all of {total} convolutions")
    return Finding(
        where,
        "note",
        f"wrong in {wrong} of {total} convolutions, with this torch",
        "Nothing: distinit run compares its own and repairs them. In PySlowFast leave TRAIN.MIXED_PRECISION False.",
    )


def look_at_gpus() -> list[Finding]:
    """Each GPU, computing for real; without one, why."""
    import torch

    if not torch.cuda.is_available():
        return [_no_gpu(torch.version.cuda)]
    findings = []
    for number in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(number)
        name, memory = f"GPU {number}", f"{facts.total_memory / 2**30:.0f} GiB"
        text = f"{facts.name}, {memory}, compute capability {facts.major}.{facts.minor}"
        try:
            _compute(f"cuda:{number}")
        except RuntimeError as error:
            advice = "Install the torch build for this GPU and driver (pytorch.org, Get started), or set NUM_GPUS 0."
            findings.append(Finding(name, "broken", f"{text}: {first_line(error)}", advice))
            continue
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        findings.append(Finding(name, "works", f"{text}, {'bf16' if bf16 else 'no bf16'}"))
        if bf16 and number == 0:
            findings.append(look_at_convolutions("cuda"))
    return findings


def _compute(device: str) -> None:
    """A small convolution, forward and backward; raises RuntimeError where there is no kernel for the GPU."""
    import torch

    image = torch.ones(1, 3, 4, 8, 8, device=device, requires_grad=True)
    torch.nn.functional.conv3d(image, torch.ones(2, 3, 3, 3, 3, device=device)).sum().backward()
    assert image.grad is not None
    image.grad.cpu()  # errors of a GPU come late


def _no_gpu(cuda: str | None) -> Finding:
    seen = sorted(str(path) for path in Path("/").glob(GPU_FILES.lstrip("/")))
    if not seen:
        return Finding(
            "GPU", "absent", "none here", "Set NUM_GPUS 0; RUNNER.CPU_RANKS starts several processes on a CPU."
        )
    if cuda is None:
        advice = "To use it, install a CUDA build of torch and torchvision (pytorch.org, Get started)."
        return Finding("GPU", "note", f"{seen[0]} is here, but this torch is for CPUs", advice)
    advice = "Update the driver to one for that CUDA, or install a torch build for the driver (nvidia-smi tells)."
    return Finding("GPU", "broken", f"{seen[0]} is here, but torch with CUDA {cuda} cannot use it", advice)


def look_at_processes() -> list[Finding]:
    """Back ends with which ranks average their gradients."""
    import torch
    import torch.distributed as dist

    if not dist.is_available():
        advice = "Install a torch with torch.distributed to use several GPUs or RUNNER.CPU_RANKS."
        return [Finding("several processes", "note", "this torch has no torch.distributed", advice)]
    gloo = Finding("gloo", "works", "several processes on a CPU")
    if not dist.is_gloo_available():
        gloo = Finding("gloo", "note", "not in this torch", "RUNNER.CPU_RANKS must stay 1.")
    findings = [gloo]
    if torch.cuda.is_available():
        nccl = Finding("NCCL", "broken", "not in this torch", "Install torch's own CUDA build, or use one GPU.")
        if dist.is_nccl_available():
            nccl = Finding("NCCL", "works", ".".join(map(str, torch.cuda.nccl.version())))
        findings.append(nccl)
    return findings


def look_at_places(output: str = ".") -> list[Finding]:
    """Shared memory, disks, open files.

    Args:
        output: The folder where a job would write; it need not exist.
    """
    findings = []
    if SHARED_MEMORY.is_dir():
        total, _, free = shutil.disk_usage(SHARED_MEMORY)
        text = f"{_size(free)} free of {_size(total)}"
        advice = ""
        if free < ENOUGH_SHARED:
            advice = (
                "Decoding processes may die for lack of it: start the container with --shm-size 8g, or set "
                "DATA_LOADER.NUM_WORKERS 0."
            )
        findings.append(Finding(f"shared memory ({SHARED_MEMORY})", "note" if advice else "works", text, advice))
    findings.append(_folder("output folder", _existing(output)))
    findings.append(_folder("temporary files", Path(tempfile.gettempdir())))
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    few = files != resource.RLIM_INFINITY and files < ENOUGH_FILES
    advice = f"Many decoding processes need more: ulimit -n {4 * ENOUGH_FILES}." if few else ""
    findings.append(Finding("open files", "note" if few else "works", f"{files} at most", advice))
    return findings


def _existing(path: str) -> Path:
    """The folder itself, or the one in which it would be made."""
    place = Path(path).expanduser().absolute()
    return next((folder for folder in (place, *place.parents) if folder.is_dir()), Path("/"))


def _folder(name: str, place: Path) -> Finding:
    free = shutil.disk_usage(place).free
    text = f"{place}, {_size(free)} free"
    if not os.access(place, os.W_OK):
        return Finding(name, "note", f"{place} cannot be written", "Give another one (OUTPUT_DIR, TMPDIR).")
    advice = (
        "Checkpoints may not fit: free space, or give another one (OUTPUT_DIR, TMPDIR)." if free < ENOUGH_DISK else ""
    )
    return Finding(name, "note" if advice else "works", text, advice)


def _memory() -> Finding:
    pages, size = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    return Finding("memory", "works", _size(pages * size))


def _size(amount: float) -> str:
    return f"{amount / 2**30:.1f} GiB" if amount >= 2**30 else f"{amount / 2**20:.0f} MiB"
