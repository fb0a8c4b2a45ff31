"""Whole jobs, each from one configuration: what the verbs of the command line and ``import distinit_plugin`` call."""

from distinit_plugin.jobs.prediction import Prediction, predict
from distinit_plugin.jobs.probing import ProbeResult, probe
from distinit_plugin.jobs.running import RunResult, run
from distinit_plugin.jobs.splits import run_splits
from distinit_plugin.jobs.testing import test
from distinit_plugin.jobs.training import train

__all__ = ["Prediction", "ProbeResult", "RunResult", "predict", "probe", "run", "run_splits", "test", "train"]
