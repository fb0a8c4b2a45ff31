"""Weights by library name: torchvision's tags, timm's defaults, or a file."""

from __future__ import annotations

import hashlib
import logging
import os
import re
import socket
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import torch
import torchvision.models

from distinit_plugin.errors import UserError, WeightsError
from distinit_plugin.registry import near_matches
from distinit_plugin.weights.read import CheckpointFile, cache_folder, find_weights_file, read_checkpoint

NETWORK_TIMEOUT = 20.0
"""Seconds without an answer after which a download is given up."""

TIMM_DEFAULT = "timm"
"""The value of WEIGHTS that asks for timm's own pretrained weights."""

_TAG = re.compile(r"[A-Z][A-Z0-9_]+")
_HASH_IN_NAME = re.compile(r"-([0-9a-f]{8,})\.")

logger = logging.getLogger(__name__)


def source_weights(name: str, weights: str) -> CheckpointFile:
    """The weights of an image or video network by name.

    Args:
        name: ``torchvision/NAME``, ``timm/NAME`` or a registered network.
        weights: A torchvision tag, ``timm``, or a file.

    Raises:
        UserError: The library has no such network.
        WeightsError: The weights are neither on disk nor downloadable, or unreadable.
    """
    library, _, model = name.partition("/")
    if library == "torchvision":
        tags = torchvision_tags(model)
        if weights in tags:
            return torchvision_weights(model, weights)
        if not Path(weights).expanduser().exists() and _TAG.fullmatch(weights):
            raise WeightsError(
                f"torchvision/{model} has no weights named {weights}.{near_matches(weights, list(tags))} Known: "
                f"{', '.join(tags) or 'none'}; or give a file."
            )
    if library == "timm" and weights == TIMM_DEFAULT:
        network = build_timm(model, pretrained=True)
        return CheckpointFile(f"{name} (timm's weights)", dict(network.state_dict()), "", {})
    try:
        return read_checkpoint(weights)
    except WeightsError as error:
        if library != "torchvision" or not tags or Path(weights).expanduser().exists():
            raise
        files = ", ".join(f"{tag} ({file_of(member)})" for tag, member in tags.items())
        raise WeightsError(f"{error} torchvision's own weights of {model} are: {files}.") from error


def weights_digest(name: str, weights: str) -> str:
    """SHA-256 of the file that a network's weights are in, without looking into it.

    Args:
        name: As in ``source_weights``.
        weights: Likewise.

    Returns:
        64 hexadecimal digits; where a published file is not on this disk, the first ones that its name tells; for
        ``timm``'s weights ``timm``; empty: the file is not here.
    """
    if weights == TIMM_DEFAULT:
        return TIMM_DEFAULT
    library, _, model = name.partition("/")
    tags = torchvision_tags(model) if library == "torchvision" else {}
    path = cache_folder() / file_of(tags[weights]) if weights in tags else None
    try:
        path = path or find_weights_file(weights)
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except (OSError, WeightsError):
        found = _HASH_IN_NAME.search(path.name) if path is not None else None
        return found[1] if found else ""


def torchvision_tags(model: str) -> Mapping[str, Any]:
    """Tag → torchvision's weights entry; empty for a network without published weights.

    Raises:
        UserError: torchvision has no such network.
    """
    known = torchvision.models.list_models()
    if model not in known:
        raise UserError(f"torchvision has no network named '{model}'.{near_matches(model, known)}")
    return dict(torchvision.models.get_model_weights(model).__members__)


def torchvision_categories(model: str, tag: str) -> list[str]:
    """Names of the classes of published weights; empty where the tag is none of theirs, or they have no names.

    Raises:
        UserError: torchvision has no such network.
    """
    member = torchvision_tags(model).get(tag)
    return [] if member is None else list(member.meta.get("categories", []))


def file_of(member: Any) -> str:
    """File name of a torchvision weights entry."""
    return os.path.basename(urlparse(member.url).path)


def torchvision_weights(model: str, tag: str) -> CheckpointFile:
    """Published weights from torch's download cache, fetched into it first if they are not there.

    Raises:
        WeightsError: Not on disk and not downloadable; the text has the file's name, origin and place.
    """
    member = torchvision_tags(model)[tag]
    path = cache_folder() / file_of(member)
    if not path.is_file():
        _download(member.url, path, f"torchvision/{model} {tag}")
    return read_checkpoint(path)


def _download(url: str, path: Path, what: str) -> None:
    logger.info("downloading %s to %s", what, path)
    checksum = _HASH_IN_NAME.search(path.name)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _socket_timeout(NETWORK_TIMEOUT):
            torch.hub.download_url_to_file(url, str(path), hash_prefix=checksum[1] if checksum else None)
    except (OSError, RuntimeError, urllib.error.URLError) as error:
        raise WeightsError(
            f"the weights of {what} are not on this disk and could not be downloaded ({error}). The file is "
            f"{path.name}, from {url}. Copy it to {path}, or set WEIGHTS to its path."
        ) from error


@contextmanager
def _socket_timeout(seconds: float) -> Iterator[None]:
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def build_timm(model: str, *, pretrained: bool, **options: Any) -> torch.nn.Module:
    """A timm network.

    Raises:
        UserError: timm is not installed, has no such network, or refuses the options.
        WeightsError: ``pretrained``, and the weights are neither on disk nor downloadable.
    """
    timm = import_timm()
    timm_config(model)
    if pretrained:
        _check_timm_weights(model)
    try:
        with _socket_timeout(NETWORK_TIMEOUT):
            return timm.create_model(model, pretrained=pretrained, **options)
    except Exception as error:  # the hub's client has errors of many kinds
        if pretrained:
            raise WeightsError(_timm_advice(model, error)) from error
        raise UserError(f"timm cannot build {model} with {options}: {error}") from error


def import_timm() -> Any:
    """The module timm.

    Raises:
        UserError: It is not installed.
    """
    try:
        import timm
    except ImportError as error:
        raise UserError("networks named timm/… need the package timm. Install it.") from error
    return timm


def timm_config(model: str) -> Any:
    """Describe, in timm's words, a network's pretrained weights.

    Raises:
        UserError: timm has no such network, or no weights of that name for it.
    """
    timm = import_timm()
    architecture = model.partition(".")[0]
    if not timm.is_model(architecture):
        raise UserError(f"timm has no network named '{architecture}'.{near_matches(architecture, timm.list_models())}")
    try:
        return timm.get_pretrained_cfg(model)
    except RuntimeError as error:
        known = [name.partition(".")[2] for name in timm.list_pretrained(architecture)]
        raise UserError(f"timm/{architecture}: {error} Known: {', '.join(known) or 'none'}.") from error


def _check_timm_weights(model: str) -> None:
    """Find out quickly that there is no way to the weights; the hub's client would retry for a minute."""
    config = timm_config(model)
    if config is None or not config.has_weights:
        raise WeightsError(f"timm has no pretrained weights of {model}. Set WEIGHTS to a file, or choose another ARCH.")
    from huggingface_hub import constants, try_to_load_from_cache

    names = ("model.safetensors", "pytorch_model.bin")
    if not config.hf_hub_id or any(isinstance(try_to_load_from_cache(config.hf_hub_id, name), str) for name in names):
        return
    if constants.HF_HUB_OFFLINE:
        raise WeightsError(_timm_advice(model, "HF_HUB_OFFLINE is set"))
    if urllib.request.getproxies():
        return  # only the proxy knows whether there is a way
    host = urlparse(constants.ENDPOINT)
    try:
        socket.create_connection((host.hostname or "", host.port or 443), timeout=NETWORK_TIMEOUT).close()
    except OSError as error:
        raise WeightsError(_timm_advice(model, error)) from error


def _timm_advice(model: str, error: object) -> str:
    config = timm_config(model)
    return (
        f"the weights of timm/{model} are not on this disk and could not be downloaded ({error}). The file is "
        f"model.safetensors of the model '{config.hf_hub_id}' on the Hugging Face hub. Download it elsewhere and set "
        "WEIGHTS to its path."
    )
