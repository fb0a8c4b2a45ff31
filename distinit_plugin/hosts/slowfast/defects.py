"""What PySlowFast imports but fails in: cured once it is imported."""

from __future__ import annotations

import inspect
import multiprocessing
from collections.abc import Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import simplejson
import torch
import torchvision.io
from torch import Tensor

from distinit_plugin.hosts.slowfast.decoding import decode, name_of_video, stands_for_container
from distinit_plugin.hosts.slowfast.patches import Patch


def _raises(error: type[Exception] | tuple[type[Exception], ...], call: partial[Any]) -> bool:
    try:
        call()
    except error:
        return True
    except Exception:  # it goes wrong later, as it must with what it was given here
        return False
    return False


# ------------------------------------------------------------------------------------------------------ decoding


def dead_backends() -> set[str]:
    """DATA.DECODING_BACKENDs that fail for every video."""
    from slowfast.datasets import decoder

    dead = set()
    if not hasattr(torchvision.io, "_probe_video_from_memory"):
        dead.add("torchvision")
    stream = SimpleNamespace(average_rate=30, frames=30, duration=30)
    container = SimpleNamespace(streams=SimpleNamespace(video=[stream]))
    # It takes lists since 2022 and calculates with them as with numbers.
    if _raises(TypeError, partial(decoder.pyav_decode, container, [1], [2], 0, 1, 30)):
        dead.add("pyav")
    return dead


def _replace_decoder() -> None:
    from slowfast.datasets import decoder, video_container

    dead = dead_backends()
    theirs, their_container = decoder.decode, video_container.get_video_container

    def open_or_name(path: str, multi_thread_decode: bool = False, backend: str = "pyav") -> Any:
        return name_of_video(path) if backend in dead else their_container(path, multi_thread_decode, backend)

    def decode_either(container: Any, *arguments: Any, **options: Any) -> Any:
        chosen = decode if stands_for_container(container) else theirs
        return chosen(container, *arguments, **options)

    decoder.decode = decode_either
    video_container.get_video_container = open_or_name


# ------------------------------------------------------------------------------------------- Ptv datasets, metrics


def _ptv_decoder_is_dead() -> bool:
    try:
        return not hasattr(torch.ops.video_reader, "read_video_from_memory")
    except RuntimeError:
        return True


def _decode_by_pyav() -> None:
    from pytorchvideo.data import encoded_video

    theirs = encoded_video.select_video_class
    encoded_video.select_video_class = lambda decoder: theirs("pyav" if decoder == "torchvision" else decoder)


def _gives_four_fields() -> bool:
    try:
        from slowfast.datasets.ptv_datasets import DictToTuple
    except ImportError:  # PyTorchVideo's transforms are not to be had
        return False
    names = ("video", "label", "video_index", "clip_index", "aug_index")
    return len(DictToTuple(1, 1)(dict.fromkeys(names, 0))) == 4


def _add_time_field() -> None:
    from slowfast.datasets.ptv_datasets import DictToTuple

    theirs = DictToTuple.forward

    def forward(self: Any, sample: dict[str, Any]) -> tuple[Any, ...]:
        video, label, index, meta = theirs(self, sample)
        return video, label, index, torch.zeros(1), meta

    DictToTuple.forward = forward


def _fails_with_few_classes() -> bool:
    from slowfast.utils import metrics

    return _raises(RuntimeError, partial(metrics.topks_correct, torch.zeros(1, 2), torch.zeros(1).long(), (1, 5)))


def _limit_top_k() -> None:
    from slowfast.utils import metrics

    theirs = metrics.topks_correct

    def topks_correct(preds: Tensor, labels: Tensor, ks: Sequence[int]) -> list[Tensor]:
        return theirs(preds, labels, [min(k, preds.size(1)) for k in ks])

    metrics.topks_correct = topks_correct


# ------------------------------------------------------------------------------------------------------ training


def _refuses_infinity() -> bool:
    return _raises(ValueError, partial(simplejson.dumps, float("inf"), use_decimal=True))


def _allow_infinity() -> None:
    from slowfast.utils import logging

    logging.simplejson = SimpleNamespace(dumps=partial(simplejson.dumps, allow_nan=True))


def _skip_synchronize() -> None:
    torch.cuda.synchronize = lambda *_, **__: None


def _returns_no_norm() -> bool:
    parameter = torch.zeros(1, requires_grad=True)
    parameter.grad = torch.zeros(1)
    returned: Any = torch.nn.utils.clip_grad_value_([parameter], 1.0)
    return returned is None


def _return_norm() -> None:
    theirs = torch.nn.utils.clip_grad_value_

    def clip_grad_value_(parameters: Any, clip_value: float, *arguments: Any, **options: Any) -> Tensor:
        given = [parameters] if isinstance(parameters, Tensor) else list(parameters)
        norm = torch.nn.utils.get_total_norm([item.grad for item in given if item.grad is not None])
        theirs(given, clip_value, *arguments, **options)
        return norm

    torch.nn.utils.clip_grad_value_ = clip_grad_value_  # type: ignore[assignment]


def _put_multi_tensor() -> None:
    namespace = SimpleNamespace(AdamW=partial(torch.optim.AdamW, foreach=True))
    torch.optim._multi_tensor = namespace  # type: ignore[attr-defined]


def workers_start_anew() -> bool:
    """Whether workers of loaders start with nothing imported, and PySlowFast cannot be imported as it is."""
    methods = multiprocessing.get_all_start_methods()  # the first is what Python takes by itself
    return "fork" in methods and (multiprocessing.get_start_method(allow_none=True) or methods[0]) != "fork"


def _fork_workers() -> None:
    multiprocessing.set_start_method("fork", force=True)


def sync_norm_fails() -> bool:
    """Whether BN.NORM_TYPE sync_batchnorm, which is PyTorchVideo's, cannot be built."""
    try:
        from pytorchvideo.layers.batch_norm import NaiveSyncBatchNorm3d
    except ImportError:  # told with all that is not installed
        return False
    return "num_sync_devices" not in inspect.signature(NaiveSyncBatchNorm3d).parameters


DEFECTS = (
    Patch(
        "decoder",
        "every video fails: 'torchvision.io' has no '_probe_video_from_memory'; pyav: 'list' and 'int'",
        lambda: bool(dead_backends()),
        _replace_decoder,
    ),
    Patch(
        "ptv_fields",
        "Ptvkinetics, Ptvcharades, Ptvssv2: not enough values to unpack (expected 5, got 4)",
        _gives_four_fields,
        _add_time_field,
    ),
    Patch(
        "ptv_decoder",
        "Ptv datasets: no 'read_video_from_memory' for any video (pyav stands in for torchvision)",
        _ptv_decoder_is_dead,
        _decode_by_pyav,
    ),
    Patch(
        "few_classes",
        "MODEL.NUM_CLASSES below 5: selected index k out of range",
        _fails_with_few_classes,
        _limit_top_k,
    ),
    Patch(
        "infinite_stats",
        "Out of range float values are not JSON compliant: the training dies of one gradient norm that is inf",
        _refuses_infinity,
        _allow_infinity,
    ),
    Patch(
        "synchronize",
        "NUM_GPUS 0: Found no NVIDIA driver, after the first iteration",
        lambda: not torch.cuda.is_available(),
        _skip_synchronize,
    ),
    Patch(
        "clip_value",
        "SOLVER.CLIP_GRAD_VAL: 'NoneType' object has no attribute 'item'",
        _returns_no_norm,
        _return_norm,
    ),
    Patch(
        "multi_tensor",
        "SOLVER.OPTIMIZING_METHOD mt_adamw: torch.optim has no attribute '_multi_tensor'",
        lambda: not hasattr(torch.optim, "_multi_tensor"),
        _put_multi_tensor,
    ),
    Patch(
        "workers",
        "Python 3.14, DATA_LOADER.NUM_WORKERS above 0: cannot import name 'cat_all_gather' in each (they are forked)",
        workers_start_anew,
        _fork_workers,
    ),
)
"""Cured after PySlowFast is imported, in this order."""
