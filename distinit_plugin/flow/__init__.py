"""Optical flow between frames: back ends behind one interface, measures, pictures, and the flow that is kept."""

from distinit_plugin.flow import opencv, raft, tvl1_backend  # noqa: F401  they register themselves
from distinit_plugin.flow.backends import FlowBackend, build_flow_backend, rgb_to_gray

__all__ = ["FlowBackend", "build_flow_backend", "rgb_to_gray"]
