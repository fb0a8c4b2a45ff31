"""The parts of a ``PredictedFlow3D`` from the files of the trainings before."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

from torch import Tensor

from distinit_plugin.config.load import parse_cfg
from distinit_plugin.config.rules import FLOW
from distinit_plugin.engine.checkpoint import load_checkpoint
from distinit_plugin.errors import UserError, WeightsError
from distinit_plugin.models.inception import SLIM_NAMES
from distinit_plugin.models.predicted_flow import DECODED_LAYER, PredictedFlow3D
from distinit_plugin.types import Network
from distinit_plugin.weights import LoadReport, load_weights
from distinit_plugin.weights.load import load_tensors

DECODED_NAMES = (DECODED_LAYER, SLIM_NAMES[DECODED_LAYER])


def load_flow_net(network: Network, path: str) -> LoadReport:
    """Trunk and decoder from a run in which an S3DG decoded flow at 3A; its later layers are left out.

    Args:
        network: A ``PredictedFlow3D``.
        path: A checkpoint of ``distinit run`` or ``distinit probe-motion``.

    Raises:
        UserError: The network has no such parts.
        WeightsError: The file is no such checkpoint, or of another width or decoder; the network is untouched.
    """
    if not isinstance(network, PredictedFlow3D):
        raise _no_parts(network)
    state = load_checkpoint(path)
    trunk, decoder = network.flow_net.bare_state_dict(), network.decoder.state_dict()
    target = {f"flow_net.{key}": value for key, value in trunk.items()}
    target |= {f"decoder.{key}": value for key, value in decoder.items()}
    weights = cast(Mapping[str, Tensor], state["model_state"])
    found = {f"flow_net.{key}": weights[key] for key in trunk if key in weights}
    found |= {f"decoder.{key}": value for key, value in _decoder_at_3a(state, path).items()}
    return load_tensors(target, found, path, strict=True)


def load_stream(network: Network, path: str) -> LoadReport:
    """The temporal stream from a file of an S3DG that sees flow; a classifier of other classes stays as it is.

    Raises:
        UserError: The network has no such part.
        WeightsError: The file is unreadable or of another network; the network is untouched.
    """
    if not isinstance(network, PredictedFlow3D):
        raise _no_parts(network)
    return load_weights(network.stream, path)


def _decoder_at_3a(state: Mapping[str, object], path: str) -> dict[str, Tensor]:
    """The decoder among the heads that the run saved, by what its configuration says."""
    own = state.get("distinit")
    adapters = own.get("adapters") if isinstance(own, Mapping) else None
    text = state.get("cfg")
    if not isinstance(adapters, Mapping) or not isinstance(text, str):
        raise WeightsError(f"{path} was not written by distinit run, so it holds no decoder. Give a checkpoint of one.")
    cfg, _ = parse_cfg(text, f"the configuration in {path}", check=False)
    names = [
        name
        for name, entry in cfg.DISTILL.TEACHERS.items()
        if entry.ARCH == FLOW and entry.LOSS_WEIGHT > 0 and entry.STUDENT_LAYER in DECODED_NAMES
    ]
    if len(names) != 1:
        raise WeightsError(
            f"{path} has {len(names) or 'no'} decoders of flow at {DECODED_LAYER}; one is needed. Give a run whose "
            f"DISTILL.TEACHERS has one entry of ARCH flow with STUDENT_LAYER {DECODED_LAYER}."
        )
    prefix = f"{names[0]}."
    return {
        key.removeprefix(prefix): value
        for key, value in adapters.items()
        if key.startswith(prefix) and isinstance(value, Tensor)
    }


def _no_parts(network: Network) -> UserError:
    return UserError(f"{type(network).__name__} has no flow network and stream. They are the parts of PredictedFlow3D.")
