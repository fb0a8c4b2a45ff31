"""PyTorchVideo: which of its parts can be imported, decode and compute here."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import tempfile
from pathlib import Path

from distinit_plugin.doctor.findings import Finding, first_line
from distinit_plugin.doctor.media import FRAMES, pictures, write_tiny

PARTS = ("layers", "models.hub", "data", "transforms", "accelerator")

ALIAS = "distinit_plugin.hosts.pytorchvideo.alias_functional_tensor()"


def look_at_pytorchvideo() -> list[Finding]:
    """Its parts, its decoding, and one of its networks behind this package's contract."""
    if importlib.util.find_spec("pytorchvideo") is None:
        return []  # told among the packages
    return [*(_look_at_part(part) for part in PARTS), _decoding(), _network()]


def _look_at_part(part: str) -> Finding:
    from distinit_plugin.hosts.pytorchvideo.alias import OLD, alias_functional_tensor, needs_functional_tensor

    name = f"pytorchvideo.{part}"
    needs = part == "transforms" and needs_functional_tensor()
    try:
        if needs:
            alias_functional_tensor()
        importlib.import_module(name)
    except Exception as error:
        advice = "Install the release that is supported: pip install pytorchvideo==0.1.5."
        return Finding(name, "broken", first_line(error), advice)
    finally:
        if needs:
            sys.modules.pop(OLD, None)  # for what is looked at next
    if needs:
        advice = f"Nothing inside distinit; in programs of your own call {ALIAS} before it is imported."
        return Finding(name, "note", "works with an alias: torchvision has no functional_tensor any more", advice)
    return Finding(name, "works", "can be imported")


def _decoding() -> Finding:
    name = "its decoder pyav"
    try:
        from pytorchvideo.data.encoded_video import EncodedVideo

        with tempfile.TemporaryDirectory(prefix="distinit-") as folder:
            path = Path(folder) / "tiny.mp4"
            write_tiny(path, "mpeg4", pictures())
            video = EncodedVideo.from_path(str(path), decode_audio=False, decoder="pyav")
            count = video.get_clip(0, 1)["video"].shape[1]
            video.close()
        if count != FRAMES:
            raise ValueError(f"{count} of {FRAMES} frames")
    except Exception as error:
        advice = "Let datasets read through this package: distinit_plugin.hosts.pytorchvideo.Videos."
        return Finding(name, "note", first_line(error), advice)
    return Finding(name, "works", f"{FRAMES} frames read (its decoder torchvision is dead, decord is an extra package)")


def _network() -> Finding:
    """A network by name, on the meta device."""
    import torch

    from distinit_plugin.models.factory import build_network
    from distinit_plugin.models.network import InputSpec

    name = "pytorchvideo/x3d_xs"
    try:
        with torch.device("meta"):
            network = build_network(name, num_classes=2, input=InputSpec(num_frames=4, train_crop_size=160))
            network({"rgb": torch.zeros(1, 3, 4, 160, 160)})
    except Exception as error:
        return Finding(
            name, "broken", first_line(error), "Install the supported release: pip install pytorchvideo==0.1.5."
        )
    return Finding(name, "works", "builds and runs as a student")
