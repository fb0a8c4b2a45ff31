"""Features and logits of long videos by sliding windows: one file per video, resumable."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from distinit_plugin.data.windows import SlidingWindows, Spacing
from distinit_plugin.engine.evaluate import Finish, evaluation_mode
from distinit_plugin.engine.features import POOLED, import_parquet, outputs_of, row_type, rows_of, write_rows
from distinit_plugin.engine.progress import Advance
from distinit_plugin.errors import UserError, VideoError
from distinit_plugin.files import read_json, why_unusable, write_csv, write_text
from distinit_plugin.jobs.session import Session, example_views, open_session
from distinit_plugin.jobs.trained import COMPUTING_KEYS, Trained, read_trained
from distinit_plugin.types import BadVideo, Batch, Network
from distinit_plugin.video.decode import open_video

logger = logging.getLogger(__name__)

_MAX_JSON_BYTES = 1 << 20

SETTINGS_FILE = "settings.json"
"""Below the output: what all of its files have in common."""
TABLE_FILE = "videos.csv"
"""Below the output: which file is of which video."""
NAME_DIGITS = 8


@dataclass
class Extraction:
    """What became of each video.

    Attributes:
        done: Video → file, of this call.
        skipped: Video → file, which was there.
        bad: Videos that gave no features.
    """

    done: dict[str, Path] = field(default_factory=dict)
    skipped: dict[str, Path] = field(default_factory=dict)
    bad: list[BadVideo] = field(default_factory=list)


def extract(
    paths: Sequence[str],
    *,
    checkpoint: str,
    output: Path,
    spacing: Spacing,
    layers: Sequence[str] = (),
    fmt: str = "npy",
    batch_size: int = 0,
    timeout: float = 300.0,
    opts: Sequence[str] = (),
    console: Console | None = None,
) -> Extraction:
    """Run a trained network over whole videos.

    Args:
        paths: Video files, or folders of frames.
        checkpoint: Of this program; it says how videos are to be seen: frames, rate, crop as in its test. A converted
            file says it in part.
        output: Folder of the files; those that are there are not made again.
        spacing: How far apart windows are.
        layers: ``features``, ``logits``, or layers (averaged over space and time); empty: features, and logits where
            there is a classifier.
        fmt: ``npy`` or ``parquet``.
        batch_size: Windows per forward pass; 0: TEST.BATCH_SIZE of the checkpoint.
        timeout: Seconds that a file may take to be indexed, and to give the next frame.
        opts: ``KEY VALUE …`` of the keys in :mod:`.trained` instead.
        console: Where to print; the standard output when ``None``.

    Raises:
        UserError: The checkpoint, a layer or the output folder is not usable, or the folder's files were made with
            other settings.
    """
    if fmt == "parquet":
        import_parquet()
    trained = read_trained(checkpoint, opts, more_keys=COMPUTING_KEYS)
    with open_session(trained.cfg, log_to_folder=False, console=console) as session:
        network = trained.network()
        names = _check_layers(trained, network, layers)
        specs = dict(network.view_specs("test"))
        check_windows(checkpoint, network)
        session.check_convolutions(network, specs)
        settle(output, _settings(session, network, names, spacing, fmt))
        job = _Job(session, network, names, spacing, fmt, batch_size or trained.cfg.TEST.BATCH_SIZE, timeout)
        result = Extraction()
        videos = list(dict.fromkeys(map(os.path.abspath, paths)))
        for number, path in enumerate(videos, start=1):
            target = output / file_name(path, fmt)
            if target.is_file():
                result.skipped[path] = target
                continue
            try:
                job.run(path, target, f"{number}/{len(videos)} {os.path.basename(path)}")
            except VideoError as error:
                result.bad.append(BadVideo(path, error.reason))
                logger.warning("%s: %s", path, error.reason)
            else:
                result.done[path] = target
        _write_table(output, result)
    return result


def file_name(path: str, fmt: str) -> str:
    """Of the features of a video: its name, and some digits that tell it from others of the same name elsewhere."""
    digits = sha256(os.fsencode(path)).hexdigest()[:NAME_DIGITS]
    return f"{Path(path).stem}-{digits}.{fmt}"


class _Job:
    """What is the same for all videos."""

    def __init__(
        self,
        session: Session,
        network: Network,
        names: list[str],
        spacing: Spacing,
        fmt: str,
        batch_size: int,
        timeout: float,
    ) -> None:
        self._session = session
        self._module = session.place(network)
        self._specs = dict(network.view_specs("test"))
        self._finish = session.finisher(self._specs)
        self._names, self._spacing, self._fmt = names, spacing, fmt
        self._batch_size, self._timeout = batch_size, timeout
        views = example_views(self._specs, 1, session.device, session.memory_format)
        with evaluation_mode(self._module), session.precision.autocast():
            sizes = {name: values.shape[1] for name, values in outputs_of(self._module, views, names).items()}
        self._dtype = row_type(sizes)

    def run(self, path: str, target: Path, title: str) -> None:
        """One video.

        Raises:
            VideoError: It cannot be read.
            UserError: The file cannot be written, or a value is not finite.
        """
        with open_video(path, timeout=self._timeout) as source:
            windows = SlidingWindows(source, self._specs, self._spacing, test_scale=self._session.cfg.CORPUS.TEST_SCALE)
            with self._session.progress.work(title, len(windows)) as advance:
                batches = window_batches(windows, self._batch_size, self._finish, advance)
                autocast = self._session.precision.autocast
                rows = rows_of(self._module, batches, self._names, self._dtype, autocast=autocast)
                write_rows(target, self._fmt, rows, len(windows), self._dtype)


def window_batches(
    windows: SlidingWindows, batch_size: int, finish: Finish, advance: Advance
) -> Iterator[tuple[list[float], list[float], Mapping[str, Tensor]]]:
    """Starts, ends (seconds) and normalised views of some windows at a time.

    Args:
        windows: Of one open video.
        batch_size: Windows at a time.
        finish: Makes the views on the device.
        advance: Told the number of windows that are done.
    """
    done, stream = 0, iter(windows)
    while part := list(islice(stream, batch_size)):
        views = {name: torch.stack([window.views[name] for window in part]) for name in part[0].views}
        batch: Batch = {"views": views, "keys": [], "paths": [], "targets": {}, "bad": []}
        yield [window.start for window in part], [window.end for window in part], finish(batch)
        done += len(part)
        advance(done)


def _check_layers(trained: Trained, network: Network, layers: Sequence[str]) -> list[str]:
    if not layers:
        return ["features", "logits"] if trained.has_classifier else ["features"]
    if "logits" in layers and not trained.has_classifier:
        raise UserError(f"--layer logits: {trained.path} has no classifier. Ask for features.")
    unknown = [name for name in layers if name not in POOLED and name not in network.layers]
    if unknown:
        raise UserError(
            f"--layer {unknown[0]}: the network has no such layer. Allowed: {', '.join([*POOLED, *network.layers])}."
        )
    return list(dict.fromkeys(layers))


def check_windows(checkpoint: str, network: Network) -> None:
    """Refuse a network that has no windows.

    Raises:
        UserError: It sees whole videos.
    """
    if any(spec.num_frames is None for spec in network.view_specs("test").values()):
        raise UserError(f"{checkpoint} sees whole videos at once, so there are no windows: use distinit predict.")


def _settings(session: Session, network: Network, names: list[str], spacing: Spacing, fmt: str) -> dict[str, str]:
    """What must be the same for all files of a folder, in words."""
    cfg = session.cfg
    digest = sha256()
    for key, tensor in sorted(network.bare_state_dict().items()):
        digest.update(f"{key} {tuple(tensor.shape)}".encode())
        digest.update(np.ascontiguousarray(tensor.detach().cpu().numpy()).tobytes())
    specs = network.view_specs("test")
    return {
        "network": cfg.MODEL.MODEL_NAME,
        "weights": digest.hexdigest()[:16],
        "views": ", ".join(f"{name} {spec.pixels}" for name, spec in specs.items()),
        "normalised": ", ".join(f"{name} {spec.mean} {spec.std}" for name, spec in specs.items()),
        "scale": str(cfg.CORPUS.TEST_SCALE),
        "windows": str(spacing),
        "layers": ", ".join(names),
        "format": fmt,
        "precision": session.precision.name,
    }


def settle(output: Path, settings: Mapping[str, str], what: str = "features") -> None:
    """Note the settings of a new folder; refuse a folder of others.

    Args:
        output: The folder.
        settings: What its files depend on, in words.
        what: Its files.

    Raises:
        UserError: It is, or it cannot be written.
    """
    path = output / SETTINGS_FILE
    if not path.is_file():
        write_text(path, json.dumps(dict(settings), indent=2) + "\n")
        return
    try:
        known = {key: str(value) for key, value in read_json(path, _MAX_JSON_BYTES).items()}
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"{path} is not readable as settings of {what} ({why_unusable(error)}). Name another --output."
        ) from error
    differing = [key for key in settings if known.get(key) != settings[key]]
    if differing:
        told = "; ".join(f"{key}: {known.get(key, 'not known')} there, {settings[key]} now" for key in differing)
        raise UserError(f"the {what} in {output} were made otherwise ({told}). Name another --output.")


def _write_table(output: Path, result: Extraction) -> None:
    rows = [[path, file.name, ""] for path, file in {**result.done, **result.skipped}.items()]
    rows += [[path, "", reason] for path, reason in result.bad]
    write_csv(output / TABLE_FILE, [["video", "file", "note"], *sorted(rows)])
