"""What the machine refuses (memory, disk, an algorithm), in a sentence: not a defect of this program."""

from __future__ import annotations

import errno
import re

_MEMORY = re.compile(
    r"out of memory|can't allocate memory|multiplication overflow|calculation overflowed|_STATUS_ALLOC_FAILED"
)
"""Of torch's allocators, CUDA, cuDNN, cuBLAS and NCCL."""

_ALGORITHM = re.compile(r"(\S+) does not have a deterministic implementation")

_REFUSALS = {
    errno.ENOSPC: "Free space on that disk, or set OUTPUT_DIR to another one.",
    errno.EDQUOT: "Free space within your quota, or set OUTPUT_DIR to another disk.",
    errno.EFBIG: "Raise the limit on the size of files (ulimit -f), or set OUTPUT_DIR to another disk.",
    errno.ENAMETOOLONG: "Give a shorter name.",
    errno.EROFS: "Choose a place that can be written.",
    errno.EACCES: "Ask for the right to it, or choose another place.",
    errno.EPERM: "Ask for the right to it, or choose another place.",
    errno.EMFILE: "Raise the limit on open files (ulimit -n), or lower DATA_LOADER.NUM_WORKERS.",
    errno.EIO: "The disk or its network failed; try again, or choose another place.",
    errno.ESTALE: "The network disk went away; start again when it is back.",
}
"""What the system refuses → what to do."""


def explain_refusal(error: Exception) -> str | None:
    """What was refused and what to do about it, for an error that nobody expected; ``None``: it is none of these."""
    text = str(error)
    if is_full_memory(error):
        return (
            f"there is not enough memory ({first_line(error)}). Lower TRAIN.BATCH_SIZE or raise RUNNER.ACCUMULATE; "
            "DATA.NUM_FRAMES, the crop sizes, NETWORK.WIDTH, TEST.BATCH_SIZE and DATA_LOADER.NUM_WORKERS cost memory, "
            "too (distinit run --dry-run says how much)."
        )
    algorithm = _ALGORITHM.search(text)
    if algorithm is not None:
        return (
            f"RUNNER.DETERMINISTIC: {algorithm[1]} has no deterministic algorithm on this device. Set it False, use "
            "another network, or run on the CPU."
        )
    if "Expected more than 1 value per channel when training" in text:
        return (
            "batch normalisation met a single value per channel: one clip per micro-batch and rank, whose map has one "
            "place there. Use at least 2 clips (TRAIN.BATCH_SIZE, RUNNER.ACCUMULATE, ranks), larger crops "
            "(DATA.TRAIN_CROP_SIZE), or MODEL.FROZEN_BN True with weights to start from."
        )
    if isinstance(error, ValueError) and "embedded null" in text:
        return "the name of a file holds a zero byte. Give it without."
    if isinstance(error, OSError) and error.errno in _REFUSALS:
        place = f"{error.filename}: " if error.filename else ""
        return f"{place}{(error.strerror or text).lower()}. {_REFUSALS[error.errno]}"
    return None


def is_full_memory(error: BaseException) -> bool:
    """Whether there was too little memory, whoever says so."""
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and bool(_MEMORY.search(str(error))))


def first_line(error: Exception) -> str:
    """Of its text, shortened; the error's name when it has none."""
    return next(iter(str(error).splitlines()), "")[:200] or type(error).__name__
