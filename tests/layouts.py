"""Our networks' weights written as the public code bases write theirs: inverses of the translations, made for tests."""

from __future__ import annotations

import re
import struct
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from distinit_plugin.weights.crc32c import crc32c

BLOCKS = ("3b", "3c", "4b", "4c", "4d", "4e", "4f", "5b", "5c")
PLACES = dict(zip(BLOCKS, (5, 6, 8, 9, 10, 11, 12, 14, 15), strict=True))
STEM_PLACES = {"1a_7x7": 0, "2b_1x1": 2, "2c_3x3": 3}


def calibrate(network: nn.Module, clip: Tensor, seed: int = 1) -> nn.Module:
    """Random BN scales and summands with statistics that fit the weights; evaluation mode."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, (nn.BatchNorm2d, nn.BatchNorm3d)):
                if module.weight is not None:
                    module.weight.uniform_(0.5, 1.5, generator=generator)
                module.bias.normal_(0.0, 0.3, generator=generator)
                module.momentum = None
            elif isinstance(module, (nn.Conv3d, nn.Linear)):
                fan_in = module.weight[0].numel()
                module.weight.normal_(0.0, fan_in**-0.5, generator=generator)
                if module.bias is not None:
                    module.bias.normal_(0.0, 0.3, generator=generator)
        network.train()
        network({"rgb": clip, "flow": clip})
    return network.eval()


def state_of(network: nn.Module) -> dict[str, Tensor]:
    return {key: value for key, value in network.state_dict().items() if not key.endswith("num_batches_tracked")}


# ------------------------------------------------------------------------------------------------------- Inception
def pytorch_i3d(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """piergiaj/pytorch-i3d."""
    written = {}
    for key, value in state.items():
        if key.startswith("fc."):
            written[f"logits.conv3d.{key[3:]}"] = value[:, :, None, None, None] if value.ndim == 2 else value
        else:
            written[key.replace(".conv.", ".conv3d.")] = value
    return written


def _split(key: str) -> tuple[str, str, str, str]:
    """(block or part of the stem, branch, a or b, rest)."""
    unit, _, rest = key.partition(".")
    if unit.startswith("Conv"):
        return unit.partition("_")[2], "", "", rest
    name, _, rest = rest.partition(".")
    return unit.removeprefix("Mixed_"), name[1], name[2:], rest


def torchvision_s3d(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """torchvision's s3d."""
    written = {}
    for key, value in state.items():
        if key.startswith("fc."):
            written[f"classifier.1.{key[3:]}"] = value[:, :, None, None, None] if value.ndim == 2 else value
            continue
        part, branch, letter, rest = _split(key)
        kind, _, leaf = rest.partition(".")
        place = f"features.{STEM_PLACES[part] if not branch else PLACES[part]}"
        numbers = []
        if branch:
            place += f".branch{branch}"
            numbers = {"0": [], "3": ["1"]}.get(branch, ["0" if letter == "a" else "1"])
        if part in ("1a_7x7", "2c_3x3") or (branch in ("1", "2") and letter == "b"):
            numbers = [*numbers, "1" if kind.startswith("temporal") else "0"]
        numbers = [*numbers, "0" if kind in ("conv", "temporal") else "1"]
        written[".".join([place, *numbers, leaf])] = value
    return written


def kylemin_s3d(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """kylemin/S3D, wrapped for several GPUs."""
    written = {}
    for key, value in state.items():
        if key.startswith("fc."):
            written[f"module.fc.0.{key[3:]}"] = value[:, :, None, None, None] if value.ndim == 2 else value
            continue
        part, branch, letter, rest = _split(key)
        kind, _, leaf = rest.partition(".")
        place = f"module.base.{STEM_PLACES[part] if not branch else PLACES[part]}"
        if branch:
            place += f".branch{branch}." + {"0": "0", "3": "1"}.get(branch, "0" if letter == "a" else "1")
        name = "bn" if kind.endswith("bn") else "conv"
        if part in ("1a_7x7", "2c_3x3") or (branch in ("1", "2") and letter == "b"):
            name += "_t" if kind.startswith("temporal") else "_s"
        written[f"{place}.{name}.{leaf}"] = value
    return written


def _tensorflow(
    state: Mapping[str, Tensor], scope: str, conv: str, names: Mapping[str, str], classifier: tuple[str, str]
) -> dict[str, Tensor]:
    written = {}
    for key, value in state.items():
        if value.ndim == 5:
            value = value.permute(2, 3, 4, 1, 0)
        if key.startswith("fc.") or ".gate." in key:
            value = value.T[None, None, None] if value.ndim == 2 else value
        if key.startswith("fc."):
            written[scope + classifier[key == "fc.bias"]] = value
            continue
        part, branch, letter, rest = _split(key)
        unit = f"{conv}_{part}"
        if branch:
            size = "3x3" if letter == "b" and branch != "3" else "1x1"
            place = "b" if letter == "b" else "a"
            if (part, branch, letter) == ("5b", "2", "b"):
                place = "a"  # so it is in the published files
            unit = f"Mixed_{part}/Branch_{branch}/{conv}_0{place}_{size}"
        written[f"{scope}{unit}/{names[rest]}"] = value
    return written


def kinetics_i3d(state: Mapping[str, Tensor], scope: str = "RGB/inception_i3d/") -> dict[str, Tensor]:
    """DeepMind's kinetics-i3d; with an empty scope as of the 600 classes: BN of 5 axes, slots of the optimizer."""
    norm = {"bias": "beta", "running_mean": "moving_mean", "running_var": "moving_variance"}
    names = {"conv.weight": "conv_3d/w", **{f"bn.{ours}": f"batch_norm/{theirs}" for ours, theirs in norm.items()}}
    logits = ("Logits/Conv3d_0c_1x1/conv_3d/w", "Logits/Conv3d_0c_1x1/conv_3d/b")
    written = _tensorflow(state, scope, "Conv3d", names, logits)
    if scope:
        return written
    for key, value in list(written.items()):
        if "/batch_norm/" in key:
            written[key] = value[None, None, None, None]
        if "moving" not in key:
            written[f"{key}/Momentum"] = torch.rand(written[key].shape)
    return written


def tf_slim(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """TF-slim's S3D-G, with a step counter and a slot."""
    norm = {"bias": "beta", "running_mean": "moving_mean", "running_var": "moving_variance"}
    names = {
        "conv.weight": "weights",
        "temporal.weight": "temporal/weights",
        "temporal.bias": "temporal/biases",
        "gate.weight": "self_gating/transformer_W/weights",
        **{f"bn.{ours}": f"BatchNorm/{theirs}" for ours, theirs in norm.items()},
    }
    logits = ("Logits/Conv2d_0c_1x1/weights", "Logits/Conv2d_0c_1x1/biases")
    written = _tensorflow(state, "InceptionV1/", "Conv2d", names, logits)
    written["global_step"] = torch.tensor(140_000)
    written["InceptionV1/Conv2d_1a_7x7/weights/Momentum"] = torch.ones(3)
    return written


# --------------------------------------------------------------------------------------------------------- Caffe2
def vmz_caffe2(state: Mapping[str, Tensor], depths: tuple[int, ...]) -> dict[str, Tensor]:
    """VMZ's blobs: blocks counted through."""
    norm = {"weight": "s", "bias": "b", "running_mean": "rm", "running_var": "riv"}
    factored_stem = "stem.3.weight" in state
    written = {}
    for key, value in state.items():
        parts = key.split(".")
        leaf = parts[-1]
        if key.startswith("fc."):
            name = f"last_out_L{len(value)}_{leaf[0]}"
        elif parts[0] == "stem":
            middle = "_middle" if factored_stem and parts[1] in "01" else ""
            name = f"conv1{middle}_w" if parts[1] in "03" else f"conv1{middle}_spatbn_relu_{norm[leaf]}"
        else:
            block = sum(depths[: int(parts[0][-1]) - 1]) + int(parts[1])
            if parts[2] == "downsample":
                name = f"shortcut_projection_{block}" + ("_w" if parts[3] == "0" else f"_spatbn_{norm[leaf]}")
            else:
                position, inner = parts[2][-1], ".".join(parts[3:-1])
                middle = "_middle" if inner in ("0.0", "0.1") else ""
                is_norm = inner in ("0.1", "1")
                name = f"comp_{block}_{'spatbn' if is_norm else 'conv'}_{position}{middle}_"
                name += norm[leaf] if is_norm else "w"
        written[name] = value
    return written


# ----------------------------------------------------------------------------------------------------- PySlowFast
def pyslowfast(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """PySlowFast's names for PyTorchVideo's ResNets, SlowFast and X3D."""
    numbers = sorted({int(key.split(".")[1]) for key in state if ".res_blocks." in key})
    stages = {number: stage for stage, number in enumerate(numbers, start=2)}
    stages[0] = 1
    written = {}
    for key, value in state.items():
        block, rest = re.match(r"blocks\.(\d+)\.(.*)", key).groups()
        stage = stages.get(int(block))
        pathway, found = "0", re.match(r"multipathway_blocks\.(\d)\.(.*)", rest)
        if found:
            pathway, rest = found.groups()
        if rest.startswith("multipathway_fusion."):
            rest = rest.removeprefix("multipathway_fusion.")
            name = f"s{stage}_fuse." + rest.replace("conv_fast_to_slow", "conv_f2s").replace("norm", "bn")
        elif stage == 1:
            for theirs, ours in (("conv.conv_t", "conv_xy"), ("conv.conv_xy", "conv"), ("norm", "bn")):
                if rest.startswith(theirs):
                    rest = ours + rest.removeprefix(theirs)
                    break
            name = f"s1.pathway{pathway}_stem.{rest}"
        elif stage is None:
            heads = {
                "proj": "projection",
                "pool.pre_conv": "conv_5",
                "pool.pre_norm": "conv_5_bn",
                "pool.post_conv": "lin_5",
            }
            place, _, leaf = rest.rpartition(".")
            name = f"head.{heads[place]}.{leaf}"
        else:
            rest = re.sub(r"branch1_(conv|norm)", lambda m: "branch1" + ("_bn" if m[1] == "norm" else ""), rest)
            rest = re.sub(r"norm_b\.1\.block\.([02])", lambda m: f"se.fc{1 + int(m[1]) // 2}", rest)
            rest = re.sub(r"norm_b\.0", "norm_b", rest)
            rest = re.sub(r"conv_([abc])\.", r"\1.", rest)
            rest = re.sub(r"norm_([abc])\.", r"\1_bn.", rest)
            name = f"s{stage}.pathway{pathway}_res" + rest.removeprefix("res_blocks.")
        written[name] = value
    return written


def pyslowfast_blob(key: str) -> str:
    """The Caffe2 blob of one of PySlowFast's keys of a ResNet without non-local blocks and gates."""
    norm = {"weight": "s", "bias": "b", "running_mean": "rm", "running_var": "riv"}
    place, _, leaf = key.rpartition(".")
    is_norm = place.endswith("bn")
    end = f"bn_{norm[leaf]}" if is_norm else leaf[0]
    if place.startswith("head."):
        return f"pred_{end}"
    if place.startswith("s1."):
        return f"{'res_' if is_norm else ''}conv1_{end}"
    stage, block, unit = re.match(r"s(\d)\.pathway0_res(\d+)\.(.*)", place).groups()
    return f"res{stage}_{block}_{unit.removesuffix('_bn').replace('branch2.', 'branch2')}_{end}"


# ------------------------------------------------------------------------------------------- TensorFlow's own files
def _varint(value: int) -> bytes:
    out = b""
    while value > 0x7F:
        out += bytes([value & 0x7F | 0x80])
        value >>= 7
    return out + bytes([value])


def _masked(data: bytes) -> bytes:
    crc = crc32c(data)
    return struct.pack("<I", (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF)


def _field(number: int, value: int | bytes) -> bytes:
    if isinstance(value, int):
        return _varint(number << 3) + _varint(value)
    return _varint(number << 3 | 2) + _varint(len(value)) + value


def _block(rows: list[tuple[bytes, bytes]]) -> bytes:
    """Keys share their beginnings; every 16th begins anew."""
    out, restarts, last = b"", [], b""
    for index, (key, value) in enumerate(rows):
        shared = 0
        if index % 16 == 0:
            restarts.append(len(out))
        else:
            while shared < min(len(key), len(last)) and key[shared] == last[shared]:
                shared += 1
        out += _varint(shared) + _varint(len(key) - shared) + _varint(len(value)) + key[shared:] + value
        last = key
    restarts = restarts or [0]
    return out + struct.pack(f"<{len(restarts)}I", *restarts) + struct.pack("<I", len(restarts))


def write_tensorflow(prefix: Path, variables: Mapping[str, Tensor]) -> Path:
    """Write ``prefix.index`` and ``prefix.data-00000-of-00001``; returns the index."""
    types = {torch.float32: 1, torch.float64: 2, torch.int32: 3, torch.int64: 9, torch.float16: 19}
    data, rows = b"", []
    for name in sorted(variables):
        value = variables[name]
        raw = np.ascontiguousarray(value.detach().numpy()).tobytes()
        shape = b"".join(_field(2, _field(1, size)) for size in value.shape)
        entry = _field(1, types[value.dtype]) + _field(2, shape)
        entry += (_field(4, len(data)) if data else b"") + _field(5, len(raw))
        entry += _varint(6 << 3 | 5) + _masked(raw)
        rows.append((name.encode(), entry))
        data += raw
    rows.insert(0, (b"", _field(1, 1) + _field(3, _field(1, 1))))
    out, handles = b"", []
    for start in range(0, len(rows), 40):
        part = rows[start : start + 40]
        content = _block(part) + b"\0"
        handles.append((part[-1][0], _varint(len(out)) + _varint(len(content) - 1)))
        out += content + _masked(content)
    places = []
    for content in (_block([]) + b"\0", _block(handles) + b"\0"):
        places.append(_varint(len(out)) + _varint(len(content) - 1))
        out += content + _masked(content)
    out += b"".join(places).ljust(40, b"\0") + struct.pack("<Q", 0xDB4775248B80FB57)
    index = prefix.with_name(prefix.name + ".index")
    index.write_bytes(out)
    prefix.with_name(prefix.name + ".data-00000-of-00001").write_bytes(data)
    return index


def numpy_blobs(state: Mapping[str, Tensor]) -> dict[str, OrderedDict[str, np.ndarray]]:
    """As VMZ pickles them."""
    return {"blobs": OrderedDict((key, np.ascontiguousarray(value.numpy())) for key, value in state.items())}
