"""What every job does first: device, precision, threads, seeds, ranks, the log."""

from __future__ import annotations

import logging
import os
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from torch import Tensor, nn

from distinit_plugin import build
from distinit_plugin.config.node import CfgNode
from distinit_plugin.data.bad import BadVideoLog
from distinit_plugin.data.flow import LiveFlow
from distinit_plugin.data.loader import ClipLoader, explain_dead_worker
from distinit_plugin.data.views import finish_views
from distinit_plugin.engine import distributed
from distinit_plugin.engine.failure import ending_together
from distinit_plugin.engine.memory import keep_freed_memory
from distinit_plugin.engine.precision import Precision, choose_memory_format, choose_precision, set_flush_denormals
from distinit_plugin.engine.progress import ProgressView, RunLog, open_progress
from distinit_plugin.errors import UserError
from distinit_plugin.jobs.corpora import Corpora
from distinit_plugin.models.conv import Conv3d, check_convolutions
from distinit_plugin.models.hardware import hardware_has_bf16
from distinit_plugin.teachers.frozen import module_of
from distinit_plugin.types import Batch, Network, Split, ViewSpec

logger = logging.getLogger(__name__)

CHECK_BATCH = 2
"""Clips with which convolutions are checked and timed."""

WORKS: dict[Split, str] = {"train": "reading", "val": "validation", "test": "test"}
"""What is shown of passes over the videos of a use (training videos are read alone in a probe)."""

BAD_VIDEOS_FILE = "bad_videos.csv"
"""Below OUTPUT_DIR."""


@dataclass(frozen=True)
class Session:
    """Where and how a job computes.

    Attributes:
        cfg: The configuration.
        device: Of this rank.
        precision: Autocast and scaler.
        memory_format: Of 5-D tensors.
        log: The run's log.
        bad_videos: Of training, validation and test together.
        progress: What a person sees of anything that takes long.
        corpora: The videos that the configuration names.
    """

    cfg: CfgNode
    device: torch.device
    precision: Precision
    memory_format: torch.memory_format
    log: RunLog
    bad_videos: BadVideoLog
    progress: ProgressView
    corpora: Corpora

    @property
    def output_dir(self) -> Path:
        """OUTPUT_DIR."""
        return Path(self.cfg.OUTPUT_DIR)

    def finisher(self, specs: Mapping[str, ViewSpec]) -> Callable[[Batch], dict[str, Tensor]]:
        """A function that makes the named views of a batch on the device."""
        flow = self.live_flow if self._computes_flow(specs) else None

        def finish(batch: Batch) -> dict[str, Tensor]:
            return finish_views(batch["views"], specs, self.device, memory_format=self.memory_format, flow=flow)

        return finish

    def timers(self, specs: Mapping[str, ViewSpec]) -> dict[str, Callable[[], float]]:
        """What ``finisher`` does that may take long → seconds spent on it since the last call."""
        return {"flow": self.live_flow.seconds} if self._computes_flow(specs) else {}

    def _computes_flow(self, specs: Mapping[str, ViewSpec]) -> bool:
        return not self.cfg.FLOW.STORE and any(spec.modality == "flow" for spec in specs.values())

    @cached_property
    def live_flow(self) -> LiveFlow:
        """Computes optical flow; made when it is first asked for.

        Raises:
            UserError: The back end is not there, or its weights are not.
        """
        return build.build_live_flow(self.cfg)

    def place(self, network: Network | nn.Module) -> nn.Module:
        """Move a network to the device, in the memory format of the job."""
        assert isinstance(network, nn.Module)
        network.to(self.device)
        for parameter in module_of(network).parameters():
            if parameter.ndim == 5:
                parameter.data = parameter.data.contiguous(memory_format=self.memory_format)
        return network

    @contextmanager
    def read(self, loader: ClipLoader, use: Split) -> Iterator[Iterable[Batch]]:
        """The batches of a validation or test, which is shown while it lasts.

        Afterwards the bad videos of all ranks are in the job's account.
        """
        with self.progress.work(WORKS[use], len(loader)) as advance:

            def batches() -> Iterator[Batch]:
                for number, batch in enumerate(loader, start=1):
                    self.bad_videos.add(batch["bad"], use)
                    yield batch
                    advance(number)

            yield batches()
        self.bad_videos.share(distributed.gather_objects)

    def refuse_bad_corpus(self, num_videos: int, use: Split) -> None:
        """Stop all ranks when more of a corpus than CORPUS.MAX_BAD_FRACTION is bad.

        Raises:
            UserError: It is.
        """
        self.bad_videos.check(num_videos, self.cfg.CORPUS.MAX_BAD_FRACTION, use)

    def check_convolutions(self, network: Network | nn.Module, specs: Mapping[str, ViewSpec]) -> None:
        """Set the formulation of each convolution: right in the job's precision, and the fastest of those.

        In fp32 PyTorch's own ``conv3d`` stays: it is right, and no other formulation was faster where it was measured.

        Args:
            network: A network, or one with its adapters.
            specs: The views that it is going to see, by its own names.
        """
        module = self.place(network)
        has_convolutions = any(isinstance(part, Conv3d) for part in module.modules())
        if not (self.cfg.RUNNER.CHECK_CONVOLUTIONS and has_convolutions) or self.precision.name == "fp32":
            return
        report = check_convolutions(
            module,
            example_views(specs, CHECK_BATCH, self.device, self.memory_format),
            dtype=torch.bfloat16 if self.precision.name == "bf16" else torch.float16,
            device=self.device,
            cache_path=str(cache_folder() / "convolutions.json"),
            timing=not self.cfg.RUNNER.DETERMINISTIC,
        )
        logger.info("%s", report)


def example_views(
    specs: Mapping[str, ViewSpec],
    batch_size: int,
    device: torch.device,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> dict[str, Tensor]:
    """Random views (B,C,T,H,W) of the sizes that ``specs`` state, for checks and measurements."""
    generator = torch.Generator().manual_seed(0)
    views = {}
    for name, spec in specs.items():
        channels = spec.channels
        shape = (batch_size, channels, spec.num_frames or 1, spec.crop_size, spec.crop_size)
        views[name] = torch.randn(shape, generator=generator).to(device).contiguous(memory_format=memory_format)
    return views


def cache_folder() -> Path:
    """Where measurements of this machine are kept: ``$XDG_CACHE_HOME/distinit``, mostly ``~/.cache/distinit``."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "distinit"


@contextmanager
def open_session(
    cfg: CfgNode, *, log_to_folder: bool = True, console: Console | None = None, corpora: Corpora | None = None
) -> Iterator[Session]:
    """Set the process up for a job, and clean up after it.

    Args:
        cfg: The configuration.
        log_to_folder: Write ``stdout.log`` to OUTPUT_DIR.
        console: Where to print; the standard output when ``None``.
        corpora: Lists that are read already; ``None``: they are read when they are asked for.

    Raises:
        UserError: The device is not there, OUTPUT_DIR cannot be written, or a decoding process died.
    """
    try:
        with _set_up(cfg, log_to_folder=log_to_folder, console=console, corpora=corpora) as session:
            yield session
    except RuntimeError as error:  # torch raises it wherever this process is, also while it cleans up
        dead_worker = explain_dead_worker(error)
        if dead_worker is None:
            raise
        raise dead_worker from error


@contextmanager
def _set_up(
    cfg: CfgNode, *, log_to_folder: bool, console: Console | None, corpora: Corpora | None
) -> Iterator[Session]:
    device = choose_device(cfg)
    num_threads = torch.get_num_threads()
    if cfg.RUNNER.NUM_THREADS:
        torch.set_num_threads(cfg.RUNNER.NUM_THREADS)
    set_flush_denormals(cfg.RUNNER.FLUSH_DENORMALS)
    if device.type == "cpu" and cfg.RUNNER.KEEP_MEMORY:
        keep_freed_memory()
    joined = distributed.start(device.type, cfg.RUNNER.COLLECTIVE_TIMEOUT)
    deterministic, tuning = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    log: RunLog | None = None
    failed = True
    try:
        log = RunLog(cfg.OUTPUT_DIR if log_to_folder else None, main=distributed.is_main(), console=console)
        _set_seeds(cfg.RNG_SEED)
        if cfg.RUNNER.DETERMINISTIC:
            # cuBLAS reads this when it starts.
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True)
        # Where all clips have one size cuDNN may try its algorithms, of which it takes the fastest.
        one_size = not cfg.DETECTION.ENABLE  # whole pictures have their own proportions
        torch.backends.cudnn.benchmark = device.type == "cuda" and one_size and not cfg.RUNNER.DETERMINISTIC
        option = "fp16" if cfg.TRAIN.MIXED_PRECISION else cfg.RUNNER.PRECISION
        choice = choose_precision(
            option, device, has_bf16=hardware_has_bf16(device), deterministic=cfg.RUNNER.DETERMINISTIC
        )
        logger.info("device %s, precision %s: %s", device, choice.name, choice.reason)
        memory_format = choose_memory_format(cfg.RUNNER.CHANNELS_LAST, choice.name)
        bad_file = Path(cfg.OUTPUT_DIR) / BAD_VIDEOS_FILE if log_to_folder else None
        bad_videos = BadVideoLog(bad_file, main=distributed.is_main())
        progress = open_progress(log.console, enabled=cfg.RUNNER.PROGRESS, main=distributed.is_main())
        with ending_together(cfg.RUNNER.COLLECTIVE_TIMEOUT):
            yield Session(
                cfg=cfg,
                device=device,
                precision=Precision(choice.name, device),
                memory_format=memory_format,
                log=log,
                bad_videos=bad_videos,
                progress=progress,
                corpora=corpora or Corpora(cfg),
            )
        failed = False
    except UserError:
        raise
    except Exception as error:
        if log is not None and not (isinstance(error, RuntimeError) and explain_dead_worker(error)):
            log.record(error)
        raise
    finally:
        torch.use_deterministic_algorithms(deterministic)
        torch.backends.cudnn.benchmark = tuning
        torch.set_num_threads(num_threads)
        if log is not None:
            log.close()
        if joined:
            distributed.stop(failed=failed)


def choose_device(cfg: CfgNode) -> torch.device:
    """This rank's device: a GPU where NUM_GPUS asks for one, else the CPU.

    Raises:
        UserError: More GPUs are asked for than there are.
    """
    if cfg.NUM_GPUS > 0 and not torch.cuda.is_available():
        raise UserError(
            f"NUM_GPUS is {cfg.NUM_GPUS}, but torch finds no GPU here: set it 0 for the CPU, or repair the driver."
        )
    if cfg.NUM_GPUS == 0:
        return torch.device("cpu")
    found, number = torch.cuda.device_count(), int(os.environ.get("LOCAL_RANK", "0"))
    if found < cfg.NUM_GPUS and not distributed.started_by_torchrun():
        raise UserError(f"NUM_GPUS is {cfg.NUM_GPUS}, but torch finds {found} here: set it to at most {found}.")
    if number >= found:
        raise UserError(
            f"there is no GPU for local rank {number}: torch finds {found} here, so start at most {found} processes "
            f"on this machine (torchrun --nproc_per_node {found}), or let each of them see all of its GPUs (srun "
            "--gpu-bind=none)."
        )
    return torch.device("cuda", number)


def _set_seeds(seed: int) -> None:
    """Every generator that weights may be drawn from (samples have generators of their own)."""
    torch.manual_seed(seed)
    np.random.seed(seed)  # noqa: NPY002 (libraries draw from it)
    random.seed(seed)
