"""``python -m distinit_plugin.hosts.slowfast``: the same as ``distinit slowfast``."""

import sys

from distinit_plugin.cli import run_verb

if __name__ == "__main__":
    sys.exit(run_verb("slowfast", sys.argv[1:], prog="python -m distinit_plugin.hosts.slowfast"))
