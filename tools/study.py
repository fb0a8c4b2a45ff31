"""The same as ``distinit study``."""

from distinit_plugin.cli import run_tool

if __name__ == "__main__":
    run_tool("study")
