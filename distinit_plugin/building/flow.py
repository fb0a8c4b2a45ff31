"""Optical flow of a configuration: computed on the device, or read from a store."""

from __future__ import annotations

from distinit_plugin.config.node import CfgNode
from distinit_plugin.data.flow import LiveFlow, StoredFlow
from distinit_plugin.errors import UserError, naming
from distinit_plugin.flow.backends import build_flow_backend
from distinit_plugin.flow.codes import Quantiser
from distinit_plugin.flow.store import FlowSettings, FlowStore


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
        UserError: It is no store, one of another frame rate, or one whose gaps another back end would fill.
    """
    if not cfg.FLOW.STORE:
        return None
    # Workers compute what is missing themselves.
    live = build_live_flow(cfg) if cfg.FLOW.MISSING == "live" else None
    with naming("FLOW.STORE"):
        if cfg.FLOW.LAYOUT == "store":
            store = FlowStore.open(cfg.FLOW.STORE)
        else:
            store = FlowStore.foreign(cfg.FLOW.STORE, cfg.FLOW.LAYOUT, Quantiser(cfg.FLOW.BOUND, cfg.FLOW.ROUNDING))
    if store.settings is not None:
        _check(store.settings, cfg, live)
    return StoredFlow(store, cfg.FLOW.BOUND, live)


def _check(stored: FlowSettings, cfg: CfgNode, live: LiveFlow | None) -> None:
    fps = cfg.CORPUS.TARGET_FPS or None
    if stored.fps != fps:
        raise UserError(
            f"FLOW.STORE: {cfg.FLOW.STORE} holds flow between frames {_rate(stored.fps)}, CORPUS.TARGET_FPS asks for "
            f"frames {_rate(fps)}. Set CORPUS.TARGET_FPS to the store's, or extract the flow again with --fps."
        )
    if live is not None and live.identity != stored.backend:
        raise UserError(
            f"FLOW.BACKEND: {live.identity} would stand in for missing flow of {cfg.FLOW.STORE}, which was made by "
            f"{stored.backend}. Name that back end, or set FLOW.MISSING refuse."
        )


def _rate(fps: float | None) -> str:
    return f"at {fps:g} fps" if fps else "as they are in the file"
