"""Optical flow of a configuration: computed on the device, or read from a store."""

from __future__ import annotations

from distinit_plugin.config.node import CfgNode
from distinit_plugin.data.flow import LiveFlow, StoredFlow
from distinit_plugin.errors import UserError, naming
from distinit_plugin.flow.backends import build_flow_backend
from distinit_plugin.flow.codes import Quantiser
from distinit_plugin.flow.store import FlowStore


def build_live_flow(cfg: CfgNode) -> LiveFlow:
    """The computation of flow, on the device of the frames that it is given.

    Raises:
        UserError: The back end is not there, or its weights are not.
    """
    options = {"weights": cfg.FLOW.WEIGHTS, "size": cfg.FLOW.RAFT_SIZE} if cfg.FLOW.BACKEND == "raft" else {}
    backend = build_flow_backend(cfg.FLOW.BACKEND, "FLOW.BACKEND", **options)
    return LiveFlow(backend, Quantiser(cfg.FLOW.BOUND, cfg.FLOW.ROUNDING))


def build_stored_flow(cfg: CfgNode) -> StoredFlow | None:
    """The store of flow; ``None`` where FLOW.STORE is empty, so that flow is computed in the job.

    Raises:
        UserError: It is no store, or one of another frame rate.
    """
    if not cfg.FLOW.STORE:
        return None
    with naming("FLOW.STORE"):
        store = FlowStore.open(cfg.FLOW.STORE)
    fps = cfg.CORPUS.TARGET_FPS or None
    if store.settings.fps != fps:
        raise UserError(
            f"FLOW.STORE: {cfg.FLOW.STORE} holds flow between frames {_rate(store.settings.fps)}, CORPUS.TARGET_FPS "
            f"asks for frames {_rate(fps)}. Set CORPUS.TARGET_FPS to the store's, or extract the flow again with --fps."
        )
    # Workers compute what is missing themselves: on the CPU.
    live = build_live_flow(cfg) if cfg.FLOW.MISSING == "live" else None
    return StoredFlow(store, cfg.FLOW.BOUND, live)


def _rate(fps: float | None) -> str:
    return f"at {fps:g} fps" if fps else "as they are in the file"
