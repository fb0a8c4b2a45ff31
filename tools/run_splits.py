"""The same as ``distinit run-splits``."""

from distinit_plugin.cli import run_tool

if __name__ == "__main__":
    run_tool("run-splits")
