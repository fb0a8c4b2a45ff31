"""The same as ``distinit cache-targets``."""

from distinit_plugin.cli import run_tool

if __name__ == "__main__":
    run_tool("cache-targets")
