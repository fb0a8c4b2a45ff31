"""Reading weights, loading them with a report, inflating 2D weights into 3D networks."""

from distinit_plugin.weights.inflate import inflate, inflate_state_dict
from distinit_plugin.weights.load import load_weights
from distinit_plugin.weights.read import CheckpointFile, read_checkpoint
from distinit_plugin.weights.report import LoadReport

__all__ = ["CheckpointFile", "LoadReport", "inflate", "inflate_state_dict", "load_weights", "read_checkpoint"]
