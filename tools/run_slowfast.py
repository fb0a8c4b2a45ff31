"""The same as ``distinit slowfast``."""

from distinit_plugin.cli import run_tool

if __name__ == "__main__":
    run_tool("slowfast")
