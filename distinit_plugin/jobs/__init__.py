"""Whole jobs, each from one configuration: what the verbs of the command line and ``import distinit_plugin`` call."""
