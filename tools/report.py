"""The same as ``distinit report``."""

from distinit_plugin.cli import run_tool

if __name__ == "__main__":
    run_tool("report")
